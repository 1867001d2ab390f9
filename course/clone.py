"""The clone of the repository that these modules belong to, if they belong to one.

A wheel carries `nanovllm` and `course` alone. The notebooks, the exercises, the small model and the
recorded measurements lie only in a clone, which is why most commands need one.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def is_clone() -> bool:
    """Whether the course's files lie beside this package."""
    return (ROOT / "pyproject.toml").is_file() and (ROOT / "notebooks").is_dir()


def need_clone() -> None:
    """Raise ValueError where there is no clone."""
    if not is_clone():
        raise ValueError(
            "this command needs a clone of the course's repository, and this installation is none; "
            "run `git clone`, then `make install` and .venv/bin/course in the clone"
        )
