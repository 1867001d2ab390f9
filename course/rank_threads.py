"""Ranks as threads of one process, for functions that processes cannot run: a notebook's own.

on_ranks(2, lambda ranks: ranks.all_reduce(x[ranks.rank]))      # each rank's result
"""

import os
import threading
from collections.abc import Callable
from typing import Any


def record_nothing() -> None:
    """Prepare this process for ranks as threads, before its first group computes anything.

    torch records the collectives of all groups of a process in one place, which in 2.11 two threads
    corrupt: the process crashes or waits without end. So nothing is recorded where ranks are
    threads. torch reads this variable when the first group of the process computes.
    """
    os.environ["TORCH_FR_BUFFER_SIZE"] = "0"


class Meeting:
    """Where ranks that are threads meet before each collective.

    A collective that a rank never enters makes the others wait without end. Here we need no clock
    to see that: a rank that has ended enters nothing any more, and the others are told so.
    """

    def __init__(self, size: int):
        self.entered: list[list[str]] = [[] for _ in range(size)]  # names of collectives, by rank
        self.ended: set[int] = set()
        self.changed = threading.Condition()

    def enter(self, rank: int, name: str) -> None:
        """Wait for all ranks to enter; RuntimeError if one never will, or enters another one."""
        with self.changed:
            self.entered[rank].append(name)
            self.changed.notify_all()
            at = len(self.entered[rank]) - 1

            def missing() -> list[int]:
                return [other for other, names in enumerate(self.entered) if len(names) <= at]

            self.changed.wait_for(lambda: not missing() or self.ended & {*missing()})
            if missing():
                raise RuntimeError(f"rank {rank} waits in {name}, which {missing()} never enters")
            if len({names[at] for names in self.entered}) > 1:
                raise RuntimeError(f"ranks enter {[names[at] for names in self.entered]} at once")

    def end(self, rank: int) -> None:
        with self.changed:
            self.ended.add(rank)
            self.changed.notify_all()


def on_ranks(size: int, function: Callable[[Any], Any]) -> list[Any]:
    """function(ranks) on every rank of a gloo group, each a thread; the results by rank.

    Threads can run a function that was defined in a notebook's cell, and processes cannot. A rank
    that enters a collective which another rank never enters gets a RuntimeError.
    """
    import torch
    import torch.distributed as dist

    from nanovllm.distributed.ranks import Ranks

    record_nothing()

    class MeetingRanks(Ranks):
        def all_reduce(self, x: Any) -> Any:
            meeting.enter(self.rank, "all_reduce")
            return super().all_reduce(x)

        def all_gather(self, x: Any) -> Any:
            meeting.enter(self.rank, "all_gather")
            return super().all_gather(x)

        def broadcast(self, message: Any) -> Any:
            meeting.enter(self.rank, "broadcast")
            return super().broadcast(message)

    store, results, failures = dist.HashStore(), [None] * size, []
    meeting = Meeting(size)

    def run(rank: int) -> None:
        try:
            ranks = MeetingRanks(rank, size, store)
            ranks.init_process_group(torch.device("cpu"))
            with torch.inference_mode():
                results[rank] = function(ranks)
        except BaseException as error:
            failures.append(error)
        finally:
            meeting.end(rank)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results
