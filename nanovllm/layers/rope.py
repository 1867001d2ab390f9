"""Rotary position embedding (RoPE): rotate queries and keys by an angle that grows with position.

We take a head of size d as d/2 points in a plane. Dimensions i and i + d/2 are the two coordinates
of pair i. At position p, pair i is rotated by the angle p * f_i, where f_i = theta^(-2i/d). The dot
product of a query at position m and a key at position n then depends on the angles (m - n) * f_i,
so attention sees how far apart two tokens are and not where they are (RoFormer, Su et al.,
arXiv:2104.09864).

The first pairs rotate fast and tell neighbouring tokens apart. The last pairs rotate so slowly that
a text longer than any in training leads to angles that the model has never seen. Models for longer
texts therefore come with a recipe that slows some pairs down, see `checkpoint/config_json.py`.
"""

import torch
from torch import Tensor


def rope_frequencies(head_dim: int, theta: float) -> Tensor:
    """Return f_i [head_dim // 2] float32: radians by which pair i rotates from token to token."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def rope_table(frequencies: Tensor, max_positions: int, scale: float = 1.0) -> Tensor:
    """Return scale * cos(p * f_i) and scale * sin(p * f_i) for every position p.

    The result is float32 [max_positions, 2, head_dim // 2]; in row p, cos comes before sin.
    """
    positions = torch.arange(max_positions, dtype=torch.float32)
    angles = positions[:, None] * frequencies
    return torch.stack((angles.cos(), angles.sin()), dim=1) * scale


def apply_rope(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate the pairs of x [num_tokens, num_heads, head_dim] by the angles of their tokens.

    A pair (a, b) becomes (a cos - b sin, b cos + a sin). cos_sin: [num_tokens, 2, head_dim // 2],
    rows of `rope_table`. We compute in float32, as cos and sin are, and return x's dtype.
    """
    cos, sin = cos_sin[:, None].unbind(2)  # each [num_tokens, 1, head_dim // 2]
    a, b = x.chunk(2, dim=-1)  # the two coordinates of the pairs are half a head apart
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
