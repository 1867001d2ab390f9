"""Rotary position embedding (RoPE): a token's position, written into its queries and keys.

A head of size d is taken as d/2 points in a plane: dimension i and dimension i + d/2 are the two
coordinates of pair i. At position p, pair i is turned by the angle p * f_i, f_i = theta^(-2i/d).
A query at m and a key at n then meet at the angle (m - n) * f_i: their product knows how far apart
they stand, and not where (Su et al., RoFormer, arXiv:2104.09864).

The first pairs turn fast and tell neighbours apart. The last turn so slowly that a text longer than
any in training brings angles that the model has never seen. The types of scaling below slow pairs
down, so that a long text shows the angles of a short one; they differ in which pairs they slow.

Everything is float32, rounded as transformers rounds it: at position 4,096 one rounding of f_i can
be an error of 1e-4 in the angle.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Scaled = tuple[Tensor, float]  # f [head_dim // 2], and what cos and sin are multiplied by


def default_rope(steps: Tensor, rope: dict[str, Any], trained_length: int) -> Scaled:
    """f_i = 1 / steps_i; steps_i = theta^(2i/d) is how many positions turn pair i by one radian."""
    return 1.0 / steps, 1.0


def linear_rope(steps: Tensor, rope: dict[str, Any], trained_length: int) -> Scaled:
    """Every pair slows down alike: f_i / factor (Chen et al., arXiv:2306.15595; kaiokendev)."""
    return 1.0 / steps / rope["factor"], 1.0


def llama3_rope(steps: Tensor, rope: dict[str, Any], trained_length: int) -> Scaled:
    """Only slow pairs slow down (Llama 3.1: `apply_scaling` in the repository llama-models).

    A pair that turns at least high_freq_factor times within the trained length keeps its f_i, one
    that turns at most low_freq_factor times gets f_i / factor, and between them the two are mixed.
    """
    frequencies = 1.0 / steps
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = trained_length / (2 * math.pi / frequencies)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / rope["factor"] + kept * frequencies, 1.0


def yarn_rope(steps: Tensor, rope: dict[str, Any], trained_length: int) -> Scaled:
    """Only slow pairs slow down, and attention sharpens (YaRN: Peng et al., arXiv:2309.00071).

    Pairs up to the one that turns beta_fast times within the trained length keep their f_i, those
    from the one that turns beta_slow times get f_i / factor, and a straight ramp over i joins them.
    """
    half = steps.numel()

    def pair_turning(times: float) -> float:  # solve trained_length * f_i = 2 pi * times for i
        return (
            half * math.log(trained_length / (times * 2 * math.pi)) / math.log(rope["rope_theta"])
        )

    first, last = pair_turning(rope.get("beta_fast", 32)), pair_turning(rope.get("beta_slow", 1))
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    ramp = (torch.arange(half, dtype=torch.float32) - first) / (last - first or 0.001)
    kept = 1 - ramp.clamp(0, 1)
    frequencies = (1 - kept) * (1.0 / (rope["factor"] * steps)) + kept * (1.0 / steps)
    return frequencies, yarn_attention_factor(rope)


def yarn_attention_factor(rope: dict[str, Any]) -> float:
    """0.1 ln(factor) + 1, unless the file says otherwise; logits get its square."""
    if "attention_factor" in rope:
        return rope["attention_factor"]
    log_factor = math.log(max(rope["factor"], 1.0))
    if "mscale" in rope and "mscale_all_dim" in rope:
        above, below = rope["mscale"], rope["mscale_all_dim"]
        return (0.1 * above * log_factor + 1.0) / (0.1 * below * log_factor + 1.0)
    return 0.1 * log_factor + 1.0


SCALINGS: dict[str, Callable[[Tensor, dict[str, Any], int], Scaled]] = {
    "default": default_rope,
    "linear": linear_rope,
    "llama3": llama3_rope,
    "yarn": yarn_rope,
}


def rope_table(
    head_dim: int, rope_parameters: dict[str, Any], max_positions: int, max_position_embeddings: int
) -> Tensor:
    """Cos and sin of p * f_i, times the attention factor, float32.

    Shape [max_positions, 2, head_dim // 2]: row p, cos before sin. The trained length is
    original_max_position_embeddings if the file has it, else max_position_embeddings.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    steps = rope_parameters["rope_theta"] ** exponents  # [head_dim // 2]
    length = rope_parameters.get("original_max_position_embeddings", max_position_embeddings)
    scale = SCALINGS[rope_parameters["rope_type"]]
    frequencies, attention_factor = scale(steps, rope_parameters, length)
    positions = torch.arange(max_positions, dtype=torch.float32)
    angles = positions[:, None] * frequencies
    return torch.stack((angles.cos(), angles.sin()), dim=1) * attention_factor


def apply_rope(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Turn the pairs of x [num_tokens, num_heads, head_dim] by the angles of their tokens.

    cos_sin: [num_tokens, 2, head_dim // 2], rows of `rope_table`. The result has x's type; the
    arithmetic is float32, as cos and sin are. (a, b) becomes (a cos - b sin, b cos + a sin).
    """
    cos, sin = cos_sin[:, None].unbind(2)  # each [num_tokens, 1, head_dim // 2]
    a, b = x.chunk(2, dim=-1)  # the pairs' two coordinates, far apart in a head
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
