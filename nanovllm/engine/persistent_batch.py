"""PersistentBatch: what the device knows of the running sequences, one row each.

A step that decodes reads its inputs here and writes its results here: the id it samples is the
next step's input, one position on. So a steady step needs nothing from the host, and can be
launched before the host has seen the last step's ids. The host sends what the device cannot know:
sequences that have come, and blocks that were added to their tables.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nanovllm.engine.scheduler import Batch, ScheduledSequence
from nanovllm.engine.sequence import Sequence
from nanovllm.layers.sampler import log_of
from nanovllm.logprobs import NONE
from nanovllm.metadata import NUM_COLUMNS

if TYPE_CHECKING:
    from nanovllm.engine.adjustments import AdjustmentTables

# Columns of a row, int32: the next input id, its position, the number of logprobs, a seed (64
# bits), the sampling parameters (the bits of a float, except for top-k), the adjustments (6
# columns), the block table. The table begins at a multiple of 16 bytes, which kernels read faster.
ID, POSITION, NUM_LOGPROBS, SEED, TEMPERATURE, TOP_K, TOP_P, LOG_MIN_P = 0, 1, 2, 4, 6, 7, 8, 9
ADJUST, TABLE = 10, 16
EMPTY = slice(POSITION, NUM_LOGPROBS + 1)  # columns that are -1 in a row that holds no sequence
FLOATS = (TEMPERATURE, TOP_P, LOG_MIN_P)


def upload(values: np.ndarray | list, device: torch.device) -> Tensor:
    """A copy on the device, which the host does not wait for."""
    tensor = torch.as_tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class PersistentBatch:
    """Row i is the last batch's row i. A graph may compute rows beyond it: their position is -1."""

    def __init__(
        self,
        max_num_seqs: int,
        max_blocks: int,
        device: torch.device,
        tables: "AdjustmentTables",
    ):
        self.device = device
        self.tables = tables  # of the rows that have adjustments
        width = TABLE + max_blocks + max_blocks % 2  # even: seeds are aligned
        self._rows = torch.zeros(max_num_seqs, width, dtype=torch.int32, device=device)
        self.ids = self._rows[:, ID]
        self.positions = self._rows[:, POSITION]
        self.seeds = self._rows[:, SEED : SEED + 2].view(torch.int64)  # [max_num_seqs, 1]
        self.top_k = self._rows[:, TOP_K : TOP_K + 1]
        self.num_logprobs = self._rows[:, NUM_LOGPROBS : NUM_LOGPROBS + 1]  # or NONE
        floats = (self._rows[:, column : column + 1].view(torch.float32) for column in FLOATS)
        self.temperatures, self.top_p, self.log_min_p = floats  # each [max_num_seqs, 1]
        self.adjustments = self._rows[:, ADJUST : ADJUST + NUM_COLUMNS]
        self.block_tables = self._rows[:, TABLE:]
        # Of sequences whose next id is here: row, admission, position of that id, blocks sent.
        self._placed: dict[Sequence, tuple[int, int, int, int]] = {}

    def place(self, batch: Batch, num_rows: int) -> None:
        """Make row i hold batch[i]'s sequence, for all i; rows up to `num_rows` hold none.

        What the device holds of a sequence is good for its next step, unless the sequence needs its
        ids on the host. Such a row is written anew each time.
        """
        placed, self._placed = self._placed, {}
        sources, fresh, grown = [], [], []
        for i, row in enumerate(batch):
            seq, num_blocks = row.seq, len(row.seq.block_table)
            old = None if seq.needs_ids_on_host else placed.get(seq)
            if old and row.decodes and old[1:3] == (seq.num_admissions, row.start):
                sources.append(old[0])
                grown += [(i, TABLE + j, seq.block_table[j]) for j in range(old[3], num_blocks)]
            else:
                sources.append(i)
                fresh.append(i)
            if row.samples:
                self._placed[seq] = (i, seq.num_admissions, row.end, num_blocks)
        self.tables.keep(self._placed)
        if sources != list(range(len(batch))):
            self._rows[: len(batch)] = self._rows[upload(sources, self.device)]
        if fresh:
            rows = self._make_rows([batch[i] for i in fresh])
            self._rows[upload(fresh, self.device)] = upload(rows, self.device)
        if grown:
            rows, columns, blocks = upload(grown, self.device).T
            self._rows[rows, columns] = blocks.int()
        self._rows[len(batch) : num_rows, EMPTY] = -1

    def forget(self) -> None:
        """A step failed: nothing that the device holds is to be relied on."""
        self._placed.clear()
        self.tables.keep(())

    def _make_rows(self, rows: list[ScheduledSequence]) -> np.ndarray:
        """What the host knows of some rows. A prompt's position is where its next id will stand."""
        values = np.zeros((len(rows), self._rows.shape[1]), np.int32)
        values[:, SEED : SEED + 2].view(np.int64)[:, 0] = [row.seq.seed for row in rows]
        params = [row.seq.params for row in rows]
        values[:, TOP_K] = [max(p.top_k, 0) for p in params]
        values[:, NUM_LOGPROBS] = [NONE if p.logprobs is None else p.logprobs for p in params]
        values[:, FLOATS] = np.array(
            [(0 if p.is_greedy else p.temperature, p.top_p, log_of(p.min_p)) for p in params],
            np.float32,
        ).view(np.int32)
        adjusted = [i for i, row in enumerate(rows) if row.samples and row.seq.params.adjusts]
        if adjusted:
            columns = self.tables.fill([rows[i] for i in adjusted])
            values[adjusted, ADJUST : ADJUST + NUM_COLUMNS] = columns
        for row, value in zip(rows, values, strict=True):
            if row.decodes:
                value[ID], value[POSITION] = row.seq.token_ids[row.start], row.start
            else:
                value[POSITION] = row.end
            value[TABLE : TABLE + len(row.seq.block_table)] = row.seq.block_table
        return values
