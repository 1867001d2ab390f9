"""ModelRunner: from a planned batch to the ids it samples.

The rows' tokens stand end to end in flat tensors, decode rows first. Those take their ids from the
persistent batch; a step of them alone touches device memory only, so on a GPU it is captured once
for each batch size as a CUDA graph, and replayed. Prompts come from the host, and run eagerly.
"""

from collections.abc import Callable
from functools import wraps
from itertools import accumulate, product
from types import SimpleNamespace as Namespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanovllm.config import EngineArgs
from nanovllm.distributed.ranks import Ranks
from nanovllm.engine.adjustments import AdjustmentTables
from nanovllm.engine.logprobs import prompt_targets
from nanovllm.engine.persistent_batch import PersistentBatch, upload
from nanovllm.engine.scheduler import Batch
from nanovllm.layers.attention import MAX_GATHERED_SLOTS
from nanovllm.layers.sampler import sample
from nanovllm.logprobs import MAX_LOGPROBS
from nanovllm.metadata import NO_TOKEN, AttentionMetadata, PhaseMetadata, SamplingMetadata
from nanovllm.models.decoder import Decoder

Sampled = tuple[Tensor, Tensor | None]  # ids [num_rows]; packed logprobs [num_rows, WIDTH]


def on_its_device(method: Callable) -> Callable:
    """Run a runner's method with its GPU as the current one, and nothing kept for gradients."""

    @wraps(method)
    def run(self: "ModelRunner", *args: Any) -> Any:
        with torch.inference_mode(), torch.accelerator.device_index(self.device.index):
            return method(self, *args)

    return run


