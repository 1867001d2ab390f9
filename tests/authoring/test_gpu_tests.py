"""`make test-gpu` on a machine without a GPU: its parts, what they keep, and whose Python they use.

The option --on-cpu runs planted parts here, so that everything but the GPU's own tests is tried.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from nbformat.v4 import new_notebook
from planted import code, write
from test_notebook_run import nbval_flags

from authoring import gpu_tests
from authoring.gpu_tests import Part

ROOT = Path(__file__).resolve().parents[2]
PARTS = {part.name: part for part in gpu_tests.all_parts()}
GOOD = "def test_good():\n    pass\n"
BAD = "def test_bad():\n    assert 1 == 2\n"
STOPS = GOOD + "\ndef test_stops():\n    import os, signal\n\n"
STOPS += "    os.kill(os.getpid(), signal.SIGINT)\n"
CRASHES = GOOD + "\ndef test_crashes():\n    import os\n\n    os._exit(3)\n"


# -- which tests are in which part -----------------------------------------------------------------


def test_every_notebook_and_every_gpu_test_is_in_exactly_one_part():
    files = [file for part in PARTS.values() for file in part.files if not part.options]
    kernels = (ROOT / "tests/gpu").glob("test_*kernels.py")
    wanted = {f"tests/gpu/{path.name}" for path in kernels}
    for folder in ("notebooks", "solutions"):
        wanted |= {f"{folder}/{path.name}" for path in (ROOT / folder).glob("*.ipynb")}
    assert len(wanted) > 20
    assert sorted(files) == sorted(wanted)
    mark = re.compile(r"^\s*@?pytest\.mark\.gpu\b", re.MULTILINE)
    marked = [path.name for path in (ROOT / "tests").rglob("*.py") if mark.search(path.read_text())]
    assert marked == ["test_gpu.py"]


def test_the_two_parts_of_the_engine_are_complements():
    one, two = PARTS["engine-1"], PARTS["engine-2"]
    assert one.files == two.files == ("tests/gpu/test_gpu.py",)
    word = one.options[1]
    assert (one.options, two.options) == (("-k", word), ("-k", f"not {word}"))
    tests = re.findall(r"^def (test_\w+)", (ROOT / one.files[0]).read_text(), re.MULTILINE)
    chosen = [name for name in tests if word in name]
    assert 0 < len(chosen) < len(tests)


def test_notebooks_run_as_in_make_test():
    assert list(gpu_tests.NBVAL) == nbval_flags()
    assert set(gpu_tests.NBVAL) <= set(PARTS["solutions"].command(Path("result.xml")))


def test_a_groups_name_stands_for_its_parts():
    names = [part.name for part in gpu_tests.chosen_parts("engine")]
    assert names == ["engine-1", "engine-2"]
    assert [part.name for part in gpu_tests.chosen_parts("all")] == list(PARTS)


def test_the_workflow_runs_every_part_and_reports():
    workflow = yaml.safe_load((ROOT / ".github/workflows/gpu.yml").read_text())
    steps = workflow["jobs"]["test-gpu"]["steps"]
    made = [step["run"] for step in steps if step.get("run", "").startswith("make test-gpu")]
    assert made == [f"make test-gpu-{name}" for name in ("prepare", *PARTS, "report")]


def test_only_lessons_take_arguments_of_pytest(capsys):
    assert gpu_tests.parse(["all", "--store-outputs"]).extra == ["--store-outputs"]
    with pytest.raises(SystemExit):
        gpu_tests.parse(["kernels", "--store-outputs"])
    assert "only the lessons pass arguments on to pytest" in capsys.readouterr().err


# -- a Python from outside -------------------------------------------------------------------------


def dry_make(*arguments: str, cwd: Path) -> str:
    command = [
        "make",
        "--no-print-directory",
        "--dry-run",
        "-f",
        str(ROOT / "Makefile"),
        *arguments,
    ]
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("target", ["test-gpu", "test-gpu-engine-1", "test-gpu-report"])
def test_a_given_python_is_used_and_nothing_is_installed(target, tmp_path):
    plan = dry_make(target, "USE_PYTHON=some-python", "ARGS=--seconds 9", cwd=tmp_path)
    name = target.removeprefix("test-gpu-").replace("test-gpu", "all")
    assert plan == f"some-python -m authoring.gpu_tests {name} --seconds 9\n"


def test_without_a_given_python_the_environment_is_made_first(tmp_path):
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    *before, last = dry_make("test-gpu-engine-1", cwd=tmp_path).splitlines()
    assert last.strip() == ".venv/bin/python -m authoring.gpu_tests engine-1"
    assert any("pip" in line and "install" in line for line in before)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(gpu_tests, "find_spec", lambda name: None if "n" in name else "found")
    with pytest.raises(SystemExit, match="cannot import triton") as error:
        gpu_tests.probe([PARTS["kernels"]], on_cpu=True)
    for name in ("transformers", sys.executable, "PYTHONPATH"):
        assert name in str(error.value)
    assert "ipykernel" not in str(error.value)  # which kernels do not need


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_earlier_results_stay(monkeypatch, tmp_path):
    (tmp_path / "kernels.xml").touch()
    with pytest.raises(SystemExit, match=r"needs an NVIDIA GPU that torch sees\. This is .*torch"):
        gpu_tests.main(["kernels", "--results", str(tmp_path)])
    assert (tmp_path / "kernels.xml").exists()


# -- a part runs, and its result is kept -----------------------------------------------------------


@pytest.fixture
def planted(monkeypatch, tmp_path):
    """planted({"name": "a test file's text", ...}): these parts in place of the real ones."""
    monkeypatch.setattr(gpu_tests, "probe", lambda parts, on_cpu: "this machine; torch 0")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # which saves a second each time

    def plant(texts: dict[str, str]) -> list[str]:
        parts = []
        for name, text in texts.items():
            (tmp_path / f"test_{name}.py").write_text(text)
            options = ("-c", os.devnull, "-p", "no:cacheprovider", f"--rootdir={tmp_path}")
            parts.append(Part(name, (str(tmp_path / f"test_{name}.py"),), options))
        monkeypatch.setattr(gpu_tests, "all_parts", lambda: parts)
        return ["--on-cpu", "--results", str(tmp_path / "results")]

    return plant


def test_all_parts_run_and_the_report_covers_them(planted, capfd):
    options = planted({"bad": BAD, "good": GOOD})
    assert gpu_tests.main(["all", *options]) == 1
    printed = capfd.readouterr().out
    assert re.search(r"test_good.py::test_good PASSED in 0\.\d s", printed)
    *_, report = printed.partition("\nthis machine; torch 0\n")
    for line in ("part bad: FAILED", "part good: passed", "in all: 1 passed, 1 failed"):
        assert re.search(rf"^ +\d+\.\d s  {line}$", report, re.MULTILINE), report


def test_a_part_that_has_not_run_is_named(planted, capfd):
    options = planted({"one": GOOD, "two": GOOD})
    assert gpu_tests.main(["one", *options]) == 0
    assert gpu_tests.main(["report", *options]) == 1
    report = capfd.readouterr().out
    assert re.search("part one: passed\n +part two: HAS NOT RUN", report)
    assert gpu_tests.main(["two", *options]) == 0
    assert gpu_tests.main(["report", *options]) == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (STOPS, "STOPPED BEFORE ITS END"),
        (CRASHES, r"BROKE OFF \(exit code 3\)"),
        ("", "FOUND NO TESTS"),
    ],
    ids=["interrupted", "crashed", "empty"],
)
def test_a_part_that_does_not_end_is_no_success(planted, capfd, text, words):
    options = planted({"part": text})
    assert gpu_tests.main(["part", *options]) == 1
    capfd.readouterr()
    assert gpu_tests.main(["report", *options]) == 1
    report = capfd.readouterr().out
    assert re.search(f"part part: {words}", report)
    assert ("1 passed" in report) == (text == STOPS)  # what an interrupted part had found


def test_a_part_is_stopped_when_its_time_is_over(planted, capfd):
    text = "def test_hangs():\n    import time\n\n    time.sleep(600)\n"
    options = planted({"part": text})
    assert gpu_tests.main(["part", *options, "--seconds", "0.1"]) == 1
    assert "part: stopped after 0.1 s" in capfd.readouterr().out
    gpu_tests.main(["report", *options])
    assert re.search("part part: (STOPPED|BROKE)", capfd.readouterr().out)


def test_a_part_does_not_interpret_its_kernels(planted, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    text = "import os\n\ndef test_it():\n    assert 'TRITON_INTERPRET' not in os.environ\n"
    assert gpu_tests.main(["part", *planted({"part": text})]) == 0


def test_a_notebook_finds_what_only_pythonpath_holds(planted, monkeypatch, tmp_path):
    """As where Jupyter lies in a folder of its own: the kernel is this Python, with its path."""
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "carried.py").write_text("here = True\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "target"))
    cell = f"import sys, carried, course\nassert sys.executable == {sys.executable!r}\n"
    cell += f"assert course.__file__.startswith({str(ROOT)!r})"
    notebook = write(new_notebook(cells=[code(1, cell, "")]), tmp_path, "page.ipynb")
    options = planted({})
    monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD")  # nbval is a plugin
    flags = ("-c", os.devnull, "-p", "no:cacheprovider", f"--rootdir={tmp_path}")
    part = Part("page", (str(tmp_path / "page.ipynb"),), flags)
    monkeypatch.setattr(gpu_tests, "all_parts", lambda: [part])
    assert part.has_notebooks
    assert gpu_tests.main(["page", *options]) == 0, notebook


def test_notebooks_are_prepared_for_before_they_are_timed(planted, monkeypatch, tmp_path):
    order = []
    monkeypatch.setattr(gpu_tests, "prepare", lambda: order.append("prepare"))
    monkeypatch.setattr(gpu_tests, "run", lambda part, *_: order.append(part.name) or 0)
    options = ["--results", str(tmp_path)]
    assert gpu_tests.main(["engine-1", *options]) == gpu_tests.main(["lessons", *options]) == 0
    assert order == ["engine-1", "prepare", "lessons-1", "lessons-2"]


def test_preparing_makes_the_lessons_model(monkeypatch, capfd):
    monkeypatch.setattr(gpu_tests, "random_model_dir", lambda: Path("/made/model"))
    assert gpu_tests.main(["prepare"]) == 0
    assert "/made/model" in capfd.readouterr().out


# -- the report over all parts ---------------------------------------------------------------------

CASES = {
    "good": '<testcase classname="notebooks.a" name="Cell 0" time="1.5"><system-out/></testcase>',
    "bad": '<testcase classname="notebooks.a" name="C" time="0.5"><failure>x</failure></testcase>',
    "worse": '<testcase classname="tests.b" name="t" time="0"><error>x</error></testcase>',
    "away": '<testcase classname="tests.b" name="u" time="0"><skipped message="none"/></testcase>',
    "file": '<testcase classname="" name="tests.c" time="0"><skipped message="none"/></testcase>',
}


H200, H100 = "NVIDIA H200; torch 2.11.0", "NVIDIA H100; torch 2.11.0"


@pytest.mark.parametrize(
    ("parts", "code", "lines"),
    [
        (
            {"good": (H200, 0)},
            0,
            [
                H200,
                "     1.5 s  in all: 1 passed",
                "    12.5 s  part good: passed",
            ],
        ),
        (
            {"file": (H200, 0)},
            0,
            [
                H200,
                "     0.0 s  in all: 1 skipped",
                "skipped 1: none",
                "    12.5 s  part file: passed",
            ],
        ),
        (
            {"good": (H200, 0), "away": (H200, 0), "bad": (H100, 1), "worse": (H100, 1)},
            1,
            [
                H200,
                H100,
                "     2.0 s  in all: 1 passed, 2 failed, 1 skipped",
                "skipped 1: none",
                "FAILED notebooks.a: C",
                "FAILED tests.b: t",
                "    12.5 s  part good: passed",
                "    12.5 s  part away: passed",
                "    12.5 s  part bad: FAILED",
                "    12.5 s  part worse: FAILED",
            ],
        ),
        (
            {"good": (H200, 2), "missing": None},  # what ran has passed, and yet it is no success
            1,
            [
                H200,
                "     1.5 s  in all: 1 passed",
                "    12.5 s  part good: STOPPED BEFORE ITS END",
                "            part missing: HAS NOT RUN",
            ],
        ),
    ],
)
def test_several_parts_make_one_report(parts, code, lines, tmp_path, monkeypatch, capsys):
    for name, ran in parts.items():
        if ran:
            head = f'<testsuites machine="{ran[0]}" seconds="12.5" exit="{ran[1]}">'
            text = f"{head}<testsuite>{CASES[name]}</testsuite></testsuites>"
            (tmp_path / f"{name}.xml").write_text(text)
    planned = [Part(name, ()) for name in parts]
    monkeypatch.setattr(gpu_tests, "all_parts", lambda: planned)
    assert gpu_tests.report(tmp_path) == code
    assert capsys.readouterr().out.splitlines() == ["", *lines]
