"""For authors: build the notebooks from their sources; --run stores outputs, --check compares.

course build                write all notebooks; cells that did not change keep their outputs
course build --run 00 02    the same for these lessons, run top to bottom to store what they print
course build --check        write nothing; exit 1 if a notebook is not what its source says
course build exercises/03 solutions/03     only these
course build --force 03     also a lesson or solution page that somebody wrote in

notebooks/source/NN.py makes notebooks/NN.ipynb. solutions/NN.py makes solutions/NN.ipynb and
exercises/NN.ipynb. Lessons and solutions store the outputs of a run, exercises none. A notebook
that somebody has worked in is left alone; `course reset` puts an exercise notebook aside.
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from course.files import write_whole
from course.notebooks.exercise_cells import exercises_in, transform
from course.notebooks.source import ROOT, cell_ids, code_digest, read_source
from course.reading import TITLE, up_to_date


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


def chosen(jobs: list[Job], names: list[str]) -> list[Job]:
    """The jobs that start with one of `names` (02, or exercises/02); all of them if none is."""

    def starts(job: Job, name: str) -> bool:
        return job.name.startswith(name) or f"{job.kind}/{job.name}".startswith(name)

    for name in names:
        if not any(starts(job, name) for job in jobs):
            stems = list(dict.fromkeys(job.source.stem for job in jobs))
            raise ValueError(f"no source starts with {name!r}: {stems}")
    return [job for job in jobs if not names or any(starts(job, name) for name in names)]


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
            cell.outputs = [current(output) for output in stored[cell.id].outputs]
            cell.execution_count = stored[cell.id].execution_count
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


def differences(job: Job) -> Iterator[str]:
    """What keeps the stored notebook from being this source's, run top to bottom; nothing if so."""
    if not job.target.exists():
        yield "is not built yet: course build"
        return
    if job.kind == "exercises" and was_worked_in(job):
        yield f"was worked in; {way_out(job)}"
        return
    stored, wanted = stored_page(job), built(job)
    if stored is None:
        yield f"is no notebook any more; {way_out(job)}"
        return
    command = f"course build{' --force' * was_worked_in(job)}"
    if [c.get("id") for c in stored.cells] != [c.id for c in wanted.cells]:
        yield f"differs from {job.source.name} in its cells: {command}"
        return
    for index, (have, want) in enumerate(zip(stored.cells, wanted.cells, strict=True)):
        for field in ("cell_type", "source", "metadata"):
            if have[field] != want[field]:
                yield f"cell {index} differs from {job.source.name} in its {field}: {command}"
        if want.cell_type == "code":
            yield from run_differences(job, index, have)
            if have.outputs != want.outputs:
                yield f"cell {index} lists code that has changed since: course build"
    if stored.metadata != wanted.metadata:
        yield "differs from its source in the notebook's metadata: course build"
    run_of = stored.metadata.get("course", {}).get("run_of")
    if job.stores_a_run and run_of != code_digest(stored):
        yield f"its code changed after the stored run: course build --run {job.source.stem}"


def way_out(job: Job) -> str:
    """How to build a notebook that was worked in all the same."""
    if job.kind == "exercises":
        return f"`course reset {job.name[:2]}` keeps that beside a fresh one"
    return "--force writes it anew"


def run_differences(job: Job, index: int, cell: Any) -> Iterator[str]:
    """Lessons and solutions store the outputs of a run, exercises none."""
    if job.stores_a_run:
        if cell.execution_count is None:
            yield f"cell {index} was never run: course build --run {job.source.stem}"
    elif cell.outputs or cell.execution_count is not None:
        yield f"cell {index} stores a run, and exercises store none: course build"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", help="which: 00, or exercises/02 (default: all)")
    parser.add_argument(
        "--force", action="store_true", help="overwrite what was written in lessons and solutions"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--run", action="store_true", help="run them and store the outputs")
    how.add_argument("--check", action="store_true", help="only compare")


def main(args: argparse.Namespace) -> int:
    jobs = chosen(all_jobs(), args.names)
    if args.run:
        jobs = [job for job in jobs if job.stores_a_run]
    if args.check:
        problems = [f"{job.kind}/{job.name}: {text}" for job in jobs for text in differences(job)]
        print("\n".join(problems) or f"{len(jobs)} notebooks are what their sources say.")
        return 1 if problems else 0
    for job in jobs:
        if was_worked_in(job) and not (args.force and job.stores_a_run):
            print(f"{job.kind}/{job.name}: left alone, since it was worked in; {way_out(job)}")
            continue
        notebook = built(job)
        if args.run:
            from course.notebooks.execute import run_notebook

            notebook = run_notebook(notebook, job.target)
        job.target.parent.mkdir(exist_ok=True)
        write_notebook(notebook, job.target)
        print(f"{job.target.relative_to(ROOT)}: {'run and ' if args.run else ''}written")
    return 0
