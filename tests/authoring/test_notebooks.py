"""Every committed notebook passes every lint, and each lint is seen to bite on a planted fault."""

from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_markdown_cell, new_output
from planted import good_notebook, write

from authoring.build import differences
from authoring.lints import lint
from course.pages.jobs import all_jobs

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("notebooks", "exercises", "solutions")
NOTEBOOKS = [
    path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).glob("*.ipynb"))
    if ".mine-" not in path.name
]


LESSONS = sorted((ROOT / "notebooks/source").glob("*.py"))


def test_every_notebook_has_a_source():
    assert [job.target for job in all_jobs()] == NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_notebook_passes_every_lint(path):
    assert lint(path) == []


@pytest.mark.parametrize("job", all_jobs(), ids=lambda job: f"{job.kind}/{job.source.stem}")
def test_a_notebook_is_what_its_source_says(job):
    assert list(differences(job)) == []


def test_the_good_notebook_is_good(tmp_path):
    assert lint(write(good_notebook(), tmp_path)) == []


def stripped(notebook):
    for cell in notebook.cells[3:]:
        cell.outputs, cell.execution_count = [], None


def one_stripped(notebook):
    notebook.cells[5].outputs, notebook.cells[5].execution_count = [], None


def out_of_order(notebook):
    notebook.cells[6].execution_count, notebook.cells[5].execution_count = 3, 4


def appends(cell, text):
    """A fault that is more text at the end of one cell's source."""

    def plant(notebook):
        notebook.cells[cell].source += text

    return plant


def replaces(cell, old, new):
    def plant(notebook):
        assert old in notebook.cells[cell].source
        notebook.cells[cell].source = notebook.cells[cell].source.replace(old, new)

    return plant


def prints(text, name="stdout"):
    return shows(new_output("stream", name=name, text=text))


def displays(kind, data):
    return shows(new_output("display_data", data={kind: data}))


def shows(output):
    def plant(notebook):
        notebook.cells[6].outputs = [output] if output else []

    return plant


def in_a_loop(notebook):
    notebook.cells[6].outputs = []
    notebook.cells[6].source = "def f():\n    print(4)\nfor i in range(3):\n    show(i)"


def tagged(tag):
    def plant(notebook):
        notebook.cells[6].metadata["tags"] = [tag]

    return plant


def too_few_cells(notebook):
    del notebook.cells[19:]


def too_many_cells(notebook):
    notebook.cells += [new_markdown_cell("") for _ in range(21)]


