"""Arguments that several benchmarks take, and what every benchmark does with its report."""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from course.arguments import command_line, fraction, local_path, option, positive

COUNT: dict[str, Any] = {"type": positive, "metavar": "N"}
Report = dict[str, Any]


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", type=local_path, metavar="FILE", help="write the numbers here as well"
    )


def add_machine(parser: argparse.ArgumentParser) -> None:
    """What it runs on: --threads. Where its numbers go: --json."""
    parser.add_argument("--threads", help="torch's CPU threads (default: torch's own)", **COUNT)
    add_json(parser)


def add_model(parser: argparse.ArgumentParser) -> None:
    words = "folder or Hugging Face id (default: a random model of Qwen3-0.6B's shape on a GPU, "
    parser.add_argument("--model", help=words + "that of `course run` on a CPU)")


def add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", default="auto", help="auto (by the device), float32, ...")


def add_scale(parser: argparse.ArgumentParser, of: str) -> None:
    parser.add_argument("--scale", type=fraction, help=f"of {of} (GPU: 1)")


def add_max_num_seqs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-num-seqs", help="requests running at once", **COUNT)


def add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--attention-backend", default="auto", metavar="NAME")


def add_engine(parser: argparse.ArgumentParser) -> None:
    """The engine's own arguments, in the benchmarks that start one as they are told."""
    add_model(parser)
    add_dtype(parser)
    add_max_num_seqs(parser)
    add_backend(parser)
    parser.add_argument("--enforce-eager", action="store_true", help="compile, capture nothing")
    parser.add_argument(
        "--engine",
        action="append",
        default=[],
        type=option,
        metavar="NAME=VALUE",
        help="any argument of LLM, as vLLM names it: --engine block_size=32",
    )


def run(
    args: argparse.Namespace,
    measure: Callable[[], Report],
    print_report: Callable[[Report], None] | None = None,
) -> int:
    """Measure, print the report and write it into --json, with the command that made it.

    The file's folder is made first, so that one that cannot be written is found at once.
    """
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    if getattr(args, "threads", None):
        import torch

        torch.set_num_threads(args.threads)
    report = measure()
    if print_report:
        print_report(report)
    if args.json:
        record = {"command": command_line(sys.argv[1:]), **report}
        args.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0
