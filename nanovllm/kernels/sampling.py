"""Sampling kernels: top-k, top-p and min-p without sorting the vocabulary, and the draw itself.

All three filters keep the beginning of one order, in which a token with a higher score comes first
and the lower id wins a tie. What a row keeps is therefore described by its last kept token, by its
score and its id. Four kernels look for this token, and two draw.

1. `stats_kernel` reads the logits and notes the largest score of every 128 tokens.
2. `bound_kernel` derives a lower bound of the kept scores. Min-p gives one directly. If a row keeps
   the k best tokens, the k-th largest of the noted scores is one, because k tokens reach it.
3. `collect_kernel` gathers the tokens that reach the bound, which are few.
4. `resolve_kernel` sorts the gathered tokens and applies the filters to them.
5. `draw_kernel` adds Gumbel noise to the kept scores, and finds the best of every 512 tokens.
6. `choose_kernel` takes the best of these.

Top-p alone, and a very large k, keep too many tokens to sort. We call such a limit *open*, because
no kernel before the last one knows at which token it cuts. The last one counts the tokens before
the winner, or sums their probabilities, and accepts the winner if the result is below the limit.
Otherwise neither the winner nor any token behind it is kept, so the row draws again from the tokens
before it. This is the rejection of FlashInfer's sampler (Ye et al., arXiv:2501.01005). Our noise is
a function of the token id, so the result is the same as if the limit had been resolved beforehand.

Rows without filters leave the first four kernels at once, so that one captured graph serves every
mix. Scores are logits, adjusted where a row asks for it (`kernels/adjustments.py`), divided by the
temperature, as in torch. A NaN counts as infinity, and a row whose best score is not finite gets
the id -1. The last kernel counts the token that it has chosen, if the row has adjustments.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.adjustments import adjusted, as_arguments, count_token
from nanovllm.metadata import SamplingMetadata

SPAN, SPANS = 128, 32  # tokens that share one noted score; spans that one program reads
GROUP, GROUPS = (
    8,
    8,
)  # spans that are searched for gathered tokens at once; groups that one program searches
FEW, MANY = 128, 1024  # gathered tokens that are sorted at once
QUADS = 128  # a draw makes noise for four tokens at a time

# Columns of the two tables that describe a row: `scores` in float32, `counts` in int32.
LARGEST, LAST_SCORE, OPEN_MASS, NUM_SCORES = (tl.constexpr(i) for i in range(4))
MODE, NUM_GATHERED, LAST_ID, OPEN_COUNT, NUM_COUNTS = (tl.constexpr(i) for i in range(5))
# A row's mode. PLAIN: it has no filters. SETTLED: the bound is exact, or a limit is open.
# GATHER: the tokens that reach the bound are sorted.
PLAIN, SETTLED, GATHER = (tl.constexpr(i) for i in range(3))
LAST_POSSIBLE_ID = tl.constexpr(2**31 - 1)
INF, MINUS_INF = tl.constexpr(float("inf")), tl.constexpr(float("-inf"))


# -- what the kernels share ----------------------------------------------------------------------


@triton.jit
def load_scores(logits, row, ids, num_ids, temperature, adjust):
    """A row's adjusted logits over its temperature, float32. Beyond the row they are -inf.

    A NaN becomes infinity, so that the row is recognised as broken.
    """
    inside = (ids >= 0) & (ids < num_ids)
    scores = tl.load(logits + row * num_ids + ids, inside, MINUS_INF).to(tl.float32)
    if adjust is not None:
        scores = adjusted(scores, row, ids, inside, num_ids, adjust)
    scores = tl.div_rn(scores, temperature)
    return tl.where(scores == scores, scores, float("inf"))


@triton.jit
def is_before(scores, ids, score, token_id):
    """Which tokens come before one of the given score and id."""
    return (scores > score) | ((scores == score) & (ids < token_id))


@triton.jit
def mass_of(scores, largest, kept):
    """The kept tokens' probabilities, each divided by the largest token's probability."""
    return tl.where(kept, tl.exp(scores - largest), 0.0)


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


# -- finding the last kept token -----------------------------------------------------------------


@triton.jit
def is_filtered(temperature, top_k, top_p, log_min_p, at):
    """Whether the row whose parameters lie at `at` has filters."""
    some = (tl.load(top_k + at) > 0) | (tl.load(top_p + at) < 1.0)
    return (some | (tl.load(log_min_p + at) > MINUS_INF)) & (tl.load(temperature + at) > 0.0)


@triton.jit
def stats_kernel(
    logits, temperature, top_k, top_p, log_min_p, adjust, maxima, tops, masses, num_ids, stride,
    SPAN: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    """One program: note the largest score of each of SPANS spans and of all of them together.

    maxima: [num_rows, programs * SPANS]; tops and masses: [num_rows, programs]. For top-p
    alone it also notes the mass, which is the sum of exp(score - the program's largest score).
    """
    row, program, programs = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    at = row * stride
    if is_filtered(temperature, top_k, top_p, log_min_p, at):
        span = program * SPANS + tl.arange(0, SPANS)
        ids = span[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
        scores = load_scores(logits, row, ids, num_ids, tl.load(temperature + at), adjust)
        span_max = tl.max(scores, axis=1)
        top = tl.max(span_max)
        tl.store(maxima + row * programs * SPANS + span, span_max)
        tl.store(tops + row * programs + program, top)
        if (tl.load(top_p + at) < 1.0) & (tl.load(top_k + at) <= 0):
            mass = tl.sum(mass_of(scores, top, scores > MINUS_INF))
            tl.store(masses + row * programs + program, mass)


@triton.jit
def bound_kernel(
    temperature, top_k, top_p, log_min_p, maxima, tops, masses, scores, counts,
    programs, num_spans, stride,
    PROGRAMS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program: a row's largest score, a bound that its kept scores reach, and its mode.

    scores: [num_rows, NUM_SCORES]; counts: [num_rows, NUM_COUNTS]. WIDTH is at least num_spans.
    """
    row = tl.program_id(0).to(tl.int64)
    at, scores, counts = row * stride, scores + row * NUM_SCORES, counts + row * NUM_COUNTS
    mode, largest, bound, open_mass = PLAIN, MINUS_INF, MINUS_INF, INF
    if is_filtered(temperature, top_k, top_p, log_min_p, at):
        k, p, log_m = tl.load(top_k + at), tl.load(top_p + at), tl.load(log_min_p + at)
        program = tl.arange(0, PROGRAMS)
        top = tl.load(tops + row * programs + program, program < programs, MINUS_INF)
        largest = tl.max(top)
        if (largest > MINUS_INF) & (largest < INF):
            bound = largest + log_m
            mode = SETTLED
            if (k > 0) | ((p < 1.0) & (log_m > MINUS_INF)):
                mode = GATHER
                span = tl.arange(0, WIDTH)
                spans = maxima + row * num_spans + span
                best = tl.load(spans, span < num_spans, MINUS_INF)
                bound = tl.maximum(bound, kth_largest(best, k, WIDTH))
            elif p < 1.0:
                mass = tl.load(masses + row * programs + program, program < programs, 0.0)
                mass = tl.where(top > MINUS_INF, mass * tl.exp(top - largest), 0.0)
                open_mass = p * tl.sum(mass)
    tl.store(scores + LARGEST, largest)
    tl.store(scores + LAST_SCORE, bound)
    tl.store(scores + OPEN_MASS, open_mass)
    tl.store(counts + MODE, mode)
    tl.store(counts + NUM_GATHERED, 0)
    tl.store(counts + LAST_ID, LAST_POSSIBLE_ID)
    tl.store(counts + OPEN_COUNT, LAST_POSSIBLE_ID)


@triton.jit
def kth_largest(scores, k, SIZE: tl.constexpr):
    """The k-th largest of a block of scores; -inf if there are fewer, or k is 0."""
    ordered = as_ordered(scores)
    low, high = tl.min(ordered).to(tl.int64), tl.max(ordered).to(tl.int64)
    if (k <= 0) | (k > SIZE):
        high = low
    while low < high:  # at least k scores reach `low`, and fewer exceed `high`
        middle = low + (high - low + 1) // 2
        enough = tl.sum((ordered >= middle.to(tl.int32)).to(tl.int32)) >= k
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle - 1)
    return tl.where((k <= 0) | (k > SIZE), MINUS_INF, as_score(low.to(tl.int32)))


