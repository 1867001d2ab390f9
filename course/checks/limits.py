"""A limit on what a check may take, which a slow or busy machine does not change.

    with time_limit(20, "top_p", "Does a loop end?"):
        ...                       # TookTooLong once it has computed for 20 seconds

A wall clock would refuse right answers on a machine that has other work. So a second thread looks
twice a second at what the block has done, and ends it

- when its threads have *computed* for the given seconds, on their own CPU clocks;
- when it has *waited* WAITS times as long while the process computed next to nothing, as for a lock
  that nobody gives back;
- at the latest when WALL times as long has passed.

The block ends by an error that is raised inside it, in Python code or in a system call. A call into
C may let no error in. In that case the whole process is ended GRACE seconds later, after its
message was printed. Some calls into C do not even let the second thread run. Then Python's
faulthandler ends the process after HELD seconds, and `last_words` returns the message in
the next process.
"""

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from course.clone import ROOT

WAITS, WALL = 2, 20  # in limits: waiting, and all in all
HELD = 120.0  # seconds for which the watcher may get no turn
TICK, LOOKS = 0.5, 8  # seconds between two looks; looks in a window
IDLE = 0.02  # a window in which the process has less than this share of a CPU counts as waiting
GRACE = 10.0  # seconds from the first error raised in the block to the end of the process
PARTING = 3.0  # seconds for the message to reach the page of a notebook
STOPPED = 70  # the exit status of a process that had to be ended
NOTES = ROOT / ".course"


class TookTooLong(Exception):
    """A block was ended by its limit; the message says which, and asks what may be wrong."""


class OutOfTime(BaseException):
    """The error raised inside the block. A learner's `except Exception` does not stop it."""


def time_limit(seconds: float, name: str, slow: str) -> "Watch":
    """End a `with` block that computes for more than `seconds`, or waits in vain: TookTooLong.

    name: what runs, for the message. slow: what to ask somebody whose code computes for too long.
    """
    return Watch(seconds, name, slow)


class Meter:
    """What the calling thread, and threads that begin after now, compute and wait for."""

    def __init__(self, tick: float):
        self.tick = tick
        self.thread = threading.current_thread()
        self.before = {t.ident for t in threading.enumerate() if t is not self.thread}
        self.clocks: dict[int, float] = {}  # CPU seconds by native thread id, at the last look
        self.begun = thread_seconds(self.thread)
        self.process = time.process_time()  # at the last window's end
        self.looks = 0
        self.waited = 0.0

    @property
    def passed(self) -> float:
        """Wall seconds, counted in looks: while the whole machine sleeps, nobody looks."""
        return self.looks * self.tick

    def look(self) -> None:
        self.looks += 1
        for thread in [self.thread, *self.others()]:
            self.clocks[thread.native_id or 0] = thread_seconds(thread)
        if self.looks % LOOKS == 0:
            window, now = LOOKS * self.tick, time.process_time()
            self.waited += window * (now - self.process < IDLE * window)
            self.process = now

    @property
    def computed(self) -> float:
        return sum(self.clocks.values()) - self.begun

    def others(self) -> list[threading.Thread]:
        """The threads that began since, without those that watch."""
        born = [t for t in threading.enumerate() if t.ident not in self.before]
        return [t for t in born if t is not self.thread and not isinstance(t, Watch)]


