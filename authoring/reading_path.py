"""The reading path: the functions of the engine that lessons 00 to 09 explain, and their lines.

    python -m authoring.reading_path          # the code lines of each lesson, and their sum
    python -m authoring.reading_path trace    # the functions that a default `generate` runs

A learner who has finished these lessons must understand every function that a default `generate`
runs on a CPU in the folders of `TRACED`, and what the lessons show of the kernels, the CUDA graphs
and the tensor-parallel layers. `course.lessons.PATH` lists these functions lesson by lesson.
tests/authoring/test_reading_path.py compares the list with a traced run, so that no function can be
left out to make the path look shorter.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from typing import Any

from course.clone import ROOT
from course.lessons import PATH

ENGINE = ROOT / "nanovllm"
TRACED = ("engine", "models", "layers")
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def trace_generate(model: str) -> set[tuple[str, str]]:
    """The (file, qualified name) of each function of the engine that a default `generate` runs.

    Two prompts share a beginning and one stands apart, and every argument has its default. Loading
    the model is not traced. The run has a process of its own, because what an earlier test has
    imported or cached must not hide a function.
    """
    command = [sys.executable, "-c", TRACER, model, str(ENGINE)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    calls = json.loads(done.stdout.splitlines()[-1])
    return {(file, name.partition(".<locals>")[0]) for file, name in calls}


TRACER = """
import json, sys
from nanovllm import LLM, SamplingParams

model, engine = sys.argv[1:]
calls = set()


def note(frame, event, argument):
    code = frame.f_code
    if event == "call" and code.co_filename.startswith(engine):
        calls.add((code.co_filename[len(engine) + 1 :], code.co_qualname))


prompts = ["Once upon a time there was a dog", "Once upon a time there was a cat", "The sun"]
with LLM(model, use_tqdm_on_load=False) as llm:
    sys.setprofile(note)
    llm.generate(prompts, SamplingParams(max_tokens=24), use_tqdm=False)
    sys.setprofile(None)
print(json.dumps(sorted(calls)))
"""


@cache
def definitions(file: str) -> dict[str, Any]:
    """Every function and class of a file of the engine by its qualified name, as syntax trees."""
    found: dict[str, Any] = {}

    def collect(body: Iterable[Any], prefix: str) -> None:
        for node in body:
            if isinstance(node, DEFINITIONS):
                found[prefix + node.name] = node
                if isinstance(node, ast.ClassDef):
                    collect(node.body, f"{prefix}{node.name}.")

    collect(ast.parse((ENGINE / file).read_text(encoding="utf-8")).body, "")
    return found


@cache
def code_lines(file: str) -> frozenset[int]:
    """The numbers of a file's lines that hold code: no blank lines, comments or docstrings."""
    source = (ENGINE / file).read_text(encoding="utf-8")
    lines = {
        number
        for number, line in enumerate(source.splitlines(), start=1)
        if line.strip() and not line.strip().startswith("#")
    }
    for node in ast.walk(ast.parse(source)):
        first = node.body[0] if isinstance(node, (ast.Module, *DEFINITIONS)) and node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            lines -= span(first)
    return frozenset(lines)


def lines_of(file: str, names: Iterable[str]) -> set[int]:
    """The code lines of functions of one file, and of the heads of their classes.

    A class's head is all of it that is no method: the `class` line, decorators and fields.
    """
    found, lines = definitions(file), set()
    for name in names:
        lines |= span(found[name])
        if owner := name.rpartition(".")[0]:
            methods = [node for node in found[owner].body if isinstance(node, DEFINITIONS)]
            lines |= span(found[owner]).difference(*map(span, methods))
    return lines & code_lines(file)


def span(node: Any) -> set[int]:
    """The numbers of all lines of a statement, with its decorators."""
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
    return set(range(first, node.end_lineno + 1))


def lines_by_lesson() -> dict[str, int]:
    """The code lines that each lesson adds to the path. No line counts twice."""
    seen: dict[str, set[int]] = {}
    counts = {}
    for lesson, files in PATH.items():
        counts[lesson] = 0
        for file, names in files.items():
            new = lines_of(file, names) - seen.setdefault(file, set())
            seen[file] |= new
            counts[lesson] += len(new)
    return counts


def main() -> None:
    if sys.argv[1:] == ["trace"]:
        for file, name in sorted(trace_generate(str(ROOT / "checkpoints/storyteller"))):
            print(f"{file}: {name}")
        return
    counts = lines_by_lesson()
    for lesson, count in counts.items():
        print(f"{count:6,}  {lesson}")
    print(f"{sum(counts.values()):6,}  in all")


if __name__ == "__main__":
    main()
