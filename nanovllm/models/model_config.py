"""ModelConfig: what the decoder needs to know about a model."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer. `checkpoint/config_json.py` reads it from a config.json.

    Most fields have the names that transformers gives them.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    derived_max_model_len: int  # positions that a request may have, by vLLM's rule
    rms_norm_eps: float
    tie_word_embeddings: bool  # the head's weight is the embedding's
    head_dim: int
    rope_frequencies: tuple[float, ...]  # [head_dim // 2], see layers/rope.py
    rope_scale: float  # what cos and sin are multiplied by
    qk_norm: bool  # RMSNorm of each head's query and key, before RoPE
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    dtype: torch.dtype  # to compute in; after reading, the dtype of the stored weights
    eos_token_ids: tuple[int, ...]  # may be empty: generation_config.json can have them instead


def check_tensor_parallel_size(config: ModelConfig, size: int) -> None:
    """Raise ValueError unless `size` ranks can divide the model's heads and features.

    If there are fewer KV heads than ranks, several ranks hold a copy of the same head.
    """
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        units = getattr(config, name)
        is_replicated = name == "num_key_value_heads" and size % units == 0
        if units % size and not is_replicated:
            raise ValueError(f"tensor_parallel_size={size} does not divide {name}={units}")
