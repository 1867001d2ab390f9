"""The clone of the repository that these modules belong to, if they belong to one.

A wheel carries `nanovllm` and `course` alone. The notebooks, the exercises, the small model and the
recorded measurements lie only in a clone, which is why most commands need one.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def is_clone() -> bool:
    """Whether this package lies in a clone, which also has the course's files."""
    return (ROOT / "pyproject.toml").is_file() and (ROOT / "notebooks").is_dir()


def need_clone() -> None:
    """Raise ValueError where there is no clone."""
    if not is_clone():
        raise ValueError(
            "this command works on files that only a clone of the course's repository has, and the "
            "package that runs here is a copy without them; in a clone, run `make install` or "
            "`pip install -e .`, and use the `course` of that environment"
        )
