"""Charts of lesson 06: what each version of a kernel reaches, and who is busy when.

report = recorded()                                   # the shipped H200 run
show(bars(report, "decode"), words(report, "decode"))
show(timetable({"one program a row": [12, 4, 2, 2]}, processors=4), "...")
"""

import heapq
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from course.plots import COLOURS, WIDTH
from course.records import SHIPPED

RECORDED = SHIPPED / "h200_kernel_ladder.json"
FLASH = SHIPPED / "h200_attention_flash.json"  # a run of its own, on another card of the kind
CEILING = {"store": "copy", "rope": "copy", "decode": "read"}
HATCHES = ("", "//", "..", "xx", "\\\\")
Report = Mapping[str, Any]


def recorded(file: Path = RECORDED, flash: Path = FLASH) -> dict[str, Any]:
    """The shipped report of `course.benchmarks.kernel_ladder`, FlashAttention's rows included."""
    report = json.loads(file.read_text())
    for shape, row in json.loads(flash.read_text())["shapes"].items():
        report["decode"][shape].setdefault("FlashAttention", row)
    return report


def ceiling(report: Report, ladder: str) -> float:
    """Bytes a second that a ladder's kernels could move at most."""
    return report[f"{CEILING[ladder]}_bytes_per_second"]


def words(report: Report, ladder: str) -> str:
    """All of a ladder's numbers, for a picture's alternative text."""
    return "; ".join(
        f"{shape}: "
        + ", ".join(
            f"{name} {row['bytes_per_second'] / 1e9:,.0f} GB/s" for name, row in rows.items()
        )
        for shape, rows in report[ladder].items()
    )


def table(report: Report, ladder: str) -> str:
    """A ladder's times in microseconds, and its share of the ceiling, as lines to print."""
    lines = []
    for shape, rows in report[ladder].items():
        lines.append(f"{shape:38}{'µs':>10}{'GB/s':>8}{'of the ceiling':>16}")
        for name, row in rows.items():
            reached = row["bytes_per_second"]
            lines.append(
                f"  {name:36}{row['microseconds']:>10,.1f}{reached / 1e9:>8,.0f}"
                f"{reached / ceiling(report, ladder):>15.0%}"
            )
    return "\n".join(lines)


def bars(report: Report, ladder: str, title: str) -> Any:
    """GB/s of every version, a panel a shape; the dashed line is the ceiling."""
    import matplotlib.pyplot as plt

    shapes = report[ladder]
    rows = [max(len(versions) for versions in shapes.values())] * len(shapes)
    fig, axes = plt.subplots(1, len(rows), figsize=(WIDTH, 1.5 + 0.36 * rows[0]), sharey=True)
    fig.suptitle(f"{title}\n{report['machine']}, {report['dtype']}", x=0.01, ha="left", fontsize=12)
    top = ceiling(report, ladder) / 1e9
    for ax, (shape, versions) in zip(axes, shapes.items(), strict=True):
        for i, (name, row) in enumerate(versions.items()):
            speed = row["bytes_per_second"] / 1e9
            style = {"color": COLOURS[i % len(COLOURS)], "hatch": HATCHES[i % len(HATCHES)]}
            ax.barh(name, speed, edgecolor="white", **style)
            ax.text(speed + top / 60, i, f"{speed:,.0f}", va="center", fontsize=9)
        ax.axvline(top, linestyle="--", color="#444444")
        ax.set(title=shape, xlabel="GB/s", xlim=(0, 1.25 * top))
        ax.title.set_fontsize(10)
    axes[0].invert_yaxis()
    fig.tight_layout()
    return fig


# -- who is busy when ----------------------------------------------------------------------------


def deal(lengths: Sequence[int], processors: int) -> list[tuple[int, int, int]]:
    """(processor, start, length) of each program: the next one goes where it can begin first."""
    free = [(0, processor) for processor in range(processors)]
    placed = []
    for length in lengths:
        start, processor = heapq.heappop(free)
        placed.append((processor, start, length))
        heapq.heappush(free, (start + length, processor))
    return placed


def makespan(lengths: Sequence[int], processors: int) -> int:
    """When the last program is done."""
    return max(start + length for _, start, length in deal(lengths, processors))


def timetable(ways: Mapping[str, Sequence[int]], processors: int) -> Any:
    """For each way to cut the work: which processor is busy with which program, in tiles."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(ways), figsize=(WIDTH, 2.4), sharex=True, sharey=True)
    for ax, (title, lengths) in zip(axes, ways.items(), strict=True):
        for i, (processor, start, length) in enumerate(deal(lengths, processors)):
            style = {"color": COLOURS[i % len(COLOURS)], "hatch": HATCHES[i % len(HATCHES)]}
            ax.barh(processor, length, left=start, height=0.7, edgecolor="white", **style)
        ax.set(title=title, xlabel="time (tiles)", yticks=range(processors))
        ax.title.set_fontsize(10)
        ax.grid(visible=False, axis="y")
    axes[0].set_ylabel("processor")
    axes[0].invert_yaxis()
    fig.tight_layout()
    return fig
