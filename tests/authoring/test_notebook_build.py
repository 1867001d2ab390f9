"""Sources become notebooks: ids from content, outputs kept, and differences found."""

import json
import sys
from pathlib import Path

import nbformat
import pytest

from authoring import build
from authoring.build import differences
from authoring.execute import run_notebook
from course.pages.jobs import Job, built, was_worked_in, write_notebook
from course.pages.source import read_source
from course.show.reading import source_of
from nanovllm.models.decoder import Decoder

SOURCE = """# %% [markdown]
# # Title

# %%
a = 1

# %% tags=["nbval-check-output"] jupyter={"source_hidden": true}
print(a)
"""


@pytest.fixture
def job(tmp_path):
    """A source, and its notebook as one run would have left it."""
    (tmp_path / "source").mkdir()
    job = Job(tmp_path / "source/02_x.py", tmp_path / "02_x.ipynb")
    job.source.write_text(SOURCE)
    store_run(job)
    return job


def store_run(job):
    from nbformat.v4 import new_output

    from course.pages.source import code_digest

    notebook = read_source(job.source)
    for number, cell in enumerate(notebook.cells[1:], start=1):
        cell.execution_count = number
        cell.outputs = [new_output("stream", name="stdout", text=f"{number}\n")]
    notebook.metadata["course"]["run_of"] = code_digest(notebook)
    write_notebook(notebook, job.target)


def edit(job, old, new):
    text = job.source.read_text()
    assert old in text
    job.source.write_text(text.replace(old, new))


def rebuild(job):
    write_notebook(built(job), job.target)
    return nbformat.read(job.target, as_version=4)


def test_a_cells_id_comes_from_its_content_alone(job):
    before = [cell.id for cell in read_source(job.source).cells]
    edit(job, "# %%\na = 1\n", "# %%\nnew = 0\n\n# %%\na = 1\n")
    after = [cell.id for cell in read_source(job.source).cells]
    assert [after[0], *after[2:]] == before
    edit(job, "new = 0", "a = 1")
    twins = read_source(job.source).cells
    assert len({cell.id for cell in twins}) == 4
    assert [twins[1].id, twins[2].id] == [before[1], before[1] + "-2"]


def test_tags_and_folds_arrive_where_jupyter_and_nbval_look(job):
    cell = rebuild(job).cells[2]
    assert cell.metadata == {
        "tags": ["nbval-check-output"],
        "jupyter": {"source_hidden": True},
    }


def test_outputs_of_cells_that_did_not_change_are_kept(job):
    edit(job, "# # Title", "# # Another title")
    notebook = rebuild(job)
    assert notebook.cells[2].outputs[0].text == "2\n"
    assert list(differences(job)) == []
    edit(job, "print(a)", "print(a, a)")
    notebook = rebuild(job)
    assert notebook.cells[1].execution_count == 1
    assert notebook.cells[2].outputs == []


def test_building_twice_writes_the_same_bytes(job):
    first = job.target.read_bytes()
    rebuild(job)
    assert job.target.read_bytes() == first


def change_metadata(notebook):
    notebook["metadata"]["kernelspec"]["name"] = "mine"


def change_id(notebook):
    notebook["cells"][1]["id"] = "other"


def change_source(notebook):
    notebook["cells"][0]["source"] = "# Title, edited here"


def change_tags(notebook):
    notebook["cells"][2]["metadata"]["tags"] = []


def strip(notebook):
    notebook["cells"][2].update(outputs=[], execution_count=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_metadata, "differs from its source in the notebook's metadata"),
        (change_id, "differs from 02_x.py in its cells"),
        (change_source, "cell 0 differs from 02_x.py in its source"),
        (change_tags, "cell 2 differs from 02_x.py in its metadata"),
        (strip, "cell 2 was never run"),
    ],
)
def test_check_finds_a_notebook_that_is_not_its_sources(change, message, job):
    assert list(differences(job)) == []
    notebook = json.loads(job.target.read_text())
    change(notebook)
    job.target.write_text(json.dumps(notebook))
    assert any(message in text for text in differences(job))


@pytest.mark.parametrize("moved", [True, False])
def test_check_finds_code_that_changed_after_the_run(moved, job):
    """Moved or removed cells keep their outputs, but these are not of this notebook's run."""
    cell = "# %%\na = 1\n"
    edit(job, cell, "")
    if moved:
        job.source.write_text(job.source.read_text() + "\n" + cell)
    rebuild(job)
    assert any("code changed after the stored run" in text for text in differences(job))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('tags=["nbval', 'tags=["raises-exception", "nbval', "unknown tags ['raises-exception']"),
        ("source_hidden", "hidden", "unknown folds ['hidden']"),
        ('jupyter={"source_hidden": true}', "editable=false", "unknown metadata ['editable']"),
        ("# %%\na", "# %% [raw]\n# a", "code or markdown, not raw"),
    ],
)
def test_a_source_says_nothing_that_is_not_known(old, new, message, job):
    edit(job, old, new)
    with pytest.raises(ValueError, match=message.replace("[", r"\[").replace("]", r"\]")):
        read_source(job.source)


def test_what_a_notebook_requires_is_read_from_the_header(job):
    header = "# ---\n# jupyter:\n#   course:\n#     requires: [{}]\n# ---\n\n"
    job.source.write_text(header.format("cuda") + SOURCE)
    assert read_source(job.source).metadata["course"] == {"requires": ["cuda"]}
    job.source.write_text(header.format("abacus") + SOURCE)
    with pytest.raises(ValueError, match="abacus"):
        read_source(job.source)


