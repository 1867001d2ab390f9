"""How long the course takes: each lesson's card beside an estimate, and the exercises.

    course minutes            the table, with words, lines and cells
    course minutes --write    the sums into docs/lessons.md, between its MINUTES marks

The estimate is counted from the stored pages: reading at a steady pace, code line by line, a look
at what each cell shows, time to think at each *Predict*, and one run. Its paces are assumptions,
written below, not measurements of learners; correct them when you have timed a class.
"""

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "lessons.md"  # which shows the sums
CARD = re.compile(r"^\| Minutes \| (\d+) \|$", re.MULTILINE)
HOW_HARD = re.compile(r"^\| Difficulty \| (easy|medium|hard) \|$", re.MULTILINE)
EXERCISE = re.compile(r"^# \*\w+, (\d+) minutes\*$", re.MULTILINE)  # in solutions/NN_topic.py
PROMISED = re.compile(r"^\d\. \*\*[^*]+\*\* \((\d+) min", re.MULTILINE)  # at a lesson's end
MARKS = ("<!-- MINUTES: begin -->", "<!-- MINUTES: end -->")

WORDS_A_MINUTE = 160  # technical prose with formulas, read once
SECONDS_A_LINE = 5  # code written in the page; half of it is setup and printing
SECONDS_A_SHOWN_LINE = 2  # the engine's source, shown: half of it was built a moment ago
SECONDS_A_CELL = 10  # run it, look at what it shows
SECONDS_A_PREDICTION = 45
DIFFICULTY = {"easy": 1.0, "medium": 1.0, "hard": 1.25}  # a hard page is read twice in places
RUN_SECONDS = 40  # a page's run on two CPU cores, the average that lessons are held to


@dataclass(frozen=True)
class Lesson:
    """What was counted of one page. `card` and `exercises` are minutes, as written down."""

    stem: str
    card: int
    difficulty: str
    exercises: int
    words: int
    lines: int
    shown_lines: int
    cells: int
    predictions: int

    @property
    def estimate(self) -> float:
        """Minutes for the page, alone and at an even pace."""
        seconds = (
            60 * self.words / WORDS_A_MINUTE
            + SECONDS_A_LINE * self.lines
            + SECONDS_A_SHOWN_LINE * self.shown_lines
            + SECONDS_A_CELL * self.cells
            + SECONDS_A_PREDICTION * self.predictions
            + RUN_SECONDS
        )
        return DIFFICULTY[self.difficulty] * seconds / 60


def read_lessons() -> list[Lesson]:
    """Every stored page of notebooks/, in order."""
    return [count_lesson(path) for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))]


def count_lesson(path: Path) -> Lesson:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    prose = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    own_card, how_hard = CARD.search(prose), HOW_HARD.search(prose)
    if own_card is None or how_hard is None:
        raise ValueError(f"{path.name}: its card lacks `| Minutes | N |` or the difficulty")
    lesson, _, exercises = prose.partition("\n## Exercises")
    return Lesson(
        stem=path.stem,
        card=int(own_card[1]),
        difficulty=how_hard[1],
        exercises=exercise_minutes(path.stem, exercises),
        words=count_words(prose),
        lines=sum(map(count_lines, code)),
        shown_lines=sum(map(count_shown, code)),
        cells=len(code),
        predictions=lesson.count("**Predict**"),
    )


def exercise_minutes(stem: str, promised: str) -> int:
    """Minutes of a lesson's exercises: as each states them, or as the lesson promises."""
    source = ROOT / "solutions" / f"{stem}.py"
    if source.exists():
        return sum(map(int, EXERCISE.findall(source.read_text(encoding="utf-8"))))
    return sum(map(int, PROMISED.findall(promised)))


def count_words(markdown: str) -> int:
    """Words of prose: links by their text, without HTML tags and code blocks."""
    text = re.sub(r"```.*?```|</?\w[^>\n]*>|\]\([^)]*\)", " ", markdown, flags=re.S)
    return len(re.findall(r"\w[\w'-]*", text))


def count_lines(cell: dict[str, Any]) -> int:
    return sum(bool(line.strip()) for line in "".join(cell["source"]).splitlines())


def count_shown(cell: dict[str, Any]) -> int:
    """Lines of the engine's source among a cell's stored outputs."""
    if "show_source(" not in "".join(cell["source"]):
        return 0
    texts = (output.get("data", {}).get("text/plain", "") for output in cell["outputs"])
    return sum(bool(line.strip()) for text in texts for line in "".join(text).splitlines())


def hours(minutes: int) -> str:
    return f"{minutes / 60:.1f} hours"


def summary(lessons: list[Lesson]) -> str:
    """Return the table of PAGE."""
    rows = [f"| {x.stem[:2]} | {x.card} | {x.exercises or 'none'} |" for x in lessons]
    reading, doing = sum(x.card for x in lessons), sum(x.exercises for x in lessons)
    return "\n".join(
        [
            "| lesson | minutes | its exercises |",
            "|---|--:|--:|",
            *rows,
            f"| together | {hours(reading)} | {hours(doing)} |",
        ]
    )


def between_marks(page: str) -> str:
    """Return what a page holds between the two marks."""
    return page.split(MARKS[0])[1].split(MARKS[1])[0].strip()


def write_summary(path: Path, lessons: list[Lesson]) -> None:
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    middle = f"{MARKS[0]}\n{summary(lessons)}\n{MARKS[1]}"
    path.write_text(before + middle + after, encoding="utf-8")


def table(lessons: list[Lesson]) -> str:
    head = f"{'lesson':24}{'card':>6}{'estimate':>10}{'exercises':>11}"
    lines = [head + f"{'words':>8}{'lines':>7}{'shown':>7}{'cells':>7}{'predict':>9}"]
    for x in lessons:
        line = f"{x.stem:24}{x.card:>6}{x.estimate:>10.0f}{x.exercises:>11}"
        lines.append(
            line + f"{x.words:>8,}{x.lines:>7}{x.shown_lines:>7}{x.cells:>7}{x.predictions:>9}"
        )
    cards, estimates = sum(x.card for x in lessons), sum(x.estimate for x in lessons)
    lines.append(
        f"{'minutes':24}{cards:>6}{estimates:>10.0f}{sum(x.exercises for x in lessons):>11}"
    )
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--write", action="store_true", help="write the sums into docs/lessons.md")


def main(args: argparse.Namespace) -> int:
    lessons = read_lessons()
    print(table(lessons))
    if args.write:
        write_summary(PAGE, lessons)
        print("docs/lessons.md: written")
    return 0
