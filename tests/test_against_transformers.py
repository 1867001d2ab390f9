"""The engine's greedy tokens and its logits equal transformers', in float32.

Tiny random models of every family; each way of running them switched on and off: prefix hits,
chunked prefill, preemption, overlap, company in the batch, two ranks. A switch that is on must be
seen to act, for otherwise equality would prove nothing.
"""

import random

import pytest
from reference import Greedy, assert_same_greedy, greedy_reference, reference_logits
from tiny_models import FAMILIES, ROPES, TinyModel

MAX_TOKENS = 48
MODELS = {
    "qwen3": {},
    "qwen3, tied, head size 40": {"tied": True, "head_dim": 40, "heads": 6, "kv_heads": 3},
    "qwen3, biases, 301 ids": {"attention_bias": True, "vocab": 301, "sharded": True},
    "qwen3, linear": {"rope": "linear", "kv_heads": 1, "seed": 1},
    "qwen3, llama3": {"rope": "llama3", "layers": 3, "seed": 2},
    "qwen3, yarn": {"rope": "yarn", "kv_heads": 4, "seed": 3},
    "qwen2": {"family": "qwen2"},
    "qwen2, tied, head size 24": {"family": "qwen2", "tied": True, "head_dim": 24},
    "qwen2, yarn": {"family": "qwen2", "rope": "yarn", "kv_heads": 1, "layers": 3},
    "llama": {"family": "llama"},
    "llama, tied, head size 40": {"family": "llama", "tied": True, "head_dim": 40, "kv_heads": 4},
    "llama, biases": {"family": "llama", "attention_bias": True, "mlp_bias": True, "vocab": 301},
    "llama, linear": {"family": "llama", "rope": "linear", "sharded": True},
    "llama, llama3": {"family": "llama", "rope": "llama3", "kv_heads": 1, "layers": 3},
}


def prompts() -> list[list[int]]:
    """Short, long, and three that begin alike with 40 tokens (two and a half blocks of 16)."""
    rng = random.Random(0)

    def some(n: int) -> list[int]:
        return [rng.randrange(297) for _ in range(n)]

    shared = some(40)
    return [some(3), some(17), shared + some(1), shared + some(9), some(70), shared + some(26)]


PROMPTS = prompts()
