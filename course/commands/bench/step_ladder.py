"""Measure what graphs, the overlapped loop and torch.compile buy, at batch 1 and 256.

course/benchmarks/step_ladder.py says what the steps of lesson 07's ladder are.
"""

import argparse

from course.commands.bench import shared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a folder (default: as lessons measure)")
    parser.add_argument("--batches", default=[1, 256], nargs="+", **shared.COUNT)
    parser.add_argument("--tokens", default=128, help="of each request", **shared.COUNT)
    parser.add_argument("--runs", default=3, **shared.COUNT)
    shared.add_json(parser)


def main(args: argparse.Namespace) -> int:
    from course.benchmarks import step_ladder

    return shared.run(args, lambda: step_ladder.ladder(args))
