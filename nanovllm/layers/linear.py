"""Layers whose weights are divided among the ranks (tensor parallelism).

A column-parallel layer divides its outputs and a row-parallel layer its inputs. A column-parallel
layer followed by a row-parallel one therefore needs only one all-reduce (Megatron-LM, Shoeybi et
al., arXiv:1909.08053). On a single rank every layer here is an ordinary one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm.distributed.ranks import Ranks, Shard
from nanovllm.layers.backend import Backend


class ShardedModule(nn.Module):
    """Holds a weight, and sometimes a bias, and records which part of the checkpoint's each is."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("bias", None)
        self.shards: dict[str, Shard] = {}  # by parameter name

    def register_shard(self, name: str, values: Tensor, shard: Shard) -> None:
        """Add a parameter that holds this rank's `shard` of the checkpoint's tensor."""
        self.register_parameter(name, nn.Parameter(values, requires_grad=False))
        self.shards[name] = shard


class ColumnParallelLinear(nn.Module):
    """Several linear layers of one input, computed as one; each rank has a part of every output.

    `outputs` maps the name of a layer in the checkpoint to (units, features per unit). A unit, such
    as a head, is never divided. The layers' parameters are views of this layer's `weight` and
    `bias`, so loading the layers fills them.
    """

    def __init__(
        self,
        input_size: int,
        outputs: dict[str, tuple[int, int]],
        bias: bool,
        dtype: torch.dtype,
        ranks: Ranks,
        backend: Backend,
    ):
        super().__init__()
        self.backend = backend
        shards = {name: ranks.shard(units, width) for name, (units, width) in outputs.items()}
        size = sum(shard.count for shard in shards.values())
        self.weight = torch.empty(size, input_size, dtype=dtype)
        self.bias = torch.empty(size, dtype=dtype) if bias else None
        first = 0
        for name, shard in shards.items():
            layer = ShardedModule()
            layer.register_shard("weight", self.weight[first : first + shard.count], shard)
            if self.bias is not None:
                layer.register_shard("bias", self.bias[first : first + shard.count], shard)
            self.add_module(name, layer)
            first += shard.count

    def norm_linear(self, x: Tensor, norm: nn.Module) -> Tensor:
        """Return linear(norm(x)): this rank's outputs [num_tokens, local outputs]."""
        return self.backend.norm_linear(x, norm, self.weight, self.bias)

    def norm_swiglu(self, x: Tensor, norm: nn.Module) -> Tensor:
        """Return silu(gate) * up, if the two layers are gate and up, of norm(x)."""
        return self.backend.norm_swiglu(x, norm, self.weight, self.bias)


class RowParallelLinear(ShardedModule):
    """A linear layer whose input features are divided among the ranks, in whole units.

    `inputs` is (units, features per unit). The output is the sum of all ranks' results.
    """

    def __init__(
        self,
        inputs: tuple[int, int],
        output_size: int,
        bias: bool,
        dtype: torch.dtype,
        ranks: Ranks,
        backend: Backend,
    ):
        super().__init__()
        self.ranks, self.backend = ranks, backend
        shard = ranks.shard(*inputs, dim=1)
        weight = torch.empty(output_size, shard.count, dtype=dtype)
        self.register_shard("weight", weight, shard)
        if bias:  # every rank holds all of it
            whole = Shard(start=0, count=output_size, size=output_size)
            self.register_shard("bias", torch.empty(output_size, dtype=dtype), whole)

    def linear_add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return residual + linear(x), of which x [num_tokens, local inputs] is this rank's part.

        If every rank added the bias and the residual, the sum over ranks would contain them several
        times. That is why only rank 0 adds them.
        """
        if self.ranks.rank == 0:
            y = self.backend.linear_add(x, self.weight, self.bias, residual)
        else:
            y = self.backend.linear(x, self.weight)
        return self.ranks.all_reduce(y)


class VocabParallelEmbedding(ShardedModule):
    """Token ids to vectors; each rank has the rows of a part of the vocabulary."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype, ranks: Ranks):
        super().__init__()
        self.ranks, self.shard = ranks, ranks.shard(vocab_size)
        weight = torch.empty(self.shard.count, hidden_size, dtype=dtype)
        self.register_shard("weight", weight, self.shard)

    def forward(self, ids: Tensor) -> Tensor:
        """Return vectors [num_tokens, hidden_size] of ids [num_tokens].

        Each rank looks up the ids in its part, and the all-reduce adds the ranks' results. For any
        other id, a rank looks up some vector and then sets it to zero. That vector could hold NaN,
        which a multiplication by zero would not remove.
        """
        if self.ranks.world_size == 1:
            return F.embedding(ids, self.weight)
        local = ids - self.shard.start
        is_local = (local >= 0) & (local < self.shard.count)
        vectors = F.embedding(local.clamp(0, self.shard.count - 1), self.weight)
        return self.ranks.all_reduce(vectors.masked_fill(~is_local[:, None], 0))


class ParallelLMHead(ShardedModule):
    """Hidden states to logits; each rank computes the logits of a part of the vocabulary."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        dtype: torch.dtype,
        ranks: Ranks,
        backend: Backend,
    ):
        super().__init__()
        self.backend, shard = backend, ranks.shard(vocab_size)
        weight = torch.empty(shard.count, hidden_size, dtype=dtype)
        self.register_shard("weight", weight, shard)

    def norm_linear(self, x: Tensor, norm: nn.Module) -> Tensor:
        """Return this rank's logits [num_rows, local vocab] of norm(x), x [num_rows, hidden]."""
        return self.backend.norm_linear(x, norm, self.weight)
