"""Measure how long an all-reduce takes, by size, through the engine's own ranks.

course/benchmarks/all_reduce.py says what is timed, and what the bus bandwidth is.
"""

import argparse
import os

from course.benchmarks import all_reduce
from course.commands.bench import shared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", default=2, help="processes (default: 2)", **shared.COUNT)
    largest = "stop at this size (default: 64 MiB on GPUs, 16 MiB on CPUs)"
    parser.add_argument("--largest", type=shared.COUNT["type"], metavar="BYTES", help=largest)
    shared.add_json(parser)


def main(args: argparse.Namespace) -> int:
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink multicast can hang a shared host
    measure = all_reduce.measure
    return shared.run(args, lambda: measure(args.ranks, args.largest), all_reduce.print_report)
