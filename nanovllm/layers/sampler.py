"""Sampler: chooses the next token ids from logits, with noise that is a function of its arguments.

The sampler uses the Gumbel-max trick. If we add Gumbel noise to logits / temperature, the token
with the largest sum is a draw from their softmax (Gumbel, 1954; Maddison, Tarlow and Minka, "A*
Sampling", 2014). The noise of a token is computed from the seed of its request, its position and
its id, by the counter-based generator Philox-4x32-10 (Salmon et al., "Parallel Random Numbers: As
Easy as 1, 2, 3", 2011). No generator keeps a state, so a request draws the same noise whatever else
is in the batch, and a filter does not shift it.
"""

import math
from typing import Any

import torch
from torch import Tensor

from nanovllm.distributed.ranks import Ranks
from nanovllm.layers.adjustments import adjust, count_tokens
from nanovllm.metadata import NO_TOKEN, SamplingMetadata

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
MASK32 = 0xFFFFFFFF
MAX_FILTERED_ROWS = 64  # at once, because filtering copies a row's scores several times


def sample(
    logits: Tensor,
    metadata: SamplingMetadata,
    ranks: Ranks,
    vocab_size: int,
    backend: Any,
    whole_rows: bool,
) -> Tensor:
    """Choose the next ids [num_rows] int64 from this rank's logits [num_rows, vocab_local].

    Every rank returns the same ids, and the lowest id wins a tie. A row gets NO_TOKEN if a logit is
    NaN or infinity, or if all are -infinity. The host sees this when it reads the ids, so nothing
    waits for the device. Filters, adjustments and logprobs need whole rows of logits. `whole_rows`
    says whether any row has some; the logits are then [num_rows, vocab_size].
    """
    if ranks.world_size > 1 and not whole_rows:
        first_id = ranks.shard(vocab_size).start
        scores, ids = backend.local_argmax(logits, metadata, first_id)
        return ranks.all_reduce_argmax(scores, ids).squeeze(1)
    return backend.draw(logits, metadata, whole_rows)


def draw(logits: Tensor, metadata: SamplingMetadata, whole_rows: bool) -> Tensor:
    """Choose the next ids [num_rows] int64 from whole rows of logits [num_rows, vocab_size].

    The logits stay as they are. whole_rows: whether any row has filters or adjustments. The new
    tokens of rows with adjustments are counted.
    """
    scores = logits.to(torch.float32, copy=True)
    if whole_rows and metadata.adjustments is not None:
        adjust(scores, metadata.adjustments, metadata.positions)
    scores /= divisors(metadata)
    for rows in rows_with_filters(metadata) if whole_rows else ():
        limits = (metadata.top_k[rows], metadata.top_p[rows], metadata.log_min_p[rows])
        scores[rows] = filter_scores(scores[rows], *limits)
    ids = checked_argmax(add_noise(scores, metadata))[1].squeeze(1)
    if whole_rows and metadata.adjustments is not None:
        count_tokens(ids, metadata.adjustments, metadata.positions)
    return ids


def local_argmax(
    logits: Tensor, metadata: SamplingMetadata, first_id: int
) -> tuple[Tensor, Tensor]:
    """Return the best scores of this rank's ids, and their ids, both [num_rows, n]; here n is 1.

    The rows have no filters. The logits [num_rows, vocab_local] are those of the ids from first_id
    on, and the returned ids rise. A best score that is not finite has the id NO_TOKEN. NaN counts
    as higher than any number, so that it wins over the scores of other ranks.
    """
    scores = scale(logits, metadata)
    return checked_argmax(add_noise(scores, metadata, first_id), first_id)


def checked_argmax(scores: Tensor, first_id: int = 0) -> tuple[Tensor, Tensor]:
    """Return each row's highest score and its id, both [num_rows, 1]; see `local_argmax`."""
    best = scores.argmax(dim=1, keepdim=True)  # the first of equal ones, and NaN before any number
    values = scores.gather(1, best)
    return values, (best + first_id).masked_fill(~values.isfinite(), NO_TOKEN)


# -- temperature and filters ---------------------------------------------------------------------


def scale(logits: Tensor, metadata: SamplingMetadata) -> Tensor:
    """Return scores in float32: logits / temperature, or the logits themselves in a greedy row."""
    return logits.float() / divisors(metadata)


def divisors(metadata: SamplingMetadata) -> Tensor:
    """Return what the logits are divided by, [num_rows, 1]: the temperature, or 1 if greedy."""
    return metadata.temperature.masked_fill(metadata.temperature == 0, 1.0)


