"""Run the reference workloads on 1, 2, ... ranks: tokens a second, memory, all-reduce's share.

course/benchmarks/ranks.py says what is checked first, and how the share is computed.
"""

import argparse
import os

from course.arguments import positive, several
from course.benchmarks import ranks
from course.commands.bench import shared
from course.models.random_model import SHAPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", default=[1, 2], type=several(positive), metavar="1,2")
    parser.add_argument("--shape", default="qwen3-0.6b", choices=[*SHAPES, ranks.OWN])
    parser.add_argument("--workloads", default="W1,W2", type=lambda text: text.split(","))
    parser.add_argument("--runs", default=3, help="counted, of each workload", **shared.COUNT)
    shared.add_scale(parser, "requests and lengths")
    shared.add_json(parser)


def main(args: argparse.Namespace) -> int:
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink multicast can hang a shared host
    return shared.run(args, lambda: ranks.compare(args))
