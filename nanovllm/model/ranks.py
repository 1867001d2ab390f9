"""Ranks: the processes that share one model, and what they say to each other.

Every rank runs the same engine over the same requests, and so plans the same steps: schedules are
never sent. What is sent is what rank 0 was asked to do, one message a call, through a key-value
store (`Ranks.share`), where an idle rank can wait for hours; tensors go through a process group.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

START_TIMEOUT = timedelta(minutes=10)  # for all ranks to load their share of the model
STEP_TIMEOUT = timedelta(seconds=25)  # for the others to reach a collective of a launched step
IDLE_TIMEOUT = timedelta(days=1000)  # for rank 0 to have something to say
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

    def __init__(self, rank: int = 0, size: int = 1, store: dist.Store | None = None):
        self.rank, self.size, self.store = rank, size, store
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
    def start_workers(cls, size: int, settings: dict[str, Any]) -> "Ranks":
        """Start ranks 1 to size - 1 as processes of their own; this process is rank 0."""
        door = socket.create_server(("127.0.0.1", 0))  # left to itself, the store hears everybody
        options: Any = {"is_master": True, "wait_for_workers": False}
        port, door_fd = door.getsockname()[1], door.detach()  # the store closes it
        store = dist.TCPStore("127.0.0.1", port, **options, master_listen_fd=door_fd)
        ranks = cls(0, size, store)
        store.set("settings", json.dumps(settings))
        threads = str(max(1, torch.get_num_threads() // size))
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "TORCH_CPP_LOG_LEVEL": "ERROR"}
        for rank in range(1, size):
            command = [sys.executable, "-c", WORKER, str(store.port), str(rank), str(size)]
            ranks.workers.append(subprocess.Popen(command, env=environment))
        return ranks

    @classmethod
    def join(cls, port: int, rank: int, size: int) -> "Ranks":
        """A worker's side of `start_workers`."""
        return cls(rank, size, dist.TCPStore("127.0.0.1", port, is_master=False))

    @classmethod
    def from_torchrun(cls, size: int, engine_number: int) -> "Ranks":
        """The rank that torchrun made this process; its `engine_number`-th engine."""
        store, rank, world = next(dist.rendezvous("env://", timeout=START_TIMEOUT))
        if world != size:
            raise ValueError(f"tensor_parallel_size={size}, but torchrun started {world} ranks")
        return cls(rank, size, dist.PrefixStore(f"engine{engine_number}", store))

    def connect(self, device: torch.device) -> None:
        """Wait until every rank has come this far, then open the process group."""
        if self.size == 1:
            return
        self.store.set(f"ready{self.rank}", "")
        names = [f"ready{rank}" for rank in range(self.size)]
        self._wait(lambda: self.store.check(names), START_TIMEOUT, pause=0.02)
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
            options._timeout = STEP_TIMEOUT
        store = dist.PrefixStore("group", self.store)
        self.group = kind(store, self.rank, self.size, options)
        self.all_reduce(torch.zeros(1, device=device))  # NCCL connects only now, uncaptured

    def share(self, message: Any) -> Any:
        """Rank 0's message (anything JSON can hold), on every rank. Waits without end for it."""
        if self.size == 1:
            return message
        self._num_shared += 1
        boxes = [f"message{self._num_shared}/{rank}" for rank in range(self.size)]
        if self.rank == 0:
            self.check_workers()
            for box in boxes[1:]:
                self.store.set(box, json.dumps(message))
            return message
        received = json.loads(self.store.get(boxes[self.rank]))
        self.store.delete_key(boxes[self.rank])
        return received

    def check_workers(self) -> None:
        """Raise RuntimeError if a worker has died."""
        for rank, worker in enumerate(self.workers, start=1):
            if worker.poll() is not None:
                raise RuntimeError(f"rank {rank} has ended with exit code {worker.returncode}")

    def wait_for(self, done: torch.cuda.Event) -> None:
        """Wait for what this GPU does; RuntimeError if another rank is gone, and it never ends."""
        if self.size > 1:
            self._wait(done.query, STEP_TIMEOUT, pause=2e-5)
        done.synchronize()

    def _wait(self, done: Callable[[], bool], limit: timedelta, pause: float) -> None:
        """Ask every `pause` seconds. RuntimeError if a worker dies, or at the limit."""
        deadline = time.monotonic() + limit.total_seconds()
        while not done():
            self.check_workers()
            if time.monotonic() > deadline:
                raise RuntimeError(f"waited {limit} for {self.size} ranks: is one of them gone?")
            time.sleep(pause)

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
                worker.wait(timeout=0 if kill else 10)
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
