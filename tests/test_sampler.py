"""The sampler draws from the right distribution, and a row's draw does not depend on its mates."""

import pytest
import torch

from nanovllm.model.ranks import Ranks
from nanovllm.ops.sampler import (
    Filters,
    SamplingMetadata,
    candidates,
    filter_scores,
    philox,
    sample,
    sample_filtered,
)

VOCAB = 10


def limits(rows, top_k=VOCAB, top_p=1.0, min_p=0.0):
    return [torch.full((rows, 1), value) for value in (top_k, top_p, min_p)]


def metadata(rows, temperature=1.0, seeds=None):
    seeds = torch.arange(rows) if seeds is None else seeds
    position = torch.full((rows, 1), 7)
    return SamplingMetadata(torch.full((rows, 1), temperature), seeds[:, None], position)


def draw(logits, filters=None, **options):
    asked = metadata(len(logits), **options)
    if filters:
        filters = Filters(*limits(len(logits), **filters))
        return sample_filtered(logits, asked, filters, Ranks(), logits.shape[1])
    return sample(logits, asked, Ranks(), logits.shape[1], candidates)


def test_philox_known_answers():
    """The first words of Philox-4x32-10 in the Random123 library's known-answer file."""
    zero = torch.zeros(1, 1, dtype=torch.int64)
    words = philox(zero, zero, torch.zeros(1, dtype=torch.int64))
    assert [hex(int(w)) for w in words] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    rows = 40_000
    logits = torch.linspace(-2, 2, VOCAB)
    counts = draw(logits.repeat(rows, 1), temperature=temperature).bincount(minlength=VOCAB)
    expected = (logits / temperature).softmax(0) * rows
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert chi2 < 27.9, f"chi-squared {chi2:.1f} with 9 degrees of freedom (p < 0.001)"


def test_a_draw_is_independent_of_its_batch_mates():
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    together = draw(logits)
    alone = [draw(logits[i : i + 1], seeds=torch.tensor([i])) for i in range(64)]
    assert together.tolist() == torch.cat(alone).tolist()
    assert len(set(together.tolist())) > 32


def test_greedy_takes_the_lowest_id_of_equals():
    assert draw(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), temperature=0.0).tolist() == [1]


def kept(scores, **options):
    finite = filter_scores(scores[None], *limits(1, **options))[0].isfinite()
    return finite.nonzero().flatten().tolist()


def test_filters_keep_what_they_should():
    scores = torch.tensor([0.5, 0.3, 0.1, 0.06, 0.04]).log()
    assert kept(scores, top_k=2) == [0, 1]
    assert kept(scores, top_p=0.79) == [0, 1]  # 0.5 + 0.3 is enough
    assert kept(scores, top_p=0.81) == [0, 1, 2]
    assert kept(scores, min_p=0.15) == [0, 1, 2]  # at least 0.075
    assert kept(scores, top_p=1e-9) == [0]
    assert kept(scores, top_k=2, top_p=0.6) == [0]  # of two, the first has 0.625
    assert kept(scores) == [0, 1, 2, 3, 4]


def test_a_filter_does_not_shift_the_noise():
    logits = torch.randn(200, VOCAB, generator=torch.Generator().manual_seed(1))
    free, filtered = draw(logits), draw(logits, {"top_k": 3})
    top = logits.topk(3).indices
    inside = (free[:, None] == top).any(dim=1)
    assert 0 < inside.sum() < 200
    assert free[inside].tolist() == filtered[inside].tolist()
