"""The transformer, top to bottom on one page: Qwen3, Qwen2 and Llama in one decoder.

The three families differ by what their config says: biases, and norms on query and key. Tokens of
all requests stand in one flat row, without padding; only attention asks whose they are. Module
names are the checkpoint's, so `checkpoint/weights.py` needs no table of names. The linear layers
come from `parallel.py`: on one rank they are plain linears.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm.layers.attention import AttentionMetadata
from nanovllm.layers.backend import Backend
from nanovllm.layers.linear import ColumnLinear, RowLinear, VocabEmbedding, VocabHead
from nanovllm.layers.rope import rope_table
from nanovllm.model.ranks import Ranks
from nanovllm.models.model_config import ModelConfig
from nanovllm.distributed.ranks import Ranks
from nanovllm.model.model_config import ModelConfig
from nanovllm.model.parallel import ColumnLinear, RowLinear, VocabEmbedding, VocabHead
from nanovllm.model.rope import rope_table
from nanovllm.ops.attention import AttentionMetadata
from nanovllm.ops.backend import Backend


class RMSNorm(nn.Module):
    """x / rms(x) * weight, over the last dimension (Zhang and Sennrich, 2019)."""

    def __init__(self, size: int, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=config.dtype), requires_grad=False)
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention over the paged cache."""

    def __init__(self, config: ModelConfig, ranks: Ranks, backend: Backend):
        super().__init__()
        self.backend = backend
        self.scale = config.head_dim**-0.5
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        dim = config.head_dim
        outputs = {"q_proj": (heads, dim), "k_proj": (kv_heads, dim), "v_proj": (kv_heads, dim)}
        self.qkv_proj = ColumnLinear(config, ranks, outputs, config.qkv_bias, backend.linear)
        self.o_proj = RowLinear(config, ranks, (heads, dim), config.o_bias, backend.linear)
        self.q_norm = RMSNorm(dim, config) if config.qk_norm else None
        self.k_norm = RMSNorm(dim, config) if config.qk_norm else None

    def forward(
        self, x: Tensor, norm: RMSNorm, rope: Tensor, kv: Tensor, batch: AttentionMetadata
    ) -> Tensor:
        qkv = self.qkv_proj(x, norm)
        norms = None if self.q_norm is None else (self.q_norm, self.k_norm)
        query = self.backend.rope_store(qkv, norms, rope, batch, kv[0], kv[1])
        out = self.backend.attend(query, kv[0], kv[1], batch, self.scale)
        return self.o_proj(out.flatten(1), residual=x)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer, 2020)."""

    def __init__(self, config: ModelConfig, ranks: Ranks, backend: Backend):
        super().__init__()
        inner, bias = config.intermediate_size, config.mlp_bias
        outputs = {"gate_proj": (inner, 1), "up_proj": (inner, 1)}
        self.gate_up_proj = ColumnLinear(config, ranks, outputs, bias, backend.gated_linear)
        self.down_proj = RowLinear(config, ranks, (inner, 1), bias, backend.linear)

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        return self.down_proj(self.gate_up_proj(x, norm), residual=x)


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then the same with an MLP. Norms and sums are done beside products:
    a linear is handed the norm of its input, or the residual to add its output to."""

    def __init__(self, config: ModelConfig, ranks: Ranks, backend: Backend):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config)
        self.self_attn = Attention(config, ranks, backend)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config)
        self.mlp = MLP(config, ranks, backend)

    def forward(self, x: Tensor, rope: Tensor, kv: Tensor, batch: AttentionMetadata) -> Tensor:
        x = self.self_attn(x, self.input_layernorm, rope, kv, batch)
        return self.mlp(x, self.post_attention_layernorm)


class Decoder(nn.Module):
    """Token ids to hidden states, and those of them that are asked for to logits."""

    def __init__(self, config: ModelConfig, ranks: Ranks, backend: Backend, max_len: int):
        super().__init__()
        self.embed_tokens = VocabEmbedding(config, ranks)
        layers = (DecoderLayer(config, ranks, backend) for _ in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config)
        self.lm_head = VocabHead(config, ranks, backend.linear)
        self.ranks, self.backend, self.vocab_size = ranks, backend, config.vocab_size
        self.local_heads = ranks.shard(config.num_attention_heads).count
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.rope = rope_table(torch.tensor(config.rope_frequencies), max_len, config.rope_scale)

    def forward(self, input_ids: Tensor, kv_cache: Tensor, batch: AttentionMetadata) -> Tensor:
        """Hidden states [num_tokens, hidden_size], before the last norm, of input_ids [num_tokens].

        kv_cache: [layers, 2, num_blocks, block_size, local kv_heads, head_dim], written in place.
        """
        x = self.embed_tokens(input_ids)
        for layer, kv in zip(self.layers, kv_cache, strict=True):
            x = layer(x, self.rope, kv, batch)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """This rank's share of the logits, [num_rows, vocab_local], of hidden rows."""
        return self.lm_head(hidden, self.norm)
