"""Log probabilities of one token in each row and of the likeliest tokens, from the raw logits.

The result of a row is a packed row of int32, which is copied to the host as it is. It holds the
rank of the token, then its id and the ids of the likeliest tokens, and then the bits of their
float32 log probabilities in the same order. A request wants at most MAX_LOGPROBS tokens, so WIDTH
numbers are copied for each row in place of a whole vocabulary.
"""

import torch
from torch import Tensor

from nanovllm.logprobs import IDS, LOGPROBS, NO_ID, RANK, WIDTH

MAX_ROWS = 64  # at once, because the keys of a row take more memory than its logits


def gather_logprobs(logits: Tensor, token_ids: Tensor, num_logprobs: Tensor) -> Tensor:
    """Return packed rows [num_rows, WIDTH] int32 of whole rows of logits [num_rows, vocab_size].

    token_ids: [num_rows] int64, the token of each row that is reported in any case.
    num_logprobs: [num_rows, 1] int32, how many of the likeliest tokens a row wants. A row with NONE
        wants no logprobs at all.

    Entries beyond the number that a row wants have no meaning. Of equally likely tokens, the one
    with the lowest id comes first.
    """
    packed = torch.full((len(logits), WIDTH), NO_ID, dtype=torch.int32, device=logits.device)
    wanting = (num_logprobs.squeeze(1) >= 0).nonzero().squeeze(1)
    for rows in wanting.split(MAX_ROWS) if len(wanting) else ():
        num_best = min(int(num_logprobs[rows].max()), logits.shape[1])
        packed[rows] = _pack(logits[rows].float(), token_ids[rows, None], num_best)
    return packed


def _pack(logits: Tensor, token_ids: Tensor, num_best: int) -> Tensor:
    """Return the packed rows of `gather_logprobs` for rows that each want `num_best` tokens.

    A NaN counts as infinity. A row that sampled no token reports token 0.
    """
    logits = logits.nan_to_num(torch.inf, torch.inf, -torch.inf)
    token_ids = token_ids.clamp(min=0)
    chosen = logits.gather(1, token_ids)
    ids = torch.cat((token_ids, best_ids(logits, num_best)), dim=1)
    logprobs = logits.log_softmax(dim=1).gather(1, ids)
    packed = torch.full((len(logits), WIDTH), NO_ID, dtype=torch.int32, device=logits.device)
    packed[:, RANK] = (logits >= chosen).sum(dim=1)
    packed[:, IDS : IDS + 1 + num_best] = ids
    packed[:, LOGPROBS : LOGPROBS + 1 + num_best] = logprobs.view(torch.int32)
    return packed


def best_ids(logits: Tensor, num_best: int) -> Tensor:
    """Return the ids [num_rows, num_best] of each row's likeliest tokens; the lowest wins a tie.

    We combine a logit and an id into one key. Its high bits are the bits of the logit, arranged so
    that they have the order of the logits, and its low bits are the reversed id. No two keys are
    equal, whereas `topk` of the logits themselves would break ties in any order.
    """
    bits = (logits + 0.0).view(torch.int32)  # -0.0 equals 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ids = torch.arange(logits.shape[1], device=logits.device)
    keys = (ordered.long() << 32) | (ids ^ 0x7FFFFFFF)
    return (keys.topk(num_best, dim=1).values & 0x7FFFFFFF) ^ 0x7FFFFFFF
