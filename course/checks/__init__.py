"""The checks of the exercises: course.checks.lesson03.check_slot_mapping(slot_mapping).

One module a lesson, one function an exercise. Its parameters are named as what the exercise's cell
defines. It returns nothing and raises CheckFailed; the message says which misconception the answer
shows, and what to do next. Notebooks, tests and `course progress` call the same functions.
"""

from course.checks.check import CheckFailed, attempt, check, compare, expect

__all__ = ["CheckFailed", "attempt", "check", "compare", "expect"]
