"""This machine's two numbers, kept: lesson 00 measures them, later lessons may ask for them.

record_peaks(machine_peaks())         # into .course/peaks.json, which git ignores
known_peaks()                         # {machine: Peaks}
"""

import json
from dataclasses import asdict
from pathlib import Path

from course import machine
from course.clone import ROOT
from course.files import locked, write_whole
from course.measure.roofline import Peaks

OWN = ROOT / ".course" / "peaks.json"


def record_peaks(peaks: Peaks, name: str | None = None, file: Path = OWN) -> None:
    """Keep a machine's peaks, in place of older ones; name: this machine's, if not given."""
    with locked(file):
        known = known_peaks(file) | {name or machine.describe(): peaks}
        text = json.dumps({key: asdict(value) for key, value in known.items()}, indent=2)
        write_whole(file, text)


def known_peaks(file: Path = OWN) -> dict[str, Peaks]:
    """The peaks of every machine that was measured here; none before the first."""
    if not file.exists():
        return {}
    return {name: Peaks(**values) for name, values in json.loads(file.read_text()).items()}
