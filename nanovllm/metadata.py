"""The dataclasses that the engine passes to layers and kernels: of attention, and of sampling.

A step computes a flat batch: the new tokens of all rows follow one another, without padding. The
attention metadata says which row a token belongs to and where its key and value are stored. Only
the attention layers need it, because every other layer treats all tokens alike. The sampling
metadata holds the parameters of the rows whose next token the sampler chooses.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PhaseMetadata:
    """The rows of one phase, decode or prefill. Each row's context ends with its new tokens.

    A batch may be padded to a captured size. A padding row has a length of 0 and stores nothing.
    """

    slot_mapping: Tensor  # [num_tokens] int64: block_id * block_size + offset; -1: do not store
    seq_lens: Tensor  # [num_rows] int32: tokens to read, the new ones included; 0: a padding row
    block_tables: Tensor  # [num_rows, max_blocks] int32; entries beyond a row's length are not read
    query_start_loc: Tensor  # [num_rows + 1] int32: row i's new tokens are [loc[i], loc[i + 1])
    max_query_len: int = 1  # new tokens of the row that has most
    plan: Any = None  # how the kernels divide the work among their programs

    @cached_property
    def seq_lens_cpu(self) -> list[int]:
        """`seq_lens` on the host. All layers of a step share one wait for the device."""
        return self.seq_lens.tolist()


@dataclass(frozen=True)
class AttentionMetadata:
    """The rows of a flat batch: first the decode rows with one new token each, then the prefill."""

    positions: Tensor  # [num_tokens]
    decode: PhaseMetadata | None
    prefill: PhaseMetadata | None

    @cached_property
    def slot_mapping(self) -> Tensor:
        """The slots [num_tokens] int64 of all tokens, of both phases."""
        phases = (self.decode, self.prefill)
        slots = [phase.slot_mapping for phase in phases if phase is not None]
        return slots[0] if len(slots) == 1 else torch.cat(slots)


# -- sampling ------------------------------------------------------------------------------------

NO_TOKEN = (
    -1
)  # the id of a row whose best score is not finite, because nothing can be drawn from it
# An entry of the token table belongs to one token of the vocabulary. It holds three flags, and in
# the bits below them the number of times that the request has generated the token. STOP hides the
# token while the request has too few tokens.
IN_PROMPT, STOP, FORBIDDEN = 1 << 30, 1 << 29, 1 << 28
COUNT = FORBIDDEN - 1
# The columns of a request's adjustments are int32. They hold its rows of the two tables (0 means
# that it has none), the length of prompt and output from which it may stop, and the bits of the
# three penalties.
TOKEN_ROW, BIAS_ROW, MIN_LENGTH, REPETITION, FREQUENCY, PRESENCE, NUM_COLUMNS = range(7)


@dataclass(frozen=True)
class Adjustments:
    """The adjustments of the rows that are sampled. All tensors are on the device.

    Row 0 of both tables belongs to no request and is all 0. The tables can move when they grow, so
    a captured kernel reads their addresses from `addresses`.
    """

    columns: Tensor  # [num_rows, NUM_COLUMNS] int32
    tokens: Tensor  # [table rows, vocab_size] int32: flags and counts
    biases: Tensor  # [table rows, vocab_size] float32
    addresses: Tensor  # [2] int64, of `tokens` and `biases`

    def floats(self, column: int) -> Tensor:
        """Return a column of penalties, [num_rows, 1] float32."""
        return self.columns[:, column : column + 1].view(torch.float32)


@dataclass(frozen=True)
class SamplingMetadata:
    """The sampling parameters of the rows that are sampled. All tensors are on the device."""

    temperature: Tensor  # [num_rows, 1] float32; 0 means greedy
    seeds: Tensor  # [num_rows, 1] int64
    positions: Tensor  # [num_rows, 1]: the positions of the new tokens
    top_k: Tensor  # [num_rows, 1] int32; 0 keeps all tokens
    top_p: Tensor  # [num_rows, 1] float32; 1 keeps all tokens
    log_min_p: Tensor  # [num_rows, 1] float32, the logarithm of min_p; -inf keeps all tokens
    adjustments: Adjustments | None = None  # None: no row has adjustments
