"""OutputLogprobs: the logprobs of one sequence's output tokens, which are made on demand."""

from typing import Any

import numpy as np

from nanovllm.logprobs import SampleLogprobs


class OutputLogprobs:
    """Records where each output token's numbers are, and makes `Logprob`s of them when read.

    A step may be repeated after a failure, so that a token is recorded again. The last record
    counts, and it drops all records of later tokens.
    """

    def __init__(self) -> None:
        self._packed: list[np.ndarray] = []  # for each token, the packed rows of its step
        self._rows: list[int] = []  # for each token, its row among these
        self._sums: list[float] = []  # for each token, the sum of the logprobs up to it
        self._made: SampleLogprobs = []
        self._processor: Any = None  # the LogprobsProcessor that has recorded them

    def record(
        self, index: int, logprob: float, packed: np.ndarray, row: int, processor: Any
    ) -> None:
        """Record the logprob of output token `index`, and its row of the step's packed rows."""
        self._processor = processor
        before = self._sums[index - 1] if index else 0.0
        self._packed[index:] = [packed]
        self._rows[index:] = [row]
        self._sums[index:] = [before + logprob]
        del self._made[index:]

    def read(self, seq: Any, count: int) -> SampleLogprobs:
        """Return the logprobs of the first `count` output tokens of `seq`."""
        for index in range(len(self._made), count):
            position, packed = seq.num_prompt_tokens + index, self._packed[index]
            made = self._processor.make_sample_logprobs(seq, position, packed, self._rows[index])
            self._made.append(made)
        return self._made[:count]

    def cumulative(self, count: int) -> float:
        """Return the sum of the first `count` tokens' logprobs."""
        return self._sums[count - 1] if count else 0.0
