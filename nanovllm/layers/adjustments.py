"""Adjustments: changes that a request makes to its logits before temperature and filters.

The order and the formulas are vLLM's. First come the tokens that cannot be drawn, and their logits
become -infinity. These are the tokens that `allowed_token_ids` leaves out, the last token of a bad
word, and the stop ids while the request has fewer than `min_tokens` tokens. Then `logit_bias` is
added, and the three penalties come last.

The penalties depend on the generated tokens. While the newest tokens are in flight, only the device
knows their ids. The device therefore counts the tokens itself, in a table that has a row for each
request with adjustments.
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

MAX_ADJUSTED_ROWS = 64  # at once, because adjusting copies a row's scores several times


def adjust(scores: Tensor, adjustments: Adjustments, positions: Tensor) -> None:
    """Adjust logits [num_rows, vocab_size] float32 in place, in the rows that have adjustments.

    positions: [num_rows, 1], of the new tokens.
    """
    has_some = adjustments.columns[:, TOKEN_ROW] > 0
    indices = has_some.nonzero().squeeze(1)
    for rows in indices.split(MAX_ADJUSTED_ROWS) if len(indices) else ():
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
    """Return adjusted logits [num_rows, vocab_size] float32, in vLLM's order.

    tokens, biases: [num_rows, vocab_size], the rows' entries in the tables.
    is_short: [num_rows, 1], whether a row may not stop yet.
    repetition, frequency, presence: [num_rows, 1] float32. The repetition penalty also counts the
        prompt's tokens. The other two penalties count only the generated tokens.
    """
    hidden = (tokens & FORBIDDEN > 0) | ((tokens & STOP > 0) & is_short)
    scores = scores.masked_fill(hidden, -torch.inf) + biases
    counts = tokens & COUNT
    repetition = torch.where((counts > 0) | (tokens & IN_PROMPT > 0), repetition, 1.0)
    scores = torch.where(scores > 0, scores / repetition, scores * repetition)
    return scores - frequency * counts - presence * (counts > 0)


def count_tokens(ids: Tensor, adjustments: Adjustments, positions: Tensor) -> None:
    """Add one to the count of each row's new token, ids [num_rows]. An id below 0 is no token.

    Rows without adjustments count nothing. A row at position -1 only pads the batch.
    """
    rows = adjustments.columns[:, TOKEN_ROW]
    counted = (rows > 0) & (ids >= 0) & (positions[:, 0] >= 0)
    adjustments.tokens[rows[counted], ids[counted]] += 1
