"""AdjustmentTables: what the device knows about the tokens of each request that has adjustments.

Two tables have a row of vocab_size entries for each such request. One table counts tokens and holds
flags for them (see `layers/adjustments.py`), and the other one holds biases. We write a row from
what the host knows at the time when we write the request's row of the input batch. From then on the
device counts by itself, so that the host need not have seen the newest tokens.

A table is made when the first request needs it, because 512 rows of 151,936 entries take 310 MB. It
doubles when it is full, up to max_num_seqs rows. Steps without such requests do not touch it.
"""

from collections.abc import Container, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanovllm.engine.input_batch import upload
from nanovllm.engine.scheduler import ScheduledSequence
from nanovllm.engine.sequence import Sequence
from nanovllm.metadata import (
    BIAS_ROW,
    FORBIDDEN,
    FREQUENCY,
    IN_PROMPT,
    MIN_LENGTH,
    NUM_COLUMNS,
    PRESENCE,
    REPETITION,
    STOP,
    TOKEN_ROW,
    Adjustments,
)

INITIAL_ROWS = 16  # that a table has when it is made; row 0 belongs to no request
Entries = list[tuple[Iterable[int], Any]]  # ids, and what is added: one number, or one for each


class Table:
    """Rows of [vocab_size] numbers, of which each sequence may have one. Row 0 belongs to none."""

    def __init__(self, vocab_size: int, dtype: torch.dtype, address: Tensor):
        self.values = torch.zeros(1, vocab_size, dtype=dtype, device=address.device)
        self.row_of: dict[Sequence, int] = {}
        self._address = address  # one number on the device, where captured kernels look it up
        self._address.fill_(self.values.data_ptr())

    def free_except(self, seqs: Container[Sequence]) -> None:
        """Free the rows of all sequences except for these."""
        for seq in [seq for seq in self.row_of if seq not in seqs]:
            del self.row_of[seq]

    def allocate(self, seqs: list[Sequence]) -> list[int]:
        """Give each of these sequences a row, unless it has one. Return their rows."""
        new = [seq for seq in seqs if seq not in self.row_of]
        self._grow(1 + len(self.row_of) + len(new))
        used = set(self.row_of.values())
        free = (row for row in range(1, len(self.values)) if row not in used)
        self.row_of.update(zip(new, free, strict=False))  # there may be more free rows
        return [self.row_of[seq] for seq in seqs]

    def _grow(self, num_rows: int) -> None:
        old_rows, vocab_size = self.values.shape
        if num_rows <= old_rows:
            return
        num_rows = max(num_rows, 2 * old_rows, INITIAL_ROWS)
        try:
            grown = self.values.new_zeros(num_rows, vocab_size)
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                f"no memory for penalties, biases or forbidden tokens of {num_rows} requests at "
                f"once, which take {num_rows * vocab_size * self.values.itemsize:,} bytes: lower "
                f"max_num_seqs or gpu_memory_utilization"
            ) from error
        grown[:old_rows] = self.values
        self.values = grown
        self._address.fill_(grown.data_ptr())

    def write(self, rows: list[int], initial: list[int], entries: list[Entries]) -> None:
        """Fill each row with its `initial` number, and then add its entries."""
        device, vocab_size = self.values.device, self.values.shape[1]
        self.values[upload(rows, device)] = upload(initial, device)[:, None].to(self.values.dtype)
        index, added = [], []
        for row, parts in zip(rows, entries, strict=True):
            for ids, number in parts:
                index.append(np.fromiter(ids, np.int64) + row * vocab_size)
                added.append(np.broadcast_to(number, index[-1].shape))
        if index:
            values = upload(np.concatenate(added), device).to(self.values.dtype)
            self.values.view(-1).scatter_add_(0, upload(np.concatenate(index), device), values)


class AdjustmentTables:
    """The two tables, and the columns that lead from a row of the input batch to them."""

    def __init__(self, vocab_size: int, device: torch.device):
        self.vocab_size = vocab_size
        self.addresses = torch.zeros(2, dtype=torch.int64, device=device)
        self.tokens = Table(vocab_size, torch.int32, self.addresses[0])
        self.biases = Table(vocab_size, torch.float32, self.addresses[1])

    def free_except(self, seqs: Container[Sequence]) -> None:
        """Free the rows of all sequences except for these, in both tables."""
        self.tokens.free_except(seqs)
        self.biases.free_except(seqs)

    def update(self, rows: list[ScheduledSequence]) -> np.ndarray:
        """Write the tables' rows of sequences whose ids up to `end` the host knows.

        Returns the sequences' columns [len(rows), NUM_COLUMNS] int32.
        """
        seqs = [row.seq for row in rows]
        columns = np.zeros((len(seqs), NUM_COLUMNS), np.int32)
        columns[:, TOKEN_ROW] = self.tokens.allocate(seqs)
        initial = [0 if seq.params.allowed_token_ids is None else FORBIDDEN for seq in seqs]
        entries = [token_entries(row.seq, row.end, self.vocab_size) for row in rows]
        self.tokens.write(columns[:, TOKEN_ROW].tolist(), initial, entries)
        biased = [i for i, seq in enumerate(seqs) if seq.params.logit_bias]
        if biased:
            bias_rows = self.biases.allocate([seqs[i] for i in biased])
            columns[biased, BIAS_ROW] = bias_rows
            biases = [seqs[i].params.logit_bias or {} for i in biased]
            entries = [[(bias.keys(), list(bias.values()))] for bias in biases]
            self.biases.write(bias_rows, [0] * len(bias_rows), entries)
        columns[:, MIN_LENGTH] = [seq.num_prompt_tokens + seq.params.min_tokens for seq in seqs]
        columns[:, [REPETITION, FREQUENCY, PRESENCE]] = np.array(
            [
                (p.repetition_penalty, p.frequency_penalty, p.presence_penalty)
                for p in (seq.params for seq in seqs)
            ],
            np.float32,
        ).view(np.int32)
        return columns

    def select(self, columns: Tensor) -> Adjustments:
        """Return the adjustments of the rows with these columns [num_rows, NUM_COLUMNS] int32."""
        return Adjustments(columns, self.tokens.values, self.biases.values, self.addresses)


def token_entries(seq: Sequence, length: int, vocab_size: int) -> Entries:
    """Return what the table of tokens holds for the first `length` ids of a sequence."""
    params, start = seq.params, seq.num_prompt_tokens
    output = seq.token_ids[start:length]
    forbidden = ends_of_bad_words(seq.bad_word_ids, output)
    entries: Entries = [(output, 1)]
    if params.allowed_token_ids is None:
        entries.append((forbidden, FORBIDDEN))
    else:  # the row is full of FORBIDDEN
        entries.append((set(params.allowed_token_ids) - forbidden, -FORBIDDEN))
    if params.min_tokens:
        entries.append(([i for i in seq.end_ids if i < vocab_size], STOP))
    if params.repetition_penalty != 1:
        entries.append((set(seq.token_ids[:start]), IN_PROMPT))
    return entries


def ends_of_bad_words(bad_word_ids: list[list[int]], output: list[int]) -> set[int]:
    """Return the tokens that would complete a bad word at the end of this output."""
    return {
        last
        for *first, last in bad_word_ids
        if not first or output[-len(first) :] == first
    }  # fmt: skip
