"""What stands around the lessons: container, erratum form, and pages for those who teach."""

import json
import re
import subprocess

import pytest
import yaml

from course.clone import ROOT
from course.lessons import FILES_OF_LESSON


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_container_installs_by_the_makefile():
    container = json.loads(text_of(".devcontainer/devcontainer.json"))
    make, doctor = container["postCreateCommand"].split(" && ")
    plan = subprocess.run([*make.split(), "--dry-run", "--always-make"], cwd=ROOT, check=True,
                          capture_output=True, text=True).stdout  # fmt: skip
    assert "-m authoring.torch_build" in plan
    assert '--index-url "$index" torch' in plan
    assert "-e '.[course,dev]'" in plan
    assert doctor == ".venv/bin/course doctor"


def test_an_erratum_comes_with_its_lesson_and_the_doctors_output():
    form = yaml.safe_load(text_of(".github/ISSUE_TEMPLATE/erratum.yml"))
    fields = {field["id"]: field for field in form["body"]}
    assert fields["doctor"]["validations"]["required"]
    assert "course doctor" in fields["doctor"]["attributes"]["description"]
    numbers = [option[:2] for option in fields["where"]["attributes"]["options"][:-1]]
    assert numbers == [stem[:2] for stem in FILES_OF_LESSON]


@pytest.mark.parametrize("page", ["INSTRUCTOR.md", "TUTOR.md"])
def test_pages_for_teachers_know_every_lesson(page):
    text = text_of(f"exercises/{page}")
    for stem in FILES_OF_LESSON:
        assert re.search(rf"^(\| |### ){stem[:2]} ", text, flags=re.MULTILINE), stem


def test_the_wheelhouse_is_fetched_under_the_pins_and_used_by_the_makefile():
    fetching = [
        line for line in text_of("exercises/INSTRUCTOR.md").splitlines() if "pip download" in line
    ]
    assert len(fetching) == 3
    assert all("-c constraints.txt" in line for line in fetching)
    # pip splits PIP_FIND_LINKS at spaces, so it must not hold the path of the clone
    assert "PIP_NO_INDEX=1 PIP_FIND_LINKS=wheelhouse make" in text_of("exercises/INSTRUCTOR.md")
    assert "'.[course,dev]'" in text_of("Makefile")  # the extras that are fetched
