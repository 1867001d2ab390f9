"""ModelRunner: from a planned batch to the ids it samples.

The rows' tokens stand end to end in flat tensors, decode rows first. Those take their ids from the
persistent batch; a step of them alone touches device memory only, so on a GPU it is captured once
for each batch size as a CUDA graph, and replayed. Prompts come from the host, and run eagerly.
"""

from collections.abc import Callable
from functools import wraps
from itertools import accumulate
from types import SimpleNamespace as Namespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanovllm.config import EngineArgs
from nanovllm.engine.persistent_batch import PersistentBatch, upload
from nanovllm.engine.scheduler import Batch
from nanovllm.model.decoder import Decoder
from nanovllm.model.ranks import Ranks
from nanovllm.ops.attention import SLOTS_AT_ONCE, AttentionMetadata, Rows
from nanovllm.ops.sampler import NO_TOKEN, Filters, SamplingMetadata, sample, sample_filtered
from nanovllm.sampling_params import LARGEST_INT

FILTERED_AT_ONCE = 64  # rows: filters need room for several copies of all logits


def on_its_device(method: Callable) -> Callable:
    """Run a runner's method with its GPU as the current one, and nothing kept for gradients."""

    @wraps(method)
    def run(self: "ModelRunner", *args: Any) -> Any:
        with torch.inference_mode(), torch.accelerator.device_index(self.device.index):
            return method(self, *args)

    return run


