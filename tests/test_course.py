"""The course's command line, and the README's first script, as a newcomer runs them."""

import re
import runpy
from pathlib import Path

import pytest

from course import doctor
from course.cli import main
from course.run import as_chat, stream_answers
from nanovllm import LLM, SamplingParams

ROOT = Path(__file__).resolve().parent.parent


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


def test_doctor_finds_this_machine_ready(capsys):
    assert main(["doctor"]) == 0
    assert "This machine is ready." in capsys.readouterr().out


def test_doctor_names_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "problem: torch is not installed" in printed
    assert "problem: triton" not in printed, "it runs without"


def test_the_readmes_first_script_runs(tmp_path, capsys):
    readme = (ROOT / "README.md").read_text()
    script = tmp_path / "first.py"
    script.write_text(re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1])
    runpy.run_path(str(script))
    assert capsys.readouterr().out.startswith("Once upon a time ->")
