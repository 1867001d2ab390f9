"""Paged attention in plain torch: the KV cache in blocks, and what a step stores and reads there.

Each layer first stores the new keys and values of *all* rows, and then attends by reading only the
cache. A row can therefore read what another row of the same batch has just stored, and fresh tokens
need no code of their own. These functions run on any machine and define the correct result. The
modules in `kernels/` compute the same on a GPU.

A slot that a row may not read can hold NaN or infinity, left there by a request whose numbers
overflowed. A weight of 0 would not hide such a number, because 0 * NaN is NaN. That is why no
function here multiplies the key or value of such a slot with anything.
"""

import math
from collections.abc import Callable, Iterator
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanovllm.layers.rope import apply_rope
from nanovllm.metadata import AttentionMetadata, PhaseMetadata

# cuDNN is not among them. Torch prefers it on some GPUs, but it spends tens of milliseconds on a
# plan for each new shape, and here every step brings new shapes.
SDPA_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
MAX_PADDING = 1.5  # slots that decode attention may gather for each slot that it has to read
# Slots that decode attention gathers at once, unless a single row is longer. On a CPU, small copies
# stay in the processor's cache. On a GPU, large copies need fewer launches.
MAX_GATHERED_SLOTS = {"cpu": 2**11, "cuda": 2**16}
QUERY_CHUNK = 1024  # new tokens of a row at a time; the mask has a number per query and key


# -- storing -------------------------------------------------------------------------------------


