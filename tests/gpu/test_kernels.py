"""Each Triton kernel equals its torch twin: on a GPU, or on a CPU in Triton's interpreter.

The interpreter must be asked for before Triton is first imported, so it has a run of its own:
TRITON_INTERPRET=1 pytest tests/gpu/test_kernels.py, as `make test` does.
"""

import os

import pytest
import torch
from torch import nn

from nanovllm.layers import attention, functional
from nanovllm.layers.rope import rope_frequencies, rope_table
from nanovllm.metadata import AttentionMetadata, PhaseMetadata

CUDA = torch.cuda.is_available()
if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs an NVIDIA GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from nanovllm.kernels import (  # noqa: E402  (not every machine has Triton)
    decode_attention,
    decode_plan,
    linear,
    prefill_attention,
    store,
)

TILE_COLUMNS = (decode_plan.TILE_NUM_ROWS, decode_plan.TILE_START, decode_plan.TILE_END)
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = [torch.float32, torch.bfloat16] if CUDA else [torch.float32]  # see ENVIRONMENT in README
SHAPES = [  # heads, KV heads, head size, block size
    (4, 2, 16, 4),
    (6, 2, 24, 8),  # neither a power of two
    (14, 2, 16, 1),
    (2, 2, 32, 16),
    (36, 2, 16, 3),  # more query heads a KV head than a tile has rows
]
LENGTHS = [37, 5, 64, 1, 80, 17, 33]

pytestmark = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def random(*shape, dtype):
    return torch.randn(shape, device=DEVICE).to(dtype)


def assert_close(found, wanted, dtype):
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    assert found.shape == wanted.shape
    assert not found.isnan().any()
    error = (found.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-9)
    assert error < limit, f"relative error {error:.2e}"


class Norm(nn.Module):
    def __init__(self, size, dtype):
        super().__init__()
        self.weight, self.eps = random(size, dtype=dtype) + 1, 1e-5

    def forward(self, x):
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


