"""LLM: the front door, with the interface of vLLM's offline `LLM`.

from nanovllm import LLM, SamplingParams

with LLM("Qwen/Qwen3-0.6B") as llm:
    print(llm.generate("The capital of France is")[0].outputs[0].text)
    for index, text in llm.stream(["Once upon a time"], SamplingParams(max_tokens=64)):
        print(text, end="", flush=True)
"""

import inspect
from collections.abc import Generator, Iterator
from itertools import count
from typing import Any

from tqdm.auto import tqdm

from nanovllm.config import EngineArgs
from nanovllm.engine.sequence import Sequence
from nanovllm.llm_engine import LLMEngine
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.validation import check_type, check_unicode

Params = SamplingParams | list[SamplingParams] | None


class TextStream(Iterator[tuple[int, str]]):
    """What `LLM.stream` returns: yields (prompt's index, new text).

    Closing it, or dropping the last reference to it, aborts what has not finished.
    """

    def __init__(self, llm: "LLM", seqs: list[Sequence]):
        self._llm, self._seqs = llm, seqs
        self._pieces = llm._pieces(seqs)

    def __next__(self) -> tuple[int, str]:
        return next(self._pieces)

    @property
    def outputs(self) -> list[RequestOutput] | None:
        """One output a prompt, in order, once all have ended; until then None."""
        ended = all(seq.is_finished for seq in self._seqs)
        return [RequestOutput.of(seq) for seq in self._seqs] if ended else None

    def close(self) -> None:
        self._pieces.close()
        self._llm._abort(self._seqs)  # a generator that never began has no `finally` to run

    __del__ = close


class LLM:
    """A model ready to generate. Keyword arguments are those of `EngineArgs`.

    Raises TypeError or ValueError naming the argument for anything it cannot honour.
    """

    def __init__(self, model: str, **kwargs: Any):
        self.llm_engine = LLMEngine(EngineArgs(model, **kwargs))

    # -- generating ------------------------------------------------------------------------------

    def generate(
        self, prompts: Any, sampling_params: Params = None, *, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        """One output a prompt, in order.

        prompts: a string, a list of token ids, {"prompt": ...}, {"prompt_token_ids": ...}, or a
        list of any of these. sampling_params: one for all, a list with one each, or None for the
        model's own defaults. Everything is checked before anything is queued.
        """
        seqs = self._add(prompts, sampling_params)
        silent = not use_tqdm or self.llm_engine.ranks.rank > 0
        try:
            with tqdm(total=len(seqs), desc="Processed prompts", disable=silent) as bar:
                finished = 0
                while finished < len(seqs):
                    self.llm_engine.advance()
                    finished = sum(seq.is_finished for seq in seqs)
                    bar.update(finished - bar.n)
        finally:
            self._abort(seqs)
        return [RequestOutput.of(seq) for seq in seqs]

    def chat(
        self,
        messages: list,
        sampling_params: Params = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation (a list of {"role", "content"}) or a list of them."""
        check_type("messages", messages, list)
        check_type("chat_template_kwargs", chat_template_kwargs or {}, dict)
        many = bool(messages) and isinstance(messages[0], (list, tuple))
        options = {"chat_template": chat_template, "add_generation_prompt": add_generation_prompt}
        options |= chat_template_kwargs or {}
        check_type("add_generation_prompt", options["add_generation_prompt"], bool)
        check_type("chat_template", options["chat_template"] or "", str)
        for name, value in {"messages": messages, **options}.items():
            check_unicode(name, value)
        prompts = [self._template(talk, options) for talk in (messages if many else [messages])]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def stream(self, prompts: Any, sampling_params: Params = None) -> TextStream:
        """Text as it comes: an iterator of (prompt's index, new text), whose `outputs` is the
        list of RequestOutputs when it has ended. Other calls may be made between two items."""
        return TextStream(self, self._add(prompts, sampling_params))

    def _pieces(self, seqs: list[Sequence]) -> Generator[tuple[int, str]]:
        sent = [0] * len(seqs)
        try:
            while True:
                finished = all(seq.is_finished for seq in seqs)
                for index, seq in enumerate(seqs):
                    text = seq.detokenizer.text if seq.detokenizer else ""
                    if len(text) > sent[index]:
                        yield index, text[sent[index] :]
                        sent[index] = len(text)
                if finished:
                    return
                self.llm_engine.advance()
        finally:
            self._abort(seqs)

    def _abort(self, seqs: list[Sequence]) -> None:
        held = self.llm_engine.sequences
        if left := [seq.request_id for seq in seqs if held.get(seq.request_id) is seq]:
            self.llm_engine.abort_request(left)

    # -- prompts ---------------------------------------------------------------------------------

    def _add(self, prompts: Any, params: Any) -> list[Sequence]:
        """Check all prompts, then queue them."""
        prompts, engine = self._as_list(prompts), self.llm_engine
        if not isinstance(params, (list, tuple)):
            params = [params] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but {len(params)} sampling_params")
        names = (str(i) for i in count(engine.num_requests) if str(i) not in engine.sequences)
        asked = zip(names, prompts, params, strict=False)  # names never end
        return engine.add([engine.make_request(*request) for request in asked])

    def _as_list(self, prompts: Any) -> list:
        """A list of prompts, of one prompt or many. A flat list of ints is one prompt."""
        if isinstance(prompts, (str, dict)):
            return [prompts]
        if not isinstance(prompts, (list, tuple)):
            raise TypeError(f"prompts must be a str, a list or a dict, got {prompts!r:.80}")
        is_one = bool(prompts) and all(isinstance(item, int) for item in prompts)
        return [list(prompts)] if is_one else list(prompts)

    def _template(self, conversation: list, options: dict[str, Any]) -> dict[str, Any]:
        """The conversation as a prompt; the template writes the special tokens, and no one else."""
        if not (conversation and all(map(is_message, conversation))):
            raise ValueError(
                f"messages={conversation!r:.200} must be dicts with a role and a content of text"
            )
        tokenizer = self.get_tokenizer()
        if options["chat_template"] is None and not tokenizer.chat_template:
            raise ValueError(
                f"model {self.llm_engine.args.model!r} has no chat template; pass chat_template="
            )
        try:
            text = tokenizer.apply_chat_template(conversation, tokenize=False, **options)
        except Exception as error:  # a template is a program, and may raise anything
            raise ValueError(
                f"messages={conversation!r:.200} do not fit the chat template: {error!r}"
            ) from error
        check_unicode("the chat template's text", text)  # a template can write "\ud800" itself
        ids = self.llm_engine.encode(text, add_special_tokens=False)
        return {"prompt": text, "prompt_token_ids": ids}

    def get_tokenizer(self) -> Any:
        return self.llm_engine.get_tokenizer()

    # -- the end ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Give back all memory and end the other ranks. May be called again."""
        if engine := getattr(self, "llm_engine", None):
            engine.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def is_message(message: Any) -> bool:
    """Whether it has a role, and a content of text: parts of other kinds no template here takes."""
    known = isinstance(message, dict) and "role" in message
    return known and (isinstance(message.get("content"), str) or "tool_calls" in message)


LLM.__init__.__signature__ = inspect.signature(EngineArgs).replace(return_annotation=None)  # type: ignore[attr-defined]
