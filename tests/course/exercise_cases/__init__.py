"""What proves each check, a module a lesson: wrong answers, and a right one written differently.

    CASES = {
        "top_p": Case(
            mutants=[("before >= p", "before > p", "equals p")],
            other=a_right_top_p,
        ),
    }

A mutant is the solution with one text replaced by another, and words that the message must have:
they name the misconception. Beside it stands at least one right answer written another way. The
solution itself and the stub need no entry. tests/course/test_exercises.py runs them all.
"""

from dataclasses import dataclass
from typing import Any

Mutant = tuple[str, str, str]  # what is replaced, by what, words of the message


@dataclass(frozen=True)
class Case:
    """`other`: what the exercise's cell defines; a dict if that is not one thing."""

    mutants: list[Mutant]
    other: Any
    more: tuple[Any, ...] = ()  # further right answers
