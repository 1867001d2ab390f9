"""What every check does: it names what is wrong, and never passes where nothing ran."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from course.checks import CheckFailed, attempt, check, compare, expect, limits, need, notes
from course.checks.core import run_check
from course.checks.lesson09 import near
from course.clone import ROOT


@pytest.fixture(autouse=True)
def no_last_words(tmp_path, monkeypatch):
    """Of a process that was ended in an earlier run; test_limits.py reads such words."""
    monkeypatch.setattr(limits, "NOTES", tmp_path)


def failure(checked, *args):
    with pytest.raises(CheckFailed) as failed:
        checked(*args)
    return str(failed.value)


@check
def check_double(double):
    expect(attempt(double, 3) == 6, "double(3) is 6")


def test_a_right_answer_passes_and_says_how_much_was_compared(capsys):
    check_double(lambda n: 2 * n)
    assert capsys.readouterr().out.startswith("Passed: 1 comparisons")


def test_errors_in_the_answer_become_messages_with_the_line():
    def half(n):
        return n / 0

    def todo(n):
        raise NotImplementedError("multiply it by two")

    assert "raised an error, in line" in failure(check_double, half)
    assert "return n / 0\nZeroDivisionError: division by zero" in failure(check_double, half)
    assert "still to be written: multiply it by two" in failure(check_double, todo)
    assert "A function is wanted here, this is 6" in failure(check_double, 6)


def test_an_error_inside_the_course_is_told_by_the_learners_function():
    def explode(numbers):
        raise ValueError("boom")

    def unwritten(numbers):
        raise NotImplementedError("add them")

    def helper(function):
        return function([1])

    helper.__module__ = "course.checks.lesson03"
    with pytest.raises(CheckFailed, match=r"^explode raised an error, in line"):
        attempt(helper, explode)
    with pytest.raises(CheckFailed, match=r"^unwritten is still to be written: add them"):
        attempt(helper, unwritten)


def test_an_error_in_no_line_of_the_learners_has_no_place():
    def two(n, m):
        return n + m

    said = failure(check_double, two)
    assert "two raised an error\nTypeError: " in said
    assert "in line" not in said

    exec(compile("def helper(): return int('x')", f"{ROOT}/course/no_such.py", "exec"), names := {})
    names["helper"].__module__ = "course.checks.lesson03"
    with pytest.raises(
        CheckFailed, match=r"^The course's code, running yours, raised an error\nVal"
    ):
        attempt(names["helper"])


def test_an_error_in_a_library_is_told_by_the_learners_own_line():
    def parse(n):
        return json.loads("{")

    assert 'json.loads("{")\nJSONDecodeError' in failure(check_double, parse)


def test_a_notebook_shows_the_message_alone_and_no_line_runs_off_the_page():
    lines = CheckFailed("word " * 40 + "\n  at once")._render_traceback_()
    assert lines[0].startswith("Not yet. word")
    assert lines[-1] == "  at once"
    assert max(len(line) for text in lines for line in text.splitlines()) <= 95


def test_a_check_that_cannot_run_or_compares_nothing_fails(capsys):
    @check
    def check_missing(answer):
        import no_such_reference  # noqa: F401

    @check
    def check_nothing(answer):
        attempt(answer)

    assert "could not run, so nothing is shown. ModuleNotFoundError" in failure(check_missing, 1)
    assert "compared nothing" in failure(check_nothing, int)
    assert capsys.readouterr().out == ""


def test_a_check_that_this_machine_cannot_run_says_so_and_counts_as_open():
    @check
    def check_kernel(kernel):
        need(False, "an abacus")
        attempt(kernel)

    assert "not run here: it needs an abacus. It counts as it did" in failure(check_kernel, int)


def test_a_check_says_what_may_take_so_long(monkeypatch):
    monkeypatch.setattr("course.checks.core.SECONDS", 0.2)

    @check(slow="Do you count in ones?")
    def check_counting(count):
        attempt(count)

    def in_ones():
        while True:
            pass

    said = "counting takes more than 0.2 seconds of computing. Do you count in ones?"
    assert failure(check_counting, in_ones) == said


def test_an_answer_that_ends_python_has_failed():
    said = failure(check_double, lambda n: sys.exit())
    assert "raised an error, in line" in said
    assert "SystemExit" in said


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "Predict first: write your number in place of None, `blocks = ...`"),
        ("3", "should be like int, got '3'"),
        (True, "should be like int"),
        (np.True_, "should be like int"),
        (torch.ones(2), "should be like int"),
        (2, "blocks is not 2. Round up."),
        (np.int64(2), "blocks is not 2. Round up."),
        (7, "blocks is not 7. See step 2."),
    ],
)
def test_a_wrong_prediction_is_explained(given, words):
    wrong = {2: "Round up."}
    assert words in failure(compare, "blocks", given, 3, wrong, "See step 2.")


@pytest.mark.parametrize("given", [3, 3.0, np.int64(3), np.float32(3), torch.tensor(3)])
def test_a_right_prediction_may_be_numpys_or_torchs(given):
    compare("blocks", given, 3, {}, "")
    near("blocks", given, 3, [], "")


def test_a_check_says_which_name_a_cell_no_longer_defines():
    assert "no longer defines double" in failure(run_check, check_double, SimpleNamespace(x=1))


def test_a_pass_is_noted_only_in_a_notebook_of_exercises(tmp_path, monkeypatch):
    monkeypatch.setattr(notes, "ROOT", tmp_path)
    file = tmp_path / ".course/progress.json"
    for folder in ("solutions", "exercises"):
        assert not file.exists()
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        said = notes.note_pass("01", "top_p", file)
    assert said == "Noted: see `course progress`."
    assert list(notes.load_passed(file)["01"]) == ["top_p"]
