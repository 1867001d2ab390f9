"""What comes out: a request's text and timings, and what each step of the engine did.

Plain dataclasses with vLLM's names and clocks. `arrival_time` is the time of day, in seconds since
1970. All other times are seconds on time.monotonic's clock, so that only their differences mean
something. A field for what was not asked for is None.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from nanovllm.logprobs import PromptLogprobs, SampleLogprobs


@dataclass
class RequestStateStats:
    """When things happened to one request, and what the cache saved or cost it.

    A time that has not come yet is 0.0, as in vLLM.
    """

    num_generation_tokens: int = 0
    arrival_time: float = 0.0  # time of day
    queued_ts: float = 0.0  # the same moment, on the clock of the other times
    scheduled_ts: float = 0.0  # first admitted to a step
    first_token_ts: float = 0.0
    last_token_ts: float = 0.0
    first_token_latency: float = 0.0  # from its arrival, queueing included
    is_corrupted: bool = False  # its logits were not finite
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache on first admission
    num_preempted_tokens: int = 0  # computed tokens thrown away by preemption

    @property
    def ttft(self) -> float | None:
        """Time to first token, queueing included; None before it."""
        return self.first_token_latency if self.first_token_ts else None

    @classmethod
    def joined(cls, stats: list["RequestStateStats"]) -> "RequestStateStats":
        """The measurements of a request whose answers have these ones, the first answer's first.

        Tokens are added up. The first token is the earliest one of any answer, and the last token
        is the latest. What the prefix cache held is what the first answer found there, because
        the later answers also find what the first one has put there.
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

    def note_token(self, count: int, now: float) -> None:
        """Note that a token has come, and that there are `count` now."""
        self.num_generation_tokens = count
        self.last_token_ts = now
        if not self.first_token_ts:
            self.first_token_ts = now
            self.first_token_latency = now - self.queued_ts


@dataclass
class CompletionOutput:
    """One answer to a prompt."""

    index: int
    text: str  # while it runs, only the text that later tokens cannot change
    token_ids: list[int]  # with the stop token, if one ended it
    cumulative_logprob: float | None = None
    logprobs: Any = None  # SampleLogprobs, a list with a dict for each token
    finish_reason: str | None = None  # "stop", "length", "abort", "error"; None while it runs
    stop_reason: int | str | None = None  # what stopped it, if not the tokenizer's end token
    lora_request: None = None
    error: str | None = None  # what went wrong, if finish_reason is "error"

    def finished(self) -> bool:
        return self.finish_reason is not None

    @classmethod
    def of(cls, seq: Any) -> "CompletionOutput":
        """The answer that a Sequence has written so far."""
        return cls(
            index=seq.index,
            text=seq.detokenizer.text if seq.detokenizer else "",
            token_ids=seq.output_ids,
            cumulative_logprob=seq.cumulative_logprob,
            logprobs=partial(seq.read_logprobs, len(seq.output_ids)),
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


# Logprobs are many objects, so they are made when they are first read. A dataclass's field can be a
# property only if it becomes one afterwards.
CompletionOutput.logprobs = property(
    _read_logprobs, lambda output, value: setattr(output, "_logprobs", value)
)


@dataclass
class RequestOutput:
    """One request's state: all the output so far, not only what the last step added."""

    request_id: str
    prompt: str | None  # None if it came as token ids
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]  # `n` of them, in the order of their index
    finished: bool  # all of them are
    metrics: RequestStateStats
    prompt_logprobs: PromptLogprobs | None = None
    lora_request: None = None

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that the prefix cache held."""
        return self.metrics.num_cached_tokens

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None before the end, or if there was only one.

        Several answers are written at the same time, so the tokens of the longest one count.
        """
        count = max(len(output.token_ids) for output in self.outputs)
        first = self.metrics.first_token_ts
        done = self.finished and count > 1
        return (self.metrics.last_token_ts - first) / (count - 1) if done else None

    @classmethod
    def of(cls, seq: Any) -> "RequestOutput":
        """What there is to say now of a Sequence's request, with all answers to its prompt."""
        seqs = seq.siblings
        return cls(
            request_id=(seq.parent or seq).request_id,
            prompt=seq.prompt,
            prompt_token_ids=seq.token_ids[: seq.num_prompt_tokens],
            outputs=[CompletionOutput.of(one) for one in seqs],
            finished=all(one.is_finished for one in seqs),
            prompt_logprobs=seqs[0].prompt_logprobs and list(seqs[0].prompt_logprobs),
            metrics=RequestStateStats.joined([one.metrics for one in seqs]),
        )


class _TextPiece(NamedTuple):
    prompt_index: int
    text: str


class TextPiece(_TextPiece):
    """New text of one answer, as `LLM.stream` yields it. It unpacks as (prompt's index, text).

    output_index: which of the prompt's `n` answers the text belongs to.
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
    """One step of the engine: who ran, with how many tokens, and what was left once planned."""

    start_time: float  # when it was planned
    rows: tuple[tuple[str, int, int], ...]  # (request_id, first position, tokens computed)
    num_running: int
    num_waiting: int
    num_free_blocks: int
    end_time: float = math.nan  # when its tokens were on the host

    @property
    def num_tokens(self) -> int:
        return sum(count for _, _, count in self.rows)
