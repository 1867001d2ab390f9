"""Lesson 07's pictures.

report = recorded()         # the shipped run of `course bench step_ladder`, on a GPU
show(*timelines(report))    # a step's kernels, launched one by one and replayed
show(*loops({"plain": begun}, plan=3, run=5))      # host and device on one clock
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from course.show import plots
from course.show.svg import GREY, ORANGE, SKY, Picture
from course.stages.records import SHIPPED

RECORDED = SHIPPED / "h100_step_ladder.json"
GROUPS = ("product", "attention", "RoPE and store", "norm, gate", "sampling", "other")
Report = Mapping[str, Any]


def recorded(file: Path = RECORDED) -> dict[str, Any]:
    """The shipped report of `course bench step_ladder`."""
    return json.loads(file.read_text())


def timelines(report: Report) -> tuple[Any, str]:
    """One decode step of one row, both ways, until the faster has ended; and its words."""
    import matplotlib.pyplot as plt

    microseconds = min(line["span_us"] for line in report["timelines"].values())
    fig, axes = plt.subplots(2, 1, figsize=(plots.WIDTH, 3.6), sharex=True)
    words = []
    for ax, (name, line) in zip(axes, report["timelines"].items(), strict=True):
        begun = [k for k in line["kernels"] if k[1] < microseconds]
        for at, group in enumerate(GROUPS):
            bars = [(start, length) for g, start, length in begun if g == group]
            style = {"facecolor": plots.COLOURS[at], "hatch": plots.HATCHES[at]}
            ax.broken_barh(bars, (0, 1), edgecolor="black", linewidth=0.2, label=group, **style)
        ax.set(yticks=[], xlim=(0, microseconds))
        ax.set_title(f"{name}: {len(begun)} of {len(line['kernels'])} kernels begun")
        words.append(f"{name}: {len(begun)} of {len(line['kernels'])} kernels")
    axes[1].set_xlabel("time since the step's first kernel [µs]")
    axes[1].legend(ncols=6, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.55))
    fig.suptitle(f"One decode step, 1 request, recorded on {report['machine']}", x=0.01, ha="left")
    return fig, f"In the first {microseconds:,.0f} µs of a decode step: {'; '.join(words)}."


def ladder(report: Report) -> tuple[Any, str]:
    """Tokens a second of each variant, at each batch size; and its words."""
    import matplotlib.pyplot as plt

    rows = report["rows"]
    batches = list(rows[0]["tokens_per_second"])
    fig, axes = plt.subplots(1, len(batches), figsize=(plots.WIDTH, 2.9), sharey=True)
    names = [row["name"] for row in rows]
    for i, (ax, batch) in enumerate(zip(axes, batches, strict=True)):
        values = [row["tokens_per_second"][batch] for row in rows]
        middle = [v[0] for v in values]
        spread = [[v[0] - v[1] for v in values], [v[2] - v[0] for v in values]]
        style = {"color": plots.COLOURS[i], "hatch": plots.HATCHES[i], "edgecolor": "white"}
        ax.barh(names, middle, xerr=spread, ecolor="black", capsize=3, **style)
        ax.set(xlabel="output tokens a second", title=f"{batch} request{'s' * (batch != '1')}")
        ax.bar_label(ax.containers[-1], [f" {value:,.0f}" for value in middle], fontsize=9)
        ax.set(xlim=(0, 1.3 * max(middle)), xticks=[0, *ax.get_xticks()[2:-1:2]])
    axes[0].invert_yaxis()
    fig.suptitle(f"{report['model']}, recorded on {report['machine']}", x=0.01, ha="left")
    words = [
        f"{row['name']}: "
        + ", ".join(f"{rate[0]:,.0f} tok/s at {b}" for b, rate in row["tokens_per_second"].items())
        for row in rows
    ]
    return fig, "; ".join(words)


def loops(
    steps: Mapping[str, Sequence[tuple[float, float]]], plan: float, run: float
) -> tuple[str, str]:
    """What host and device do in each loop, on one clock: an SVG's text, and its words.

    steps: each loop's steps, (when the host begins to plan it, when the device begins to run it).
    plan, run: how long each takes, in ms, as is all time here.
    """
    end = max(begun[-1][1] for begun in steps.values()) + run
    scale, left = 560 / end, 100
    p = Picture(700, 40 + 120 * len(steps), "Two loops", "")
    words, y = [], 14
    for name, begun in steps.items():
        done = begun[-1][1] + run
        p.text((20, y), f"{name}: {len(begun)} steps in {done:g} ms", 13, "start", bold=True)
        lanes = {"host": (SKY, plan), "device": (ORANGE, run)}
        for lane, (who, (colour, length)) in enumerate(lanes.items()):
            top = y + 16 + 36 * lane
            p.text((left - 8, top + 14), who, 12, "end")
            for number, times in enumerate(begun, 1):
                x, label = left + scale * times[lane], f"{('plan', 'run')[lane]} {number}"
                p.box(x + 1, top, scale * length - 2, 28, label, "", colour, 12, radius=2)
        gaps = [(0, begun[0][1]), *((a + run, b) for (_, a), (_, b) in itertools.pairwise(begun))]
        for start, stop in gaps:
            if stop > start:
                x, top = left + scale * start, y + 16 + 36
                p.box(x + 1, top, scale * (stop - start) - 2, 28, "waits", "", GREY, 11, True, 2)
        waited = sum(stop - start for start, stop in gaps)
        words.append(
            f"{name}: {len(begun)} steps in {done:g} ms, of which the device waits {waited:g}"
        )
        y += 120
    for tick in range(0, int(end) + 1, 4):
        x = left + scale * tick
        p.line((x, y - 22), (x, y - 16), colour=GREY)
        p.text((x, y - 6), f"{tick}", 11, colour=GREY)
    p.text((left - 8, y - 6), "time [ms]", 11, "end", GREY)
    p.alt = f"Host and device, step by step, with {plan:g} ms to plan and {run:g} to run one. "
    p.alt += f"{'; '.join(words)}."
    return p.svg(), p.alt
