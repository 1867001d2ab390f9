"""Measure decode attention alone: its share of the read bandwidth.

course/benchmarks/attention.py says what is measured, and how.
"""

import argparse

from course.benchmarks import attention
from course.commands.bench import shared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_dtype(parser)
    shared.add_backend(parser)
    shared.add_scale(parser, "the requests and of all lengths")
    shared.add_machine(parser)


def main(args: argparse.Namespace) -> int:
    return shared.run(args, lambda: attention.measure(args), attention.print_report)
