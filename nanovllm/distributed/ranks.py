"""Ranks: the processes that share one model, and what they say to each other.

Every rank runs the same engine over the same requests, and so plans the same steps: schedules are
never sent. What is sent is what rank 0 was asked to do, one message a call, through a key-value
store (`Ranks.share`), where an idle rank can wait for hours; tensors go through a process group.

A rank that dies is noticed at once: gloo sees its connection close, and rank 0 looks whether its
workers live. The time limits below are for a rank that lives and never comes. They are wide, since
a rank on a busy machine is slow without being lost.
"""

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nanovllm.distributed.python_command import python_command
from nanovllm.distributed.signed_store import SignedStore

# For a rank to load its share of the model and to warm up. 16 GB from a disk of 100 MB/s take 160
# seconds, and six times as long on a machine that is six times too busy.
START_TIMEOUT = timedelta(minutes=30)
STEP_TIMEOUT = timedelta(minutes=5)  # to reach a collective of a launched step; vLLM's limit, too
IDLE_TIMEOUT = timedelta(days=1000)  # for rank 0 to have something to say
EXIT_TIMEOUT = 60  # seconds for a worker to end, once it was told to; then it is killed
WORKER = "from nanovllm.llm_engine import run_worker; run_worker()"


@dataclass(frozen=True)
class Shard:
    """A rank's part of something: [start, start + count) of the `size` along dimension `dim`."""

    start: int
    count: int
    size: int
    dim: int = 0


