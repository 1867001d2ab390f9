"""RoPE tables equal transformers' own, for every type of scaling; the rotation equals its too."""

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from nanovllm.checkpoint.config_json import ROPE_TYPES, scaled_frequencies
from nanovllm.layers.rope import apply_rope, rope_table

POSITIONS = 4097
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
}
VARIANTS = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "default, theta an int": {"rope_type": "default", "rope_theta": 1000000},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
    "llama3": LLAMA3,
    "llama3, factor 32": {**LLAMA3, "factor": 32.0, "rope_theta": 10000.0},
    "llama3, narrow ramp": {**LLAMA3, "low_freq_factor": 2.0, "high_freq_factor": 2.5},
    "yarn": YARN,
    "yarn, short": {**YARN, "original_max_position_embeddings": 16},
    "yarn, past the last pair": {
        **YARN,
        "rope_theta": 100.0,
        "original_max_position_embeddings": 65536,
        "beta_fast": 5000.0,
    },
    "yarn, one pair wide": {**YARN, "beta_fast": 4.0, "beta_slow": 4.0, "truncate": False},
    "yarn, betas": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn, not truncated": {**YARN, "truncate": False},
    "yarn, attention_factor": {**YARN, "attention_factor": 1.5},
    "yarn, mscales": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.707},
    "yarn, one mscale": {**YARN, "mscale": 1.2, "factor": 6.0},
    "yarn, factor 1": {**YARN, "factor": 1.0, "rope_theta": 30000.0},
}


def table_of(config, max_positions: int = POSITIONS) -> torch.Tensor:
    frequencies, scale = scaled_frequencies(config)
    return rope_table(frequencies, max_positions, scale)


def llama(rope: dict, head_dim: int, max_position_embeddings: int = 4096) -> LlamaConfig:
    return LlamaConfig(
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        rope_parameters={**rope},
    )


def transformers_table(config) -> torch.Tensor:
    """[POSITIONS, 2, head_dim // 2], from the module inside transformers' model."""
    kind = Qwen3RotaryEmbedding if config.model_type == "qwen3" else LlamaRotaryEmbedding
    cos, sin = kind(config)(torch.zeros(1), torch.arange(POSITIONS)[None])
    half = cos.shape[-1] // 2
    return torch.stack((cos[0, :, :half], sin[0, :, :half]), dim=1)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("head_dim", [16, 40, 128])
def test_table_equals_transformers(name, head_dim):
    config = llama(VARIANTS[name], head_dim)
    table = table_of(config)
    assert table.shape == (POSITIONS, 2, head_dim // 2)
    assert table.dtype == torch.float32
    torch.testing.assert_close(table, transformers_table(config), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["llama3", "yarn"])
def test_trained_length_is_the_maximum_unless_the_file_says(name):
    rope = {k: v for k, v in VARIANTS[name].items() if not k.startswith("original")}
    config = Qwen3Config(head_dim=64, max_position_embeddings=2048, rope_parameters={**rope})
    table = table_of(config)
    torch.testing.assert_close(table, transformers_table(config), atol=1e-6, rtol=0)
    assert not torch.equal(table, table_of(llama(rope, 64, 4096)))


def test_the_variants_differ_from_one_another():
    tables = [table_of(llama(rope, 40), 512) for rope in VARIANTS.values()]
    for i, table in enumerate(tables):
        assert all((table - other).abs().max() > 1e-3 for other in tables[:i])


def test_every_type_is_tried():
    assert set(ROPE_TYPES) == {rope["rope_type"] for rope in VARIANTS.values()}


def turned(num_tokens: int, num_heads: int, head_dim: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(num_tokens, num_heads, head_dim, generator=generator).to(dtype)
    positions = torch.randint(0, POSITIONS, (num_tokens,), generator=generator)
    table = table_of(llama(YARN, head_dim))
    return x, positions, apply_rope(x, table[positions])


@pytest.mark.parametrize("head_dim", [2, 40, 64])
def test_rotation_equals_transformers(head_dim):
    x, positions, ours = turned(33, 3, head_dim, torch.float32)
    config = llama(YARN, head_dim)
    cos, sin = LlamaRotaryEmbedding(config)(x, positions[None])
    theirs, _ = apply_rotary_pos_emb(x[None], x[None], cos, sin, unsqueeze_dim=2)
    torch.testing.assert_close(ours, theirs[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once_at_the_end(dtype):
    x, positions, ours = turned(33, 3, 40, dtype)
    table = table_of(llama(YARN, 40))
    assert ours.dtype == dtype
    assert torch.equal(ours, apply_rope(x.float(), table[positions]).to(dtype))


def test_the_input_and_the_defaults_are_left_alone():
    config, dtype = llama(YARN, 8), torch.get_default_dtype()
    x = torch.ones(4, 2, 8)
    torch.set_default_dtype(torch.bfloat16)
    try:
        table = table_of(config, 600)
        apply_rope(x, table[:4])
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(dtype)
    assert table.dtype == torch.float32
    assert torch.equal(table, table_of(llama(YARN, 8), 600))
    assert torch.equal(x, torch.ones(4, 2, 8))
    assert config.rope_parameters == llama(YARN, 8).rope_parameters


def test_products_depend_on_distance_alone():
    table = table_of(llama(VARIANTS["default"], 64), 200)
    query, key = torch.randn(2, 1, 1, 64, generator=torch.Generator().manual_seed(0))
    for distance in (0, 1, 57):
        products = torch.stack(
            [
                (apply_rope(query, table[[n + distance]]) * apply_rope(key, table[[n]])).sum()
                for n in (0, 3, 140)
            ]
        )
        torch.testing.assert_close(products, products[:1].expand(3), atol=1e-4, rtol=0)