GITHUB = "https://github.com/vllm-project/vllm/blob"
FAULTS = {
    "stripped": (stripped, None, "was never run"),
    "outputs lost": (shows(None), 6, "calls print, and stores no output"),
    "outputs of a loop lost": (in_a_loop, 6, "calls show, and stores no output"),
    "one stripped": (one_stripped, 5, "was never run"),
    "out of order": (out_of_order, 6, "ran as number 3, but stands at 4"),
    "error": (shows(new_output("error", ename="KeyError", evalue="7")), 6, "an error: KeyError: 7"),
    "stderr": (prints("UserWarning: old", "stderr"), 6, "prints to stderr: 'UserWarning: old'"),
    "raises nothing": (tagged("raises-exception"), 6, "raises-exception passes whatever happens"),
    "skips": (appends(6, "\n# NBVAL_SKIP"), 6, "nbval-skip passes whatever happens"),
    "deaf tag": (tagged("NBVAL_CHECK_OUTPUT"), 6, "nbval reads the tag nbval-check-output"),
    "shell": (appends(6, "\n!false"), 6, "a shell line fails in silence"),
    "shell cell": (replaces(6, "print(4)", "%%bash\nfalse | true"), 6, "a shell line"),
    "no assert": (replaces(3, "assert 1 + 1 == 2", "1 + 1"), None, "no cell asserts anything"),
    "long line": (appends(6, "\n" + "x = 1; " * 20), 6, "a line of 140 columns"),
    "no python": (appends(6, "\nx ="), 6, "is not Python"),
    "no alt": (appends(1, "\n![](../figures/map.svg)"), 1, "map.svg has no alt text"),
    "no alt in html": (appends(1, '\n<img src="data:,">'), 1, "an <img> has no alt text"),
    "no alt in output": (displays("image/png", "aGk="), 6, "shows an image/png without alt text"),
    "bare svg": (displays("text/html", "<svg></svg>"), 6, "an inline <svg> has no aria-label"),
    "widget": (
        displays("application/vnd.jupyter.widget-view+json", {"model_id": "1"}),
        6,
        "a live widget is empty",
    ),
    "remote": (appends(1, "\n![a map](https://x.org/map.svg)"), 1, "loads https://x.org/map.svg"),
    "remote in html": (appends(1, '\n<img alt="a map" src="//x.org/m">'), 1, "loads //x.org/m"),
    "remote by reference": (
        appends(1, "\n![a map][m]\n\n[m]: https://x.org/map.svg"),
        1,
        "![a map] is an image by reference",
    ),
    "remote in srcset": (
        appends(1, '\n<img alt="a map" src="data:," srcset="https://x.org/m.png 2x">'),
        1,
        "loads https://x.org/m.png",
    ),
    "remote in a style": (
        displays("text/html", "<style>b { background: url( 'https://x.org/m.png') }</style>"),
        6,
        "loads https://x.org/m.png",
    ),
    "remote in output": (
        displays("text/html", '<script src="https://x.org/a.js"></script>'),
        6,
        "loads https://x.org/a.js",
    ),
    "no such image": (appends(1, "\n![a map](map.svg)"), 1, "there is no file map.svg"),
    "no such link": (appends(1, "\n[next](03_nothing.ipynb)"), 1, "03_nothing.ipynb leads nowhere"),
    "unpinned": (appends(1, f"\n[it]({GITHUB}/main/setup.py)"), 1, "source at 'main': pin"),
    "path": (prints("saved to /home/ann/model/x.bin\n"), 6, "absolute path /home/ann/model/x.bin"),
    "path on windows": (prints("at C:\\Users\\ann"), 6, "absolute path C:\\Users"),
    "path in html": (displays("text/html", "<b>/opt/venv/x</b>"), 6, "absolute path /opt/venv/x"),
    "few cells": (too_few_cells, None, "19 cells; a lesson has 20 to 40"),
    "many cells": (too_many_cells, None, "41 cells; a lesson has 20 to 40"),
    "few words": (replaces(1, "after word of quiet", ""), None, "words; a lesson has 600 or more"),
    "large": (prints("x" * 1_500_000), None, "bytes, at most 1,500,000"),
    "card": (replaces(0, "| Needs | lesson 01 |\n", ""), 0, "no row '| Needs | ... |'"),
    "empty card": (replaces(0, "easy", " "), 0, "no row '| Difficulty | ... |'"),
    "card without minutes": (replaces(0, "45", "some"), 0, "minutes are a number"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_its_place_named(fault, tmp_path):
    plant, cell, message = FAULTS[fault]
    (tmp_path.parent / "figures").mkdir(exist_ok=True)
    (tmp_path.parent / "figures/map.svg").touch()
    notebook = good_notebook()
    plant(notebook)
    place = "02_kv_cache.ipynb" + ("" if cell is None else f", cell {cell} (")
    found = [text for text in lint(write(notebook, tmp_path)) if message in text]
    assert found
    assert all(text.startswith(place) for text in found)


@pytest.mark.parametrize("source", ["getpass.getuser", "socket.gethostname"])
def test_the_makers_own_names_are_found(source, monkeypatch, tmp_path):
    monkeypatch.setattr(source, lambda: "maple-7")
    notebook = good_notebook()
    prints("ran on maple-7, not on maple-71")(notebook)
    assert "cell 6" in "".join(lint(write(notebook, tmp_path)))
    prints("ran on maple-71")(notebook)
    assert lint(write(notebook, tmp_path)) == []


def test_a_lesson_is_in_the_table_and_its_card_names_the_files_it_ends_in(tmp_path):
    assert "is not a lesson" in lint(write(good_notebook(), tmp_path, "42_new.ipynb"))[0]
    attention, metadata = lint(write(good_notebook(), tmp_path, "03_paged_blocks.ipynb"))
    assert "does not name nanovllm/layers/attention.py" in attention
    assert "does not name nanovllm/metadata.py" in metadata


@pytest.mark.parametrize(
    "text", ["3 tok/s", "1/2/3", "2026/11/24", "https://x.org/a/b", "a /b", "KV: prefill/decode"]
)
def test_what_only_looks_like_a_path_is_let_through(text, tmp_path):
    notebook = good_notebook()
    prints(text)(notebook)
    assert lint(write(notebook, tmp_path)) == []


def test_links_in_code_spans_and_to_tags_are_fine(tmp_path):
    notebook = good_notebook()
    notebook.cells[1].source += f"\n`[x](y.md)` [it]({GITHUB}/v0.24.0/setup.py) [up](#top)"
    assert lint(write(notebook, tmp_path)) == []


def test_code_shown_as_html_is_no_markdown(tmp_path):
    notebook = good_notebook()
    displays("text/html", "<pre>norms[0](query)</pre>")(notebook)
    assert lint(write(notebook, tmp_path)) == []
    displays("text/html", '<a href="nowhere.ipynb">it</a>')(notebook)
    assert "nowhere.ipynb leads nowhere" in "".join(lint(write(notebook, tmp_path)))


def test_the_notebook_format_is_valid():
    for path in NOTEBOOKS:
        nbformat.validate(nbformat.read(path, as_version=4))


@pytest.mark.parametrize("source", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_measures_on_one_thread(source):
    """Its stage records then stand beside those of other lessons: a machine's name has threads."""
    assert "torch.set_num_threads(1)" in source.read_text(encoding="utf-8")
