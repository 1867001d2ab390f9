"""The sampler draws from the right distribution, and a row's draw does not depend on its mates."""

from dataclasses import fields

import pytest
import torch

from nanovllm.distributed.ranks import Ranks
from nanovllm.layers import sampler
from nanovllm.layers.backend import TORCH_BACKEND
from nanovllm.layers.sampler import filter_scores, log_of, philox, sample
from nanovllm.metadata import SamplingMetadata

VOCAB = 10
COLUMNS = [f.name for f in fields(SamplingMetadata) if f.name != "adjustments"]


def limits(rows, top_k=0, top_p=1.0, min_p=0.0):
    return [torch.full((rows, 1), value) for value in (top_k, top_p, log_of(min_p))]


def metadata(rows, temperature=1.0, seeds=None, **filters):
    seeds = torch.arange(rows) if seeds is None else seeds
    position = torch.full((rows, 1), 7)
    temperature = torch.full((rows, 1), temperature)
    return SamplingMetadata(temperature, seeds[:, None], position, *limits(rows, **filters))


def draw(logits, filters=None, **options):
    asked = metadata(len(logits), **(filters or {}), **options)
    return sample(logits, asked, Ranks(), logits.shape[1], TORCH_BACKEND, bool(filters))


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


def test_only_rows_with_filters_are_filtered_and_only_those_without_top_k_sort_it_all(monkeypatch):
    settings = [{}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 2, "top_p": 0.7}]
    rows = [metadata(1, heat, **options) for options in settings for heat in (0.0, 1.0)]
    together = SamplingMetadata(
        *(torch.cat([getattr(row, name) for row in rows]) for name in COLUMNS)
    )
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(2))
    alone = [sampler.draw(logits[i : i + 1], row, True) for i, row in enumerate(rows)]
    filtered = []

    def noted(scores, top_k, *limits):
        filtered.append(top_k.flatten().tolist())
        return filter_scores(scores, top_k, *limits)

    monkeypatch.setattr(sampler, "filter_scores", noted)
    assert sampler.draw(logits, together, True).tolist() == torch.cat(alone).tolist()
    assert filtered == [[3, 2], [0, 0]]


@pytest.mark.parametrize(
    "filters",
    [{"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.8, "min_p": 0.02}],
    ids=str,
)
def test_filtered_draws_follow_the_exact_probabilities(filters):
    rows, size = 200_000, 40
    logits = torch.linspace(-2, 2, size)
    order = logits.argsort(descending=True)
    probs = logits[order].double().softmax(0)
    probs[probs < filters.get("min_p", 0) * probs[0]] = 0
    probs[filters.get("top_k", size) :] = 0
    probs /= probs.sum()
    probs[probs.cumsum(0) - probs >= filters.get("top_p", 2.0)] = 0
    expected = torch.zeros(size).double().index_copy(0, order, probs / probs.sum()) * rows
    counts = torch.cat(
        [
            draw(logits.repeat(10_000, 1), filters, seeds=torch.arange(first, first + 10_000))
            for first in range(0, rows, 10_000)
        ]
    ).bincount(minlength=size)
    likely = expected > 0
    assert counts[~likely].sum() == 0
    chi2 = float(((counts - expected)[likely] ** 2 / expected[likely]).sum())
    freedom = int(likely.sum()) - 1
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5, f"{chi2:.1f} with {freedom} degrees"


def test_filters_equal_the_warpers_of_transformers():
    """In vLLM's order: min-p, then top-k, then top-p over what is left."""
    from transformers.generation.logits_process import (
        MinPLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    generator = torch.Generator().manual_seed(3)
    for size in (5, 1000, 50_000):
        scores = 2 * torch.randn(4, size, generator=generator)
        for top_k, top_p, min_p in [(3, 0.9, 0.05), (400, 0.3, 1e-4), (1, 0.5, 0.5), (20, 0.95, 0)]:
            wanted = scores
            if min_p:
                wanted = MinPLogitsWarper(min_p)(None, wanted)
            wanted = TopKLogitsWarper(top_k)(None, wanted)
            wanted = TopPLogitsWarper(top_p)(None, wanted)
            found = filter_scores(scores, *limits(4, top_k, top_p, min_p))
            assert torch.equal(found, wanted), (size, top_k, top_p, min_p)


def test_the_lowest_ids_of_equal_scores_stay():
    scores = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0])
    assert kept(scores, top_k=3) == [1, 2, 3]
    assert kept(torch.zeros(10), top_k=4) == [0, 1, 2, 3]
    assert kept(torch.zeros(10), top_p=0.45) == [0, 1, 2, 3, 4]
    assert kept(torch.zeros(10), min_p=1.0) == [*range(10)]


def test_a_limit_that_keeps_everything_keeps_everything():
    for options in ({"top_k": 10**6}, {"top_p": 1.0}, {"min_p": 0.0}, {"top_p": 1 - 1e-7}):
        assert kept(torch.arange(9.0) / 9, **options) == [*range(9)]
