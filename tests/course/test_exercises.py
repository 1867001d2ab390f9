"""Every exercise's check is proven: the solution passes, the stub and each wrong answer fail with
the words that help, and a right answer written differently passes. The cases are in
exercise_cases/, a module a lesson.

Those of lessons 06 and 09 need a GPU, or Triton's interpreter, which must be asked for before
Triton is first imported, as `make test` does:
TRITON_INTERPRET=1 pytest tests/course/test_exercises.py -k "06 or 09"
"""

import importlib.util
import os
import re
from functools import cache
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from course.checks import CheckFailed, NotRunHere
from course.checks.core import run_check
from course.checks.exercises import all_places, code_of, define, load, preamble_of
from course.checks.notes import check_of
from course.pages.exercise_cells import name_of
from course.pages.jobs import all_jobs, built

PLACES = {f"{place.number}-{place.exercise.name}": place for place in all_places()}
KERNELS = ("06", "09")  # lessons whose exercises are kernels, or run some
RUNS_KERNELS = (
    torch.cuda.is_available()
    or os.environ.get("TRITON_INTERPRET") == "1"
    or importlib.util.find_spec("triton") is None  # then its checks say that they are not run
)


@pytest.fixture(autouse=True)
def needs_a_run(request):
    """Skip kernels where they can be neither compiled nor interpreted."""
    values = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    number = getattr(values.get("place"), "number", values.get("lesson"))
    if number in KERNELS and not RUNS_KERNELS:
        pytest.skip("needs an NVIDIA GPU, or TRITON_INTERPRET=1")


@pytest.fixture
def with_solutions(monkeypatch):
    """What an exercise loads of earlier ones are the solutions, as in a notebook of solutions/."""
    monkeypatch.setattr("course.checks.exercises.here", lambda: "solutions")


def run_it(place, defined):
    """Run the exercise's check, and skip the test where this machine cannot."""
    try:
        run_check(check_of(place), defined)
    except NotRunHere as reason:
        pytest.skip(str(reason))


@cache
def fresh_page(number):
    """The exercise notebook as its source says: the stored one may have been worked in."""
    [job] = [j for j in all_jobs() if j.kind == "exercises" and j.name.startswith(number)]
    return [cell for cell in built(job).cells if cell.cell_type == "code"]


def stub_of(place):
    cells = [c for c in fresh_page(place.number) if name_of(c) == place.exercise.name]
    source = "\n\n".join(cell.source for cell in cells)
    return define(
        source, f"<stub of {place.exercise.name}>", preamble_of(place.number, "solutions")
    )


def case_of(place):
    return import_module(f"exercise_cases.lesson{place.number}").CASES[place.exercise.name]


def mutants():
    for title, place in PLACES.items():
        if place.number in KERNELS and not RUNS_KERNELS:
            continue
        for old, new, words in case_of(place).mutants:
            yield pytest.param(place, old, new, words, id=f"{title}: {words}")


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_the_solution_passes(place, with_solutions, capsys):
    run_it(place, load(place.number, place.exercise.name, "solutions"))
    assert re.match(r"Passed: \d+ comparisons", capsys.readouterr().out)


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_the_stub_fails_and_says_what_to_do(place, capsys):
    with pytest.raises(CheckFailed) as failed:
        run_it(place, stub_of(place))
    wanted = {"Predict": "Predict first", "Implement": "still to be written: "}
    assert wanted.get(place.exercise.kind, " ") in str(failed.value)
    assert "This check could not run" not in str(failed.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("lesson", sorted({place.number for place in PLACES.values()}))
def test_on_a_fresh_page_only_the_checks_fail(lesson, capsys):
    """A demonstration of a planted bug shows what is wrong; it does not stop the page."""
    names, failures = {"__name__": "page"}, 0
    with torch.enable_grad():  # a page turns gradients off; other tests in this process train
        for cell in fresh_page(lesson):
            try:
                exec(cell.source, names)
            except CheckFailed:
                failures += 1
    assert failures == sum(place.number == lesson for place in PLACES.values())


@pytest.mark.parametrize(("place", "old", "new", "words"), mutants())
def test_a_wrong_answer_fails_and_its_misconception_is_named(
    place, old, new, words, with_solutions, capsys
):
    source = code_of(place.number, place.exercise.name, "solutions")
    assert old in source
    imports = preamble_of(place.number, "solutions")
    wrong = define(source.replace(old, new), f"<mutant of {place.exercise.name}>", imports)
    with pytest.raises(CheckFailed) as failed:
        run_it(place, wrong)
    assert words in str(failed.value)
    assert "Passed" not in capsys.readouterr().out


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_a_right_answer_written_differently_passes(place, with_solutions, capsys):
    case = case_of(place)
    defined = vars(load(place.number, place.exercise.name, "solutions"))
    for other in (case.other, *case.more):
        names = other if isinstance(other, dict) else {other.__name__: other}
        assert names.keys() <= defined.keys()
        run_it(place, SimpleNamespace(**defined | names))
        assert "Passed" in capsys.readouterr().out


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_a_check_has_wrong_answers_to_prove_it(place):
    assert len(case_of(place).mutants) >= 3
