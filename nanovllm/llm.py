"""LLM: the front door, with the interface of vLLM's offline `LLM`.

from nanovllm import LLM, SamplingParams

with LLM("Qwen/Qwen3-0.6B") as llm:
    print(llm.generate("The capital of France is")[0].outputs[0].text)
    for index, text in llm.stream(["Once upon a time"], SamplingParams(max_tokens=64)):
        print(text, end="", flush=True)

Several threads may call `generate`, `chat` and `stream` of one LLM at the same time. Their requests
then run in the same steps, and each caller gets its own answers. What each request draws at random
follows from its seed, or else from its place in the order of arrival, which threads do not fix.
Under torchrun every rank must make the same calls, so there only one thread may call.

After Ctrl-C the LLM can be used again: the interrupted call's requests are gone, and everybody
else's go on. (With several ranks the LLM is closed, because the ranks may then differ.)
"""

import inspect
from collections import deque
from collections.abc import Iterator
from itertools import count
from typing import Any

from tqdm.auto import tqdm

from nanovllm.config import EngineArgs
from nanovllm.engine.sequence import Sequence
from nanovllm.llm_engine import LLMEngine, read_texts
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.validation import check_type, check_unicode

Params = SamplingParams | list[SamplingParams] | None


class Call:
    """The requests of one call. Any thread's step may run them, and they end with the call.

    Closing a call aborts what is unfinished of it. If a call is dropped, that happens at the start
    of the engine's next step.
    """

    def __init__(self, engine: LLMEngine):
        self.engine = engine
        self.seqs: list[Sequence] = []  # in the order of the prompts
        self.news: dict[Sequence, None] = {}  # those with tokens, or an end, not yet looked at
        self.unfinished: set[Sequence] = set()  # as far as the news were looked at
        engine.watch(self)

    def add(self, requests: list[dict[str, Any]]) -> None:
        """Queue checked requests, each under the number that it has among all requests."""
        engine = self.engine
        engine.line_up()
        with engine.lock:
            engine.leave_line()
            # `names` is an infinite generator, so zip needs strict=False
            names = (str(i) for i in count(engine.num_requests) if str(i) not in engine.sequences)
            for name, request in zip(names, requests, strict=False):
                request["request_id"] = name
            self.unfinished.update(engine.add(requests, self))

    def advance(self) -> list[Sequence]:
        """Run a step, unless other threads' steps have brought news; the sequences with news."""
        engine = self.engine
        engine.line_up()
        with engine.lock:
            engine.leave_line()
            if not self.news:
                engine.run_step()
            if not self.news:
                self._check_more_can_come()
            news = list(self.news)
            self.news.clear()
            self.read(news)
            self.unfinished.difference_update(seq for seq in news if seq.is_finished)
        return news

    def _check_more_can_come(self) -> None:
        self.engine.check_open()
        if not self.engine.core.has_work:
            raise RuntimeError(
                f"{len(self.unfinished)} requests of this call are unfinished, but the engine has "
                f"nothing left to run: its scheduler has lost them"
            )

    def read(self, seqs: list[Sequence]) -> None:
        """Look at sequences with news before another thread can run the next step."""

    def close(self) -> None:
        self.engine.abort(self.seqs)


class TextStream(Call, Iterator[tuple[int, str]]):
    """What `LLM.stream` returns: yields (prompt's index, new text).

    Closing it aborts what has not finished. So does dropping the last reference to it, at the
    start of the next step. The texts of one step come in the order of the prompts.
    """

    def __init__(self, llm: "LLM"):
        super().__init__(llm.llm_engine)
        self._llm = llm  # an LLM that is dropped closes its engine
        self._pieces: deque[tuple[int, str]] = deque()
        self._sent: dict[Sequence, int] = {}  # characters
        self._index: dict[Sequence, int] = {}

    def add(self, requests: list[dict[str, Any]]) -> None:
        super().add(requests)
        self._index = {seq: index for index, seq in enumerate(self.seqs)}

    def read(self, seqs: list[Sequence]) -> None:
        seqs = sorted(seqs, key=self._index.__getitem__)
        for seq, text in zip(seqs, read_texts(seqs, certain_text), strict=True):
            if new := text[self._sent.get(seq, 0) :]:
                self._pieces.append((self._index[seq], new))
                self._sent[seq] = len(text)

    def __next__(self) -> tuple[int, str]:
        try:
            while self.unfinished and not self._pieces:
                self.advance()
        except BaseException:
            self.close()
            raise
        if not self._pieces:
            raise StopIteration
        return self._pieces.popleft()

    @property
    def outputs(self) -> list[RequestOutput] | None:
        """One output a prompt, in order, once all have ended; until then None."""
        if not all(seq.is_finished for seq in self.seqs):
            return None
        return [RequestOutput.of(seq) for seq in self.seqs]

    def close(self) -> None:
        self.unfinished.clear()
        self._pieces.clear()
        super().close()


def certain_text(seq: Sequence) -> str:
    return seq.detokenizer.text if seq.detokenizer else ""


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
        silent = not use_tqdm or self.llm_engine.ranks.rank > 0
        call = Call(self.llm_engine)
        try:
            call.add(self._make_requests(prompts, sampling_params))
            with tqdm(total=len(call.seqs), desc="Processed prompts", disable=silent) as bar:
                while call.unfinished:
                    before = len(call.unfinished)
                    call.advance()
                    bar.update(before - len(call.unfinished))
        finally:
            call.close()
        return [RequestOutput.of(seq) for seq in call.seqs]

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
        requests = self._make_requests(prompts, sampling_params)
        stream = TextStream(self)
        stream.add(requests)
        return stream

    # -- prompts ---------------------------------------------------------------------------------

    def _make_requests(self, prompts: Any, params: Any) -> list[dict[str, Any]]:
        """Check all prompts; they get their names when they are queued."""
        prompts = self._as_list(prompts)
        if not isinstance(params, (list, tuple)):
            params = [params] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but {len(params)} sampling_params")
        pairs = zip(prompts, params, strict=True)
        return [self.llm_engine.make_request("", *pair) for pair in pairs]

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
