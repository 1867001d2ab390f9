"""Prefill attention: many new tokens of a row attend to the row's cached tokens and to themselves.

A program holds a tile of queries and walks over the context one tile at a time, with online softmax
(FlashAttention, Dao et al., arXiv:2205.14135). Each tile of keys and values is read once for all
queries of the program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.device_functions import LOG2_E, online_softmax_step
from nanovllm.kernels.gpu_limits import GpuLimits, power_of_2
from nanovllm.metadata import PhaseMetadata

MAX_TILE, NUM_STAGES = 64, 3  # tokens, and queries as well; loads of tiles in flight


@triton.jit
def prefill_tile(
    q, k_cache, v_cache, block_table, kv_head, first, end, query_positions, scale,
    running_max, running_sum, acc,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE_SIZE: tl.constexpr, DIM_PADDED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Attend with queries q [queries, DIM_PADDED] to the tokens [first, first + TILE_SIZE).

    MASKED says that the tile holds tokens that some query may not read, or tokens beyond `end`.
    """
    token, d = first + tl.arange(0, TILE_SIZE), tl.arange(0, DIM_PADDED)
    in_context = token < end
    block = tl.load(block_table + token // BLOCK_SIZE, in_context, 0)
    slot = block.to(tl.int64) * BLOCK_SIZE + token % BLOCK_SIZE
    offsets = ((slot * KV_HEADS + kv_head) * HEAD_DIM)[:, None] + d[None, :]
    mask = in_context[:, None] & (d < HEAD_DIM)[None, :]
    key, value = tl.load(k_cache + offsets, mask, 0.0), tl.load(v_cache + offsets, mask, 0.0)
    scores = tl.dot(q, tl.trans(key), input_precision="ieee") * scale
    if MASKED:
        # A weight of 0 does not hide a value that is not finite, because 0 * NaN is NaN. We set
        # such a value to 0 and its scores to NaN, so that the causal mask hides both.
        size = tl.sum(tl.abs(value.to(tl.float32)), axis=1)
        finite = size < float("inf")  # false for NaN, too
        value = tl.where(finite[:, None], value, 0.0).to(value.dtype)
        scores = tl.where(finite[None, :], scores, float("nan"))
        scores = tl.where(token[None, :] <= query_positions[:, None], scores, float("-inf"))
    return online_softmax_step(running_max, running_sum, acc, scores, value)


# How the block tables are aligned depends on the number of decode rows before them.
@triton.jit(do_not_specialize_on_alignment=["block_tables"])
def prefill_attention_kernel(
    query, k_cache, v_cache, block_tables, query_start_loc, seq_lens, out, scale, table_stride,
    KV_HEADS: tl.constexpr, QUERIES_PER_KV: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, TILE_SIZE: tl.constexpr,
    DIM_PADDED: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Attend with BLOCK_M new tokens of one row, for one query head, to all tokens up to them."""
    head, row = tl.program_id(1), tl.program_id(2)
    first_query = tl.load(query_start_loc + row)
    query_len = tl.load(query_start_loc + row + 1) - first_query
    first_new = tl.program_id(0) * BLOCK_M
    if first_new >= query_len:
        return
    num_cached = tl.load(seq_lens + row) - query_len
    m, d = first_new + tl.arange(0, BLOCK_M), tl.arange(0, DIM_PADDED)
    mask = (m < query_len)[:, None] & (d < HEAD_DIM)[None, :]
    offsets = ((first_query + m).to(tl.int64) * (KV_HEADS * QUERIES_PER_KV) + head)[:, None]
    offsets = offsets * HEAD_DIM + d[None, :]
    q = tl.load(query + offsets, mask, 0.0)

    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM_PADDED], tl.float32)
    end = num_cached + tl.minimum(first_new + BLOCK_M, query_len)
    unmasked_end = (num_cached + first_new) // TILE_SIZE * TILE_SIZE  # every query reads up to here
    block_table, positions = block_tables + row * table_stride, num_cached + m
    for first in tl.range(0, unmasked_end, TILE_SIZE, num_stages=NUM_STAGES):
        running_max, running_sum, acc = prefill_tile(
            q, k_cache, v_cache, block_table, head // QUERIES_PER_KV, first, end, positions, scale,
            running_max, running_sum, acc, KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE_SIZE, DIM_PADDED,
            False,
        )  # fmt: skip
    for first in tl.range(unmasked_end, end, TILE_SIZE, num_stages=1):
        running_max, running_sum, acc = prefill_tile(
            q, k_cache, v_cache, block_table, head // QUERIES_PER_KV, first, end, positions, scale,
            running_max, running_sum, acc, KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE_SIZE, DIM_PADDED,
            True,
        )  # fmt: skip
    tl.store(out + offsets, acc / running_sum[:, None], mask)


def prefill_attention(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, metadata: PhaseMetadata, scale: float
) -> Tensor:
    """Do what `layers.attention.prefill_attention` does."""
    (block_size, kv_heads, head_dim), heads = k_cache.shape[1:], query.shape[1]
    dim, tables, out = power_of_2(head_dim), metadata.block_tables, torch.empty_like(query)
    tile = prefill_tile_size(GpuLimits.of(query.device), dim, query.itemsize)
    grid = (triton.cdiv(metadata.max_query_len, tile), heads, len(metadata.seq_lens))
    prefill_attention_kernel[grid](
        query, k_cache, v_cache, tables, metadata.query_start_loc, metadata.seq_lens, out,
        scale * LOG2_E, tables.stride(0), kv_heads, heads // kv_heads, head_dim, block_size, tile,
        tile, dim, NUM_STAGES,
    )  # fmt: skip
    return out


def prefill_tile_size(limits: GpuLimits, head_dim: int, itemsize: int) -> int:
    """Tokens of a tile, and queries of a program, that fit with NUM_STAGES of keys and values."""
    return limits.fit_tile(MAX_TILE, (2 * NUM_STAGES + 1) * head_dim * itemsize)
