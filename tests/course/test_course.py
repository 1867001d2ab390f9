"""The course's command line, and the README's first script, as a newcomer runs them."""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from course import cli, clone
from course.cli import main
from course.commands import doctor, run
from course.commands.run import PROMPTS, as_chat, stream_answers, usual_threads
from course.models import choice
from course.models.choice import own_model
from nanovllm import LLM, SamplingParams

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def model(tiny_model, monkeypatch):
    monkeypatch.setenv("COURSE_MODEL", str(tiny_model()))
    return str(tiny_model())


def test_run_answers_in_order_and_says_what_it_cost(capsys):
    assert main(["run", "first", "second", "--max-tokens", "5", "--temperature", "0"]) == 0
    printed = capsys.readouterr().out
    assert printed.index("> first") < printed.index("> second") < printed.index("tok/s")
    for row in ("output tokens", "time to first token", "KV cache", "prefix cache"):
        assert re.search(rf"^{row} +\d", printed, re.MULTILINE)


@pytest.mark.parametrize("lengths", [(8, 2, 4), (2, 8, 4), (2, 4, 8)])
def test_every_answer_is_shown_whole_and_in_order(model, lengths, capsys):
    prompts = ["a", "b", "c"]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
    with LLM(model, use_tqdm_on_load=False) as llm:
        talks = [as_chat(llm.get_tokenizer(), prompt) for prompt in prompts]
        outputs = llm.generate(talks, params, use_tqdm=False)
        stream_answers(llm, prompts, params)
    answers = zip(prompts, outputs, strict=True)
    wanted = "\n\n".join(f"> {prompt}\n{output.outputs[0].text}" for prompt, output in answers)
    assert capsys.readouterr().out.startswith(f"\n{wanted}\n\nmodel ")


def test_run_takes_a_model_without_a_chat_template(tiny_model, tmp_path, capsys):
    for file in tiny_model().iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert main(["run", "--model", str(tmp_path), "hello", "--max-tokens", "3"]) == 0
    assert "> hello" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-tokens", "0"], "max_tokens must be between 1"),
        (["--model", "/no/such/folder"], "model='/no/such/folder' is not a local folder"),
        (["--dtype", "int8"], "dtype must be one of auto"),
    ],
)
def test_what_a_user_can_put_right_is_said_in_one_line(arguments, message, capsys):
    assert main(["run", *arguments, "hello"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"course run: {message}")
    assert printed.count("\n") == 1


def test_the_default_prompts_are_ones_that_the_small_model_answers():
    """It begins every refusal with the same few words, and ends a story by itself."""
    with LLM(own_model(), device="cpu", use_tqdm_on_load=False) as llm:
        talks = [as_chat(llm.get_tokenizer(), prompt) for prompt in PROMPTS]
        params = default_params()
        outputs = llm.generate(talks, params, use_tqdm=False)
    for output in outputs:
        assert "stories" not in output.outputs[0].text
        assert len(output.outputs[0].text.split()) > 40
        assert output.outputs[0].finish_reason == "stop"


def default_params() -> SamplingParams:
    """As `course run` samples without arguments."""
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    args = parser.parse_args([])
    return SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens, seed=0)


def test_the_example_of_run_is_a_request_for_a_story():
    page = (ROOT / "docs/install.md").read_text()
    [arguments] = re.findall(r"make run ARGS='\"(.*?)\"", page)
    assert "story" in arguments


def test_the_small_model_runs_on_one_thread_and_another_on_torchs_own_number(model, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert usual_threads(str(own_model())) == usual_threads(os.path.relpath(own_model())) == 1
    assert usual_threads(model) == usual_threads("Qwen/Qwen3-0.6B") == 7


@pytest.mark.parametrize(("arguments", "threads"), [([], 7), (["--threads", "3"], 3)])
def test_run_sets_the_threads_before_it_loads(arguments, threads, monkeypatch, capsys):
    given = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    assert main(["run", "hello", "--max-tokens", "1", *arguments]) == 0
    assert given[0] == threads


# -- a reader who leaves ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "unbuffered"),
    [("--help", ""), ("reveal 03", ""), ("reveal 03", "1"), ("progress", "1")],
)
def test_a_command_ends_silently_when_nobody_reads_its_output(command, unbuffered):
    """A write may fail at once, or only when Python empties its buffer at the end."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered, "PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-m", "course", *command.split()]
    ended = subprocess.run(program, stdout=writer, stderr=subprocess.PIPE, env=environment)
    os.close(writer)
    assert (ended.stderr, ended.returncode) == (b"", 141)


# -- outside a clone -------------------------------------------------------------------------------


@pytest.fixture
def no_clone(monkeypatch, tmp_path):
    """As from a wheel: the packages lie in a folder without the course's other files."""
    monkeypatch.delenv("COURSE_MODEL")
    monkeypatch.setattr(clone, "ROOT", tmp_path)
    monkeypatch.setattr(choice, "CHECKPOINTS", tmp_path / "checkpoints")