class Ranks:
    """The processes that share one model: which one this is, and how to reach the others."""

    def __init__(
        self, rank: int = 0, size: int = 1, store: dist.Store | None = None, token: str = ""
    ):
        self.rank, self.size, self.store = rank, size, store
        self.messages = SignedStore(store, token)
        self.step_timeout, self._limit = STEP_TIMEOUT, START_TIMEOUT  # see `begin_steps`
        self.group: Any = None
        self.device, self.capturable = torch.device("cpu"), size == 1  # see `connect`
        self.workers: list[subprocess.Popen] = []  # on rank 0, if it started the others
        self._num_shared = 0

    def shard(self, units: int, width: int = 1, dim: int = 0) -> Shard:
        """This rank's part of units * width; units are never cut.

        Fewer units than ranks: each is held by several ranks.
        """
        start = self.rank * units // self.size
        count = max(1, (self.rank + 1) * units // self.size - start)
        return Shard(start * width, count * width, units * width, dim)

    def place(self, device: torch.device) -> torch.device:
        """Where this rank computes: ranks take the GPUs in turn, several one if there are few."""
        if self.size == 1 or device.type == "cpu":
            return device
        return torch.device("cuda", self.rank % torch.cuda.device_count())

    def per_gpu(self) -> int:
        """The most ranks that share a GPU."""
        return -(-self.size // torch.cuda.device_count())

    # -- starting, agreeing, ending --------------------------------------------------------------

    @classmethod
    def start_workers(cls, size: int, settings: Any, worker: str = WORKER) -> "Ranks":
        """Start ranks 1 to size - 1 as processes of their own; this process is rank 0.

        worker: the code that they run. It calls `join`, which returns the settings (anything JSON
        can hold). They import what this process has imported, from where it has it.
        """
        # By default TCPStore listens on all interfaces, so we bind it to localhost ourselves.
        door = socket.create_server(("127.0.0.1", 0))
        options: Any = {"is_master": True, "wait_for_workers": False}
        port, door_fd = door.getsockname()[1], door.detach()  # the store closes it
        store = dist.TCPStore("127.0.0.1", port, **options, master_listen_fd=door_fd)
        ranks = cls(0, size, store)
        # Through a connection of its own, because one that waits for a key answers no other thread.
        own = dist.TCPStore("127.0.0.1", port, is_master=False)
        ranks.messages = SignedStore(own, token=secrets.token_hex(32))
        threads = str(max(1, torch.get_num_threads() // size))
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "TORCH_CPP_LOG_LEVEL": "ERROR"}
        command = python_command(worker)
        for _ in range(1, size):
            process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE)
            ranks.workers.append(process)
        for rank, process in enumerate(ranks.workers, start=1):
            ranks._brief(process, rank, port, settings)
        return ranks

    def _brief(self, worker: subprocess.Popen, rank: int, port: int, settings: Any) -> None:
        """Write what `join` reads. Through a pipe, because everybody can read a command line."""
        brief = {
            "port": port,
            "rank": rank,
            "size": self.size,
            "token": self.messages.token,
            "step_timeout": self.step_timeout.total_seconds(),
            "settings": settings,
        }
        # If the worker has died already, `connect` says so.
        with contextlib.suppress(BrokenPipeError), worker.stdin as pipe:
            pipe.write(json.dumps(brief).encode())

    @classmethod
    def join(cls) -> tuple["Ranks", Any]:
        """A worker's side of `start_workers`: this process's rank, and the settings."""
        brief = json.load(sys.stdin)
        store = dist.TCPStore("127.0.0.1", brief["port"], is_master=False)
        ranks = cls(brief["rank"], brief["size"], store, brief["token"])
        ranks.step_timeout = timedelta(seconds=brief["step_timeout"])
        return ranks, brief["settings"]

    @classmethod
    def from_torchrun(cls, size: int, engine_number: int) -> "Ranks":
        """The rank that torchrun made this process; its `engine_number`-th engine."""
        store, rank, world = next(dist.rendezvous("env://", timeout=START_TIMEOUT))
        if world != size:
            raise ValueError(f"tensor_parallel_size={size}, but torchrun started {world} ranks")
        return cls(rank, size, dist.PrefixStore(f"engine{engine_number}", store))

    def check_same(self, facts: dict[str, str]) -> None:
        """RuntimeError on a rank whose facts (see `facts_of`) are not those of rank 0."""
        if self.size == 1:
            return
        if self.rank == 0:
            self.messages.set("facts", facts)
            return
        rank0s = self.messages.get("facts")
        for name in sorted({*facts, *rank0s}):
            mine, wanted = facts.get(name), rank0s.get(name)
            if mine != wanted:
                raise RuntimeError(
                    f"rank {self.rank} differs from rank 0 in {name}: {mine} in place of {wanted}. "
                    "All ranks must run the same code with the same model and arguments"
                )

    def connect(self, device: torch.device) -> None:
        """Wait until every rank has come this far, then open the process group."""
        if self.size == 1:
            return
        self.messages.set(f"ready{self.rank}", True)
        names = [f"ready{rank}" for rank in range(self.size)]

        def all_ready() -> bool:
            self.check_reports()
            return self.messages.has(*names)

        self._wait(all_ready, pause=0.02)
        for name in names:
            self.messages.get(name)
        self.store.set_timeout(IDLE_TIMEOUT)
        self.device = device
        self.capturable = device.type == "cuda" and self.per_gpu() == 1  # NCCL can be, gloo not
        kind: Any = dist.ProcessGroupNCCL if self.capturable else dist.ProcessGroupGloo
        if self.capturable:
            # NCCL's watchdog would end this process, a notebook perhaps, when a rank is gone;
            # `wait_for` sees that too, and raises.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
            options = kind.Options()
        else:
            options = kind._Options()
            options._devices = [kind.create_device(hostname="127.0.0.1")]
            options._timeout = self._limit
        store = dist.PrefixStore("group", self.store)
        open_group = partial(kind, store, self.rank, self.size, options)
        # gloo waits here for the other ranks, and NCCL only in its first collective.
        self.group = open_group() if self.capturable else self._while_workers_live(open_group)
        self.all_reduce(torch.zeros(1, device=device))  # NCCL connects only now, uncaptured

    def begin_steps(self) -> None:
        """From now on a rank that does not come is waited for as long as a step may take."""
        self._limit = self.step_timeout
        if self.group is not None and not self.capturable:
            self.group._set_default_timeout(self._limit)

    def share(self, message: Any) -> Any:
        """Rank 0's message (anything JSON can hold), on every rank. Waits without end for it."""
        if self.size == 1:
            return message
        self._num_shared += 1
        boxes = [f"message{self._num_shared}/{rank}" for rank in range(self.size)]
        if self.rank == 0:
            self.check_workers()
            for box in boxes[1:]:
                self.messages.set(box, message)
            return message
        return self.messages.take(boxes[self.rank])

    def report(self, error: BaseException) -> None:
        """Tell rank 0 what this rank fails of, if rank 0 is still there to hear it."""
        if self.rank > 0:
            with contextlib.suppress(dist.DistError):
                self.messages.set(f"failed{self.rank}", f"{type(error).__name__}: {error}")

    def check_workers(self) -> None:
        """Raise RuntimeError if a worker has died."""
        ended = {n: code for n, w in enumerate(self.workers, 1) if (code := w.poll()) is not None}
        if not ended:
            return
        reports = self._reports()
        # A rank that was killed could report nothing, and the others fail because it is gone.
        rank = min(ended, key=lambda rank: rank in reports)
        reason = f": {reports[rank]}" if rank in reports else ""
        raise RuntimeError(f"rank {rank} has ended with exit code {ended[rank]}{reason}")

    def check_reports(self) -> None:
        """Raise RuntimeError if a rank has reported that it failed."""
        for rank, reason in self._reports().items():
            raise RuntimeError(f"rank {rank} has failed: {reason}")

    def _reports(self) -> dict[int, str]:
        """What ranks have reported (see `report`), by rank."""
        ranks = [rank for rank in range(1, self.size) if self.messages.has(f"failed{rank}")]
        return {rank: self.messages.get(f"failed{rank}") for rank in ranks}

    def wait_for(self, done: torch.cuda.Event) -> None:
        """Wait for what this GPU does; RuntimeError if another rank is gone, and it never ends."""
        if self.size > 1:
            self._wait(done.query, pause=2e-5)
        done.synchronize()

    def _wait(self, done: Callable[[], bool], pause: float) -> None:
        """Ask every `pause` seconds. RuntimeError if a worker dies, or at the limit."""
        deadline = time.monotonic() + self._limit.total_seconds()
        while not done():
            self.check_workers()
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"waited {self._limit} for {self.size} ranks: is one of them gone?"
                )
            time.sleep(pause)

    def _while_workers_live(self, function: Callable[[], Any]) -> Any:
        """Return function(), which may wait for other ranks. RuntimeError if a worker dies."""
        outcome: Future = Future()

        def run() -> None:
            try:
                outcome.set_result(function())
            except BaseException as error:
                outcome.set_exception(error)

        threading.Thread(target=run, daemon=True).start()  # it is left alone if a worker dies
        self._wait(outcome.done, pause=0.002)
        return outcome.result()

    def close(self, kill: bool = False, graphs: dict | None = None) -> None:
        """Leave the group, wait for the workers this process started, end those that do not end.

        graphs: the runner's, emptied here. NCCL first stops collectives that wait for a rank that
        is gone, and then waits until no graph holds one: so in a thread, and not for ever.
        """
        if self.group is not None and self.capturable:
            leaving = threading.Thread(target=self.group.abort, daemon=True)
            leaving.start()
            (graphs or {}).clear()
            leaving.join(timeout=10)
        self.group = None
        for worker in self.workers:
            try:
                worker.wait(timeout=0 if kill else EXIT_TIMEOUT)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
        self.workers.clear()

    # -- collectives -----------------------------------------------------------------------------

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            self.group.allreduce([x]).wait()
        return x

    def minimum(self, value: int) -> int:
        """The smallest of all ranks' values."""
        return int(min(self._gather(torch.tensor([value], device=self.device))))

    def gather_columns(self, x: Tensor, num_columns: int) -> Tensor:
        """Whole rows [num_rows, num_columns] from each rank's `shard` of the columns."""
        widest = -(-num_columns // self.size)
        parts = self._gather(F.pad(x, (0, widest - x.shape[1])))
        counts = [Ranks(rank, self.size).shard(num_columns).count for rank in range(self.size)]
        return torch.cat([part[:, :n] for part, n in zip(parts, counts, strict=True)], dim=1)

    def reduce_argmax(self, values: Tensor, ids: Tensor) -> Tensor:
        """The ids [num_rows, 1] of the largest of all ranks' values [num_rows, n], n >= 1.

        ids rise with the column and with the rank; the lowest id wins a tie.
        """
        all_values, all_ids = (torch.cat(self._gather(x), dim=1) for x in (values, ids))
        return all_ids.gather(1, all_values.argmax(dim=1, keepdim=True))  # the first of equal ones

    def _gather(self, x: Tensor) -> list[Tensor]:
        if self.size == 1:
            return [x]
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self.group.allgather([parts], [x.contiguous()]).wait()
        return parts
