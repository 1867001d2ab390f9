"""For the lesson on ranks: recorded measurements, in words and as drawings.

all_reduce_curves(reports, machine)                             # time against size
engines_in_words(recorded("ranks")[0])                          # what real GPUs did
"""

import json
from pathlib import Path
from typing import Any

from course.show import plots
from course.stages.records import SHIPPED


def recorded(command: str, folder: Path = SHIPPED) -> list[dict[str, Any]]:
    """Shipped reports of `course bench <command>`: "all_reduce" or "ranks"."""
    reports = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    named = [report for report in reports if isinstance(report, dict)]
    called = ["course", "bench", command]
    return [report for report in named if report.get("command", "").split()[:3] == called]


def engines_in_words(report: dict[str, Any]) -> str:
    """A report of "ranks": of each number of ranks its weights, its tok/s, all-reduce's share."""
    lines = [f"{report['shape']} on {report['machine']}"]
    for row in report["engines"]:
        gigabytes = row["memory"]["weight_bytes"] / 1e9
        speeds = [f"{k} {v['tokens_per_second']:,.0f} tok/s" for k, v in row["workloads"].items()]
        steps = [step for step in row["decode_step"] if "share" in step]
        shares = " and ".join(f"{step['share']:.0%} at batch {step['rows']}" for step in steps)
        ranks = "1 rank" if row["ranks"] == 1 else f"{row['ranks']} ranks"
        words = f"  {ranks}: {gigabytes:.1f} GB of weights each; {', '.join(speeds)}"
        lines += [words, f"     all-reduce takes {shares}"] if shares else [words]
    return "\n".join(lines)


def name_of(report: dict[str, Any]) -> str:
    return f"{report['ranks']} ranks, {report['backend']}, {report['machine']}"


def all_reduce_curves(reports: list[dict[str, Any]], machine: str) -> Any:
    """Seconds of an all-reduce against its bytes, both logarithmic; bars: fastest and slowest."""
    fig, axes = plots.figure("One all-reduce", machine)
    for i, report in enumerate(reports):
        rows = report["rows"]
        middle = [1e6 * row["seconds"] for row in rows]
        low = [m - 1e6 * row["fastest"] for m, row in zip(middle, rows, strict=True)]
        high = [1e6 * row["slowest"] - m for m, row in zip(middle, rows, strict=True)]
        sizes = [row["bytes"] / 1024 for row in rows]
        style = {"color": plots.COLOURS[i % 7], "marker": plots.MARKERS[i % 7]}
        axes.errorbar(sizes, middle, [low, high], label=name_of(report), capsize=2, **style)
    axes.set(xscale="log", yscale="log", xlabel="size [KiB]", ylabel="time [µs]")
    axes.legend(fontsize=8.5)
    return fig


def curves_in_words(reports: list[dict[str, Any]]) -> str:
    """The figure's alternative text: ends of each curve."""
    words = [
        f"{name_of(r)}: {1e6 * r['rows'][0]['seconds']:.0f} µs for "
        f"{r['rows'][0]['bytes'] // 1024} KiB, {1e6 * r['rows'][-1]['seconds']:,.0f} µs for "
        f"{r['rows'][-1]['bytes'] // 1024:,} KiB"
        for r in reports
    ]
    return "All-reduce time is flat for small sizes, then grows with size. " + "; ".join(words)


def rank_gains(reports: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Reports of `ranks` -> for each model's shape and workload: ranks -> tok/s over one rank's."""
    gains: dict[str, dict[int, float]] = {}
    for report in reports:
        for row in report["engines"]:
            for workload, numbers in row["workloads"].items():
                alone = report["engines"][0]["workloads"][workload]["tokens_per_second"]
                curve = gains.setdefault(f"{report['shape']}, {workload}", {})
                curve[row["ranks"]] = numbers["tokens_per_second"] / alone
    return gains


def rank_curves(reports: list[dict[str, Any]]) -> Any:
    """What ranks gain, a line for each shape and workload, beside what they would gain for free."""
    fig, axes = plots.figure("What ranks gain", reports[0]["machine"])
    gains = rank_gains(reports)
    sizes = sorted({n for curve in gains.values() for n in curve})
    axes.plot(sizes, sizes, ":", color="black", label="in proportion")
    for i, (name, curve) in enumerate(gains.items()):
        style = {"color": plots.COLOURS[i % 7], "marker": plots.MARKERS[i % 7]}
        axes.plot(list(curve), list(curve.values()), label=name, **style)
    axes.set(
        xlabel="ranks, a GPU each", ylabel="times one rank's tok/s", xticks=sizes, ylim=(0, None)
    )
    axes.legend(fontsize=8.5)
    return fig


def gains_in_words(reports: list[dict[str, Any]]) -> str:
    """The figure's alternative text: the end of each curve."""
    ends = [
        f"{name} {curve[max(curve)]:.2f} times on {max(curve)} ranks"
        for name, curve in rank_gains(reports).items()
    ]
    return "What ranks gain over one rank: " + "; ".join(ends) + "."
