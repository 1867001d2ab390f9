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
import time
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
LONG_WAIT = timedelta(minutes=10)  # an idle rank waits again after each
WORKER = "from nanovllm.engine.engine import run_worker; run_worker()"


class Ranks:
    """The processes that share one model: which one this is, and how to reach the others."""

    def __init__(self, rank: int = 0, size: int = 1, store: dist.Store | None = None):
        self.rank, self.size, self.store = rank, size, store
        self.group: Any = None
        self.workers: list[subprocess.Popen] = []  # on rank 0, if it started the others
        self._num_shared = 0

    def span(self, units: int) -> tuple[int, int]:
        """(start, count) of this rank's share. Fewer units than ranks: each is held by several."""
        start = self.rank * units // self.size
        return start, max(1, (self.rank + 1) * units // self.size - start)

    # -- starting, agreeing, ending --------------------------------------------------------------

    @classmethod
    def start_workers(cls, size: int, settings: dict[str, Any]) -> "Ranks":
        """Start ranks 1 to size - 1 as processes of their own; this process is rank 0."""
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        ranks = cls(0, size, store)
        store.set("settings", json.dumps(settings))
        threads = str(max(1, torch.get_num_threads() // size))
        for rank in range(1, size):
            command = [sys.executable, "-c", WORKER, str(store.port), str(rank), str(size)]
            environment = {**os.environ, "OMP_NUM_THREADS": threads, "TORCH_CPP_LOG_LEVEL": "ERROR"}
            ranks.workers.append(subprocess.Popen(command, env=environment))
        return ranks

    @classmethod
    def join(cls, port: int, rank: int, size: int) -> "Ranks":
        """A worker's side of `start_workers`."""
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        return cls(rank, size, store)

    @classmethod
    def from_torchrun(cls, size: int, engine_number: int) -> "Ranks":
        """The rank that torchrun made this process; its `engine_number`-th engine."""
        store, rank, world = next(dist.rendezvous("env://", timeout=START_TIMEOUT))
        if world != size:
            raise ValueError(f"tensor_parallel_size={size}, but torchrun started {world} ranks")
        return cls(rank, size, dist.PrefixStore(f"engine{engine_number}", store))

    def settings(self) -> dict[str, Any]:
        """What `start_workers` was given, on a worker."""
        return json.loads(self.store.get("settings"))

    def connect(self) -> None:
        """Wait until every rank has come this far, then open the process group."""
        if self.size == 1:
            return
        self.store.set(f"ready{self.rank}", "")
        deadline = time.monotonic() + START_TIMEOUT.total_seconds()
        while not self.store.check([f"ready{rank}" for rank in range(self.size)]):
            self.check_workers()
            if time.monotonic() > deadline:
                raise TimeoutError(f"not all {self.size} ranks were ready within {START_TIMEOUT}")
            time.sleep(0.02)
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = STEP_TIMEOUT
        store = dist.PrefixStore("group", self.store)
        self.group = dist.ProcessGroupGloo(store, self.rank, self.size, options)

    def share(self, message: Any) -> Any:
        """Rank 0's message (anything JSON can hold), on every rank. Waits without end for it."""
        if self.size == 1:
            return message
        self._num_shared += 1
        if self.rank > 0:  # each rank has a mailbox of its own, and empties it
            key = f"message{self._num_shared}/{self.rank}"
            self._wait(key)
            message = json.loads(self.store.get(key))
            self.store.delete_key(key)
            return message
        self.check_workers()
        for rank in range(1, self.size):
            self.store.set(f"message{self._num_shared}/{rank}", json.dumps(message))
        return message

    def _wait(self, key: str) -> None:
        while True:
            try:
                return self.store.wait([key], LONG_WAIT)
            except dist.DistStoreError:  # not there yet; a lost rank 0 raises DistNetworkError
                continue

    def check_workers(self) -> None:
        """Raise RuntimeError if a worker has died."""
        for rank, worker in enumerate(self.workers, start=1):
            if worker.poll() is not None:
                raise RuntimeError(f"rank {rank} has ended with exit code {worker.returncode}")

    def close(self, kill: bool = False) -> None:
        """Wait for the workers this process started to end, and end those that do not."""
        for worker in self.workers:
            try:
                worker.wait(timeout=0 if kill else 5)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
        self.workers.clear()
        self.group = None

    # -- collectives -----------------------------------------------------------------------------

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            self.group.allreduce([x]).wait()
        return x

    def minimum(self, value: int) -> int:
        """The smallest of all ranks' values."""
        return int(min(self._gather(torch.tensor([value]))))

    def gather_columns(self, x: Tensor, num_columns: int) -> Tensor:
        """Whole rows [num_rows, num_columns] from each rank's `span` of the columns."""
        widest = -(-num_columns // self.size)
        parts = self._gather(F.pad(x, (0, widest - x.shape[1])))
        counts = [Ranks(rank, self.size).span(num_columns)[1] for rank in range(self.size)]
        return torch.cat([part[:, :n] for part, n in zip(parts, counts, strict=True)], dim=1)

    def reduce_argmax(self, values: Tensor, ids: Tensor) -> Tensor:
        """The ids [num_rows, 1] with the largest values over ranks; the lowest id wins a tie."""
        if self.size == 1:
            return ids
        all_values, all_ids = (torch.cat(self._gather(x), dim=1) for x in (values, ids))
        return all_ids.gather(1, all_values.argmax(dim=1, keepdim=True))  # ranks hold rising ids

    def _gather(self, x: Tensor) -> list[Tensor]:
        if self.size == 1:
            return [x]
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self.group.allgather([parts], [x.contiguous()]).wait()
        return parts


def check_divisible(config: ModelConfig, size: int) -> None:
    """Raise ValueError unless the model's heads and features divide by the number of ranks."""
    for name in ("num_attention_heads", "intermediate_size"):
        if getattr(config, name) % size:
            raise ValueError(
                f"tensor_parallel_size={size} does not divide {name}={getattr(config, name)}"
            )
    if config.num_key_value_heads % size and size % config.num_key_value_heads:
        raise ValueError(
            f"tensor_parallel_size={size} is neither a divisor nor a multiple of "
            f"num_key_value_heads={config.num_key_value_heads}"
        )


@dataclass(frozen=True)
class Shard:
    """Which part of one checkpoint tensor a parameter holds, and where.

    [start, start + count) of the tensor's dimension `dim` lies at `offset` of the parameter's.
    """

    shape: tuple[int, ...]  # the checkpoint tensor's
    dim: int
    start: int
    count: int
    offset: int = 0


class ShardedLayer(nn.Module):
    """A layer that tells the loader which checkpoint tensors fill its parameters."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.shards: dict[str, dict[str, Shard]] = {}  # parameter -> checkpoint layer -> shard

    def add_parameter(
        self, name: str, shape: tuple[int, ...] | None, shards: dict[str, Shard]
    ) -> None:
        """A parameter without values (shape None: none at all), and the shards that fill it."""
        values = None if shape is None else nn.Parameter(torch.empty(shape), requires_grad=False)
        self.register_parameter(name, values)
        self.shards[name] = shards


class ColumnLinear(ShardedLayer):
    """Several linears of one input as one product; each rank computes its share of every output.

    `outputs` maps a checkpoint layer's name to (units, features a unit); units are never cut.
    """

    def __init__(
        self, in_features: int, outputs: dict[str, tuple[int, int]], bias: bool, ranks: Ranks
    ):
        super().__init__()
        rows: dict[str, Shard] = {}
        self.sizes: list[int] = []
        for name, (units, width) in outputs.items():
            start, count = ranks.span(units)
            shape = (units * width, in_features)
            rows[name] = Shard(shape, 0, start * width, count * width, sum(self.sizes))
            self.sizes.append(count * width)
        self.add_parameter("weight", (sum(self.sizes), in_features), rows)
        biases = {k: Shard(s.shape[:1], 0, s.start, s.count, s.offset) for k, s in rows.items()}
        self.add_parameter("bias", (sum(self.sizes),) if bias else None, biases)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return F.linear(x, self.weight, self.bias).split(self.sizes, dim=-1)


class RowLinear(ShardedLayer):
    """A linear whose input features are split over ranks; its output is the sum of their parts."""

    def __init__(self, units: int, width: int, out_features: int, bias: bool, ranks: Ranks):
        super().__init__()
        self.ranks = ranks
        start, count = ranks.span(units)
        shard = Shard((out_features, units * width), 1, start * width, count * width)
        self.add_parameter("weight", (out_features, count * width), {"": shard})
        whole = Shard((out_features,), 0, 0, out_features)
        self.add_parameter("bias", (out_features,) if bias else None, {"": whole})

    def forward(self, x: Tensor) -> Tensor:
        y = self.ranks.all_reduce(F.linear(x, self.weight))
        return y if self.bias is None else y + self.bias


class VocabHead(ShardedLayer):
    """Hidden states to logits; each rank holds its span of the vocabulary."""

    def __init__(self, vocab_size: int, hidden_size: int, ranks: Ranks):
        super().__init__()
        self.ranks = ranks
        self.start, self.count = ranks.span(vocab_size)
        shard = Shard((vocab_size, hidden_size), 0, self.start, self.count)
        self.add_parameter("weight", (self.count, hidden_size), {"": shard})

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class VocabEmbedding(VocabHead):
    """Token ids to vectors: each rank looks up the ids it holds, and the others' add up."""

    def forward(self, ids: Tensor) -> Tensor:
        if self.ranks.size == 1:
            return F.embedding(ids, self.weight)
        local = ids - self.start
        held = (local >= 0) & (local < self.count)
        vectors = F.embedding(local.clamp(0, self.count - 1), self.weight)
        return self.ranks.all_reduce(vectors * held[:, None])