@triton.jit
def collect_kernel(
    logits, temperature, adjust, maxima, scores, counts, keys, num_ids, num_spans, stride,
    SPAN: tl.constexpr, SPANS: tl.constexpr, GROUPS: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """One program: append its tokens that reach the bound to keys [num_rows, MANY] int64.

    A key orders tokens as the filters do: its upper half is the score, and its lower half falls
    with the id. Programs append in any order. If more than MANY tokens reach
    the bound, the count says so and the keys are not used. A program goes
    through GROUPS groups of SPANS spans, most of which do not reach the bound.
    """
    row, program = tl.program_id(0).to(tl.int64), tl.program_id(1)
    counts += row * NUM_COUNTS
    if tl.load(counts + MODE) == GATHER:
        bound = tl.load(scores + row * NUM_SCORES + LAST_SCORE)
        heat = tl.load(temperature + row * stride)
        for group in range(program * GROUPS, (program + 1) * GROUPS):
            span = group * SPANS + tl.arange(0, SPANS)
            best = tl.load(maxima + row * num_spans + span, span < num_spans, MINUS_INF)
            if (tl.max(best) >= bound) & (tl.max(best) > MINUS_INF):
                ids = group * SPANS * SPAN + tl.arange(0, SPANS * SPAN)
                values = load_scores(logits, row, ids, num_ids, heat, adjust)
                kept = ((values >= bound) & (values > MINUS_INF)).to(tl.int32)
                number = tl.sum(kept)
                first = tl.atomic_add(counts + NUM_GATHERED, number)
                if first + number <= MANY:
                    place = first + tl.cumsum(kept, 0) - 1
                    key = (as_ordered(values).to(tl.int64) << 32) | (ids ^ 0x7FFFFFFF).to(tl.int64)
                    tl.store(keys + row * MANY + place, key, mask=kept > 0)


@triton.jit
def as_ordered(scores):
    """An int32 that is larger where the score is larger. -0.0 equals 0.0."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def as_score(ordered):
    """The inverse of `as_ordered`."""
    bits = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def resolve_kernel(
    logits, temperature, top_k, top_p, adjust, keys, scores, counts, num_ids, stride,
    TILE: tl.constexpr, FEW: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """One program: a row's last kept score and id, and the limits that stay open."""
    row = tl.program_id(0).to(tl.int64)
    at, scores, counts = row * stride, scores + row * NUM_SCORES, counts + row * NUM_COUNTS
    if tl.load(counts + MODE) == GATHER:
        k, p, number = tl.load(top_k + at), tl.load(top_p + at), tl.load(counts + NUM_GATHERED)
        largest, keys = tl.load(scores + LARGEST), keys + row * MANY
        score, last_id = tl.load(scores + LAST_SCORE), LAST_POSSIBLE_ID
        if number <= FEW:
            score, last_id = last_of_sorted(keys, number, k, p, largest, FEW)
        elif number <= MANY:
            score, last_id = last_of_sorted(keys, number, k, p, largest, MANY)
        elif p < 1.0:
            heat = tl.load(temperature + at)
            score, last_id, mass = last_by_bisection(
                logits, row, num_ids, heat, adjust, largest, k, score, TILE
            )
            tl.store(scores + OPEN_MASS, p * mass)
        else:
            tl.store(counts + OPEN_COUNT, k)
        tl.store(scores + LAST_SCORE, score)
        tl.store(counts + LAST_ID, last_id)


@triton.jit
def last_of_sorted(keys, number, k, p, largest, SIZE: tl.constexpr):
    """Sort the `number` gathered tokens, apply top-k and then top-p; the last kept score and id."""
    place = tl.arange(0, SIZE)
    nothing = tl.full([SIZE], -0x7FFFFFFFFFFFFFFF, tl.int64)
    gathered = tl.load(keys + place, place < number, 0)
    ordered = tl.sort(tl.where(place < number, gathered, nothing), descending=True)
    scores = as_score((ordered >> 32).to(tl.int32))
    ids = (ordered & 0x7FFFFFFF).to(tl.int32) ^ 0x7FFFFFFF
    kept = (place < number) & ((place < k) | (k <= 0))
    mass = mass_of(scores, largest, kept)
    before, limit = tl.cumsum(mass, 0) - mass, tl.where(p < 1.0, p * tl.sum(mass), INF)
    last = tl.sum(((kept & (before < limit)) | (place == 0)).to(tl.int32)) - 1
    score = tl.max(tl.where(place == last, scores, MINUS_INF))
    return score, tl.max(tl.where(place == last, ids, 0))


@triton.jit
def last_by_bisection(
    logits, row, num_ids, temperature, adjust, largest, k, bound, TILE: tl.constexpr
):  # fmt: skip
    """The last score and id of a whole row that reach `bound` and are among the k best; their mass.

    This takes up to 32 passes over the logits, while they lie in the L2 cache.
    """
    number, _ = tokens_from(logits, row, num_ids, temperature, adjust, largest, bound, TILE)
    wanted = tl.where((k > 0) & (k < number), k, number)
    low, high = as_ordered(bound).to(tl.int64), as_ordered(largest).to(tl.int64)
    if number == wanted:
        high = low
    while low < high:  # at least `wanted` tokens reach `low`, and fewer exceed `high`
        middle = low + (high - low + 1) // 2
        score = as_score(middle.to(tl.int32))
        number, _ = tokens_from(logits, row, num_ids, temperature, adjust, largest, score, TILE)
        low = tl.where(number >= wanted, middle, low)
        high = tl.where(number > wanted, high, tl.where(number == wanted, middle, middle - 1))
    score, last_id = as_score(low.to(tl.int32)), LAST_POSSIBLE_ID
    above, mass = tokens_from(
        logits, row, num_ids, temperature, adjust, largest, as_score((low + 1).to(tl.int32)), TILE
    )
    left = wanted - above
    mass += left * tl.exp(score - largest)
    for first in range(0, num_ids, TILE):  # of the tokens with this score, the lowest ids are kept
        if left > 0:
            ids = first + tl.arange(0, TILE)
            values = load_scores(logits, row, ids, num_ids, temperature, adjust)
            equal = (values == score).to(tl.int32)
            is_last = (equal > 0) & (tl.cumsum(equal, 0) == left)
            last_id = tl.minimum(last_id, tl.min(tl.where(is_last, ids, LAST_POSSIBLE_ID)))
            left -= tl.sum(equal)
    return score, last_id, mass


@triton.jit
def tokens_from(logits, row, num_ids, temperature, adjust, largest, bound, TILE: tl.constexpr):
    """How many tokens of a row reach a score, and their mass."""
    return tokens_before(
        logits, row, num_ids, temperature, adjust, largest, bound, LAST_POSSIBLE_ID, TILE
    )


@triton.jit
def tokens_before(
    logits, row, num_ids, temperature, adjust, largest, score, token_id, TILE: tl.constexpr
):  # fmt: skip
    """How many tokens of a row come before the one of this score and id, and their mass."""
    number, mass = 0, 0.0
    for first in range(0, num_ids, TILE):
        ids = first + tl.arange(0, TILE)
        values = load_scores(logits, row, ids, num_ids, temperature, adjust)
        kept = is_before(values, ids, score, token_id) & (values > MINUS_INF)
        number += tl.sum(kept.to(tl.int32))
        mass += tl.sum(mass_of(values, largest, kept))
    return number, mass


# -- drawing -------------------------------------------------------------------------------------


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

power_of_2 = triton.next_power_of_2


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
    (num_rows, num_ids), tile, device = logits.shape, SPAN * SPANS, logits.device
    programs = triton.cdiv(num_ids, tile)
    spans, stride, heat = programs * SPANS, metadata.temperature.stride(0), metadata.temperature
    widths = (spans, programs, programs, NUM_SCORES.value)
    maxima, tops, masses, scores = (torch.empty(num_rows, n, device=device) for n in widths)
    counts = torch.empty(num_rows, NUM_COUNTS.value, dtype=torch.int32, device=device)
    keys = torch.empty(num_rows, MANY, dtype=torch.int64, device=device)
    filters = (heat, metadata.top_k, metadata.top_p, metadata.log_min_p)
    adjust = as_arguments(metadata.adjustments, metadata.positions)
    stats_kernel[(num_rows, programs)](
        logits, *filters, adjust, maxima, tops, masses, num_ids, stride, SPAN, SPANS, num_warps=8
    )
    bound_kernel[(num_rows,)](
        *filters, maxima, tops, masses, scores, counts, programs, spans, stride,
        power_of_2(programs), power_of_2(spans), num_warps=4,
    )  # fmt: skip
    collect_kernel[(num_rows, triton.cdiv(spans, GROUP * GROUPS))](
        logits, heat, adjust, maxima, scores, counts, keys, num_ids, spans, stride,
        SPAN, GROUP, GROUPS, MANY,
    )  # fmt: skip
    resolve_kernel[(num_rows,)](
        logits, heat, metadata.top_k, metadata.top_p, adjust, keys, scores, counts, num_ids, stride,
        4 * tile, FEW, MANY, num_warps=16,
    )  # fmt: skip
    best, ids = _draw(logits, metadata, 0, (maxima, scores, counts), adjust)
    chosen = torch.empty(num_rows, dtype=torch.int64, device=device)
    choose_kernel[(num_rows,)](
        logits, heat, metadata.seeds, metadata.positions, adjust, scores, counts, best, ids, chosen,
        num_ids, best.shape[1], stride, metadata.seeds.stride(0), metadata.positions.stride(0),
        power_of_2(best.shape[1]), 4 * tile, QUADS, num_warps=32,
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