def thread_seconds(thread: threading.Thread) -> float:
    """CPU seconds of a thread. Where the system does not say: the process's, all in the first."""
    if not sys.platform.startswith("linux"):
        return time.process_time() if thread is threading.main_thread() else 0.0
    try:
        text = Path(f"/proc/self/task/{thread.native_id}/stat").read_text()
    except OSError:  # it has just ended
        return 0.0
    return sum(map(int, text.rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")


class Watch(threading.Thread):
    """The second thread: it looks at the thread whose `with` block it limits, and interrupts it."""

    def __init__(self, seconds: float, title: str, slow: str):
        super().__init__(daemon=True)
        self.seconds, self.title, self.slow = seconds, title, slow
        self.verdict: str | None = None
        self.done = threading.Event()

    def __enter__(self) -> None:
        self.meter = Meter(min(TICK, self.seconds / 4))
        self.target = self.meter.thread
        main = self.target is threading.main_thread()
        self.signals = main and hasattr(signal, "pthread_kill")
        self.switch = DeadMansSwitch(HELD, f"{self.title} ran. {self.slow}")
        if self.signals:  # not SIGINT: Ctrl-C sends that, and behind a shell's `&` it is ignored
            self.usual = signal.signal(signal.SIGUSR1, self.hear) or signal.SIG_DFL
        try:
            self.start()
        except BaseException:  # Ctrl-C: the block is not entered
            self.done.set()
            raise

    def hear(self, number: int, frame: FrameType | None) -> None:
        """Handle the signal that `interrupt` sends to the main thread."""
        if self.verdict is None:
            if callable(self.usual):  # it is of the limit around this one
                self.usual(number, frame)
        elif not is_in_this_file(frame):  # a block that is over is left in peace to end
            raise OutOfTime

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        while self.is_alive():
            try:
                self.done.set()
                self.join()
            except OutOfTime:  # sent a moment ago, to another than the main thread
                continue
        if self.signals:  # from now on nobody sends it
            signal.signal(signal.SIGUSR1, self.usual)
        elif self.verdict is not None:
            raise_in(self.target, None)
        if self.verdict is not None and kind in (None, OutOfTime):
            raise TookTooLong(self.verdict) from None

    def run(self) -> None:
        try:
            self.watch()
        finally:
            self.switch.release()

    def watch(self) -> None:
        while self.verdict is None and not self.done.wait(self.meter.tick):
            self.switch.hold()
            self.meter.look()
            self.verdict = self.judge()
        told = time.monotonic()
        while not self.done.is_set():
            self.interrupt()
            self.done.wait(self.meter.tick)
            if time.monotonic() - told > GRACE and not self.done.is_set():
                self.end_process()

    def judge(self) -> str | None:
        """Say which time limit the block has exceeded, or return None."""
        meter, most = self.meter, WALL * self.seconds
        if meter.computed > self.seconds:
            return (
                f"{self.title} takes more than {self.seconds:g} seconds of computing. {self.slow}"
            )
        if meter.waited >= WAITS * self.seconds:
            return (
                f"{self.title} has waited for {meter.waited:g} seconds and computed nothing. Does "
                "it sleep, or wait for a lock, a queue or an input that never comes?"
            )
        if meter.passed > most:
            return f"{self.title} has not ended after {most:g} seconds. {self.slow}"
        return None

    def interrupt(self) -> None:
        """Raise OutOfTime in the block, and in the threads that began in it."""
        for thread in self.meter.others():
            raise_in(thread, OutOfTime)
        if self.signals:
            signal.pthread_kill(self.target.ident, signal.SIGUSR1)  # also ends a system call
        else:
            raise_in(self.target, OutOfTime)

    def end_process(self) -> None:
        print(
            f"Not yet. {self.verdict}\nIt is in a call that cannot be interrupted, so this Python "
            "process was ended. In a notebook, restart the kernel; what you saved is kept.",
            file=sys.stderr,
            flush=True,
        )
        if self.done.wait(PARTING):  # it has ended at the last moment
            return
        note_file().unlink(missing_ok=True)
        os._exit(STOPPED)


def is_in_this_file(frame: FrameType | None) -> bool:
    """Whether code of this file is being run, by itself or through what it calls."""
    while frame is not None and frame.f_code.co_filename != __file__:
        frame = frame.f_back
    return frame is not None


def raise_in(thread: threading.Thread, error: type[BaseException] | None) -> None:
    """Raise an error in a thread at its next line of Python; None: take one back."""
    of = ctypes.py_object(error) if error else None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), of)


# -- where not even the watcher can run ----------------------------------------------------------

armed = threading.Lock()  # faulthandler has one timer a process: the outermost block's


def note_file() -> Path:
    return NOTES / f"stopped-{os.getpid()}.txt"


class DeadMansSwitch:
    """Ends the process if `hold` is not called for so many seconds, until it is released.

    What ends it is faulthandler, which needs no turn of Python's; it leaves a note for last_words.
    """

    def __init__(self, seconds: float, says: str):
        self.seconds = seconds
        self.note = open_note() if armed.acquire(blocking=False) else None
        if self.note:
            self.note.write(f"Python was ended, in a call that did not come back, while {says}\n")
            self.note.flush()
            self.hold()

    def hold(self) -> None:
        if self.note:
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=self.note)

    def release(self) -> None:
        if self.note:
            faulthandler.cancel_dump_traceback_later()
            note_file().unlink(missing_ok=True)
            self.note.close()
            armed.release()


def open_note() -> TextIO | None:
    """The file for what faulthandler will say; None where nothing can be written."""
    try:
        NOTES.mkdir(exist_ok=True)
        return note_file().open("w", encoding="utf-8")
    except OSError:
        armed.release()
        return None


def last_words() -> str:
    """What processes that had to be ended have left to say; empty if there were none."""
    said = ""
    for file in NOTES.glob("stopped-*.txt"):
        number = int(file.stem.partition("-")[2])
        if number == os.getpid() or not is_running(number):
            text = file.read_text(encoding="utf-8")
            file.unlink(missing_ok=True)
            said += text if "Timeout (" in text else ""  # else the machine was switched off
    return said


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True
