"""A check's limit ends whatever does not end by itself, and no machine is too slow for it."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError

from course.checks import limits
from course.checks.limits import TookTooLong, time_limit

ROOT = Path(__file__).resolve().parents[2]
WAITED = "has waited for .* seconds and computed nothing"
COMPUTED = "takes more than 0.4 seconds of computing. Does a loop end?"


def spin():
    while True:
        pass


def lock_twice():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def naps():
    while True:
        time.sleep(0.01)


def endless_thread():
    thread = threading.Thread(target=spin_quietly)
    thread.start()
    thread.join()


def spin_quietly():
    try:
        spin()
    except limits.OutOfTime:
        ended.append("thread")


def handles_everything():
    for _ in range(2):
        try:
            spin()
        except BaseException:
            ended.append("swallowed")
    spin()


ended: list[str] = []
ENDLESS = {
    spin: COMPUTED,
    endless_thread: COMPUTED,
    handles_everything: COMPUTED,
    lock_twice: WAITED,
    naps: WAITED,
    lambda: time.sleep(1e9): WAITED,
    lambda: subprocess.run(["sleep", "1000"]): WAITED,
}


@pytest.mark.parametrize(("endless", "message"), ENDLESS.items())
def test_what_does_not_end_is_ended(endless, message):
    with pytest.raises(TookTooLong, match=message), time_limit(0.4, "it", "Does a loop end?"):
        endless()
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    assert not [t for t in threading.enumerate() if isinstance(t, limits.Watch)]


def test_a_thread_that_began_in_the_block_is_ended_as_well():
    ended.clear()
    with pytest.raises(TookTooLong), time_limit(0.2, "it", ""):
        endless_thread()
    for _ in range(100):
        if ended:
            break
        time.sleep(0.1)
    assert ended == ["thread"]


def test_an_endless_loop_in_another_than_the_main_thread_is_ended():
    failures = []

    def run():
        try:
            with time_limit(0.2, "it", "Does a loop end?"):
                spin()
        except TookTooLong as over:
            failures.append(str(over))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert failures == ["it takes more than 0.2 seconds of computing. Does a loop end?"]


def test_an_endless_loop_is_ended_where_interrupts_are_ignored():
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        test_what_does_not_end_is_ended(spin, COMPUTED)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, usual)


def test_ctrl_c_is_not_taken_for_the_limit():
    with pytest.raises(KeyboardInterrupt), time_limit(60, "it", ""):
        raise KeyboardInterrupt


def test_the_outer_limit_ends_an_inner_block():
    inner = time_limit(60, "inner", "")
    with pytest.raises(TookTooLong, match=r"^outer"), time_limit(0.2, "outer", ""), inner:
        spin()


def test_a_limit_that_is_over_at_the_very_end_leaves_nothing_behind():
    """Blocks of just the limit's length: each ends by itself or by its limit, and cleanly."""
    for _ in range(60):
        begun = time.thread_time()
        try:
            with time_limit(0.02, "it", ""):
                while time.thread_time() - begun < 0.025:
                    pass
        except TookTooLong:
            pass
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_an_error_that_is_raised_again_and_again_is_raised_in_the_block_alone():
    for _ in range(200):
        with pytest.raises(TookTooLong), time_limit(0.004, "it", ""):  # looks each millisecond
            spin()


def test_ctrl_c_at_the_end_leaves_no_timer_behind(monkeypatch):
    def interrupted(watch):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(limits.Watch, "join", interrupted)
    with pytest.raises(KeyboardInterrupt), time_limit(60, "it", ""):
        pass
    assert limits.armed.acquire(timeout=30)  # the watcher has ended, and faulthandler's timer too
    limits.armed.release()
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)


# -- a machine that is slow or busy --------------------------------------------------------------

COMPUTES = """
import time
from course.checks.limits import time_limit
print("ready", flush=True)
wall, cpu = time.perf_counter(), time.thread_time()
with time_limit(0.8, "it", ""):
    while time.thread_time() < cpu + 0.4:
        pass
print(time.perf_counter() - wall)
"""


