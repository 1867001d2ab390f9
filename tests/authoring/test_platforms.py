"""docs/platforms.md, the Dockerfile and the dev container agree with the rest of the project."""

import json
import re
import tomllib

import pytest
import yaml

from authoring import torch_build
from course.clone import ROOT

PAGE = (ROOT / "docs/platforms.md").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PINS = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


@pytest.mark.parametrize("package", ["torch", "triton"])
def test_the_table_of_wheels_was_made_for_the_pinned_versions(package):
    """With another pin, ask the package index again which systems have wheels of it."""
    [head] = [line for line in PAGE.splitlines() if line.startswith("| system |")]
    assert f"| {package} {PINS[package]} |" in head
    assert set(re.findall(rf"\b{package} (\d[\d.]*\d)", PAGE)) == {PINS[package]}


def test_the_page_and_make_agree_on_macos():
    assert set(re.findall(r"macOS (\d+) or later", PAGE)) == {str(torch_build.OLDEST_MACOS)}


def test_the_page_names_the_lowest_torch_of_the_engine():
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    [lowest] = [need.partition(">=")[2] for need in needs if need.startswith("torch>=")]
    assert f"the engine needs {lowest} or later" in PAGE


# -- Docker ----------------------------------------------------------------------------------------


def docker_commands(text: str) -> set[str]:
    return set(re.findall(r"docker (?:build|run) [^\n`]*nano-vllm-course(?: \.)?$", text, re.M))


def test_the_two_commands_are_the_same_wherever_they_are_shown():
    shown = docker_commands(PAGE)
    assert len(shown) == 2
    assert docker_commands(DOCKERFILE) == shown
    ci = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    ran = docker_commands("\n".join(step.get("run", "") for step in ci["jobs"]["docker"]["steps"]))
    detached = {command.replace("--interactive --tty", "--detach") for command in shown}
    assert ran == detached, "CI runs the commands that the page shows"


def test_only_this_machine_reaches_jupyterlab_and_it_keeps_its_token():
    [run] = [command for command in docker_commands(PAGE) if " run " in command]
    assert "--publish 127.0.0.1:" in run
    [command] = re.findall(r"^CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    assert not [word for word in json.loads(command) if re.search("token|password|root", word)]


def test_jupyterlab_does_not_run_as_root():
    users = re.findall(r"^(USER|CMD)(?: (\w+))?", DOCKERFILE, re.MULTILINE)
    assert users == [("USER", "learner"), ("CMD", "")]


def patterns(name: str) -> set[str]:
    """The patterns of an ignore file, in one spelling: without the slashes that say where."""
    lines = (ROOT / name).read_text().splitlines()
    kept = [line for line in lines if line and not line.startswith("#")]
    return {line.removeprefix("**/").strip("/") for line in kept}


def test_the_image_takes_nothing_that_git_ignores():
    assert patterns(".gitignore") <= patterns(".dockerignore")
    needed = {"nanovllm", "course", "checkpoints", "notebooks", "exercises", "figures", "Makefile"}
    assert not needed & patterns(".dockerignore")


# -- Colab and the dev container -------------------------------------------------------------------


def test_colabs_clone_cannot_hide_a_package():
    """Python looks into the working folder first, where a folder of a package's name hides it."""
    [clone] = re.findall(r"git clone --depth 1 REPOSITORY (\S+)", PAGE)
    assert not clone.isidentifier()
    for place in (f"-c {clone}/constraints.txt", f"-e ./{clone} ", f"/content/{clone}/notebooks"):
        assert place in PAGE


def test_colab_keeps_its_own_jupyter():
    """The extra `course` would replace the ipykernel that Colab's notebooks run on."""
    [install] = re.findall(r"pip install -q (.*)", PAGE)
    assert "[" not in install
    assert not re.search("jupyter|ipykernel|ipywidgets", install)


def test_the_dev_container_installs_with_the_makefile():
    config = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
    python = re.search(r"python:(3\.\d+)-", config["image"])[1]
    assert config["postCreateCommand"].startswith(f"make install PYTHON=python{python} ")
    assert f"ARG PYTHON={python}\n" in DOCKERFILE, "both containers have the same Python"
