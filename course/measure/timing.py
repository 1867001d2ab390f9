"""How long does it take? Timings that warm up, wait for the GPU, and say how much they vary.

print(measure(lambda: a @ b))         # 1.2 ms (1.1 to 1.4 ms, 5 runs)
peaks = machine_peaks()               # this machine's read bandwidth and matrix rate
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from course.measure.roofline import Peaks, measure_peaks

UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


@dataclass(frozen=True)
class Timing:
    """The seconds of several runs of one thing; what is quoted is their median."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def lowest(self) -> float:
        return min(self.seconds)

    @property
    def highest(self) -> float:
        return max(self.seconds)

    def __str__(self) -> str:
        scale, unit = unit_for(self.median)
        median, lowest, highest = (
            f"{value / scale:.3g}" for value in (self.median, self.lowest, self.highest)
        )
        return f"{median} {unit} ({lowest} to {highest} {unit}, {len(self.seconds)} runs)"


def unit_for(seconds: float) -> tuple[float, str]:
    """The unit in which a duration is at least 1, and its size in seconds; at least µs."""
    return next((unit for unit in UNITS if seconds >= unit[0]), UNITS[-1])


def measure(function: Callable[[], Any], repeats: int = 5, warmup: int = 1) -> Timing:
    """Time `repeats` calls one by one, after `warmup` calls that are not counted.

    A GPU works on while Python goes ahead, so the clock is read only when the GPU is done.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    for _ in range(warmup):
        function()
    seconds = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return Timing(tuple(seconds))


def synchronize() -> None:
    """Wait until the GPU, if there is one, has done all it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine_peaks(device: str | None = None) -> Peaks:
    """What this machine can do: `.bandwidth` in bytes/s, `.flops` in FLOP/s. A few seconds.

    The matrix product is in bfloat16 on a GPU and in float32 on a CPU: what the engine computes in.
    """
    import torch

    found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.bfloat16 if found.type == "cuda" else torch.float32
    return measure_peaks(found, dtype)
