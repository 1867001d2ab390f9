"""Files that the course keeps: never half written, and no writer's changes are another's loss."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from course import files
from course.checks import notes
from course.files import write_whole
from course.measure import peaks
from course.measure.roofline import Peaks
from course.stages import records

ROOT = Path(__file__).resolve().parents[2]


def test_what_is_written_replaces_what_was_there(tmp_path):
    file = tmp_path / "notes.json"
    for text in ("old\n", "newer\n"):
        write_whole(file, text)
        assert file.read_text() == text
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_keeps_its_permissions_and_a_link_stays_a_link(tmp_path):
    file, link = tmp_path / "notes.json", tmp_path / "link.json"
    file.touch()
    file.chmod(0o640)
    link.symlink_to(file)
    write_whole(link, "new")
    assert link.is_symlink()
    assert file.read_text() == "new"
    assert file.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("where", ["os.fsync", "pathlib.Path.replace"])
def test_a_write_that_is_cut_off_changes_nothing(where, error, tmp_path, monkeypatch):
    def fail(*_):
        raise error

    file = tmp_path / "notes.json"
    file.write_text("old")
    monkeypatch.setattr(where, fail)
    with pytest.raises(type(error) if isinstance(error, OSError) else error):
        write_whole(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


NOTES = """
import sys
from pathlib import Path
from course.checks.notes import add_pass
for number in range(25):
    add_pass(sys.argv[1], f"exercise_{number}", Path(sys.argv[2]))
"""


def test_two_processes_note_passes_and_none_is_lost(tmp_path):
    file = tmp_path / "progress.json"
    command = [sys.executable, "-c", NOTES]
    writers = [subprocess.Popen([*command, lesson, file], cwd=ROOT) for lesson in ("01", "02")]
    assert [writer.wait() for writer in writers] == [0, 0]
    passed = notes.load_passed(file)
    assert [len(passed[lesson]) for lesson in ("01", "02")] == [25, 25]
    assert [f for f in os.listdir(tmp_path) if not f.endswith(".lock")] == [file.name]


def test_two_threads_keep_their_peaks_and_none_is_lost(tmp_path):
    file = tmp_path / "peaks.json"
    names = [f"machine {number}" for number in range(20)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: peaks.record_peaks(Peaks(1.0, 2.0), name, file), names))
    assert peaks.known_peaks(file).keys() == set(names)


def test_two_threads_keep_their_records_and_none_is_lost(tmp_path, monkeypatch):
    [shipped, *_] = sorted(records.SHIPPED.glob("stages_*.json"))
    one, file = records.read(shipped, "yours")[0], tmp_path / "stages.json"
    monkeypatch.setattr(records, "make_record", lambda stage, _: replace(one, stage=stage))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda stage: records.record(stage, file), range(20)))
    assert [row["stage"] for row in json.loads(file.read_text())] == list(range(20))


def test_a_lock_that_is_never_given_back_is_an_error_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.1)
    file = tmp_path / "progress.json"
    with files.locked(file), pytest.raises(OSError, match=r"progress\.json\.lock"):
        notes.add_pass("01", "top_p", file)