def store_kv(
    key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Write keys and values [num_tokens, kv_heads, head_dim] into their slots, in place.

    The caches are [num_blocks, block_size, kv_heads, head_dim]. A slot of -1 is skipped.
    """
    tokens = (slot_mapping >= 0).nonzero().squeeze(1)
    slots = slot_mapping[tokens]
    k_cache.flatten(0, 1)[slots] = key[tokens]
    v_cache.flatten(0, 1)[slots] = value[tokens]


def rope_store(
    qkv: Tensor,
    norms: tuple[Callable, Callable] | None,
    rope: Tensor,
    metadata: AttentionMetadata,
    k_cache: Tensor,
    v_cache: Tensor,
    store: Callable[..., None] = store_kv,
) -> Tensor:
    """Normalize and rotate queries and keys, and store keys and values.

    qkv: [num_tokens, (heads + 2 kv_heads) * head_dim]. norms: of queries and of keys. rope: a
    `rope_table`. Returns the queries [num_tokens, heads, head_dim].
    """
    kv_heads, head_dim = k_cache.shape[2:]
    heads = qkv.unflatten(-1, (-1, head_dim))
    counts = [heads.shape[1] - 2 * kv_heads, kv_heads]
    query, key, value = heads.split([*counts, kv_heads], dim=1)
    if norms is not None:
        query, key = norms[0](query), norms[1](key)
    cos_sin = rope[metadata.positions.clamp(min=0)]
    query, key = apply_rope(torch.cat((query, key), dim=1), cos_sin).split(counts, dim=1)
    store(key, value, k_cache, v_cache, metadata.slot_mapping)
    return query


def compute_slots(positions: Tensor, block_tables: Tensor, block_size: int) -> Tensor:
    """Return the slots [num_rows, n] int64 of tokens at `positions` [num_rows, n], all >= 0."""
    blocks = block_tables.gather(1, positions // block_size)
    return blocks.long() * block_size + positions % block_size


def gather_kv(k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> Iterator[Tensor]:
    """Yield copies of the keys, then of the values, in `slots` [num_rows, n].

    Each is [num_rows, kv_heads, n, head_dim].
    """
    for cache in (k_cache, v_cache):
        copies = cache.flatten(0, 1).index_select(0, slots.flatten())
        yield copies.unflatten(0, slots.shape).transpose(1, 2)


# -- decode --------------------------------------------------------------------------------------


class DecodeMetadata(PhaseMetadata):
    """Decode rows in groups of similar length, which `decode_attention` attends together."""

    @cached_property
    def length_groups(self) -> list[tuple[Tensor, int]]:
        """Groups of rows, each as (row indices [n] int64, tokens of the longest row)."""
        lengths, device = self.seq_lens_cpu, self.seq_lens.device
        groups = group_by_length(lengths, MAX_GATHERED_SLOTS[device.type])
        indices = torch.tensor([row for group in groups for row in group], device=device)
        parts = indices.split([len(group) for group in groups])
        return [(part, lengths[group[0]]) for part, group in zip(parts, groups, strict=True)]


def plan_decode(
    positions: Tensor, block_tables: Tensor, k_cache: Tensor, num_heads: int
) -> DecodeMetadata:
    """Return the metadata of decode rows whose new tokens have `positions` [num_rows].

    A position of -1 marks a padding row. block_tables: [num_rows, max_blocks].
    """
    new = positions.clamp(min=0).long()[:, None]
    slots = compute_slots(new, block_tables, k_cache.shape[1]).squeeze(1)
    slots = slots.masked_fill(positions < 0, -1)
    query_start_loc = torch.arange(len(slots) + 1, dtype=torch.int32, device=slots.device)
    return DecodeMetadata(slots, positions + 1, block_tables, query_start_loc)


def group_by_length(lengths: list[int], max_slots: int) -> list[list[int]]:
    """Divide rows into groups of similar length, the longest rows first.

    The rows of a group are padded to its longest row, so that one long row would make many short
    ones long as well. A group therefore takes the next row only while its padded size stays within
    `max_slots`, and within MAX_PADDING of its tokens. Rows of length 0 are in no group.
    """
    groups: list[list[int]] = []
    longest = total = 0  # tokens of the last group's longest row, and of all its rows
    for row in sorted((i for i, n in enumerate(lengths) if n > 0), key=lambda i: -lengths[i]):
        total += lengths[row]
        padded = (len(groups[-1]) + 1) * longest if groups else math.inf
        if padded <= min(MAX_PADDING * total, max_slots):
            groups[-1].append(row)
        else:
            groups.append([row])
            longest = total = lengths[row]
    return groups


def decode_attention(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, metadata: DecodeMetadata, scale: float
) -> Tensor:
    """Attend with the one new token of each row: query and result [num_rows, heads, head_dim].

    A padding row gets zeros. Beyond the end of a short row we gather its own last token again and
    mask it, so that no slot of another request is read.
    """
    output = torch.zeros_like(query)
    for rows, longest in metadata.length_groups:
        lengths = metadata.seq_lens[rows, None]
        positions = torch.arange(longest, device=query.device)
        read = torch.minimum(positions, lengths - 1)
        slots = compute_slots(read, metadata.block_tables[rows], k_cache.shape[1])
        key, value = gather_kv(k_cache, v_cache, slots)
        mask = (positions < lengths)[:, None]
        out = masked_attention(query[rows, :, None], key, value, mask, scale)
        output[rows] = out.squeeze(2)
    return output


# -- prefill -------------------------------------------------------------------------------------


def prefill_attention(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, metadata: PhaseMetadata, scale: float
) -> Tensor:
    """Attend causally to each row's own context: query and result [num_tokens, heads, head_dim]."""
    output = torch.empty_like(query)
    query_start_loc = metadata.query_start_loc.tolist()
    for block_table, length, start, end in zip(
        metadata.block_tables,
        metadata.seq_lens_cpu,
        query_start_loc,
        query_start_loc[1:],
        strict=False,  # the last start is the end of the last row
    ):
        for first in range(start, end, QUERY_CHUNK):
            last = min(first + QUERY_CHUNK, end)
            context = length - (end - last)
            output[first:last] = prefill_chunk(
                query[first:last], k_cache, v_cache, block_table, context, scale
            )
    return output


def prefill_chunk(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_len: int,
    scale: float,
) -> Tensor:
    """Attend with the last tokens of one row, [n, heads, head_dim], to its `context_len` tokens.

    If a token's key or value is not finite, the tokens that read it get NaN. The tokens before it
    do not, because they may be shared with another request.
    """
    num_new, queries_per_kv = query.shape[0], query.shape[1] // k_cache.shape[2]
    positions = torch.arange(context_len, device=query.device)[None]
    slots = compute_slots(positions, block_table[None], k_cache.shape[1])
    key, value = gather_kv(k_cache, v_cache, slots)
    sums = key.sum((1, 3), dtype=torch.float32) + value.sum((1, 3), dtype=torch.float32)
    not_finite = ~sums.isfinite()  # [1, context_len]
    key, value = (x.masked_fill(not_finite[:, None, :, None], 0) for x in (key, value))
    key, value = (x.repeat_interleave(queries_per_kv, dim=1) for x in (key, value))
    mask = torch.ones(1, num_new, context_len, dtype=torch.bool, device=query.device)
    mask = mask.tril(diagonal=context_len - num_new)
    out = masked_attention(query.transpose(0, 1)[None], key, value, mask, scale)
    reads_not_finite = (mask & not_finite[:, None]).any(dim=2)  # [1, num_new]
    return out.masked_fill(reads_not_finite[:, None, :, None], torch.nan)[0].transpose(0, 1)


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """Attend with query [num_rows, heads, num_new, head_dim] where mask is true.

    key, value: [num_rows, kv_heads, length, head_dim]. mask: [num_rows, num_new, length]. Masked
    keys and values must be finite all the same. The query heads of one KV head are treated like
    more new tokens, so that no key or value is copied for them.
    """
    queries_per_kv = query.shape[1] // key.shape[1]
    grouped = query.unflatten(1, (-1, queries_per_kv)).flatten(2, 3)
    mask = mask[:, None].expand(-1, queries_per_kv, -1, -1).flatten(1, 2)[:, None]
    with sdpa_kernel(SDPA_BACKENDS):
        out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
    return out.unflatten(2, (queries_per_kv, -1)).flatten(1, 2)
