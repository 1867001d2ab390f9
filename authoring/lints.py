"""What every committed notebook must be, read from its file alone: no kernel runs here.

`lint(path)` returns one line a problem, each naming the notebook and the cell. The command
`python -m authoring.lints FILE ...` prints these lines, and fails if there are any.
"""

import ast
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from authoring.lint_exercises import EXERCISE_LINTS, lint_no_outputs
from authoring.lint_pages import PAGE_LINTS
from course.lessons import FILES_OF_LESSON
from course.pages.jobs import read_notebook
from course.pages.source import first_line

CELLS = range(20, 41)
FEWEST_WORDS = 600  # there is no upper limit: a page is too long when it bores, not at some count
MOST_BYTES = 1_500_000
MOST_COLUMNS = 100
SHOWING = {"print", "show", "steps", "show_source"}
CARD = ("Minutes", "Difficulty", "Hardware", "Needs", "Ends in")

Cell = Any
Notebook = Any
Lint = Callable[[Notebook, Path], Iterator[tuple[int | None, str]]]


def lint(path: Path) -> list[str]:
    """Every problem of one notebook, as `name, cell i (first line): what is wrong`."""
    notebook = read_notebook(path)
    problems = []
    for check in LINTS.get(path.parent.name, LESSON_LINTS) + CODE_LINTS + PAGE_LINTS:
        for index, text in check(notebook, path):
            where = path.name
            if index is not None:
                where += f", cell {index} ({first_line(notebook.cells[index].source)[:50]!r})"
            problems.append(f"{where}: {text}")
    return problems


def code_cells(notebook: Notebook) -> list[tuple[int, Cell]]:
    return [(i, cell) for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"]


def lint_run_in_order(notebook: Notebook, path: Path) -> Iterator[tuple[int | None, str]]:
    """Stripped or re-run cells: a page must read complete, from one run top to bottom."""
    for position, (index, cell) in enumerate(code_cells(notebook), start=1):
        if cell.execution_count is None:
            yield index, "was never run: outputs are stored in the repository"
        elif cell.execution_count != position:
            yield index, f"ran as number {cell.execution_count}, but stands at {position}"
        if not cell.outputs and (shows := calls(cell.source) & SHOWING):
            yield index, f"calls {sorted(shows)[0]}, and stores no output"


def calls(source: str) -> set[str]:
    """Names of the functions that a cell calls as it runs, outside the functions it defines."""
    found: set[str] = set()
    try:
        nodes: list[ast.AST] = [*ast.parse(source).body]
    except SyntaxError:
        return found
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found.add(node.func.id)
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda)):
            nodes += ast.iter_child_nodes(node)
    return found


def lint_outputs_are_clean(notebook: Notebook, path: Path) -> Iterator[tuple[int | None, str]]:
    for index, cell in code_cells(notebook):
        for output in cell.outputs:
            if output.output_type == "error":
                yield index, f"stores an error: {output.ename}: {output.evalue}"
            elif output.get("name") == "stderr":
                yield index, f"prints to stderr: {output.text.strip()[:80]!r}"


def lint_markers(notebook: Notebook, path: Path) -> Iterator[tuple[int | None, str]]:
    """nbval's ways of not noticing a failure, and shell lines, whose failure nothing notices."""
    for index, cell in code_cells(notebook):
        tags = {str(tag).lower().replace("_", "-") for tag in cell.metadata.get("tags", [])}
        comments = {
            line.strip("# ").lower().replace("_", "-")
            for line in cell.source.splitlines()
            if line.strip().startswith("#")
        }
        for name in ("raises-exception", "nbval-raises-exception", "nbval-skip"):
            if name in tags | comments:
                yield index, f"{name} passes whatever happens: catch the error and assert on it"
        for tag in cell.metadata.get("tags", []):
            if tag == "NBVAL_CHECK_OUTPUT":
                yield index, "nbval reads the tag nbval-check-output, not NBVAL_CHECK_OUTPUT"
        if re.search(r"^\s*(\w+\s*=\s*)?!|^%%(bash|sh|script)\b", cell.source, re.MULTILINE):
            yield index, "a shell line fails in silence: subprocess.run(..., check=True)"


def lint_code(notebook: Notebook, path: Path) -> Iterator[tuple[int | None, str]]:
    """Code is Python, and no line of it runs off the page."""
    for index, cell in code_cells(notebook):
        lines = cell.source.splitlines()
        python = "\n".join("pass" if re.match(r"[%!]", line) else line for line in lines)
        try:
            ast.parse(python)
        except SyntaxError as error:
            yield index, f"is not Python: {error}"
        for line in lines:
            if len(line) > MOST_COLUMNS:
                yield index, f"a line of {len(line)} columns, at most {MOST_COLUMNS}"


def lint_asserts(notebook: Notebook, path: Path) -> Iterator[tuple[int | None, str]]:
    if not any(re.search(r"^ *assert\b", cell.source, re.M) for _, cell in code_cells(notebook)):
        yield None, "no cell asserts anything"


def size_of(notebook: Notebook) -> tuple[int, int]:
    """Cells, and words of markdown."""
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    return len(notebook.cells), sum(len(text.split()) for text in texts)


def lint_size(notebook: Notebook, path: Path) -> Iterator[tuple[int | None, str]]:
    """A page far outside the usual size of a lesson (36 cells) is no lesson."""
    cells, words = size_of(notebook)
    if cells not in CELLS:
        yield None, f"{cells:,} cells; a lesson has {CELLS.start:,} to {CELLS.stop - 1:,}"
    if words < FEWEST_WORDS:
        yield None, f"{words:,} words; a lesson has {FEWEST_WORDS:,} or more"
    if (size := path.stat().st_size) > MOST_BYTES:
        yield None, f"{size:,} bytes, at most {MOST_BYTES:,}"


def lint_card(notebook: Notebook, path: Path) -> Iterator[tuple[int | None, str]]:
    """The first cell says what the lesson takes: a table row `| Minutes | 45 |` for each."""
    if path.stem not in FILES_OF_LESSON:
        yield None, "is not a lesson of course/lessons.py"
        return
    card = notebook.cells[0]
    for label in CARD:
        found = re.search(rf"^\| *{label} *\|(.*)\|", card.source, re.MULTILINE)
        if card.cell_type != "markdown" or not found or not found[1].strip():
            yield 0, f"the card has no row '| {label} | ... |'"
        elif label == "Minutes" and not re.search(r"\d", found[1]):
            yield 0, "the card's minutes are a number"
        elif label == "Ends in":
            for name in FILES_OF_LESSON[path.stem]:
                if f"nanovllm/{name}" not in found[1]:
                    yield 0, f"the card's 'Ends in' does not name nanovllm/{name}"


LESSON_LINTS: list[Lint] = [lint_card, lint_size, lint_run_in_order, lint_asserts]
CODE_LINTS: list[Lint] = [lint_outputs_are_clean, lint_markers, lint_code]
LINTS: dict[str, list[Lint]] = {  # by folder; others hold lessons
    "exercises": [*EXERCISE_LINTS, lint_no_outputs],
    "solutions": [*EXERCISE_LINTS, lint_run_in_order],
}


def main(names: list[str]) -> int:
    problems = [problem for name in names for problem in lint(Path(name).resolve())]
    print("\n".join(problems) or f"{len(names)} notebooks pass every lint.")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
