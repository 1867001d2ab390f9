"""Sequence: one request's tokens and state, as the scheduler sees them.

Two counters say how far it has come: `num_scheduled` moves when a step is planned, `num_computed`
when that step's forward pass has succeeded. Between steps they differ only in the overlapped loop,
by the one step in flight.

    token_ids   [ prompt ............ | output ...... ]          all ids the host knows
                [0, num_computed)       keys and values are in the cache, valid to read
                [num_computed, num_scheduled)      being computed by the step in flight
"""

import enum
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import xxhash

from nanovllm.engine.output_logprobs import OutputLogprobs
from nanovllm.logprobs import LogprobsOnePosition, PromptLogprobs, SampleLogprobs
from nanovllm.outputs import RequestStateStats
from nanovllm.sampling_params import SamplingParams

NOT_FINITE = (
    "the logits after {} tokens are not finite (NaN or infinity), so no next token can be chosen. "
    "Numbers above 65,504 overflow in float16: try dtype='bfloat16' or 'float32'. If the logits "
    "are not finite in float32 either, the model's weights are damaged."
)
NO_TOKEN_LEFT = (
    "after {} tokens no next token can be chosen: the logits are not finite, or they are not once "
    "the penalties, logit_bias, allowed_token_ids, bad_words and min_tokens have changed them. "
    "These must leave at least one token."
)


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """One request. `max_length` counts prompt and output; `stop_ids` end it, and are kept."""

    request_id: str
    prompt: str | None
    token_ids: list[int]
    params: SamplingParams
    max_length: int
    stop_ids: frozenset[int] = frozenset()
    eos_id: int | None = None  # the tokenizer's own end token, which is no stop_reason
    end_ids: frozenset[int] = frozenset()  # what min_tokens forbids: also an end that is ignored
    bad_word_ids: list[list[int]] = field(default_factory=list)
    noise: tuple[int, int] = (0, 0)  # the engine's seed and the request's number
    detokenizer: Any = None  # makes the text of the output ids; None: token ids only
    news: dict["Sequence", None] | None = None  # where its caller looks for what has changed
    index: int = 0  # which of its request's answers it is
    parent: Any = None  # the ParentRequest, if its request has several answers

    status: Status = Status.WAITING
    finish_reason: str | None = None  # "stop", "length", "abort" or "error"
    stop_reason: int | str | None = None  # the stop token or stop string that ended it
    error: str | None = None  # what went wrong, if it ended by an error
    num_computed: int = 0
    num_scheduled: int = 0
    num_admissions: int = 0  # times it was taken from the queue
    num_cached: int = 0  # tokens whose keys and values were found at this admission
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # of every full block hashed so far
    num_cached_blocks: int = 0  # leading blocks already entered in the prefix cache

    def __post_init__(self) -> None:
        # Both are asked in every step, of every row.
        self.needs_whole_rows = self.params.needs_whole_rows
        self.needs_ids_on_host = any(len(ids) > 1 for ids in self.bad_word_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.num_read = self.num_prompt_tokens  # ids that `append` has read to their end
        self.text_is_torn = False
        asks = self.params.logprobs is not None
        self.output_logprobs = OutputLogprobs() if asks else None
        asks = self.params.prompt_logprobs is not None
        self.prompt_logprobs: PromptLogprobs | None = [None] if asks else None
        self.metrics = RequestStateStats(arrival_time=time.time(), queued_ts=time.monotonic())
        seed = self.params.seed
        if seed is None:  # equal prompts differ
            seed = xxhash.xxh3_64_intdigest(repr(self.noise).encode()) - 2**63
        self.seed = (seed + self.index + 2**63) % 2**64 - 2**63  # after the largest, the smallest

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def siblings(self) -> list["Sequence"]:
        """All sequences of its request, with this one, in the order of `index`."""
        return self.parent.children if self.parent else [self]

    def read_logprobs(self, count: int) -> SampleLogprobs | None:
        """The logprobs of the first `count` output tokens; None if they were not asked for."""
        logprobs = self.output_logprobs
        return None if logprobs is None else logprobs.read(self, count)

    @property
    def cumulative_logprob(self) -> float | None:
        """The sum of the output tokens' logprobs; None if they were not asked for."""
        count = len(self.token_ids) - self.num_prompt_tokens
        logprobs = self.output_logprobs
        return None if logprobs is None else logprobs.cumulative(count)

    def note_prompt_logprobs(self, position: int, found: list[LogprobsOnePosition]) -> None:
        """Keep what was found of the prompt's tokens at `position` and after it."""
        kept = self.prompt_logprobs or []
        kept += [None] * (position - len(kept))
        kept[position : position + len(found)] = found
        self.prompt_logprobs = kept

    @property
    def is_finished(self) -> bool:
        return self.status is Status.FINISHED

    @property
    def in_flight(self) -> bool:
        return self.num_scheduled > self.num_computed

    @property
    def num_unscheduled(self) -> int:
        """Tokens the next step could compute: what is left of the prompt, or one to decode.

        While its newest token is in flight a sequence may still be scheduled: that token's id is
        on the device, where the next step will find it. Only a sequence that needs its ids on the
        host waits for this one. The last token is never computed.
        """
        if self.num_scheduled >= self.max_length - 1:
            return 0
        known = len(self.token_ids) - self.num_scheduled
        return known if known > 0 or self.needs_ids_on_host else 1

    def append(self, token_id: int | None) -> None:
        """Take the token a step sampled, and finish if it is the last one.

        None: the logits were not finite. The request then ends with an error, and keeps the tokens
        that it has.
        """
        self._announce()
        if self.text_is_torn:
            self.read_again()
        if token_id is None:
            reason = NO_TOKEN_LEFT if self.params.adjusts else NOT_FINITE
            self.error = reason.format(len(self.token_ids))
            self.metrics.is_corrupted = True
            self.finish("error")
            return
        self.token_ids.append(token_id)
        count = len(self.token_ids) - self.num_prompt_tokens
        self.metrics.note_token(count, time.monotonic())
        stops = token_id in self.stop_ids
        self.stop_reason = token_id if stops and token_id != self.eos_id else None
        shown = self.detokenizer and (not stops or self.params.include_stop_str_in_output)
        if self.detokenizer and shown and self.detokenizer.append(token_id):
            stops, self.stop_reason = True, self.detokenizer.stop_string
        if stops:
            self.finish("stop")
        elif len(self.token_ids) >= self.max_length:
            self.finish("length")
        self.num_read = len(self.token_ids)

    def _announce(self) -> None:
        """Tell the caller to look at this sequence. This comes before the change, so that an
        interrupt between the two costs one needless look and never hides a change."""
        if self.news is not None:
            self.news[self] = None

    def read_again(self) -> None:
        """Make the text anew from the ids, because an interrupt may have torn it."""
        self.text_is_torn = True
        if self.detokenizer:
            self.detokenizer.reset()
            for token_id in self.output_ids:
                if token_id not in self.stop_ids or self.params.include_stop_str_in_output:
                    self.detokenizer.append(token_id)
            if self.is_finished:
                self.detokenizer.finish()
        self.text_is_torn = False

    def restart(self) -> None:
        """Forget every step, so that the sequence can wait in the queue again. It keeps its ids.

        An interrupt may have come at any point within `append` or `finish`. An id that was not
        read to its end is forgotten as well: it will be sampled again, by the same noise.
        """
        self.num_computed = self.num_scheduled = self.num_cached = 0
        if self.is_finished:
            self.text_is_torn, self.num_read = True, len(self.token_ids)
        else:
            self.status, self.finish_reason, self.error = Status.WAITING, None, None
        if self.num_read != len(self.token_ids):
            self.text_is_torn = True
            del self.token_ids[self.num_read :]
        if self.text_is_torn:
            with suppress(Exception):  # a tokenizer that fails again: `append` will say so
                self.read_again()

    def finish(self, reason: str) -> None:
        self._announce()
        self.finish_reason = reason
        self.status = Status.FINISHED
        if self.detokenizer:
            self.detokenizer.finish()
