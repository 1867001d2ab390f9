"""Measure requests that come and go: TTFT, TPOT and goodput at several rates.

Poisson arrivals, prompts of 8 to 3,000 tokens, 1 to 800 out, sampled as in W5. A CPU takes an
eighth of the lengths. course/benchmarks/serving.py says more.
"""

import argparse
import time

from course.arguments import above_zero, several
from course.benchmarks import serving
from course.commands.bench import shared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rates",
        type=several(above_zero),
        metavar="R,...",
        help="requests a second (default: 0.25, 0.5, 0.75, 0.9 and 1.1 of the capacity)",
    )
    parser.add_argument(
        "--seconds",
        type=above_zero,
        help="for which requests arrive at each rate (GPU: 15, CPU: 6)",
    )
    parser.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        type=serving.service_level,
        metavar="METRIC:MS",
        help="what a request must meet (GPU: ttft:200 tpot:20, CPU: ttft:1000 tpot:100)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of arrivals and lengths (default: 0)")
    shared.add_scale(parser, "all lengths")
    shared.add_engine(parser)
    shared.add_machine(parser)


def main(args: argparse.Namespace) -> int:
    start = time.perf_counter()  # before torch is imported
    return shared.run(args, lambda: serving.measure(args, start), serving.print_report)
