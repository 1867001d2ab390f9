"""How the front door says no: every message names the parameter, the value and the limit.

A parameter's field says beside its default what it accepts; `check_fields` holds it to that.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


def check_unicode(name: str, value: Any) -> None:
    """Raise ValueError for half a surrogate pair in a text, or in any text inside a dict or list.

    JSON can spell such a half ("\\ud800"). It stands for no character, so no tokenizer encodes it.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            check_unicode(f"a key of {name}", key)
            check_unicode(f"{name}[{key!r:.80}]", inner)
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            check_unicode(f"{name}[{index}]", inner)
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = value[error.start]
            raise ValueError(
                f"{name} must be valid Unicode, but its character {error.start} is {half!r}, half "
                f"of a surrogate pair; got {value[max(0, error.start - 20) :]!r:.80}"
            ) from None


@contextmanager
def tokenizer_errors(source: Any) -> Iterator[None]:
    """Turn what the tokenizers library raises of its own into a ValueError that names `source`.

    A damaged tokenizer.json can load and fail later. An error of the library is a bare Exception
    or a panic. Other exceptions, such as KeyboardInterrupt, pass.
    """
    try:
        yield
    except BaseException as error:
        if not (type(error) is Exception or is_panic(error)):
            raise
        raise ValueError(
            f"the tokenizer of {str(source)!r} failed: {error}. Its tokenizer.json is probably "
            f"damaged; download it again, or name another folder with tokenizer="
        ) from error


def is_panic(error: BaseException) -> bool:
    """Whether Rust code has panicked. The class cannot be imported, and it is no Exception."""
    return type(error).__name__ == "PanicException"


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
