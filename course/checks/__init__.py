"""The checks of the exercises: course.checks.lesson03.check_slot_mapping(slot_mapping).

One module a lesson, one function an exercise. Its parameters are named as what the exercise's cell
defines. It returns nothing and raises CheckFailed; the message says which misconception the answer
shows, and what to do next. Notebooks, tests and `course progress` call the same functions.
"""

from course.checks.core import CheckFailed, NotRunHere, attempt, check, compare, expect, need

__all__ = ["CheckFailed", "NotRunHere", "attempt", "check", "compare", "expect", "need"]
