"""Check one value that a user has passed. Every error names the parameter, value and limit."""

from typing import Any


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """Raise ValueError unless low <= value <= high.

    Raises TypeError if the value is no number, and if it is no int although `low` is one.
    """
    kind = type(low)
    if isinstance(value, bool) or not isinstance(value, (int, kind)):
        raise TypeError(f"{name} must be of type {kind.__name__}, got {value!r}")
    if not low <= value <= high:  # NaN fails here too
        raise ValueError(f"{name} must be between {low:,} and {high:,}, got {value!r}")


def check_type(name: str, value: Any, kind: type) -> None:
    """Raise TypeError unless `value` is an instance of `kind`."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be of type {kind.__name__}, got {value!r}")


def check_unicode(name: str, value: Any) -> None:
    """Raise ValueError for half a surrogate pair in a text, or in any text in a dict or a list.

    JSON can spell such a half ("\\ud800"). It represents no character, so no tokenizer encodes it.
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


def as_list(name: str, value: Any) -> list:
    """Return a new list with the items of a list or a tuple, or an empty list for None.

    Raises TypeError for every other type.
    """
    if value is not None and not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list, got {value!r}")
    return list(value or ())
