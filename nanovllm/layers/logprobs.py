"""Log probabilities of one token a row and of the likeliest tokens, from the raw logits.

The result of a row is a row of int32 that is copied to the host as it is. It holds the token's
rank, then the token's id and the ids of the likeliest tokens, then the bits of their float32 log
probabilities in the same order. A request asks for at most MAX_LOGPROBS tokens, so that a row of
WIDTH numbers stands for a whole vocabulary.
"""

import torch
from torch import Tensor

from nanovllm.logprobs import IDS, LOGPROBS, NO_ID, RANK, WIDTH

ROWS_AT_ONCE = 64  # because the keys of a row take more memory than its logits


def gather_logprobs(logits: Tensor, token_ids: Tensor, num_logprobs: Tensor) -> Tensor:
    """Packed rows [num_rows, WIDTH] int32 of whole rows of logits [num_rows, vocab_size].

    token_ids [num_rows] int64: the token of each row that is reported in any case. num_logprobs
    [num_rows, 1] int32: how many of the likeliest tokens a row asks for; NONE asks for nothing at
    all. What lies beyond a row's number has no meaning. Of equally likely tokens, the one with the
    lowest id comes first.
    """
    packed = torch.full((len(logits), WIDTH), NO_ID, dtype=torch.int32, device=logits.device)
    asking = (num_logprobs.squeeze(1) >= 0).nonzero().squeeze(1)
    for rows in asking.split(ROWS_AT_ONCE) if len(asking) else ():
        most = min(int(num_logprobs[rows].max()), logits.shape[1])
        packed[rows] = _pack(logits[rows].float(), token_ids[rows, None], most)
    return packed


def _pack(logits: Tensor, token_ids: Tensor, most: int) -> Tensor:
    """As `gather_logprobs`, of rows that each ask for `most` tokens.

    A NaN counts as infinity. A row that sampled no token reports on token 0.
    """
    logits = logits.nan_to_num(torch.inf, torch.inf, -torch.inf)
    token_ids = token_ids.clamp(min=0)
    chosen = logits.gather(1, token_ids)
    ids = torch.cat((token_ids, best_ids(logits, most)), dim=1)
    logprobs = logits.log_softmax(dim=1).gather(1, ids)
    packed = torch.full((len(logits), WIDTH), NO_ID, dtype=torch.int32, device=logits.device)
    packed[:, RANK] = (logits >= chosen).sum(dim=1)
    packed[:, IDS : IDS + 1 + most] = ids
    packed[:, LOGPROBS : LOGPROBS + 1 + most] = logprobs.view(torch.int32)
    return packed


def best_ids(logits: Tensor, most: int) -> Tensor:
    """The ids [num_rows, most] of each row's likeliest tokens; the lowest id wins a tie.

    A logit and an id make one key: the bits of the logit, arranged so that they order as the
    logits do, and then the id, reversed. No two keys are equal, whereas `topk` of the logits
    themselves would break ties in any order.
    """
    bits = (logits + 0.0).view(torch.int32)  # -0.0 equals 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ids = torch.arange(logits.shape[1], device=logits.device)
    keys = (ordered.long() << 32) | (ids ^ 0x7FFFFFFF)
    return (keys.topk(most, dim=1).values & 0x7FFFFFFF) ^ 0x7FFFFFFF
