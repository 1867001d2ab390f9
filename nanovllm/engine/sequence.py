"""Sequence: the tokens and the state of one answer, as the scheduler sees them.

Two counters say how far a sequence has come. `num_scheduled` moves when a step is planned, and
`num_computed` moves when the forward pass of that step has succeeded. Between two steps they differ
only in the overlapped loop, by the one step that is in flight.

    token_ids   [ prompt ............ | output ...... ]          all ids the host knows
                [0, num_computed)       keys and values are in the cache and valid to read
                [num_computed, num_scheduled)      the step in flight computes these
"""

import enum
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import xxhash

from nanovllm.engine.output_logprobs import OutputLogprobs
from nanovllm.logprobs import LogprobsOnePosition, PromptLogprobs
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


class SequenceStatus(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """One answer to a request.

    max_length: the number of tokens, of prompt and output together, at which the sequence ends.
    stop_ids: token ids that end the sequence. They stay in `token_ids`.
    """

    request_id: str
    prompt: str | None
    token_ids: list[int]
    params: SamplingParams
    max_length: int
    stop_ids: frozenset[int] = frozenset()
    eos_id: int | None = None  # the end token of the tokenizer, which is no stop_reason
    end_ids: frozenset[int] = frozenset()  # min_tokens forbids these, even if ignore_eos is set
    bad_word_ids: list[list[int]] = field(default_factory=list)
    noise: tuple[int, int] = (0, 0)  # the engine's seed and the request's ordinal
    detokenizer: Any = None  # makes the text of the output ids; None: token ids only
    news: dict["Sequence", None] | None = None  # the caller's set of sequences that have changed
    index: int = 0  # which of its request's answers it is
    parent: Any = None  # the ParentRequest, if its request has several answers

    status: SequenceStatus = SequenceStatus.WAITING
    finish_reason: str | None = None  # "stop", "length", "abort" or "error"
    stop_reason: int | str | None = None  # the stop token or stop string that ended it
    error: str | None = None  # what went wrong, if finish_reason is "error"
    num_computed: int = 0
    num_scheduled: int = 0
    num_admissions: int = 0  # times that it left the queue
    num_cached_tokens: int = 0  # tokens in the blocks that its latest admission found in the cache
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # of every full block hashed so far
    num_cached_blocks: int = 0  # leading blocks that are in the prefix cache

    def __post_init__(self) -> None:
        # Every step reads these two for every row.
        self.needs_whole_rows = self.params.needs_whole_rows
        self.needs_ids_on_host = any(len(ids) > 1 for ids in self.bad_word_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.num_processed = self.num_prompt_tokens  # ids that `append` has processed to the end
        self.text_is_torn = False
        wanted = self.params.logprobs is not None
        self.output_logprobs = OutputLogprobs() if wanted else None
        wanted = self.params.prompt_logprobs is not None
        self.prompt_logprobs: PromptLogprobs | None = [None] if wanted else None
        self.metrics = RequestStateStats(arrival_time=time.time(), queued_ts=time.monotonic())
        seed = self.params.seed
        if seed is None:  # derive one, so that identical prompts get different answers
            seed = xxhash.xxh3_64_intdigest(repr(self.noise).encode()) - 2**63
        self.seed = (seed + self.index + 2**63) % 2**64 - 2**63  # wrap around, as int64

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def siblings(self) -> list["Sequence"]:
        """All sequences of the same request, this one included, in the order of `index`."""
        return self.parent.children if self.parent else [self]

    def set_prompt_logprobs(self, position: int, found: list[LogprobsOnePosition]) -> None:
        """Store the logprobs of the prompt's tokens at `position` and after it."""
        kept = self.prompt_logprobs or []
        kept += [None] * (position - len(kept))
        kept[position : position + len(found)] = found
        self.prompt_logprobs = kept

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    @property
    def in_flight(self) -> bool:
        return self.num_scheduled > self.num_computed

    @property
    def num_unscheduled(self) -> int:
        """Tokens that the next step could compute: the rest of the prompt, or one to decode.

        A sequence may be scheduled while its newest token is in flight, because the next step finds
        the id of this token on the device. Only a sequence that needs its ids on the host waits for
        the id. The last token is never computed, because nothing follows it.
        """
        if self.num_scheduled >= self.max_length - 1:
            return 0
        known = len(self.token_ids) - self.num_scheduled
        return known if known > 0 or self.needs_ids_on_host else 1

    # -- one step --------------------------------------------------------------------------------

    def append(self, token_id: int | None) -> None:
        """Append the token that a step sampled, and finish if it is the last one.

        None means that no token could be chosen. The sequence then ends with an error, and it keeps
        the tokens that it has.
        """
        self._announce()
        if self.text_is_torn:
            self.rebuild_text()
        if token_id is None:
            self._fail()
            return
        self.append_token(token_id)
        stop_string = self.append_text(token_id)
        self.check_stop(token_id, stop_string)
        self.num_processed = len(self.token_ids)

    def append_token(self, token_id: int) -> None:
        """Append a token id, and record when it came."""
        self.token_ids.append(token_id)
        num_output_tokens = len(self.token_ids) - self.num_prompt_tokens
        self.metrics.record_token(num_output_tokens, time.monotonic())

    def append_text(self, token_id: int) -> str | None:
        """Add a token to the text. Return the stop string that the token completes, or None."""
        if self.detokenizer is None or not self._is_visible(token_id):
            return None
        return self.detokenizer.stop_string if self.detokenizer.append(token_id) else None

    def check_stop(self, token_id: int, stop_string: str | None) -> None:
        """Finish the sequence if its newest token, or the stop string that it completes, ends it.

        As in vLLM, the end token of the tokenizer is no stop_reason.
        """
        if stop_string is not None:
            self.stop_reason = stop_string
            self.finish("stop")
        elif token_id in self.stop_ids:
            self.stop_reason = None if token_id == self.eos_id else token_id
            self.finish("stop")
        elif len(self.token_ids) >= self.max_length:
            self.finish("length")

    def finish(self, reason: str) -> None:
        """End the sequence, because of "stop", "length", "abort" or "error"."""
        self._announce()
        self.finish_reason = reason
        self.status = SequenceStatus.FINISHED
        if self.detokenizer:
            self.detokenizer.finish()

    def _fail(self) -> None:
        message = NO_TOKEN_LEFT if self.params.adjusts else NOT_FINITE
        self.error = message.format(len(self.token_ids))
        self.metrics.is_corrupted = True
        self.finish("error")

    def _is_visible(self, token_id: int) -> bool:
        """Return whether the text shows a token. Stop tokens show only if the request wants it."""
        return token_id not in self.stop_ids or self.params.include_stop_str_in_output

    def _announce(self) -> None:
        """Tell the caller to look at this sequence.

        This comes before the change. An interrupt between the two then costs one needless look, and
        never hides a change.
        """
        if self.news is not None:
            self.news[self] = None

    # -- after an interrupt ----------------------------------------------------------------------

    def rebuild_text(self) -> None:
        """Make the text anew from the ids, because an interrupt may have torn it."""
        self.text_is_torn = True
        if self.detokenizer:
            self.detokenizer.reset()
            for token_id in filter(self._is_visible, self.output_ids):
                self.detokenizer.append(token_id)
            if self.is_finished:
                self.detokenizer.finish()
        self.text_is_torn = False

    def restart(self) -> None:
        """Forget every step, so that the sequence can wait in the queue again. It keeps its ids.

        An interrupt may have come at any point within `append` or `finish`. If `append` has not
        processed the newest id to its end, we forget this id as well. The same noise will sample
        the same id again.
        """
        self.num_computed = self.num_scheduled = self.num_cached_tokens = 0
        if self.is_finished:
            self.text_is_torn, self.num_processed = True, len(self.token_ids)
        else:
            self.status, self.error = SequenceStatus.WAITING, None
            self.finish_reason = self.stop_reason = None
        if self.num_processed != len(self.token_ids):
            self.text_is_torn = True
            del self.token_ids[self.num_processed :]
        if self.text_is_torn:
            with suppress(Exception):  # if the tokenizer fails again, `append` will raise its error
                self.rebuild_text()
