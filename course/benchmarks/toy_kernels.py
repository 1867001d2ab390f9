"""The kernels of lesson 06: small forms of those in `nanovllm/kernels/`, to read and to time.

Each is one program run many times at once. They work on any shape, are checked against torch, and
leave out what makes the engine's own fast or general: `course bench kernel_ladder` times both.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.store import store_kv

# -- the store -----------------------------------------------------------------------------------


@triton.jit
def store_head_kernel(
    key, value, k_cache, v_cache, slots, key_stride, value_stride, KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """One program, one KV head of one token."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token)
    if slot >= 0:
        at = tl.arange(0, DIM)
        inside = at < HEAD_DIM
        source, target = head * HEAD_DIM + at, (slot * KV_HEADS + head) * HEAD_DIM + at
        tl.store(k_cache + target, tl.load(key + token * key_stride + source, inside), inside)
        tl.store(v_cache + target, tl.load(value + token * value_stride + source, inside), inside)


def store_heads(key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor):
    """As `attention.store_kv`, a program a head; key and value may be parts of one tensor."""
    num_tokens, kv_heads, dim = key.shape
    store_head_kernel[(num_tokens, kv_heads)](
        key, value, k_cache, v_cache, slots, key.stride(0), value.stride(0), kv_heads, dim,
        triton.next_power_of_2(dim),
    )  # fmt: skip


# -- norm, then RoPE, then store: what `rope_store` does at once ---------------------------------


@triton.jit
def norm_kernel(
    qkv, q_weight, k_weight, token_stride, eps, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
):  # fmt: skip
    """One program: one query or key head of one token, in place."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, DIM)
    inside = at < HEAD_DIM
    row = qkv + token * token_stride + head * HEAD_DIM
    x = tl.load(row + at, inside, 0.0).to(tl.float32)
    q, k = tl.load(q_weight + at, inside, 0.0), tl.load(k_weight + at, inside, 0.0)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / HEAD_DIM + eps)
    tl.store(row + at, x * scale * tl.where(head < HEADS, q, k).to(tl.float32), inside)


@triton.jit
def rope_kernel(
    qkv, rope, positions, token_stride, HALF: tl.constexpr, DIM: tl.constexpr
):  # fmt: skip
    """One program: turn one query or key head of one token, in place."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pair = tl.arange(0, DIM)
    inside = pair < HALF
    position = tl.maximum(tl.load(positions + token), 0).to(tl.int64)
    cos = tl.load(rope + position * 2 * HALF + pair, inside, 0.0)
    sin = tl.load(rope + position * 2 * HALF + HALF + pair, inside, 0.0)
    row = qkv + token * token_stride + head * 2 * HALF
    a = tl.load(row + pair, inside, 0.0).to(tl.float32)
    b = tl.load(row + HALF + pair, inside, 0.0).to(tl.float32)
    tl.store(row + pair, a * cos - b * sin, inside)
    tl.store(row + HALF + pair, b * cos + a * sin, inside)


