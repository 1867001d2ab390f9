"""Repair a virtual environment whose folder was renamed, moved or copied.

    .venv/bin/python -m authoring.moved_venv

Console scripts and activation scripts name the folder that the environment was made in. After a
move they do not start, or they start the Python of another clone. `make install` runs this module
when it finds the environment somewhere else than it was made, and then installs the course itself
again, which renews the paths from which notebooks import it.
"""

import subprocess
import sys
from pathlib import Path

LONGEST = 127  # bytes that every kernel reads of a script's first line


def repair(environment: Path) -> list[str]:
    """Point all scripts of an environment at its own Python; returns the names of the changed."""
    subprocess.run(  # writes the activation scripts and pyvenv.cfg again, and leaves packages alone
        [sys._base_executable, "-m", "venv", "--without-pip", str(environment)], check=True
    )
    changed = []
    for script in sorted((environment / "bin").iterdir()):
        if script.is_symlink() or not script.is_file():
            continue
        old = script.read_bytes()
        new = with_header(old, str(environment / "bin" / "python").encode())
        if new != old:
            script.write_bytes(new)  # which keeps the permission to execute it
            changed.append(script.name)
    return changed


def with_header(script: bytes, python: bytes) -> bytes:
    """The script with a first line that starts `python`; anything but a Python script stays."""
    lines = script.split(b"\n")
    in_shell = lines[0] == b"#!/bin/sh" and len(lines) > 2 and lines[1].startswith(b"'''exec' ")
    size = 3 if in_shell else 1
    if not script.startswith(b"#!") or b"/bin/python" not in b"\n".join(lines[:size]):
        return script
    return b"\n".join([header(python), *lines[size:]])


def header(python: bytes) -> bytes:
    """As pip writes it: through the shell if the kernel cannot read the path in a first line."""
    if b" " not in python and len(python) + 2 <= LONGEST:
        return b"#!" + python
    return b"#!/bin/sh\n'''exec' \"" + python + b'" "$0" "$@"\n' + b"' '''"


if __name__ == "__main__":
    scripts = repair(Path(sys.prefix))
    print(f"This environment was moved to {sys.prefix}; repaired {len(scripts)} of its scripts.")
