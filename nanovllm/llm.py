"""LLM: the entry point for offline generation, with the interface of vLLM's `LLM`.

from nanovllm import LLM, SamplingParams

with LLM("Qwen/Qwen3-0.6B") as llm:
    print(llm.generate("The capital of France is")[0].outputs[0].text)
    for index, text in llm.stream(["Once upon a time"], SamplingParams(max_tokens=64)):
        print(text, end="", flush=True)

Several threads may call `generate`, `chat` and `stream` of one LLM at the same time. Their requests
then run in the same steps, and each caller gets its own answers. A request's random numbers follow
from its seed. If it has none, they follow from its place in the order of arrival, which threads do
not fix. Under torchrun every rank must make the same calls, so only one thread may call there.

After Ctrl-C the LLM can be used again. The interrupted call's requests are gone, and the requests
of other calls go on. An LLM of several ranks is closed, because its ranks may then differ.
"""

import inspect
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from functools import partial
from typing import Any

from tqdm.auto import tqdm

from nanovllm.config import EngineArgs
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.frontend import chat
from nanovllm.frontend.streaming import Call, TextStream
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.validation import check_options, check_type, check_unicode, vllm_defaults

Params = SamplingParams | list[SamplingParams] | None


class LLM:
    """A model that is ready to generate. The keyword arguments are those of `EngineArgs`.

    Raises TypeError or ValueError, which names the argument, for anything that it cannot honour.
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
        """Return one output for each prompt, in order.

        prompts: a string, a list of token ids, {"prompt": ...}, {"prompt_token_ids": ...}, or a
        list of any of these.
        sampling_params: one for all prompts, a list with one for each, or None for the model's own
        defaults.
        use_tqdm: whether to show a progress bar, or a function that makes one as tqdm does.
        options: those of vLLM's method, with its defaults.
        Raises TypeError or ValueError before any prompt is queued if one cannot be honoured.
        """
        check_options("generate", options, vllm_defaults.GENERATE)
        make_bar = make_bar_factory(use_tqdm, self.llm_engine.ranks.rank)
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

        The template receives add_generation_prompt, continue_final_message, tools and the contents
        of chat_template_kwargs. The other parameters of vLLM's method take only their defaults.
        Raises TypeError or ValueError for a conversation that does not fit the template.
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
        """Return an iterator of the pieces of text, as they are written.

        Each piece unpacks as (prompt's index, new text). With `n` above 1 the answers to a prompt
        are written at the same time, and `piece.output_index` says which of them it continues.
        After the last piece, the stream's `outputs` is the list of RequestOutputs. Other calls may
        be made between two pieces.
        """
        requests = self._make_requests(prompts, sampling_params)
        stream = TextStream(self)
        stream.add(requests)
        return stream

    # -- prompts ---------------------------------------------------------------------------------

    def _make_requests(self, prompts: Any, params: Any) -> list[dict[str, Any]]:
        """Return a checked request for each prompt. It gets its id when it is queued."""
        prompts = self._as_list(prompts)
        if not isinstance(params, (list, tuple)):
            params = [params] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but {len(params)} sampling_params")
        pairs = zip(prompts, params, strict=True)
        return [self.llm_engine.make_request("", *pair) for pair in pairs]

    def _as_list(self, prompts: Any) -> list:
        """Return one prompt or many as a list of prompts. A flat list of ints is one prompt."""
        if isinstance(prompts, (str, dict)):
            return [prompts]
        if not isinstance(prompts, (list, tuple)):
            raise TypeError(f"prompts must be a str, a list or a dict, got {prompts!r:.80}")
        is_one = bool(prompts) and all(isinstance(item, int) for item in prompts)
        return [list(prompts)] if is_one else list(prompts)

    def _template(self, conversation: list, options: dict[str, Any]) -> dict[str, Any]:
        """Return a conversation as a prompt.

        The template writes the special tokens, so the tokenizer must not add any.
        """
        text = chat.apply_chat_template(conversation, options, self.get_tokenizer())
        ids = self.llm_engine.input_processor.encode(text, add_special_tokens=False)
        return {"prompt": text, "prompt_token_ids": ids}

    def get_tokenizer(self) -> Any:
        return self.llm_engine.get_tokenizer()

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the parameters of a prompt that comes without any (see `generation_config`)."""
        return self.llm_engine.get_default_sampling_params()

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """Forget the keys and values of all prompts. See `LLMEngine.reset_prefix_cache`."""
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


def make_bar_factory(use_tqdm: Any, rank: int) -> Callable[..., Any]:
    """Return a function that makes a progress bar: tqdm, the caller's own, or a hidden bar.

    Raises TypeError if use_tqdm is neither a bool nor callable.
    """
    if not isinstance(use_tqdm, bool) and not callable(use_tqdm):
        raise TypeError(f"use_tqdm must be of type bool, or callable as tqdm is, got {use_tqdm!r}")
    if use_tqdm is False or rank > 0:
        return partial(tqdm, disable=True)
    return partial(tqdm if use_tqdm is True else use_tqdm, dynamic_ncols=True)


def signature_of_llm() -> inspect.Signature:
    """Return what `help(LLM)` shows: the model, then the arguments of EngineArgs by name."""
    own = inspect.signature(LLM.__init__).parameters
    given = inspect.signature(EngineArgs).parameters
    named = [p.replace(kind=p.KEYWORD_ONLY) for name, p in given.items() if name != "model"]
    return inspect.Signature([own["self"], own["model"], *named, own["chat_template"]])


LLM.__init__.__signature__ = signature_of_llm()  # type: ignore[attr-defined]
