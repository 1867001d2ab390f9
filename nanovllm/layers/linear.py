"""Tensor parallelism: layers whose weights are split over ranks.

Column-parallel linears split their outputs, row-parallel ones their inputs, so that a pair of them
needs one all-reduce (Shoeybi et al., "Megatron-LM", 2019). On one rank each is a plain linear.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm.model.ranks import Ranks, Shard
from nanovllm.models.model_config import ModelConfig
from nanovllm.distributed.ranks import Ranks, Shard
from nanovllm.model.model_config import ModelConfig


def check_divisible(config: ModelConfig, size: int) -> None:
    """Raise ValueError unless the model's heads and features can be split over `size` ranks."""
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        units = getattr(config, name)
        several_hold_it = name == "num_key_value_heads" and size % units == 0
        if units % size and not several_hold_it:
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
    """Token ids to vectors: each rank looks up the ids it holds, and the others' add up.

    For an id that another rank holds, some vector is looked up too, and then set to zero. It could
    hold NaN, which a multiplication by zero would not remove.
    """

    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        if self.ranks.world_size == 1:
            return F.embedding(ids, self.weight)
        local = ids - self.shard.start
        held = (local >= 0) & (local < self.shard.count)
        vectors = F.embedding(local.clamp(0, self.shard.count - 1), self.weight)
        return self.ranks.all_reduce(vectors.masked_fill(~held[:, None], 0))
