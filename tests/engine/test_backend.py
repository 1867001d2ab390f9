"""Which backend is chosen, and the FlashAttention adapters, held to stand-ins of the libraries.

The stand-ins take what the libraries' documentation says they take, refuse the rest, and compute by
hand. FlashAttention itself needs a GPU.
"""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from nanovllm.kernels import flash_attention
from nanovllm.layers import attention, backend
from nanovllm.metadata import PhaseMetadata

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def by_hand(query, k_cache, v_cache, tables, lengths, starts):
    """Causal attention, one query token at a time."""
    out = torch.empty_like(query)
    for row, length in enumerate(lengths.tolist()):
        first, last = starts[row : row + 2].tolist()
        key, value = (cache[tables[row].long()].flatten(0, 1) for cache in (k_cache, v_cache))
        for i in range(first, last):
            seen = length - (last - 1 - i)
            for head in range(HEADS):
                k, v = (x[:seen, head * KV_HEADS // HEADS] for x in (key, value))
                out[i, head] = ((query[i, head] @ k.T) * HEAD_DIM**-0.5).softmax(0) @ v
    return out


def check(query, tables, starts, max_q, softmax_scale, causal):
    assert softmax_scale == HEAD_DIM**-0.5
    assert causal
    assert tables.dtype == starts.dtype == torch.int32
    assert tables.stride(-1) == 1
    assert starts[0] == 0
    assert starts[-1] == len(query)
    assert starts.diff().max() == max_q


def varlen(
    q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, softmax_scale,
    causal,
):  # fmt: skip
    """flash_attn 2.8's flash_attn_varlen_func over a paged cache."""
    check(q, block_table, cu_seqlens_q, max_seqlen_q, softmax_scale, causal)
    assert k.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256"
    assert cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_k[0] == 0
    lengths = cu_seqlens_k.diff()
    assert lengths.max() <= max_seqlen_k <= block_table.shape[1] * k.shape[1]
    return by_hand(q, k, v, block_table, lengths, cu_seqlens_q)


def with_kvcache(
    q, k_cache, v_cache, *, page_table, cache_seqlens, cu_seqlens_q, max_seqlen_q, softmax_scale,
    causal,
):  # fmt: skip
    """FlashAttention-3's flash_attn_with_kvcache over a paged cache, with ragged queries."""
    check(q, page_table, cu_seqlens_q, max_seqlen_q, softmax_scale, causal)
    assert cache_seqlens.dtype == torch.int32
    return by_hand(q, k_cache, v_cache, page_table, cache_seqlens, cu_seqlens_q)


@pytest.fixture
def installed(monkeypatch):
    """installed("flash_attn", ...): exactly these versions of FlashAttention are there."""
    modules = {
        "flash_attn": {"flash_attn_varlen_func": varlen},
        "flash_attn_interface": {"flash_attn_with_kvcache": with_kvcache},
    }
    find_spec = importlib.util.find_spec

    def install(*names):
        for name in modules:
            module = ModuleType(name)
            vars(module).update(modules[name])
            monkeypatch.setitem(sys.modules, name, module if name in names else None)
        known = {name: name in names or None for name in modules}
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda n: known[n] if n in known else find_spec(n)
        )

    return install


@pytest.fixture
def a_gpu(monkeypatch):
    """As if there were a GPU of sm_90; nothing is run on it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(backend, "triton_backend", lambda: backend.Backend("triton"))


@pytest.mark.parametrize(
    ("adapter", "block_size"), [("flash_attention_2", 256), ("flash_attention_3", 16)]
)
def test_adapters_ask_the_libraries_rightly(installed, adapter, block_size):
    installed("flash_attn", "flash_attn_interface")
    torch.manual_seed(0)
    k_cache, v_cache = torch.randn(2, 12, block_size, KV_HEADS, HEAD_DIM)
    tables = torch.randperm(12).view(3, 4).int()
    scale, attend = HEAD_DIM**-0.5, getattr(flash_attention, adapter)
    lengths, starts = torch.tensor([30, 17, 9]).int(), torch.tensor([0, 5, 6, 15]).int()
    prefill = PhaseMetadata(None, lengths, tables, starts, 9)
    query = torch.randn(15, HEADS, HEAD_DIM)
    wanted = attention.prefill_attention(query, k_cache, v_cache, prefill, scale)
    torch.testing.assert_close(attend(query, k_cache, v_cache, prefill, scale), wanted)
    decode = attention.plan_decode(lengths - 1, tables, k_cache, HEADS)
    wanted = attention.decode_attention(query[:3], k_cache, v_cache, decode, scale)
    torch.testing.assert_close(attend(query[:3], k_cache, v_cache, decode, scale), wanted)


def choose(name="auto", device=GPU, head_dim=128, block_size=16):
    return backend.choose_backend(name, device, head_dim, block_size)


def test_a_cpu_has_plain_torch():
    assert choose(device=CPU).name == "torch"
    for name in ("triton", "flash"):
        with pytest.raises(ValueError, match=r"cpu.*is not an NVIDIA GPU"):
            choose(name, CPU)
    with pytest.raises(ValueError, match="'nonesuch'"):
        choose("nonesuch")


def test_flash_is_had_only_where_it_is_installed(installed, a_gpu):
    installed()
    with pytest.raises(ValueError, match="pip install flash-attn"):
        choose("flash")
    installed("flash_attn")
    for block_size in (16, 128, 384):
        with pytest.raises(ValueError, match=f"multiple of 256, got block_size={block_size}"):
            choose("flash", block_size=block_size)
    assert choose("flash", block_size=512).prefill_attention is flash_attention.flash_attention_2
    installed("flash_attn", "flash_attn_interface")
    assert choose("flash").decode_attention is flash_attention.flash_attention_3


@pytest.mark.parametrize("table", [("triton", "flash"), ("triton", "triton")])
def test_auto_follows_the_table(installed, a_gpu, monkeypatch, table):
    monkeypatch.setitem(backend.AUTO, (9, 0), table)
    installed()
    assert choose().prefill_attention is attention.prefill_attention  # the stand-in of triton's
    installed("flash_attn_interface")
    prompts = (
        flash_attention.flash_attention_3 if table[1] == "flash" else attention.prefill_attention
    )
    assert choose().prefill_attention is prompts
    assert choose().decode_attention is attention.decode_attention


@pytest.mark.parametrize(
    ("found", "options", "problem"),
    [
        ((7, 5), {}, r"compute capability \(7, 5\), the kernels need \(8, 0\)"),
        ((9, 0), {"head_dim": 512}, "head_dim=512 is over the kernels' limit of 256"),
    ],
)
def test_what_the_kernels_cannot_do_is_done_in_torch_and_said(monkeypatch, found, options, problem):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: found)
    with pytest.warns(UserWarning, match=problem):
        assert choose(**options).name == "torch"
    with pytest.raises(ValueError, match=problem):
        choose("triton", **options)


def test_old_gpus_compute_in_float16(monkeypatch):
    from nanovllm.checkpoint.weights import resolve_dtype

    config = SimpleNamespace(dtype=torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert resolve_dtype("auto", config, GPU) == torch.float16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert resolve_dtype("auto", config, GPU) == torch.bfloat16


def test_attention_in_torch_never_asks_cudnn(monkeypatch):
    """It would make a plan for every new shape; outside, torch keeps its own choice."""
    enabled, real = [], attention.F.scaled_dot_product_attention

    def looked_at(*args, **kwargs):
        enabled.append(torch.backends.cuda.cudnn_sdp_enabled())
        return real(*args, **kwargs)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", looked_at)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    query, key = torch.ones(1, 4, 3, 8), torch.ones(1, 2, 5, 8)
    mask = torch.ones(1, 3, 5, dtype=torch.bool)
    assert attention.masked_attention(query, key, key, mask, 1.0).shape == query.shape
    assert enabled == [False]
    assert torch.backends.cuda.cudnn_sdp_enabled() is before is True
