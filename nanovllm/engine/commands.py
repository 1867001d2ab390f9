"""Commands: what the calls of all threads have in common, on one rank or on several.

A command is carried out by one thread at a time, and by all ranks alike. If it fails on several
ranks, the engine closes, because the ranks may then differ. Lesson 08 explains `on_all_ranks`. The
rest of this file is about failures and about the end of an engine.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from nanovllm.distributed.ranks import Ranks
from nanovllm.engine.core import EngineCore
from nanovllm.engine.sequence import Sequence
from nanovllm.frontend.parallel_sampling import ParentRequests
from nanovllm.frontend.streaming import AbandonedRequests
from nanovllm.frontend.turns import Turns


class CommandedEngine:
    """The part of LLMEngine that keeps threads and ranks in step, and that ends them.

    A new engine counts as closed until `open` is called, so that closing it does nothing.
    """

    ranks: Ranks
    core: EngineCore
    parents: ParentRequests

    def __init__(self) -> None:
        self.closed = True  # it takes no more calls
        self.released = True  # its memory and its ranks are given back
        self.turns = Turns()
        self.abandoned = AbandonedRequests()
        self.acting = threading.Lock()  # held while a command is carried out
        self._close_when_done = False

    def open(self) -> None:
        """Begin to take commands. The core and the ranks are ready."""
        self.parents = ParentRequests(self.core.scheduler)
        self.closed = self.released = False

    @property
    def sequences(self) -> dict[str, Sequence]:
        """The unfinished sequences by request id, in order of arrival."""
        return self.core.scheduler.requests

    @contextmanager
    def on_all_ranks(self, command: str, payload: Any = None) -> Iterator[Any]:
        """Broadcast a command to all ranks, and let the caller's block carry it out on this rank.

        It is this thread's turn until the block ends. Requests that nobody waits for any more are
        aborted first, on all ranks. payload: anything that JSON can hold.
        Yields rank 0's payload, which under torchrun is the one that counts.
        Raises RuntimeError if the engine is closed, or if a rank has failed.
        """
        with self.turns.take():
            self.check_open()
            if self.acting.locked():
                raise RuntimeError(
                    f"this engine was asked to {command} from within another call of the same "
                    f"thread (by a signal handler or a destructor); ask it when that call has "
                    f"returned"
                )
            with self.acting:
                try:
                    num_groups = len(self.abandoned.groups)
                    yield self._broadcast(command, payload)
                    # Not before: if the block is interrupted, the next command sees them again.
                    self.abandoned.remove_first(num_groups)
                except BaseException as error:
                    self._release_if_ranks_differ(error)
                    raise
                finally:
                    if self._close_when_done:
                        self._close()

    def _broadcast(self, command: str, payload: Any) -> Any:
        abandoned_ids = self._unfinished_ids(self.abandoned.seqs)
        theirs, payload, abandoned_ids = self.ranks.broadcast([command, payload, abandoned_ids])
        if theirs != command:
            raise RuntimeError(
                f"rank {self.ranks.rank} was asked to {command} while rank 0 was asked to "
                f"{theirs}: under torchrun every rank must make the same calls"
            )
        if abandoned_ids:
            self.abort_on_this_rank(abandoned_ids)
        return payload

    def _release_if_ranks_differ(self, error: BaseException) -> None:
        """Close an engine of several ranks, because one rank may have done what another has not.

        If another rank has failed, then that is the cause, and its error is raised.
        """
        if self.ranks.world_size > 1:
            try:
                if isinstance(error, RuntimeError):
                    self.ranks.monitor.check_workers()
                    self.ranks.monitor.check_errors()
            finally:
                self.release(kill=True)

    def abort(self, seqs: list[Sequence]) -> None:
        """End those of the sequences that are unfinished. A closed engine has none.

        If a destructor or a signal handler calls this within a step, the sequences are abandoned,
        which means that the next command aborts them.
        """
        with self.turns.take():
            if self.acting.locked():
                self.abandoned.add(seqs)
            elif ids := self._unfinished_ids(seqs):
                with self.on_all_ranks("abort", ids) as ids:
                    self.abort_on_this_rank(ids)

    def abort_on_this_rank(self, ids: list[str]) -> None:
        """Abort sequences by their ids. Ids of sequences that have ended are ignored."""
        seqs = [self.sequences[i] for i in ids if i in self.sequences]
        self.core.abort(seqs)
        self.parents.forget_ended(seqs)

    def _unfinished_ids(self, seqs: Iterable[Sequence]) -> list[str]:
        """Return the ids of the unfinished sequences, but not ids that others have taken over."""
        found = self.sequences
        return [seq.request_id for seq in seqs if found.get(seq.request_id) is seq]

    # -- the end ---------------------------------------------------------------------------------

    def check_open(self) -> None:
        if self.closed:
            raise RuntimeError("this engine is closed, so it can take no more calls")

    def close(self) -> None:
        """Give back all memory and end the other ranks. May be called again.

        Another thread's step ends first, and threads that wait for answers get a RuntimeError. If a
        destructor or a signal handler calls this within a step, the engine closes after that step.
        """
        if self.released:
            return
        with self.turns.take():
            if self.acting.locked():
                self._close_when_done = True
            else:
                self._close()

    def _close(self) -> None:
        if self.released:
            return
        try:
            if not self.closed:
                for seq in self.sequences.values():
                    seq.news = None  # its caller gets an error in place of news
                self.core.abort(list(self.sequences.values()))
                if self.ranks.rank == 0:
                    self.ranks.broadcast(["close", None, []])
        except RuntimeError:  # a rank is gone already
            pass
        finally:
            self.release(kill=self.closed)

    def release(self, kill: bool) -> None:
        """End all that is unfinished. If this is interrupted, `close` calls it again.

        kill: do not wait for the other ranks to end by themselves.
        """
        self.closed = True
        for seq in list(self.sequences.values()):
            seq.news = None
            seq.finish("abort")
        self.sequences.clear()
        self.parents.clear()
        self.core.in_flight.clear()
        graphs = self.core.runner.graph_runner.graphs if self.core.runner else None
        self.ranks.close(kill, graphs)
        self.core.runner = None  # type: ignore[assignment]  # it holds the memory
        self.released = True
