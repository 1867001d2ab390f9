"""Build the notebooks from their sources; --run stores outputs, --check compares.

course build                write notebooks/*.ipynb; cells that did not change keep their outputs
course build --run 00 02    the same, then run these top to bottom and store what they print
course build --check        write nothing; exit 1 if a notebook is not what its source says
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from course.notebooks.source import ROOT, code_digest, read_source


@dataclass(frozen=True)
class Job:
    """One notebook and the source it is built from."""

    source: Path
    target: Path

    @property
    def name(self) -> str:
        return self.target.name


def all_jobs(root: Path = ROOT) -> list[Job]:
    """Every notebook of the course, in order."""
    folder = root / "notebooks"
    return [Job(s, folder / f"{s.stem}.ipynb") for s in sorted(folder.glob("source/*.py"))]


def chosen(jobs: list[Job], names: list[str]) -> list[Job]:
    """The jobs whose file name starts with one of `names`; all of them if none is given."""
    for name in names:
        if not any(job.name.startswith(name) for job in jobs):
            raise ValueError(f"no source starts with {name!r}: {[j.source.stem for j in jobs]}")
    return [job for job in jobs if not names or job.name.startswith(tuple(names))]


def built(job: Job) -> Any:
    """The notebook as its source says, with the outputs stored for cells that did not change."""
    notebook = read_source(job.source)
    if not job.target.exists():
        return notebook
    old = read_notebook(job.target)
    stored = {cell.get("id"): cell for cell in old.cells if cell.cell_type == "code"}
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.id in stored:
            cell.outputs = stored[cell.id].outputs
            cell.execution_count = stored[cell.id].execution_count
    if run_of := old.metadata.get("course", {}).get("run_of"):
        notebook.metadata["course"]["run_of"] = run_of
    return notebook


def read_notebook(path: Path) -> Any:
    import nbformat

    return nbformat.read(path, as_version=4)


def write_notebook(notebook: Any, path: Path) -> None:
    import nbformat

    text = nbformat.writes(notebook)
    if not path.exists() or path.read_text(encoding="utf-8") != text + "\n":
        path.write_text(text + "\n", encoding="utf-8")


def differences(job: Job) -> Iterator[str]:
    """What keeps the stored notebook from being this source's, run top to bottom; nothing if so."""
    if not job.target.exists():
        yield "is not built yet: course build"
        return
    stored, wanted = read_notebook(job.target), built(job)
    if [c.get("id") for c in stored.cells] != [c.id for c in wanted.cells]:
        yield f"differs from {job.source.name} in its cells: course build"
        return
    for index, (have, want) in enumerate(zip(stored.cells, wanted.cells, strict=True)):
        for field in ("cell_type", "source", "metadata"):
            if have[field] != want[field]:
                yield f"cell {index} differs from {job.source.name} in its {field}: course build"
        if want.cell_type == "code" and have.execution_count is None:
            yield f"cell {index} was never run: course build --run {job.source.stem}"
    if stored.metadata != wanted.metadata:
        yield "differs from its source in the notebook's metadata: course build"
    if stored.metadata.get("course", {}).get("run_of") != code_digest(stored):
        yield f"its code changed after the stored run: course build --run {job.source.stem}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", help="which, such as 00 or 02_kv_cache (default: all)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--run", action="store_true", help="run them and store the outputs")
    how.add_argument("--check", action="store_true", help="only compare")


def main(args: argparse.Namespace) -> int:
    jobs = chosen(all_jobs(), args.names)
    if args.check:
        problems = [f"{job.name}: {text}" for job in jobs for text in differences(job)]
        print("\n".join(problems) or f"{len(jobs)} notebooks are what their sources say.")
        return 1 if problems else 0
    for job in jobs:
        notebook = built(job)
        if args.run:
            from course.notebooks.execute import run_notebook

            notebook = run_notebook(notebook, job.target)
        write_notebook(notebook, job.target)
        print(f"{job.target.relative_to(ROOT)}: {'run and ' if args.run else ''}written")
    return 0
