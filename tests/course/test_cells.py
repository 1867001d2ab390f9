"""Cells of a notebook are read as IPython reads them, and nothing but Python of them is run."""

import ast

import pytest

from course.checks.cells import definitions, plain_python
from course.checks.exercises import define


def names_of(source):
    return vars(define(plain_python(source), "<cell>"))


@pytest.mark.parametrize(
    ("source", "defined"),
    [
        ("a = 7 \\\n    % 4", {"a": 3}),  # no magic
        ("%%time\na = 1", {"a": 1}),
        ("\n\n%%capture out --no-stderr\n%time a = 1\nb = %time a + 1", {"a": 1, "b": 2}),
        ("%matplotlib inline\na = 1\na?\n!false", {"a": 1}),
        ("files = !ls\na = 1", {"files": None, "a": 1}),
        ("%%bash\na = 1", {}),
        ("%%writefile a.py\na = 1", {}),
        ("%%timeit\na = 1", {}),  # IPython does not define it either
        ("def f():\n    %time x = 1\n    return 2\na = f()", None),
    ],
)
def test_magics_leave_python(source, defined, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = names_of(source)
    assert found == defined if defined is not None else found["a"] == 2
    assert list(tmp_path.iterdir()) == []


def test_lines_keep_their_places():
    source = "%%time\n%load_ext autoreload\n\ndef f():\n    return 1 / 0\n"
    with pytest.raises(ZeroDivisionError) as failed:
        names_of(source)["f"]()
    assert failed.traceback[-1].lineno == 4  # counted from 0


def test_only_definitions_are_taken_from_a_cell():
    source = "%cd ..\nimport torch\nn: int = 3\nprint(n)\nx = f(3)\nclass A: pass\n"
    source += "for i in []: pass\nTABLE = {'a': [1, -2]}\nasync def g(): pass\nm: int\n"
    texts = [ast.unparse(statement).splitlines()[0] for statement in definitions(source)]
    wanted = ["import torch", "n: int = 3", "class A:", "TABLE = {'a': [1, -2]}", "async def g():"]
    assert texts == wanted


@pytest.mark.parametrize("source", ["def f(:", "%%time\ndef f(:", "a b c"])
def test_what_is_wrong_in_ipython_too_defines_nothing_and_says_so_when_run(source):
    assert list(definitions(source)) == []
    with pytest.raises(SyntaxError):
        names_of(source)


def test_a_name_of_a_helper_counts_where_the_cell_defines_it_again():
    preamble = list(definitions("answer = 3\nscale = 2"))
    assert vars(define("answer = 3\nx = scale", "<cell>", preamble)) == {"answer": 3, "x": 2}


def test_a_helper_that_fails_is_left_out():
    preamble = list(definitions("class A(Missing): pass\ndef f(n=exit()): pass\ndef g(): return 1"))
    assert vars(define("x = g()", "<cell>", preamble)) == {"x": 1}
