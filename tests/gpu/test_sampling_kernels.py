"""The sampling kernels draw the tokens that their torch twin draws, whatever the filters.

On a GPU these tests run compiled; elsewhere they run in Triton's interpreter, which must be asked
for before Triton is first imported: TRITON_INTERPRET=1 pytest tests/gpu/test_sampling_kernels.py.
"""

import math
import os
from dataclasses import fields, replace

import pytest
import torch

from nanovllm.distributed.ranks import Ranks
from nanovllm.layers import adjustments, sampler
from nanovllm.layers.sampler import log_of
from nanovllm.metadata import FORBIDDEN, IN_PROMPT, STOP, Adjustments, SamplingMetadata

CUDA = torch.cuda.is_available()
if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs an NVIDIA GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from nanovllm.kernels import sampling  # noqa: E402  (not every machine has Triton)

DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = [torch.float32, torch.bfloat16] if CUDA else [torch.float32]
VOCABULARIES = [5, 300, 9000, 49_152, 151_936] if CUDA else [300, 5000]
ROWS = 64 if CUDA else 1  # the interpreter takes a second for each row
FILTERS = {  # top_k, top_p, min_p
    "none": (0, 1.0, 0.0),
    "k 1": (1, 1.0, 0.0),
    "k 20": (20, 1.0, 0.0),
    "k 700": (700, 1.0, 0.0),
    "k 3000": (3000, 1.0, 0.0),
    "k over the vocabulary": (10**6, 1.0, 0.0),
    "p 0.95": (0, 0.95, 0.0),
    "p 0.5": (0, 0.5, 0.0),
    "p 1e-6": (0, 1e-6, 0.0),
    "p 1 - 1e-7": (0, 1 - 1e-7, 0.0),
    "m 0.1": (0, 1.0, 0.1),
    "m 1": (0, 1.0, 1.0),
    "k p": (20, 0.95, 0.0),
    "k p m": (20, 0.9, 0.05),
    "p m": (0, 0.8, 0.02),
    "large k, p": (3000, 0.7, 0.0),
    "large k, p, m": (3000, 0.7, 1e-4),
    "large k, p 1 - 1e-7": (3000, 1 - 1e-7, 0.0),
}
LOGITS = {
    "random": lambda *shape: torch.randn(shape),
    "flat": lambda *shape: torch.full(shape, 1.5),
    "peaked": lambda *shape: 8 * torch.randn(shape),
    "tied": lambda *shape: (2 * torch.randn(shape)).round(),
    "falling": lambda *shape: -torch.arange(shape[1]).float().expand(shape) / 50,
    "half forbidden": lambda *shape: torch.where(
        torch.rand(shape) < 0.5, -torch.inf, torch.randn(shape)
    ),
}

COLUMNS = [f.name for f in fields(SamplingMetadata) if f.name != "adjustments"]
KINDS = list(LOGITS) if CUDA else ["random", "tied", "half forbidden"]

pytestmark = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def parameters(rows, top_k=0, top_p=1.0, min_p=0.0, temperature=0.7):
    """The same filters and temperature in every row, and other noise."""
    row = torch.arange(rows, device=DEVICE)[:, None]
    one = torch.ones(rows, 1, device=DEVICE)
    return SamplingMetadata(
        temperature=one * temperature,
        seeds=row * 12_345_678_901 - 5,
        positions=row.int() + 3,
        top_k=(one * top_k).int(),
        top_p=one * top_p,
        log_min_p=one * log_of(min_p),
    )


def made(kind, rows, vocab_size, dtype):
    return LOGITS[kind](rows, vocab_size).to(DEVICE, dtype)


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_draw_what_torch_draws(kind, filters, dtype):
    top_k, top_p, min_p = filters
    if kind == "flat" and top_p < 1:
        top_p *= 0.9993  # so that no sum of equal probabilities is p itself, up to rounding
    for vocab_size in VOCABULARIES:
        logits = made(kind, ROWS, vocab_size, dtype)
        metadata = parameters(ROWS, top_k, top_p, min_p)
        wanted = sampler.draw(logits, metadata, whole_rows=True)
        assert sampling.draw(logits, metadata).tolist() == wanted.tolist(), vocab_size


# -- adjustments -----------------------------------------------------------------------------------


