"""The reading path is what a default `generate` runs and the lessons show, and it stays short."""

import re

import pytest

from authoring import reading_path
from authoring.reading_path import TRACED, code_lines, definitions, lines_by_lesson, lines_of
from course.lessons import FILES_OF_LESSON, PATH

MAX_LINES = 1200
LISTED = {
    (file, name) for files in PATH.values() for file, names in files.items() for name in names
}

SHOWN = re.compile(r'^show_from\("nanovllm/(kernels/\w+\.py)", ([^)]+)\)', re.MULTILINE)


@pytest.fixture(scope="module")
def traced():
    calls = reading_path.trace_generate(str(reading_path.ROOT / "checkpoints/storyteller"))
    return {(file, name) for file, name in calls if file.split("/")[0] in TRACED}


def test_the_path_lists_every_function_that_a_default_generate_runs(traced):
    assert len(traced) > 100
    assert sorted(traced - LISTED) == []


def test_what_else_is_listed_is_shown_by_a_lesson(traced):
    """A function that no run needs and no lesson shows would only make the path longer."""
    sources = {
        lesson: (reading_path.ROOT / f"notebooks/source/{lesson}.py").read_text(encoding="utf-8")
        for lesson in PATH
    }
    for lesson, files in PATH.items():
        for file, names in files.items():
            for name in {name for name in names if (file, name) not in traced}:
                words = name.split(".")
                shown = all(word in sources[lesson] for word in words if word != "__init__")
                assert shown, f"{lesson} does not show {name} of {file}"


def test_the_path_lists_every_kernel_that_a_lesson_shows():
    shown = set()
    for lesson in PATH:
        source = (reading_path.ROOT / f"notebooks/source/{lesson}.py").read_text(encoding="utf-8")
        for file, names in SHOWN.findall(source):
            shown |= {(file, name) for name in re.findall(r'"(\w+)"', names)}
    assert len(shown) >= 5
    assert sorted(shown - LISTED) == []


def test_the_path_is_short():
    assert sum(lines_by_lesson().values()) <= MAX_LINES


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
def test_the_pages_state_the_size_of_the_engine(page):
    files = [path.relative_to(reading_path.ENGINE) for path in reading_path.ENGINE.rglob("*.py")]
    total = sum(len(code_lines(file.as_posix())) for file in files)
    text = " ".join((reading_path.ROOT / page).read_text(encoding="utf-8").split())
    assert f"about {round(total, -2):,} lines" in text
    assert f"at most {MAX_LINES:,} lines" in text


def test_every_listed_function_exists_once():
    assert len(LISTED) == sum(len(names) for files in PATH.values() for names in files.values())
    for file, name in LISTED:
        assert name in definitions(file), f"{file} has no {name}"


def test_the_path_is_in_the_order_of_the_lessons():
    assert list(PATH) == list(FILES_OF_LESSON)


def test_lines_are_counted_without_blank_lines_comments_and_docstrings(tmp_path, monkeypatch):
    source = '''"""A module."""

X = 1  # counted, but on no path


class A:
    """A class."""

    field: int = 0  # the head of A

    @property
    def f(self):
        """A method."""
        # a comment
        return [
            self.field
        ]

    def g(self): return 1
'''
    (tmp_path / "a.py").write_text(source)
    monkeypatch.setattr(reading_path, "ENGINE", tmp_path)
    assert len(code_lines("a.py")) == 9
    assert len(lines_of("a.py", ["A.f"])) == 2 + 5  # `class A:`, the field, and f with @property
    assert len(lines_of("a.py", ["A.f", "A.g"])) == 8
