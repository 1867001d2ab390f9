"""Paged attention in plain torch: a KV cache cut into blocks, and what a step does with it.

Each layer first stores the new keys and values of *all* rows in the cache, then attends by reading
the cache alone. So a row may read what another row of the same batch has just written, and fresh
and cached tokens need no separate code. These functions run on any machine and define what is
right; `kernels.py` holds the same for a GPU.

A slot that a row may not read can hold NaN or infinity: another request whose numbers overflowed
may have left them there. A weight of 0 would not hide them, because 0 * NaN is NaN. That is why no
function here multiplies such a slot's key or value with anything.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanovllm.layers.rope import apply_rope

WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
MOST_PADDING = 1.5  # slots that decode rows gather, for each one that they read
# Slots gathered for decode rows at most, unless a single row is longer. On a CPU small copies stay
# in the processor's cache; on a GPU large ones need fewer launches.
SLOTS_AT_ONCE = {"cpu": 2**11, "cuda": 2**16}
QUERIES_AT_ONCE = 1024  # of a prompt: the mask has a number for each query and each token


@dataclass(frozen=True)
class Rows:
    """Rows of a batch; each has new tokens, and a context that ends with them."""

    slot_mapping: Tensor  # [num_tokens] int64: block_id * block_size + offset; -1: do not store
    context_lens: Tensor  # [num_rows] int32: tokens to read, the new ones included; 0: no such row
    block_tables: Tensor  # [num_rows, max_blocks] int32; what stands behind a table is not read
    starts: Tensor  # [num_rows + 1] int32: row i's new tokens are [starts[i], starts[i + 1])
    longest: int = 1  # new tokens of the longest row
    plan: Any = None  # how a kernel shares out the work

    @cached_property
    def lengths(self) -> list[int]:
        """`context_lens` on the host. All layers of a step share one wait for the device."""
        return self.context_lens.tolist()

    @cached_property
    def groups(self) -> list[tuple[Tensor, int]]:
        """Rows of similar length, as (row numbers [n] int64, tokens of the longest of them)."""
        device = self.context_lens.device
        groups = group_by_length(self.lengths, SLOTS_AT_ONCE[device.type])
        numbers = torch.tensor([row for group in groups for row in group], device=device)
        parts = numbers.split([len(group) for group in groups])
        return [(part, self.lengths[group[0]]) for part, group in zip(parts, groups, strict=True)]


@dataclass(frozen=True)
class AttentionMetadata:
    """Whose the tokens of a flat batch are: first rows with one new token each, then prompts."""

    positions: Tensor  # [num_tokens]
    decodes: Rows | None
    prompts: Rows | None

    @cached_property
    def slot_mapping(self) -> Tensor:
        """[num_tokens] int64"""
        rows = [rows.slot_mapping for rows in (self.decodes, self.prompts) if rows is not None]
        return rows[0] if len(rows) == 1 else torch.cat(rows)


def store_kv(
    key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Write keys and values [num_tokens, kv_heads, head_dim] into their slots, in place.

    The caches are [num_blocks, block_size, kv_heads, head_dim]; a slot of -1 is skipped.
    """
    wanted = (slot_mapping >= 0).nonzero().squeeze(1)  # which tokens
    slots = slot_mapping[wanted]
    k_cache.flatten(0, 1)[slots] = key[wanted]
    v_cache.flatten(0, 1)[slots] = value[wanted]


def rope_store(
    qkv: Tensor,
    norms: tuple[Callable, Callable] | None,
    rope: Tensor,
    batch: AttentionMetadata,
    k_cache: Tensor,
    v_cache: Tensor,
    store: Callable[..., None] = store_kv,
) -> Tensor:
    """Norm and turn queries and keys, store keys and values; returns query [tokens, heads, dim].

    qkv: [num_tokens, (heads + 2 kv_heads) * head_dim]. rope: a `rope_table`.
    """
    kv_heads, head_dim = k_cache.shape[2:]
    heads = qkv.unflatten(-1, (-1, head_dim))
    counts = [heads.shape[1] - 2 * kv_heads, kv_heads]
    query, key, value = heads.split([*counts, kv_heads], dim=1)
    if norms is not None:
        query, key = norms[0](query), norms[1](key)
    turned = apply_rope(torch.cat((query, key), dim=1), rope[batch.positions.clamp(min=0)])
    query, key = turned.split(counts, dim=1)
    store(key, value, k_cache, v_cache, batch.slot_mapping)
    return query


