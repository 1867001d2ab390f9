"""SamplingParams: how one request turns logits into tokens, and when it stops.

Names, defaults and meanings are those of vLLM 0.24, so that a script written for it runs unchanged.
"""

import math
import warnings
from dataclasses import dataclass, replace

from nanovllm import vllm_defaults
from nanovllm.logprobs import MAX_LOGPROBS
from nanovllm.validation import (
    also_takes,
    as_list,
    check_fields,
    check_number,
    check_type,
    check_unicode,
    flag,
    number,
    only,
)

RequestOutputKind = vllm_defaults.RequestOutputKind  # where vLLM's scripts import it from
LEAST_TEMPERATURE, LARGEST_TEMPERATURE = 0.01, 2.0  # vLLM's limits; 0 is taken as well
GREEDY_BELOW = 1e-5  # vLLM's threshold: a smaller temperature means greedy
LARGEST_INT = 2**31 - 1
LARGEST_N = 16_384  # vLLM's limit


@also_takes(vllm_defaults.SAMPLING)
@dataclass(slots=True, kw_only=True)  # a misspelt attribute is an error, as a misspelt argument is
class SamplingParams:
    """One request's sampling parameters. Raises TypeError or ValueError for what it cannot honour.

    All of them are given by name. The parameters of vLLM 0.24 that are no fields here are taken
    with the values that `vllm_defaults.SAMPLING` lists, and with no others.

    The engine works on a copy: the caller's object is never changed, and changing it later has
    no effect on a request that was already added.
    """

    n: int = number(1, 1, LARGEST_N)  # answers to the prompt, each drawn with a seed of its own
    temperature: float = number(1.0, 0.0, LARGEST_TEMPERATURE)  # 0: greedy; else 0.01 or more
    top_p: float = number(1.0, math.ulp(0.0), 1.0)  # keep the likeliest that sum to top_p
    top_k: int = number(0, -1, LARGEST_INT)  # keep the k likeliest; 0 or -1: all
    min_p: float = number(0.0, 0.0, 1.0)  # keep those at least min_p times as likely as the best
    seed: int | None = number(None, -(2**63), 2**63 - 1)  # None: of the engine's and the request
    max_tokens: int | None = number(16, 1, LARGEST_INT)  # None: what max_model_len leaves
    stop: str | list[str] | None = None  # strings that end the text, and are cut from it
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = flag(False)
    include_stop_str_in_output: bool = flag(False)
    skip_special_tokens: bool = flag(True)
    detokenize: bool = flag(True)  # False: token ids only, `text` stays empty

    logprobs: int | None = number(None, 0, MAX_LOGPROBS)  # report this many of the likeliest tokens
    prompt_logprobs: int | None = number(None, 0, MAX_LOGPROBS)  # the same of each prompt token
    # None: True if prompt_logprobs are asked for. True: compute the whole prompt.
    skip_reading_prefix_cache: bool | None = flag(None)

    min_tokens: int = only(0)
    presence_penalty: float = only(0.0)
    frequency_penalty: float = only(0.0)
    repetition_penalty: float = only(1.0)

    def __post_init__(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is True:  # as in vLLM
                setattr(self, name, 1)
        check_fields(self)
        if self.skip_reading_prefix_cache is None:
            self.skip_reading_prefix_cache = self.prompt_logprobs is not None
        if 0 < self.temperature < LEAST_TEMPERATURE:
            warnings.warn(
                f"temperature={self.temperature!r} is raised to {LEAST_TEMPERATURE}, as in vLLM, "
                f"because logits divided by less can overflow; 0 is greedy",
                stacklevel=4,
            )
            self.temperature = LEAST_TEMPERATURE
        if self.n > 1 and self.is_greedy:
            raise ValueError(
                f"n must be 1 when using greedy sampling, got n={self.n} with "
                f"temperature={self.temperature!r}, which gives the same answer {self.n} times; "
                f"ask for one answer, or set a temperature of at least {LEAST_TEMPERATURE}"
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
            check_number("every item of stop_token_ids", token_id, 0, LARGEST_INT)

    def clone(self) -> "SamplingParams":
        """A copy, checked once more."""
        return replace(self)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def filters(self) -> bool:
        """Whether top-k, top-p or min-p removes any token, or logprobs need whole rows as well."""
        some = self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0
        return self.logprobs is not None or (some and not self.is_greedy)
