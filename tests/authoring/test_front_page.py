"""README.md fits on one screen, and what it and docs/ say agrees with the code and the records."""

import json
import re
import shlex
import tomllib
from dataclasses import replace
from importlib.util import find_spec
from xml.etree import ElementTree

import pytest

from authoring.pictures import alt_text, lesson_speeds
from course.cli import build_parser, main
from course.clone import ROOT
from course.commands.bench import with_benchmark
from course.labs.climb import OTHERS
from course.show.svg import ORANGE
from course.stages.records import read

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RECORD = json.loads((ROOT / "figures/data/h200_sampling_workloads.json").read_text())["workloads"]
MAX_WORDS = 900
SVG = "{http://www.w3.org/2000/svg}"


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)


def is_in_order(page: str, *parts: str) -> bool:
    places = [page.index(part) for part in parts]
    return places == sorted(places)


# -- one screen ------------------------------------------------------------------------------------


def test_the_front_page_is_short():
    assert len(README.split()) < MAX_WORDS


def test_the_picture_and_the_commands_come_first():
    assert is_in_order(README, "(figures/lesson_speeds.svg)", "make run", "make lab", "```python")
    assert is_in_order(README, "```python", "## Lessons", "## Against vLLM")
    before = README[: README.index("![Output")]
    assert len(before.splitlines()) < 12, "the picture belongs at the top"


def test_the_picture_is_described_in_words():
    assert f"![{alt_text('lesson_speeds')}](figures/lesson_speeds.svg)" in README


def test_the_badges_are_true_and_are_all_there_is():
    badges = re.findall(r"!\[[^]]*\]\(https://img\.shields\.io/badge/([^)]*)\)", README)
    pythons = [c.split(" :: ")[-1] for c in PROJECT["classifiers"] if ":: 3." in c]
    assert badges == [
        f"python-{pythons[0]}_to_{pythons[-1]}-blue",
        f"licence-{PROJECT['license']}-blue",
    ]
    assert README.count("![") == len(badges) + 1, "the other picture is of this repository"


# -- what it says ----------------------------------------------------------------------------------


def test_every_lesson_has_its_row():
    linked = re.findall(r"^\| \[(\d\d) [^]]*\]\(notebooks/(\w+\.ipynb)\)", README, re.MULTILINE)
    assert [name for _, name in linked] == sorted(p.name for p in ROOT.glob("notebooks/*.ipynb"))
    assert all(name.startswith(number) for number, name in linked)
    listed = re.findall(r"^\| \[\d\d\]\(\.\./notebooks/(.*?)\)", PAGES["lessons.md"], re.MULTILINE)
    assert listed == [name for _, name in linked]


def row_of(page: str, workload: str, ours: str) -> str:
    """The row of the comparison for one workload of this engine."""
    lines = page.splitlines()
    [row] = [line for line in lines if line.startswith(f"| {workload}") and ours in line]
    return row


