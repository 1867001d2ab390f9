"""Every file of the engine has one lesson or is off the path, and every module says what it is."""

import ast
from collections import Counter
from pathlib import Path

import pytest

from course.lessons import FILES_OF_LESSON, OFF_THE_PATH

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ROOT / "nanovllm"


def test_every_file_of_the_engine_has_exactly_one_lesson_or_none():
    in_lessons = Counter(name for files in FILES_OF_LESSON.values() for name in files)
    in_lessons.update(OFF_THE_PATH)
    twice = [name for name, count in in_lessons.items() if count > 1]
    assert not twice, f"in more than one lesson: {twice}"
    files = {str(path.relative_to(ENGINE)) for path in ENGINE.rglob("*.py")}
    files = {name for name in files if not name.endswith("__init__.py")}
    assert not files - set(in_lessons), f"no lesson ends in: {sorted(files - set(in_lessons))}"
    missing = set(in_lessons) - files
    assert not missing, f"lessons name files that are not there: {sorted(missing)}"


def test_init_files_hold_no_logic():
    """An __init__ belongs to no lesson: a docstring, imports and __all__ at most."""
    for path in ENGINE.rglob("__init__.py"):
        for node in ast.parse(path.read_text()).body:
            allowed = (ast.Import, ast.ImportFrom, ast.Expr, ast.Assign)
            assert isinstance(node, allowed), f"{path}:{node.lineno}"


def test_lessons_are_numbered_in_order():
    numbers = [int(stem.split("_")[0]) for stem in FILES_OF_LESSON]
    assert numbers == list(range(10))


@pytest.mark.parametrize("folder", ["nanovllm", "course", "authoring", "checkpoints"])
def test_every_module_says_what_it_is(folder):
    for path in (ROOT / folder).rglob("*.py"):
        source = path.read_text()
        assert not source.strip() or ast.get_docstring(ast.parse(source)), path
