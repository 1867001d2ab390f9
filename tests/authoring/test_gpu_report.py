"""What `make test-gpu` prints at its end: counts, reasons and failures of JUnit's XML."""

import pytest

from authoring import gpu_report

CASES = {
    "good": '<testcase classname="notebooks.a" name="Cell 0" time="1.5"><system-out/></testcase>',
    "bad": '<testcase classname="notebooks.a" name="C" time="0.5"><failure>x</failure></testcase>',
    "worse": '<testcase classname="tests.b" name="t" time="0"><error>x</error></testcase>',
    "away": '<testcase classname="tests.b" name="u" time="0"><skipped message="none"/></testcase>',
    "file": '<testcase classname="" name="tests.c" time="0"><skipped message="none"/></testcase>',
}


H200, H100 = "NVIDIA H200; torch 2.11.0", "NVIDIA H100; torch 2.11.0"


@pytest.mark.parametrize(
    ("parts", "code", "lines"),
    [
        (
            {"good": (H200, 0)},
            0,
            [
                H200,
                "     1.5 s  notebooks.a: 1 passed",
                "     1.5 s  in all: 1 passed",
                "    12.5 s  part good: passed",
            ],
        ),
        (
            {"file": (H200, 0)},
            0,
            [
                H200,
                "     0.0 s  tests.c: 1 skipped",
                "     0.0 s  in all: 1 skipped",
                "skipped 1: none",
                "    12.5 s  part file: passed",
            ],
        ),
        (
            {"good": (H200, 0), "away": (H200, 0), "bad": (H100, 1), "worse": (H100, 1)},
            1,
            [
                H200,
                H100,
                "     2.0 s  notebooks.a: 1 passed, 1 failed",
                "     0.0 s  tests.b: 1 failed, 1 skipped",
                "     2.0 s  in all: 1 passed, 2 failed, 1 skipped",
                "skipped 1: none",
                "FAILED notebooks.a: C",
                "FAILED tests.b: t",
                "    12.5 s  part good: passed",
                "    12.5 s  part away: passed",
                "    12.5 s  part bad: FAILED",
                "    12.5 s  part worse: FAILED",
            ],
        ),
        (
            {"good": (H200, 2), "missing": None},  # what ran has passed, and yet it is no success
            1,
            [
                H200,
                "     1.5 s  notebooks.a: 1 passed",
                "     1.5 s  in all: 1 passed",
                "    12.5 s  part good: STOPPED BEFORE ITS END",
                "            part missing: HAS NOT RUN",
            ],
        ),
    ],
)
def test_several_files_make_one_report(parts, code, lines, tmp_path, capsys):
    for name, ran in parts.items():
        if ran:
            head = f'<testsuites machine="{ran[0]}" seconds="12.5" exit="{ran[1]}">'
            text = f"{head}<testsuite>{CASES[name]}</testsuite></testsuites>"
            (tmp_path / f"{name}.xml").write_text(text)
    assert gpu_report.main([str(tmp_path / f"{name}.xml") for name in parts]) == code
    assert capsys.readouterr().out.splitlines() == lines


def test_a_file_from_elsewhere_is_refused(tmp_path):
    (tmp_path / "other.xml").write_text("<testsuites/>")
    with pytest.raises(ValueError, match=r"other.xml is not a result that authoring.gpu_tests"):
        gpu_report.main([str(tmp_path / "other.xml")])
