"""What lesson 00 draws. Every figure has an `alt_text` that says its numbers in words."""

from collections.abc import Mapping, Sequence
from typing import Any

from course.measure.roofline import Peaks
from course.show import plots

Point = tuple[Any, float, float, float]  # label, bytes, FLOPs and seconds of one step


def bandwidth_curve(
    sizes: Sequence[int], rates: Sequence[float], memory: float, marks: Mapping[str, int], at: str
) -> Any:
    """Bytes/s of reading buffers of `sizes` bytes; `memory` as a line, `marks` (bytes) upright."""
    fig, ax = plots.figure("Reading the same buffer again and again", at)
    ax.plot([size / 2**20 for size in sizes], [rate / 1e9 for rate in rates])
    ax.axhline(memory / 1e9, color=plots.VERMILLION, linestyle="--", marker="")
    start = (sizes[0] / 2**20, memory / 1e9)
    ax.annotate("memory, the first number", start, (0, -14), textcoords="offset points")
    for name, num_bytes in marks.items():
        ax.axvline(num_bytes / 2**20, color=plots.BLACK, linestyle=":", marker="")
        ax.annotate(name, (num_bytes / 2**20, 0), (5, 8), textcoords="offset points")
    ax.set(xscale="log", xlabel="size of the buffer (MiB)", ylabel="GB/s read", ylim=0)
    ticks = [size / 2**20 for size in sizes[::2]]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    read = zip(sizes, rates, strict=True)
    points = ", ".join(f"{size / 2**20:g} MiB {rate / 1e9:.3g}" for size, rate in read)
    fig.alt_text = f"GB/s read, by size of the buffer: {points}. Memory gives {memory / 1e9:.3g}."
    return fig


def step_times(batches: Sequence[int], seconds: Mapping[str, Sequence[float]], at: str) -> Any:
    """A line for each of `seconds`: milliseconds a decode step for each of `batches` requests."""
    fig, ax = plots.figure("One decode step, against the requests that share it", at)
    words = []
    for name, values in seconds.items():
        ax.plot(batches, [1000 * value for value in values], label=name)
        words.append(f"{name}: " + ", ".join(f"{1000 * value:.3g}" for value in values))
    ax.set(xscale="log", yscale="log", xlabel="requests in the step", ylabel="ms a step")
    ax.set_xticks(batches, list(map(str, batches)))
    low, high = min(map(min, seconds.values())) * 1000, max(map(max, seconds.values())) * 1000
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if low / 2 < t < high * 2]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.legend()
    fig.alt_text = f"Milliseconds a step at {list(batches)} requests. " + "; ".join(words) + "."
    return fig


def roofline(peaks: Peaks, series: Mapping[str, Sequence[Point]], at: str) -> Any:
    """The roof min(rate, bandwidth * intensity), and each step under it as a labelled point."""
    fig, ax = plots.figure("The roofline", at, height=4.6)
    ridge = peaks.flops / peaks.bandwidth
    points = [(flops / num_bytes) for steps in series.values() for _, num_bytes, flops, _ in steps]
    reach = [min(points) / 2, ridge, max(*points, ridge) * 2]
    roof = [min(peaks.flops, peaks.bandwidth * x) / 1e9 for x in reach]
    ax.plot(reach, roof, color=plots.BLACK, marker="", label="the roof")
    words = [f"The roof rises to {ridge:.3g} FLOP a byte, then is flat at {roof[-1]:,.0f} GFLOP/s"]
    for i, (name, steps) in enumerate(series.items()):
        xs = [flops / num_bytes for _, num_bytes, flops, _ in steps]
        ys = [flops / seconds / 1e9 for _, _, flops, seconds in steps]
        colour, marker = plots.COLOURS[i], plots.MARKERS[i]
        ax.plot(xs, ys, linestyle=":", label=name, color=colour, marker=marker)
        for (label, *_), x, y in zip(steps, xs, ys, strict=True):
            place, side = ((-7, 5), "right") if i == 0 else ((6, -14), "left")  # points may meet
            ax.annotate(str(label), (x, y), place, textcoords="offset points", ha=side)
            words.append(f"{name}, {label}: {x:.3g} FLOP a byte, {y:.3g} GFLOP/s")
    ax.set(xscale="log", yscale="log", xlabel="FLOP for each byte read", ylabel="GFLOP/s")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")
    ax.legend(loc="lower right")
    fig.alt_text = "; ".join(words) + "."
    return fig
