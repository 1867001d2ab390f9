"""What comes out: a request's text and timings, and what each step of the engine did.

Plain dataclasses with vLLM's names. Times are seconds on time.perf_counter's clock.
"""

import math
from dataclasses import dataclass
from typing import Any


@dataclass
class RequestMetrics:
    """When things happened to one request, and what the cache saved or cost it."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache on first admission
    num_preempted_tokens: int = 0  # computed tokens thrown away by preemption

    @property
    def ttft(self) -> float | None:
        """Time to first token, queueing included."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


@dataclass
class CompletionOutput:
    index: int
    text: str  # while it runs, only the text that later tokens cannot change
    token_ids: list[int]  # with the stop token, if one ended it
    finish_reason: str | None  # "stop", "length", "abort", "error"; None while it runs
    error: str | None = None  # what went wrong, if finish_reason is "error"


@dataclass
class RequestOutput:
    """One request's state: all the output so far, not only what the last step added."""

    request_id: str
    prompt: str | None  # None if it came as token ids
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]  # always one
    finished: bool
    metrics: RequestMetrics

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that the prefix cache held."""
        return self.metrics.num_cached_tokens

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None before the end, or if there was only one."""
        count = len(self.outputs[0].token_ids)
        first, last = self.metrics.first_token_time, self.metrics.finished_time
        return (last - first) / (count - 1) if first and last and count > 1 else None

    @classmethod
    def of(cls, seq: Any) -> "RequestOutput":
        """What there is to say of a Sequence now."""
        text = seq.detokenizer.text if seq.detokenizer else ""
        completion = CompletionOutput(0, text, seq.output_ids, seq.finish_reason, seq.error)
        ids = seq.token_ids[: seq.num_prompt_tokens]
        return cls(seq.request_id, seq.prompt, ids, [completion], seq.is_finished, seq.metrics)


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
