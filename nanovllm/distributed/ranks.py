"""Ranks: the processes that share one model, and the collectives that connect them.

Every rank runs the same engine over the same requests, so every rank plans the same steps. That is
why schedules are never sent. Two kinds of data are sent:

- Rank 0's commands, one message for each call, go through a key-value store (`Ranks.broadcast`). An
  idle rank can wait there for hours.
- Tensors go through a process group, which is NCCL's if each rank has a GPU of its own, and gloo's
  otherwise.

launch.py starts the processes, and monitor.py notices when one of them fails.
"""

import os
import subprocess
import threading
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nanovllm.distributed.monitor import RankMonitor
from nanovllm.distributed.signed_store import SignedStore

IDLE_TIMEOUT = timedelta(days=1000)  # how long a worker waits for rank 0's next command
ABORT_SECONDS = 10  # how long `close` waits for NCCL


@dataclass(frozen=True)
class Shard:
    """One rank's part of a tensor: the indices [start, start + count) of dimension `dim`.

    `size` is the length of that dimension in the whole tensor.
    """

    start: int
    count: int
    size: int
    dim: int = 0


class Ranks:
    """The processes that share one model, as seen from one of them.

    `rank` is the number of this process, and `world_size` is the number of processes. A rank alone
    (world_size=1) needs no store, and its collectives return their input.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        store: dist.Store | None = None,
        messages: SignedStore | None = None,
    ):
        self.rank, self.world_size, self.store = rank, world_size, store
        self.messages = messages or SignedStore(store)
        self.monitor = RankMonitor(rank, world_size, self.messages)
        self.group: Any = None
        self.device = torch.device("cpu")
        self.capturable = world_size == 1  # whether a CUDA graph can capture the collectives
        self.num_broadcasts = 0

    @property
    def workers(self) -> list[subprocess.Popen]:
        """The processes of the other ranks, on rank 0 if it started them; else an empty list."""
        return self.monitor.workers

    # -- dividing the model ----------------------------------------------------------------------

    def shard(self, units: int, width: int = 1, dim: int = 0) -> Shard:
        """Return this rank's part of a dimension of units * width, without cutting a unit.

        A unit is an attention head or a feature, for example. If there are fewer units than ranks,
        several ranks hold the same unit.
        """
        start = self.rank * units // self.world_size
        count = max(1, (self.rank + 1) * units // self.world_size - start)
        return Shard(start * width, count * width, units * width, dim)

    def local_device(self, device: torch.device) -> torch.device:
        """Return the device that this rank computes on.

        Ranks take the machine's GPUs in turn. If there are fewer GPUs than ranks, they share them.
        """
        if self.world_size == 1 or device.type == "cpu":
            return device
        return torch.device("cuda", self.rank % torch.cuda.device_count())

    def max_ranks_per_gpu(self) -> int:
        """Return the number of ranks on the GPU that most ranks share."""
        return -(-self.world_size // torch.cuda.device_count())

    # -- the process group -----------------------------------------------------------------------

    def init_process_group(self, device: torch.device) -> None:
        """Wait until every rank calls this method, then open the process group.

        Raises RuntimeError if a rank ends, fails, or does not come within START_TIMEOUT.
        """
        if self.world_size == 1:
            return
        if self.store is None:
            raise RuntimeError(f"{self.world_size} ranks need a store in which they can meet")
        self._wait_for_all_ranks()
        self.store.set_timeout(IDLE_TIMEOUT)
        self.device = device
        # NCCL's collectives can be captured, and gloo's cannot. NCCL needs a GPU for each rank.
        self.capturable = device.type == "cuda" and self.max_ranks_per_gpu() == 1
        kind: Any = dist.ProcessGroupNCCL if self.capturable else dist.ProcessGroupGloo
        if self.capturable:
            # When a rank is gone, NCCL's watchdog would end this process, which may be a notebook.
            # `synchronize` notices that too, and raises an error instead.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
            options = kind.Options()
        else:
            options = kind._Options()
            options._devices = [kind.create_device(hostname="127.0.0.1")]
            options._timeout = self.monitor.timeout
        store = dist.PrefixStore("group", self.store)
        make_group = partial(kind, store, self.rank, self.world_size, options)
        # Gloo waits for the other ranks here, and NCCL only in its first collective.
        wait = not self.capturable
        self.group = self.monitor.call_while_workers_live(make_group) if wait else make_group()
        # NCCL connects in its first collective, which no graph may capture, so we run one now.
        self.all_reduce(torch.zeros(1, device=device))

    def _wait_for_all_ranks(self) -> None:
        self.messages.set(f"ready{self.rank}", True)
        keys = [f"ready{rank}" for rank in range(self.world_size)]

        def all_ready() -> bool:
            self.monitor.check_errors()
            return self.messages.has(*keys)

        self.monitor.wait_until(all_ready, poll_seconds=0.02)
        for key in keys:
            self.messages.get(key)  # checks the signature

    def use_step_timeout(self) -> None:
        """Shorten the time-out from the time that a start may take to that of a step."""
        self.monitor.timeout = self.monitor.step_timeout
        if self.group is not None and not self.capturable:
            self.group._set_default_timeout(self.monitor.timeout)

    def synchronize(self, event: torch.cuda.Event) -> None:
        """Wait until this GPU has reached an event.

        Raises RuntimeError if another rank has ended, because a collective with it never ends.
        """
        if self.world_size > 1:
            self.monitor.wait_until(event.query, poll_seconds=2e-5)
        event.synchronize()

    def close(self, kill: bool = False, graphs: dict | None = None) -> None:
        """Leave the process group and end the worker processes that this rank started.

        kill: do not wait for the workers to end by themselves.
        graphs: the runner's CUDA graphs, which this method removes from the dict.
        """
        if self.group is not None and self.capturable:
            # NCCL's abort first stops the collectives that wait for a lost rank. It then waits
            # until no graph holds a collective, so it needs a thread of its own and a time limit.
            aborting = threading.Thread(target=self.group.abort, daemon=True)
            aborting.start()
            (graphs or {}).clear()
            aborting.join(timeout=ABORT_SECONDS)
        self.group = None
        self.monitor.end_workers(kill)

    # -- collectives -----------------------------------------------------------------------------

    def broadcast(self, message: Any) -> Any:
        """Return rank 0's message on every rank, waiting for it as long as it takes.

        message: anything that JSON can hold. Only rank 0's matters.
        """
        if self.world_size == 1:
            return message
        self.num_broadcasts += 1
        keys = [f"message{self.num_broadcasts}/{rank}" for rank in range(self.world_size)]
        if self.rank == 0:
            self.monitor.check_workers()
            for key in keys[1:]:
                self.messages.set(key, message)
            return message
        return self.messages.pop(keys[self.rank])

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum x over all ranks, in place, and return it."""
        if self.world_size > 1:
            self.group.allreduce([x]).wait()
        return x

    def all_reduce_min(self, value: int) -> int:
        """Return the smallest of all ranks' values."""
        return int(min(self.all_gather(torch.tensor([value], device=self.device))))

    def all_gather_columns(self, x: Tensor, num_columns: int) -> Tensor:
        """Return whole rows [num_rows, num_columns] from the columns that each rank holds.

        x: this rank's `shard(num_columns)` of the columns, [num_rows, shard.count].
        """
        widest = -(-num_columns // self.world_size)
        parts = self.all_gather(F.pad(x, (0, widest - x.shape[1])))
        ranks = (Ranks(rank, self.world_size) for rank in range(self.world_size))
        counts = [rank.shard(num_columns).count for rank in ranks]
        return torch.cat([part[:, :n] for part, n in zip(parts, counts, strict=True)], dim=1)

    def all_reduce_argmax(self, values: Tensor, ids: Tensor) -> Tensor:
        """Return the id [num_rows, 1] of the largest value of each row over all ranks.

        values, ids: [num_rows, n] on each rank, with n >= 1. Ids increase with the column and with
        the rank. If several values are largest, the lowest id wins.
        """
        all_values, all_ids = (torch.cat(self.all_gather(x), dim=1) for x in (values, ids))
        return all_ids.gather(1, all_values.argmax(dim=1, keepdim=True))  # argmax takes the first

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """Return the x of every rank, in the order of ranks. All must have the same shape."""
        if self.world_size == 1:
            return [x]
        parts = [torch.empty_like(x) for _ in range(self.world_size)]
        self.group.allgather([parts], [x.contiguous()]).wait()
        return parts
