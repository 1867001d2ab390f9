"""Tensor parallelism: layers whose weights are split over ranks, and what ranks say to each other.

Column-parallel linears split their outputs, row-parallel ones their inputs, so that a pair of them
needs one all-reduce (Shoeybi et al., "Megatron-LM", 2019). On one rank each is a plain linear.

Every rank runs the same engine over the same requests, and so plans the same steps: schedules are
never sent. What is sent is what rank 0 was asked to do, one message a call, through a key-value
store (`Ranks.share`), where an idle rank can wait for hours; tensors go through a process group.
"""

import json
import os
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
from torch import Tensor, nn

from nanovllm.model.model_config import ModelConfig

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
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
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


def check_divisible(config: ModelConfig, size: int) -> None:
    """Raise ValueError unless the model's heads and features can be split over `size` ranks."""
    kv_heads = config.num_key_value_heads
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        units = getattr(config, name)
        if units % size and (units != kv_heads or size % kv_heads):
            raise ValueError(f"tensor_parallel_size={size} does not divide {name}={units}")


class Sharded(nn.Module):
    """Holds a weight, and perhaps a bias, and says which part of the checkpoint's each is."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("bias", None)
        self.shards: dict[str, Shard] = {}

    def hold(self, name: str, values: Tensor, shard: Shard) -> None:
        self.register_parameter(name, nn.Parameter(values, requires_grad=False))
        self.shards[name] = shard


class ColumnLinear(nn.Module):
    """Several linears of one input as one product; each rank computes its share of every output.

    `outputs` maps a checkpoint layer's name to (units, features a unit). The layers' parameters are
    rows of this one's `weight` and `bias`: filling them fills these.
    """

    def __init__(
        self, config: ModelConfig, ranks: Ranks, outputs: dict, bias: bool, linear: Callable
    ):
        super().__init__()
        self.linear = linear
        shards = {name: ranks.shard(units, width) for name, (units, width) in outputs.items()}
        size = sum(shard.count for shard in shards.values())
        self.weight = torch.empty(size, config.hidden_size, dtype=config.dtype)
        self.bias = torch.empty(size, dtype=config.dtype) if bias else None
        first = 0
        for name, shard in shards.items():
            layer = Sharded()
            layer.hold("weight", self.weight[first : first + shard.count], shard)
            if self.bias is not None:
                layer.hold("bias", self.bias[first : first + shard.count], shard)
            self.add_module(name, layer)
            first += shard.count

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        return self.linear(x, self.weight, self.bias, norm)


class RowLinear(Sharded):
    """A linear whose input features are split over ranks; its output is the sum of their parts.

    `inputs` is (units, features a unit).
    """

    def __init__(
        self, config: ModelConfig, ranks: Ranks, inputs: tuple, bias: bool, linear: Callable
    ):
        super().__init__()
        self.ranks, self.linear = ranks, linear
        hidden, (units, width) = config.hidden_size, inputs
        shard = ranks.shard(units, width, dim=1)
        self.hold("weight", torch.empty(hidden, shard.count, dtype=config.dtype), shard)
        if bias:
            self.hold("bias", torch.empty(hidden, dtype=config.dtype), Ranks().shard(hidden))

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + the whole product of x, of which this rank has a part."""
        once = self.ranks.rank == 0  # the sum over ranks holds bias and residual once
        bias, residual = (self.bias, residual) if once else (None, None)
        return self.ranks.all_reduce(self.linear(x, self.weight, bias, None, residual))


class VocabHead(Sharded):
    """Hidden states to logits; each rank holds its share of the vocabulary."""

    def __init__(self, config: ModelConfig, ranks: Ranks, linear: Callable = F.linear):
        super().__init__()
        self.linear, self.ranks, self.shard = linear, ranks, ranks.shard(config.vocab_size)
        weight = torch.empty(self.shard.count, config.hidden_size, dtype=config.dtype)
        self.hold("weight", weight, self.shard)

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        return self.linear(x, self.weight, None, norm)


class VocabEmbedding(VocabHead):
    """Token ids to vectors: each rank looks up the ids it holds, and the others' add up."""

    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        if self.ranks.size == 1:
            return F.embedding(ids, self.weight)
        local = ids - self.shard.start
        held = (local >= 0) & (local < self.shard.count)
        vectors = F.embedding(local.clamp(0, self.shard.count - 1), self.weight)
        return self.ranks.all_reduce(vectors * held[:, None])
