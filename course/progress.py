"""Which exercises are done: a table, and a picture of it.

course progress                 what your checks have passed so far
course progress --run           run every check again, on your saved notebooks
course progress --run 03        those of lesson 03
course progress --svg FILE      the picture, too

A pass that was noted stays noted. --run adds passes and takes none away, because a notebook may
pass where this command does not, as with a cell that was run and not saved. It says what it could
not confirm. The exit status is 0 once the table is printed, whatever is still to be solved.

In a notebook: from course.progress import show_progress; show_progress()
"""

import argparse
import html
import io
import json
import sys
from contextlib import redirect_stdout
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any

from course.bench import local_path
from course.checks.exercises import Place, all_places, lesson_of
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


def run_again(place: Place) -> str | None:
    """Check the code in the learner's saved notebook; what is wrong, or None.

    Raises NotRunHere where this machine lacks what the check needs.
    """
    from course.checks import CheckFailed, NotRunHere
    from course.checks.core import run_check
    from course.checks.exercises import NotThere, load

    try:
        with redirect_stdout(io.StringIO()):
            run_check(check_of(place), load(place.number, place.exercise.name, "exercises"))
    except NotRunHere:
        raise
    except (CheckFailed, NotThere) as failure:
        return str(failure)
    except (Exception, SystemExit) as error:  # the learner's cell may hold anything
        return f"its cell does not run: {type(error).__name__}: {error}{reason_for(error)}"
    return None


def reason_for(error: BaseException) -> str:
    """What a learner may not expect about how a cell is run here."""
    if not isinstance(error, NameError):
        return ""
    return (
        ". Beside the exercise's own cells, this command runs only imports, functions, classes and "
        "constants of the notebook: move what is missing into the exercise's cell"
    )


def update(places: list[Place], file: Path) -> dict[Place, str]:
    """Run the checks of these again and note what passes; what is wrong with each that does not.

    A pass is noted as soon as it is known, so a command that is ended halfway has lost nothing.
    """
    from course.checks import NotRunHere

    load_passed(file)  # a record that is none is found before anything runs
    failures = {}
    for place in places:
        try:
            problem = run_again(place)
        except NotRunHere as reason:
            problem = str(reason)
        if problem is None:
            add_pass(place.number, place.exercise.name, file)
        else:
            failures[place] = problem
    return failures


# -- the table and the picture -------------------------------------------------------------------


def table(places: list[Place], passed: Passed) -> str:
    """A line an exercise, with the day it passed or the minutes it takes; the sum at the end."""
    lines, lesson = [], None
    for place in places:
        if place.lesson != lesson:
            lesson = place.lesson
            lines.append(f"{place.number} {lesson[3:].replace('_', ' ')}")
        day = passed.get(place.number, {}).get(place.exercise.name)
        state = (
            f"passed {day}" if day else f"{place.exercise.minutes} min, {place.exercise.difficulty}"
        )
        mark = "x" if day else " "
        lines.append(f"  [{mark}] {place.exercise.kind}: {place.exercise.title}  ({state})")
    done = sum(is_done(place, passed) for place in places)
    return "\n".join([*lines, f"{done} of {len(places)} exercises passed."])


def is_done(place: Place, passed: Passed) -> bool:
    return place.exercise.name in passed.get(place.number, {})


def picture(places: list[Place], passed: Passed) -> tuple[str, str]:
    """An SVG, a row a lesson and a box an exercise, with a tick if it passed; its alt text."""
    lessons = list(dict.fromkeys(place.lesson for place in places))
    boxes, row_height, box_width = [], 34, 150
    for row, lesson in enumerate(lessons):
        y, name = 30 + row * row_height, f"{lesson[:2]} {lesson[3:].replace('_', ' ')}"
        boxes.append(f'<text x="8" y="{y + 17}" font-weight="bold">{html.escape(name)}</text>')
        for column, place in enumerate(p for p in places if p.lesson == lesson):
            x, done = 180 + column * (box_width + 8), is_done(place, passed)
            fill, text = ("#009E73", "#FFFFFF") if done else ("#FFFFFF", "#000000")
            label = ("\u2713 " if done else "") + place.exercise.kind
            boxes.append(
                f'<rect x="{x}" y="{y}" width="{box_width}" height="26" rx="4" fill="{fill}" '
                f'stroke="#000000"><title>{html.escape(place.exercise.title)}</title></rect>'
                f'<text x="{x + 8}" y="{y + 17}" fill="{text}">{html.escape(label)}</text>'
            )
    most = max((sum(p.lesson == lesson for p in places) for lesson in lessons), default=0)
    done = sum(is_done(place, passed) for place in places)
    alt = f"{done} of {len(places)} exercises passed"
    width, height = 190 + most * (box_width + 8), 40 + len(lessons) * row_height
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="sans-serif" font-size="13" role="img" aria-label="{alt}">'
        f'<rect width="{width}" height="{height}" fill="#FFFFFF"/><text x="8" y="18">{alt}</text>'
    )
    return head + "".join(boxes) + "</svg>\n", alt + "."


def show_progress() -> None:
    """The picture, in a notebook."""
    from course.show.display import show

    show(*picture(all_places(), load_passed(FILE)))


# -- the command ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("lesson", nargs="?", help="only this one, such as 03")
    parser.add_argument("--run", action="store_true", help="run the checks on your saved notebooks")
    parser.add_argument(
        "--svg", type=local_path, metavar="FILE", help="write the picture to this file"
    )


def main(args: argparse.Namespace) -> int:
    from course.checks.limits import last_words

    places = all_places()
    if args.lesson:
        lesson = lesson_of(args.lesson)
        places = [place for place in places if place.lesson == lesson]
    if args.run and "triton" not in sys.modules:  # lesson 06's checks may need its interpreter
        import_module("course.labs.kernel_lab")
    print(last_words(), end="")
    failures = update(places, FILE) if args.run else {}
    passed = load_passed(FILE)
    print(table(places, passed))
    for place, problem in failures.items():
        stays = "its pass stays noted, but this run could not confirm it: " * is_done(place, passed)
        print(f"\n{place.number} {place.exercise.title}: {stays}{problem}")
    if args.svg:
        args.svg.write_text(picture(places, passed)[0], encoding="utf-8")
        print(f"The picture is in {args.svg}.")
    return 0
