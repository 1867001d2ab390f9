"""What the sampling kernels do for adjustments: they adjust logits as they load them.

So nothing writes a second copy of the logits, the raw ones stay for whoever needs them, and a row
without adjustments pays one comparison. `layers/adjustments.py` says what is right.
"""

import triton
import triton.language as tl
from torch import Tensor

from nanovllm import metadata as twin
from nanovllm.metadata import Adjustments

IN_PROMPT, STOP, FORBIDDEN = (tl.constexpr(x) for x in (twin.IN_PROMPT, twin.STOP, twin.FORBIDDEN))
COUNT = tl.constexpr(twin.COUNT)
TOKEN_ROW, BIAS_ROW, MIN_LENGTH, REPETITION, FREQUENCY, PRESENCE = (
    tl.constexpr(i) for i in range(twin.NUM_COLUMNS)
)


def as_arguments(adjustments: Adjustments | None, positions: Tensor) -> tuple | None:
    """The argument `adjust` of the kernels: tensors, and the strides of their rows.

    Kernels without adjustments are compiled for None.
    """
    if adjustments is None:
        return None
    columns = adjustments.columns
    return adjustments.addresses, columns, columns.stride(0), positions, positions.stride(0)


@triton.jit
def table_row(addresses, which: tl.constexpr, TYPE: tl.constexpr, table_row, num_ids):
    """A pointer to one row of the table whose address is the number `which`."""
    table = tl.load(addresses + which).to(tl.pointer_type(TYPE))
    return tl.multiple_of(table, 16) + table_row.to(tl.int64) * num_ids


@triton.jit
def as_float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def adjusted(scores, row, ids, inside, num_ids, adjust):
    """Float32 logits of some ids of a row, adjusted. inside: which ids are in the vocabulary."""
    addresses, columns, stride, positions, position_stride = adjust
    columns += row * stride
    token_row = tl.load(columns + TOKEN_ROW)
    if token_row > 0:
        tokens = tl.load(table_row(addresses, 0, tl.int32, token_row, num_ids) + ids, inside, 0)
        position = tl.load(positions + row * position_stride)
        is_short = position < tl.load(columns + MIN_LENGTH)
        hidden = tl.where(is_short, FORBIDDEN | STOP, FORBIDDEN)
        scores = tl.where((tokens & hidden) != 0, float("-inf"), scores)
        bias_row = tl.load(columns + BIAS_ROW)
        if bias_row > 0:
            biases = table_row(addresses, 1, tl.float32, bias_row, num_ids)
            scores += tl.load(biases + ids, inside, 0.0)
        counts = tokens & COUNT
        repetition = as_float(tl.load(columns + REPETITION))
        if repetition != 1.0:
            seen = (tokens & (IN_PROMPT | COUNT)) != 0
            less = tl.where(scores > 0, tl.div_rn(scores, repetition), scores * repetition)
            scores = tl.where(seen, less, scores)
        scores -= as_float(tl.load(columns + FREQUENCY)) * counts.to(tl.float32)
        scores -= tl.where(counts > 0, as_float(tl.load(columns + PRESENCE)), 0.0)
    return scores


@triton.jit
def count_token(row, token_id, num_ids, adjust):
    """Add one to the count of the row's new token. A row at position -1 is none of the batch's."""
    addresses, columns, stride, positions, position_stride = adjust
    token_row = tl.load(columns + row * stride + TOKEN_ROW)
    if (token_row > 0) & (tl.load(positions + row * position_stride) >= 0):
        count = table_row(addresses, 0, tl.int32, token_row, num_ids) + token_id
        tl.store(count, tl.load(count) + 1)
