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
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from functools import partial
from itertools import count
from typing import Any

from tqdm.auto import tqdm

from nanovllm.config import EngineArgs
from nanovllm.engine.llm_engine import LLMEngine, read_texts
from nanovllm.engine.sequence import Sequence
from nanovllm.frontend import chat
from nanovllm.outputs import RequestOutput, TextPiece
from nanovllm.sampling_params import SamplingParams
from nanovllm.validation import check_options, check_type, check_unicode, vllm_defaults

Params = SamplingParams | list[SamplingParams] | None


class Call:
    """The requests of one call. Any thread's step may run them, and they end with the call.

    Closing a call aborts what is unfinished of it. If a call is dropped, that happens at the start
    of the engine's next step.
    """

    def __init__(self, engine: LLMEngine):
        self.engine = engine
        self.seqs: list[Sequence] = []  # in the order of the prompts, `n` for each of them
        self.news: dict[Sequence, None] = {}  # those with tokens, or an end, not yet looked at
        self.unfinished: set[Sequence] = set()  # as far as the news were looked at
        engine.watch(self)

    def add(self, requests: list[dict[str, Any]]) -> None:
        """Queue checked requests, each under the number that it has among all requests."""
        engine = self.engine
        engine.line_up()
        with engine.lock:
            engine.leave_line()
            numbers = count(engine.num_requests)
            for request in requests:
                request["request_id"] = str(next(numbers))
                while not engine.is_free(request):
                    request["request_id"] = str(next(numbers))
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

    def make_outputs(self) -> list[RequestOutput]:
        """One output a prompt, in order, with all its answers."""
        return [RequestOutput.of(seq) for seq in self.seqs if seq.index == 0]

    def close(self) -> None:
        self.engine.abort(self.seqs)


