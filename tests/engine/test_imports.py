"""Imports inside nanovllm/ go one way, and no file of it is too long to read.

ORDER lists the parts of the engine from top to bottom. A module may import its own part and the
parts below it, so no folder imports one that imports it.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
while not (ROOT / "nanovllm").is_dir():
    ROOT = ROOT.parent
ENGINE = ROOT / "nanovllm"

# Parts on one line import nothing of each other. A part is a folder, or a file of nanovllm/.
ORDER = [
    {"__init__", "entrypoints"},  # names for users
    {"llm"},
    {"engine"},
    {"frontend"},  # what comes in and what goes out, from prompts to text
    {"checkpoint"},
    {"models"},
    {"layers"},
    {"kernels"},
    {"metadata", "distributed"},
    {"config", "sampling_params", "inputs", "outputs"},  # plain data that every part may name
    {"logprobs"},
    {"validation", "utils"},
]
LEVELS = {part: level for level, parts in enumerate(ORDER) for part in parts}

# Modules that are not yet where they belong, as (module, what it imports). Remove what is moved.
NOT_YET_MOVED: set[tuple[str, str]] = set()

MAX_CODE_LINES = 250
# Files that are too long today. A file that no longer needs its exception must lose it.
TOO_LONG: set[str] = set()


def part_of(module: str) -> str:
    """Return the part of the engine that a module such as nanovllm.engine.scheduler belongs to."""
    names = module.split(".")
    return names[1] if len(names) > 1 else "__init__"


def module_name(path: Path) -> str:
    names = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def imports_of(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """Yield the modules of nanovllm that a source imports anywhere, also in code that it quotes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] == "nanovllm")
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                origin = ".".join([*parents, *filter(None, [origin])])
            if origin == "nanovllm":  # the name may be a module or something that __init__ holds
                yield from (submodule_or_package(name.name) for name in node.names)
            elif origin.startswith("nanovllm."):
                yield origin
        elif isinstance(node, ast.Constant) and is_code(node.value):
            yield from imports_of(node.value, module)


def submodule_or_package(name: str) -> str:
    exists = (ENGINE / name).is_dir() or (ENGINE / f"{name}.py").is_file()
    return f"nanovllm.{name}" if exists else "nanovllm"


def is_code(value: object) -> bool:
    """Return whether a string is Python code that imports nanovllm, as a worker's code is."""
    if not isinstance(value, str) or "nanovllm" not in value or "import" not in value:
        return False
    try:
        ast.parse(value)
    except SyntaxError:
        return False
    return True


def wrong_arrows(source: str, module: str, is_package: bool = False) -> set[tuple[str, str]]:
    """Return (module, imported) for each import of the module's level or of one above it."""
    own = part_of(module)
    return {
        (module, imported)
        for imported in imports_of(source, module, is_package)
        if part_of(imported) != own and LEVELS[part_of(imported)] <= LEVELS[own]
    }


def code_lines(source: str) -> int:
    """Return the number of lines that hold code: no blank lines, comments or docstrings."""
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped and token.type != tokenize.ENDMARKER:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def test_every_part_has_a_place_in_the_order():
    parts = {part_of(module_name(path)) for path in ENGINE.rglob("*.py")}
    assert parts <= LEVELS.keys(), f"add these to ORDER: {sorted(parts - LEVELS.keys())}"


def test_imports_go_one_way():
    wrong: set[tuple[str, str]] = set()
    for path in ENGINE.rglob("*.py"):
        module = module_name(path)
        wrong |= wrong_arrows(path.read_text(), module, path.name == "__init__.py")
    new = sorted(wrong - NOT_YET_MOVED)
    assert not new, "these imports point upwards:\n" + "\n".join(f"{a} -> {b}" for a, b in new)
    mended = sorted(NOT_YET_MOVED - wrong)
    assert not mended, f"remove these from NOT_YET_MOVED: {mended}"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("nanovllm.kernels.store", "from nanovllm.layers import attention"),
        ("nanovllm.checkpoint.hub", "def f():\n    from nanovllm.engine.memory import x"),
        ("nanovllm.distributed.launch", "CODE = 'from nanovllm.engine.worker import run_worker'"),
        ("nanovllm.distributed.ranks", "from nanovllm.metadata import x"),
        ("nanovllm.validation.fields", "import nanovllm"),
        ("nanovllm.engine.core", "from nanovllm import LLM"),
        ("nanovllm.frontend.chat", "from ..engine import core"),
    ],
)
def test_an_import_that_points_upwards_is_found(module, source):
    assert len(wrong_arrows(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("nanovllm.engine.core", "from nanovllm.engine.scheduler import Scheduler"),
        ("nanovllm.engine.core", "from .scheduler import Scheduler"),
        ("nanovllm.frontend.chat", "from nanovllm import validation"),
        ("nanovllm.layers.sampler", "import torch, nanovllm.distributed.ranks"),
        ("nanovllm.validation.fields", '"""See `from nanovllm import LLM`."""'),
    ],
)
def test_an_import_that_points_downwards_is_allowed(module, source):
    assert not wrong_arrows(source, module)


def test_no_file_is_too_long():
    counts = {
        str(path.relative_to(ENGINE)): code_lines(path.read_text()) for path in ENGINE.rglob("*.py")
    }
    long = {name for name, count in counts.items() if count > MAX_CODE_LINES}
    new = {name: counts[name] for name in sorted(long - TOO_LONG)}
    assert not new, f"files with more than {MAX_CODE_LINES} lines of code: {new}"
    assert not TOO_LONG - long, f"remove these from TOO_LONG: {sorted(TOO_LONG - long)}"


def test_comments_docstrings_and_blank_lines_are_no_code():
    source = '"""Two\nlines."""\n\n# a comment\nx = [\n    1,  # one\n]\ntext = """a\nb"""\n'
    assert code_lines(source) == 5


def test_the_architecture_page_lists_the_parts_in_this_order():
    page = (ROOT / "docs/architecture.md").read_text()
    table = re.findall(r"^\| ((?:`\w+/?`(?:, )?)+) \|", page, flags=re.MULTILINE)
    listed = [re.findall(r"`(\w+/?)`", cell) for cell in table]
    assert [{name.rstrip("/") for name in names} for names in listed] == ORDER
    folders = {name.rstrip("/") for names in listed for name in names if name.endswith("/")}
    assert folders == {part for part in LEVELS if (ENGINE / part).is_dir()}