def random_adjustments(rows, vocab_size):
    """Every kind of row: plain, with a bias or without, with one penalty or several.

    All numbers have few bits, so that sums and products are exact in any order.
    """
    generator = torch.Generator().manual_seed(rows + vocab_size)

    def chosen(*values, shape=(rows, 1)):
        at = torch.randint(len(values), shape, generator=generator)
        return torch.tensor(values)[at]

    shape = (rows + 1, vocab_size)
    flags = sum(
        torch.where(torch.rand(shape, generator=generator) < 0.2, flag, 0)
        for flag in (IN_PROMPT, STOP, FORBIDDEN)
    )
    tokens = (flags + chosen(0, 0, 0, 1, 2, 7, shape=shape)).int()
    biases = chosen(0.0, 0.0, 0.5, -3.0, 2.0, shape=shape).float()
    tokens[0], biases[0] = 0, 0
    each = torch.arange(1, rows + 1)[:, None]
    integers = (each * chosen(0, 1, 1), each * chosen(0, 1), chosen(0, 5, 10**6))
    floats = (chosen(1.0, 2.0, 0.5), chosen(0.0, 0.25, -0.5), chosen(0.0, 1.5, -1.0))
    bits = [x.float().view(torch.int32) for x in floats]
    columns = torch.cat([*(x.int() for x in integers), *bits], dim=1).to(DEVICE)
    tokens, biases = tokens.to(DEVICE), biases.to(DEVICE)
    addresses = torch.tensor([tokens.data_ptr(), biases.data_ptr()], device=DEVICE)
    return Adjustments(columns, tokens, biases, addresses)


def copied(given):
    """The same with tables of its own, because a draw counts in them."""
    tokens = given.tokens.clone()
    addresses = torch.tensor([tokens.data_ptr(), given.biases.data_ptr()], device=DEVICE)
    return replace(given, tokens=tokens, addresses=addresses)


ADJUSTED_FILTERS = list(FILTERS) if CUDA else ["none", "k 20", "p 0.95", "k p m", "k 3000"]


@pytest.mark.parametrize("filters", ADJUSTED_FILTERS)
@pytest.mark.parametrize("kind", LOGITS if CUDA else ["random", "tied"])
def test_adjusted_rows_draw_and_count_what_torch_does(kind, filters, dtype):
    rows = 64 if CUDA else 6
    for vocab_size in VOCABULARIES if CUDA else [300]:
        logits = made(kind, rows, vocab_size, dtype)
        logits = (logits * 8).round() / 8  # few bits here too
        raw, given = logits.clone(), random_adjustments(rows, vocab_size)
        for temperature in (0.5, 0.0):
            metadata = parameters(rows, *FILTERS[filters], temperature=temperature)
            outside = rows // 2
            metadata.positions[outside] = -1  # no row of the batch: it counts nothing
            ours, twins = copied(given), copied(given)
            wanted = sampler.draw(logits, replace(metadata, adjustments=twins), whole_rows=True)
            found = sampling.draw(logits, replace(metadata, adjustments=ours))
            wanted[outside] = found[outside]
            assert found.tolist() == wanted.tolist(), vocab_size
            assert torch.equal(ours.tokens, twins.tokens)
            counted = (ours.tokens - given.tokens).sum(dim=1)
            has_row = (given.columns[:, 0] > 0) & (metadata.positions[:, 0] >= 0) & (found >= 0)
            assert counted[1:].tolist() == has_row.int().tolist()
            assert torch.equal(logits, raw)


def test_a_plain_row_is_the_same_beside_adjusted_ones(dtype):
    """And an adjusted row is the same wherever its entries are in the tables."""
    rows, vocab_size = (64, 151_936) if CUDA else (5, 300)
    logits, metadata = made("random", rows, vocab_size, dtype), parameters(rows, 20, 0.9)
    plain = sampling.draw(logits, metadata)
    given = random_adjustments(rows, vocab_size)
    found = sampling.draw(logits, replace(metadata, adjustments=copied(given)))
    unadjusted = given.columns[:, 0] == 0
    assert 0 < unadjusted.sum() < rows
    assert found[unadjusted].tolist() == plain[unadjusted].tolist()
    assert found[~unadjusted].tolist() != plain[~unadjusted].tolist()
    order = torch.randperm(rows) + 1
    order = torch.cat((torch.zeros(1).long(), order)).to(DEVICE)  # old row -> new row
    moved = given.columns.clone()
    moved[:, :2] = order[moved[:, :2].long()].int()
    back = order.argsort()
    tables = replace(given, columns=moved, tokens=given.tokens[back], biases=given.biases[back])
    again = sampling.draw(logits, replace(metadata, adjustments=copied(tables)))
    assert again.tolist() == found.tolist()


