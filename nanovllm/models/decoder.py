"""The transformer on one page: one decoder serves Qwen3, Qwen2 and Llama.

The three families differ only in what their config says, which is whether there are biases, and
whether queries and keys are normalized. The tokens of all requests form one flat batch without
padding, and only attention needs to know which request a token belongs to. The modules have the
checkpoint's names, so the loader needs no table of names.
"""

import torch
from torch import Tensor, nn

from nanovllm.distributed.ranks import Ranks
from nanovllm.layers.backend import Backend
from nanovllm.layers.linear import (
    ColumnParallelLinear,
    ParallelLMHead,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from nanovllm.layers.norm import RMSNorm
from nanovllm.layers.rope import rope_table
from nanovllm.metadata import AttentionMetadata
from nanovllm.models.model_config import ModelConfig


class Attention(nn.Module):
    """Grouped-query attention over the paged cache, between the projections `qkv` and `o`."""

    def __init__(self, config: ModelConfig, ranks: Ranks, backend: Backend):
        super().__init__()
        self.backend = backend
        self.scale = config.head_dim**-0.5
        hidden, dim = config.hidden_size, config.head_dim
        eps, dtype = config.rms_norm_eps, config.dtype
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        outputs = {"q_proj": (heads, dim), "k_proj": (kv_heads, dim), "v_proj": (kv_heads, dim)}
        shared = (dtype, ranks, backend)
        self.qkv_proj = ColumnParallelLinear(hidden, outputs, config.qkv_bias, *shared)
        self.o_proj = RowParallelLinear((heads, dim), hidden, config.o_bias, *shared)
        self.q_norm = RMSNorm(dim, eps, dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(dim, eps, dtype) if config.qk_norm else None

    def forward(
        self, qkv: Tensor, rope: Tensor, kv_cache: Tensor, metadata: AttentionMetadata
    ) -> Tensor:
        """Store keys and values, then attend: [num_tokens, local heads * head_dim].

        qkv: [num_tokens, (heads + 2 kv_heads) * head_dim], this rank's output of `qkv_proj`.
        """
        k_cache, v_cache = kv_cache.unbind()
        norms = None if self.q_norm is None else (self.q_norm, self.k_norm)
        query = self.backend.rope_store(qkv, norms, rope, metadata, k_cache, v_cache)
        out = self.backend.paged_attention(query, k_cache, v_cache, metadata, self.scale)
        return out.flatten(1)


class MLP(nn.Module):
    """The two projections of SwiGLU: down(silu(gate(x)) * up(x)). `DecoderLayer` applies them."""

    def __init__(self, config: ModelConfig, ranks: Ranks, backend: Backend):
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        outputs = {"gate_proj": (inner, 1), "up_proj": (inner, 1)}
        shared = (config.dtype, ranks, backend)
        self.gate_up_proj = ColumnParallelLinear(hidden, outputs, bias, *shared)
        self.down_proj = RowParallelLinear((inner, 1), hidden, bias, *shared)


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, ranks: Ranks, backend: Backend):
        super().__init__()
        hidden, eps, dtype = config.hidden_size, config.rms_norm_eps, config.dtype
        self.input_layernorm = RMSNorm(hidden, eps, dtype)
        self.self_attn = Attention(config, ranks, backend)
        self.post_attention_layernorm = RMSNorm(hidden, eps, dtype)
        self.mlp = MLP(config, ranks, backend)

    def forward(
        self, x: Tensor, rope: Tensor, kv_cache: Tensor, metadata: AttentionMetadata
    ) -> Tensor:
        """Return hidden states [num_tokens, hidden_size] of x, which has the same shape.

        kv_cache: [2, num_blocks, block_size, local kv_heads, head_dim].
        """
        attn, mlp = self.self_attn, self.mlp
        qkv = attn.qkv_proj.norm_linear(x, self.input_layernorm)
        heads = attn(qkv, rope, kv_cache, metadata)
        x = attn.o_proj.linear_add(heads, residual=x)

        gated = mlp.gate_up_proj.norm_swiglu(x, self.post_attention_layernorm)
        return mlp.down_proj.linear_add(gated, residual=x)


class Decoder(nn.Module):
    """The whole model: token ids to hidden states, and hidden states to logits."""

    def __init__(self, config: ModelConfig, ranks: Ranks, backend: Backend, max_positions: int):
        super().__init__()
        vocab_size, hidden, dtype = config.vocab_size, config.hidden_size, config.dtype
        self.embed_tokens = VocabParallelEmbedding(vocab_size, hidden, dtype, ranks)
        layers = (DecoderLayer(config, ranks, backend) for _ in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(hidden, config.rms_norm_eps, dtype)
        self.lm_head = ParallelLMHead(vocab_size, hidden, dtype, ranks, backend)
        self.ranks, self.backend, self.vocab_size = ranks, backend, vocab_size
        self.num_local_heads = ranks.shard(config.num_attention_heads).count
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        frequencies = torch.tensor(config.rope_frequencies)
        self.rope = rope_table(frequencies, max_positions, config.rope_scale)

    def forward(self, input_ids: Tensor, kv_cache: Tensor, metadata: AttentionMetadata) -> Tensor:
        """Return hidden states [num_tokens, hidden_size], before the last norm.

        input_ids: [num_tokens]. kv_cache: [layers, 2, num_blocks, block_size, local kv_heads,
        head_dim]; each layer writes its new keys and values to its part.
        """
        x = self.embed_tokens(input_ids)
        for layer, layer_cache in zip(self.layers, kv_cache, strict=True):
            x = layer(x, self.rope, layer_cache, metadata)
        return x

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Return this rank's logits [num_rows, local vocab] of hidden states [num_rows, hidden]."""
        return self.lm_head.norm_linear(hidden, self.norm)
