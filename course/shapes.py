"""Shapes of published models, from their config.json: enough to predict speed and memory."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """The sizes of a model's matrices, under the names of nanovllm's ModelConfig."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int

    @property
    def dtype(self) -> Any:
        """What the weights are published in."""
        import torch

        return torch.bfloat16


PUBLISHED = {
    "Qwen3-0.6B": Shape(151_936, 1024, 3072, 28, 16, 8, 128),
    "Qwen3-8B": Shape(151_936, 4096, 12_288, 36, 32, 8, 128),
    "Llama-3.1-70B": Shape(128_256, 8192, 28_672, 80, 64, 8, 128),
}
