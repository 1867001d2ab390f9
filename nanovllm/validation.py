"""How the front door says no: every message names the parameter, the value and the limit.

A parameter's field says beside its default what it accepts; `check_fields` holds it to that.
"""

from collections.abc import Callable
from dataclasses import field, fields
from typing import Any, get_args


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """Raise unless low <= value <= high; and unless value is an int, if `low` is one."""
    kind = type(low)
    if isinstance(value, bool) or not isinstance(value, (int, kind)):
        raise TypeError(f"{name} must be of type {kind.__name__}, got {value!r}")
    if not low <= value <= high:  # NaN fails here too
        raise ValueError(f"{name} must be between {low:,} and {high:,}, got {value!r}")


def check_type(name: str, value: Any, kind: type) -> None:
    """Raise TypeError unless `value` is a `kind`."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be of type {kind.__name__}, got {value!r}")


def as_list(name: str, value: Any) -> list:
    """A new list of a list's or a tuple's items; None has none. TypeError for anything else."""
    if value is not None and not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list, got {value!r}")
    return list(value or ())


def number(default: float | None, low: float, high: float) -> Any:
    """A field for a number from `low` to `high`; for None as well if its type says so."""
    return _field(default, lambda name, value: check_number(name, value, low, high))


def flag(default: bool) -> Any:
    """A field for True or False."""
    return _field(default, lambda name, value: check_type(name, value, bool))


def only(default: Any) -> Any:
    """A field for a vLLM parameter that is not here: it takes vLLM's default, and no other."""

    def refuse_others(name: str, value: Any) -> None:
        if value != default:
            raise ValueError(f"{name}={value!r} is vLLM's; this engine takes only {default!r}")

    return _field(default, refuse_others, repr=False)


def _field(default: Any, check: Callable[[str, Any], None], repr: bool = True) -> Any:
    return field(default=default, repr=repr, metadata={"check": check})


def check_fields(parameters: Any) -> None:
    """Check every field that says what it accepts. None is where the field's type has it."""
    for f in fields(parameters):
        value = getattr(parameters, f.name)
        if "check" in f.metadata and not (value is None and type(None) in get_args(f.type)):
            f.metadata["check"](f.name, value)