class PendingTokens:
    """What a launched step samples, on its way to the host; reading the ids waits for all of it.

    ids [num_sampled] int64; logprobs [num_sampled, WIDTH], if any of these rows asked for some;
    prompt_logprobs [num_tokens, WIDTH], if any row did (see `_prompt_logprobs`).

    On a GPU the copy is queued behind the step that makes them and before the next one, so that
    reading waits for this step alone. The step itself runs on while the host plans.
    """

    def __init__(
        self,
        ranks: Ranks,
        ids: Tensor | None,
        logprobs: Tensor | None = None,
        prompt_logprobs: Tensor | None = None,
    ):
        self._ranks = ranks
        self._copied: torch.cuda.Event | None = None
        self._ids = self._fetch(ids)
        self.logprobs = self._fetch(logprobs)
        self.prompt_logprobs = self._fetch(prompt_logprobs)
        if self._copied is not None:
            self._copied.record()

    def _fetch(self, values: Tensor | None) -> Tensor | None:
        """The values on the host. On a GPU their copy is queued, and `_copied` stands behind it."""
        if values is None or not values.is_cuda:
            return values
        self._copied = self._copied or torch.cuda.Event()
        copy = torch.empty_like(values, device="cpu", pin_memory=True)
        return copy.copy_(values, non_blocking=True)

    def read(self) -> list[int | None]:
        """The ids; None in place of NO_TOKEN, for a row whose logits were not finite."""
        if self._copied is not None:
            self._ranks.synchronize(self._copied)
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
        tables = AdjustmentTables(model.vocab_size, self.device)
        self.rows = PersistentBatch(args.max_num_seqs, max_blocks, self.device, tables)
        # By batch size, and whether whole rows of logits are gathered (always True on one rank).
        self.graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, Sampled]] = {}

    # -- a step ----------------------------------------------------------------------------------

    @on_its_device
    def launch(self, batch: Batch) -> PendingTokens:
        """Start a step: every kernel is queued when this returns, on a CPU even done."""
        try:
            return PendingTokens(self.ranks, *self._launch(batch))
        except BaseException:
            self.rows.forget()
            raise

    def _launch(self, batch: Batch) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The ids, the logprobs and the prompts' logprobs, as PendingTokens takes them."""
        num_decodes = next((i for i, row in enumerate(batch) if not row.decodes), len(batch))
        whole_rows = any(row.samples and row.seq.needs_whole_rows for row in batch)
        if num_decodes == len(batch):
            size = self._graph_size(num_decodes)
            self.rows.place(batch, size)
            graph = size, whole_rows or self.ranks.world_size == 1
            known = graph in self.graphs
            ids, logprobs = self._replay(*graph) if known else self._decode(size, whole_rows)
            prompt_logprobs = None
        else:
            self.rows.place(batch, len(batch))
            sampling = [i for i, row in enumerate(batch) if row.samples]
            ids, logprobs, prompt_logprobs = self._mixed(batch, num_decodes, sampling, whole_rows)
        asked = whole_rows and any(r.samples and r.seq.params.logprobs is not None for r in batch)
        count = len(batch)  # a graph may have computed more rows
        return (
            ids if ids is None else ids[:count],
            logprobs[:count] if asked else None,
            prompt_logprobs,
        )

    def _decode(self, size: int, whole_rows: bool) -> Sampled:
        """A step of the first `size` rows, from their ids to their next ids, on the device alone.

        whole_rows: whether a row has filters, adjustments or logprobs. Several ranks then gather
        whole rows of logits, and otherwise compare the best of each rank.
        """
        positions = self.rows.positions[:size]
        decodes = self._plan_decode(size)
        batch = AttentionMetadata(positions, decodes, None)
        hidden = self.model(self.rows.ids[:size], self.kv_cache, batch)
        positions += positions >= 0
        return self._sample(hidden, slice(size), whole_rows)

    def _mixed(
        self, batch: Batch, num_decodes: int, sampling: list[int], whole_rows: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """A step in which prompts are computed; as `_launch`, of the `sampling` rows."""
        counts = [row.num_tokens for row in batch]
        input_ids, positions, prompts = self._prompts(batch[num_decodes:], num_decodes)
        decodes = None
        if num_decodes:
            decodes = self._plan_decode(num_decodes)
            input_ids = torch.cat((self.rows.ids[:num_decodes], input_ids))
            positions = torch.cat((self.rows.positions[:num_decodes], positions))
        metadata = AttentionMetadata(positions, decodes, prompts)
        hidden = self.model(input_ids, self.kv_cache, metadata)
        self.rows.positions[:num_decodes] += 1
        prompt_logprobs = self._prompt_logprobs(batch, hidden)
        if not sampling:
            return None, None, prompt_logprobs
        hidden = hidden[upload(np.cumsum(counts)[sampling] - 1, self.device)]
        sampled = self._sample(hidden, upload(sampling, self.device), whole_rows)
        return *sampled, prompt_logprobs

    def _plan_decode(self, size: int) -> PhaseMetadata:
        tables, positions = self.rows.block_tables[:size], self.rows.positions[:size]
        k_cache = self.kv_cache[0, 0]
        return self.backend.plan_decode(positions, tables, k_cache, self.model.num_local_heads)

    def _prompts(self, rows: Batch, num_before: int) -> tuple[Tensor, Tensor, PhaseMetadata]:
        """The rows' ids and positions, both [num_tokens] int32, and where they are stored.

        What a shared block holds is not stored again: such a block is never written.
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
        prompts = PhaseMetadata(
            slot_mapping=upload(np.concatenate(slots), self.device),
            seq_lens=upload(np.array([row.end for row in rows], np.int32), self.device),
            block_tables=self.rows.block_tables[num_before : num_before + len(rows)],
            query_start_loc=upload(np.array([0, *accumulate(counts)], np.int32), self.device),
            max_query_len=max(counts),
        )
        flat = np.concatenate(positions).astype(np.int32)
        return upload(np.array(ids, np.int32), self.device), upload(flat, self.device), prompts

    # -- sampling --------------------------------------------------------------------------------

    def _sampling_metadata(self, rows: slice | Tensor) -> SamplingMetadata:
        """The parameters of some rows, whose positions are already those of the new ids."""
        held = self.rows
        return SamplingMetadata(
            temperature=held.temperatures[rows],
            seeds=held.seeds[rows],
            positions=held.positions[rows][:, None],
            top_k=held.top_k[rows],
            top_p=held.top_p[rows],
            log_min_p=held.log_min_p[rows],
            adjustments=held.tables.of(held.adjustments[rows]),
        )

    def _sample(self, hidden: Tensor, rows: slice | Tensor, whole_rows: bool) -> Sampled:
        metadata, size = self._sampling_metadata(rows), self.model.vocab_size
        logits = self._whole_logits(hidden) if whole_rows else self.model.compute_logits(hidden)
        ids = sample(logits, metadata, self.ranks, size, self.backend, whole_rows)
        logprobs = None
        if whole_rows:
            wanted = self.rows.num_logprobs[rows]
            logprobs = self.backend.gather_logprobs(logits, ids, wanted)
        self._feed_back(rows, ids)
        return ids, logprobs

    def _whole_logits(self, hidden: Tensor) -> Tensor:
        """Logits [num_rows, vocab_size] of hidden rows, gathered from all ranks."""
        logits = self.model.compute_logits(hidden)
        if self.ranks.world_size == 1:
            return logits
        return self.ranks.all_gather_columns(logits, self.model.vocab_size)

    def _prompt_logprobs(self, batch: Batch, hidden: Tensor) -> Tensor | None:
        """Packed logprobs [num_tokens, WIDTH] of every row's `prompt_targets`, in order.

        Logits are made of at most max_num_seqs tokens at a time, as many as sampling may need.
        """
        first = 0  # in `hidden`, of the row's tokens
        sources: list[int] = []
        ids: list[int] = []
        wanted: list[list[int | None]] = []
        for row in batch:
            targets, params = prompt_targets(row), row.seq.params
            sources += range(first, first + len(targets))
            ids += row.seq.token_ids[targets.start : targets.stop]
            wanted += [[params.prompt_logprobs]] * len(targets)
            first += row.num_tokens
        parts = []
        for start in range(0, len(ids), len(self.rows.ids)):
            piece = slice(start, start + len(self.rows.ids))
            logits = self._whole_logits(hidden[upload(sources[piece], self.device)])
            numbers = upload(np.array(wanted[piece], np.int32), self.device)
            targets_of_piece = upload(ids[piece], self.device)
            parts.append(self.backend.gather_logprobs(logits, targets_of_piece, numbers))
        return torch.cat(parts) if parts else None

    def _feed_back(self, rows: slice | Tensor, ids: Tensor) -> None:
        """Make `ids` the next step's inputs.

        NO_TOKEN becomes 0, which the embedding can look up. The request ends when the host reads
        its id; what a launched step computes for it meanwhile is dropped.
        """
        self.rows.ids[rows] = ids.clamp(min=0).int()

    # -- what a GPU prepares ---------------------------------------------------------------------

    @on_its_device
    def rehearse(self, max_num_batched_tokens: int) -> None:
        """Run the steps that need the most memory, over a cache whose block 0 may be spoiled.

        Several ranks that gather whole rows of logits sample with other kernels. They run each step
        in both ways, so that no request waits for a kernel to be compiled. Adjustments need no
        other kernels: all rows are computed by those that look whether a row has some.
        """
        num_rows = len(self.rows.ids)
        longest = self.ranks.all_reduce_min(len(self.model.rope))  # no request will be longer
        self._rehearse_decodes(num_rows, longest)
        decodes = min(1, num_rows - 1)
        tokens = min(max_num_batched_tokens, (num_rows - decodes) * longest)
        counts = [1] * decodes + [longest] * (tokens // longest) + [tokens % longest]
        seq = Namespace(
            block_table=[0] * longest, num_cached_tokens=longest, token_ids=[0] * longest,
            num_prompt_tokens=longest, params=Namespace(prompt_logprobs=MAX_LOGPROBS),
        )  # fmt: skip
        # Attention in torch copies what it reads, so its rows end where the longest context does.
        ends = [n if self.backend.capturable else longest for n in counts]
        batch: Any = [
            Namespace(seq=seq, start=end - n, end=end, num_tokens=n)
            for n, end in zip(counts, ends, strict=True)
            if n
        ]
        for column in (self.rows.temperatures, self.rows.top_k):  # every row has a filter
            column.fill_(1)
        self.rows.num_logprobs.fill_(MAX_LOGPROBS)
        for whole_rows in (False, True) if self.ranks.world_size > 1 else (True,):
            self.rows.positions.zero_()
            self._mixed(batch, decodes, [0] * num_rows, whole_rows)

    def _rehearse_decodes(self, num_rows: int, longest: int) -> None:
        """Rows that together have MAX_GATHERED_SLOTS tokens, or one that is longer: attention in
        torch gathers no more at once."""
        most = MAX_GATHERED_SLOTS[self.device.type]
        rows = min(num_rows, -(-most // longest))
        length = longest if rows == 1 else min(longest, most // rows)
        for whole_rows in (False, True) if self.ranks.world_size > 1 else (True,):
            self.rows.positions.fill_(length - 1)
            self._decode(rows, whole_rows)

    @on_its_device
    def capture(self, sizes: list[int]) -> None:
        """Record a decode step of each size as a CUDA graph, the largest first, in one pool.

        The rows are all empty (position -1): they write nothing.
        """
        if not sizes:
            return
        self.rows.positions.fill_(-1)
        pool = torch.cuda.graph_pool_handle()
        kinds = (False, True) if self.ranks.world_size > 1 else (True,)
        for key in product(sorted(sizes, reverse=True), kinds):
            self._decode(*key)  # compiles what is not compiled yet
            torch.cuda.synchronize(self.device)
            graph = torch.cuda.CUDAGraph()
            # "thread_local": NCCL's own thread may ask CUDA things meanwhile
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                sampled = self._decode(*key)
            self.graphs[key] = (graph, sampled)

    def _replay(self, size: int, whole_rows: bool) -> Sampled:
        graph, sampled = self.graphs[size, whole_rows]
        graph.replay()
        return sampled

    def _graph_size(self, num_rows: int) -> int:
        """The smallest captured size that holds `num_rows`; without graphs, `num_rows` itself."""
        sizes = (size for size, _ in self.graphs if size >= num_rows)
        return min(sizes, default=num_rows)
