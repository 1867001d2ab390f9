"""Logprob kernels: log-softmax, rank and the likeliest tokens, without sorting the vocabulary.

1. `chunk_kernel` reads a chunk of a row's logits once. It notes the largest logit, the sum of the
   exponentials, how many tokens reach the reported token's logit, and its likeliest tokens, which
   it takes out one after the other.
2. `merge_kernel` puts the chunks of a row together, and packs the result for the host.

Rows that ask for nothing leave both kernels at once, so that one captured graph serves every mix.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm import logprobs as packing
from nanovllm.kernels.sampling import as_ordered, as_score

CHUNK = 4096  # tokens that one program reads
RANK, IDS, LOGPROBS, WIDTH, MOST = (
    tl.constexpr(getattr(packing, name))
    for name in ("RANK", "IDS", "LOGPROBS", "WIDTH", "MAX_LOGPROBS")
)
NO_KEY = tl.constexpr(-(2**63))  # below the key of every token
MINUS_INF = tl.constexpr(float("-inf"))


@triton.jit
def load_logits(logits, row, ids, num_ids):
    """A row's logits in float32, -inf beyond the row. A NaN becomes infinity."""
    values = tl.load(logits + row * num_ids + ids, ids < num_ids, MINUS_INF).to(tl.float32)
    return tl.where(values == values, values, float("inf"))


@triton.jit
def key_of(logits, ids):
    """An int64 that is larger for a larger logit and, of equal logits, for a lower id."""
    return (as_ordered(logits).to(tl.int64) << 32) | (ids ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit
def chunk_kernel(
    logits, token_ids, num_logprobs, largest_out, sums, counts, keys_out, num_ids, stride,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: what CHUNK tokens of a row contribute.

    largest_out, sums (of exp(logit - largest)) and counts: [num_rows, chunks]; keys_out:
    [num_rows, chunks, MOST], of which each row's first num_logprobs are written.
    """
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    wanted = tl.load(num_logprobs + row * stride)
    if wanted >= 0:
        ids = chunk * CHUNK + tl.arange(0, CHUNK)
        values = load_logits(logits, row, ids, num_ids)
        token_id = tl.maximum(tl.load(token_ids + row), 0)
        reported = load_logits(logits, row, token_id, num_ids)
        largest = tl.max(values)
        at = row * tl.num_programs(1) + chunk
        tl.store(largest_out + at, largest)
        tl.store(sums + at, tl.sum(tl.where(values > MINUS_INF, tl.exp(values - largest), 0.0)))
        reaches = (values >= reported) & (ids < num_ids)
        tl.store(counts + at, tl.sum(reaches.to(tl.int32)))
        keys = tl.where(ids < num_ids, key_of(values, ids), NO_KEY)
        for place in range(wanted):
            best = tl.max(keys)
            tl.store(keys_out + at * MOST + place, best)
            keys = tl.where(keys == best, NO_KEY, keys)


@triton.jit
def merge_kernel(
    logits, token_ids, num_logprobs, largest_in, sums, counts, keys_in, packed,
    num_ids, chunks, stride,
    CHUNKS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program: a row's packed result [WIDTH] int32; see `layers.logprobs`.

    CHUNKS is at least `chunks`, and KEYS at least chunks * MOST.
    """
    row = tl.program_id(0).to(tl.int64)
    wanted = tl.load(num_logprobs + row * stride)
    if wanted >= 0:
        packed += row * WIDTH
        chunk = tl.arange(0, CHUNKS)
        at, inside = row * chunks + chunk, chunk < chunks
        largest = tl.load(largest_in + at, inside, MINUS_INF)
        top = tl.max(largest)
        part = tl.load(sums + at, inside, 0.0)
        total = tl.log(tl.sum(tl.where(largest > MINUS_INF, part * tl.exp(largest - top), 0.0)))
        tl.store(packed + RANK, tl.sum(tl.load(counts + at, inside, 0)))
        token_id = tl.maximum(tl.load(token_ids + row), 0)
        reported = load_logits(logits, row, token_id, num_ids)
        tl.store(packed + IDS, token_id.to(tl.int32))
        tl.store(packed + LOGPROBS, ((reported - top) - total).to(tl.int32, bitcast=True))
        place = tl.arange(0, KEYS)
        written = (place < chunks * MOST) & (place % MOST < wanted)
        keys = tl.load(keys_in + row * chunks * MOST + place, written, NO_KEY)
        for i in range(wanted):
            best = tl.max(keys)
            best_id = (best & 0x7FFFFFFF).to(tl.int32) ^ 0x7FFFFFFF
            logprob = (as_score((best >> 32).to(tl.int32)) - top) - total
            tl.store(packed + IDS + 1 + i, tl.where(best == NO_KEY, -1, best_id))  # -1: NO_ID
            tl.store(packed + LOGPROBS + 1 + i, logprob.to(tl.int32, bitcast=True))
            keys = tl.where(keys == best, NO_KEY, keys)


def gather_logprobs(logits: Tensor, token_ids: Tensor, num_logprobs: Tensor) -> Tensor:
    """As `layers.logprobs.gather_logprobs`. Rows that ask for nothing are not written at all."""
    (num_rows, num_ids), device = logits.shape, logits.device
    chunks = triton.cdiv(num_ids, CHUNK)
    largest, sums = (torch.empty(num_rows, chunks, device=device) for _ in range(2))
    counts = torch.empty(num_rows, chunks, dtype=torch.int32, device=device)
    keys = torch.empty(num_rows, chunks, MOST.value, dtype=torch.int64, device=device)
    packed = torch.empty(num_rows, WIDTH.value, dtype=torch.int32, device=device)
    stride = num_logprobs.stride(0)
    chunk_kernel[(num_rows, chunks)](
        logits, token_ids, num_logprobs, largest, sums, counts, keys, num_ids, stride,
        CHUNK, num_warps=8,
    )  # fmt: skip
    merge_kernel[(num_rows,)](
        logits, token_ids, num_logprobs, largest, sums, counts, keys, packed,
        num_ids, chunks, stride,
        triton.next_power_of_2(chunks), triton.next_power_of_2(chunks * MOST.value), num_warps=4,
    )  # fmt: skip
    return packed
