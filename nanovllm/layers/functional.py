"""Linear layers as functions, with the norm before them or the residual add after them.

Each is one function, so that a backend can compute it in one pass over the data. The bodies here
say what the result is.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ weight.T + bias: [num_tokens, outputs] of x [num_tokens, inputs].

    weight: [outputs, inputs]. bias: [outputs].
    """
    return F.linear(x, weight, bias)


def norm_linear(
    x: Tensor, norm: Callable[[Tensor], Tensor], weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Return linear(norm(x)), with the shapes of `linear`."""
    return linear(norm(x), weight, bias)


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """Return residual + linear(x), both [num_tokens, outputs].

    A backend may overwrite the residual with the result.
    """
    return residual + linear(x, weight, bias)


def norm_swiglu(
    x: Tensor, norm: Callable[[Tensor], Tensor], weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Return silu(gate) * up, where gate and up are the halves of norm_linear(x).

    This is SwiGLU (Shazeer, arXiv:2002.05202). weight [2 * outputs, inputs] holds gate's rows, then
    up's, and the result is [num_tokens, outputs].
    """
    gate, up = norm_linear(x, norm, weight, bias).chunk(2, dim=-1)
    return F.silu(gate) * up