def test_the_comparison_is_what_is_recorded():
    benchmarks = PAGES["benchmarks.md"]
    for name in ("W1", "W5"):
        entry = RECORD[name]
        median = entry["median"]["output_tokens_per_second"]
        slowest, fastest = entry["slowest_tokens_per_second"], entry["fastest_tokens_per_second"]
        ours = f"{median:,.0f} ({slowest:,.0f} to {fastest:,.0f})"
        _, _, _, vllm, _ = row_of(README, name, ours).split("|")
        assert ours in row_of(benchmarks, name, ours)
        assert vllm in row_of(benchmarks, name, ours), "both pages quote the same runs of vLLM"
        if name in OTHERS["vLLM 0.24"]:
            low, high = OTHERS["vLLM 0.24"][name]
            assert vllm.strip() == f"{low:,} to {high:,}"
    assert RECORD["W5"]["sampling"] == {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    assert "temperature 0.6, top-p 0.95, top-k 20" in README


def test_the_output_of_make_run_has_the_form_of_a_run(capsys):
    [shown] = blocks(README, "console")
    prompt = re.search(r"^> (.*)$", shown, flags=re.MULTILINE)[1]
    assert main(["run", "--max-tokens", "8"]) == 0
    printed = capsys.readouterr().out
    assert f"\n> {prompt}\n" in printed
    assert rows_of_summary(shown) == rows_of_summary(printed) != []


def rows_of_summary(printed: str) -> list[str]:
    """The names of the rows that `course run` ends in."""
    return re.findall(r"^(\w[\w ]{0,20}?)  +\S", printed, flags=re.MULTILINE)


# -- its code --------------------------------------------------------------------------------------

SHELL = [
    (name, command.strip())
    for name, page in {"README.md": README, **PAGES}.items()
    for block in blocks(page, "bash")
    for line in block.splitlines()
    for command in [line.split(" #")[0], *re.findall(r"# or: (.*)", line)]
]
COURSE = [(name, line) for name, line in SHELL if re.match(r"(\.venv/bin/)?course ", line)]
MODULES = [(name, match[1]) for name, line in SHELL if (match := re.search(r"-m ([\w.]+)", line))]


@pytest.mark.parametrize(("name", "line"), COURSE)
def test_a_command_of_the_course_has_these_arguments(name, line):
    build_parser().parse_args(with_benchmark(shlex.split(line)[1:]))


@pytest.mark.parametrize(("name", "module"), MODULES)
def test_a_module_that_a_page_runs_exists(name, module):
    assert find_spec(module)


def test_the_front_pages_script_has_ten_lines_and_is_the_only_one():
    """tests/course/test_course.py and test_install.py run it."""
    [script] = blocks(README, "python")
    assert len(script.splitlines()) == 10
    assert set(re.findall(r"^(?:from|import) (\w+)", script, re.MULTILINE)) == {"nanovllm"}
    assert not [name for name, page in PAGES.items() if blocks(page, "python")], "run these too"


# -- the picture -----------------------------------------------------------------------------------


@pytest.fixture
def rows():
    return read(lesson_speeds.RECORDS, "shipped")


def elements(rows, tag):
    return ElementTree.fromstring(lesson_speeds.draw(rows).svg()).findall(f"{SVG}{tag}")


def hatched_rows(rows) -> set[int]:
    """The rows of the picture, from 0, in which lines of a hatch lie."""
    lines = [line for line in elements(rows, "polyline") if line.get("stroke") == ORANGE]
    heights = [float(point.split(",")[1]) for x in lines for point in x.get("points").split()]
    return {int((height - lesson_speeds.TOP) // lesson_speeds.ROW) for height in heights}


def test_the_picture_shows_each_recorded_speed_and_names_the_machine(rows):
    texts = [element.text for element in elements(rows, "text")]
    for row in rows:
        assert f"{row.numbers['tokens_per_second']:,.0f}" in texts
    assert any(rows[0].machine in text for text in texts)
    assert any("tokens a second" in text for text in texts)
    assert "37" in texts, "the ladder begins with a loop that recomputes everything"


def test_a_bar_is_hatched_where_a_stage_ran_a_part_of_the_workload(rows):
    assert hatched_rows(rows) == {0}
    part = rows[3].workload.replace("64 requests", "8 requests")
    assert hatched_rows([*rows[:3], replace(rows[3], workload=part), *rows[4:]]) == {0, 3}
    assert hatched_rows(rows[1:]) == set()


def test_a_faster_stage_has_a_longer_bar(rows):
    bars = [box for box in elements(rows, "rect") if box.get("x") == str(lesson_speeds.LEFT)]
    widths = [float(bar.get("width")) for bar in bars]
    speeds = [row.numbers["tokens_per_second"] for row in rows]
    order = sorted(range(len(rows)), key=speeds.__getitem__)
    assert len(widths) == len(rows)
    assert sorted(range(len(rows)), key=widths.__getitem__) == order
    assert max(widths) <= lesson_speeds.RIGHT - lesson_speeds.LEFT


def test_records_of_two_machines_make_no_picture(rows):
    with pytest.raises(ValueError, match="unpack"):
        lesson_speeds.draw([*rows[:2], replace(rows[2], machine="another")])
