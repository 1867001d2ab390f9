"""Build the notebooks from their sources; --run stores outputs, --check compares.

    python -m authoring.build                # all of them; unchanged cells keep their outputs
    python -m authoring.build --run 00 02    # run these top to bottom to store what they print
    python -m authoring.build --check        # write nothing; exit 1 if a notebook is out of date
    python -m authoring.build exercises/03 solutions/03     # only these
    python -m authoring.build --force 03     # also a lesson or solution that was edited by hand

course/pages/jobs.py says which source makes which notebook. A notebook that somebody has worked in
is left alone; `course reset` puts an exercise notebook aside.
"""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from authoring.execute import run_notebook
from course.clone import ROOT
from course.pages.jobs import Job, all_jobs, built, stored_page, was_worked_in, write_notebook
from course.pages.source import code_digest

COMMAND = "python -m authoring.build"


def chosen(jobs: list[Job], names: list[str]) -> list[Job]:
    """The jobs that start with one of `names` (02, or exercises/02); all of them if none is."""

    def starts(job: Job, name: str) -> bool:
        return job.name.startswith(name) or f"{job.kind}/{job.name}".startswith(name)

    for name in names:
        if not any(starts(job, name) for job in jobs):
            stems = list(dict.fromkeys(job.source.stem for job in jobs))
            raise ValueError(f"no source starts with {name!r}: {stems}")
    return [job for job in jobs if not names or any(starts(job, name) for name in names)]


def differences(job: Job) -> Iterator[str]:
    """What keeps the stored notebook from being this source's, run top to bottom; nothing if so."""
    if not job.target.exists():
        yield f"is not built yet: {COMMAND}"
        return
    if job.kind == "exercises" and was_worked_in(job):
        yield f"was worked in; {way_out(job)}"
        return
    stored, wanted = stored_page(job), built(job)
    if stored is None:
        yield f"is no notebook any more; {way_out(job)}"
        return
    command = f"{COMMAND}{' --force' * was_worked_in(job)}"
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
                yield f"cell {index} lists code that has changed since: {COMMAND}"
    if stored.metadata != wanted.metadata:
        yield f"differs from its source in the notebook's metadata: {COMMAND}"
    run_of = stored.metadata.get("course", {}).get("run_of")
    if job.stores_a_run and run_of != code_digest(stored):
        yield f"its code changed after the stored run: {COMMAND} --run {job.source.stem}"


def way_out(job: Job) -> str:
    """How to build a notebook that was worked in all the same."""
    if job.kind == "exercises":
        return f"`course reset {job.name[:2]}` keeps that beside a fresh one"
    return "--force writes it anew"


def run_differences(job: Job, index: int, cell: Any) -> Iterator[str]:
    """Lessons and solutions store the outputs of a run, exercises none."""
    if job.stores_a_run:
        if cell.execution_count is None:
            yield f"cell {index} was never run: {COMMAND} --run {job.source.stem}"
    elif cell.outputs or cell.execution_count is not None:
        yield f"cell {index} stores a run, and exercises store none: {COMMAND}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", help="which: 00, or exercises/02 (default: all)")
    parser.add_argument(
        "--force", action="store_true", help="overwrite what was written in lessons and solutions"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--run", action="store_true", help="run them and store the outputs")
    how.add_argument("--check", action="store_true", help="only compare")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status. An error in a source is reported in one line."""
    try:
        return build_pages(parse(arguments))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"authoring.build: {error}", file=sys.stderr)
        return 2


def build_pages(args: argparse.Namespace) -> int:
    """Write or compare the chosen notebooks. Returns 1 if a comparison found a difference."""
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
            notebook = run_notebook(notebook, job.target)
        job.target.parent.mkdir(exist_ok=True)
        write_notebook(notebook, job.target)
        print(f"{job.target.relative_to(ROOT)}: {'run and ' if args.run else ''}written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
