"""Watch the other ranks: notice a worker that has ended, an error, and a rank that never comes.

A worker that dies is noticed at once. Gloo sees that its connection closes, and rank 0 checks
whether its worker processes still run. The time-outs below are for a rank that is alive and
hangs. They are generous, because a rank on a busy machine can be slow without being lost.
"""

import contextlib
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from nanovllm.distributed.signed_store import SignedStore

# The time that a rank may take to load its part of the model and to warm up. Reading 16 GB from a
# disk of 100 MB/s takes 160 seconds, and six times as long on a machine with six times the load.
START_TIMEOUT = timedelta(minutes=30)
STEP_TIMEOUT = timedelta(minutes=5)  # to reach a collective of a launched step, as in vLLM
EXIT_SECONDS = 60  # a worker that has not ended so long after it was told to is killed


class RankMonitor:
    """What one rank knows of the health of the other ranks.

    Only rank 0 has `workers`, the processes of ranks 1 to world_size - 1, and only if it started
    them. Under torchrun the list is empty. `timeout` is START_TIMEOUT at first, and `step_timeout`
    once the engine has started.
    """

    def __init__(self, rank: int, world_size: int, messages: SignedStore):
        self.rank, self.world_size, self.messages = rank, world_size, messages
        self.workers: list[subprocess.Popen] = []
        self.step_timeout, self.timeout = STEP_TIMEOUT, START_TIMEOUT

    def report_error(self, error: BaseException) -> None:
        """Tell rank 0 why this rank fails, if rank 0 can still be reached."""
        if self.rank > 0:
            with contextlib.suppress(dist.DistError):
                self.messages.set(f"failed{self.rank}", f"{type(error).__name__}: {error}")

    def check_workers(self) -> None:
        """Raise RuntimeError if a worker process has ended."""
        exit_codes = {
            rank: code
            for rank, worker in enumerate(self.workers, start=1)
            if (code := worker.poll()) is not None
        }
        if not exit_codes:
            return
        errors = self._reported_errors()
        # A rank that was killed could report nothing, and the others fail because it is gone. So
        # we name a rank without a report first.
        rank = min(exit_codes, key=lambda rank: rank in errors)
        reason = f": {errors[rank]}" if rank in errors else ""
        raise RuntimeError(f"rank {rank} has ended with exit code {exit_codes[rank]}{reason}")

    def check_errors(self) -> None:
        """Raise RuntimeError if another rank has reported an error."""
        for rank, reason in self._reported_errors().items():
            raise RuntimeError(f"rank {rank} has failed: {reason}")

    def _reported_errors(self) -> dict[int, str]:
        """Return the errors that ranks have reported with `report_error`, by rank."""
        ranks = [rank for rank in range(1, self.world_size) if self.messages.has(f"failed{rank}")]
        return {rank: self.messages.get(f"failed{rank}") for rank in ranks}

    def wait_until(self, is_done: Callable[[], bool], poll_seconds: float) -> None:
        """Wait until `is_done()` is true.

        Raises RuntimeError if a worker process ends meanwhile, or when `timeout` has passed.
        """
        deadline = time.monotonic() + self.timeout.total_seconds()
        while not is_done():
            self.check_workers()
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"rank {self.rank} has waited {self.timeout} for the other ranks "
                    f"(there are {self.world_size}), so one of them has probably ended or hangs"
                )
            time.sleep(poll_seconds)

    def call_while_workers_live(self, function: Callable[[], Any]) -> Any:
        """Return function(), which may wait for other ranks.

        Raises RuntimeError if a worker process ends meanwhile, or when `timeout` has passed. The
        function runs in a thread of its own, which then goes on without a listener.
        """
        outcome: Future = Future()

        def run() -> None:
            try:
                outcome.set_result(function())
            except BaseException as error:
                outcome.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        self.wait_until(outcome.done, poll_seconds=0.002)
        return outcome.result()

    def end_workers(self, kill: bool = False) -> None:
        """Wait for the worker processes to end, and kill those that still run after EXIT_SECONDS.

        kill: do not wait, because the workers will not be told to end.
        """
        for worker in self.workers:
            try:
                worker.wait(timeout=0 if kill else EXIT_SECONDS)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
        self.workers.clear()
