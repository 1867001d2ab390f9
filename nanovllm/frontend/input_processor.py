"""Check requests and tokenize their prompts, before the engine queues anything.

A request that has been checked is a dict of plain values, because rank 0 sends it to the other
ranks as JSON. Its keys are the arguments from which each rank makes the request's sequences.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from itertools import chain
from typing import Any

from nanovllm.checkpoint.generation_config import make_default_params
from nanovllm.checkpoint.tokenizer import tokenizer_errors
from nanovllm.inputs import parse_prompt
from nanovllm.sampling_params import SamplingParams
from nanovllm.validation import check_number, check_type, check_unicode

Request = dict[str, Any]


class InputProcessor:
    """Turns prompts and their SamplingParams into checked requests.

    tokenizer: None if all prompts are token ids (skip_tokenizer_init).
    default_params: the sampling parameters of requests that come without any, as a dict.
    eos_ids: the end-of-sequence ids of the model. vocab_size and max_model_len count tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        default_params: dict[str, Any],
        eos_ids: frozenset[int],
        vocab_size: int,
        max_model_len: int,
    ):
        self.tokenizer = tokenizer
        self.default_params = default_params
        self.eos_ids = eos_ids
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len

    def make_request(self, request_id: str, prompt: Any, params: SamplingParams | None) -> Request:
        """Return a checked request for one prompt, which is text, token ids, or a dict of either.

        params: None for the model's default parameters.
        Raises TypeError or ValueError if the engine cannot honour the request.
        """
        check_type("request_id", request_id, str)
        params = make_default_params(self.default_params) if params is None else params
        check_type("sampling_params", params, SamplingParams)
        params = replace(params)  # a checked copy: the caller's object stays the caller's
        if self.tokenizer is None and params.stop:
            raise ValueError(f"stop={params.stop!r} needs a tokenizer (skip_tokenizer_init)")
        bad_word_ids = self._encode_bad_words(params)
        end_ids = self.eos_ids.union(params.stop_token_ids or ())
        check_adjustments(params, bad_word_ids, end_ids, self.vocab_size)
        text, token_ids = self._tokenize(prompt)
        self._check_prompt(token_ids)
        room = self.max_model_len - len(token_ids)
        return {
            "request_id": request_id,
            "prompt": text,
            "token_ids": token_ids,
            "params": asdict(params),
            "bad_word_ids": bad_word_ids,
            "max_length": len(token_ids) + min(params.max_tokens or room, room),
        }

    def get_tokenizer(self) -> Any:
        """Return the tokenizer. Raises ValueError if the engine was told to load none."""
        if self.tokenizer is None:
            raise ValueError("skip_tokenizer_init=True: no tokenizer, prompts must be token ids")
        return self.tokenizer

    def encode(self, text: str, **options: Any) -> list[int]:
        """Return the token ids of a text. options: those of the tokenizer's own `encode`."""
        tokenizer = self.get_tokenizer()
        with tokenizer_errors(getattr(tokenizer, "name_or_path", "")):
            return tokenizer.encode(text, **options)

    def _encode_bad_words(self, params: SamplingParams) -> list[list[int]]:
        if params.bad_words and self.tokenizer is None:
            raise ValueError(
                f"bad_words={params.bad_words!r} needs a tokenizer (skip_tokenizer_init)"
            )

        def encode(text: str) -> list[int]:
            return self.encode(text, add_special_tokens=False)

        return encode_bad_words(params.bad_words or [], encode, self.vocab_size)

    def _tokenize(self, prompt: Any) -> tuple[str | None, list[int]]:
        """Return a prompt's text, or None if it has none, and its token ids."""
        prompt = parse_prompt(prompt)
        text, token_ids = prompt["prompt"], prompt["prompt_token_ids"]
        if text is not None:
            check_type("prompt", text, str)
            check_unicode("prompt", text)
        if token_ids is None and text is not None:
            token_ids = self.encode(text)
        if not isinstance(token_ids, (list, tuple)):
            raise TypeError(f"a prompt is a str, token ids, or a dict of one, got {prompt!r:.80}")
        return text, list(token_ids)

    def _check_prompt(self, token_ids: list[int]) -> None:
        """Raise an error unless the ids are in the vocabulary and leave room for one more token."""
        if not 0 < len(token_ids) < self.max_model_len:
            raise ValueError(
                f"a prompt has 1 to {self.max_model_len - 1} tokens, since it must leave room for "
                f"one more in max_model_len={self.max_model_len}; got {len(token_ids)}"
            )
        last = self.vocab_size - 1
        are_ints = set(map(type, token_ids)) == {int}
        if not (are_ints and 0 <= min(token_ids) <= max(token_ids) <= last):
            for token_id in token_ids:  # one by one, so that the error names the wrong id
                check_number("every prompt token id", token_id, 0, last)


def encode_bad_words(
    words: list[str], encode: Callable[[str], list[int]], vocab_size: int
) -> list[list[int]]:
    """Return the ids of each bad word, as it is spelt at the start and in the middle of a text.

    As in vLLM, the spelling behind a space counts where it has as many tokens and begins with
    another one. Raises ValueError for an id beyond the model's vocabulary.
    """
    found: list[list[int]] = []
    for word in words:
        bare, spaced = encode(word.lstrip()), encode(" " + word.lstrip())
        found.append(bare)
        if len(spaced) == len(bare) and spaced[0] != bare[0]:
            found.append(spaced)
        for token_id in chain(bare, spaced):
            if not 0 <= token_id < vocab_size:
                raise ValueError(
                    f"bad_words={words!r:.200} has the token id {token_id} in {word!r}, but the "
                    f"model's vocabulary has {vocab_size} ids"
                )
    return found


def check_adjustments(
    params: SamplingParams, bad_word_ids: list[list[int]], end_ids: Iterable[int], vocab_size: int
) -> None:
    """Raise ValueError for ids beyond the vocabulary, and if no token at all could be drawn.

    bad_word_ids: the token ids of each bad word. end_ids: the ids that min_tokens forbids.
    """
    for name, ids in (
        ("logit_bias", params.logit_bias or ()),
        ("allowed_token_ids", params.allowed_token_ids or ()),
    ):
        for token_id in ids:
            if token_id >= vocab_size:
                raise ValueError(
                    f"every token id of {name} must be between 0 and {vocab_size - 1:,}, "
                    f"got {token_id!r}"
                )
    if params.allowed_token_ids is None:
        return
    forbidden = {ids[0] for ids in bad_word_ids if len(ids) == 1}
    forbidden.update(end_ids if params.min_tokens else ())
    if forbidden.issuperset(params.allowed_token_ids):
        raise ValueError(
            f"allowed_token_ids={params.allowed_token_ids!r:.200} must have a token that bad_words "
            f"and min_tokens={params.min_tokens} do not forbid, because else none can be drawn"
        )