def norm_rope_store(qkv, norms, rope, batch, k_cache, v_cache) -> Tensor:
    """As `attention.rope_store`, in three kernels; changes qkv [num_tokens, ...] in place.

    The third is the engine's own store.
    """
    kv_heads, dim = k_cache.shape[2:]
    heads = qkv.unflatten(-1, (-1, dim))  # [num_tokens, heads + 2 kv_heads, dim]
    num_queries, stride = heads.shape[1] - 2 * kv_heads, qkv.stride(0)
    grid = (len(qkv), num_queries + kv_heads)
    full, half = triton.next_power_of_2(dim), triton.next_power_of_2(dim // 2)
    q_norm, k_norm = norms
    norm_kernel[grid](qkv, q_norm.weight, k_norm.weight, stride, q_norm.eps, num_queries, dim, full)
    rope_kernel[grid](qkv, rope, batch.positions, stride, dim // 2, half)
    query, key, value = heads.split([num_queries, kv_heads, kv_heads], dim=1)
    store_kv(key, value, k_cache, v_cache, batch.slot_mapping)
    return query


# -- decode attention ----------------------------------------------------------------------------


@triton.jit
def attend_range(
    q, k_cache, v_cache, table, kv_head, first, stop, scale, KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Online softmax of one query q [DIM] over tokens [first, stop) of one block table."""
    d = tl.arange(0, DIM)
    best = tl.full([], -1e30, tl.float32)  # the highest score so far
    total = tl.full([], 0.0, tl.float32)  # the weights' sum so far
    acc = tl.zeros([DIM], tl.float32)  # the weighted values' sum so far
    for start in range(first, stop, TILE):
        token = start + tl.arange(0, TILE)
        inside = token < stop
        block = tl.load(table + token // BLOCK_SIZE, inside, 0)
        slot = block.to(tl.int64) * BLOCK_SIZE + token % BLOCK_SIZE
        at = ((slot * KV_HEADS + kv_head) * HEAD_DIM)[:, None] + d[None, :]
        mask = inside[:, None] & (d < HEAD_DIM)[None, :]
        key = tl.load(k_cache + at, mask, 0.0).to(tl.float32)
        value = tl.load(v_cache + at, mask, 0.0).to(tl.float32)
        scores = tl.where(inside, tl.sum(key * q[None, :], axis=1) * scale, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, axis=0))
        weights, shrink = tl.exp(scores - higher), tl.exp(best - higher)
        total = total * shrink + tl.sum(weights, axis=0)
        acc = acc * shrink + tl.sum(weights[:, None] * value, axis=0)
        best = higher
    return best, total, acc


@triton.jit
def whole_kernel(
    query, k_cache, v_cache, tables, seq_lens, out, scale, table_stride,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """One program: one sequence and one query head, over its whole context."""
    row, head, d = tl.program_id(0), tl.program_id(1), tl.arange(0, DIM)
    length = tl.load(seq_lens + row)
    at = (row * GROUP * KV_HEADS + head) * HEAD_DIM + d
    q = tl.load(query + at, d < HEAD_DIM, 0.0).to(tl.float32)
    _, total, acc = attend_range(
        q, k_cache, v_cache, tables + row * table_stride, head // GROUP, 0, length, scale,
        KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE, DIM,
    )  # fmt: skip
    tl.store(out + at, acc / total, d < HEAD_DIM)


@triton.jit
def split_kernel(
    query, k_cache, v_cache, tables, seq_lens, partial, scale, table_stride,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """One program: one sequence, one query head, one of the equal parts of its context."""
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d, num_splits = tl.arange(0, DIM), tl.num_programs(2)
    length = tl.load(seq_lens + row)
    share = tl.cdiv(length, num_splits)
    first = split * share
    row_head = row * GROUP * KV_HEADS + head
    q = tl.load(query + row_head * HEAD_DIM + d, d < HEAD_DIM, 0.0).to(tl.float32)
    best, total, acc = attend_range(
        q, k_cache, v_cache, tables + row * table_stride, head // GROUP, first,
        tl.minimum(first + share, length), scale, KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE, DIM,
    )  # fmt: skip
    part = partial + (row_head * num_splits + split) * (HEAD_DIM + 2)
    tl.store(part + d, acc, d < HEAD_DIM)
    tl.store(part + HEAD_DIM, best)
    tl.store(part + HEAD_DIM + 1, total)


@triton.jit
def merge_kernel(partial, out, num_splits, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """One program: put the parts of one sequence and query head together."""
    row_head, d = tl.program_id(0), tl.arange(0, DIM)
    best = tl.full([], -1e30, tl.float32)
    total = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([DIM], tl.float32)
    for split in range(num_splits):
        part = partial + (row_head * num_splits + split) * (HEAD_DIM + 2)
        its_best = tl.load(part + HEAD_DIM)
        higher = tl.maximum(best, its_best)
        shrink, its_shrink = tl.exp(best - higher), tl.exp(its_best - higher)
        total = total * shrink + tl.load(part + HEAD_DIM + 1) * its_shrink
        acc = acc * shrink + tl.load(part + d, d < HEAD_DIM, 0.0) * its_shrink
        best = higher
    tl.store(out + row_head * HEAD_DIM + d, acc / total, d < HEAD_DIM)


TILE = 32  # tokens


def shape_args(query: Tensor, k_cache: Tensor) -> tuple[int, ...]:
    """The attention kernels' constants."""
    block_size, kv_heads, dim = k_cache.shape[1:]
    group = query.shape[1] // kv_heads
    return group, kv_heads, dim, block_size, TILE, triton.next_power_of_2(dim)


def attend_whole(query: Tensor, k_cache: Tensor, v_cache: Tensor, metadata, scale: float) -> Tensor:
    """As `attention.decode_attention`: a program a sequence and query head."""
    out, tables = torch.empty_like(query), metadata.block_tables
    whole_kernel[query.shape[:2]](
        query, k_cache, v_cache, tables, metadata.seq_lens, out, scale, tables.stride(0),
        *shape_args(query, k_cache),
    )  # fmt: skip
    return out


def attend_split(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, metadata, scale: float, num_splits: int
) -> Tensor:
    """As `attend_whole`, each context cut into `num_splits` equal parts, then merged."""
    (num_rows, heads, dim), tables = query.shape, metadata.block_tables
    out = torch.empty_like(query)
    partial = query.new_empty(num_rows, heads, num_splits, dim + 2, dtype=torch.float32)
    split_kernel[(num_rows, heads, num_splits)](
        query, k_cache, v_cache, tables, metadata.seq_lens, partial, scale, tables.stride(0),
        *shape_args(query, k_cache),
    )  # fmt: skip
    merge_kernel[(num_rows * heads,)](partial, out, num_splits, dim, triton.next_power_of_2(dim))
    return out
