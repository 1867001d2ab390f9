"""Imports inside course/ go one way, and no module of it imports the authors' tools.

ORDER lists the parts of course/ from top to bottom. A module may import its own part and the parts
below it, so there is no cycle between parts and no folder imports one that imports it.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from course.clone import ROOT

# Parts on one line import nothing of each other. A part is a folder, or a file of course/.
ORDER = [
    {"__main__"},
    {"cli"},
    {"commands"},
    {"labs", "checks"},  # what lessons and exercises call
    {"drawings", "benchmarks", "pages"},
    {"show"},
    {"stages"},
    {"serving", "measure"},
    {"models"},
    {"machine", "processes", "files", "lessons", "arguments", "rank_threads"},
    {"clone"},
    {"__init__"},
]
LEVELS = {part: level for level, parts in enumerate(ORDER) for part in parts}
OUTSIDE = ("authoring", "tests", "checkpoints")  # they import course, and course imports none


def part_of(module: str) -> str:
    """Return the part that a module such as course.stages.paged belongs to."""
    return module.split(".")[1] if "." in module else "__init__"


def module_name(path: Path) -> str:
    names = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def imports_of(source: str) -> Iterator[str]:
    """Yield the modules that a source imports anywhere, also in functions and in quoted code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            assert not node.level, "course/ imports by full names"
            yield from (f"course.{n.name}" for n in node.names) if origin == "course" else [origin]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_module":
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant))
        elif isinstance(node, ast.Constant) and is_code(node.value):
            yield from imports_of(node.value)


def is_code(value: object) -> bool:
    """Return whether a string is Python code that imports course, as a worker's code is."""
    if not isinstance(value, str) or "course" not in value or "import" not in value:
        return False
    try:
        ast.parse(value)
    except SyntaxError:
        return False
    return True


def wrong_arrows(source: str, module: str) -> set[tuple[str, str]]:
    """Return (module, imported) for each import of the module's level or of one above it."""
    own, found = part_of(module), set()
    for imported in imports_of(source):
        package = imported.split(".")[0]
        if package in OUTSIDE:
            found.add((module, imported))
        elif package == "course" and part_of(imported) != own:
            found |= {(module, imported)} if LEVELS[part_of(imported)] <= LEVELS[own] else set()
    return found


def test_every_part_has_a_place_in_the_order():
    parts = {part_of(module_name(path)) for path in (ROOT / "course").rglob("*.py")}
    assert parts == LEVELS.keys(), f"ORDER and course/ differ in {sorted(parts ^ LEVELS.keys())}"


def test_imports_go_one_way():
    wrong: set[tuple[str, str]] = set()
    for path in (ROOT / "course").rglob("*.py"):
        wrong |= wrong_arrows(path.read_text(encoding="utf-8"), module_name(path))
    listed = "\n".join(f"{module} -> {imported}" for module, imported in sorted(wrong))
    assert not wrong, f"these imports point upwards:\n{listed}"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("course.checks.core", "def f():\n    from course.commands.progress import x"),
        ("course.stages.common", "from course.benchmarks import attention"),
        ("course.checks.lesson07", "from course.labs.two_loops import x"),
        ("course.models.choice", "CODE = 'from course.measure.timing import measure'"),
        ("course.clone", "from course import machine"),
        ("course.pages.jobs", "from authoring.execute import run_notebook"),
        ("course.labs.kernel_lab", "import_module('course.commands.run')"),
    ],
)
def test_an_import_that_points_upwards_is_found(module, source):
    assert len(wrong_arrows(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("course.checks.core", "from course.checks.limits import time_limit"),
        ("course.commands.run", "from course.models.choice import pick_model"),
        ("course.labs.paging", "import torch, course.stages.paged"),
    ],
)
def test_an_import_that_points_downwards_is_allowed(module, source):
    assert not wrong_arrows(source, module)
