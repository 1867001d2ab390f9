"""The products of a layer, each with what stands beside it: a norm before, a sum or a gate after.

They are one function each because a GPU does them in one pass; here they read as they are written.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Callable[[Tensor], Tensor] | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + norm(x) @ weight.T + bias: [num_tokens, outputs] of x [num_tokens, inputs].

    weight: [outputs, inputs]. The residual may be overwritten with the result.
    """
    y = F.linear(x if norm is None else norm(x), weight, bias)
    return y if residual is None else residual + y


def gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """silu(gate) * up, where weight [2 * outputs, inputs] holds gate's rows, then up's."""
    gate, up = linear(x, weight, bias, norm).chunk(2, dim=-1)
    return F.silu(gate) * up
