"""Which exercises are done: a table, and a picture of it.

course progress                 what your checks have passed so far
course progress --run           run every check again, on your saved notebooks
course progress --run 03        those of lesson 03
course progress --svg FILE      the picture, too

A pass that was noted stays noted. --run adds passes and takes none away, because a notebook may
pass where this command does not, as with a cell that was run and not saved. It says what it could
not confirm. The exit status is 0 once the table is printed, whatever is still to be solved.

In a notebook: from course.commands.progress import show_progress; show_progress()
"""

import argparse
import html
import io
import sys
from contextlib import redirect_stdout
from pathlib import Path

from course.arguments import local_path
from course.checks import notes
from course.checks.exercises import Place, all_places, lesson_of
from course.checks.notes import Passed, add_pass, check_of, load_passed


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

    show(*picture(all_places(), load_passed(notes.FILE)))


# -- the command ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("lesson", nargs="?", help="only this one, such as 03")
    parser.add_argument("--run", action="store_true", help="run the checks on your saved notebooks")
    parser.add_argument(
        "--svg", type=local_path, metavar="FILE", help="write the picture to this file"
    )


def main(args: argparse.Namespace) -> int:
    from course.checks.limits import last_words
    from course.labs import kernel_lab

    places = all_places()
    if args.lesson:
        lesson = lesson_of(args.lesson)
        places = [place for place in places if place.lesson == lesson]
    if args.run and "triton" not in sys.modules:  # lesson 06's checks may need its interpreter
        kernel_lab.prepare()
    print(last_words(), end="")
    failures = update(places, notes.FILE) if args.run else {}
    passed = load_passed(notes.FILE)
    print(table(places, passed))
    for place, problem in failures.items():
        stays = "its pass stays noted, but this run could not confirm it: " * is_done(place, passed)
        print(f"\n{place.number} {place.exercise.title}: {stays}{problem}")
    if args.svg:
        args.svg.write_text(picture(places, passed)[0], encoding="utf-8")
        print(f"The picture is in {args.svg}.")
    return 0
