"""Command-line options for the arguments of an engine, under vLLM's names.

Every field of `EngineArgs` has an option, whose description is the comment above the field. vLLM's
arguments without a field have an option as well, so that an unsupported value gives an error that
names it. `--help` does not list these options.
"""

import argparse
import inspect
import json
import re
import sys
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from functools import partial
from typing import Any, get_args

LENGTHS = ("max_model_len", "max_num_batched_tokens")  # options that also accept 4k, for example
FIELD = re.compile(r"((?:^    # .*\n)+)^    (\w+): ", re.MULTILINE)  # a comment and its field


class FlexibleArgumentParser(argparse.ArgumentParser):
    """An ArgumentParser that also accepts `--max_model_len` for `--max-model-len`, as in vLLM."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([with_dashes(word) for word in words], namespace)


def with_dashes(word: str) -> str:
    """Return a word of a command line, with dashes in place of an option name's underscores."""
    name, equals, value = word.partition("=")
    return (name.replace("_", "-") if name.startswith("--") else name) + equals + value


def add_options(parser: Any, arguments: Any) -> None:
    """Add an option for each field and each unsupported parameter of the dataclass `arguments`.

    parser: an ArgumentParser, or a group of its options.
    """
    group = parser
    if isinstance(parser, argparse.ArgumentParser):
        group = parser.add_argument_group(arguments.__name__)
    comments = comments_of(arguments)
    for f in fields(arguments):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        text = (
            f"{comments.get(f.name, 'The engine accepts only the default.')} (default: {default})"
        )
        group.add_argument(option(f.name), default=default, help=text.replace("%", "%%"), **kind(f))
    for name, accepted in arguments.unsupported_parameters.items():
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        if isinstance(accepted[0], bool):
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = partial(value_of, accepted=accepted)
        group.add_argument(option(name), **options)


def comments_of(arguments: Any) -> dict[str, str]:
    """Return the comment above each field of a dataclass, as one line of text, by field."""
    found = FIELD.findall(inspect.getsource(arguments))
    return {name: " ".join(re.findall(r"# (.*)", comment)) for comment, name in found}


def option(name: str) -> str:
    """Return the option for a field, which has dashes in place of underscores."""
    return "--" + name.replace("_", "-")


def kind(f: Field) -> dict[str, Any]:
    """Return how argparse reads a field's value: as `--x` and `--no-x`, JSON, a number or text."""
    types = [t for t in get_args(f.type) or (f.type,) if t is not type(None)]
    if types[0] is bool:
        return {"action": argparse.BooleanOptionalAction}
    if f.default_factory is not MISSING:
        return {"type": json.loads}
    read: Callable = length if f.name in LENGTHS else types[0]
    return {"type": read}


def length(text: str) -> Any:
    """Read a number of tokens: 4096, 4k (4,000), 4K (4,096), or auto."""
    if text == "auto":
        return text
    units = {"k": 10**3, "K": 2**10, "m": 10**6, "M": 2**20}
    return int(float(text[:-1]) * units[text[-1]]) if text[-1:] in units else int(text)


def value_of(text: str, accepted: tuple) -> Any:
    """Return the accepted value that `text` spells, and else the text, which is then refused."""
    spelt = {json.dumps(one) if isinstance(one, (dict, list)) else str(one): one for one in accepted
             if not isinstance(one, set)}  # fmt: skip
    return spelt.get(text, text)
