"""What checks are made of.

    @check
    def check_double(double):
        answer = attempt(double, 3)                    # its errors become messages
        expect(answer != 9, "You squared: 3 * 3. Double is 2 * 3.")
        expect(answer == 6, f"double(3) is 6, yours gave {answer}.")

First what is known to go wrong, each with its own words; then what is right. A check that cannot
run to its end, takes too long or compared nothing fails, and says so.
"""

import inspect
import sys
import sysconfig
import textwrap
import traceback
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from course.checks.limits import TookTooLong, last_words, time_limit
from course.checks.notes import note_pass
from course.clone import ROOT

SECONDS = 30  # of computing, for one check; see limits.py for waiting
_comparisons: list[str] = []  # of the check that runs


class CheckFailed(Exception):
    """An exercise is not solved; the message says what to do next."""

    def _render_traceback_(self) -> list[str]:
        """In a notebook the message alone: the lines of the check would tell nobody anything."""
        lines = f"Not yet. {self}".split("\n")
        return [textwrap.fill(line, 95) for line in lines]


class NotRunHere(CheckFailed):
    """This machine lacks what the check needs: nothing is shown, and the exercise is not done."""


def need(condition: Any, what: str) -> None:
    """Stop the check as not run unless this machine has what it needs."""
    if not condition:
        raise NotRunHere(f"This check was not run here: it needs {what}. It counts as it did.")


def expect(condition: Any, message: str) -> None:
    """Fail with this message unless the condition holds."""
    _comparisons.append(message)
    if not condition:
        raise CheckFailed(message)


def attempt(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What the learner's function returns; an error in it becomes a CheckFailed that says where."""
    if not callable(function):
        raise CheckFailed(f"A function is wanted here, this is {function!r}.")
    try:
        return function(*args, **kwargs)
    except CheckFailed:
        raise
    except NotImplementedError as todo:
        raise CheckFailed(f"{whose(function, todo)} is still to be written: {todo}.") from None
    except (Exception, SystemExit) as error:  # a learner's sys.exit() is a wrong answer, no end
        at = own_frame(error)
        place = f", in line {at.lineno} of {at.name}: {at.line}" if at and at.line else ""
        said = f"{type(error).__name__}: {error}"
        raise CheckFailed(f"{whose(function, error)} raised an error{place}\n{said}") from error


def whose(function: Callable[..., Any], error: BaseException) -> str:
    """The function's name; if it is a helper of a check, that of the learner's that it called."""
    if str(getattr(function, "__module__", None)).startswith("course."):
        at = own_frame(error)
        return at.name if at else "The course's code, running yours,"
    return getattr(function, "__qualname__", None) or repr(function)


def own_frame(error: BaseException) -> traceback.FrameSummary | None:
    """The last line that is the learner's own, not a library's or the course's, before an error.

    None if there is none: a signature that is wrong fails in the line that calls.
    """
    libraries = (sys.prefix, sysconfig.get_path("stdlib"), f"{ROOT}/course", f"{ROOT}/nanovllm")
    own: list[traceback.FrameSummary] = []
    cause: BaseException | None = error  # Triton's interpreter wraps an error in one of its own
    while cause is not None:
        frames = traceback.extract_tb(cause.__traceback__)
        own += [frame for frame in frames if not frame.filename.startswith(libraries)]
        cause = cause.__cause__
    return own[-1] if own else None


def plain(given: Any) -> Any:
    """A number of numpy's or torch's as Python's own; all else as it is."""
    try:
        return given.item()
    except (AttributeError, RuntimeError, ValueError):  # the last two: more than one number
        return given


def compare(name: str, given: Any, truth: Any, wrong: dict[Any, str], look: str) -> None:
    """An answer that was to be predicted, against the computed truth.

    wrong: answers that misconceptions lead to, and what to say of each. look: where the way to the
    answer is found, for every other number.
    """
    expect(given is not None, f"Predict first: write your number in place of None, `{name} = ...`.")
    given = plain(given)
    is_number = isinstance(given, (int, float)) and not isinstance(given, bool)
    right_type = is_number if isinstance(truth, (int, float)) else isinstance(given, type(truth))
    expect(right_type, f"{name} should be like {type(truth).__name__}, got {given!r}.")
    if given == truth:
        return expect(True, name)
    hint = next((text for answer, text in wrong.items() if answer == given), look)
    raise CheckFailed(f"{name} is not {given}. {hint}")


def check(function: Any = None, *, slow: str = "Does a loop end?") -> Callable[..., Any]:
    """Make a function of expectations a check: timed, whole, and noted when it passes.

    slow: what to ask somebody whose answer takes too long; then it is `@check(slow="...")`.
    """
    if function is None:
        return partial(check, slow=slow)
    number = function.__module__[-2:]  # course.checks.lesson03
    name = function.__name__.removeprefix("check_")

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> None:
        print(last_words(), end="")
        _comparisons.clear()
        try:
            with time_limit(SECONDS, name, slow):
                function(*args, **kwargs)
        except CheckFailed as failure:
            raise failure.with_traceback(None) from failure.__cause__
        except TookTooLong as over:
            raise CheckFailed(str(over)) from None
        except (Exception, SystemExit) as error:
            said = f"{type(error).__name__}: {error}"
            raise CheckFailed(f"This check could not run, so nothing is shown. {said}") from error
        if not _comparisons:
            raise CheckFailed("This check compared nothing, so nothing is shown.")
        print(f"Passed: {len(_comparisons)} comparisons. {note_pass(number, name)}")

    return checked


def run_check(checked: Callable[..., None], defined: Any) -> None:
    """Run a check on what an exercise's cell defines; its parameters say which names it takes."""
    names = list(inspect.signature(checked).parameters)
    if missing := [name for name in names if not hasattr(defined, name)]:
        raise CheckFailed(f"The exercise's cell no longer defines {', '.join(missing)}.")
    checked(**{name: getattr(defined, name) for name in names})
