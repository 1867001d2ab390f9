"""What transformers says, in float32: the reference that the engine is held to.

A row of a matrix product differs by about 1e-6 between batch sizes, so two tokens whose logits are
almost equal may change places. Greedy tokens are therefore compared up to the first step where
the best two logits are closer than TIE, and such steps are counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

TIE = 1e-4


@dataclass(frozen=True)
class Greedy:
    """One prompt's greedy continuation."""

    tokens: tuple[int, ...]
    gaps: tuple[float, ...]  # at each step, best logit minus second best

    @property
    def certain(self) -> int:
        """How many tokens come before the first near tie."""
        return next((i for i, gap in enumerate(self.gaps) if gap < TIE), len(self.gaps))


@lru_cache(maxsize=32)
def reference_model(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """transformers' model in `path`, with its plain attention."""
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation="eager", local_files_only=True
    )
    return model.eval()


@torch.no_grad()
def reference_logits(
    path: Path, token_ids: Sequence[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Logits [len(token_ids), vocab_size] after each token of one text."""
    return reference_model(path, dtype)(torch.tensor([[*token_ids]])).logits[0]


def greedy_reference(path: Path, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Greedy]:
    """Each prompt's `max_tokens` greedy tokens; nothing ends them sooner."""
    return [_greedy(path, tuple(prompt), max_tokens) for prompt in prompts]


@lru_cache(maxsize=1024)
@torch.no_grad()
def _greedy(path: Path, prompt: tuple[int, ...], max_tokens: int) -> Greedy:
    model, cache, new = reference_model(path), None, torch.tensor([prompt])
    tokens, gaps = [], []
    for _ in range(max_tokens):
        out = model(new, past_key_values=cache, use_cache=True)
        cache, best = out.past_key_values, out.logits[0, -1].topk(2)
        tokens.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
        new = best.indices[:1][None]
    return Greedy(tuple(tokens), tuple(gaps))


def assert_same_greedy(ours: Sequence[Sequence[int]], reference: Sequence[Greedy]) -> int:
    """Require equal tokens up to each text's first near tie; return how many texts have one.

    Also fail if the ties leave less than three quarters of the tokens compared.
    """
    assert len(ours) == len(reference)
    for i, (tokens, expected) in enumerate(zip(ours, reference, strict=True)):
        n = expected.certain
        assert len(tokens) == len(expected.tokens), f"text {i}: {len(tokens)} tokens"
        assert tuple(tokens[:n]) == expected.tokens[:n], f"text {i} differs"
    compared = sum(expected.certain for expected in reference)
    total = sum(len(expected.tokens) for expected in reference)
    assert compared >= 0.75 * total, f"near ties leave only {compared} of {total} tokens compared"
    return sum(expected.certain < len(expected.tokens) for expected in reference)