class TextStream(Call, Iterator[TextPiece]):
    """What `LLM.stream` returns: yields TextPieces, which unpack as (prompt's index, new text).

    Where a prompt has several answers, a piece's `output_index` says which of them it continues.
    Closing the stream aborts what has not finished. So does dropping the last reference to it, at
    the start of the next step. The texts of one step come in the order of the prompts, and those
    of one prompt in the order of its answers.
    """

    def __init__(self, llm: "LLM"):
        super().__init__(llm.llm_engine)
        self._llm = llm  # an LLM that is dropped closes its engine
        self._pieces: deque[TextPiece] = deque()
        self._sent: dict[Sequence, int] = {}  # characters
        self._prompt: dict[Sequence, int] = {}  # the index of its prompt

    def add(self, requests: list[dict[str, Any]]) -> None:
        super().add(requests)
        firsts = [seq for seq in self.seqs if seq.index == 0]
        self._prompt = {seq: i for i, first in enumerate(firsts) for seq in first.siblings}

    def read(self, seqs: list[Sequence]) -> None:
        seqs = sorted(seqs, key=lambda seq: (self._prompt[seq], seq.index))
        for seq, text in zip(seqs, read_texts(seqs, certain_text), strict=True):
            if new := text[self._sent.get(seq, 0) :]:
                self._pieces.append(TextPiece(self._prompt[seq], new, seq.index))
                self._sent[seq] = len(text)

    def __next__(self) -> TextPiece:
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
        return self.make_outputs() if all(seq.is_finished for seq in self.seqs) else None

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

    def __init__(self, model: str, *, chat_template: Any = None, **kwargs: Any):
        if "swap_space" in kwargs:  # vLLM 0.24 says the same
            warnings.warn("swap_space is deprecated and ignored", DeprecationWarning, stacklevel=2)
            del kwargs["swap_space"]
        self.chat_template = chat.load_chat_template(chat_template)
        self.llm_engine = LLMEngine(EngineArgs(model, **kwargs))

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> "LLM":
        return cls(**asdict(engine_args))

    # -- generating ------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Any,
        sampling_params: Params = None,
        *,
        use_tqdm: bool | Callable[..., tqdm] = True,
        **options: Any,
    ) -> list[RequestOutput]:
        """One output a prompt, in order.

        prompts: a string, a list of token ids, {"prompt": ...}, {"prompt_token_ids": ...}, or a
        list of any of these. sampling_params: one for all, a list with one each, or None for the
        model's own defaults. use_tqdm: False for no progress bar, or what makes one in place of
        tqdm. options: those of vLLM's method, with its defaults. Everything is checked before
        anything is queued.
        """
        check_options("generate", options, vllm_defaults.GENERATE)
        make_bar = bar_maker(use_tqdm, self.llm_engine.ranks.rank)
        call = Call(self.llm_engine)
        try:
            call.add(self._make_requests(prompts, sampling_params))
            total = len(call.seqs)
            with closing(make_bar(total=total, desc="Processed prompts")) as bar:
                while call.unfinished:
                    before = len(call.unfinished)
                    call.advance()
                    bar.update(before - len(call.unfinished))
        finally:
            call.close()
        return call.make_outputs()

    def chat(
        self,
        messages: list,
        sampling_params: Params = None,
        use_tqdm: bool | Callable[..., tqdm] = True,
        lora_request: None = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation (a list of {"role", "content"}) or a list of them.

        The template gets add_generation_prompt, continue_final_message, tools and whatever
        chat_template_kwargs holds. The other parameters of vLLM's method take its defaults alone.
        """
        options["lora_request"] = lora_request
        options["chat_template_content_format"] = chat_template_content_format
        check_options("chat", options, vllm_defaults.CHAT)
        check_type("messages", messages, list)
        messages = [chat.join_text_parts(message) for message in messages]
        check_type("chat_template_kwargs", chat_template_kwargs or {}, dict)
        many = bool(messages) and isinstance(messages[0], (list, tuple))
        options = {"chat_template": chat_template or self.chat_template, "tools": tools}
        options |= {"add_generation_prompt": add_generation_prompt}
        options |= {"continue_final_message": continue_final_message}
        options |= chat_template_kwargs or {}
        check_type("add_generation_prompt", options["add_generation_prompt"], bool)
        check_type("continue_final_message", options["continue_final_message"], bool)
        check_type("tools", options["tools"] or [], list)
        check_type("chat_template", options["chat_template"] or "", str)
        for name, value in {"messages": messages, **options}.items():
            check_unicode(name, value)
        prompts = [self._template(talk, options) for talk in (messages if many else [messages])]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def stream(self, prompts: Any, sampling_params: Params = None) -> TextStream:
        """Text as it comes: an iterator of pieces, whose `outputs` is the list of RequestOutputs
        when it has ended. Other calls may be made between two pieces.

        Each piece unpacks as (prompt's index, new text). With `n` above 1 the answers to a prompt
        are written at the same time, and `piece.output_index` says which of them it continues.
        """
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
        text = chat.apply_chat_template(conversation, options, self.get_tokenizer())
        ids = self.llm_engine.encode(text, add_special_tokens=False)
        return {"prompt": text, "prompt_token_ids": ids}

    def get_tokenizer(self) -> Any:
        return self.llm_engine.get_tokenizer()

    def get_default_sampling_params(self) -> SamplingParams:
        """The parameters of a prompt that comes without any: see `generation_config`."""
        return self.llm_engine.get_default_sampling_params()

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """As `LLMEngine.reset_prefix_cache`."""
        return self.llm_engine.reset_prefix_cache(reset_running_requests, reset_connector)

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


def bar_maker(use_tqdm: Any, rank: int) -> Callable[..., Any]:
    """What makes a progress bar: tqdm, what the caller gave for it, or a bar that is not shown.

    Raises TypeError for what is neither a bool nor callable.
    """
    if not isinstance(use_tqdm, bool) and not callable(use_tqdm):
        raise TypeError(f"use_tqdm must be of type bool, or callable as tqdm is, got {use_tqdm!r}")
    if use_tqdm is False or rank > 0:
        return partial(tqdm, disable=True)
    return partial(tqdm if use_tqdm is True else use_tqdm, dynamic_ncols=True)


def signature_of_llm() -> inspect.Signature:
    """What `help(LLM)` shows: the arguments of EngineArgs, by name after the model."""
    own = inspect.signature(LLM.__init__).parameters
    given = inspect.signature(EngineArgs).parameters
    named = [p.replace(kind=p.KEYWORD_ONLY) for name, p in given.items() if name != "model"]
    return inspect.Signature([own["self"], own["model"], *named, own["chat_template"]])


LLM.__init__.__signature__ = signature_of_llm()  # type: ignore[attr-defined]
