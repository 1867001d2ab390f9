"""Rotary position embedding (RoPE): a token's position, written into its queries and keys.

A head of size d is taken as d/2 points in a plane: dimension i and dimension i + d/2 are the two
coordinates of pair i. At position p, pair i is turned by the angle p * f_i, f_i = theta^(-2i/d).
A query at m and a key at n then meet at the angle (m - n) * f_i: their product knows how far apart
they stand, and not where (Su et al., RoFormer, arXiv:2104.09864).

The first pairs turn fast and tell neighbours apart. The last turn so slowly that a text longer than
any in training brings angles that the model has never seen: models made for longer texts come with
a recipe that slows some pairs down. transformers has these recipes, and is asked for them.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # recipes that depend on the config alone


def rope_frequencies(head_dim: int, theta: float) -> Tensor:
    """f_i: radians that pair i turns from one position to the next, [head_dim // 2] float32."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def scaled_frequencies(config: Any) -> tuple[Tensor, float]:
    """f_i as a transformers config asks for them, and what cos and sin are multiplied by."""
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        return rope_frequencies(config.head_dim, config.rope_parameters["rope_theta"]), 1.0
    return ROPE_INIT_FUNCTIONS[kind](config)


def rope_table(frequencies: Tensor, max_positions: int, scale: float = 1.0) -> Tensor:
    """Cos and sin of p * f_i, times `scale`, float32.

    Shape [max_positions, 2, head_dim // 2]: row p, cos before sin.
    """
    positions = torch.arange(max_positions, dtype=torch.float32)
    angles = positions[:, None] * frequencies
    return torch.stack((angles.cos(), angles.sin()), dim=1) * scale


def apply_rope(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Turn the pairs of x [num_tokens, num_heads, head_dim] by the angles of their tokens.

    cos_sin: [num_tokens, 2, head_dim // 2], rows of `rope_table`. The result has x's type; the
    arithmetic is float32, as cos and sin are. (a, b) becomes (a cos - b sin, b cos + a sin).
    """
    cos, sin = cos_sin[:, None].unbind(2)  # each [num_tokens, 1, head_dim // 2]
    a, b = x.chunk(2, dim=-1)  # the pairs' two coordinates, far apart in a head
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
