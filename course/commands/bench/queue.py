"""Measure the host's work for a step and an add, with up to 100,000 requests queued."""

import argparse

from course.benchmarks import queue
from course.commands.bench import shared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="folder (default: the course's own small model)")
    shared.add_machine(parser)


def main(args: argparse.Namespace) -> int:
    return shared.run(args, lambda: queue.measure(args), queue.print_report)
