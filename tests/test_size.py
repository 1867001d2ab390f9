"""The engine stays small enough to read in a day, and every file of it belongs to one lesson."""

import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

import pytest

from course.lessons import FILES_OF_LESSON

ROOT = Path(__file__).resolve().parent.parent
ENGINE = ROOT / "nanovllm"
LIMITS = {"core": 1616, "front door": 574, "kernels": 541}
NOT_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def count_code_lines(source: str) -> int:
    """Lines that hold code: blank lines, comments and docstrings are free."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NOT_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstring_lines(source))


def docstring_lines(source: str) -> set[int]:
    lines: set[int] = set()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            lines.update(range(first.lineno, first.end_lineno + 1))
    return lines


def group_of(path: Path) -> str:
    if path.name == "kernels.py":
        return "kernels"
    return "front door" if path.parent == ENGINE else "core"


def sizes() -> Counter[str]:
    total: Counter[str] = Counter()
    for path in ENGINE.rglob("*.py"):
        total[group_of(path)] += count_code_lines(path.read_text())
    return total


def test_the_counter_counts_code_alone():
    source = '"""Module."""\n\n# comment\nx = 1  # one\n\n\ndef f():\n    """Doc\n    string."""\n'
    source += '    text = """two\n    lines"""\n    return (\n        text\n    )\n'
    assert count_code_lines(source) == 1 + 1 + 2 + 3


@pytest.mark.parametrize("group", LIMITS)
def test_size_stays_within_its_limit(group):
    lines, limit = sizes()[group], LIMITS[group]
    assert lines <= limit, f"{group}: {lines} lines of code, the limit is {limit}"


def test_the_readme_states_the_limits():
    readme = (ROOT / "README.md").read_text()
    for limit in LIMITS.values():
        assert f"{limit:,} lines" in readme


def test_every_file_of_the_engine_has_exactly_one_lesson():
    in_lessons = Counter(name for files in FILES_OF_LESSON.values() for name in files)
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


@pytest.mark.parametrize("folder", ["nanovllm", "course"])
def test_every_module_says_what_it_is(folder):
    for path in (ROOT / folder).rglob("*.py"):
        source = path.read_text()
        assert not source.strip() or ast.get_docstring(ast.parse(source)), path
