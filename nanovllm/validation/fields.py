"""How the front door says no: every message names the parameter, the value and the limit.

A parameter's field says beside its default what it accepts; `check_fields` holds it to that.
"""

from collections.abc import Callable
from dataclasses import field, fields
from functools import partial, wraps
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


def as_list(name: str, value: Any) -> list:
    """A new list of a list's or a tuple's items; None has none. TypeError for anything else."""
    if value is not None and not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list, got {value!r}")
    return list(value or ())


def number(default: float | None, low: float, high: float, none_is_default: bool = False) -> Any:
    """A field for a number from `low` to `high`; for None as well if its type says so."""
    check = partial(check_number, low=low, high=high)
    return _field(default, check, none_is_default=none_is_default)


def flag(default: bool | None, none_is_default: bool = False) -> Any:
    """A field for True or False."""
    check = partial(check_type, kind=bool)
    return _field(default, check, none_is_default=none_is_default)


def only(default: Any) -> Any:
    """A field for a vLLM parameter that is not here: it takes vLLM's default, and no other."""
    return _field(default, lambda name, value: check_only(name, value, (default,)), repr=False)


def check_only(name: str, value: Any, accepted: tuple) -> None:
    """Raise ValueError unless the value of a parameter of vLLM's is one of those accepted here."""
    kinds = {int, float} if type(value) in (int, float) else {type(value)}  # 0 is no False
    if value not in [one for one in accepted if type(one) in kinds]:
        words = " or ".join(map(repr, accepted))
        raise ValueError(f"{name}={value!r:.80} is vLLM's; this engine takes only {words}")


def _field(default: Any, check: Callable, repr: bool = True, none_is_default: bool = False) -> Any:
    metadata = {"check": check, "none_is_default": none_is_default}
    return field(default=default, repr=repr, metadata=metadata)


def check_options(method: str, options: dict[str, Any], accepted: dict[str, tuple]) -> None:
    """Check what a method was given by keyword for parameters of vLLM's that it does not have."""
    for name, value in options.items():
        if name not in accepted:
            raise TypeError(f"{method}() got an unexpected keyword argument {name!r}")
        check_only(name, value, accepted[name])


def also_takes(accepted: dict[str, tuple]) -> Callable[[type], Any]:
    """Let a dataclass take parameters of vLLM's that it has no fields for, by a table.

    accepted: the values that each of these parameters may have, vLLM's default first. A value is
    checked and then forgotten, because it changes nothing. To read the attribute gives the default.
    """

    def decorate(cls: Any) -> Any:
        init = cls.__init__

        @wraps(init)  # inspect.signature shows the fields alone
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            for name in kwargs.keys() & accepted.keys():
                check_only(name, kwargs.pop(name), accepted[name])
            init(self, *args, **kwargs)

        def __setattr__(self: Any, name: str, value: Any) -> None:
            if name in accepted:
                check_only(name, value, accepted[name])
            else:
                object.__setattr__(self, name, value)

        def __getattr__(self: Any, name: str) -> Any:  # called for what is no field
            if name not in accepted:
                raise AttributeError(f"{cls.__name__!r} object has no attribute {name!r}")
            return accepted[name][0]

        cls.__init__, cls.__setattr__, cls.__getattr__ = __init__, __setattr__, __getattr__
        cls.also_takes = accepted
        return cls

    return decorate


def check_fields(parameters: Any) -> None:
    """Check every field that says what it accepts. None is where the field's type has it.

    Where a field has `none_is_default`, as vLLM's have it, None becomes the field's default.
    """
    for f in fields(parameters):
        if f.metadata.get("none_is_default") and getattr(parameters, f.name) is None:
            setattr(parameters, f.name, f.default)
        value = getattr(parameters, f.name)
        if "check" in f.metadata and not (value is None and type(None) in get_args(f.type)):
            f.metadata["check"](f.name, value)
