"""Processes that the course starts: they run this process's copy of the course.

module_command("course.models.random_model", "qwen3-8b")     # for subprocess.run
with spawned_safely(): ...                            # around multiprocessing's "spawn"

`python -m` and multiprocessing put the working folder first on the new process's `sys.path`. A
learner's random.py or json.py there would replace the standard library's.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager


def module_command(module: str, *arguments: str) -> list[str]:
    """The command `python -m module arguments`, with this process's imports."""
    from nanovllm.distributed.python_command import python_command

    code = f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    return [*python_command(code), *arguments]


@contextmanager
def spawned_safely() -> Iterator[None]:
    """Keep the working folder off the `sys.path` of processes that multiprocessing spawns inside.

    multiprocessing passes on this process's `sys.path`, but only after the new process has
    imported multiprocessing itself.
    """
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before
