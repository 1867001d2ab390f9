"""Files that the course keeps for its reader: written whole, and by one process at a time.

with locked(file):                     # until another process has read, changed and written it
    notes = json.loads(file.read_text())
    write_whole(file, json.dumps(notes | new))
"""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

LOCK_SECONDS = 60  # a lock is held for milliseconds: only a process that hangs holds it longer


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Keep other processes and threads from the block for the same file. The folder is made.

    OSError (filelock's Timeout is one) if the lock cannot be had.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f".{file.name}.lock"), LOCK_SECONDS):
        yield


def write_whole(file: Path, text: str) -> None:
    """Write a file atomically: no reader sees half of it, and a failed write changes nothing.

    The text goes to a file beside it, whose name no other writer has, which then takes its place.
    """
    file = file.resolve()  # a link stays a link
    fresh = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with fresh.open("x", encoding="utf-8", newline="\n") as opened:
            opened.write(text)
            opened.flush()
            os.fsync(opened.fileno())
        if file.exists():
            shutil.copymode(file, fresh)
        fresh.replace(file)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
