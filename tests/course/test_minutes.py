"""The minutes on the cards are near an honest estimate, and what is written down adds up."""

import re

import pytest

from course import minutes
from course.minutes import ROOT, count_words, read_lessons

LESSONS = read_lessons()
TOLERANCE = 0.4  # of the estimate: paces differ at least so much between readers
INSTRUCTOR = ROOT / "exercises" / "INSTRUCTOR.md"


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.stem)
def test_the_card_is_near_the_estimate(lesson):
    off = abs(lesson.card - lesson.estimate)
    assert off <= TOLERANCE * lesson.estimate, (
        f"{lesson.stem}: its card says {lesson.card} minutes, the estimate {lesson.estimate:.0f}"
    )


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.stem)
def test_every_lesson_states_its_exercises_minutes(lesson):
    assert (lesson.exercises > 0) == (lesson.stem != "00_tour")


def test_the_page_of_the_lessons_has_the_sums():
    page = minutes.PAGE.read_text(encoding="utf-8")
    assert minutes.between_marks(page) == minutes.summary(LESSONS), "run: course minutes --write"


def test_the_front_page_has_the_sum_in_hours():
    total = sum(lesson.card + lesson.exercises for lesson in LESSONS)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"[about {total / 60:.0f} hours]" in readme


def test_longer_pages_take_longer():
    lesson = LESSONS[0]
    for field in ("words", "lines", "shown_lines", "cells", "predictions"):
        longer = type(lesson)(**{**vars(lesson), field: getattr(lesson, field) + 10})
        assert longer.estimate > lesson.estimate, field


def test_words_are_prose():
    page = (
        "See [the file](https://x.y/a/b-c) now.\n\n<details>\n\n| a | b |\n|:--|--:|\n| 1 | 2 |\n"
    )
    assert count_words(page) == len(["See", "the", "file", "now", "a", "b", "1", "2"])


def run_sheets() -> dict[str, list[int]]:
    """Each section of INSTRUCTOR.md that states minutes: those it states, then its rows'."""
    found = {}
    for section in re.split(r"^#{2,3} ", INSTRUCTOR.read_text(encoding="utf-8"), flags=re.M):
        title = section.partition("\n")[0]
        if stated := re.search(r"(\d+) minutes", title):
            rows = re.findall(r"^\| (\d+) \|", section, flags=re.M)
            found[title] = [int(stated[1]), *map(int, rows)]
    return found


def test_schedules_and_run_sheets_add_up():
    sheets = run_sheets()
    assert len(sheets) >= 14, "four schedules and ten run sheets"
    for title, (stated, *rows) in sheets.items():
        assert sum(rows) == stated, f"{title}: its rows make {sum(rows)} minutes"


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.stem)
def test_a_run_sheet_is_as_long_as_its_lesson_allows(lesson):
    """In class a lesson is led, not read: at least half its card, at most a quarter more."""
    number = lesson.stem[:2]
    (stated,) = [rows[0] for title, rows in run_sheets().items() if title.startswith(f"{number} ")]
    assert lesson.card / 2 <= stated <= 1.25 * lesson.card
