"""Measure lesson 06's kernels, version by version: how many bytes a second each moves.

course/benchmarks/kernel_ladder.py says what the versions are, and how they are checked.
"""

import argparse

from course.commands.bench import shared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_json(parser)


def main(args: argparse.Namespace) -> int:
    from course.benchmarks import kernel_ladder

    return shared.run(args, kernel_ladder.measure_all, kernel_ladder.print_report)
