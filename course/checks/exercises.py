"""A learner's own code, found again: by later exercises, by `course progress`, and by the tests.

mine = load("03", "slot_mapping")     # runs the tagged cell of exercises/03_paged_blocks.ipynb
mine.slot_mapping(...)                # and has what it defined

A notebook that runs in solutions/ gets the course's solutions instead.
"""

import ast
import json
import linecache
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from symtable import symtable
from types import SimpleNamespace
from typing import Any

from course.checks.cells import NoShell, definitions, plain_python
from course.clone import ROOT
from course.lessons import FILES_OF_LESSON
from course.pages.exercise_cells import Exercise, name_of


@dataclass(frozen=True)
class Place:
    """An exercise and the lesson it belongs to."""

    lesson: str  # such as 03_paged_blocks
    exercise: Exercise

    @property
    def number(self) -> str:
        return self.lesson[:2]


class NotThere(ValueError):
    """The learner's code is not where the course looks for it; the message says what to do."""


def lesson_of(number: str) -> str:
    """The lesson with exercises that "3", "03" or "03_paged_blocks" means; ValueError if none."""
    lessons = [lesson for lesson in FILES_OF_LESSON if notebook_of(lesson, "solutions").exists()]
    wanted = number.zfill(2)
    for lesson in lessons:
        if lesson == wanted or lesson[:2] == wanted:
            return lesson
    listed = "".join(f"\n    {lesson[:2]}  {lesson[3:]}" for lesson in lessons)
    raise ValueError(f"no lesson {number!r} has exercises; those that have:{listed}")


def notebook_of(lesson: str, folder: str) -> Path:
    return ROOT / folder / f"{lesson}.ipynb"


def all_places() -> list[Place]:
    """Every exercise of the course, in order."""
    places = []
    for lesson in FILES_OF_LESSON:
        path = notebook_of(lesson, "solutions")
        if path.exists():
            listed = json.loads(path.read_text(encoding="utf-8"))["metadata"]["course"]["exercises"]
            places += [Place(lesson, Exercise(**fields)) for fields in listed]
    return places


def here() -> str:
    """Whose code this process works with: "solutions" in a notebook of that folder."""
    return "solutions" if Path.cwd() == ROOT / "solutions" else "exercises"


def cells_of(number: str, folder: str | None = None) -> list[dict[str, Any]]:
    """The code cells of an exercise notebook as it was last saved, their source as one text."""
    path = notebook_of(lesson_of(number), folder or here())
    name = f"{path.parent.name}/{path.name}"
    if not path.exists():
        raise NotThere(f"there is no {name}: course reset {number}")
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return [c | {"source": "".join(c["source"])} for c in cells if c["cell_type"] == "code"]
    except (ValueError, TypeError, LookupError) as error:
        raise NotThere(
            f"{name} is no notebook any more: `course reset {number}` gives a fresh one, and keeps "
            "yours"
        ) from error


def code_of(number: str, name: str, folder: str | None = None) -> str:
    """The source of the cells that carry an exercise's tag, as plain Python."""
    cells = cells_of(number, folder)
    texts = [plain_python(cell["source"]) for cell in cells if name_of(cell) == name]
    if not texts:
        raise NotThere(
            f"{folder or here()}/{lesson_of(number)}.ipynb has no cell for {name!r}, that is with "
            f"the tag exercise-{name}. `course reset {number}` gives a fresh one, and keeps yours"
        )
    return "\n\n".join(texts)


def preamble_of(number: str, folder: str | None = None) -> list[ast.stmt]:
    """What the cells of an exercise notebook define that belong to no exercise, imports first.

    These are imports at the left margin of any cell. Functions, classes and constants of cells
    without a tag come along, since a learner may keep helpers there. Nothing else of them is run.
    """
    imports, helpers = [], []
    for cell in cells_of(number, folder):
        for statement in definitions(cell["source"]):
            if isinstance(statement, ast.Import | ast.ImportFrom):
                imports.append(statement)
            elif name_of(cell) is None:
                helpers.append(statement)
    return imports + helpers


def load(number: str, name: str, folder: str | None = None) -> SimpleNamespace:
    """What the cells of one exercise define, in a namespace with the notebook's preamble alone.

    folder: "exercises" or "solutions"; None: the learner's own, from their last save.
    """
    title = f"<exercise {number} {name}>"
    return define(code_of(number, name, folder), title, preamble_of(number, folder))


def define(source: str, title: str, preamble: list[ast.stmt] | None = None) -> SimpleNamespace:
    """What some code defines, after this preamble; `title` is its file's name in a traceback."""
    linecache.cache[title] = (len(source), None, source.splitlines(True), title)
    names: dict[str, Any] = {"__name__": "exercise"}
    names["get_ipython"] = lambda: NoShell(names)
    for statement in preamble or []:
        run_preamble(statement, names)
    given = {*names, "__builtins__"}
    exec(compile(source, title, "exec"), names)
    symbols = symtable(source, title, "exec").get_symbols()
    given -= {s.get_name() for s in symbols if s.is_assigned()}  # also where a helper has its name
    return SimpleNamespace(**{name: names[name] for name in names if name not in given})


def run_preamble(statement: ast.stmt, names: dict[str, Any]) -> None:
    """Run one statement of a preamble. A helper that fails is missed only where it is used."""
    code = compile(ast.Module([statement], []), "<cells without a tag>", "exec")
    if isinstance(statement, ast.Import | ast.ImportFrom):
        exec(code, names)
        return
    with suppress(Exception, SystemExit):
        exec(code, names)
