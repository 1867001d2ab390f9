"""Accept vLLM's parameters that this engine lacks, but only with values that change nothing here.

A script written for vLLM may spell out vLLM's default. Any other value would be ignored, so it is
an error. The tables of accepted values are in vllm_defaults.py.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any


def check_accepted(name: str, value: Any, accepted: tuple) -> None:
    """Raise ValueError unless `value` is one of the accepted values of vLLM's parameter `name`."""
    # 0 == False in Python, so we compare the types as well. An int may stand for a float.
    kinds = {int, float} if type(value) in (int, float) else {type(value)}
    if value not in [one for one in accepted if type(one) in kinds]:
        choices = " or ".join(map(repr, accepted))
        raise ValueError(
            f"{name}={value!r:.80} is not supported. For this parameter of vLLM, the engine "
            f"accepts only {choices}"
        )


def check_options(method: str, options: dict[str, Any], accepted: dict[str, tuple]) -> None:
    """Check the keyword arguments of a method that stand for vLLM parameters it lacks.

    Raises TypeError for a name that vLLM's method lacks as well, and ValueError for a value that
    is not accepted.
    """
    for name, value in options.items():
        if name not in accepted:
            raise TypeError(f"{method}() got an unexpected keyword argument {name!r}")
        check_accepted(name, value, accepted[name])


def accept_unsupported(accepted: dict[str, tuple]) -> Callable[[type], Any]:
    """Return a decorator that lets a dataclass take vLLM's parameters for which it has no field.

    accepted: the values that each of these parameters may have, with vLLM's default first. A value
    is checked and then forgotten, because it changes nothing. Reading the attribute gives the
    default. The class keeps the table as `unsupported_parameters`.
    """

    def decorate(cls: Any) -> Any:
        init = cls.__init__

        @wraps(init)  # so that inspect.signature shows only the fields
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            for name in kwargs.keys() & accepted.keys():
                check_accepted(name, kwargs.pop(name), accepted[name])
            init(self, *args, **kwargs)

        def __setattr__(self: Any, name: str, value: Any) -> None:
            if name in accepted:
                check_accepted(name, value, accepted[name])
            else:
                object.__setattr__(self, name, value)

        def __getattr__(self: Any, name: str) -> Any:  # Python calls it only for what is no field
            if name not in accepted:
                raise AttributeError(f"{cls.__name__!r} object has no attribute {name!r}")
            return accepted[name][0]

        cls.__init__, cls.__setattr__, cls.__getattr__ = __init__, __setattr__, __getattr__
        cls.unsupported_parameters = accepted
        return cls

    return decorate
