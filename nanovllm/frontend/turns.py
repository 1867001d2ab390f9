"""Turns: one thread at a time uses the engine, and a thread that waits goes before a newcomer.

Python's locks are not fair. A thread that runs one step after the other would release the lock and
take it again before any other thread has woken up, so the other callers could wait for minutes.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

YIELD_SECONDS = 1e-4  # enough for a thread that waits for a lock to wake up and take it
MAX_YIELDS = 10


class Turns:
    """A reentrant lock, as in `with turns.take(): ...`, which a thread cannot keep for itself."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.waiting: set[int] = set()  # the threads that want the lock, by their id
        self._owner: int | None = None  # the thread that holds the lock
        self._count = 0  # how often a thread has got the lock

    @contextmanager
    def take(self) -> Iterator[None]:
        """Hold the lock. The thread that holds it may take it again.

        Ctrl-C may come at any point, so only `with` takes the lock. If the caller's block is never
        reached, then Python releases the lock when it drops this generator.
        """
        me = threading.get_ident()
        if self._owner != me:
            self._let_others_go_first(me)
            self.waiting.add(me)
        with self.lock:
            self._count += 1
            self.waiting.discard(me)
            self._owner = me
            try:
                yield
            finally:
                self._owner = None

    def _let_others_go_first(self, me: int) -> None:
        """Wait until a thread that already waits has got the lock.

        This is only a courtesy. It ends after a millisecond, because the waiting thread may have
        been interrupted, and would then never take the lock.
        """
        count = self._count
        for _ in range(MAX_YIELDS):
            if self._count != count or not self.waiting - {me}:
                return
            time.sleep(YIELD_SECONDS)
