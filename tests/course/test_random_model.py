"""The random model can be made anywhere: in a notebook under pytest, sys.stderr is no real file."""

import io
import os
import re
import subprocess
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from nbformat.v4 import new_notebook
from planted import code, write

from course.models import random_model

ROOT = Path(__file__).resolve().parents[2]
IN_A_KERNEL = [
    "import sys\nfor stream in (sys.stdout, sys.stderr):\n"
    "    try:\n        stream.fileno()\n    except OSError:\n        continue\n"
    "    raise AssertionError('this kernel has real files, so it shows nothing')",
    "from course.models.random_model import random_model_dir\nmodel = random_model_dir('hollow')",
    "from nanovllm import LLM, SamplingParams\nparams = SamplingParams(max_tokens=2)\n"
    "with LLM(model, max_model_len=64, device='cpu') as llm:\n"
    "    llm.generate(['a', 'b'], params)",
    "with LLM(model, max_model_len=64, device='cpu', tensor_parallel_size=2) as llm:\n"
    "    llm.generate(['a', 'b'], params)",
]


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """The folder of an empty cache, in which nothing was made before."""
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@contextmanager
def streams_without_files():
    """Streams that take text and have no file number, as a kernel's under pytest."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        yield out, err


def test_a_model_is_made_where_the_streams_are_no_files(cache, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # the new process must find this course from anywhere
    with streams_without_files() as (out, err):
        folder = random_model.random_model_dir("hollow")
    assert folder.parent == cache
    made = {file.name for file in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= made
    for words in ("Making a random model of hollow's shape", "weights", "Writing", "Done in"):
        assert words in err.getvalue()
    assert out.getvalue() == ""


def test_a_model_that_cannot_be_made_says_why(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path / "file"))
    with (
        streams_without_files(),
        pytest.raises(RuntimeError, match=r"(?s)hollow could not be made.*FileExistsError"),
    ):
        random_model.random_model_dir("hollow")


def test_a_lesson_under_nbval_starts_from_an_empty_cache(cache, tmp_path):
    """A real kernel, whose streams have no file number: the model, bars, and a second rank."""
    cells = [code(number, source, "") for number, source in enumerate(IN_A_KERNEL, start=1)]
    write(new_notebook(cells=cells), tmp_path, "lesson.ipynb")
    flags = ["--nbval-lax", "--nbval-current-env", "-p", "no:cacheprovider", "-c", "/dev/null"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *flags, "--rootdir=.", "--color=no", "lesson.ipynb"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert f"{len(IN_A_KERNEL)} passed" in result.stdout, result.stdout + result.stderr
    assert [folder.name for folder in cache.iterdir()] == ["hollow-random-1"]


def sources():
    folders = ("nanovllm", "course", "notebooks/source", "solutions")
    return [path for folder in folders for path in (ROOT / folder).rglob("*.py")]


def test_no_process_is_given_a_stream_of_this_one():
    """subprocess wants files, and sys.stdout and sys.stderr are none in a kernel under pytest."""
    given = re.compile(r"\bstd(in|out|err)=sys\.")
    assert len(sources()) > 100
    for path in sources():
        assert not given.search(path.read_text(encoding="utf-8")), path


def test_only_a_model_that_is_kept_reports_its_making(capsys, tmp_path):
    random_model.hollow_model(tmp_path / "in_a_lesson", layers=1)
    assert capsys.readouterr().out == ""
    random_model.make(tmp_path / "kept", random_model.SHAPES["hollow"][1])
    assert "Writing" in capsys.readouterr().out
