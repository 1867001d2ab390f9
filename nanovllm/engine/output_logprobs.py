"""OutputLogprobs: the logprobs of one sequence's output tokens, made when they are read."""

from typing import Any

import numpy as np

from nanovllm.logprobs import SampleLogprobs


class OutputLogprobs:
    """Keeps where each output token's numbers are, and makes `Logprob`s of them on demand.

    A step may be repeated after a failure, so a token's index may be noted again. The last note
    counts, and it drops all notes behind it.
    """

    def __init__(self) -> None:
        self._packed: list[np.ndarray] = []  # of each token, the packed rows of its step
        self._places: list[int] = []  # of each token, its row among these
        self._sums: list[float] = []  # of the logprobs up to each token
        self._made: SampleLogprobs = []
        self._processor: Any = None  # the LogprobsProcessor that has noted them

    def note(
        self, index: int, logprob: float, packed: np.ndarray, place: int, processor: Any
    ) -> None:
        """Keep the logprob of output token `index`, and row `place` of its step's packed rows."""
        self._processor = processor
        before = self._sums[index - 1] if index else 0.0
        self._packed[index:] = [packed]
        self._places[index:] = [place]
        self._sums[index:] = [before + logprob]
        del self._made[index:]

    def read(self, seq: Any, count: int) -> SampleLogprobs:
        """The logprobs of the first `count` output tokens of `seq`."""
        for index in range(len(self._made), count):
            position, packed = seq.num_prompt_tokens + index, self._packed[index]
            made = self._processor.make_output(seq, position, packed, self._places[index])
            self._made.append(made)
        return self._made[:count]

    def cumulative(self, count: int) -> float:
        """The sum of the first `count` tokens' logprobs."""
        return self._sums[count - 1] if count else 0.0
