"""The transformer, top to bottom on one page: Qwen3, Qwen2 and Llama in one decoder.

The three families differ by what their config says: biases, and norms on query and key. Tokens of
all requests stand in one flat row, without padding; only attention asks whose they are. Module
names are the checkpoint's, so `loader.py` needs no table of names. The linear layers come from
`parallel.py`: on one rank they are plain linears.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm.model.model_config import ModelConfig
from nanovllm.model.parallel import ColumnLinear, Ranks, RowLinear, VocabEmbedding, VocabHead
from nanovllm.model.rope import apply_rope, rope_table
from nanovllm.ops.attention import AttentionBackend, AttentionMetadata


class RMSNorm(nn.Module):
    """x / rms(x) * weight, over the last dimension (Zhang and Sennrich, 2019)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention over the paged cache."""

    def __init__(self, config: ModelConfig, ranks: Ranks, backend: AttentionBackend):
        super().__init__()
        self.head_dim = config.head_dim
        self.backend = backend
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.qkv_proj = ColumnLinear(
            config.hidden_size,
            {
                "q_proj": (heads, config.head_dim),
                "k_proj": (kv_heads, config.head_dim),
                "v_proj": (kv_heads, config.head_dim),
            },
            config.qkv_bias,
            ranks,
        )
        self.o_proj = RowLinear(heads, config.head_dim, config.hidden_size, config.o_bias, ranks)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.qk_norm = config.qk_norm

    def forward(
        self, x: Tensor, cos_sin: Tensor, kv_cache: Tensor, metadata: AttentionMetadata
    ) -> Tensor:
        query, key, value = (
            y.unflatten(-1, (-1, self.head_dim)) for y in self.qkv_proj(x)
        )  # each [num_tokens, heads, head_dim]
        if self.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = apply_rope(query, cos_sin), apply_rope(key, cos_sin)
        k_cache, v_cache = kv_cache
        self.backend.store_kv(key, value, k_cache, v_cache, metadata.slot_mapping)
        out = self.backend.attend(query, k_cache, v_cache, metadata, self.head_dim**-0.5)
        return self.o_proj(out.flatten(1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer, 2020)."""

    def __init__(self, config: ModelConfig, ranks: Ranks):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        outputs = {"gate_proj": (inner, 1), "up_proj": (inner, 1)}
        self.gate_up_proj = ColumnLinear(hidden, outputs, config.mlp_bias, ranks)
        self.down_proj = RowLinear(inner, 1, hidden, config.mlp_bias, ranks)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x)
        return self.down_proj(F.silu(gate) * up)


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, ranks: Ranks, backend: AttentionBackend):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, ranks, backend)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, ranks)

    def forward(
        self, x: Tensor, cos_sin: Tensor, kv_cache: Tensor, metadata: AttentionMetadata
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos_sin, kv_cache, metadata)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Token ids to hidden states."""

    rope: Tensor  # [max_len, 2, head_dim // 2] float32: cos and sin

    def __init__(self, config: ModelConfig, ranks: Ranks, backend: AttentionBackend, max_len: int):
        super().__init__()
        self.embed_tokens = VocabEmbedding(config.vocab_size, config.hidden_size, ranks)
        self.layers = nn.ModuleList(
            DecoderLayer(config, ranks, backend) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        table = rope_table(
            config.head_dim, config.rope_parameters, max_len, config.max_position_embeddings
        )
        self.register_buffer("rope", table, persistent=False)

    def forward(
        self, input_ids: Tensor, positions: Tensor, kv_cache: Tensor, metadata: AttentionMetadata
    ) -> Tensor:
        x = self.embed_tokens(input_ids)
        cos_sin = self.rope[positions]
        for layer, layer_cache in zip(self.layers, kv_cache, strict=True):
            x = layer(x, cos_sin, layer_cache, metadata)
        return self.norm(x)


class CausalLM(nn.Module):
    """A decoder and its head. `kv_cache_shape(...)` is what its forward expects."""

    def __init__(self, config: ModelConfig, ranks: Ranks, backend: AttentionBackend, max_len: int):
        super().__init__()
        self.model = Decoder(config, ranks, backend, max_len)
        self.lm_head = VocabHead(config.vocab_size, config.hidden_size, ranks)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, input_ids: Tensor, positions: Tensor, kv_cache: Tensor, metadata: AttentionMetadata
    ) -> Tensor:
        """Hidden states [num_tokens, hidden_size] of input_ids and positions [num_tokens] int64.

        kv_cache: [layers, 2, num_blocks, block_size, local kv_heads, head_dim], written in place.
        """
        return self.model(input_ids, positions, kv_cache, metadata)

    def logits(self, hidden: Tensor) -> Tensor:
        """This rank's share of the logits, [num_rows, vocab_local], of hidden rows."""
        return self.lm_head(hidden)
