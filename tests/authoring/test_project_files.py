"""The files beside the code: changelog, citation, forms, and checks of a commit."""

import re
import shlex
import subprocess
import sys
import tomllib
from datetime import date
from importlib.util import find_spec
from typing import Any

import pytest
import yaml
from packaging.version import Version
from patience import HANGS

import nanovllm
from course import cli
from course.clone import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
HOOKS = [
    hook
    for repository in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    for hook in repository["hooks"]
]
VERSION = Version(nanovllm.__version__)
KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}  # Keep a Changelog's


def sections() -> dict[str, str]:
    """CHANGELOG.md: the heading of a version -> what follows it, the newest first."""
    _, *parts = re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    return {heading: text for heading, _, text in (part.partition("\n") for part in parts)}


def releases() -> list[tuple[Version, date]]:
    headings = [heading.split(" - ") for heading in sections() if heading != "Unreleased"]
    return [(Version(version), date.fromisoformat(day)) for version, day in headings]


# -- the version, the changelog and the citation --------------------------------------------------


def test_releases_stand_in_order_below_what_is_unreleased():
    assert next(iter(sections())) == "Unreleased" or not VERSION.is_devrelease
    assert releases()
    assert releases() == sorted(releases(), reverse=True)


@pytest.mark.parametrize("heading", sections())
def test_the_changes_of_a_version_are_sorted_by_kind(heading):
    kinds = re.findall(r"^### (.*)$", sections()[heading], flags=re.MULTILINE)
    assert set(kinds) <= KINDS
    assert len(set(kinds)) == len(kinds)
    assert kinds or heading == "Unreleased"


def test_the_version_is_the_newest_release_or_one_in_the_making():
    newest, _ = releases()[0]
    if VERSION.is_devrelease:
        assert Version(VERSION.base_version) > newest
        assert VERSION.dev == 0
    else:
        assert newest == VERSION


def test_the_citation_names_the_newest_release():
    assert (Version(CITATION["version"]), CITATION["date-released"]) == (
        releases()[0][0],
        releases()[0][1].isoformat(),
    )
    assert CITATION["license"] == PROJECT["license"]


def test_a_release_says_where_the_repository_is():
    """The address is not known before the repository is published; from then on it is one."""
    address = PROJECT["urls"].get("Repository")
    assert CITATION.get("repository-code") == address
    assert address or VERSION.is_devrelease


def test_the_classifiers_name_the_pythons_that_are_supported():
    named = re.findall(r"Python :: (3\.\d+)$", "\n".join(PROJECT["classifiers"]), re.MULTILINE)
    lowest, highest = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups()
    assert named == [f"3.{minor}" for minor in range(int(lowest), int(highest))]
    assert ("Typing :: Typed" in PROJECT["classifiers"]) == (ROOT / "nanovllm/py.typed").exists()


# -- checks of a commit ---------------------------------------------------------------------------


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook["id"])
def test_a_hook_runs_a_program_of_the_clones_environment(hook):
    assert hook["language"] == "system"
    python, flag, module, *arguments = shlex.split(hook["entry"])
    assert (python, flag) == (".venv/bin/python", "-m")
    assert find_spec(module), f"there is no module {module}"
    if module == "course":
        assert arguments[0] in cli.COMMANDS


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook["id"])
def test_a_hook_applies_to_files_that_exist(hook):
    if "files" in hook:
        names = [str(path.relative_to(ROOT)) for path in ROOT.glob("[!.]*/*") if path.is_file()]
        names += [path.name for path in ROOT.iterdir()]
        names += [str(path.relative_to(ROOT)) for path in (ROOT / ".github").rglob("*.yml")]
        assert any(re.search(hook["files"], name) for name in names)


def test_every_path_that_the_makefile_names_exists():
    text = (ROOT / "Makefile").read_text()
    paths = re.findall(r"\btests/[\w/]+(?:\.py)?\b", text)
    assert len(paths) >= 6
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_word_list_has_words_that_codespell_would_object_to(tmp_path):
    """A word that stands there for nothing hides the mistake that it is."""
    words = (ROOT / ".spelling").read_text().split()
    assert words == sorted(words)
    found = run("codespell_lib", "-", input="\n".join(words), cwd=tmp_path)
    assert re.findall(r"(\w+) ==> ", found.stdout) == words, found.stderr


def run(module: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANGS, **options)


# -- forms and settings for GitHub ----------------------------------------------------------------

SCHEMAS = {
    "github-issue-forms": ".github/ISSUE_TEMPLATE/[!c]*.yml",
    "github-issue-config": ".github/ISSUE_TEMPLATE/config.yml",
    "github-workflows": ".github/workflows/*.yml",
    "dependabot": ".github/dependabot.yml",
    "citation-file-format": "CITATION.cff",
}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_file_follows_its_schema(schema):
    """The schemas come with check-jsonschema, so nothing is fetched."""
    files = sorted(ROOT.glob(SCHEMAS[schema]))
    assert files
    options = ["--builtin-schema", f"vendor.{schema}", "--default-filetype", "yaml"]
    checked = run("check_jsonschema", *options, *map(str, files))
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_form_has_a_name_and_a_label_of_its_own():
    forms = [
        yaml.safe_load(path.read_text())
        for path in sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("[!c]*.yml"))
    ]
    assert [form["name"] for form in forms] == ["Bug", "Erratum", "Question"]
    assert [form["labels"] for form in forms] == [["bug"], ["erratum"], ["question"]]
    for form in forms:
        ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
        assert len(set(ids)) == len(ids)
