"""The notes on which checks have passed, in .course/progress.json, and the check of an exercise."""

import json
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any

from course.checks.exercises import Place
from course.clone import ROOT
from course.files import locked, write_whole

FILE = ROOT / ".course" / "progress.json"
Passed = dict[str, dict[str, str]]  # lesson's number -> exercise -> day


def note_pass(number: str, name: str, file: Path | None = None) -> str:
    """Remember that a check passed on the learner's own code; says what was done about it."""
    if Path.cwd() != ROOT / "exercises":
        return "(Noted for `course progress` only in a notebook of exercises/.)"
    try:
        add_pass(number, name, file or FILE)
    except (ValueError, OSError) as error:  # the check has passed all the same
        return f"(It could not be noted for `course progress`: {error})"
    return "Noted: see `course progress`."


def add_pass(number: str, name: str, file: Path) -> None:
    """Note today as the day of a pass, unless an earlier day is noted. Other passes stay."""
    with locked(file):
        passed = load_passed(file)
        passed.setdefault(number, {}).setdefault(name, date.today().isoformat())
        save_passed(passed, file)


def load_passed(file: Path) -> Passed:
    """What was noted in a file; ValueError if it holds something else."""
    if not file.exists():
        return {}
    try:
        passed = json.loads(file.read_text(encoding="utf-8"))
        if not all(isinstance(days, dict) for days in passed.values()):
            raise ValueError("a lesson has no days")
    except (ValueError, AttributeError) as error:
        name = f"{file.parent.name}/{file.name}"
        raise ValueError(f"{name} is no record of progress; delete it") from error
    return passed


def save_passed(passed: Passed, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(passed, indent=2, sort_keys=True) + "\n")


def check_of(place: Place) -> Any:
    """The check of an exercise: course.checks.lesson03.check_slot_mapping."""
    module = import_module(f"course.checks.lesson{place.number}")
    return getattr(module, f"check_{place.exercise.name}")
