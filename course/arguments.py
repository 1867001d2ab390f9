"""Commands and types of arguments for argparse, and the command line as a record keeps it."""

import argparse
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def add_command(commands: Any, name: str, module: ModuleType) -> None:
    """Add a command to the subparsers that `commands` is, as its module describes it.

    The module has a docstring, whose first line is the command's help, `add_arguments(parser)`, and
    `main(args) -> int` unless its arguments are commands again.
    """
    command = commands.add_parser(
        name,
        help=(module.__doc__ or "").strip().splitlines()[0],
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # `--batch` would otherwise mean `--batch-sizes` in some commands
    )
    module.add_arguments(command)
    if main := getattr(module, "main", None):
        command.add_argument("--debug", action="store_true", help="show an error's traceback")
        command.set_defaults(main=main)


def several(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A type for argparse: `1,2,3` -> [1, 2, 3], each part made by `kind`."""

    def parse(text: str) -> list[Any]:
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(
                f"must be numbers separated by commas, got {text!r}"
            ) from error

    return parse


def above_zero(text: str) -> float:
    """A finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0 and finite, got {text}")
    return value


def positive(text: str) -> int:
    """An argument that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def local_path(text: str) -> Path:
    """A path whose leading `~` is the user's home. In `--json=~/x` no shell replaces it."""
    return Path(os.path.expanduser(text))


def fraction(text: str) -> float:
    """A number above 0 and at most 1; `1/8` is one."""
    above, _, below = text.partition("/")
    try:
        value = float(above) / float(below or 1)
    except ZeroDivisionError:
        value = math.inf  # which the next line refuses
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return value


def option(text: str) -> tuple[str, Any]:
    """`block_size=32` -> ("block_size", 32); a value that is not JSON is a string."""
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f"NAME=VALUE is wanted, got {text!r}")
    try:
        return name, json.loads(value.lower() if value in ("True", "False") else value)
    except json.JSONDecodeError:
        return name, value


def command_line(arguments: list[str]) -> str:
    """The command as a record keeps it: without --json, and of a path only its last part."""
    kept: list[str] = []
    previous = ""
    for argument in arguments:
        if "--json" not in (argument.partition("=")[0], previous):
            name, equals, value = argument.rpartition("=")
            keep = "/" not in value or value.replace("/", "").isdigit()  # 1/8 is no path
            kept.append(name + equals + (value if keep else Path(value).name))
        previous = argument
    return " ".join(["course", *kept])