def rows_with_filters(metadata: SamplingMetadata) -> list[Tensor]:
    """Return the indices of the rows that have filters, in groups of 1 to MAX_FILTERED_ROWS rows.

    Rows with and without a top-k are not in one group, because a group without top-k sorts the
    whole vocabulary.
    """
    has_k = metadata.top_k > 0
    has_some = has_k | (metadata.top_p < 1) | (metadata.log_min_p > -torch.inf)
    has_some &= metadata.temperature > 0
    kinds = (has_some & has_k, has_some & ~has_k)
    indices = [kind.squeeze(1).nonzero().squeeze(1) for kind in kinds]
    return [rows for group in indices for rows in group.split(MAX_FILTERED_ROWS) if len(rows)]


def filter_scores(scores: Tensor, top_k: Tensor, top_p: Tensor, log_min_p: Tensor) -> Tensor:
    """Return scores [num_rows, vocab_size] with -inf where min-p, top-k or top-p drops a token.

    The limits are [num_rows, 1], as in SamplingMetadata. The order is vLLM's: min-p, then top-k,
    then top-p over the probabilities of the tokens that are left. The likeliest token always stays.
    If a limit cuts between equal scores, the lowest ids stay, whereas vLLM's top-k keeps all scores
    that equal the k-th.
    """
    num_sorted = scores.shape[1]
    if scores.device.type == "cpu" and (top_k > 0).all():  # a GPU always sorts as much, for its
        num_sorted = min(num_sorted, int(top_k.max()))  # memory is sized by the largest case
    values = scores.topk(num_sorted, dim=1).values  # the largest first
    index = torch.arange(num_sorted, device=values.device)
    kept = (values >= values[:, :1] + log_min_p) & ((index < top_k) | (top_k <= 0))
    probs = values.double().masked_fill(~kept, -torch.inf).softmax(dim=1)
    kept &= (probs.cumsum(dim=1) - probs < top_p) | (top_p >= 1)  # the sum of the likelier tokens
    kept[:, 0] = True
    lowest = values.gather(1, kept.sum(dim=1, keepdim=True) - 1)  # the lowest score that is kept
    num_tied = (kept & (values == lowest)).sum(dim=1, keepdim=True)  # kept scores that equal it
    tied = scores == lowest
    tied &= tied.cumsum(dim=1) <= num_tied
    return scores.masked_fill(~((scores > lowest) | tied), -torch.inf)


def log_of(probability: float) -> float:
    """Return the natural logarithm of a probability; -inf for 0."""
    return math.log(probability) if probability > 0 else -math.inf


# -- noise ---------------------------------------------------------------------------------------


def add_noise(scores: Tensor, metadata: SamplingMetadata, first_id: int = 0) -> Tensor:
    """Add Gumbel noise to the scores of the ids from first_id on, in rows that are not greedy."""
    greedy = metadata.temperature == 0
    if greedy.all():
        return scores
    ids = torch.arange(first_id, first_id + scores.shape[1], device=scores.device)
    noise = gumbel_noise(metadata.seeds, metadata.positions, ids)
    return scores + noise.masked_fill(greedy, 0.0)


def gumbel_noise(seeds: Tensor, positions: Tensor, ids: Tensor) -> Tensor:
    """Return standard Gumbel noise [num_rows, num_ids] float32.

    seeds, positions: [num_rows, 1]; ids: [num_ids], which rise.
    """
    lanes = ids % 4
    blocks, block_index = torch.unique_consecutive(ids // 4, return_inverse=True)
    words = torch.stack(philox(seeds, positions, blocks))  # [4, num_rows, num_blocks]
    bits = words[lanes, :, block_index].T  # [num_rows, num_ids]
    uniform = ((bits >> 9).float() + 0.5) * 2.0**-23  # 23 bits: exact in float32, never 0 or 1
    return -torch.log(-torch.log(uniform))


def philox(seeds: Tensor, positions: Tensor, blocks: Tensor) -> tuple[Tensor, ...]:
    """Return four 32-bit words (as int64) for each counter (block, position), under the key `seed`.

    Broadcasts seeds and positions [num_rows, 1] against blocks [num_blocks]. An int64 product wraps
    around, and its 64 bits are still right. Bits above a word's 32 are cut where they would count.
    """
    k0, k1 = seeds & MASK32, (seeds >> 32) & MASK32
    c0, c1, c2, c3 = torch.broadcast_tensors(
        blocks[None] & MASK32, positions & MASK32, (positions >> 32) & MASK32, torch.zeros_like(k0)
    )
    for _ in range(10):
        even, odd = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        c0, c2 = ((odd >> 32) ^ c1 ^ k0) & MASK32, ((even >> 32) ^ c3 ^ k1) & MASK32
        c1, c3 = odd, even  # their lower halves
        k0, k1 = k0 + PHILOX_KEY_STEPS[0], k1 + PHILOX_KEY_STEPS[1]
    return c0, c1 & MASK32, c2, c3 & MASK32