def make_cache(lengths, shape, dtype, common=0):
    """Two caches full of random numbers, and random tables whose first `common` blocks agree."""
    _, kv_heads, head_dim, block_size = shape
    width = -(-max(lengths) // block_size)
    blocks = torch.randperm(len(lengths) * width + 3, device=DEVICE)
    tables = blocks[: len(lengths) * width].view(len(lengths), width).int()
    tables[:, :common] = tables[0, :common].clone()
    caches = random(2, len(blocks), block_size, kv_heads, head_dim, dtype=dtype)
    return *caches, tables


def spoil(caches, tables, lengths):
    """NaN in every slot that no row may read: 0 * NaN is NaN, so none of them may be multiplied."""
    block_size = caches[0].shape[1]
    readable = torch.zeros(caches[0].shape[:2], dtype=torch.bool, device=DEVICE).flatten()
    for table, length in zip(tables.long(), lengths, strict=True):
        at = torch.arange(length, device=DEVICE)
        readable[table[at // block_size] * block_size + at % block_size] = True
    for cache in caches:
        cache.flatten(0, 1)[~readable] = torch.nan


@pytest.mark.parametrize("crossed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_store_kv(shape, crossed, dtype):
    k_cache, v_cache, _ = make_cache([9], shape, dtype)
    kv_heads, head_dim = k_cache.shape[2:]
    whole = random(5, 3 * kv_heads + 1, head_dim, dtype=dtype)  # keys and values are parts of it
    key, value = whole[:, 1 : kv_heads + 1], whole[:, 1 + 2 * kv_heads :]
    if crossed:  # a token's heads do not stand side by side
        key, value = (x.permute(1, 2, 0).contiguous().permute(2, 0, 1) for x in (key, value))
    slots = torch.tensor([3, -1, 0, 7, 5], device=DEVICE)
    wanted = k_cache.clone(), v_cache.clone()
    attention.store_kv(key, value, *wanted, slots)
    store.store_kv(key, value, k_cache, v_cache, slots)
    assert torch.equal(k_cache, wanted[0])
    assert torch.equal(v_cache, wanted[1])


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_rope_store(shape, normed, dtype):
    heads, kv_heads, head_dim, _ = shape
    k_cache, v_cache, tables = make_cache(LENGTHS, shape, dtype)
    wanted = k_cache.clone(), v_cache.clone()
    qkv = random(len(LENGTHS), (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    norms = (Norm(head_dim, dtype), Norm(head_dim, dtype)) if normed else None
    rope = rope_table(rope_frequencies(head_dim, 1e4), 128).to(DEVICE)
    positions = torch.tensor([n - 1 for n in LENGTHS[:-1]] + [-1], dtype=torch.int32, device=DEVICE)
    decode = attention.plan_decode(positions, tables, k_cache, heads)
    metadata = AttentionMetadata(positions, decode, None)
    query = store.rope_store(qkv, norms, rope, metadata, k_cache, v_cache)
    assert_close(query, attention.rope_store(qkv, norms, rope, metadata, *wanted), dtype)
    assert_close(k_cache, wanted[0], dtype)
    assert torch.equal(v_cache, wanted[1])


@pytest.mark.parametrize("common", [0, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_attention(shape, common, dtype, monkeypatch):
    """Ragged rows, some of them empty; some begin with the same blocks, and are read together."""
    heads, _, head_dim, block_size = shape
    monkeypatch.setattr(decode_plan, "MIN_SHARED_TOKENS", block_size)
    lengths = [n + common * block_size for n in LENGTHS] + [0, 0]
    k_cache, v_cache, tables = make_cache(lengths, shape, dtype, common)
    spoil((k_cache, v_cache), tables, lengths)
    positions = torch.tensor(lengths, dtype=torch.int32, device=DEVICE) - 1
    query = random(len(lengths), heads, head_dim, dtype=dtype)
    plain = attention.plan_decode(positions, tables, k_cache, heads)
    rows = decode_plan.plan_decode(positions, tables, k_cache, heads)
    assert rows.slot_mapping.tolist() == plain.slot_mapping.tolist()
    assert rows.seq_lens.tolist() == plain.seq_lens.tolist()
    found = decode_attention.decode_attention(query, k_cache, v_cache, rows, head_dim**-0.5)
    wanted = attention.decode_attention(query, k_cache, v_cache, plain, head_dim**-0.5)
    assert_close(found, wanted, dtype)
    live = plain.seq_lens > 0
    assert not found[~live].any(), "a row that is not there gives zeros"


def test_a_common_prefix_is_read_once(dtype):
    shape, lengths = (4, 2, 16, 16), [100, 120, 140]
    k_cache, _, tables = make_cache(lengths, shape, dtype, common=5)
    positions = torch.tensor(lengths, dtype=torch.int32, device=DEVICE) - 1
    plan = decode_plan.plan_decode(positions, tables, k_cache, 4).plan
    tiles = plan.tiles[: int(plan.num_tiles)]
    num_rows, start, end = (tiles[:, column.value] for column in TILE_COLUMNS)
    assert (end - start).sum() == sum(lengths) - 2 * 80
    assert end[num_rows == 3].max() == 80


def prompt_rows(lengths, num_new, tables):
    query_start_loc = torch.tensor([0, *num_new], device=DEVICE).cumsum(0).int()
    lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    return PhaseMetadata(None, lengths, tables, query_start_loc, max(num_new))


@pytest.mark.parametrize("num_new", [[7, 40, 1, 70], [80]])
@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_attention(shape, num_new, dtype):
    heads, _, head_dim, _ = shape
    lengths = [n + before for n, before in zip(num_new, (0, 13, 30, 5), strict=False)]
    k_cache, v_cache, tables = make_cache(lengths, shape, dtype)
    spoil((k_cache, v_cache), tables, lengths)
    rows = prompt_rows(lengths, num_new, tables)
    query = random(sum(num_new), heads, head_dim, dtype=dtype)
    found = prefill_attention.prefill_attention(query, k_cache, v_cache, rows, head_dim**-0.5)
    wanted = attention.prefill_attention(query, k_cache, v_cache, rows, head_dim**-0.5)
    assert_close(found, wanted, dtype)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("which", [0, 1], ids=["key", "value"])
def test_a_bad_token_of_a_prompt_reaches_only_those_that_read_it(which, bad, dtype):
    """Tokens before it may be shared with other requests. The bad one is in a second tile."""
    shape, lengths, num_new = (4, 2, 16, 16), [150, 40], [130, 40]
    *caches, tables = make_cache(lengths, shape, dtype)
    rows = prompt_rows(lengths, num_new, tables)
    query = random(sum(num_new), 4, 16, dtype=dtype)
    wanted = attention.prefill_attention(query, *caches, rows, 0.25)
    caches[which][tables[0, 100 // 16], 100 % 16, :, 3] = bad
    found = prefill_attention.prefill_attention(query, *caches, rows, 0.25)
    before, reading = [*range(80), *range(130, 170)], range(80, 130)  # position 100 is new token 80
    assert_close(found[before], wanted[before], dtype)
    if which == 1 or bad != bad:  # an infinite key may give the score -infinity: a weight of 0
        assert not found[reading].isfinite().all(dim=2).any()


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_linear(num_tokens, biased, dtype):
    x, weight = random(num_tokens, 72, dtype=dtype), random(40, 72, dtype=dtype)
    bias, norm = random(40, dtype=dtype) if biased else None, Norm(72, dtype)
    residual = random(num_tokens, 40, dtype=dtype)
    assert_close(linear.linear(x, weight, bias), functional.linear(x, weight, bias), dtype)
    for name in ("norm_linear", "norm_swiglu"):
        wanted = getattr(functional, name)(x, norm, weight, bias)
        assert_close(getattr(linear, name)(x, norm, weight, bias), wanted, dtype)
    wanted = functional.linear_add(x, weight, bias, residual)
    assert_close(linear.linear_add(x, weight, bias, residual.clone()), wanted, dtype)
