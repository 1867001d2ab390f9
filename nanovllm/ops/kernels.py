"""Triton kernels: what a GPU does instead of the plain functions of `ops/`, each equal to its twin.

A kernel is one program, run many times at once; `tl.program_id` says which run this is. Most of
what follows is bound by memory: a kernel is good if it reads every byte once, with many loads in
flight. So neighbours are fused where the second would read what the first has just written.

Offsets into the cache are 64-bit: a large cache has more than 2^31 elements. Arithmetic is float32,
whatever is loaded. Under TRITON_INTERPRET=1 it all runs on a CPU, slowly, for tests and lessons.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.layers.attention import AttentionMetadata, Rows

LOG2_E = 1.4426950408889634  # exp(x) = exp2(x * LOG2_E), and exp2 is what the hardware has


# -- the KV cache's store ------------------------------------------------------------------------


@triton.jit
def store_kv_kernel(
    key, value, k_cache, v_cache, slots, key_stride, value_stride,
    SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program, one token: copy its key and value, SIZE numbers each, into its slot."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot >= 0:
        at = tl.arange(0, BLOCK)
        inside = at < SIZE
        target = slot * SIZE + at
        tl.store(k_cache + target, tl.load(key + token * key_stride + at, inside), inside)
        tl.store(v_cache + target, tl.load(value + token * value_stride + at, inside), inside)


@triton.jit
def rope_store_kernel(
    qkv, q_weight, k_weight, rope, positions, slots, query, k_cache, v_cache, eps, position_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr,
    HEADS_PAD: tl.constexpr, KV_PAD: tl.constexpr, HALF_PAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program, one token: norm and turn its queries and keys, store keys and values.

    A pair of RoPE is (a, b), half a head apart; so every head is read as two halves.
    """
    token = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    slot = tl.load(slots + token).to(tl.int64)
    position = tl.maximum(tl.load(positions + token * position_stride), 0).to(tl.int64)
    pair = tl.arange(0, HALF_PAD)
    in_half = pair < HALF
    cos = tl.load(rope + position * 2 * HALF + pair, in_half, 0.0)
    sin = tl.load(rope + position * 2 * HALF + HALF + pair, in_half, 0.0)

    head = tl.arange(0, HEADS_PAD)[:, None]  # the queries' heads, then the keys'
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
    turned_a = a * cos[None, :] - b * sin[None, :]
    turned_b = b * cos[None, :] + a * sin[None, :]

    out = query + (token * HEADS + head) * 2 * HALF + pair[None, :]
    is_query = mask & (head < HEADS)
    tl.store(out, turned_a, is_query)
    tl.store(out + HALF, turned_b, is_query)
    out = k_cache + (slot * KV_HEADS + head - HEADS) * 2 * HALF + pair[None, :]
    is_key = mask & (head >= HEADS) & (slot >= 0)
    tl.store(out, turned_a, is_key)
    tl.store(out + HALF, turned_b, is_key)

    head = tl.arange(0, KV_PAD)[:, None]
    mask = (head < KV_HEADS) & in_half[None, :] & (slot >= 0)
    at = head * 2 * HALF + pair[None, :]
    value, out = row + (HEADS + KV_HEADS) * 2 * HALF, v_cache + slot * KV_HEADS * 2 * HALF
    tl.store(out + at, tl.load(value + at, mask), mask)
    tl.store(out + HALF + at, tl.load(value + HALF + at, mask), mask)


# -- attention: online softmax -------------------------------------------------------------------


@triton.jit
def absorb(best, total, acc, scores, value):
    """One more tile of online softmax: scores [queries, tokens], base 2, and value [tokens, dim].

    acc [queries, dim] / total [queries] is the attention so far; `best` is the highest score seen.
    """
    higher = tl.maximum(best, tl.max(scores, axis=1))
    weights = tl.exp2(scores - higher[:, None])
    shrink = tl.exp2(best - higher)
    total = total * shrink + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
    return higher, total, acc


# -- decode attention ----------------------------------------------------------------------------
#
# A step's decode rows differ in length, and the whole GPU should be busy to the end. So all
# contexts are cut into tiles of a few tokens, listed row after row, and the list is dealt out
# evenly: each program takes as many tiles in a row as any other, for one KV head. Where a row falls
# to several programs, each leaves a partial result, and a second kernel puts them together
# (Flash-Decoding, Dao et al. 2023; merged as in online softmax, Milakov and Gimelshein,
# arXiv:1805.02867).
#
# A tile of a matrix unit has at least 16 rows, and one sequence has only a few query heads a KV
# head. Sequences that stand beside each other and begin with the same blocks share the tile, so
# that their common prefix is read once for all of them.


