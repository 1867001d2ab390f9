"""The minutes that docs/lessons.md and INSTRUCTOR.md state are those of the cards and exercises."""

import re

import pytest

from course.clone import ROOT
from course.pages.source import read_source

CARD = re.compile(r"^\| Minutes \| (\d+) \|$", re.MULTILINE)
EXERCISE = re.compile(r"^# \*\w+, (\d+) minutes\*$", re.MULTILINE)  # in solutions/NN_topic.py
PAGE = (ROOT / "docs/lessons.md").read_text(encoding="utf-8")
INSTRUCTOR = ROOT / "exercises" / "INSTRUCTOR.md"
LESSONS = sorted((ROOT / "notebooks/source").glob("[0-9]*.py"))


def card_minutes(stem: str) -> int:
    cells = read_source(ROOT / "notebooks/source" / f"{stem}.py").cells
    [minutes] = CARD.findall("\n".join(cell.source for cell in cells))
    return int(minutes)


def exercise_minutes(stem: str) -> int:
    source = ROOT / "solutions" / f"{stem}.py"
    found = EXERCISE.findall(source.read_text(encoding="utf-8")) if source.exists() else []
    return sum(map(int, found))


CARDS = {path.stem: card_minutes(path.stem) for path in LESSONS}
EXERCISES = {path.stem: exercise_minutes(path.stem) for path in LESSONS}


def test_every_lesson_but_the_tour_states_its_exercises_minutes():
    assert [stem for stem, minutes in EXERCISES.items() if not minutes] == ["00_tour"]


@pytest.mark.parametrize("stem", CARDS)
def test_the_page_has_the_minutes_of_each_lesson(stem):
    row = f"| {stem[:2]} | {CARDS[stem]} | {EXERCISES[stem] or 'none'} |"
    assert row in PAGE.splitlines(), f"docs/lessons.md lacks the row {row}"


def test_the_front_page_has_the_sum_in_hours():
    total = sum([*CARDS.values(), *EXERCISES.values()]) / 60
    assert f"[about {total:.0f} hours]" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_page_has_the_sums():
    hours = [f"{sum(minutes.values()) / 60:.1f} hours" for minutes in (CARDS, EXERCISES)]
    assert f"| together | {' | '.join(hours)} |" in PAGE.splitlines()


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


@pytest.mark.parametrize("stem", CARDS)
def test_a_run_sheet_is_as_long_as_its_lesson_allows(stem):
    """In class a lesson is led, not read: at least half its card, at most a quarter more."""
    titles = {title[:2]: rows[0] for title, rows in run_sheets().items()}
    assert CARDS[stem] / 2 <= titles[stem[:2]] <= 1.25 * CARDS[stem]
