"""How fast is the engine on this machine, and how near to what the machine can do?

course bench                    the reference workloads W1, W2, W3 and W5 (name some to run those)
course bench sampling           how much each kind of sampling costs over temperature alone
course bench serving            requests that come and go: TTFT, TPOT and goodput at several rates
course bench attention          decode attention alone: its share of the read bandwidth
course bench queue              the host's work for a step and an add, with up to 100,000 queued
course bench transformers       this engine beside transformers' generate, turn by turn
course bench ranks              the reference workloads on 1, 2, ... ranks
course bench all_reduce         one all-reduce, by size
course bench kernel_ladder      lesson 06's kernels, version by version
course bench step_ladder        lesson 07's steps: launched, captured, overlapped, compiled

Each benchmark has arguments of its own, which `course bench NAME --help` shows. A command that
names no benchmark runs `workloads`, so `course bench W1 --runs 5` is `course bench workloads W1
--runs 5`.
"""

import argparse
from types import ModuleType

from course.arguments import add_command
from course.commands.bench import (
    all_reduce,
    attention,
    kernel_ladder,
    queue,
    ranks,
    sampling,
    serving,
    step_ladder,
    transformers,
    workloads,
)

BENCHMARKS: dict[str, ModuleType] = {
    "workloads": workloads,
    "sampling": sampling,
    "serving": serving,
    "attention": attention,
    "queue": queue,
    "transformers": transformers,
    "ranks": ranks,
    "all_reduce": all_reduce,
    "kernel_ladder": kernel_ladder,
    "step_ladder": step_ladder,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="benchmark")
    for name, module in BENCHMARKS.items():
        add_command(benchmarks, name, module)


def with_benchmark(arguments: list[str]) -> list[str]:
    """A command line in which `bench` names its benchmark: workloads, if it named none."""
    command, first = arguments[:1], arguments[1:2]
    if command != ["bench"] or first in ([name] for name in (*BENCHMARKS, "-h", "--help")):
        return arguments
    return ["bench", "workloads", *arguments[1:]]
