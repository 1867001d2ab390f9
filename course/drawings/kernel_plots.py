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

from course.show.svg import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, Picture
from course.stages.records import SHIPPED

RECORDED = SHIPPED / "h200_kernel_ladder.json"
FLASH = SHIPPED / "h200_attention_flash.json"  # a run of its own, on another card of the kind
CEILING = {"store": "copy", "rope": "copy", "decode": "read"}
BARS = (ORANGE, SKY, GREEN, BLUE, PURPLE)
LEFT = 190  # where bars begin, pixels
Report = Mapping[str, Any]


def recorded(file: Path = RECORDED, flash: Path = FLASH) -> dict[str, Any]:
    """The shipped report of `course bench kernel_ladder`, FlashAttention's rows included."""
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
        f"{shape}: " + ", ".join(f"{name} {reached(row)}" for name, row in rows.items())
        for shape, rows in report[ladder].items()
    )


def reached(row: Mapping[str, float]) -> str:
    return f"{row['microseconds']:,.1f} µs, {row['bytes_per_second'] / 1e9:,.0f} GB/s"


def bars(report: Report, ladder: str, title: str) -> Picture:
    """Each version's bandwidth, shape by shape; the dashed line is the ceiling."""
    groups, top = report[ladder], ceiling(report, ladder)
    height = 90 + sum(34 + 24 * len(rows) for rows in groups.values())
    p = Picture(700, height, title, f"{title}: {words(report, ladder)}")
    p.text((20, 24), title, 15, "start", bold=True)
    p.text((20, 46), f"{report['machine']}, {report['dtype']}", 12, "start", GREY)
    width, y = 300, 74
    edge = LEFT + width
    p.text((edge, 66), f"{CEILING[ladder]} bandwidth, {top / 1e9:,.0f} GB/s", 11, colour=GREY)
    p.line((edge, 78), (edge, height - 14), colour=GREY, dashed=True)
    for shape, rows in groups.items():
        p.text((20, y + 14), shape, 12, "start", bold=True)
        for i, (name, row) in enumerate(rows.items()):
            at = y + 28 + 24 * i
            share = row["bytes_per_second"] / top
            p.text((LEFT - 8, at + 9), name, 12, "end")
            p.box(LEFT, at, max(1, width * share), 18, colour=BARS[i % len(BARS)], radius=1)
            p.text((edge + 12, at + 9), f"{reached(row)}, {share:.0%}", 11.5, "start")
        y += 34 + 24 * len(rows)
    return p


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


def timetable(ways: Mapping[str, Sequence[int]], processors: int) -> Picture:
    """For each way to cut the work: which processor is busy with which program, in tiles."""
    ends = [makespan(lengths, processors) for lengths in ways.values()]
    texts = [f"{name}: {end}" for name, end in zip(ways, ends, strict=True)]
    alt = f"{processors} processors; tiles until the last is done: {', '.join(texts)}."
    p = Picture(700, 20 + (54 + 22 * processors) * len(ways), "Who is busy when", alt)
    y, scale = 12, 520 / max(ends)
    for (title, lengths), end in zip(ways.items(), ends, strict=True):
        p.text((20, y + 12), f"{title}: done after {end}", 13, "start", bold=True)
        for processor in range(processors):
            p.text((120, y + 36 + 22 * processor), f"processor {processor}", 11, "end", GREY)
        for i, (processor, start, length) in enumerate(deal(lengths, processors)):
            x, top = 130 + scale * start, y + 27 + 22 * processor
            p.box(
                x, top, scale * length - 2, 18, f"{length}", "", BARS[i % len(BARS)], 11, radius=2
            )
        y += 54 + 22 * processors
    return p
