"""Paged attention: one API over a KV cache that is cut into blocks, and its backends.

Each layer first stores the new keys and values of *all* rows in the cache, then attends by reading
the cache alone. So a row may read what another row of the same batch has just written, and fresh
and cached tokens need no separate code. `torch` runs on any machine and defines what is right.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class AttentionMetadata:
    """Which tokens of a batch belong to whom, and where their keys and values live.

    The batch is flat: the rows' new tokens stand one behind another, without padding.
    """

    slot_mapping: Tensor  # [num_tokens] int64: block_id * block_size + offset; -1: do not store
    block_tables: Tensor  # [num_rows, max_blocks] int64, padded with 0
    context_lens: Tensor  # [num_rows] int64: tokens to read, this step's included
    query_starts: list[int]  # num_rows + 1: row i's new tokens are [starts[i], starts[i + 1])
    num_decodes: int  # the first rows, those with a single new token


def store_kv(
    key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Write keys and values [num_tokens, kv_heads, head_dim] into their slots, in place.

    The caches are [num_blocks, block_size, kv_heads, head_dim]; a slot of -1 is skipped.
    """
    wanted = slot_mapping >= 0
    slots = slot_mapping[wanted]
    k_cache.flatten(0, 1)[slots] = key[wanted]
    v_cache.flatten(0, 1)[slots] = value[wanted]


def paged_attention(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, metadata: AttentionMetadata, scale: float
) -> Tensor:
    """Causal attention of query [num_tokens, heads, head_dim] over each row's own context."""
    output = torch.empty_like(query)
    if n := metadata.num_decodes:
        tables, lens = metadata.block_tables[:n], metadata.context_lens[:n]
        output[:n] = _attend_decodes(query[:n], k_cache, v_cache, tables, lens, scale)
    for row in range(n, len(metadata.query_starts) - 1):
        new = slice(metadata.query_starts[row], metadata.query_starts[row + 1])
        table, length = metadata.block_tables[row], int(metadata.context_lens[row])
        output[new] = _attend_prompt(query[new], k_cache, v_cache, table, length, scale)
    return output


def _attend_decodes(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, tables: Tensor, lens: Tensor, scale: float
) -> Tensor:
    """One query token a row [num_rows, heads, head_dim]; the rows' contexts are padded alike.

    Heads that share a KV head stand where a prompt's tokens would: nothing is copied for them.
    """
    num_rows, heads, head_dim = query.shape
    block_size, kv_heads = k_cache.shape[1:3]
    tables = tables[:, : -(-int(lens.max()) // block_size)]
    key = k_cache[tables].flatten(1, 2).transpose(1, 2)  # [num_rows, kv_heads, length, head_dim]
    value = v_cache[tables].flatten(1, 2).transpose(1, 2)
    readable = torch.arange(key.shape[2], device=lens.device) < lens[:, None]
    grouped = query.view(num_rows, kv_heads, heads // kv_heads, head_dim)
    mask = readable[:, None, None, :]
    out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
    return out.reshape(num_rows, heads, head_dim)


def _attend_prompt(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, length: int, scale: float
) -> Tensor:
    """The last tokens of one row [num_tokens, heads, head_dim], over `length` cached ones."""
    table = table[: -(-length // k_cache.shape[1])]
    key = k_cache[table].flatten(0, 1)[:length].transpose(0, 1)  # [kv_heads, length, head_dim]
    value = v_cache[table].flatten(0, 1)[:length].transpose(0, 1)
    num_new, group = query.shape[0], query.shape[1] // key.shape[0]
    mask = torch.ones(num_new, length, dtype=torch.bool, device=query.device)
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1),
        key.repeat_interleave(group, dim=0),
        value.repeat_interleave(group, dim=0),
        attn_mask=mask.tril(diagonal=length - num_new),
        scale=scale,
    )
    return out.transpose(0, 1)


@dataclass(frozen=True)
class AttentionBackend:
    """The two functions a layer calls; they have the signatures of the torch ones above."""

    name: str
    store_kv: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
    attend: Callable[[Tensor, Tensor, Tensor, AttentionMetadata, float], Tensor]


BACKENDS = {"torch": AttentionBackend("torch", store_kv, paged_attention)}


def choose_backend(name: str, device: torch.device) -> AttentionBackend:
    """The backend asked for; "auto": the best for the device. ValueError if there is none."""
    name = "torch" if name == "auto" else name
    if name not in BACKENDS:
        raise ValueError(
            f"attention_backend must be 'auto' or one of {list(BACKENDS)}, got {name!r}"
        )
    return BACKENDS[name]
