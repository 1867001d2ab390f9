"""Compare kinds of sampling: how much each filter costs over temperature alone.

1, 16, 64 and 256 requests of 64 tokens in and 128 out, the settings in turn. A CPU takes 1 and 8
requests of half these lengths. course/benchmarks/sampling.py says more.
"""

import argparse
import time

from course.arguments import positive, several
from course.benchmarks import sampling
from course.commands.bench import shared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = ",".join(sampling.SETTINGS)
    parser.add_argument("--settings", type=settings, help=f"some of {names}", metavar="NAME,...")
    parser.add_argument(
        "--batch-sizes",
        type=several(positive),
        metavar="N,...",
        help="requests at once (GPU: 1,16,64,256; CPU: 1,8)",
    )
    parser.add_argument("--runs", default=3, help="of each setting (default: 3)", **shared.COUNT)
    shared.add_scale(parser, "both lengths")
    shared.add_engine(parser)
    shared.add_machine(parser)


def settings(text: str) -> list[str]:
    """Names of sampling settings, separated by commas."""
    names = text.split(",")
    if unknown := [name for name in names if name not in sampling.SETTINGS]:
        raise argparse.ArgumentTypeError(
            f"must be some of {','.join(sampling.SETTINGS)}, got {unknown[0]!r}"
        )
    return names


def main(args: argparse.Namespace) -> int:
    start = time.perf_counter()  # before torch is imported
    return shared.run(args, lambda: sampling.measure(args, start), sampling.print_report)
