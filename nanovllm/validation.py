"""How the front door says no: every message names the parameter, the value and the limit."""

from dataclasses import field, fields
from typing import Any


def check_number(name: str, value: Any, low: float, high: float, kind: type = int) -> None:
    """Raise unless `value` is an int (or, for kind=float, a number) and low <= value <= high."""
    accepted = int if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise TypeError(f"{name} must be of type {kind.__name__}, got {value!r}")
    if not low <= value <= high:  # NaN fails here too
        raise ValueError(f"{name} must be between {low:,} and {high:,}, got {value!r}")


def check_type(name: str, value: Any, kind: type) -> None:
    """Raise TypeError unless `value` is a `kind`."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be of type {kind.__name__}, got {value!r}")


def check_choice(name: str, value: Any, choices: tuple) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def only(value: Any) -> Any:
    """A dataclass field for a vLLM parameter that is not here: it takes `value`, and no other."""
    return field(default=value, repr=False, metadata={"only": True})


def refuse_what_is_not_here(parameters: Any) -> None:
    """Raise ValueError if a field made by `only` was given another value."""
    for f in fields(parameters):
        value = getattr(parameters, f.name)
        if f.metadata.get("only") and value != f.default:
            raise ValueError(
                f"{f.name}={value!r} is a parameter of vLLM's {type(parameters).__name__} that "
                f"this engine does not have; only {f.name}={f.default!r} is accepted"
            )
