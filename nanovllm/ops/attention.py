"""Paged attention in plain torch: a KV cache cut into blocks, and what a step does with it.

Each layer first stores the new keys and values of *all* rows in the cache, then attends by reading
the cache alone. So a row may read what another row of the same batch has just written, and fresh
and cached tokens need no separate code. These functions run on any machine and define what is
right; `kernels.py` holds the same for a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanovllm.model.rope import apply_rope

WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Rows:
    """Rows of a batch; each has new tokens, and a context that ends with them."""

    slot_mapping: Tensor  # [num_tokens] int64: block_id * block_size + offset; -1: do not store
    context_lens: Tensor  # [num_rows] int32: tokens to read, the new ones included; 0: no such row
    block_tables: Tensor  # [num_rows, max_blocks] int32; what stands behind a table is not read
    starts: Tensor  # [num_rows + 1] int32: row i's new tokens are [starts[i], starts[i + 1])
    longest: int = 1  # new tokens of the longest row
    plan: Any = None  # how a kernel shares out the work


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


def plan_decodes(positions: Tensor, block_tables: Tensor, k_cache: Tensor, heads: int) -> Rows:
    """Rows whose newest token stands at `positions` [num_rows]; -1: no such row."""
    block_size = k_cache.shape[1]
    at = positions.clamp(min=0).long()
    blocks = block_tables.gather(1, at[:, None] // block_size).squeeze(1).long()
    slots = (blocks * block_size + at % block_size).masked_fill(positions < 0, -1)
    starts = torch.arange(len(slots) + 1, dtype=torch.int32, device=slots.device)
    return Rows(slots, positions + 1, block_tables, starts)


def attend_decodes(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, rows: Rows, scale: float
) -> Tensor:
    """One query token a row [num_rows, heads, head_dim]; the rows' contexts are padded alike."""
    tables = rows.block_tables[:, : -(-int(rows.context_lens.max()) // k_cache.shape[1])]
    key, value = (cache[tables].flatten(1, 2).transpose(1, 2) for cache in (k_cache, v_cache))
    readable = torch.arange(key.shape[2], device=tables.device) < rows.context_lens[:, None]
    return masked_attention(query[:, :, None], key, value, readable[:, None], scale).squeeze(2)


def attend_prompts(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, rows: Rows, scale: float
) -> Tensor:
    """Causal attention of query [num_tokens, heads, head_dim] over each row's own context."""
    output = torch.empty_like(query)
    starts, lengths = rows.starts.tolist(), rows.context_lens.tolist()
    for i, (table, length) in enumerate(zip(rows.block_tables, lengths, strict=True)):
        new = slice(starts[i], starts[i + 1])
        output[new] = _attend_prompt(query[new], k_cache, v_cache, table, length, scale)
    return output


def _attend_prompt(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, length: int, scale: float
) -> Tensor:
    """The last tokens of one row [num_tokens, heads, head_dim], over `length` cached ones."""
    table = table[: -(-length // k_cache.shape[1])]
    num_new, group = query.shape[0], query.shape[1] // k_cache.shape[2]
    cached = (cache[table].flatten(0, 1)[:length] for cache in (k_cache, v_cache))
    key, value = (x.repeat_interleave(group, dim=1).transpose(0, 1)[None] for x in cached)
    mask = torch.ones(1, num_new, length, dtype=torch.bool, device=query.device)
    mask = mask.tril(diagonal=length - num_new)
    return masked_attention(query.transpose(0, 1)[None], key, value, mask, scale)[0].transpose(0, 1)


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """Query [rows, heads, new, head_dim] over keys and values [rows, kv_heads, length, head_dim].

    mask [rows, new, length]: who may read what. Heads that share a KV head stand where more tokens
    would: nothing is copied for them. Not by cuDNN, which torch prefers on some GPUs: it makes a
    plan for each new shape, in tens of milliseconds, and here every step brings new shapes.
    """
    group = query.shape[1] // key.shape[1]
    grouped = query.unflatten(1, (-1, group)).flatten(2, 3)  # [rows, kv_heads, group * new, ...]
    mask = mask[:, None].expand(-1, group, -1, -1).flatten(1, 2)[:, None]
    with sdpa_kernel(WITHOUT_PLANS):
        out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
    return out.unflatten(2, (group, -1)).flatten(1, 2)
