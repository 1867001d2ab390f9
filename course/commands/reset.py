"""Start a lesson's exercises afresh; what you wrote is kept beside them.

course reset 03      a new exercises/03_paged_blocks.ipynb; yours is 03_paged_blocks.mine-1.ipynb

What `course progress` has noted stays noted. To begin from nothing, delete .course/progress.json as
well.
"""

import argparse
from pathlib import Path

from course.checks.exercises import lesson_of
from course.clone import ROOT
from course.files import locked
from course.pages.jobs import all_jobs, built, was_worked_in, write_notebook


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("lesson", help="its number, such as 03")


def free_name(path: Path) -> Path:
    """The first of path.mine-1.ipynb, path.mine-2.ipynb, ... that is not taken."""
    number = 1
    while (kept := path.with_name(f"{path.stem}.mine-{number}.ipynb")).exists():
        number += 1
    return kept


def main(args: argparse.Namespace) -> int:
    lesson = lesson_of(args.lesson)
    [job] = [j for j in all_jobs() if j.kind == "exercises" and j.source.stem == lesson]
    fresh = built(job)  # before anything is moved: this may fail
    with locked(ROOT / ".course" / "reset"):  # two at once would keep both under one name
        if was_worked_in(job):
            kept = job.target.rename(free_name(job.target))
            print(f"Yours is kept as {kept.relative_to(ROOT)}")
        write_notebook(fresh, job.target)
    print(f"Fresh: {job.target.relative_to(ROOT)} (if it is open, reload it from disk)")
    return 0
