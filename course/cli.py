"""The course's command line: `course run`, `course bench` and others; --help shows them all.

Each command is a module with a line of help (the first of its docstring), `add_arguments(parser)`
and `main(args) -> int`. To add one, write the module and name it in COMMANDS. Modules are imported
here, so they leave slow imports (torch, transformers) to their functions.
"""

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType

from course import bench, doctor, ladder, minutes, progress, reset, reveal, run
from course.notebooks import build

COMMANDS: dict[str, ModuleType] = {
    "run": run,
    "bench": bench,
    "doctor": doctor,
    "ladder": ladder,
    "progress": progress,
    "reset": reset,
    "reveal": reveal,
    "build": build,
    "minutes": minutes,
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="course", description="Rebuild nano-vLLM, step by step.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").strip().splitlines()[0]
        command = commands.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--debug", action="store_true", help="show an error's traceback")
        module.add_arguments(command)
        command.set_defaults(main=module.main)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. What a user can put right is said in one line."""
    args = build_parser().parse_args(arguments)
    try:
        return int(args.main(args))
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        if args.debug:
            raise
        print(f"course {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
