"""ModelRunner: run a scheduled batch through the model, and sample the next token ids.

The tokens of all rows follow one another in flat tensors, and the decode rows come first. A decode
row takes its inputs from the input batch on the device. A step of decode rows alone needs nothing
from the host, so on a GPU we capture it as a CUDA graph and replay it. The tokens of a prompt come
from the host, so a step that computes some of them runs eagerly.
"""

from itertools import accumulate, product
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from nanovllm.config import EngineArgs
from nanovllm.distributed.ranks import Ranks
from nanovllm.engine.adjustments import AdjustmentTables
from nanovllm.engine.cuda_graphs import GraphRunner
from nanovllm.engine.input_batch import InputBatch, upload
from nanovllm.engine.prompt_logprobs import gather_prompt_logprobs
from nanovllm.engine.scheduler import Batch
from nanovllm.layers.sampler import sample
from nanovllm.metadata import NO_TOKEN, AttentionMetadata, PhaseMetadata
from nanovllm.models.decoder import Decoder


class ModelRunnerOutput(NamedTuple):
    """What a step computes, on the device. Logprobs are packed as in `layers/logprobs.py`."""

    token_ids: Tensor | None = None  # [num_sampled] int64; None: no row samples
    logprobs: Tensor | None = None  # [num_sampled, WIDTH] int32; None: no row asks for them
    prompt_logprobs: Tensor | None = None  # [num_positions, WIDTH] int32; None: as above


class AsyncModelRunnerOutput:
    """The output of a launched step, on its way to the host. Logprobs are valid after `read`.

    On a GPU the copy is queued behind the step and before the next step, so that reading waits for
    this step alone. The GPU works while the host plans.
    """

    def __init__(self, ranks: Ranks, output: ModelRunnerOutput):
        self._ranks = ranks
        self._copied: torch.cuda.Event | None = None
        self._token_ids = self._copy_to_host(output.token_ids)
        self.logprobs = self._copy_to_host(output.logprobs)
        self.prompt_logprobs = self._copy_to_host(output.prompt_logprobs)
        if self._copied is not None:
            self._copied.record()

    def _copy_to_host(self, values: Tensor | None) -> Tensor | None:
        """Return the values on the host. On a GPU this only queues the copy."""
        if values is None or not values.is_cuda:
            return values
        self._copied = self._copied or torch.cuda.Event()
        copy = torch.empty_like(values, device="cpu", pin_memory=True)
        return copy.copy_(values, non_blocking=True)

    def read(self) -> list[int | None]:
        """Wait for the copies, and return the ids; None for a row whose logits were not finite."""
        if self._copied is not None:
            self._ranks.synchronize(self._copied)
        token_ids = [] if self._token_ids is None else self._token_ids.tolist()
        return [None if token_id == NO_TOKEN else token_id for token_id in token_ids]


