"""What `make test` runs over the notebooks bites: planted ones fail, and the report says where."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbformat.v4 import new_notebook
from patience import HANGS
from planted import code, write

from authoring import nbval_rules
from course.pages.source import REQUIREMENTS, missing_requirement

ROOT = Path(__file__).resolve().parents[2]
CHECK = {"tags": ["nbval-check-output"]}
WIDGET = "import ipywidgets\n\nipywidgets.IntSlider()"
FIGURE = """from matplotlib import pyplot as plt
from course.show.display import show
figure, axes = plt.subplots()
show(figure, alt="Empty axes")
plt.plot([1, 2])"""


def nbval_flags() -> list[str]:
    """The flags that the Makefile gives."""
    return re.search(r"^NBVAL := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()


def cells(*sources: str) -> list:
    return [code(number, source, "") for number, source in enumerate(sources, start=1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module")
def report(folder) -> str:
    """The report of one run over planted notebooks, under the rules of notebooks/conftest.py."""
    (folder / "conftest.py").write_text((ROOT / "notebooks/conftest.py").read_text())
    fails = cells("a = 1", "assert a == 2", "print('went on')")
    differs = [code(1, "print(1 + 1)", "3\n", **CHECK)]
    unmarked = [code(1, "print(1 + 1)", "3\n")]
    # nbval alone lets these pass, so a lint refuses each of them: see test_notebooks.py
    deaf = [code(1, "x = 1", "", tags=["raises-exception"]), code(2, "!false", "")]
    for name, made in {
        "fails": fails,
        "differs": differs,
        "unmarked": unmarked,
        "deaf": deaf,
        "shows": cells(WIDGET, FIGURE),
        "needs": cells("raise SystemExit('ran though it must not')"),
    }.items():
        metadata = {"course": {"requires": ["abacus"]}} if name == "needs" else {}
        write(new_notebook(cells=made, metadata=metadata), folder, f"{name}.ipynb")
    (folder / "abacus.py").write_text(
        "from course.pages.source import REQUIREMENTS\n"
        "REQUIREMENTS['abacus'] = (lambda: False, 'it needs an abacus')\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "abacus", "-p", "no:cacheprovider", "-rA"]
    command += [*nbval_flags(), "--store-outputs", "--color=no", "--rootdir=.", "-c/dev/null", "."]
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=HANGS
    )
    assert result.returncode == 1, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize(
    "line",
    [
        "PASSED fails.ipynb::Cell 0",
        "FAILED fails.ipynb::Cell 1",
        "FAILED differs.ipynb::Cell 0",
        "PASSED unmarked.ipynb::Cell 0",
        "PASSED shows.ipynb::Cell 0",
        "PASSED shows.ipynb::Cell 1",
        "PASSED deaf.ipynb::Cell 0",
        "PASSED deaf.ipynb::Cell 1",
    ],
)
def test_each_planted_cell_ends_as_it_must(line, report):
    assert re.search(rf"^{re.escape(line)}\b", report, re.MULTILINE), report


def test_a_notebook_stops_at_its_first_failure(report):
    assert re.search(r"SKIPPED.*stopped at this notebook's first failure, Cell 1", report)
    assert "PASSED fails.ipynb::Cell 2" not in report


def test_a_notebook_is_skipped_with_the_reason_where_a_requirement_is_missing(report):
    assert re.search(r"SKIPPED.*it needs an abacus", report)
    assert "ran though it must not" not in report.partition("short test summary")[2]


def test_the_report_has_the_slowest_cells_and_each_notebooks_seconds(report):
    section = report.partition("slowest cells, and each notebook")[2]
    assert re.search(r"^ +[\d.]+ s  fails\.ipynb::Cell 0$", section, re.MULTILINE)
    for name in ("differs", "fails", "shows", "unmarked"):
        assert re.search(rf"^ +[\d.]+ s  {name}\.ipynb$", section, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "printed"), [("unmarked", "2\n"), ("differs", "3\n"), ("fails", "")]
)
def test_only_a_notebook_that_passes_stores_what_it_printed(name, printed, report, folder):
    notebook = nbformat.read(folder / f"{name}.ipynb", as_version=4)
    assert notebook.cells[0].outputs[0].text == printed
    assert ("run_of" in notebook.metadata.get("course", {})) == (name == "unmarked")


@pytest.mark.parametrize("num_run", [1, 2])
def test_a_notebook_of_which_a_part_ran_stores_nothing(num_run, tmp_path):
    notebook = new_notebook(cells=cells("1", "2"))
    file = type("NotebookFile", (), {"nb": notebook, "path": tmp_path / "lesson.ipynb"})
    run = [SimpleNamespace(parent=file, cell=cell, test_outputs=[]) for cell in notebook.cells]
    nbval_rules.store_outputs(run[:num_run])
    assert file.path.exists() == (num_run == 2)


def test_a_slow_notebook_is_named_and_a_far_too_slow_one_fails():
    durations = {"a::Cell 0": 80.0, "a::Cell 1": 11.0, "b::Cell 0": 200.0, "c::Cell 0": 999.0}
    cpu = {"a": 90.6, "b": 181.0, "c": 1.0}  # a busy machine took long for c
    lines = nbval_rules.report_lines(durations, cpu)
    assert lines[0] == "  999.0 s  c::Cell 0"
    assert "   91.0 s  a  SLOW: 91 s of CPU time, over 90 s" in lines
    assert "  200.0 s  b  FAILED: 181 s of CPU time, over 180 s" in lines
    assert "  999.0 s  c" in lines
    assert nbval_rules.too_slow(cpu, nbval_rules.FAIL_SECONDS) == ["b"]


def test_the_cpu_time_of_a_notebooks_kernel_is_measured(tmp_path):
    """One notebook computes for 5 seconds, one sleeps for 5. The limit is 4 seconds."""
    limit = "\nfrom authoring import nbval_rules\nnbval_rules.FAIL_SECONDS = 4.0\n"
    (tmp_path / "conftest.py").write_text((ROOT / "notebooks/conftest.py").read_text() + limit)
    busy = "import time\nwhile time.process_time() < 5:\n    pass"
    write(new_notebook(cells=cells(busy, "pass")), tmp_path, "busy.ipynb")
    write(new_notebook(cells=cells("import time\ntime.sleep(5)", "pass")), tmp_path, "idle.ipynb")
    command = [sys.executable, "-m", "pytest", *nbval_flags(), "-n", "1", "-p", "no:cacheprovider"]
    command += ["--color=no", "--rootdir=.", "-c/dev/null", "."]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    busy = re.search(r"s  busy\.ipynb(?!:)(.*)$", result.stdout, re.MULTILINE)
    idle = re.search(r"s  idle\.ipynb(?!:)(.*)$", result.stdout, re.MULTILINE)
    assert re.fullmatch(r"  FAILED: \d+ s of CPU time, over 4\.0 s", busy[1])
    assert idle[1] == ""
    assert result.returncode == 1


def test_a_missing_requirement_says_why(monkeypatch):
    notebook = new_notebook(metadata={"course": {"requires": ["cuda"]}})
    monkeypatch.setitem(REQUIREMENTS, "cuda", (lambda: False, "no GPU"))
    assert missing_requirement(notebook) == "no GPU"
    monkeypatch.setitem(REQUIREMENTS, "cuda", (lambda: True, "no GPU"))
    assert missing_requirement(notebook) is None


def test_make_test_runs_the_notebooks_two_at_a_time_each_whole():
    makefile = (ROOT / "Makefile").read_text()
    recipe = re.search(r"^test:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)[1]
    (call,) = [line for line in recipe.splitlines() if "$(NBVAL)" in line]
    for part in ("OMP_NUM_THREADS=1", "-n 2", "--dist loadscope", "notebooks"):
        assert part in call
    assert "python -m authoring.build --check" in recipe