NEED_A_CLONE = [
    ["ladder"],
    ["progress"],
    ["reset", "03"],
    ["reveal", "03"],
]


@pytest.mark.parametrize("command", NEED_A_CLONE)
def test_what_needs_a_clone_says_so_outside_of_one(no_clone, command, capsys):
    assert main(command) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(rf"course {command[0]}: .*a clone of the .*\n", printed.err)


def test_every_command_works_anywhere_or_is_known_to_need_a_clone():
    assert {command[0] for command in NEED_A_CLONE} == cli.COMMANDS.keys() - cli.ANYWHERE


@pytest.mark.parametrize("command", ["run", "bench"])
def test_without_a_clone_no_other_model_takes_the_place_of_ours(no_clone, command, capsys):
    assert main([command]) == 2
    printed = capsys.readouterr().err
    assert "name a model's folder or Hugging Face id with --model or COURSE_MODEL" in printed
    assert printed.count("\n") == 1


def test_doctor_outside_a_clone_promises_only_the_engine(no_clone, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "project", lambda: (">=3.11", ["torch>=2.8"]))
    assert main(["doctor"]) == 0
    assert "can run nanovllm. The lessons need a clone" in capsys.readouterr().out


# -- the doctor ------------------------------------------------------------------------------------


def test_doctor_finds_this_machine_ready(capsys):
    assert main(["doctor"]) == 0
    assert "This machine is ready." in capsys.readouterr().out


def test_doctor_names_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "problem: torch is not installed" in printed
    assert "problem: triton" not in printed, "it runs without"


def test_doctor_names_what_is_too_old_and_what_is_needed(monkeypatch, capsys):
    real = doctor._version
    old = {"transformers": "4.51.3", "triton": "3.4.0"}
    monkeypatch.setattr(doctor, "_version", lambda package: old.get(package) or real(package))
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"problem: transformers 4.51.3 is installed, and transformers>=5.\d", printed)
    assert "problem: triton 3.4.0 is installed" in printed
    assert "problem: torch" not in printed


def test_doctor_takes_a_nightly_build_for_what_it_will_become(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda package: "99.0.0.dev20260101+cu130")
    assert doctor._check_packages() == []


def test_doctor_finds_a_python_that_is_too_old(monkeypatch, capsys):
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.10.2")
    assert main(["doctor"]) == 1
    assert "is needed, and this is 3.10.2" in capsys.readouterr().out


def test_doctor_tries_the_courses_own_model(monkeypatch, tmp_path, capsys):
    copy = tmp_path / "storyteller"
    shutil.copytree(own_model(), copy)
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    monkeypatch.setattr(choice, "CHECKPOINTS", tmp_path)
    assert main(["doctor"]) == 1
    assert "problem: the course's own model does not work" in capsys.readouterr().out


def test_doctor_finds_a_clone_without_the_model(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(choice, "CHECKPOINTS", tmp_path)
    assert main(["doctor"]) == 1
    assert "Restore it: git checkout" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("/no/such/folder", "there is no such folder"),
        ("~/no/such/folder", "there is no such folder"),
        (str(ROOT / "tests"), "cannot use .*config.json"),
        ("not a model's name", "cannot be used"),
    ],
)
def test_doctor_finds_a_course_model_that_cannot_be_used(named, message, monkeypatch, capsys):
    monkeypatch.setenv("COURSE_MODEL", named)
    assert main(["doctor"]) == 1
    found = re.search(r"problem: COURSE_MODEL=(.*)", printed(capsys))[1]
    assert found.startswith(repr(named))
    assert re.search(message, found)


def printed(capsys) -> str:
    return capsys.readouterr().out


def test_doctor_accepts_a_course_model_that_would_be_downloaded(monkeypatch, capsys):
    monkeypatch.setenv("COURSE_MODEL", "nobody/never-made-such-a-model")
    assert main(["doctor"]) == 0
    assert "its first use downloads it" in printed(capsys)


def test_the_readmes_first_script_runs_in_a_clone_and_knows_no_course(capsys, monkeypatch):
    readme = (ROOT / "README.md").read_text()
    script = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    assert "course" not in script, "a wheel in another project has only nanovllm's API to offer"
    monkeypatch.chdir(ROOT)
    exec(compile(script, "first.py", "exec"), {})
    assert capsys.readouterr().out.startswith("Once upon a time ->")
