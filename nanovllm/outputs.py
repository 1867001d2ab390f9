"""The outputs: a request's text and timings, and a record of each step of the engine.

These are plain dataclasses with vLLM's names and clocks. `arrival_time` is the time of day, in
seconds since 1970. All other times are seconds on time.monotonic's clock, so only their differences
have a meaning. A field that the request did not want is None.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from nanovllm.logprobs import PromptLogprobs, SampleLogprobs


@dataclass
class RequestStateStats:
    """The times at which one request changed its state, and what the cache saved or cost it.

    A time that has not come yet is 0.0, as in vLLM.
    """

    num_generation_tokens: int = 0
    arrival_time: float = 0.0  # time of day
    queued_ts: float = 0.0  # the same moment, on the clock of the other times
    scheduled_ts: float = 0.0  # first admitted to a step
    first_token_ts: float = 0.0
    last_token_ts: float = 0.0
    first_token_latency: float = 0.0  # since its arrival, including the time in the queue
    is_corrupted: bool = False  # its logits were not finite
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache on first admission
    num_preempted_tokens: int = 0  # computed tokens that preemption dropped

    @property
    def ttft(self) -> float | None:
        """Time to first token in seconds, including the time in the queue; None before it."""
        return self.first_token_latency if self.first_token_ts else None

    @classmethod
    def merge(cls, stats: list["RequestStateStats"]) -> "RequestStateStats":
        """Merge the stats of a request's answers, in the order of their index.

        Tokens are added up. The first token is the earliest one of any answer, and the last token
        is the latest. The number of cached tokens is the first answer's, because the later answers
        also find the blocks that the first one has computed.
        """
        if len(stats) == 1:
            return stats[0]
        begun = [one for one in stats if one.first_token_ts]
        first = min(begun, key=lambda one: one.first_token_ts, default=stats[0])
        return cls(
            num_generation_tokens=sum(one.num_generation_tokens for one in stats),
            arrival_time=stats[0].arrival_time,
            queued_ts=stats[0].queued_ts,
            scheduled_ts=min((s.scheduled_ts for s in stats if s.scheduled_ts), default=0.0),
            first_token_ts=first.first_token_ts,
            last_token_ts=max(one.last_token_ts for one in stats),
            first_token_latency=first.first_token_latency,
            is_corrupted=any(one.is_corrupted for one in stats),
            num_cached_tokens=stats[0].num_cached_tokens,
            num_preempted_tokens=sum(one.num_preempted_tokens for one in stats),
        )

    def record_token(self, count: int, now: float) -> None:
        """Record the time of a new token, with which the output has `count` tokens."""
        self.num_generation_tokens = count
        self.last_token_ts = now
        if not self.first_token_ts:
            self.first_token_ts = now
            self.first_token_latency = now - self.queued_ts


@dataclass
class CompletionOutput:
    """One answer to a prompt."""

    index: int
    text: str  # while the request runs, only the text that later tokens cannot change
    token_ids: list[int]  # with the stop token, if one ended it
    cumulative_logprob: float | None = None
    logprobs: Any = None  # SampleLogprobs, a list with a dict for each token
    finish_reason: str | None = None  # "stop", "length", "abort", "error"; None while it runs
    # The stop token or stop string that ended it. It is None for the tokenizer's end token.
    stop_reason: int | str | None = None
    lora_request: None = None
    error: str | None = None  # what went wrong, if finish_reason is "error"

    def finished(self) -> bool:
        return self.finish_reason is not None

    @classmethod
    def of(cls, seq: Any) -> "CompletionOutput":
        """Make the output of one Sequence, with all tokens that it has so far."""
        token_ids, logprobs = seq.output_ids, seq.output_logprobs
        return cls(
            index=seq.index,
            text=seq.detokenizer.text if seq.detokenizer else "",
            token_ids=token_ids,
            cumulative_logprob=logprobs and logprobs.cumulative(len(token_ids)),
            logprobs=logprobs and partial(logprobs.read, seq, len(token_ids)),
            finish_reason=seq.finish_reason,
            stop_reason=seq.stop_reason,
            error=seq.error,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_logprobs": self.logprobs}


def _read_logprobs(output: Any) -> SampleLogprobs | None:
    if callable(output._logprobs):
        output._logprobs = output._logprobs()
    return output._logprobs


# Logprobs are many objects, so we make them when they are first read. The field of a dataclass can
# be a property only if it becomes one after the class was made.
CompletionOutput.logprobs = property(
    _read_logprobs, lambda output, value: setattr(output, "_logprobs", value)
)


@dataclass
class RequestOutput:
    """The state of one request: all its output so far, and not only what the last step added."""

    request_id: str
    prompt: str | None  # None if it came as token ids
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]  # the `n` answers, in the order of their index
    finished: bool  # whether all answers are
    metrics: RequestStateStats
    prompt_logprobs: PromptLogprobs | None = None
    lora_request: None = None

    @property
    def num_cached_tokens(self) -> int:
        """The number of prompt tokens that the prefix cache held."""
        return self.metrics.num_cached_tokens

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first, in seconds.

        It is None before the end, and if there is only one token. Several answers are written at
        the same time, so we count the tokens of the longest one.
        """
        count = max(len(output.token_ids) for output in self.outputs)
        first = self.metrics.first_token_ts
        done = self.finished and count > 1
        return (self.metrics.last_token_ts - first) / (count - 1) if done else None

    @classmethod
    def of(cls, seq: Any) -> "RequestOutput":
        """Make the output of a Sequence's request, with all answers to its prompt."""
        seqs = seq.siblings
        return cls(
            request_id=(seq.parent or seq).request_id,
            prompt=seq.prompt,
            prompt_token_ids=seq.token_ids[: seq.num_prompt_tokens],
            outputs=[CompletionOutput.of(one) for one in seqs],
            finished=all(one.is_finished for one in seqs),
            prompt_logprobs=seqs[0].prompt_logprobs and list(seqs[0].prompt_logprobs),
            metrics=RequestStateStats.merge([one.metrics for one in seqs]),
        )


class _TextPiece(NamedTuple):
    prompt_index: int
    text: str


class TextPiece(_TextPiece):
    """New text of one answer, as `LLM.stream` yields it. It unpacks as (prompt's index, text).

    output_index: the index of the answer that the text belongs to, of the prompt's `n` answers.
    """

    output_index: int

    def __new__(cls, prompt_index: int, text: str, output_index: int = 0) -> "TextPiece":
        piece = super().__new__(cls, prompt_index, text)
        piece.output_index = output_index
        return piece

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, output_index={self.output_index})"


@dataclass
class StepRecord:
    """A record of one step: which requests ran with how many tokens, and what the plan left."""

    start_time: float  # when the step was planned
    rows: tuple[tuple[str, int, int], ...]  # (request_id, first position, tokens computed)
    num_running: int
    num_waiting: int
    num_free_blocks: int
    end_time: float = math.nan  # when its tokens were on the host

    @property
    def num_tokens(self) -> int:
        return sum(count for _, _, count in self.rows)
