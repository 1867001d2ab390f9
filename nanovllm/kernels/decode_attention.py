"""Decode attention: one new token of each row attends to the row's whole context.

Every program reads an equal number of tiles of the plan (`decode_plan.py`), so that long and short
rows keep the whole GPU busy. A second kernel merges the partial results of rows that several
programs have read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.decode_plan import (
    FIRST_PARTIAL,
    NUM_PARTIALS,
    ROW_COLUMNS,
    TILE_COLUMNS,
    TILE_END,
    TILE_IS_LAST,
    TILE_NUM_ROWS,
    TILE_PARTIAL,
    TILE_ROW,
    TILE_START,
)
from nanovllm.kernels.device_functions import (
    LOG2_E,
    online_softmax_step,
    pdl_wait,
)
from nanovllm.kernels.gpu_limits import MIN_TILE, GpuLimits, power_of_2
from nanovllm.metadata import PhaseMetadata

NUM_WARPS, NUM_STAGES = 2, 3  # of a program; loads of tiles in flight
PARTIALS_AT_ONCE = 16


@triton.jit
def decode_attention_kernel(
    query, k_cache, v_cache, block_tables, tiles, rows, num_tiles, out, partials, scale,
    table_stride,
    KV_HEADS: tl.constexpr, QUERIES_PER_KV: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, TILE_SIZE: tl.constexpr,
    DIM_PADDED: tl.constexpr, NUM_STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Read one program's tiles for one KV head, and write a result wherever a row's tiles end.

    The BLOCK_M rows of the query tile are the QUERIES_PER_KV query heads of each row of the tile.
    """
    kv_head = tl.program_id(0)
    total_tiles = tl.load(num_tiles)
    per_program = tl.cdiv(total_tiles, tl.num_programs(1))
    first_tile = tl.program_id(1) * per_program
    end_tile = tl.minimum(first_tile + per_program, total_tiles)
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, DIM_PADDED)
    head, in_dim = kv_head * QUERIES_PER_KV + m % QUERIES_PER_KV, d < HEAD_DIM
    running_max = tl.full([BLOCK_M], -1e30, tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM_PADDED], tl.float32)
    pdl_wait(PDL)
    for i in tl.range(first_tile, end_tile, num_stages=NUM_STAGES):
        tile = tiles + i * TILE_COLUMNS
        first_row, num_rows = tl.load(tile + TILE_ROW), tl.load(tile + TILE_NUM_ROWS)
        start, end = tl.load(tile + TILE_START), tl.load(tile + TILE_END)
        row, valid = first_row + m // QUERIES_PER_KV, m < num_rows * QUERIES_PER_KV
        query_offsets = (row * (KV_HEADS * QUERIES_PER_KV) + head)[:, None] * HEAD_DIM + d[None, :]
        mask = valid[:, None] & in_dim[None, :]
        q = tl.load(query + query_offsets, mask, 0.0)
        token = start + tl.arange(0, TILE_SIZE)
        # Past the end we read the last token once more, and mask its score.
        read = tl.maximum(tl.minimum(token, end - 1), 0)
        block = tl.load(block_tables + first_row * table_stride + read // BLOCK_SIZE)
        slot = block.to(tl.int64) * BLOCK_SIZE + read % BLOCK_SIZE
        offsets = ((slot * KV_HEADS + kv_head) * HEAD_DIM)[:, None] + d[None, :]
        if DIM_PADDED == HEAD_DIM:
            key, value = tl.load(k_cache + offsets), tl.load(v_cache + offsets)
        else:
            key = tl.load(k_cache + offsets, in_dim[None, :], 0.0)
            value = tl.load(v_cache + offsets, in_dim[None, :], 0.0)
        scores = tl.dot(q, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where((token < end)[None, :], scores, float("-inf"))
        running_max, running_sum, acc = online_softmax_step(
            running_max, running_sum, acc, scores, value
        )
        if (tl.load(tile + TILE_IS_LAST) == 1) | (i + 1 == end_tile):
            count = tl.load(rows + row * ROW_COLUMNS + NUM_PARTIALS, valid, 0)
            if tl.max(count, axis=0) == 1:
                # A padding row has read nothing, and what was loaded in its place may be NaN.
                is_empty = running_sum == 0.0
                result = acc / tl.where(is_empty, 1.0, running_sum)[:, None]
                result = tl.where(is_empty[:, None], 0.0, result)
                tl.store(out + query_offsets, result, mask)
            else:
                partial = tl.load(rows + row * ROW_COLUMNS + FIRST_PARTIAL, valid, 0)
                partial += tl.load(tile + TILE_PARTIAL)
                entry = partial * (KV_HEADS * QUERIES_PER_KV) + head
                entry = entry.to(tl.int64) * (HEAD_DIM + 2)
                tl.store(partials + entry[:, None] + d[None, :], acc, mask)
                tl.store(partials + entry + HEAD_DIM, running_max, valid)
                tl.store(partials + entry + HEAD_DIM + 1, running_sum, valid)
            running_max = tl.full([BLOCK_M], -1e30, tl.float32)
            running_sum = tl.zeros([BLOCK_M], tl.float32)
            acc = tl.zeros([BLOCK_M, DIM_PADDED], tl.float32)


@triton.jit
def merge_partials_kernel(
    partials, rows, out, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Merge the partial results of one row and one query head, CHUNK of them at a time."""
    row, head = tl.program_id(0), tl.program_id(1)
    first = tl.load(rows + row * ROW_COLUMNS + FIRST_PARTIAL)
    count = tl.load(rows + row * ROW_COLUMNS + NUM_PARTIALS)
    pdl_wait(PDL)
    if count > 1:
        d = tl.arange(0, DIM_PADDED)
        running_max = tl.full([], float("-inf"), tl.float32)
        running_sum = tl.zeros([], tl.float32)
        acc = tl.zeros([DIM_PADDED], tl.float32)
        for start in range(0, count, CHUNK):
            partial = start + tl.arange(0, CHUNK)
            valid = partial < count
            entry = ((first + partial) * HEADS + head).to(tl.int64) * (HEAD_DIM + 2)
            mask = valid[:, None] & (d < HEAD_DIM)[None, :]
            accs = tl.load(partials + entry[:, None] + d[None, :], mask, 0.0)
            maxima = tl.load(partials + entry + HEAD_DIM, valid, float("-inf"))
            sums = tl.load(partials + entry + HEAD_DIM + 1, valid, 0.0)
            new_max = tl.maximum(running_max, tl.max(maxima, axis=0))
            rescale, weights = tl.exp2(running_max - new_max), tl.exp2(maxima - new_max)
            running_sum = running_sum * rescale + tl.sum(sums * weights, axis=0)
            acc = acc * rescale + tl.sum(accs * weights[:, None], axis=0)
            running_max = new_max
        tl.store(out + (row * HEADS + head) * HEAD_DIM + d, acc / running_sum, d < HEAD_DIM)


def decode_attention(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, metadata: PhaseMetadata, scale: float
) -> Tensor:
    """Do what `layers.attention.decode_attention` does, with metadata of our own `plan_decode`."""
    limits, plan, out = GpuLimits.of(query.device), metadata.plan, torch.empty_like(query)
    (block_size, kv_heads, head_dim), heads = k_cache.shape[1:], query.shape[1]
    queries_per_kv, dim, tables = heads // kv_heads, power_of_2(head_dim), metadata.block_tables
    decode_attention_kernel[(kv_heads, plan.num_programs)](
        query, k_cache, v_cache, tables, plan.tiles, plan.rows, plan.num_tiles, out, plan.partials,
        scale * LOG2_E, tables.stride(0), kv_heads, queries_per_kv, head_dim, block_size,
        max(MIN_TILE, power_of_2(queries_per_kv)), plan.tile_size, dim, NUM_STAGES,
        limits.supports_pdl, num_warps=NUM_WARPS, **limits.launch_options,
    )  # fmt: skip
    merge_partials_kernel[(len(query), heads)](
        plan.partials, plan.rows, out, heads, head_dim, dim, PARTIALS_AT_ONCE, limits.supports_pdl,
        **limits.launch_options,
    )  # fmt: skip
    return out
