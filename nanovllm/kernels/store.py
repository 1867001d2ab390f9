"""Storing keys and values in the paged cache, with or without QK-norm and RoPE before it.

A norm, RoPE and the store each read what the one before has just written. One kernel does all three
and reads every number once, because such small operations are bound by memory.
"""

import triton
import triton.language as tl
from torch import Tensor, nn

from nanovllm.kernels.device_functions import pdl_wait
from nanovllm.kernels.gpu_limits import GpuLimits, power_of_2
from nanovllm.metadata import AttentionMetadata


@triton.jit
def store_kv_kernel(
    key, value, k_cache, v_cache, slot_mapping, key_stride, value_stride,
    SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy one token's key and value, SIZE numbers each, into its slot."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot >= 0:
        offsets = tl.arange(0, BLOCK)
        mask = offsets < SIZE
        target = slot * SIZE + offsets
        tl.store(k_cache + target, tl.load(key + token * key_stride + offsets, mask), mask)
        tl.store(v_cache + target, tl.load(value + token * value_stride + offsets, mask), mask)


def store_kv(
    key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Do what `layers.attention.store_kv` does, with one program for each token.

    Keys and values may be views of one tensor, such as the output of a QKV projection.
    """
    size = key[0].numel()
    key, value = (x if x[0].is_contiguous() else x.contiguous() for x in (key, value))
    strides = (key.stride(0), value.stride(0))
    args = (key, value, k_cache, v_cache, slot_mapping, *strides, size, power_of_2(size))
    store_kv_kernel[(len(key),)](*args)


@triton.jit
def rope_store_kernel(
    qkv, q_weight, k_weight, rope, positions, slot_mapping, query, k_cache, v_cache, eps,
    position_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr,
    HEADS_PADDED: tl.constexpr, KV_HEADS_PADDED: tl.constexpr, HALF_PADDED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Normalize and rotate one token's queries and keys, and store its keys and values.

    HALF is half of a head's size. RoPE rotates pairs (a, b) whose members are HALF numbers apart,
    so the kernel reads every head as two halves.
    """
    token = tl.program_id(0).to(tl.int64)
    pdl_wait(PDL)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    position = tl.maximum(tl.load(positions + token * position_stride), 0).to(tl.int64)
    pair = tl.arange(0, HALF_PADDED)
    in_half = pair < HALF
    cos = tl.load(rope + position * 2 * HALF + pair, in_half, 0.0)
    sin = tl.load(rope + position * 2 * HALF + HALF + pair, in_half, 0.0)

    head = tl.arange(0, HEADS_PADDED)[:, None]  # the query heads, then the key heads
    mask = (head < HEADS + KV_HEADS) & in_half[None, :]
    row = qkv + token * (HEADS + 2 * KV_HEADS) * 2 * HALF
    a = tl.load(row + head * 2 * HALF + pair[None, :], mask, 0.0).to(tl.float32)
    b = tl.load(row + head * 2 * HALF + HALF + pair[None, :], mask, 0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(a * a + b * b, axis=1) / (2 * HALF) + eps)[:, None]
        qa = tl.load(q_weight + pair, in_half, 0.0)
        qb = tl.load(q_weight + HALF + pair, in_half, 0.0)
        ka = tl.load(k_weight + pair, in_half, 0.0)
        kb = tl.load(k_weight + HALF + pair, in_half, 0.0)
        a *= scale * tl.where(head < HEADS, qa[None, :], ka[None, :]).to(tl.float32)
        b *= scale * tl.where(head < HEADS, qb[None, :], kb[None, :]).to(tl.float32)
    rotated_a = a * cos[None, :] - b * sin[None, :]
    rotated_b = b * cos[None, :] + a * sin[None, :]

    out = query + (token * HEADS + head) * 2 * HALF + pair[None, :]
    is_query = mask & (head < HEADS)
    tl.store(out, rotated_a, is_query)
    tl.store(out + HALF, rotated_b, is_query)
    out = k_cache + (slot * KV_HEADS + head - HEADS) * 2 * HALF + pair[None, :]
    is_key = mask & (head >= HEADS) & (slot >= 0)
    tl.store(out, rotated_a, is_key)
    tl.store(out + HALF, rotated_b, is_key)

    head = tl.arange(0, KV_HEADS_PADDED)[:, None]
    mask = (head < KV_HEADS) & in_half[None, :] & (slot >= 0)
    offsets = head * 2 * HALF + pair[None, :]
    value, out = row + (HEADS + KV_HEADS) * 2 * HALF, v_cache + slot * KV_HEADS * 2 * HALF
    tl.store(out + offsets, tl.load(value + offsets, mask), mask)
    tl.store(out + HALF + offsets, tl.load(value + HALF + offsets, mask), mask)


def rope_store(
    qkv: Tensor,
    norms: tuple[nn.Module, nn.Module] | None,
    rope: Tensor,
    metadata: AttentionMetadata,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    """Do what `layers.attention.rope_store` does, with one program for each token."""
    limits, (kv_heads, head_dim) = GpuLimits.of(qkv.device), k_cache.shape[2:]
    heads, half = qkv.shape[1] // head_dim - 2 * kv_heads, head_dim // 2
    query = qkv.new_empty(len(qkv), heads, head_dim)
    q_weight, k_weight = (norm.weight for norm in norms) if norms else (None, None)
    eps = norms[0].eps if norms else 0.0
    rope_store_kernel[(len(qkv),)](
        qkv, q_weight, k_weight, rope, metadata.positions, metadata.slot_mapping, query, k_cache,
        v_cache, eps, metadata.positions.stride(0), heads, kv_heads, half, norms is not None,
        power_of_2(heads + kv_heads), power_of_2(kv_heads), power_of_2(half), limits.supports_pdl,
        **limits.launch_options,
    )  # fmt: skip
    return query