@triton.jit(do_not_specialize=["num_rows"])
def shared_prefix_kernel(
    tables, positions, shared, num_rows, position_stride, table_stride,
    BLOCK_SIZE: tl.constexpr, SHARERS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    MIN_TOKENS: tl.constexpr,
):  # fmt: skip
    """One program, SHARERS rows: how many leading tokens stand in the same blocks for all."""
    first = tl.program_id(0) * SHARERS
    member = tl.arange(0, ROWS)
    row = first + member
    length = tl.load(positions + row * position_stride, row < num_rows, -1) + 1
    held = (member < SHARERS) & (length > 0)
    shortest = tl.min(tl.where(held, length, 2147483647), axis=0)
    same = tl.where(tl.sum(held.to(tl.int32), axis=0) > 1, (shortest - 1) // BLOCK_SIZE, 0)
    column = 0
    while column < same:
        at = column + tl.arange(0, COLUMNS)
        own = tables + row[:, None] * table_stride + at[None, :]
        asked = held[:, None] & (at < same)[None, :]
        lead = tl.load(tables + first * table_stride + at, at < same, 0)
        differs = asked & (tl.load(own, asked, 0) != lead[None, :])
        where = tl.where(differs, at[None, :], same)
        same = tl.min(tl.min(where, axis=1), axis=0)
        column += COLUMNS
    tokens = same * BLOCK_SIZE
    tl.store(shared + tl.program_id(0), tl.where(tokens >= MIN_TOKENS, tokens, 0))


@triton.jit(do_not_specialize=["num_rows"])
def plan_kernel(
    positions, tables, shared, slots, context_lens, starts, tiles, rows, num_tiles, num_rows,
    position_stride, table_stride,
    BLOCK_SIZE: tl.constexpr, SHARERS: tl.constexpr, TILE: tl.constexpr, PROGRAMS: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program, one row: where its newest token is stored, and which tiles it is read in.

    Every program adds up all rows, to find how many tiles each program of the attention kernel
    gets, and where its own row's tiles begin.
    """
    mine = tl.program_id(0)
    position = tl.load(positions + mine * position_stride)
    block = tl.load(tables + mine * table_stride + tl.maximum(position, 0) // BLOCK_SIZE)
    slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
    tl.store(slots + mine, tl.where(position < 0, -1, slot))
    tl.store(context_lens + mine, position + 1)
    tl.store(starts + mine + 1, mine + 1)

    row = tl.arange(0, ROWS)
    valid = row < num_rows
    length = tl.load(positions + row * position_stride, valid, -1) + 1
    common = tl.where(length > 0, tl.load(shared + row // SHARERS, valid, 0), 0)
    own_tiles = tl.maximum(tl.cdiv(length - common, TILE), 1)  # an empty row has a tile, too
    common_tiles = tl.where(row % SHARERS == 0, tl.cdiv(common, TILE), 0)
    row_tiles = tl.where(valid, own_tiles + common_tiles, 0)
    every = tl.sum(row_tiles, axis=0)
    share = tl.cdiv(every, PROGRAMS)
    room = most_parts(own_tiles, share) + most_parts(tl.cdiv(common, TILE), share)
    first_part = tl.sum(tl.where(row < mine, room, 0), axis=0)
    first_tile = tl.sum(tl.where(row < mine, row_tiles, 0), axis=0)
    lead = mine // SHARERS * SHARERS
    lead_tile = tl.sum(tl.where(row < lead, row_tiles, 0), axis=0)
    if mine == 0:
        tl.store(num_tiles, every)
        tl.store(starts, 0)

    start = tl.where(position >= 0, tl.load(shared + mine // SHARERS), 0)
    count = tl.cdiv(start, TILE)
    parts = tl.where(count > 0, (lead_tile + count - 1) // share - lead_tile // share + 1, 0)
    if mine == lead:
        in_group = (row >= mine) & (row < mine + SHARERS) & (length > 0)
        sharers = tl.sum(in_group.to(tl.int32), axis=0)
        write_tiles(tiles, first_tile, count, mine, sharers, 0, start, 0, share, TILE, CHUNK)
        first_tile += count
    count = tl.maximum(tl.cdiv(position + 1 - start, TILE), 1)
    write_tiles(tiles, first_tile, count, mine, 1, start, position + 1, parts, share, TILE, CHUNK)
    parts += (first_tile + count - 1) // share - first_tile // share + 1
    tl.store(rows + mine * 2, first_part)
    tl.store(rows + mine * 2 + 1, parts)


@triton.jit
def most_parts(num_tiles, share):
    """Programs that may meet in `num_tiles` tiles of one row, wherever those begin."""
    return tl.where(num_tiles > 0, (num_tiles + share - 2) // share + 1, 0)


@triton.jit
def write_tiles(
    tiles, first, count, row, sharers, start, end, first_part, share, TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Cut tokens [start, end) into `count` tiles, which stand in the list from `first` on."""
    for chunk in range(0, count, CHUNK):
        i = chunk + tl.arange(0, CHUNK)
        wanted = i < count
        at = tiles + (first + i) * 6
        token = start + i * TILE
        tl.store(at, row + i * 0, wanted)
        tl.store(at + 1, sharers + i * 0, wanted)
        tl.store(at + 2, token, wanted)
        tl.store(at + 3, tl.minimum(token + TILE, end), wanted)
        tl.store(at + 4, first_part + (first + i) // share - first // share, wanted)
        tl.store(at + 5, (i == count - 1).to(tl.int32), wanted)


@triton.jit
def decode_attention_kernel(
    query, k_cache, v_cache, tables, tiles, rows, num_tiles, out, partial, scale, table_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: its share of the step's tiles, for one KV head, row after row."""
    kv_head = tl.program_id(0)
    every = tl.load(num_tiles)
    share = tl.cdiv(every, tl.num_programs(1))
    start = tl.program_id(1) * share
    end = tl.minimum(start + share, every)
    m, d = tl.arange(0, QUERIES), tl.arange(0, DIM)
    head, in_dim = kv_head * GROUP + m % GROUP, d < HEAD_DIM
    best = tl.full([QUERIES], -1e30, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, DIM], tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    for i in tl.range(start, end, num_stages=STAGES):
        first_row, sharers = tl.load(tiles + i * 6), tl.load(tiles + i * 6 + 1)
        first, stop = tl.load(tiles + i * 6 + 2), tl.load(tiles + i * 6 + 3)
        row, held = first_row + m // GROUP, m < sharers * GROUP
        at_query = (row * (KV_HEADS * GROUP) + head)[:, None] * HEAD_DIM + d[None, :]
        mask = held[:, None] & in_dim[None, :]
        q = tl.load(query + at_query, mask, 0.0)
        token = first + tl.arange(0, TILE)
        read = tl.maximum(tl.minimum(token, stop - 1), 0)  # past the end: the last again, masked
        block = tl.load(tables + first_row * table_stride + read // BLOCK_SIZE)
        slot = block.to(tl.int64) * BLOCK_SIZE + read % BLOCK_SIZE
        at = ((slot * KV_HEADS + kv_head) * HEAD_DIM)[:, None] + d[None, :]
        if DIM == HEAD_DIM:
            key, value = tl.load(k_cache + at), tl.load(v_cache + at)
        else:
            key = tl.load(k_cache + at, in_dim[None, :], 0.0)
            value = tl.load(v_cache + at, in_dim[None, :], 0.0)
        scores = tl.dot(q, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where((token < stop)[None, :], scores, float("-inf"))
        best, total, acc = absorb(best, total, acc, scores, value)
        if (tl.load(tiles + i * 6 + 5) == 1) | (i + 1 == end):  # the last of this row's, here
            count = tl.load(rows + row * 2 + 1, held, 0)
            if tl.max(count, axis=0) == 1:
                # No row here: nothing was read, and what was loaded all the same may be NaN.
                result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
                result = tl.where((total == 0.0)[:, None], 0.0, result)
                tl.store(out + at_query, result, mask)
            else:
                part = tl.load(rows + row * 2, held, 0) + tl.load(tiles + i * 6 + 4)
                at_part = (part * (KV_HEADS * GROUP) + head).to(tl.int64) * (HEAD_DIM + 2)
                tl.store(partial + at_part[:, None] + d[None, :], acc, mask)
                tl.store(partial + at_part + HEAD_DIM, best, held)
                tl.store(partial + at_part + HEAD_DIM + 1, total, held)
            best = tl.full([QUERIES], -1e30, tl.float32)
            total = tl.zeros([QUERIES], tl.float32)
            acc = tl.zeros([QUERIES, DIM], tl.float32)


@triton.jit
def merge_parts_kernel(
    partial, rows, out, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program, one row and one query head: put the row's partial results together."""
    row, head = tl.program_id(0), tl.program_id(1)
    first, count = tl.load(rows + row * 2), tl.load(rows + row * 2 + 1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if count > 1:
        d = tl.arange(0, DIM)
        best = tl.full([], float("-inf"), tl.float32)
        total = tl.zeros([], tl.float32)
        acc = tl.zeros([DIM], tl.float32)
        for start in range(0, count, PARTS):
            part = start + tl.arange(0, PARTS)
            there = part < count
            at = ((first + part) * HEADS + head).to(tl.int64) * (HEAD_DIM + 2)
            mask = there[:, None] & (d < HEAD_DIM)[None, :]
            theirs = tl.load(partial + at[:, None] + d[None, :], mask, 0.0)
            bests = tl.load(partial + at + HEAD_DIM, there, float("-inf"))
            totals = tl.load(partial + at + HEAD_DIM + 1, there, 0.0)
            higher = tl.maximum(best, tl.max(bests, axis=0))
            shrink, weights = tl.exp2(best - higher), tl.exp2(bests - higher)
            total = total * shrink + tl.sum(totals * weights, axis=0)
            acc = acc * shrink + tl.sum(theirs * weights[:, None], axis=0)
            best = higher
        tl.store(out + (row * HEADS + head) * HEAD_DIM + d, acc / total, d < HEAD_DIM)


# -- prefill attention ---------------------------------------------------------------------------


@triton.jit
def attend_tile(
    q, k_cache, v_cache, table, kv_head, first, end, newest, scale, best, total, acc,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    DIM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Queries q [QUERIES, DIM], the i-th at position newest[i], over tokens [first, first + TILE).

    MASKED: some query may not read some of them, or they go beyond `end`.
    """
    token, d = first + tl.arange(0, TILE), tl.arange(0, DIM)
    inside = token < end
    block = tl.load(table + token // BLOCK_SIZE, inside, 0)
    slot = block.to(tl.int64) * BLOCK_SIZE + token % BLOCK_SIZE
    at = ((slot * KV_HEADS + kv_head) * HEAD_DIM)[:, None] + d[None, :]
    mask = inside[:, None] & (d < HEAD_DIM)[None, :]
    key, value = tl.load(k_cache + at, mask, 0.0), tl.load(v_cache + at, mask, 0.0)
    scores = tl.dot(q, tl.trans(key), input_precision="ieee") * scale
    if MASKED:
        # A weight of 0 does not hide a value that is not finite, because 0 * NaN is NaN. So its
        # token's scores become NaN and the value 0: what hides a score then hides it all.
        size = tl.sum(tl.abs(value.to(tl.float32)), axis=1)
        finite = size < float("inf")  # false for NaN, too
        value = tl.where(finite[:, None], value, 0.0).to(value.dtype)
        scores = tl.where(finite[None, :], scores, float("nan"))
        scores = tl.where(token[None, :] <= newest[:, None], scores, float("-inf"))
    return absorb(best, total, acc, scores, value)


@triton.jit(do_not_specialize_on_alignment=["tables"])  # it depends on how many rows decode
def prefill_attention_kernel(
    query, k_cache, v_cache, tables, query_starts, context_lens, out, scale, table_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: QUERIES new tokens of one row, for one head, over all tokens up to them."""
    head, row = tl.program_id(1), tl.program_id(2)
    first_query = tl.load(query_starts + row)
    num_new = tl.load(query_starts + row + 1) - first_query
    first_new = tl.program_id(0) * QUERIES
    if first_new >= num_new:
        return
    num_before = tl.load(context_lens + row) - num_new
    m, d = first_new + tl.arange(0, QUERIES), tl.arange(0, DIM)
    mask = (m < num_new)[:, None] & (d < HEAD_DIM)[None, :]
    at_query = ((first_query + m).to(tl.int64) * (KV_HEADS * GROUP) + head)[:, None] * HEAD_DIM
    at_query += d[None, :]
    q = tl.load(query + at_query, mask, 0.0)

    best = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, DIM], tl.float32)
    end = num_before + tl.minimum(first_new + QUERIES, num_new)
    read_by_all = (num_before + first_new) // TILE * TILE  # whole tiles before the first query
    table, newest = tables + row * table_stride, num_before + m
    for first in tl.range(0, read_by_all, TILE, num_stages=STAGES):
        best, total, acc = attend_tile(
            q, k_cache, v_cache, table, head // GROUP, first, end, newest, scale, best, total, acc,
            KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE, DIM, False,
        )  # fmt: skip
    for first in tl.range(read_by_all, end, TILE, num_stages=1):
        best, total, acc = attend_tile(
            q, k_cache, v_cache, table, head // GROUP, first, end, newest, scale, best, total, acc,
            KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE, DIM, True,
        )  # fmt: skip
    tl.store(out + at_query, acc / total[:, None], mask)


# -- the rest of a layer -------------------------------------------------------------------------


@triton.jit
def matvec_kernel(
    x, weight, bias, norm_weight, residual, y, eps, num_outputs, num_inputs,
    NORM: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program, OUTPUTS rows of the weight: their products with one x, and what stands beside.

    The rows are read whole, all loads in flight at once: a product of one vector only reads.
    """
    n, k = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, INPUTS)
    is_output, is_input = n < num_outputs, k < num_inputs
    at = n.to(tl.int64)[:, None] * num_inputs + k[None, :]
    mask = is_output[:, None] & is_input[None, :]
    rows = tl.load(weight + at, mask, 0.0).to(tl.float32)
    if GATED:
        up = weight + num_outputs.to(tl.int64) * num_inputs
        up_rows = tl.load(up + at, mask, 0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    vector = tl.load(x + k, is_input, 0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(vector * vector, axis=0) / num_inputs + eps)
        vector *= scale * tl.load(norm_weight + k, is_input, 0.0).to(tl.float32)
    result = tl.sum(rows * vector[None, :], axis=1)
    if BIAS:
        result += tl.load(bias + n, is_output, 0.0).to(tl.float32)
    if GATED:
        other = tl.sum(up_rows * vector[None, :], axis=1)
        if BIAS:
            other += tl.load(bias + num_outputs + n, is_output, 0.0).to(tl.float32)
        result = result * tl.sigmoid(result) * other
    if RESIDUAL:
        result += tl.load(residual + n, is_output, 0.0).to(tl.float32)
    tl.store(y + n, result, is_output)


@triton.jit
def rms_norm_kernel(x, weight, y, eps, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program: one token."""
    at = tl.arange(0, BLOCK)
    inside = at < size
    scale = tl.load(weight + at, inside, 0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64) * size
    vector = tl.load(x + row + at, inside, 0.0).to(tl.float32)
    scale *= tl.rsqrt(tl.sum(vector * vector, axis=0) / size + eps)
    tl.store(y + row + at, vector * scale, inside)


@triton.jit
def silu_mul_kernel(gate_up, y, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program: BLOCK features of one token."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    gate = tl.load(gate_up + token * 2 * size + at, inside).to(tl.float32)
    up = tl.load(gate_up + token * 2 * size + size + at, inside).to(tl.float32)
    tl.store(y + token * size + at, gate * tl.sigmoid(gate) * up, inside)


# -- launching -----------------------------------------------------------------------------------

DECODE_TILE, DECODE_WARPS, DECODE_STAGES = 64, 2, 3
DECODE_PROGRAMS = 4  # for each multiprocessor
SHARE_FROM = 64  # tokens of common prefix
PREFILL_QUERIES, PREFILL_TILE, PREFILL_STAGES = 64, 64, 3
LONGEST_VECTOR = 32_768  # of a product with a single token


class Card:
    """What launching needs to know of a GPU.

    From sm_90 on, a kernel may be launched before the one before it has ended ("programmatic
    dependent launch"): until `gdc_wait` it may read only what that one does not write.
    """

    def __init__(self, processors: int, memory: int, capability: int):
        self.processors = processors
        self.memory = memory  # shared memory that a program may take, bytes
        self.early = capability >= 9
        self.options = {"launch_pdl": True} if self.early else {}

    @staticmethod
    @cache
    def of(device: torch.device) -> "Card":
        if device.type == "cpu":  # Triton's interpreter
            return Card(4, 99 * 1024, 0)
        found: Any = torch.cuda.get_device_properties(device)
        memory = found.shared_memory_per_block_optin
        return Card(found.multi_processor_count, memory, found.major)

    def decode_tile(self, dim: int, itemsize: int) -> int:
        """Tokens a tile: two tiles of keys and of values must fit twice."""
        return fitting(DECODE_TILE, 8 * dim * itemsize, self.memory)

    def prefill_tile(self, dim: int, itemsize: int) -> int:
        """Tokens a tile, and queries as well: they fit with PREFILL_STAGES of keys and values."""
        row = (2 * PREFILL_STAGES + 1) * dim * itemsize
        return fitting(PREFILL_TILE, row, self.memory)


def fitting(tile: int, row_bytes: int, memory: int) -> int:
    """`tile`, halved until that many rows fit in memory; at least the 16 a matrix unit needs."""
    while tile > 16 and tile * row_bytes > memory:
        tile //= 2
    return tile


power_of_2 = triton.next_power_of_2


def store_kv(
    key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    """As `attention.store_kv`. Keys and values may be parts of one tensor: nothing is copied."""
    size = key[0].numel()
    key, value = (x if x[0].is_contiguous() else x.contiguous() for x in (key, value))
    strides = (key.stride(0), value.stride(0))
    args = (key, value, k_cache, v_cache, slot_mapping, *strides, size, power_of_2(size))
    store_kv_kernel[(len(key),)](*args)


def rms_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """norm(x) for an RMSNorm and x [num_tokens, size]."""
    card, size, y = Card.of(x.device), x.shape[1], torch.empty_like(x)
    args = (x, norm.weight, y, norm.eps, size, power_of_2(size), card.early)
    rms_norm_kernel[(len(x),)](*args, **card.options)
    return y


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: nn.Module | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """As `ops.linear.linear`. Only a product with a single token is worth a kernel of our own."""
    if len(x) == 1 and x.shape[1] <= LONGEST_VECTOR:
        return matvec(x, weight, bias, norm, residual)
    x = x if norm is None else rms_norm(x, norm)
    if residual is None:
        return F.linear(x, weight, bias)
    y = residual.addmm_(x, weight.t())
    return y if bias is None else y.add_(bias)


def gated_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, norm: nn.Module | None = None
) -> Tensor:
    """As `ops.linear.gated_linear`."""
    if len(x) == 1 and x.shape[1] <= LONGEST_VECTOR:
        return matvec(x, weight, bias, norm, gated=True)
    gate_up, card = linear(x, weight, bias, norm), Card.of(x.device)
    y = x.new_empty(len(x), len(weight) // 2)
    block = min(1024, power_of_2(y.shape[1]))
    grid = (len(x), triton.cdiv(y.shape[1], block))
    silu_mul_kernel[grid](gate_up, y, y.shape[1], block, card.early, **card.options)
    return y


def matvec(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: nn.Module | None,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """`linear` or `gated_linear` of x [1, inputs]."""
    card, inputs = Card.of(x.device), power_of_2(x.shape[1])
    outputs, warps = (8, 4) if inputs <= 1024 else (max(1, min(4, 16_384 // inputs)), 8)
    size = len(weight) // 2 if gated else len(weight)
    y = x.new_empty(1, size)
    norm_weight, eps = (norm.weight, norm.eps) if norm else (None, 0.0)
    flags = (norm is not None, gated, bias is not None, residual is not None)
    matvec_kernel[(triton.cdiv(size, outputs),)](
        x, weight, bias, norm_weight, residual, y, eps, size, x.shape[1], *flags,
        outputs, inputs, card.early, num_warps=warps, **card.options,
    )  # fmt: skip
    return y


def rope_store(
    qkv: Tensor,
    norms: tuple[nn.Module, nn.Module] | None,
    rope: Tensor,
    batch: AttentionMetadata,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    """As `attention.rope_store`."""
    card, (kv_heads, dim) = Card.of(qkv.device), k_cache.shape[2:]
    heads, half = qkv.shape[1] // dim - 2 * kv_heads, dim // 2
    query = qkv.new_empty(len(qkv), heads, dim)
    q_weight, k_weight = (norm.weight for norm in norms) if norms else (None, None)
    eps = norms[0].eps if norms else 0.0
    rope_store_kernel[(len(qkv),)](
        qkv, q_weight, k_weight, rope, batch.positions, batch.slot_mapping, query, k_cache, v_cache,
        eps, batch.positions.stride(0), heads, kv_heads, half, norms is not None,
        power_of_2(heads + kv_heads), power_of_2(kv_heads), power_of_2(half), card.early,
        **card.options,
    )  # fmt: skip
    return query


@dataclass(frozen=True)
class DecodePlan:
    """The tiles of a step's decode rows, which the attention kernel's programs share evenly."""

    tiles: Tensor  # [max_tiles, 6] int32: row, rows that share it, first token, end, part, is last
    rows: Tensor  # [num_rows, 2] int32: a row's first part, and how many it has
    num_tiles: Tensor  # [1] int32
    partial: Tensor  # [max_parts, heads, head_dim + 2] float32: what a part gave
    tile: int  # tokens
    programs: int  # for each KV head


def plan_decodes(positions: Tensor, block_tables: Tensor, k_cache: Tensor, heads: int) -> Rows:
    """As `attention.plan_decodes`, and how `attend_decodes` shares out the work."""
    (block_size, kv_heads, dim), device = k_cache.shape[1:], positions.device
    card, group, num_rows = Card.of(device), heads // kv_heads, len(positions)
    tile = card.decode_tile(power_of_2(dim), k_cache.itemsize)
    programs = max(1, card.processors * DECODE_PROGRAMS // kv_heads)
    sharers = max(16, power_of_2(group)) // group
    groups = triton.cdiv(num_rows, sharers)
    most = groups + num_rows * (triton.cdiv(block_tables.shape[1] * block_size, tile) + 1)
    shapes = (groups,), (num_rows,), (most, 6), (num_rows, 2), (1,), (num_rows + 1,)
    ints = (torch.empty(shape, dtype=torch.int32, device=device) for shape in shapes)
    shared, lens, tiles, rows, num_tiles, starts = ints
    slots = torch.empty(num_rows, dtype=torch.int64, device=device)
    strides = (positions.stride(0), block_tables.stride(0))
    shared_prefix_kernel[(groups,)](
        block_tables, positions, shared, num_rows, *strides, block_size, sharers,
        power_of_2(sharers), 128, SHARE_FROM,
    )  # fmt: skip
    plan_kernel[(num_rows,)](
        positions, block_tables, shared, slots, lens, starts, tiles, rows, num_tiles, num_rows,
        *strides, block_size, sharers, tile, programs, max(256, power_of_2(num_rows)), 32,
    )  # fmt: skip
    most_parts = 4 * num_rows + (sharers + 1) * programs
    partial = torch.empty(most_parts, heads, dim + 2, dtype=torch.float32, device=device)
    plan = DecodePlan(tiles, rows, num_tiles, partial, tile, programs)
    return Rows(slots, lens, block_tables, starts, plan=plan)


def attend_decodes(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, rows: Rows, scale: float
) -> Tensor:
    """As `attention.attend_decodes`; rows are of this file's `plan_decodes`."""
    card, plan, out = Card.of(query.device), rows.plan, torch.empty_like(query)
    (block_size, kv_heads, head_dim), heads = k_cache.shape[1:], query.shape[1]
    group, dim = heads // kv_heads, power_of_2(head_dim)
    decode_attention_kernel[(kv_heads, plan.programs)](
        query, k_cache, v_cache, rows.block_tables, plan.tiles, plan.rows, plan.num_tiles, out,
        plan.partial, scale * LOG2_E, rows.block_tables.stride(0), kv_heads, group, head_dim,
        block_size, max(16, power_of_2(group)), plan.tile, dim, DECODE_STAGES, card.early,
        num_warps=DECODE_WARPS, **card.options,
    )  # fmt: skip
    args = (plan.partial, plan.rows, out, heads, head_dim, dim, 16, card.early)
    merge_parts_kernel[(len(query), heads)](*args, **card.options)
    return out


def attend_prompts(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, rows: Rows, scale: float
) -> Tensor:
    """As `attention.attend_prompts`."""
    (block_size, kv_heads, head_dim), heads = k_cache.shape[1:], query.shape[1]
    dim, out = power_of_2(head_dim), torch.empty_like(query)
    tile = Card.of(query.device).prefill_tile(dim, query.itemsize)
    grid = (triton.cdiv(rows.longest, tile), heads, len(rows.context_lens))
    prefill_attention_kernel[grid](
        query, k_cache, v_cache, rows.block_tables, rows.starts, rows.context_lens, out,
        scale * LOG2_E, rows.block_tables.stride(0), kv_heads, heads // kv_heads, head_dim,
        block_size, tile, tile, dim, PREFILL_STAGES,
    )  # fmt: skip
    return out
