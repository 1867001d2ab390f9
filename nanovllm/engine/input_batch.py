"""InputBatch: the inputs of the running sequences, kept on the device, one row for each sequence.

A decode step reads its inputs from these rows and writes its results back to them. The id that it
samples is the input of the next step, one position later. A steady step therefore needs nothing
from the host, and it can be launched before the host has seen the ids of the step before. The host
sends only what the device cannot know: the rows of new sequences, and new blocks.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nanovllm.engine.scheduler import Batch, ScheduledSequence
from nanovllm.engine.sequence import Sequence
from nanovllm.layers.sampler import log_of
from nanovllm.logprobs import NONE
from nanovllm.metadata import NUM_COLUMNS, SamplingMetadata

if TYPE_CHECKING:
    from nanovllm.engine.adjustments import AdjustmentTables

# Columns of a row, int32. A seed takes two columns (64 bits). The sampling parameters are the bits
# of float32 numbers, except for top-k. The adjustments take six columns. The block table begins at
# a multiple of 16 bytes, because kernels read it faster there.
INPUT_ID, POSITION, NUM_LOGPROBS, SEED, TEMPERATURE, TOP_K, TOP_P = 0, 1, 2, 4, 6, 7, 8
LOG_MIN_P, ADJUSTMENTS, BLOCK_TABLE = 9, 10, 16
PADDING = slice(POSITION, NUM_LOGPROBS + 1)  # the columns that are -1 in a padding row
FLOATS = (TEMPERATURE, TOP_P, LOG_MIN_P)
NOT_CACHED = (0, -1, -1, 0)


def upload(values: np.ndarray | list, device: torch.device) -> Tensor:
    """Copy values to the device. The host does not wait for the copy."""
    tensor = torch.as_tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class InputBatch:
    """Row i holds the inputs of row i of the batch. The rows beyond the batch are padding.

    A captured step also computes the padding rows. Their position is -1, so they store nothing.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_blocks: int,
        device: torch.device,
        adjustment_tables: "AdjustmentTables",
    ):
        self.device = device
        self.adjustment_tables = adjustment_tables
        width = BLOCK_TABLE + max_blocks + max_blocks % 2  # even, so that the seeds are aligned
        self._rows = torch.zeros(max_num_seqs, width, dtype=torch.int32, device=device)
        self.input_ids = self._rows[:, INPUT_ID]
        self.positions = self._rows[:, POSITION]
        self.seeds = self._rows[:, SEED : SEED + 2].view(torch.int64)  # [max_num_seqs, 1]
        self.top_k = self._rows[:, TOP_K : TOP_K + 1]
        self.num_logprobs = self._rows[:, NUM_LOGPROBS : NUM_LOGPROBS + 1]  # or NONE
        floats = (self._rows[:, column : column + 1].view(torch.float32) for column in FLOATS)
        self.temperature, self.top_p, self.log_min_p = floats  # each [max_num_seqs, 1]
        self.adjustments = self._rows[:, ADJUSTMENTS : ADJUSTMENTS + NUM_COLUMNS]
        self.block_tables = self._rows[:, BLOCK_TABLE:]
        # For each sequence whose next input is in a row: the row, the sequence's num_admissions,
        # the position of that input, and the number of blocks in the row's block table.
        self._cached: dict[Sequence, tuple[int, int, int, int]] = {}

    def update(self, batch: Batch, num_rows: int) -> None:
        """Make row i hold the sequence of batch[i], for all i. Rows up to `num_rows` are padding.

        The row of a sequence that decoded in the step before is only moved, and gets its new
        blocks. All other rows are written anew, and so is the row of a sequence that needs its ids
        on the host.
        """
        cached, self._cached = self._cached, {}
        sources, new_rows, new_blocks = [], [], []
        for i, row in enumerate(batch):
            seq, num_blocks = row.seq, len(row.seq.block_table)
            index, num_admissions, position, num_sent = cached.get(seq, NOT_CACHED)
            is_current = num_admissions == seq.num_admissions and position == row.start
            if row.decodes and is_current and not seq.needs_ids_on_host:
                sources.append(index)
                sent = range(num_sent, num_blocks)
                new_blocks += [(i, BLOCK_TABLE + j, seq.block_table[j]) for j in sent]
            else:
                sources.append(i)
                new_rows.append(i)
            if row.samples:
                self._cached[seq] = (i, seq.num_admissions, row.end, num_blocks)
        self.adjustment_tables.free_except(self._cached)
        if sources != list(range(len(batch))):
            self._rows[: len(batch)] = self._rows[upload(sources, self.device)]
        if new_rows:
            values = self._make_rows([batch[i] for i in new_rows])
            self._rows[upload(new_rows, self.device)] = upload(values, self.device)
        if new_blocks:
            rows, columns, blocks = upload(new_blocks, self.device).T
            self._rows[rows, columns] = blocks.int()
        self._rows[len(batch) : num_rows, PADDING] = -1

    def reset(self) -> None:
        """Write all rows anew in the next update, because a failed step may have spoiled them."""
        self._cached.clear()
        self.adjustment_tables.free_except(())

    def sampling_metadata(self, rows: slice | Tensor) -> SamplingMetadata:
        """Return the sampling parameters of some rows, whose positions are those of the new ids."""
        return SamplingMetadata(
            temperature=self.temperature[rows],
            seeds=self.seeds[rows],
            positions=self.positions[rows][:, None],
            top_k=self.top_k[rows],
            top_p=self.top_p[rows],
            log_min_p=self.log_min_p[rows],
            adjustments=self.adjustment_tables.select(self.adjustments[rows]),
        )

    def set_next_ids(self, rows: slice | Tensor, token_ids: Tensor) -> None:
        """Make the sampled ids [num_rows] the inputs of the next step.

        NO_TOKEN becomes 0, because the embedding must be able to look it up. The request ends when
        the host reads its id, and what the next step computes for it is dropped.
        """
        self.input_ids[rows] = token_ids.clamp(min=0).int()

    def _make_rows(self, rows: list[ScheduledSequence]) -> np.ndarray:
        """Make rows [len(rows), width] int32 of what the host knows.

        A prompt has no next id yet, so its position is the one at which that id will be.
        """
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
            columns = self.adjustment_tables.update([rows[i] for i in adjusted])
            values[adjusted, ADJUSTMENTS : ADJUSTMENTS + NUM_COLUMNS] = columns
        for row, value in zip(rows, values, strict=True):
            if row.decodes:
                value[INPUT_ID], value[POSITION] = row.seq.token_ids[row.start], row.start
            else:
                value[POSITION] = row.end
            end = BLOCK_TABLE + len(row.seq.block_table)
            value[BLOCK_TABLE:end] = row.seq.block_table
        return values