def slots_of(positions: Tensor, block_tables: Tensor, block_size: int) -> Tensor:
    """The slots [num_rows, n] int64 of tokens at `positions` [num_rows, n], at least 0."""
    blocks = block_tables.gather(1, positions // block_size)
    return blocks.long() * block_size + positions % block_size


def gather_kv(k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> Iterator[Tensor]:
    """Copies of the keys and of the values in `slots` [rows, n]: [rows, kv_heads, n, head_dim]."""
    for cache in (k_cache, v_cache):
        copies = cache.flatten(0, 1).index_select(0, slots.flatten())
        yield copies.unflatten(0, slots.shape).transpose(1, 2)


def plan_decodes(positions: Tensor, block_tables: Tensor, k_cache: Tensor, heads: int) -> Rows:
    """Rows whose newest token stands at `positions` [num_rows]; -1: no such row."""
    newest = positions.clamp(min=0).long()[:, None]
    slots = slots_of(newest, block_tables, k_cache.shape[1]).squeeze(1)
    slots = slots.masked_fill(positions < 0, -1)
    starts = torch.arange(len(slots) + 1, dtype=torch.int32, device=slots.device)
    return Rows(slots, positions + 1, block_tables, starts)


def group_by_length(lengths: list[int], most_slots: int) -> list[list[int]]:
    """Row numbers in groups, the longest rows first; rows of length 0 are in none.

    A group's rows are padded to its longest. It takes the next row as long as that keeps it within
    MOST_PADDING and `most_slots`, so one long row does not make many short ones long as well.
    """
    groups: list[list[int]] = []
    longest = total = 0  # tokens of the last group's longest row, and of all its rows
    for row in sorted((i for i, n in enumerate(lengths) if n > 0), key=lambda i: -lengths[i]):
        total += lengths[row]
        padded = (len(groups[-1]) + 1) * longest if groups else math.inf
        if padded <= min(MOST_PADDING * total, most_slots):
            groups[-1].append(row)
        else:
            groups.append([row])
            longest = total = lengths[row]
    return groups


def attend_decodes(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, rows: Rows, scale: float
) -> Tensor:
    """One query token a row [num_rows, heads, head_dim]; a row that is not there gives zeros.

    Rows of similar length are attended together. Where one of them has ended, its own last token is
    gathered again and masked, so that no slot of another request is touched.
    """
    output = torch.zeros_like(query)
    for chosen, longest in rows.groups:
        lengths = rows.context_lens[chosen, None]
        tokens = torch.arange(longest, device=query.device)
        read = torch.minimum(tokens, lengths - 1)
        slots = slots_of(read, rows.block_tables[chosen], k_cache.shape[1])
        key, value = gather_kv(k_cache, v_cache, slots)
        mask = (tokens < lengths)[:, None]
        out = masked_attention(query[chosen, :, None], key, value, mask, scale)
        output[chosen] = out.squeeze(2)
    return output


def attend_prompts(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, rows: Rows, scale: float
) -> Tensor:
    """Causal attention of query [num_tokens, heads, head_dim] over each row's own context."""
    output = torch.empty_like(query)
    starts = rows.starts.tolist()
    for table, length, start, end in zip(
        rows.block_tables, rows.lengths, starts, starts[1:], strict=False
    ):
        for first in range(start, end, QUERIES_AT_ONCE):
            last = min(first + QUERIES_AT_ONCE, end)
            part, context = query[first:last], length - (end - last)
            output[first:last] = _attend_prompt(part, k_cache, v_cache, table, context, scale)
    return output


def _attend_prompt(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, length: int, scale: float
) -> Tensor:
    """The last tokens of one row [num_tokens, heads, head_dim], over `length` cached ones.

    A token whose key or value is not finite gives NaN to the tokens that read it, and to no others:
    those before it may be shared with another request.
    """
    num_new, group = query.shape[0], query.shape[1] // k_cache.shape[2]
    positions = torch.arange(length, device=query.device)[None]
    slots = slots_of(positions, table[None], k_cache.shape[1])
    key, value = gather_kv(k_cache, v_cache, slots)
    sums = key.sum((1, 3), dtype=torch.float32) + value.sum((1, 3), dtype=torch.float32)
    spoiled = ~sums.isfinite()  # [1, length]: it holds NaN or infinity
    key, value = (x.masked_fill(spoiled[:, None, :, None], 0) for x in (key, value))
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    mask = torch.ones(1, num_new, length, dtype=torch.bool, device=query.device)
    mask = mask.tril(diagonal=length - num_new)
    out = masked_attention(query.transpose(0, 1)[None], key, value, mask, scale)
    reads_spoiled = (mask & spoiled[:, None]).any(dim=2)  # [1, num_new]
    return out.masked_fill(reads_spoiled[:, None, :, None], torch.nan)[0].transpose(0, 1)


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """Query [rows, heads, new, head_dim] over keys and values [rows, kv_heads, length, head_dim].

    mask [rows, new, length]: who may read what. What it hides must be finite all the same. Heads
    that share a KV head stand where more tokens would: nothing is copied for them. Not by cuDNN,
    which torch prefers on some GPUs: it makes a plan for each new shape, in tens of milliseconds,
    and here every step brings new shapes.
    """
    group = query.shape[1] // key.shape[1]
    grouped = query.unflatten(1, (-1, group)).flatten(2, 3)  # [rows, kv_heads, group * new, ...]
    mask = mask[:, None].expand(-1, group, -1, -1).flatten(1, 2)[:, None]
    with sdpa_kernel(WITHOUT_PLANS):
        out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
    return out.unflatten(2, (group, -1)).flatten(1, 2)