def test_an_adjusted_row_to_which_nothing_is_left_gets_no_id_and_counts_nothing(dtype):
    given = random_adjustments(3, 300)
    given.columns[:, :2] = torch.tensor([[1, 0], [2, 0], [0, 0]])
    given.tokens[2] |= FORBIDDEN
    before = given.tokens.clone()
    logits = made("random", 3, 300, dtype)
    for filters in ((0, 1.0, 0.0), (20, 0.9, 0.1)):
        metadata = replace(parameters(3, *filters), adjustments=given)
        ids = sampling.draw(logits, metadata).tolist()
        assert [token_id < 0 for token_id in ids] == [False, True, False]
        assert torch.equal(given.tokens[2], before[2])


@pytest.mark.skipif(not CUDA, reason="200,000 rows take an NVIDIA GPU")
@pytest.mark.parametrize("top_p", [0.5, 1 - 1e-7])
def test_draws_follow_the_adjusted_softmax(top_p, dtype):
    """Bit for bit only few numbers are exact; here penalties are any numbers, as users' are."""
    rows, vocab_size = 200_000, 40
    given = random_adjustments(1, vocab_size)
    penalties = torch.tensor([[1.37, 0.21, 0.83]]).view(torch.int32).to(DEVICE)
    given.columns[:] = torch.cat((torch.tensor([[1, 1, 5]]).int().to(DEVICE), penalties), dim=1)
    logits = torch.linspace(-2, 2, vocab_size, device=DEVICE).to(dtype).repeat(rows, 1)
    metadata = parameters(rows, 0, top_p)
    expected = logits[:1].float()
    adjustments.adjust(expected, given, metadata.positions[:1])
    limits = (torch.tensor([[x]], device=DEVICE) for x in (0, top_p, -math.inf))
    expected = sampler.filter_scores(expected / 0.7, *limits)[0].softmax(0) * rows
    tables = copied(given)
    still = replace(tables, columns=given.columns.expand(rows, -1).contiguous())
    metadata.positions[:] = -1  # so that no draw is counted; the noise follows the seed
    counts = sampling.draw(logits, replace(metadata, adjustments=still)).bincount(
        minlength=vocab_size
    )
    kept = expected > 0
    assert not counts[~kept].any()
    chi2 = float(((counts - expected)[kept] ** 2 / expected[kept]).sum())
    freedom = int(kept.sum()) - 1
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom) + 8, f"{chi2:.1f} with {freedom} degrees"


# -- what is kept ----------------------------------------------------------------------------------


def kept_by_the_kernels(logits, metadata, monkeypatch):
    """Bools [num_rows, vocab_size]: what the kernels that look for the last kept token say."""
    found: list = []
    monkeypatch.setattr(sampling, "_draw", lambda *args: found.extend(args[3]))  # and draw nothing
    with pytest.raises(TypeError):
        sampling.draw(logits, metadata)
    _, scores, counts = found
    largest, last_score, open_mass = scores.split(1, dim=1)
    _, _, last_id, open_count = counts.split(1, dim=1)
    values = sampler.scale(logits, metadata)
    ids = torch.arange(values.shape[1], device=DEVICE)
    place, before = places((values - largest).double().exp(), values)
    kept = (values > last_score) | ((values == last_score) & (ids <= last_id))
    kept &= (place < open_count) & ((before < open_mass) | (place == 0))
    return kept & (values > -torch.inf)


def places(mass, values):
    """Each token's place in the filters' order, and the mass before it."""
    order = values.sort(dim=1, descending=True, stable=True).indices
    place, mass = order.argsort(dim=1), mass.gather(1, order)
    return place, (mass.cumsum(dim=1) - mass).gather(1, place)


@pytest.mark.parametrize("vocab_size", [5, 300, 4100] + [151_936] * CUDA)
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_keep_what_torch_keeps(kind, vocab_size, dtype, monkeypatch):
    """Of every token, unless the probability of those before it is within 1e-6 of top-p."""
    top_k, top_p, min_p = torch.tensor([x for x in FILTERS.values() if x != FILTERS["none"]]).T
    limits = [x[:, None].contiguous().to(DEVICE) for x in (top_k.int(), top_p, min_p.log())]
    metadata = parameters(len(top_k))
    metadata = replace(metadata, top_k=limits[0], top_p=limits[1], log_min_p=limits[2])
    logits = made(kind, 1, vocab_size, dtype).repeat(len(top_k), 1)
    scores = sampler.scale(logits, metadata)
    wanted = sampler.filter_scores(scores, *limits) > -torch.inf
    others = sampler.filter_scores(scores, limits[0], torch.ones_like(limits[1]), limits[2])
    _, before = places(others.double().softmax(dim=1), scores)
    near = ((before - limits[1]).abs() <= 1e-6) & (limits[1] < 1)
    assert near.float().mean() < 0.5
    differs = (kept_by_the_kernels(logits, metadata, monkeypatch) != wanted) & ~near
    assert not differs.any(), differs.nonzero().tolist()[:9]


