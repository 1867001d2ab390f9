"""Sampler: from logits to the next token ids, with noise that is a function and not a state.

Gumbel-max: adding Gumbel noise to logits / temperature and taking the largest draws from their
softmax (Gumbel, 1954; Maddison, Tarlow and Minka, "A* Sampling", 2014). The noise of a token is
computed from its request's seed, its position and its id by the counter-based generator
Philox-4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011). So a request
draws the same noise whatever else is in the batch, and a filter does not shift it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm.model.ranks import Ranks

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
MASK32 = 0xFFFFFFFF
NO_TOKEN = -1  # the id of a row whose best score is not finite: nothing can be drawn from it
Candidates = Callable[[Tensor, "SamplingMetadata", int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class SamplingMetadata:
    """What each sampled row asked for."""

    temperature: Tensor  # [num_rows, 1] float32; 0: greedy
    seeds: Tensor  # [num_rows, 1] int64
    positions: Tensor  # [num_rows, 1]: where the new token will stand


@dataclass(frozen=True)
class Filters:
    """The limits of rows that ask for top-k, top-p or min-p."""

    top_k: Tensor  # [num_rows, 1] int64; at least the vocabulary's size: all
    top_p: Tensor  # [num_rows, 1] float32
    min_p: Tensor  # [num_rows, 1] float32


def sample(
    logits: Tensor, asked: SamplingMetadata, ranks: Ranks, vocab_size: int, candidates: Candidates
) -> Tensor:
    """Next ids [num_rows] int64 of logits [num_rows, vocab_local]: this rank's share of each row.

    Every rank returns the same ids; the lowest id wins a tie. A row gets NO_TOKEN if a logit is NaN
    or infinity, or if all are -infinity. The host learns of it when it reads the ids, so nothing
    waits for the device.
    """
    first = ranks.shard(vocab_size).start
    return ranks.reduce_argmax(*candidates(logits, asked, first)).squeeze(1)


def candidates(logits: Tensor, asked: SamplingMetadata, first_id: int) -> tuple[Tensor, Tensor]:
    """The best scores and their ids, both [num_rows, n], ids rising; here n is 1.

    A score is logit / temperature + Gumbel noise, or for a greedy row the logit alone. logits are
    those of ids first_id and up. A best score that is not finite has the id NO_TOKEN; NaN counts as
    higher than any number, so that it wins over what other ranks found.
    """
    scores, greedy = logits.float(), asked.temperature == 0
    if not greedy.all():
        scores = scores / asked.temperature.masked_fill(greedy, 1.0)
        ids = torch.arange(first_id, first_id + logits.shape[1], device=logits.device)
        noise = gumbel_noise(asked.seeds, asked.positions, ids)
        scores = scores + noise.masked_fill(greedy, 0.0)
    return best_of(scores, first_id)


def best_of(scores: Tensor, first_id: int = 0) -> tuple[Tensor, Tensor]:
    """Each row's highest score and its id, both [num_rows, 1]; see `candidates`."""
    best = scores.argmax(dim=1, keepdim=True)  # the first of equal ones, and NaN before any number
    values = scores.gather(1, best)
    return values, (best + first_id).masked_fill(~values.isfinite(), NO_TOKEN)


def sample_filtered(
    logits: Tensor, asked: SamplingMetadata, filters: Filters, ranks: Ranks, vocab_size: int
) -> Tensor:
    """As `sample`, from the tokens that the filters leave. The noise is that of `sample`."""
    scaled = logits.float() / asked.temperature
    whole = ranks.gather_columns(scaled, vocab_size)
    scores = filter_scores(whole, filters.top_k, filters.top_p, filters.min_p)
    ids = torch.arange(vocab_size, device=logits.device)
    _, best = best_of(scores + gumbel_noise(asked.seeds, asked.positions, ids))
    return best.squeeze(1)


def filter_scores(scores: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Scores [num_rows, vocab_size] with -inf wherever min-p, top-k or top-p drop a token.

    The limits are [num_rows, 1].

    In vLLM's order: min-p, then top-k, then top-p over what is left. The likeliest always stays.
    """
    values, order = scores.sort(dim=1, descending=True, stable=True)
    place = torch.arange(values.shape[1], device=values.device)
    probs = values.softmax(dim=1)
    dropped = (probs < min_p * probs[:, :1]) | (place >= top_k)
    probs = values.masked_fill(dropped, -torch.inf).softmax(dim=1)
    dropped |= probs.cumsum(dim=1) - probs >= top_p  # what stands before it is enough
    dropped[:, 0] = False
    return torch.empty_like(scores).scatter_(1, order, values.masked_fill(dropped, -torch.inf))


def gumbel_noise(seeds: Tensor, positions: Tensor, ids: Tensor) -> Tensor:
    """Standard Gumbel noise [num_rows, num_ids] float32, of seeds and positions [num_rows, 1]."""
    lanes = ids % 4
    blocks, place = torch.unique_consecutive(ids // 4, return_inverse=True)
    words = torch.stack(philox(seeds, positions, blocks))  # [4, num_rows, num_blocks]
    bits = words[lanes, :, place].T  # [num_rows, num_ids]
    uniform = ((bits >> 9).float() + 0.5) * 2.0**-23  # 23 bits: exact in float32, never 0 or 1
    return -torch.log(-torch.log(uniform))


def philox(seeds: Tensor, positions: Tensor, blocks: Tensor) -> tuple[Tensor, ...]:
    """Four 32-bit words (as int64) for each counter (block, position), under the key `seed`.

    Broadcasts seeds and positions [num_rows, 1] against blocks [num_blocks]. An int64 product
    wraps, which leaves its 64 bits right; bits above a word's 32 are cut where they would count.
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
