"""Adjustments: what a request may do to its logits before the temperature and the filters.

The order and the formulas are vLLM's. First come the tokens that cannot be drawn: those that
`allowed_token_ids` leaves out, the end of a bad word, and the stop ids as long as `min_tokens` are
not reached. Their logits become -infinity. Then `logit_bias` is added, and at last come the three
penalties. They depend on what was generated, and the newest tokens are known to the device alone
while they are in flight. So the device counts the tokens itself, in a table with a row for each
request that has adjustments.
"""

import torch
from torch import Tensor

from nanovllm.metadata import (
    BIAS_ROW,
    COUNT,
    FORBIDDEN,
    FREQUENCY,
    IN_PROMPT,
    MIN_LENGTH,
    PRESENCE,
    REPETITION,
    STOP,
    TOKEN_ROW,
    Adjustments,
)

ADJUSTED_AT_ONCE = 64  # rows, because adjusting copies a row's scores several times


def adjust(scores: Tensor, adjustments: Adjustments, positions: Tensor) -> None:
    """Adjust logits [num_rows, vocab_size] float32 in place, where a row has adjustments.

    positions: [num_rows, 1], of the new tokens.
    """
    has_some = adjustments.columns[:, TOKEN_ROW] > 0
    indices = has_some.nonzero().squeeze(1)
    for rows in indices.split(ADJUSTED_AT_ONCE) if len(indices) else ():
        columns = adjustments.columns[rows]
        scores[rows] = adjust_scores(
            scores[rows],
            adjustments.tokens[columns[:, TOKEN_ROW]],
            adjustments.biases[columns[:, BIAS_ROW]],
            positions[rows] < columns[:, MIN_LENGTH : MIN_LENGTH + 1],
            *(adjustments.floats(column)[rows] for column in (REPETITION, FREQUENCY, PRESENCE)),
        )


def adjust_scores(
    scores: Tensor,
    tokens: Tensor,
    biases: Tensor,
    is_short: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> Tensor:
    """Adjusted logits [num_rows, vocab_size] float32, in vLLM's order.

    tokens and biases are the rows' entries in the tables. is_short: [num_rows, 1], whether a row
    may not stop yet. The penalties are [num_rows, 1] float32. Repetition counts the prompt's
    tokens as well; frequency and presence count the generated ones alone.
    """
    hidden = (tokens & FORBIDDEN > 0) | ((tokens & STOP > 0) & is_short)
    scores = scores.masked_fill(hidden, -torch.inf) + biases
    counts = tokens & COUNT
    repetition = torch.where((counts > 0) | (tokens & IN_PROMPT > 0), repetition, 1.0)
    scores = torch.where(scores > 0, scores / repetition, scores * repetition)
    return scores - frequency * counts - presence * (counts > 0)


def count_tokens(ids: Tensor, adjustments: Adjustments, positions: Tensor) -> None:
    """Add one to the count of each row's new token, ids [num_rows]; below 0 there is none.

    A row without adjustments counts nothing, and a row at position -1 is none of the batch's.
    """
    rows = adjustments.columns[:, TOKEN_ROW]
    counted = (rows > 0) & (ids >= 0) & (positions[:, 0] >= 0)
    adjustments.tokens[rows[counted], ids[counted]] += 1