def test_rows_with_other_filters_do_not_meet(dtype):
    """One batch with every kind of row, greedy ones included, equals each row alone."""
    vocab_size = VOCABULARIES[-2]
    settings = [(*filters, heat) for filters in FILTERS.values() for heat in (0.0, 0.7)]
    settings = settings if CUDA else settings[::3]
    alone = [parameters(1, *filters) for filters in settings]
    together = SamplingMetadata(*(torch.cat([getattr(x, name) for x in alone]) for name in COLUMNS))
    logits = made("random", len(settings), vocab_size, dtype)
    found = sampling.draw(logits, together).tolist()
    assert found == sampler.draw(logits, together, whole_rows=True).tolist()
    for row, metadata in enumerate(alone):
        assert found[row] == int(sampling.draw(logits[row : row + 1], metadata))


@pytest.mark.parametrize(
    "limits", [(0, 0.0), (2000, 0.0), (0, 1e-4)], ids=["alone", "behind top-k", "behind min-p"]
)
def test_a_top_p_that_is_zero_in_float32_keeps_the_likeliest_token(limits, dtype):
    """A request may ask for a top-p of 1e-50. So many tokens are left to it that none is sorted."""
    top_k, min_p = limits
    logits = torch.randn(1, 3000).to(DEVICE, dtype)
    metadata = parameters(1, top_k, 1e-50, min_p)
    assert metadata.top_p == 0
    assert sampling.draw(logits, metadata).tolist() == logits.argmax(dim=1).tolist()


@pytest.mark.skipif(not CUDA, reason="200,000 rows take an NVIDIA GPU")
@pytest.mark.parametrize("filters", [(0, 0.8, 0.0), (7, 1.0, 0.0), (9, 0.8, 0.02)], ids=str)
def test_draws_follow_the_filtered_softmax(filters, dtype):
    rows, vocab_size = 200_000, 40
    logits = torch.linspace(-2, 2, vocab_size, device=DEVICE).to(dtype).repeat(rows, 1)
    counts = sampling.draw(logits, parameters(rows, *filters)).bincount(minlength=vocab_size)
    limits = (torch.tensor([[x]], device=DEVICE) for x in (*filters[:2], log_of(filters[2])))
    expected = sampler.filter_scores(logits[:1].float() / 0.7, *limits)[0].softmax(0) * rows
    kept = expected > 0
    assert not counts[~kept].any()
    chi2 = float(((counts - expected)[kept] ** 2 / expected[kept]).sum())
    freedom = int(kept.sum()) - 1
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom) + 8, f"{chi2:.1f} with {freedom} degrees"


@pytest.mark.parametrize("first_id", [0, 1203])
def test_the_best_of_a_part_of_the_vocabulary(first_id, dtype):
    """A rank's part may begin anywhere. Equal scores go to the lowest id."""
    logits = 3 * torch.randn(6, 1501).to(DEVICE, dtype)
    metadata = parameters(6)
    metadata.temperature[:, 0] = torch.tensor([0, 0.5, 1.0, 2.0, 0, 1.0])
    logits[4] = 1.0
    wanted = sampler.local_argmax(logits, metadata, first_id)[1]
    found = Ranks().all_reduce_argmax(*sampling.local_argmax(logits, metadata, first_id))
    assert found.tolist() == wanted.tolist()
    assert found[4] == first_id


@pytest.mark.parametrize("filters", [FILTERS[name] for name in ("none", "k p m", "p 0.5")], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_row_whose_best_score_is_not_finite_gets_no_id(bad, filters, dtype):
    """One bad logit in the first or the last chunk, and a row of nothing else."""
    logits = torch.randn(5, 1501).to(DEVICE, dtype)
    logits[1, 7] = logits[2, 1500] = bad
    logits[3] = bad
    for temperature in (0.0, 0.8):
        metadata = parameters(5, *filters, temperature=temperature)
        found = sampling.draw(logits, metadata).tolist()
        assert found == sampler.draw(logits, metadata, whole_rows=True).tolist()
        bad_rows = [3] if bad == -torch.inf else [1, 2, 3]
        assert [row for row, token_id in enumerate(found) if token_id == -1] == bad_rows
        parts = Ranks().all_reduce_argmax(*sampling.local_argmax(logits, metadata, 0)).squeeze(1)
        assert [row for row, token_id in enumerate(parts) if token_id == -1] == bad_rows
