"""The course's command line: `course run`, `course bench` and others; --help shows them all.

Each command is a module of commands/ with a line of help (the first of its docstring),
`add_arguments(parser)` and `main(args) -> int`. To add one, write the module and name it in
COMMANDS. A command of commands, as `bench` is, adds its own in `add_arguments` and has no `main`.
Modules are imported here, so they leave slow imports (torch, transformers) to their functions.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from course.arguments import add_command
from course.clone import need_clone
from course.commands import bench, doctor, ladder, progress, reset, reveal, run

COMMANDS: dict[str, ModuleType] = {
    "run": run,
    "bench": bench,
    "doctor": doctor,
    "ladder": ladder,
    "progress": progress,
    "reset": reset,
    "reveal": reveal,
}
ANYWHERE = {"run", "bench", "doctor"}  # the other commands read and write files of a clone
READER_LEFT = 128 + 13  # the status that a shell gives a program which SIGPIPE, signal 13, ended


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="course", description="Rebuild nano-vLLM, step by step.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, module in COMMANDS.items():
        add_command(commands, name, module)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    An error that the user can correct is reported in one line. When the reader of a pipe leaves
    early, as in `course doctor | head -1`, the command ends silently, as other programs do.
    """
    try:
        try:
            given = bench.with_benchmark(list(sys.argv[1:] if arguments is None else arguments))
            return run_command(build_parser().parse_args(given))
        finally:
            sys.stdout.flush()  # now, because an error while Python exits can no longer be caught
    except BrokenPipeError:
        drop_output()
        return READER_LEFT


def run_command(args: argparse.Namespace) -> int:
    try:
        if args.command not in ANYWHERE:
            need_clone()
        return int(args.main(args))
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        if args.debug or isinstance(error, BrokenPipeError):
            raise
        print(f"course {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def drop_output() -> None:
    """Send what is still buffered to nowhere, because Python flushes it once more as it exits."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
