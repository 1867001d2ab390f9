"""The workflows: who may start a job, on whose machine it runs, and which machines are covered."""

import re
from typing import Any

import pytest
import yaml

from course.clone import ROOT

WORKFLOWS = {
    path.stem: yaml.safe_load(path.read_text())
    for path in sorted((ROOT / ".github/workflows").glob("*.y*ml"))
}
JOBS = {
    f"{workflow}/{name}": job
    for workflow, content in WORKFLOWS.items()
    for name, job in content["jobs"].items()
}
SELF_HOSTED = [name for name, job in JOBS.items() if "self-hosted" in str(job["runs-on"])]
STEPS = [(name, step) for name, job in JOBS.items() for step in job["steps"]]
HERE, ELSEWHERE = "course/nano-vllm-course", "stranger/nano-vllm-course"
MAY_RUN = [  # event, label, the repository of the branch, GPU_RUNNER; and whether the job runs
    ("workflow_dispatch", "", "", "", True),
    ("schedule", "", "", "true", True),
    ("schedule", "", "", "", False),
    ("schedule", "", "", "false", False),
    ("pull_request", "gpu", HERE, "", True),
    ("pull_request", "gpu", ELSEWHERE, "", False),
    ("pull_request", "gpu", ELSEWHERE, "true", False),
    ("pull_request", "gpu", "", "true", False),  # a fork that was deleted since
    ("pull_request", "bug", HERE, "true", False),
    ("pull_request_target", "gpu", HERE, "true", False),
    ("push", "", HERE, "true", False),
]


def triggers(workflow: dict[Any, Any]) -> dict[str, Any]:
    """The events that start a workflow. YAML 1.1 reads the key `on` as True."""
    events = workflow[True]
    return events if isinstance(events, dict) else dict.fromkeys(events)


def is_true(condition: str, context: dict[str, str]) -> bool:
    """Evaluate a job's `if`, where it compares names of `context` with each other or with strings.

    A name that `context` lacks is an error, so that no test passes by a name that was mistyped.
    """
    found = re.findall(r"'[^']*'|[\w.]+|==|!=|&&|\|\||[()!]|\S", condition)
    python = {"&&": " and ", "||": " or ", "!": " not "}
    words = [python.get(word, word) for word in found]
    named = [repr(context[word]) if re.match(r"[a-z]", word) else word for word in words]
    return bool(eval("".join(named), {"__builtins__": {}}))


def gpu_context(event: str, label: str, repository: str, variable: str) -> dict[str, str]:
    return {
        "github.event_name": event,
        "github.event.label.name": label,
        "github.event.pull_request.head.repo.full_name": repository,
        "github.repository": HERE,
        "vars.GPU_RUNNER": variable,
    }


def test_only_the_gpu_job_runs_on_a_machine_of_ours():
    assert SELF_HOSTED == ["gpu/test-gpu"]


@pytest.mark.parametrize("job", SELF_HOSTED)
@pytest.mark.parametrize(("event", "label", "repository", "variable", "runs"), MAY_RUN)
def test_no_label_runs_the_code_of_a_fork(job, event, label, repository, variable, runs):
    assert is_true(JOBS[job]["if"], gpu_context(event, label, repository, variable)) == runs


@pytest.mark.parametrize("job", SELF_HOSTED)
def test_a_labelled_pull_request_does_not_run_later_commits_by_itself(job):
    events = triggers(WORKFLOWS[job.split("/")[0]])
    assert set(events) == {"workflow_dispatch", "schedule", "pull_request"}
    assert events["pull_request"]["types"] == ["labeled"]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_no_event_gives_a_fork_the_rights_of_this_repository(name):
    """These events run with a writing token while they handle what a stranger sent."""
    harmless = {"push", "pull_request", "workflow_dispatch", "schedule"}
    assert set(triggers(WORKFLOWS[name])) <= harmless


@pytest.mark.parametrize("name", JOBS)
def test_jobs_only_read_the_repository(name):
    workflow = WORKFLOWS[name.split("/")[0]]
    rights = JOBS[name].get("permissions", workflow["permissions"])
    assert rights == {"contents": "read"}


@pytest.mark.parametrize(("name", "step"), [(n, s) for n, s in STEPS if "uses" in s])
def test_actions_are_pinned_and_leave_no_credentials(name, step):
    action, _, version = step["uses"].partition("@")
    assert re.fullmatch(r"[0-9a-f]{40}", version), f"{step['uses']}: pin the commit, not a tag"
    if action == "actions/checkout":
        assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize(("name", "step"), [(n, s) for n, s in STEPS if "run" in s])
def test_no_text_of_an_event_becomes_part_of_a_command(name, step):
    """A title or a branch name could otherwise hold a command. An environment variable cannot."""
    assert "${{" not in step["run"]


def test_ci_covers_every_python_and_every_system_that_the_docs_name():
    jobs = WORKFLOWS["ci"]["jobs"]
    smoke = jobs["smoke"]["strategy"]["matrix"]["include"]
    pythons = {row["python"] for row in smoke} | set(jobs["test"]["strategy"]["matrix"]["python"])
    assert pythons == {"3.11", "3.12", "3.13", "3.14"}
    machines = {row["machine"] for row in smoke}
    assert any(machine.startswith("macos-") for machine in machines)
    assert not any("intel" in machine or "large" in machine for machine in machines)
    assert any(machine.endswith("-arm") for machine in machines)
    assert "make smoke" in [step.get("run") for step in jobs["smoke"]["steps"]]


def test_every_word_of_make_smoke_names_a_test_file():
    """pytest passes over a word of -k that fits nothing, and then silently runs fewer tests."""
    [words] = re.findall(r"^SMOKE := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    names = words.split(" or ")
    assert len(names) >= 5
    for name in names:
        assert list((ROOT / "tests").rglob(f"{name}.py")), name
