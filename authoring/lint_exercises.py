"""Lints of exercises and solutions: three exercises of three kinds, hints in three layers, a check
after each, and no more lines to write than a learner has time for."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from course.clone import ROOT
from course.pages.exercise_cells import HEADING, count_lines, name_of, regions_of
from course.pages.source import read_source

Found = Iterator[tuple[int | None, str]]
KINDS = {"Predict", "Implement", "Break and fix"}
HINTS = ("Hint 1: a nudge", "Hint 2: the steps", "Hint 3: the solution")
MOST_LINES = 12
MOST_LINES_IN_TWO_REGIONS = 25  # for lessons 04 and 05


def lint_kinds(notebook: Any, path: Path) -> Found:
    kinds = [exercise["kind"] for exercise in notebook.metadata["course"]["exercises"]]
    if missing := KINDS - set(kinds):
        yield None, f"has no exercise of the kind {', '.join(sorted(missing))}"
    headings = sum(len(HEADING.findall(c.source)) for c in notebook.cells)
    titles = sum(len(re.findall(r"^## ", c.source, re.M)) for c in notebook.cells)
    if not headings == titles == len(kinds):
        wanted = f"{headings} like '## 1 · Predict: ...' with minutes, {len(kinds)} exercises"
        yield None, f"{titles} headings, {wanted}"


def lint_hints(notebook: Any, path: Path) -> Found:
    """After each exercise's code come its check and its hints, in order."""
    names = [exercise["name"] for exercise in notebook.metadata["course"]["exercises"]]
    owners = [name_of(cell) for cell in notebook.cells]
    starts = {name: owners.index(name) for name in names}
    for name, start in starts.items():
        end = min((s for s in starts.values() if s > start), default=len(notebook.cells))
        rest = notebook.cells[start:end]
        if not any(c.cell_type == "code" and f".check_{name}(" in c.source for c in rest):
            yield start, f"no cell after it calls check_{name}"
        text = "\n".join(c.source for c in rest if c.cell_type == "markdown")
        places = [text.find(f"<summary>{hint}</summary>") for hint in HINTS]
        if -1 in places or places != sorted(places):
            yield start, f"after it come no folds named {HINTS}, in this order"
        elif "```python" not in text[places[2] :]:
            yield start, f"the third hint holds no code: {{{{solution {name}}}}}"


def lint_length(notebook: Any, path: Path) -> Found:
    """At most twelve lines an exercise, or 25 in two regions."""
    source = ROOT / "solutions" / f"{path.stem}.py"
    cells = read_source(source).cells
    for exercise in notebook.metadata["course"]["exercises"]:
        regions = regions_of(cells, exercise["name"])
        lines = [count_lines(region["solution"]) for region in regions]
        most = MOST_LINES if len(lines) < 2 else MOST_LINES_IN_TWO_REGIONS
        if sum(lines) > most:
            yield None, f"{exercise['name']} asks for {lines} lines; at most {most}"
        for region in regions:
            if not region["instead"] and not region["todo"]:
                yield None, f"{exercise['name']}: BEGIN SOLUTION says nothing of what is to do"


def lint_no_outputs(notebook: Any, path: Path) -> Found:
    for index, cell in enumerate(notebook.cells):
        if cell.get("outputs") or cell.get("execution_count"):
            yield index, "stores a run: exercises store none"


EXERCISE_LINTS: list[Callable[[Any, Path], Found]] = [
    lint_kinds,
    lint_hints,
    lint_length,
]
