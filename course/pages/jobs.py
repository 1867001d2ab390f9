"""Each notebook and the source that it is built from, and whether somebody has worked in it.

notebooks/source/NN.py makes notebooks/NN.ipynb. solutions/NN.py makes solutions/NN.ipynb and
exercises/NN.ipynb. Lessons and solutions store the outputs of a run, exercises none. `course reset`
builds a page of exercises afresh, and `python -m authoring.build` builds all pages.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from course.clone import ROOT
from course.files import write_whole
from course.pages.exercise_cells import exercises_in, transform
from course.pages.source import cell_ids, code_digest, read_source
from course.show.reading import TITLE, up_to_date


@dataclass(frozen=True)
class Job:
    """One notebook and the source it is built from."""

    source: Path
    target: Path

    @property
    def name(self) -> str:
        return self.target.name

    @property
    def kind(self) -> str:
        """The folder it belongs to: notebooks, exercises or solutions."""
        return self.target.parent.name if self.source.parent.name == "solutions" else "notebooks"

    @property
    def stores_a_run(self) -> bool:
        return self.kind != "exercises"


def all_jobs(root: Path | None = None) -> list[Job]:
    """Every notebook of the course, in order: lessons, then exercises, then solutions."""
    root = root or ROOT
    lessons = sorted(root.glob("notebooks/source/*.py"))
    exercises = sorted(root.glob("solutions/[0-9]*.py"))
    folders = [("notebooks", lessons), ("exercises", exercises), ("solutions", exercises)]
    return [
        Job(source, root / folder / f"{source.stem}.ipynb")
        for folder, sources in folders
        for source in sources
    ]


def built(job: Job) -> Any:
    """The notebook as its source says, with the outputs stored for cells that did not change."""
    notebook = read_source(job.source)
    if job.kind != "notebooks":
        make_exercises(notebook, job.kind)
    if job.stores_a_run and (old := stored_page(job)) is not None:
        keep_outputs(notebook, old)
    return notebook


def make_exercises(notebook: Any, kind: str) -> None:
    """Make a source the page of its stubs, or of its solutions, with what `progress` lists."""
    notebook.metadata["course"]["exercises"] = [asdict(e) for e in exercises_in(notebook.cells)]
    transform(notebook.cells, kind)
    for cell, cell_id in zip(notebook.cells, cell_ids(notebook.cells), strict=True):
        cell.id = cell_id
    notebook.metadata["course"]["built"] = code_digest(notebook)


def keep_outputs(notebook: Any, old: Any) -> None:
    """Take over from an older build what its run stored, cell by cell."""
    stored = dict(zip(cell_ids(old.cells), old.cells, strict=True))  # by what they hold now
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.id in stored:
            try:
                cell.outputs = [current(output) for output in stored[cell.id].outputs]
                cell.execution_count = stored[cell.id].execution_count
            except ValueError:  # it lists code that is no more, so it counts as not run
                cell.outputs, cell.execution_count = [], None
    if run_of := old.metadata.get("course", {}).get("run_of"):
        notebook.metadata["course"]["run_of"] = run_of


def current(output: Any) -> Any:
    """A stored output; one that lists code of the course lists it as it stands now."""
    plain = output.get("data", {}).get("text/plain", "")
    if TITLE.match(plain):
        page = up_to_date(plain)
        if page["text/plain"] != plain:
            output.data = page
    return output


def was_worked_in(job: Job) -> bool:
    """Whether a notebook holds anything that a build would lose: a build has nothing else in it.

    A cell's id is made of its content, so one that somebody wrote, or wrote in, has another. An
    exercise notebook that was run counts as well, and so does a file that cannot be read.
    """
    if not job.target.exists():
        return False
    page = stored_page(job)
    if page is None or [cell.get("id") for cell in page.cells] != cell_ids(page.cells):
        return True
    if job.stores_a_run:
        return False
    built_from = page.metadata.get("course", {}).get("built")
    return built_from != code_digest(page) or any(cell.get("outputs") for cell in page.cells)


def stored_page(job: Job) -> Any:
    """The notebook as it stands; None if there is none, or what is there is no notebook."""
    if not job.target.exists():
        return None
    try:
        return read_notebook(job.target)
    except Exception:  # nbformat raises what a broken file happens to lead to
        return None


def read_notebook(path: Path) -> Any:
    import nbformat

    return nbformat.read(path, as_version=4)


def write_notebook(notebook: Any, path: Path) -> None:
    import nbformat

    text = nbformat.writes(notebook)
    if not path.exists() or path.read_text(encoding="utf-8") != text + "\n":
        write_whole(path, text + "\n")
