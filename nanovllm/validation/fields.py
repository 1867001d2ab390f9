"""Dataclass fields that say which values they accept, next to their default.

    max_tokens: int | None = number_field(16, 1, 2**31 - 1)

`check_fields` compares every field of an object with what the field accepts.
"""

from collections.abc import Callable
from dataclasses import field, fields
from functools import partial
from typing import Any, get_args

from nanovllm.validation.checks import check_number, check_type
from nanovllm.validation.unsupported import check_accepted


def number_field(
    default: float | None, low: float, high: float, none_is_default: bool = False
) -> Any:
    """Return a field for a number from `low` to `high`, and for None if the field's type has it."""
    check = partial(check_number, low=low, high=high)
    return _checked_field(default, check, none_is_default=none_is_default)


def bool_field(default: bool | None, none_is_default: bool = False) -> Any:
    """Return a field for True or False."""
    check = partial(check_type, kind=bool)
    return _checked_field(default, check, none_is_default=none_is_default)


def unsupported(default: Any) -> Any:
    """Return a field for a parameter of vLLM that this engine lacks, with vLLM's default.

    The field accepts no other value, because the engine would have to ignore it.
    """
    check = partial(check_accepted, accepted=(default,))
    return _checked_field(default, check, repr=False)


def _checked_field(
    default: Any, check: Callable, repr: bool = True, none_is_default: bool = False
) -> Any:
    metadata = {"check": check, "none_is_default": none_is_default}
    return field(default=default, repr=repr, metadata=metadata)


def check_fields(parameters: Any) -> None:
    """Check every field of a dataclass object that says what it accepts.

    None is accepted if the field's type has it. In a field with `none_is_default`, which follows
    vLLM, None becomes the field's default.
    """
    for f in fields(parameters):
        if f.metadata.get("none_is_default") and getattr(parameters, f.name) is None:
            setattr(parameters, f.name, f.default)
        value = getattr(parameters, f.name)
        if "check" in f.metadata and not (value is None and type(None) in get_args(f.type)):
            f.metadata["check"](f.name, value)
