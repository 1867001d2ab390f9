"""What `make test-gpu` prints at its end: counts, reasons and failures of JUnit's XML."""

import pytest

from course import gpu_report

CASES = {
    "good": '<testcase classname="notebooks.a" name="Cell 0" time="1.5"><system-out/></testcase>',
    "bad": '<testcase classname="notebooks.a" name="C" time="0.5"><failure>x</failure></testcase>',
    "worse": '<testcase classname="tests.b" name="t" time="0"><error>x</error></testcase>',
    "away": '<testcase classname="tests.b" name="u" time="0"><skipped message="none"/></testcase>',
    "file": '<testcase classname="" name="tests.c" time="0"><skipped message="none"/></testcase>',
}


@pytest.mark.parametrize(
    ("names", "code", "lines"),
    [
        (["good"], 0, ["     1.5 s  notebooks.a: 1 passed", "     1.5 s  in all: 1 passed"]),
        (
            ["file"],
            0,
            ["     0.0 s  tests.c: 1 skipped", "     0.0 s  in all: 1 skipped", "skipped 1: none"],
        ),
        (
            ["good", "away", "bad", "worse"],
            1,
            [
                "     2.0 s  notebooks.a: 1 passed, 1 failed",
                "     0.0 s  tests.b: 1 failed, 1 skipped",
                "     2.0 s  in all: 1 passed, 2 failed, 1 skipped",
                "skipped 1: none",
                "FAILED notebooks.a: C",
                "FAILED tests.b: t",
            ],
        ),
    ],
)
def test_several_files_make_one_report(names, code, lines, tmp_path, capsys):
    files = [tmp_path / f"{name}.xml" for name in names]
    for name, file in zip(names, files, strict=True):
        file.write_text(f"<testsuites><testsuite>{CASES[name]}</testsuite></testsuites>")
    assert gpu_report.main([str(file) for file in files]) == code
    first, *found = capsys.readouterr().out.splitlines()
    assert "torch" in first
    assert found == lines
