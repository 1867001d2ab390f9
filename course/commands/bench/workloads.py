"""Run the reference workloads W1, W2, W3 and W5, and count every request's tokens.

W1 throughput: 256 prompts of 100 to 1,024 tokens, as many tokens out. W2 latency: one prompt of
128 tokens, 512 out. W3 shared prefix: 256 prompts of 2,048 common tokens and 128 of their own, 64
out. These three sample at temperature 0.6 alone. W5 is W1 with Qwen3's own sampling: temperature
0.6, top-p 0.95, top-k 20. A CPU takes an eighth of all these numbers. On a GPU each workload's
first run is a warm-up.
"""

import argparse
import time

from course.commands.bench import shared
from course.measure import engine_runs
from course.measure.workloads import WORKLOADS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = " ".join(WORKLOADS)
    parser.add_argument("workloads", nargs="*", type=workload, help=f"{names} (default: all)")
    runs = "of each workload (default: 3)"
    parser.add_argument("--runs", default=3, help=runs, **shared.COUNT)
    shared.add_scale(parser, "all lengths and of the number of requests")
    shared.add_engine(parser)
    shared.add_machine(parser)


def workload(text: str) -> str:
    if text not in WORKLOADS:
        names = ", ".join(WORKLOADS)
        raise argparse.ArgumentTypeError(
            f"must be one of {names}, got {text!r}; another benchmark's name comes right after "
            "`course bench`, and runs alone"
        )
    return text


def main(args: argparse.Namespace) -> int:
    start = time.perf_counter()  # torch is not imported yet: the start of an engine counts that too
    names = list(dict.fromkeys(args.workloads)) or list(WORKLOADS)
    return shared.run(
        args, lambda: engine_runs.measure(args, names, start), engine_runs.print_report
    )