class PendingTokens:
    """The ids a launched step samples, on their way to the host; reading them waits for them.

    On a GPU the copy is queued behind the step that makes them and before the next one, so that
    reading waits for this step alone. The step itself runs on while the host plans.
    """

    def __init__(self, ids: Tensor | None, ranks: Ranks):
        self._ids = ids  # [num_sampled] int64 on the device; None: no row sampled
        self._ranks = ranks
        self._copied: torch.cuda.Event | None = None
        if ids is not None and ids.is_cuda:
            self._ids = torch.empty_like(ids, device="cpu", pin_memory=True)
            self._ids.copy_(ids, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> list[int | None]:
        """The ids; None in place of NO_TOKEN, for a row whose logits were not finite."""
        if self._copied is not None:
            self._ranks.wait_for(self._copied)
        ids = [] if self._ids is None else self._ids.tolist()
        return [None if token_id == NO_TOKEN else token_id for token_id in ids]


class ModelRunner:
    """Runs steps of one model over one KV cache, on one rank.

    kv_cache: [layers, 2, num_blocks, block_size, local kv_heads, head_dim].
    """

    def __init__(self, model: Decoder, kv_cache: Tensor, args: EngineArgs):
        self.model, self.kv_cache = model, kv_cache
        self.ranks, self.backend = model.ranks, model.backend
        self.block_size = kv_cache.shape[3]
        self.device = kv_cache.device
        max_blocks = -(-args.max_model_len // self.block_size)
        self.rows = PersistentBatch(args.max_num_seqs, max_blocks, self.device)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}  # by batch size

    # -- a step ----------------------------------------------------------------------------------

    @on_its_device
    def launch(self, batch: Batch) -> PendingTokens:
        """Start a step: every kernel is queued when this returns, on a CPU even done."""
        try:
            return PendingTokens(self._launch(batch), self.ranks)
        except BaseException:
            self.rows.forget()
            raise

    def _launch(self, batch: Batch) -> Tensor | None:
        """The ids [num_sampled] that the step samples."""
        num_decodes = next((i for i, row in enumerate(batch) if not row.decodes), len(batch))
        if num_decodes == len(batch):
            size = self._graph_size(num_decodes)
            self.rows.place(batch, size)
            hidden, ids = self._replay(size) if size in self.graphs else self._decode(size)
            sampling = list(range(num_decodes))
        else:
            self.rows.place(batch, len(batch))
            sampling = [i for i, row in enumerate(batch) if row.samples]
            hidden, ids = self._mixed(batch, num_decodes, sampling)
        if not sampling:
            return None
        filtered = [i for i, row in enumerate(sampling) if batch[row].seq.params.filters]
        for at in range(0, len(filtered), FILTERED_AT_ONCE):
            self._filter(batch, sampling, filtered[at : at + FILTERED_AT_ONCE], hidden, ids)
        return ids[: len(sampling)]

    def _decode(self, size: int) -> tuple[Tensor, Tensor]:
        """A step of the first `size` rows, from their ids to their next ids, on the device alone.

        Returns hidden states [size, hidden_size] and ids [size].
        """
        positions = self.rows.positions[:size]
        decodes = self._plan_decodes(size)
        batch = AttentionMetadata(positions, decodes, None)
        hidden = self.model(self.rows.ids[:size], self.kv_cache, batch)
        positions += positions >= 0
        return hidden, self._sample(hidden, slice(size))

    def _mixed(
        self, batch: Batch, num_decodes: int, sampling: list[int]
    ) -> tuple[Tensor | None, Tensor | None]:
        """A step in which prompts are computed; hidden states and ids of the `sampling` rows."""
        counts = [row.num_tokens for row in batch]
        input_ids, positions, prompts = self._prompts(batch[num_decodes:], num_decodes)
        decodes = None
        if num_decodes:
            decodes = self._plan_decodes(num_decodes)
            input_ids = torch.cat((self.rows.ids[:num_decodes], input_ids))
            positions = torch.cat((self.rows.positions[:num_decodes], positions))
        metadata = AttentionMetadata(positions, decodes, prompts)
        hidden = self.model(input_ids, self.kv_cache, metadata)
        self.rows.positions[:num_decodes] += 1
        if not sampling:
            return None, None
        hidden = hidden[upload(np.cumsum(counts)[sampling] - 1, self.device)]
        return hidden, self._sample(hidden, upload(sampling, self.device))

    def _plan_decodes(self, size: int) -> Rows:
        tables, positions = self.rows.block_tables[:size], self.rows.positions[:size]
        k_cache = self.kv_cache[0, 0]
        return self.backend.plan_decodes(positions, tables, k_cache, self.model.local_heads)

    def _prompts(self, rows: Batch, num_before: int) -> tuple[Tensor, Tensor, Rows]:
        """The rows' ids and positions, both [num_tokens] int32, and where they are stored.

        What a shared block holds is not stored again: such a block is never written.
        """
        ids, positions, slots = [], [], []
        for row in rows:
            at = np.arange(row.start, row.end)
            blocks = np.array(row.seq.block_table)[at // self.block_size]
            slot = blocks * self.block_size + at % self.block_size
            slots.append(np.where(at < row.seq.num_cached, -1, slot))
            positions.append(at)
            ids += row.seq.token_ids[row.start : row.end]
        counts = [row.num_tokens for row in rows]
        prompts = Rows(
            slot_mapping=upload(np.concatenate(slots), self.device),
            context_lens=upload(np.array([row.end for row in rows], np.int32), self.device),
            block_tables=self.rows.block_tables[num_before : num_before + len(rows)],
            starts=upload(np.array([0, *accumulate(counts)], np.int32), self.device),
            longest=max(counts),
        )
        flat = np.concatenate(positions).astype(np.int32)
        return upload(np.array(ids, np.int32), self.device), upload(flat, self.device), prompts

    # -- sampling --------------------------------------------------------------------------------

    def _asked(self, rows: slice | Tensor) -> SamplingMetadata:
        """What rows of the persistent batch ask for, whose positions are those of the new ids."""
        held = self.rows
        positions = held.positions[rows][:, None]
        return SamplingMetadata(held.temperatures[rows], held.seeds[rows], positions)

    def _sample(self, hidden: Tensor, rows: slice | Tensor) -> Tensor:
        logits, vocab_size = self.model.logits(hidden), self.model.vocab_size
        ids = sample(logits, self._asked(rows), self.ranks, vocab_size, self.backend.candidates)
        self._feed_back(rows, ids)
        return ids

    def _feed_back(self, rows: slice | Tensor, ids: Tensor) -> None:
        """Make `ids` the next step's inputs.

        NO_TOKEN becomes 0, which the embedding can look up. The request ends when the host reads
        its id; what a launched step computes for it meanwhile is dropped.
        """
        self.rows.ids[rows] = ids.clamp(min=0).int()

    def _filter(
        self, batch: Batch, sampling: list[int], filtered: list[int], hidden: Tensor, ids: Tensor
    ) -> None:
        """Sample again for those of the `sampling` rows whose requests have filters.

        Their logits are computed again: to keep those of every graph would take gigabytes.
        """
        rows = upload([sampling[i] for i in filtered], self.device)
        params = [batch[sampling[i]].seq.params for i in filtered]
        top_k = np.array([p.top_k if p.top_k > 0 else LARGEST_INT for p in params])
        top_p, min_p = np.array([(p.top_p, p.min_p) for p in params], np.float32).T
        limits = (upload(x.copy(), self.device)[:, None] for x in (top_k, top_p, min_p))
        filters = Filters(*limits)
        chosen = upload(filtered, self.device)
        logits, vocab_size = self.model.logits(hidden[chosen]), self.model.vocab_size
        sampled = sample_filtered(logits, self._asked(rows), filters, self.ranks, vocab_size)
        ids[chosen] = sampled
        self._feed_back(rows, sampled)

    # -- what a GPU prepares ---------------------------------------------------------------------

    @on_its_device
    def rehearse(self, max_num_batched_tokens: int) -> None:
        """Run the steps that need the most memory, over a cache whose block 0 may be spoiled."""
        num_rows = len(self.rows.ids)
        longest = self.ranks.minimum(len(self.model.rope))  # no request will be longer
        self._rehearse_decodes(num_rows, longest)
        decodes = min(1, num_rows - 1)
        tokens = min(max_num_batched_tokens, (num_rows - decodes) * longest)
        counts = [1] * decodes + [longest] * (tokens // longest) + [tokens % longest]
        seq = Namespace(block_table=[0] * longest, num_cached=longest, token_ids=[0] * longest)
        # Attention in torch copies what it reads, so its rows end where the longest context does.
        ends = [n if self.backend.capturable else longest for n in counts]
        batch: Any = [
            Namespace(seq=seq, start=end - n, end=end, num_tokens=n)
            for n, end in zip(counts, ends, strict=True)
            if n
        ]
        self.rows.positions.zero_()
        hidden, _ = self._mixed(batch, decodes, [0] * num_rows)
        chunk = slice(FILTERED_AT_ONCE)
        logits, asked = self.model.logits(hidden[chunk]), self._asked(chunk)
        filters = Filters(asked.seeds, asked.temperature, asked.temperature)
        sample_filtered(logits, asked, filters, self.ranks, self.model.vocab_size)

    def _rehearse_decodes(self, num_rows: int, longest: int) -> None:
        """Rows that together have SLOTS_AT_ONCE tokens, or one that is longer: no more are gathered
        at once in torch."""
        most = SLOTS_AT_ONCE[self.device.type]
        rows = min(num_rows, -(-most // longest))
        length = longest if rows == 1 else min(longest, most // rows)
        self.rows.positions.fill_(length - 1)
        self._decode(rows)

    @on_its_device
    def capture(self, sizes: list[int]) -> None:
        """Record a decode step of each size as a CUDA graph, the largest first, in one pool.

        The rows are all empty (position -1): they write nothing.
        """
        if not sizes:
            return
        self.rows.positions.fill_(-1)
        pool = torch.cuda.graph_pool_handle()
        for size in sorted(sizes, reverse=True):
            self._decode(size)  # compiles what is not compiled yet
            torch.cuda.synchronize(self.device)
            graph = torch.cuda.CUDAGraph()
            # "thread_local": NCCL's own thread may ask CUDA things meanwhile
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                hidden, ids = self._decode(size)
            self.graphs[size] = (graph, hidden, ids)

    def _replay(self, size: int) -> tuple[Tensor, Tensor]:
        graph, hidden, ids = self.graphs[size]
        graph.replay()
        return hidden, ids

    def _graph_size(self, num_rows: int) -> int:
        """The smallest captured size that holds `num_rows`; without graphs, `num_rows` itself."""
        return min((size for size in self.graphs if size >= num_rows), default=num_rows)
