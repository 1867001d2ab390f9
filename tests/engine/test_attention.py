"""Paged attention in torch: what no row may read never counts, and little is read besides."""

import math
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanovllm.layers import attention
from nanovllm.metadata import PhaseMetadata

HEADS, KV_HEADS, HEAD_DIM = 6, 3, 10  # a shape that no other tensor has
LENGTHS = [37, 5, 64, 1, 80, 17, 33]


def make_cache(lengths, block_size, fill=math.nan):
    """Caches whose slots hold `fill` unless a row reads them, and the rows' tables.

    Tables are padded with the block of an unreadable slot.
    """
    counts = [-(-length // block_size) for length in lengths]
    order = iter(torch.randperm(sum(counts)).add(1).tolist())
    tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    caches = torch.full((2, sum(counts) + 1, block_size, KV_HEADS, HEAD_DIM), fill)
    for row, length in enumerate(lengths):
        for at in range(0, length, block_size):
            block = next(order)
            tables[row, at // block_size] = block
            end = min(block_size, length - at)
            caches[:, block, :end] = torch.randn(2, end, KV_HEADS, HEAD_DIM)
    return *caches, tables


def plan(lengths, tables, k_cache):
    return attention.plan_decode(torch.tensor(lengths) - 1, tables, k_cache, HEADS)


def by_hand(query, k_cache, v_cache, table, length):
    """Attention of one query [heads, head_dim] over the first `length` tokens of a table."""
    key, value = (cache[table.long()].flatten(0, 1)[:length] for cache in (k_cache, v_cache))
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (key, value))
    weights = (torch.einsum("hd,lhd->hl", query, key) * 0.3).softmax(-1)
    return torch.einsum("hl,lhd->hd", weights, value)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("fill", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("block_size", [1, 4, 16, 256])
def test_decode_rows_never_read_an_unreadable_slot(block_size, fill):
    lengths = [*LENGTHS, 0, 64, 0]
    k_cache, v_cache, tables = make_cache(lengths, block_size, fill)
    query = torch.randn(len(lengths), HEADS, HEAD_DIM)
    rows = plan(lengths, tables, k_cache)
    found = attention.decode_attention(query, k_cache, v_cache, rows, 0.3)
    for row, length in enumerate(lengths):
        if length:
            wanted = by_hand(query[row], k_cache, v_cache, tables[row], length)
            torch.testing.assert_close(found[row], wanted)
        else:
            assert not found[row].any(), "a row that is not there gives zeros"


def prompt_rows(lengths, num_new, tables):
    query_start_loc = torch.tensor([0, *num_new]).cumsum(0).int()
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    return PhaseMetadata(None, seq_lens, tables, query_start_loc, max(num_new))


@pytest.mark.parametrize("at_once", [7, 1024])
@pytest.mark.parametrize("block_size", [1, 16, 256])
def test_prompts_never_read_an_unreadable_slot(block_size, at_once, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_CHUNK", at_once)
    num_new = [37, 2, 30, 1, 80, 9, 33]
    k_cache, v_cache, tables = make_cache(LENGTHS, block_size)
    rows = prompt_rows(LENGTHS, num_new, tables)
    query = torch.randn(sum(num_new), HEADS, HEAD_DIM)
    found = attention.prefill_attention(query, k_cache, v_cache, rows, 0.3)
    for row, (first, last) in enumerate(
        zip(rows.query_start_loc, rows.query_start_loc[1:], strict=False)
    ):
        for i in range(first, last):
            length = LENGTHS[row] - int(last - 1 - i)
            wanted = by_hand(query[i], k_cache, v_cache, tables[row], length)
            torch.testing.assert_close(found[i], wanted)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["key", "value"])
def test_a_bad_token_of_a_prompt_reaches_only_those_that_read_it(which, bad):
    """Token 20 of 30, of which the first 10 were stored before; one number of it is enough."""
    k_cache, v_cache, tables = make_cache([30], 4)
    rows = prompt_rows([30], [20], tables)
    query = torch.randn(20, HEADS, HEAD_DIM)
    wanted = attention.prefill_attention(query, k_cache, v_cache, rows, 0.3)
    (k_cache if which == "key" else v_cache)[tables[0, 5], 0, 1, 2] = bad
    found = attention.prefill_attention(query, k_cache, v_cache, rows, 0.3)
    torch.testing.assert_close(found[:10], wanted[:10])
    assert found[10:].isnan().any(dim=-1).any(dim=-1).all()


# -- how much is gathered --------------------------------------------------------------------------


class Gathered(TorchDispatchMode):
    """Counts the slots whose keys are copied out of a cache, in all and in one piece."""

    def __init__(self):
        super().__init__()
        self.slots, self.most = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        copies = ("index", "index_select", "gather", "clone", "_to_copy", "take_along_dim")
        if func._schema.name.removeprefix("aten::") in copies and KV_HEADS in out.shape[-2:-1]:
            slots = out.numel() // (KV_HEADS * HEAD_DIM) if out.shape[-1] == HEAD_DIM else 0
            self.slots, self.most = self.slots + slots / 2, max(self.most, slots)
        return out


MIXES = {
    "one long row": [10] * 255 + [1000],
    "two long rows": [3] * 30 + [500, 900],
    "equal rows": [64] * 40,
    "one row": [77],
    "every length": [*range(1, 130)],
    "doubling": [2**i for i in range(11)],
    "empty rows": [0, 9, 0, 400, 0],
    "longer than a group": [700] * 9,
    **{
        f"random {seed}": [
            int(10 ** random.Random(100 * seed + i).uniform(0, 3)) for i in range(60)
        ]
        for seed in range(6)
    },
}


def count_gathered(lengths, block_size):
    k_cache, v_cache, tables = make_cache(lengths, block_size)
    query = torch.randn(len(lengths), HEADS, HEAD_DIM)
    rows = plan(lengths, tables, k_cache)
    with Gathered() as gathered:
        attention.decode_attention(query, k_cache, v_cache, rows, 0.3)
    return gathered


@pytest.mark.parametrize("block_size", [1, 16, 256])
@pytest.mark.parametrize("lengths", MIXES.values(), ids=MIXES)
def test_at_most_half_again_as_many_slots_are_gathered_as_are_read(lengths, block_size):
    gathered = count_gathered(lengths, block_size)
    assert sum(lengths) <= gathered.slots <= 1.5 * sum(lengths)


@pytest.mark.parametrize("lengths", MIXES.values(), ids=MIXES)
def test_what_is_gathered_at_once_is_bounded(lengths, monkeypatch):
    monkeypatch.setattr(attention, "MAX_GATHERED_SLOTS", {"cpu": 600})
    assert count_gathered(lengths, 16).most <= max(600, max(lengths))


@pytest.mark.parametrize("block_size", [1, 16, 256])
def test_prompts_gather_what_they_read(block_size):
    k_cache, v_cache, tables = make_cache(LENGTHS, block_size)
    rows = prompt_rows(LENGTHS, [1] * len(LENGTHS), tables)
    query = torch.randn(len(LENGTHS), KV_HEADS, HEAD_DIM)  # a head each: no key is repeated
    with Gathered() as gathered:
        attention.prefill_attention(query, k_cache, v_cache, rows, 0.3)
    assert gathered.slots == sum(LENGTHS)


def test_lengths_come_to_the_host_once_a_step():
    k_cache, v_cache, tables = make_cache(LENGTHS, 4)
    rows, reads = plan(LENGTHS, tables, k_cache), []
    plain = torch.Tensor.tolist
    query = torch.randn(len(LENGTHS), HEADS, HEAD_DIM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", lambda x: reads.append(x) or plain(x))
        for _ in range(3):  # layers
            attention.decode_attention(query, k_cache, v_cache, rows, 0.3)
    assert len(reads) == 1
