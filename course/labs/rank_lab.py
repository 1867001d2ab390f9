"""For the lesson on ranks: ranks as threads of one process, recorded measurements, and a drawing.

on_ranks(2, lambda ranks: ranks.all_reduce(x[ranks.rank]))      # each rank's result
all_reduce_curves(reports, machine)                             # time against size
engines_in_words(recorded("ranks")[0])                          # what real GPUs did
"""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from course.show import plots
from course.stages.records import SHIPPED

# torch records collectives for all groups of a process in one place, which in 2.11 two threads
# corrupt: crashes, and waits without end. So nothing is recorded where ranks are threads.
os.environ["TORCH_FR_BUFFER_SIZE"] = "0"  # read when the first group of the process computes


class Meeting:
    """Where ranks that are threads meet before each collective.

    A collective that a rank never enters makes the others wait without end. Here we need no clock
    to see that: a rank that has ended enters nothing any more, and the others are told so.
    """

    def __init__(self, size: int):
        self.entered: list[list[str]] = [[] for _ in range(size)]  # names of collectives, by rank
        self.ended: set[int] = set()
        self.changed = threading.Condition()

    def enter(self, rank: int, name: str) -> None:
        """Wait for all ranks to enter; RuntimeError if one never will, or enters another one."""
        with self.changed:
            self.entered[rank].append(name)
            self.changed.notify_all()
            at = len(self.entered[rank]) - 1

            def missing() -> list[int]:
                return [other for other, names in enumerate(self.entered) if len(names) <= at]

            self.changed.wait_for(lambda: not missing() or self.ended & {*missing()})
            if missing():
                raise RuntimeError(f"rank {rank} waits in {name}, which {missing()} never enters")
            if len({names[at] for names in self.entered}) > 1:
                raise RuntimeError(f"ranks enter {[names[at] for names in self.entered]} at once")

    def end(self, rank: int) -> None:
        with self.changed:
            self.ended.add(rank)
            self.changed.notify_all()


def on_ranks(size: int, function: Callable[[Any], Any]) -> list[Any]:
    """function(ranks) on every rank of a gloo group, each a thread; the results by rank.

    Threads can run a function that was defined in a notebook's cell, and processes cannot. A rank
    that enters a collective which another rank never enters gets a RuntimeError.
    """
    import torch
    import torch.distributed as dist

    from nanovllm.distributed.ranks import Ranks

    class MeetingRanks(Ranks):
        def all_reduce(self, x: Any) -> Any:
            meeting.enter(self.rank, "all_reduce")
            return super().all_reduce(x)

        def all_gather(self, x: Any) -> Any:
            meeting.enter(self.rank, "all_gather")
            return super().all_gather(x)

        def broadcast(self, message: Any) -> Any:
            meeting.enter(self.rank, "broadcast")
            return super().broadcast(message)

    store, results, failures = dist.HashStore(), [None] * size, []
    meeting = Meeting(size)

    def run(rank: int) -> None:
        try:
            ranks = MeetingRanks(rank, size, store)
            ranks.init_process_group(torch.device("cpu"))
            with torch.inference_mode():
                results[rank] = function(ranks)
        except BaseException as error:
            failures.append(error)
        finally:
            meeting.end(rank)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results


def recorded(command: str, folder: Path = SHIPPED) -> list[dict[str, Any]]:
    """Shipped reports of `python -m course.benchmarks.<command>`: "all_reduce" or "ranks"."""
    reports = (json.loads(file.read_text()) for file in sorted(folder.glob("*.json")))
    called = f"course.benchmarks.{command} "
    return [r for r in reports if isinstance(r, dict) and called in r.get("command", "")]


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