def test_a_machine_that_gives_it_a_tenth_of_its_time_refuses_no_right_answer():
    process = subprocess.Popen([sys.executable, "-c", COMPUTES], stdout=-1, text=True, cwd=ROOT)
    assert process.stdout.readline() == "ready\n"
    while process.poll() is None:
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.18)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.02)
    assert process.returncode == 0
    assert float(process.stdout.read()) > 1.0, "this was no slow machine"


# -- calls that no error reaches -----------------------------------------------------------------

STUCK = """
import itertools, sys
from datetime import timedelta
from pathlib import Path
from torch.distributed import HashStore
from course.checks import core, limits
limits.GRACE, limits.HELD, limits.NOTES, core.SECONDS = 1, 8, Path("NOTES"), 0.3
def lets_others_run():
    HashStore().wait(["a key that nobody sets"], timedelta(days=1))
def holds_the_interpreter():
    sum(itertools.repeat(0))
@core.check
def check_top_k(function):
    function()
"""


def stuck(notes: Path, function: str) -> str:
    return STUCK.replace('NOTES"', f'{notes}"') + f"check_top_k({function})\n"


def test_a_call_that_cannot_be_interrupted_ends_the_process_with_a_message(tmp_path):
    done = run_python(stuck(tmp_path, "lets_others_run"))
    assert done.returncode == limits.STOPPED
    assert done.stderr.startswith("Not yet. top_k has waited for ")
    assert "this Python process was ended" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_call_that_lets_nobody_run_leaves_its_message_to_the_next_process(tmp_path):
    done = run_python(stuck(tmp_path, "holds_the_interpreter"))
    assert done.returncode == 1
    assert len(list(tmp_path.glob("stopped-*.txt"))) == 1
    said = run_python(stuck(tmp_path, "lambda: core.expect(True, 'it ran')")).stdout
    assert said.startswith("Python was ended, in a call that did not come back, while top_k ran.")
    assert "in holds_the_interpreter" in said
    assert "Passed: 1 comparisons" in said
    assert list(tmp_path.iterdir()) == []


def test_in_a_notebook_the_message_is_shown_before_the_kernel_is_ended(tmp_path):
    cell = nbformat.v4.new_code_cell(stuck(tmp_path, "lets_others_run"))
    notebook = nbformat.v4.new_notebook(cells=[cell])
    with pytest.raises(DeadKernelError):
        NotebookClient(notebook, resources={"metadata": {"path": str(ROOT)}}).execute()
    texts = [output.get("text", "") for output in notebook.cells[0].outputs]
    assert "Not yet. top_k has waited for " in "".join(texts)


def test_in_a_notebook_an_endless_sleep_is_a_failed_check_and_the_kernel_lives(tmp_path):
    cells = [stuck(tmp_path, "lambda: __import__('time').sleep(1e9)"), "print('alive')"]
    notebook = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, cells)))
    resources = {"metadata": {"path": str(ROOT)}}
    NotebookClient(notebook, allow_errors=True, resources=resources).execute()
    assert notebook.cells[0].outputs[-1].ename == "CheckFailed"
    assert "computed nothing" in notebook.cells[0].outputs[-1].evalue
    assert notebook.cells[1].outputs[0].text == "alive\n"


def test_a_check_of_a_process_that_still_runs_is_not_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "NOTES", tmp_path)
    other = subprocess.Popen(["sleep", "60"])
    note = tmp_path / f"stopped-{other.pid}.txt"
    note.write_text("it ran\nTimeout (0:02:00)!\n")
    assert limits.last_words() == ""
    other.kill()
    other.wait()
    assert limits.last_words() == "it ran\nTimeout (0:02:00)!\n"
    assert limits.last_words() == ""


def test_where_no_note_can_be_written_the_limit_still_holds(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(limits, "NOTES", tmp_path / "file" / "folder")
    test_what_does_not_end_is_ended(spin, COMPUTED)


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
