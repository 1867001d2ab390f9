"""Answer the same prompts with this engine and with transformers' generate, turn by turn.

course/benchmarks/against_transformers.py says what is compared.
"""

import argparse

from course.benchmarks import against_transformers
from course.commands.bench import shared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    count = shared.COUNT
    parser.add_argument("--model", help="folder or Hugging Face id (default: as `course run`)")
    shared.add_dtype(parser)
    parser.add_argument("--requests", default=32, help="prompts to answer (default: 32)", **count)
    parser.add_argument("--batch", default=8, help="transformers' batch (default: 8)", **count)
    parser.add_argument("--runs", default=3, help="rounds of both (default: 3)", **count)
    shared.add_max_num_seqs(parser)
    shared.add_machine(parser)


def main(args: argparse.Namespace) -> int:
    report = against_transformers.print_report
    return shared.run(args, lambda: against_transformers.compare(args), report)
