"""SamplingParams: how one request turns logits into tokens, and when it stops.

Names, defaults and meanings are those of vLLM 0.24, so that a script for vLLM runs unchanged.
"""

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

from nanovllm.logprobs import MAX_LOGPROBS
from nanovllm.validation import (
    accept_unsupported,
    as_list,
    bool_field,
    check_fields,
    check_number,
    check_type,
    check_unicode,
    number_field,
    vllm_defaults,
)

RequestOutputKind = vllm_defaults.RequestOutputKind  # where vLLM's scripts import it from
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0  # vLLM's limits; 0 is also allowed
SAMPLING_EPS = 1e-5  # as in vLLM, a temperature below this means greedy
MAX_INT = 2**31 - 1
MAX_N = 16_384  # vLLM's limit
MIN_FLOAT, MAX_FLOAT = 2.0**-126, (2 - 2**-23) * 2.0**127  # of float32, without subnormals
MAX_BIAS = 1e9  # a request may forbid a token by a bias of -infinity


@accept_unsupported(vllm_defaults.SAMPLING)
@dataclass(slots=True, kw_only=True)  # a misspelt attribute is an error, as a misspelt argument is
class SamplingParams:
    """The sampling parameters of one request.

    All parameters are given by name. Raises TypeError or ValueError if the engine cannot honour
    one. Parameters of vLLM 0.24 that are no fields here are accepted only with the values that
    `vllm_defaults.SAMPLING` lists.

    The engine works on a copy. It never changes the caller's object, and a later change of this
    object has no effect on a request that was already added.
    """

    # The number of answers to the prompt. Each of them is drawn with a seed of its own.
    n: int = number_field(1, 1, MAX_N)
    # 0 means greedy. Other values are at least 0.01.
    temperature: float = number_field(1.0, 0.0, MAX_TEMPERATURE)
    # Keep the likeliest tokens whose probabilities sum to top_p.
    top_p: float = number_field(1.0, math.ulp(0.0), 1.0)
    # Keep the k likeliest tokens. 0 or -1 keeps all tokens.
    top_k: int = number_field(0, -1, MAX_INT)
    # Keep the tokens that are at least min_p times as likely as the likeliest one.
    min_p: float = number_field(0.0, 0.0, 1.0)
    # None means that it is derived from the engine's seed and the request's ordinal.
    seed: int | None = number_field(None, -(2**63), 2**63 - 1)
    # None means as many tokens as max_model_len leaves room for.
    max_tokens: int | None = number_field(16, 1, MAX_INT)
    # Strings that end the text and are cut from it.
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    # The number of tokens that are generated before a stop token or stop string may end the text.
    min_tokens: int = number_field(0, 0, MAX_INT)
    # This is subtracted once from the logit of each token that was generated.
    presence_penalty: float = number_field(0.0, -2.0, 2.0)
    # This is subtracted from a token's logit for each time that the token was generated.
    frequency_penalty: float = number_field(0.0, -2.0, 2.0)
    # This divides positive logits and multiplies negative ones, for tokens of prompt and output.
    repetition_penalty: float = number_field(1.0, MIN_FLOAT, MAX_FLOAT)
    # These values are added to the logits of these token ids.
    logit_bias: dict[int, float] | None = None
    # If this is set, no other tokens are generated.
    allowed_token_ids: list[int] | None = None
    # Texts that are never generated. The last token of such a text cannot follow its other tokens.
    bad_words: list[str] | None = None
    ignore_eos: bool = bool_field(False)
    include_stop_str_in_output: bool = bool_field(False)
    skip_special_tokens: bool = bool_field(True)
    # If this is false, only token ids are returned, and `text` stays empty.
    detokenize: bool = bool_field(True)
    # Report the log probabilities of this many of the likeliest tokens, and of the sampled one.
    logprobs: int | None = number_field(None, 0, MAX_LOGPROBS)
    # Report the same for each token of the prompt.
    prompt_logprobs: int | None = number_field(None, 0, MAX_LOGPROBS)
    # True computes the whole prompt. None means True if prompt_logprobs are wanted.
    skip_reading_prefix_cache: bool | None = bool_field(None)

    def __post_init__(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is True:  # as in vLLM
                setattr(self, name, 1)
        check_fields(self)
        if self.skip_reading_prefix_cache is None:
            self.skip_reading_prefix_cache = self.prompt_logprobs is not None
        if 0 < self.temperature < MIN_TEMPERATURE:
            warnings.warn(
                f"temperature={self.temperature!r} is raised to {MIN_TEMPERATURE}, as in vLLM, "
                f"because logits divided by less can overflow; 0 is greedy",
                stacklevel=4,
            )
            self.temperature = MIN_TEMPERATURE
        if self.n > 1 and self.is_greedy:
            raise ValueError(
                f"n must be 1 when using greedy sampling, got n={self.n} with "
                f"temperature={self.temperature!r}, which gives the same answer {self.n} times; "
                f"ask for one answer, or set a temperature of at least {MIN_TEMPERATURE}"
            )
        self.seed = None if self.seed == -1 else self.seed  # as in vLLM
        self.stop = as_list("stop", [self.stop] if isinstance(self.stop, str) else self.stop)
        self.stop_token_ids = as_list("stop_token_ids", self.stop_token_ids)
        for text in self.stop:
            check_type("every item of stop", text, str)
            check_unicode("every item of stop", text)
        if "" in self.stop:
            raise ValueError("every item of stop must have text, got ''")
        if self.stop and not self.detokenize:
            raise ValueError(f"stop={self.stop!r} needs detokenize=True")
        for token_id in self.stop_token_ids:
            check_number("every item of stop_token_ids", token_id, 0, MAX_INT)
        self._check_adjustments()

    def _check_adjustments(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must be at most max_tokens={self.max_tokens}, got {self.min_tokens}"
            )
        self.bad_words = as_list("bad_words", self.bad_words)
        for word in self.bad_words:
            check_type("every item of bad_words", word, str)
            check_unicode("every item of bad_words", word)
            if not word.strip():
                raise ValueError(f"every item of bad_words must have text, got {word!r}")
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = as_list("allowed_token_ids", self.allowed_token_ids)
            if not self.allowed_token_ids:
                raise ValueError("allowed_token_ids must have a token id, or be None; got []")
            for token_id in self.allowed_token_ids:
                check_number("every item of allowed_token_ids", token_id, 0, MAX_INT)
        if self.logit_bias is not None:
            check_type("logit_bias", self.logit_bias, dict)
            self.logit_bias = {
                as_token_id(token_id): float(bias) if type(bias) is int else bias
                for token_id, bias in self.logit_bias.items()
            }
            for token_id, bias in self.logit_bias.items():
                check_number("every token id of logit_bias", token_id, 0, MAX_INT)
                check_number(f"logit_bias[{token_id}]", bias, -math.inf, MAX_BIAS)

    def clone(self) -> "SamplingParams":
        """Return a copy, which is checked once more."""
        return replace(self)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < SAMPLING_EPS

    @property
    def filters(self) -> bool:
        """True if top-k, top-p or min-p removes any token."""
        return not self.is_greedy and (self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0)

    @property
    def penalizes(self) -> bool:
        """True if one of the three penalties changes any logit."""
        added = self.presence_penalty, self.frequency_penalty
        return self.repetition_penalty != 1.0 or added != (0.0, 0.0)

    @property
    def adjusts(self) -> bool:
        """True if any logit is changed before the temperature."""
        forbids = bool(self.bad_words) or self.allowed_token_ids is not None or self.min_tokens > 0
        return forbids or bool(self.logit_bias) or self.penalizes

    @property
    def needs_whole_rows(self) -> bool:
        """True if several ranks must gather whole rows of logits for this request."""
        return self.filters or self.adjusts or self.logprobs is not None


def as_token_id(key: Any) -> Any:
    """Convert a key of logit_bias. JSON has only texts as keys, so "15" stands for 15."""
    return int(key) if isinstance(key, str) and key.isdecimal() else key
