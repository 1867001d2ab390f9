"""Lesson 07's pictures, and what it watches an engine do.

report = recorded()                          # the shipped H200 run of course.benchmarks.step_ladder
show(*timelines(report, microseconds=740))   # a step's kernels, launched one by one and replayed
with watching(engine) as log: ...            # "plan 1", "launch 1", "read 1", in order
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from course import plots
from course.records import SHIPPED

RECORDED = SHIPPED / "h200_step_ladder.json"
GROUPS = ("product", "attention", "RoPE and store", "norm, gate", "sampling", "other")
Report = Mapping[str, Any]


def recorded(file: Path = RECORDED) -> dict[str, Any]:
    """The shipped report of `course.benchmarks.step_ladder`."""
    return json.loads(file.read_text())


def timelines(report: Report, microseconds: float) -> tuple[Any, str]:
    """The first part of one decode step of one row, both ways, kernel by kernel; and its words."""
    import matplotlib.pyplot as plt

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


@contextmanager
def watching(engine: Any) -> Iterator[list[str]]:
    """The order in which an engine's loop plans, launches and reads its steps."""
    core, log, counts = engine.core, [], {"plan": 0, "launch": 0, "read": 0}

    def noted(what: str, function: Any) -> Any:
        def run(*args: Any) -> Any:
            counts[what] += 1
            log.append(f"{what} {counts[what]}")
            return function(*args)

        return run

    def launch(batch: Any) -> Any:
        tokens = noted("launch", runner_launch)(batch)
        tokens.read = noted("read", tokens.read)
        return tokens

    runner_launch = core.runner.launch
    with (
        patch.object(core.scheduler, "schedule", noted("plan", core.scheduler.schedule)),
        patch.object(core.runner, "launch", launch),
    ):
        yield log


@contextmanager
def uploads() -> Iterator[list[int]]:
    """The bytes of every piece that the host sends to the device."""
    from nanovllm.engine import model_runner, persistent_batch

    sent: list[int] = []

    def upload(values: Any, device: Any) -> Any:
        tensor = original(values, device)
        sent.append(tensor.numel() * tensor.element_size())
        return tensor

    original = persistent_batch.upload
    with (
        patch.object(persistent_batch, "upload", upload),
        patch.object(model_runner, "upload", upload),
    ):
        yield sent


def padding(sizes: Sequence[int], batch: int) -> int | None:
    """Rows that a batch is padded with: up to the smallest size that holds it; None: none does."""
    fitting = [size for size in sizes if size >= batch]
    return min(fitting) - batch if fitting else None
