"""Sampling kernels: draw one token of each row by Gumbel noise, among those that its filters keep.

Four kernels first find the last token that a row's filters keep (`kernels/filters.py`). Then two
kernels draw.

1. `draw_kernel` adds Gumbel noise to the kept scores, and finds the best of every 512 tokens.
2. `choose_kernel` takes the best of these.

Where a row's limit is open, no kernel before the last one knows at which token it cuts. The last
one counts the tokens before the winner, or sums their probabilities, and accepts the winner if the
result is below the limit. Otherwise neither the winner nor any token behind it is kept, so the row
draws again from the tokens before it. This is the rejection of FlashInfer's sampler (Ye et al.,
arXiv:2501.01005). Our noise is a function of the token id, so the result is the same as if the
limit had been resolved beforehand.

A NaN counts as infinity, and a row whose best score is not finite gets the id -1. The last kernel
counts the token that it has chosen, if the row has adjustments.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.adjustments import as_arguments, count_token
from nanovllm.kernels.filters import (
    INF,
    LARGEST,
    LAST_ID,
    LAST_POSSIBLE_ID,
    LAST_SCORE,
    MINUS_INF,
    MODE,
    NUM_COUNTS,
    NUM_SCORES,
    OPEN_COUNT,
    OPEN_MASS,
    PLAIN,
    SPAN,
    SPANS,
    find_last_kept,
    is_before,
    load_scores,
    tokens_before,
)
from nanovllm.metadata import SamplingMetadata

QUADS = 128  # a draw makes noise for four tokens at a time


@triton.jit
def gumbel_noise(seed, position, quad, SIZE: tl.constexpr):
    """Noise [SIZE, 4] of the token ids 4 * quad + (0, 1, 2, 3); see `sampler.gumbel_noise`."""
    zero = quad * 0
    w0, w1, w2, w3 = tl.philox(seed, quad, zero + position.to(tl.int32), zero, zero)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [SIZE, 4])
    uniform = ((words >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -tl.log(-tl.log(uniform))


@triton.jit
def best_of(scores, ids):
    """The largest score and its id, the lowest if several have it."""
    best = tl.max(scores)
    return best, tl.min(tl.where(scores == best, ids, LAST_POSSIBLE_ID))


@triton.jit
def draw_kernel(
    logits, temperature, seeds, positions, adjust, maxima, scores, counts, best_out, ids_out,
    first_id, num_ids, num_spans, stride, seed_stride, position_stride,
    FILTERS: tl.constexpr, SPAN: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """One program: the best of 4 * QUADS ids of one row, by score + Gumbel noise.

    The logits are those of ids first_id and up; with FILTERS, first_id is 0. A greedy row has the
    temperature 0, and neither noise nor filters.
    """
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heat = tl.load(temperature + row * stride)
    score, last_id, any_kept = MINUS_INF, LAST_POSSIBLE_ID, True
    if FILTERS:  # noqa: SIM102  (a constant: without filters there are no counts to load)
        if tl.load(counts + row * NUM_COUNTS + MODE) != PLAIN:
            score = tl.load(scores + row * NUM_SCORES + LAST_SCORE)
            last_id = tl.load(counts + row * NUM_COUNTS + LAST_ID)
            span = chunk * 4 * QUADS // SPAN + tl.arange(0, 4 * QUADS // SPAN)
            spans = maxima + row * num_spans + span
            any_kept = tl.max(tl.load(spans, span < num_spans, MINUS_INF)) >= score
    best, winner = MINUS_INF, LAST_POSSIBLE_ID
    if any_kept:
        seed = tl.load(seeds + row * seed_stride)
        position = tl.load(positions + row * position_stride)
        best, winner = best_of_chunk(
            logits,
            row,
            first_id,
            num_ids,
            heat,
            adjust,
            seed,
            position,
            chunk,
            score,
            last_id,
            QUADS,
        )
    at = row * tl.num_programs(1) + chunk
    tl.store(best_out + at, best)
    tl.store(ids_out + at, tl.where(tl.abs(best) < INF, winner, -1))  # -1: NO_TOKEN


@triton.jit
def best_of_chunk(
    logits, row, first_id, num_ids, temperature, adjust, seed, position, chunk, score, last_id,
    QUADS: tl.constexpr,
):  # fmt: skip
    """The best perturbed score of a chunk's tokens that are not behind (score, last_id); its id.

    Philox gives four words at a time, so ids lie four by four; see `sampler.gumbel_noise`.
    """
    quad = first_id // 4 + chunk * QUADS + tl.arange(0, QUADS)
    ids = quad[:, None] * 4 + tl.arange(0, 4)[None, :]
    heat = tl.where(temperature > 0.0, temperature, 1.0)
    values = load_scores(logits, row, ids - first_id, num_ids, heat, adjust)
    kept = (values > score) | ((values == score) & (ids <= last_id))
    if temperature > 0.0:
        values += gumbel_noise(seed, position, quad, QUADS)
    return best_of(tl.where(kept, values, MINUS_INF), ids)


@triton.jit
def choose_kernel(
    logits, temperature, seeds, positions, adjust, scores, counts, best_in, ids_in, chosen,
    num_ids, chunks, stride, seed_stride, position_stride,
    WIDTH: tl.constexpr, TILE: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """One program: a row's next id, or -1 if its best score is not finite.

    Where a limit is open, the winner must come before the limit. If it does not, only tokens before
    the winner can still be drawn, so the best of each chunk whose winner is not among these is
    found once more. The first token of the order is always accepted, even if top-p is so small that
    it is 0 in float32. So each rejection leaves tokens to draw from, and the loop ends.
    """
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, WIDTH)
    at = row * chunks + chunk
    best = tl.load(best_in + at, chunk < chunks, MINUS_INF)
    ids = tl.load(ids_in + at, chunk < chunks, LAST_POSSIBLE_ID)
    perturbed, winner = best_of(best, ids)
    finite = (perturbed > MINUS_INF) & (perturbed < INF)
    open_mass = tl.load(scores + row * NUM_SCORES + OPEN_MASS)
    open_count = tl.load(counts + row * NUM_COUNTS + OPEN_COUNT)
    searching = finite & ((open_mass < INF) | (open_count < LAST_POSSIBLE_ID))
    largest, heat = (
        tl.load(scores + row * NUM_SCORES + LARGEST),
        tl.load(temperature + row * stride),
    )
    seed, position = tl.load(seeds + row * seed_stride), tl.load(positions + row * position_stride)
    limit = tl.full((), MINUS_INF, tl.float32)  # all tokens come before it
    limit_id = tl.full((), LAST_POSSIBLE_ID, tl.int32)
    while searching:
        score = load_scores(logits, row, winner, num_ids, heat, adjust)
        if is_before(score, winner, limit, limit_id):
            number, mass = tokens_before(
                logits, row, num_ids, heat, adjust, largest, score, winner, TILE
            )
            searching = (number > 0) & ((mass >= open_mass) | (number >= open_count))
            if searching:
                limit, limit_id = score, winner
        else:
            which = winner // (4 * QUADS)
            again, its_id = best_of_chunk(
                logits, row, 0, num_ids, heat, adjust, seed, position, which, limit, limit_id - 1,
                QUADS,
            )  # fmt: skip
            best, ids = tl.where(chunk == which, again, best), tl.where(chunk == which, its_id, ids)
            perturbed, winner = best_of(best, ids)
    tl.store(chosen + row, tl.where(finite, winner, -1))
    if adjust is not None:  # noqa: SIM102  (a constant, as FILTERS is)
        if finite:
            count_token(row, winner, num_ids, adjust)


# -- launching -----------------------------------------------------------------------------------


def local_argmax(
    logits: Tensor, metadata: SamplingMetadata, first_id: int
) -> tuple[Tensor, Tensor]:
    """As `sampler.local_argmax`; here one for each 512 ids, and NaN has the score infinity."""
    return _draw(logits, metadata, first_id)


def draw(logits: Tensor, metadata: SamplingMetadata, whole_rows: bool = True) -> Tensor:
    """As `sampler.draw`. The kernels see for themselves which rows have filters or adjustments.

    The temperature and the three filter parameters must have one stride, as columns of one table
    and tensors [num_rows, 1] of their own have.
    """
    (num_rows, num_ids), heat = logits.shape, metadata.temperature
    adjust = as_arguments(metadata.adjustments, metadata.positions)
    filters = (heat, metadata.top_k, metadata.top_p, metadata.log_min_p)
    kept = _, scores, counts = find_last_kept(logits, filters, adjust)
    best, ids = _draw(logits, metadata, 0, kept, adjust)
    chosen = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    choose_kernel[(num_rows,)](
        logits, heat, metadata.seeds, metadata.positions, adjust, scores, counts, best, ids, chosen,
        num_ids, best.shape[1], heat.stride(0), metadata.seeds.stride(0),
        metadata.positions.stride(0),
        triton.next_power_of_2(best.shape[1]), 4 * SPAN * SPANS, QUADS, num_warps=32,
    )  # fmt: skip
    return chosen


def _draw(
    logits: Tensor,
    metadata: SamplingMetadata,
    first_id: int,
    kept: tuple | None = None,
    adjust: tuple | None = None,
) -> tuple[Tensor, Tensor]:
    """The best perturbed score of every 512 ids and its id, both [num_rows, chunks]."""
    (num_rows, num_ids), heat, positions = logits.shape, metadata.temperature, metadata.positions
    chunks = triton.cdiv(num_ids + 3, 4 * QUADS)
    best = torch.empty(num_rows, chunks, dtype=torch.float32, device=logits.device)
    ids = torch.empty(num_rows, chunks, dtype=torch.int32, device=logits.device)
    maxima, scores, counts = kept or (None, None, None)
    spans = 0 if maxima is None else maxima.shape[1]
    draw_kernel[(num_rows, chunks)](
        logits, heat, metadata.seeds, positions, adjust, maxima, scores, counts, best, ids,
        first_id, num_ids, spans, heat.stride(0), metadata.seeds.stride(0), positions.stride(0),
        kept is not None, SPAN, QUADS, num_warps=1,
    )  # fmt: skip
    return best, ids
