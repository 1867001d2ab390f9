"""Command-line options for the arguments of an engine, under vLLM's names.

Every field of `EngineArgs` has an option, whose help is the comment beside the field. The arguments
of vLLM that are no fields have one as well, which `--help` does not list, so that a value that
cannot be honoured is refused by name.
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

LENGTHS = ("max_model_len", "max_num_batched_tokens")  # options that take 4k as well
FIELD = re.compile(r"^    (\w+): .*?  # (.*)$", re.MULTILINE)


class FlexibleArgumentParser(argparse.ArgumentParser):
    """An ArgumentParser that takes `--max_model_len` for `--max-model-len`, as vLLM's does."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([with_dashes(word) for word in words], namespace)


def with_dashes(word: str) -> str:
    """A command line's word, with dashes for the underscores of an option's name."""
    name, equals, value = word.partition("=")
    return (name.replace("_", "-") if name.startswith("--") else name) + equals + value


def add_options(parser: Any, arguments: Any) -> None:
    """Add an option for each field of the dataclass `arguments`, and for what it also takes.

    parser: an ArgumentParser, or a group of its options.
    """
    group = parser
    if isinstance(parser, argparse.ArgumentParser):
        group = parser.add_argument_group(arguments.__name__)
    comments = dict(FIELD.findall(inspect.getsource(arguments)))
    for f in fields(arguments):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        text = f"{comments.get(f.name, 'only the default is taken')} (default: {default})"
        group.add_argument(option(f.name), default=default, help=text.replace("%", "%%"), **kind(f))
    for name, accepted in arguments.also_takes.items():
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        if isinstance(accepted[0], bool):
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = partial(value_of, accepted=accepted)
        group.add_argument(option(name), **options)


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def kind(f: Field) -> dict[str, Any]:
    """How argparse reads the value of a field: `--x` and `--no-x`, JSON, a number or text."""
    types = [t for t in get_args(f.type) or (f.type,) if t is not type(None)]
    if types[0] is bool:
        return {"action": argparse.BooleanOptionalAction}
    if f.default_factory is not MISSING:
        return {"type": json.loads}
    read: Callable = length if f.name in LENGTHS else types[0]
    return {"type": read}


def length(text: str) -> Any:
    """A number of tokens: 4096, 4k (4,000), 4K (4,096), or auto."""
    if text == "auto":
        return text
    units = {"k": 10**3, "K": 2**10, "m": 10**6, "M": 2**20}
    return int(float(text[:-1]) * units[text[-1]]) if text[-1:] in units else int(text)


def value_of(text: str, accepted: tuple) -> Any:
    """The accepted value that a command line writes in this way; else the text, to be refused."""
    spelt = {json.dumps(one) if isinstance(one, (dict, list)) else str(one): one for one in accepted
             if not isinstance(one, set)}  # fmt: skip
    return spelt.get(text, text)