def test_a_run_stores_outputs_without_this_machines_folders(job):
    paths = f"print({str(Path(build.ROOT, 'course'))!r}, {sys.prefix + '/lib'!r})"
    edit(job, "print(a)", f"{paths}\na")
    notebook = run_notebook(read_source(job.source), job.target)
    assert [cell.execution_count for cell in notebook.cells[1:]] == [1, 2]
    printed, value = notebook.cells[2].outputs
    assert (printed.text, value.data) == ("course lib\n", {"text/plain": "1"})
    assert set(notebook.metadata) == {"kernelspec", "language_info", "course"}
    assert "execution" not in notebook.cells[1].metadata
    write_notebook(notebook, job.target)
    assert list(differences(job)) == []


def test_a_run_that_fails_names_notebook_and_cell(job):
    edit(job, "print(a)", "assert a == 2, 'a is one'")
    with pytest.raises(ValueError, match=r"02_x.ipynb, cell 2 .*failed:(.|\n)*a is one"):
        run_notebook(read_source(job.source), job.target)


def test_the_command_builds_checks_and_names_what_is_not_built(job, monkeypatch, capsys):
    monkeypatch.setattr(build, "ROOT", job.target.parent)
    monkeypatch.setattr(build, "all_jobs", lambda: [job])
    assert build.main(["--check"]) == 0
    edit(job, "a = 1", "a = 2")
    assert build.main(["--check"]) == 1
    assert build.main([]) == 0
    assert build.main(["--check"]) == 1
    said = "02_x.ipynb: cell 1 was never run: python -m authoring.build --run 02_x"
    assert said in capsys.readouterr().out
    assert build.main(["07"]) == 2
    assert "no source starts with '07'" in capsys.readouterr().err


def write_in(path, cell, text):
    notebook = json.loads(path.read_text())
    notebook["cells"][cell]["source"] = text
    path.write_text(json.dumps(notebook))


@pytest.mark.parametrize("cell", [0, 1])
def test_a_page_that_somebody_wrote_in_is_overwritten_only_by_force(cell, job, monkeypatch, capsys):
    monkeypatch.setattr(build, "ROOT", job.target.parent)
    monkeypatch.setattr(build, "all_jobs", lambda: [job])
    fresh = job.target.read_bytes()
    write_in(job.target, cell, "mine")
    before = job.target.read_bytes()
    assert next(differences(job)).endswith("in its source: python -m authoring.build --force")
    assert build.main([]) == build.main(["--run"]) == 0
    assert job.target.read_bytes() == before
    printed = capsys.readouterr().out
    assert printed.count("was worked in; --force writes it anew") == 2
    assert build.main(["--force"]) == 0
    rebuilt = nbformat.read(job.target, as_version=4)
    assert rebuilt.cells[1].outputs == [] if cell else job.target.read_bytes() == fresh


def test_a_page_that_is_no_notebook_is_built_by_force(job, monkeypatch, capsys):
    monkeypatch.setattr(build, "ROOT", job.target.parent)
    monkeypatch.setattr(build, "all_jobs", lambda: [job])
    for text in ("", "{bad", "[]", "{}"):
        job.target.write_text(text)
        assert build.main([]) == 0
        assert job.target.read_text() == text
        assert list(differences(job)) == ["is no notebook any more; --force writes it anew"]
        assert build.main(["--force"]) == 0
        assert len(nbformat.read(job.target, as_version=4).cells) == 3


def test_outputs_alone_are_no_reason_to_leave_a_lesson(job):
    """`--store-outputs` and a reader's run change these: the next build takes them over."""
    notebook = nbformat.read(job.target, as_version=4)
    notebook.cells[2].outputs = []
    write_notebook(notebook, job.target)
    edit(job, "# # Title", "# # Another title")
    assert not was_worked_in(job)


def lists(job, plain):
    """Make the stored run of the job's second code cell list code."""
    from nbformat.v4 import new_output

    notebook = nbformat.read(job.target, as_version=4)
    data = {"text/html": "<pre>code</pre>", "text/plain": plain}
    notebook.cells[2].outputs = [new_output("display_data", data=data)]
    write_notebook(notebook, job.target)


def test_listed_code_is_brought_up_to_date_without_a_run(job):
    title = "# nanovllm/models/decoder.py: Decoder.compute_logits"
    lists(job, f"{title}\ndef compute_logits(self, hidden):\n    return None")
    (said,) = differences(job)
    assert said == "cell 2 lists code that has changed since: python -m authoring.build"
    (output,) = rebuild(job).cells[2].outputs
    assert output.data["text/plain"] == f"{title}\n{source_of(Decoder.compute_logits)}"
    assert "lm_head" in output.data["text/html"]
    assert not list(differences(job))


def test_a_cell_that_lists_code_that_is_gone_counts_as_not_run(job):
    lists(job, "# nanovllm/models/decoder.py: Decoder.nothing\ndef nothing(self): ...")
    cell = rebuild(job).cells[2]
    assert (cell.outputs, cell.execution_count) == ([], None)
    assert [text.split(":")[0] for text in differences(job)] == ["cell 2 was never run"]


def test_other_outputs_are_left_alone(job):
    lists(job, "nanovllm/models/decoder.py: Decoder.compute_logits")
    assert not list(differences(job))
