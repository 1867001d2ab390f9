"""Lesson 09's pictures and tables: stages against their floor, engines beside each other.

floor = floor_seconds(stage, job, peaks)     # what the job needs at least on this machine
show(*against_the_floor(results, floor))
show(*beside(PEERS, ours))
"""

from collections.abc import Mapping, Sequence
from typing import Any

from course import plots
from course.benchmarks.roofline import Peaks, count_work

# Output tok/s on one H200 with Qwen3-0.6B's shape in bfloat16, lowest and highest, both with
# FlashAttention-3 and warmed up; measured before the course was written.
PEERS = {
    "nano-vLLM": {"W1": (15_900, 18_200), "W2": (430, 452), "W3": (10_800, 11_300)},
    "vLLM 0.24": {"W1": (22_700, 23_200), "W2": (543, 557), "W3": (14_200, 14_800)},
}


def floor_seconds(stage: Any, job: Any, peaks: Peaks) -> float:
    """The roofline of the steps that an engine stage took in its last run of `job`.

    stage: one that has run, such as ContinuousBatching. A shared prefix is read once a step.
    """
    first = min(int(name) for step in stage.trace for name, _, _ in step.rows)
    prompts = {str(first + i): len(prompt) for i, prompt in enumerate(job.prompts)}
    works = count_work(stage.config, stage.trace, prompts, job.shared_prefix)
    return peaks.seconds(works, shared=True)


def against_the_floor(results: Sequence[Any], floor: float) -> tuple[Any, str]:
    """Seconds of each stage for one job, the floor as a line; and its words."""
    names = [f"{result.number:02} {result.name}" for result in results]
    seconds = [result.seconds for result in results]
    fig, ax = plots.figure("Seconds for one job, and its floor", results[0].machine, height=3.4)
    ax.barh(names, seconds, color=plots.SKY, edgecolor="black", hatch="//", linewidth=0.5)
    ax.axvline(floor, color=plots.VERMILLION, linestyle="--", label=f"floor: {floor:.2g} s")
    ax.bar_label(ax.containers[0], [f" {s:.2f} s, {floor / s:.0%}" for s in seconds], fontsize=9)
    ax.set(xlabel="time [s]", xlim=(0, 1.25 * max(seconds)))
    ax.invert_yaxis()
    ax.legend(loc="lower right")
    words = "; ".join(f"{n}: {s:.2f} s" for n, s in zip(names, seconds, strict=True))
    return fig, f"{words}; the floor is {floor:.2g} s."


def recorded_runs(report: Mapping[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Of a `course bench` record: each workload's tok/s; slowest, median and fastest run."""
    return {
        name: (
            workload["slowest_tokens_per_second"],
            workload["median"]["output_tokens_per_second"],
            workload["fastest_tokens_per_second"],
        )
        for name, workload in report["workloads"].items()
    }


def beside(ours: Mapping[str, Sequence[float]], machine: str) -> tuple[Any, str]:
    """Three engines on three workloads: lowest to highest, and our median; and its words."""
    fig, axes = plots.figure("Output tokens a second, recorded", machine, columns=3, height=2.6)
    engines = [*PEERS, "this engine"]
    words = []
    for ax, (workload, (low, middle, high)) in zip(axes, ours.items(), strict=True):
        ranges = [PEERS[name][workload] for name in PEERS] + [(low, high)]
        centres = [sum(pair) / 2 for pair in ranges[:-1]] + [middle]
        errors = [
            [c - pair[0] for c, pair in zip(centres, ranges, strict=True)],
            [pair[1] - c for c, pair in zip(centres, ranges, strict=True)],
        ]
        colours = [plots.ORANGE, plots.GREEN, plots.BLUE]
        bars = ax.barh(engines, centres, xerr=errors, capsize=3, color=colours)
        for bar, hatch in zip(bars, plots.HATCHES[:3], strict=True):
            bar.set(hatch=hatch, edgecolor="white")
        ax.bar_label(bars, [f" {c:,.0f}" for c in centres], fontsize=9)
        ax.set(title=workload, xlim=(0, 1.45 * max(centres)), xticks=[])
        ax.invert_yaxis()
        if ax is not axes[0]:
            ax.set_yticklabels([])
        words.append(f"{workload}: " + ", ".join(map("{} {:,.0f}".format, engines, centres)))
    return fig, "Output tokens a second. " + "; ".join(words) + "."
