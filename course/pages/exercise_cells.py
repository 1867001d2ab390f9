"""One source of exercises, solutions/NN_topic.py, becomes two notebooks: stubs, and solutions.

A cell that the learner fills in carries the exercise's tag and a region:

    # %% tags=["exercise-top_p"]
    def top_p(logits, p):
        ### BEGIN SOLUTION sort the probabilities, then see which are needed to reach p
        ...
        ### END SOLUTION

In exercises/ the region becomes a comment that says how many lines are missing, and a
NotImplementedError with the text after BEGIN SOLUTION. Where something else shall stand there (a
planted bug, an answer to fill in), it follows as comments:

        ### BEGIN SOLUTION
        return a // b
        ### INSTEAD
        # return a / b
        ### END SOLUTION

In markdown, a line `{{solution top_p}}` becomes the solution, as the third hint: its region, or the
whole cells if there are several.
"""

import re
import textwrap
from dataclasses import dataclass
from typing import Any

REGION = re.compile(
    r"^(?P<indent> *)### BEGIN SOLUTION *(?P<todo>[^\n]*)\n(?P<solution>.*?)"
    r"(?:^ *### INSTEAD\n(?P<instead>.*?))?^ *### END SOLUTION$",
    re.MULTILINE | re.DOTALL,
)
HEADING = re.compile(
    r"^## (?P<number>\d+) · (?P<kind>Predict|Implement|Break and fix): (?P<title>.+)\n+"
    r"\*(?P<difficulty>easy|medium|hard), (?P<minutes>\d+) minutes\b[^*\n]*\*$",
    re.MULTILINE,
)
TAG = "exercise-"
COLUMNS = 100
HINT = re.compile(r"^\{\{solution (?P<name>\w+)\}\}$", re.MULTILINE)


@dataclass(frozen=True)
class Exercise:
    """One exercise of a lesson, as its heading says."""

    name: str  # of its tag, and of its check
    kind: str  # Predict, Implement, or Break and fix
    title: str
    difficulty: str
    minutes: int


def name_of(cell: Any) -> str | None:
    """The exercise whose code this cell holds; None if it is an ordinary cell."""
    names = [t.removeprefix(TAG) for t in cell["metadata"].get("tags", []) if t.startswith(TAG)]
    return names[0] if names else None


def regions_of(cells: list[Any], name: str) -> list[re.Match[str]]:
    """The solution regions of one exercise, in the cells of a source."""
    return [region for c in cells if name_of(c) == name for region in REGION.finditer(c["source"])]


def count_lines(code: str) -> int:
    """Lines that hold code."""
    return sum(bool(line.strip()) and line.strip()[0] != "#" for line in code.splitlines())


def solution_of(source: str) -> str:
    return REGION.sub(lambda region: region["solution"].rstrip("\n"), source)


def stub_of(source: str) -> str:
    return REGION.sub(stub, source)


def stub(region: re.Match[str]) -> str:
    """What stands in the exercise notebook in place of a region."""
    if region["instead"]:
        return re.sub(r"^( *)# ?", r"\1", region["instead"].rstrip("\n"), flags=re.MULTILINE)
    count = count_lines(region["solution"])
    todo = f'raise NotImplementedError("{region["todo"]}")'
    if len(region["indent"] + todo) > COLUMNS:
        todo = f'raise NotImplementedError(\n    "{region["todo"]}"\n)'
    lines = f"# your code: about {count} line{'s' * (count > 1)}\n{todo}"
    return textwrap.indent(lines, region["indent"])


def exercises_in(cells: list[Any]) -> list[Exercise]:
    """The exercises, in order: each has a heading, and then a code cell with its tag."""
    found: list[Exercise] = []
    heading = None
    for cell in cells:
        if cell["cell_type"] == "markdown":
            heading = HEADING.search(cell["source"]) or heading
        elif (name := name_of(cell)) and (not found or found[-1].name != name):
            if heading is None:
                raise ValueError(f"{TAG}{name}: before it stands no heading like {HEADING.pattern}")
            kind, title, difficulty = heading["kind"], heading["title"], heading["difficulty"]
            found.append(Exercise(name, kind, title, difficulty, int(heading["minutes"])))
            heading = None
    return found


def with_hints(markdown: str, cells: list[Any]) -> str:
    """Markdown with each `{{solution name}}` replaced by that exercise's solution."""

    def code(hint: re.Match[str]) -> str:
        regions = regions_of(cells, hint["name"])
        if not regions:
            raise ValueError(f"{hint[0]}: no cell with the tag {TAG}{hint['name']} has a region")
        texts = [textwrap.dedent(region["solution"]).rstrip() for region in regions]
        if len(texts) > 1:  # show where each belongs
            texts = [solution_of(c["source"]) for c in cells if name_of(c) == hint["name"]]
        return "```python\n" + "\n\n".join(texts) + "\n```"

    return HINT.sub(code, markdown)


def transform(cells: list[Any], kind: str) -> None:
    """Turn the cells of a source, in place, into those of "exercises" or of "solutions"."""
    change = stub_of if kind == "exercises" else solution_of
    texts = [
        with_hints(c.source, cells) if c.cell_type == "markdown" else change(c.source)
        for c in cells
    ]
    for cell, text in zip(cells, texts, strict=True):
        if re.search(r"^ *### ", text, re.MULTILINE) and cell.cell_type == "code":
            raise ValueError(f"a region without an end, or a stray marker, in:\n{text}")
        cell.source = text