class ModelRunner:
    """Runs the steps of one model over one KV cache, on one rank.

    kv_cache: [layers, 2, num_blocks, block_size, local kv_heads, head_dim].
    """

    def __init__(self, model: Decoder, kv_cache: Tensor, args: EngineArgs):
        self.model, self.kv_cache = model, kv_cache
        self.ranks, self.backend = model.ranks, model.backend
        self.block_size = kv_cache.shape[3]
        self.device = kv_cache.device
        max_model_len = cast(int, args.max_model_len)  # resolved
        max_blocks = -(-max_model_len // self.block_size)
        tables = AdjustmentTables(model.vocab_size, self.device)
        self.input_batch = InputBatch(args.max_num_seqs, max_blocks, self.device, tables)
        self.graph_runner = GraphRunner(self.device)

    @property
    def num_blocks(self) -> int:
        return self.kv_cache.shape[2]

    # -- a step ----------------------------------------------------------------------------------

    @torch.inference_mode()
    def launch(self, batch: Batch) -> AsyncModelRunnerOutput:
        """Start a step. A GPU has queued all its kernels when this returns; a CPU has run them."""
        with torch.accelerator.device_index(self.device.index):
            try:
                return AsyncModelRunnerOutput(self.ranks, self.execute_model(batch))
            except BaseException:
                self.input_batch.reset()
                raise

    def execute_model(self, batch: Batch) -> ModelRunnerOutput:
        """Run a step: replay a graph if all rows decode and one is captured, else run eagerly."""
        num_decodes = next((i for i, row in enumerate(batch) if not row.decodes), len(batch))
        whole_rows = any(row.samples and row.seq.needs_whole_rows for row in batch)
        if num_decodes == len(batch):
            size = self.graph_runner.padded_size(num_decodes)
            self.input_batch.update(batch, size)
            step = size, whole_rows or self.ranks.world_size == 1
            if step in self.graph_runner.graphs:
                output = self.graph_runner.replay(step)
            else:
                output = self.decode_step(size, whole_rows)
        else:
            self.input_batch.update(batch, len(batch))
            sampling_rows = [i for i, row in enumerate(batch) if row.samples]
            output = self.mixed_step(batch, num_decodes, sampling_rows, whole_rows)
        return self._drop_unwanted(output, batch, whole_rows)

    def _drop_unwanted(
        self, output: ModelRunnerOutput, batch: Batch, whole_rows: bool
    ) -> ModelRunnerOutput:
        """Drop the outputs of padding rows, and the logprobs if no row asks for some."""
        token_ids, logprobs, prompt_logprobs = output
        if token_ids is not None:
            token_ids = token_ids[: len(batch)]
        asks = whole_rows and any(r.samples and r.seq.params.logprobs is not None for r in batch)
        logprobs = logprobs[: len(batch)] if asks and logprobs is not None else None
        return ModelRunnerOutput(token_ids, logprobs, prompt_logprobs)

    def decode_step(self, size: int, whole_rows: bool) -> ModelRunnerOutput:
        """Run the first `size` rows of the input batch, which all decode. The host sends nothing.

        whole_rows: whether a row has filters, adjustments or logprobs. Several ranks then gather
        whole rows of logits. Otherwise they only compare each rank's best token.
        """
        positions = self.input_batch.positions[:size]
        metadata = AttentionMetadata(positions, self._decode_metadata(size), None)
        hidden = self.model(self.input_batch.input_ids[:size], self.kv_cache, metadata)
        positions += positions >= 0
        return ModelRunnerOutput(*self.sample_tokens(hidden, slice(size), whole_rows))

    def mixed_step(
        self, batch: Batch, num_decodes: int, sampling_rows: list[int], whole_rows: bool
    ) -> ModelRunnerOutput:
        """Run a step that computes tokens of prompts. `sampling_rows` are the rows that sample."""
        input_ids, positions, prefill = self._prefill_inputs(batch[num_decodes:], num_decodes)
        decode = None
        if num_decodes:
            decode = self._decode_metadata(num_decodes)
            input_ids = torch.cat((self.input_batch.input_ids[:num_decodes], input_ids))
            positions = torch.cat((self.input_batch.positions[:num_decodes], positions))
        metadata = AttentionMetadata(positions, decode, prefill)
        hidden = self.model(input_ids, self.kv_cache, metadata)
        self.input_batch.positions[:num_decodes] += 1
        prompt_logprobs = None
        if any(row.seq.params.prompt_logprobs is not None for row in batch):
            prompt_logprobs = gather_prompt_logprobs(self, batch, hidden)
        if not sampling_rows:
            return ModelRunnerOutput(prompt_logprobs=prompt_logprobs)
        last_tokens = np.cumsum([row.num_tokens for row in batch])[sampling_rows] - 1
        hidden = hidden[upload(last_tokens, self.device)]
        rows = upload(sampling_rows, self.device)
        return ModelRunnerOutput(*self.sample_tokens(hidden, rows, whole_rows), prompt_logprobs)

    def _decode_metadata(self, size: int) -> PhaseMetadata:
        rows = self.input_batch
        tables, positions = rows.block_tables[:size], rows.positions[:size]
        k_cache = self.kv_cache[0, 0]
        return self.backend.plan_decode(positions, tables, k_cache, self.model.num_local_heads)

    def _prefill_inputs(
        self, rows: Batch, num_decodes: int
    ) -> tuple[Tensor, Tensor, PhaseMetadata]:
        """Return the ids and positions of the rows' tokens, both [num_tokens] int32, and metadata.

        A token of a cached block gets the slot -1, because other sequences may be reading the
        block, so that nobody writes to it again.
        """
        ids, positions, slots = [], [], []
        for row in rows:
            at = np.arange(row.start, row.end)
            blocks = np.array(row.seq.block_table)[at // self.block_size]
            slot = blocks * self.block_size + at % self.block_size
            slots.append(np.where(at < row.seq.num_cached_tokens, -1, slot))
            positions.append(at)
            ids += row.seq.token_ids[row.start : row.end]
        counts = [row.num_tokens for row in rows]
        metadata = PhaseMetadata(
            slot_mapping=upload(np.concatenate(slots), self.device),
            seq_lens=upload(np.array([row.end for row in rows], np.int32), self.device),
            block_tables=self.input_batch.block_tables[num_decodes : num_decodes + len(rows)],
            query_start_loc=upload(np.array([0, *accumulate(counts)], np.int32), self.device),
            max_query_len=max(counts),
        )
        flat = np.concatenate(positions).astype(np.int32)
        return upload(np.array(ids, np.int32), self.device), upload(flat, self.device), metadata

    # -- sampling --------------------------------------------------------------------------------

    def sample_tokens(
        self, hidden: Tensor, rows: slice | Tensor, whole_rows: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Sample an id for each hidden state, and make it the next input of its row.

        Returns the ids [num_rows] int64 and, with whole_rows, packed logprobs [num_rows, WIDTH].
        """
        metadata, size = self.input_batch.sampling_metadata(rows), self.model.vocab_size
        logits = self.gather_logits(hidden) if whole_rows else self.model.compute_logits(hidden)
        token_ids = sample(logits, metadata, self.ranks, size, self.backend, whole_rows)
        logprobs = None
        if whole_rows:
            num_logprobs = self.input_batch.num_logprobs[rows]
            logprobs = self.backend.gather_logprobs(logits, token_ids, num_logprobs)
        self.input_batch.set_next_ids(rows, token_ids)
        return token_ids, logprobs

    def gather_logits(self, hidden: Tensor) -> Tensor:
        """Return whole rows of logits [num_rows, vocab_size], gathered from all ranks."""
        logits = self.model.compute_logits(hidden)
        if self.ranks.world_size == 1:
            return logits
        return self.ranks.all_gather_columns(logits, self.model.vocab_size)

    # -- CUDA graphs -----------------------------------------------------------------------------

    @property
    def whole_rows_cases(self) -> tuple[bool, ...]:
        """The values of `whole_rows` that lead to different kernels. One rank has all logits."""
        return (False, True) if self.ranks.world_size > 1 else (True,)

    @torch.inference_mode()
    def capture_graphs(self, sizes: list[int]) -> None:
        """Capture a decode step of each batch size. All rows are padding, so they store nothing."""
        if not sizes:
            return
        with torch.accelerator.device_index(self.device.index):
            self.input_batch.positions.fill_(-1)
            steps = product(sorted(sizes, reverse=True), self.whole_rows_cases)
            self.graph_runner.capture(self.decode_step, steps)
