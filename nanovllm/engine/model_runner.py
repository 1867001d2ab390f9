"""ModelRunner: from a planned batch to the ids it samples.

It lays the rows' tokens end to end as flat tensors, runs the model over them and the paged cache,
and samples where a row has reached its newest token. A row whose last token is still in flight
takes its id from the step before, on the device: the host need not know it.
"""

import math
from itertools import accumulate

import torch
from torch import Tensor

from nanovllm.config import EngineArgs
from nanovllm.engine.scheduler import Batch
from nanovllm.engine.sequence import Sequence
from nanovllm.model.decoder import Decoder
from nanovllm.model.model_config import ModelConfig
from nanovllm.model.parallel import Ranks
from nanovllm.ops.attention import AttentionMetadata
from nanovllm.ops.sampler import SamplingMetadata, sample
from nanovllm.sampling_params import LARGEST_INT

CPU_CACHE_BYTES = 2**30  # the KV cache's default limit on a CPU


def allocate_kv_cache(config: ModelConfig, args: EngineArgs, ranks: Ranks) -> Tensor:
    """A zeroed cache [layers, 2, num_blocks, block_size, local kv_heads, head_dim].

    As many blocks as the arguments say; else enough for max_num_seqs sequences of max_model_len,
    within 1 GiB on a CPU and `gpu_memory_utilization` on a GPU. All ranks take the same number.
    """
    block = (args.block_size, ranks.shard(config.num_key_value_heads).count, config.head_dim)
    num_blocks = args.num_gpu_blocks_override
    if num_blocks is None:
        bytes_a_block = 2 * config.num_hidden_layers * math.prod(block) * config.dtype.itemsize
        budget = CPU_CACHE_BYTES
        if args.device != "cpu":
            free, total = torch.cuda.mem_get_info(args.device)
            budget = int(free - (1 - args.gpu_memory_utilization) * total)
        enough = args.max_num_seqs * -(-args.max_model_len // args.block_size)
        num_blocks = ranks.minimum(min(enough, budget // bytes_a_block))
        if num_blocks < 1:
            raise ValueError(
                f"no memory for the KV cache: a block of {args.block_size} tokens takes "
                f"{bytes_a_block:,} bytes, and {max(budget, 0):,} are left for it"
            )
    shape = (config.num_hidden_layers, 2, num_blocks, *block)
    return torch.zeros(shape, dtype=config.dtype, device=args.device)


class PendingTokens:
    """The ids a launched step samples, on their way to the host; reading them waits for them.

    On a GPU the copy is queued behind the step that makes them and before the next one, so that
    reading waits for this step alone. The step itself runs on while the host plans.
    """

    def __init__(self, ids: Tensor | None):
        self._ids = ids  # [num_sampled] int64 on the device; None: no row sampled
        self._copied: torch.cuda.Event | None = None
        if ids is not None and ids.is_cuda:
            self._ids = torch.empty_like(ids, device="cpu", pin_memory=True)
            self._ids.copy_(ids, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> list[int]:
        if self._copied is not None:
            self._copied.synchronize()
        return [] if self._ids is None else self._ids.tolist()


class ModelRunner:
    """Runs steps of one model over one KV cache, on one rank.

    kv_cache: [layers, 2, num_blocks, block_size, local kv_heads, head_dim].
    """

    def __init__(self, model: Decoder, kv_cache: Tensor, ranks: Ranks, vocab_size: int):
        self.model = model
        self.kv_cache = kv_cache
        self.block_size = kv_cache.shape[3]
        self.device = kv_cache.device
        self.ranks = ranks
        self.vocab_size = vocab_size
        self._last_ids = torch.zeros(0, dtype=torch.int64, device=self.device)
        self._last_row: dict[Sequence, int] = {}  # where in _last_ids a sequence's newest id is

    @torch.inference_mode()
    def launch(self, batch: Batch) -> PendingTokens:
        """Start a step: every kernel is queued when this returns, on a CPU even done."""
        starts = [0, *accumulate(row.num_tokens for row in batch)]
        positions = self._tensor([p for row in batch for p in range(row.start, row.end)])
        metadata = self._attention_metadata(batch, starts, positions)
        hidden = self.model(self._input_ids(batch, starts), positions, self.kv_cache, metadata)
        sampling = [row for row in batch if row.samples]
        self._last_row = {row.seq: i for i, row in enumerate(sampling)}
        if not sampling:
            return PendingTokens(None)
        last = [end - 1 for row, end in zip(batch, starts[1:], strict=True) if row.samples]
        logits = self.model.logits(hidden[self._tensor(last)])
        asked = self._sampling_metadata(sampling)
        self._last_ids = sample(logits, asked, self.ranks, self.vocab_size)
        return PendingTokens(self._last_ids)

    # -- a batch as tensors: the rows' tokens end to end, row i's from starts[i] on --------------

    def _tensor(self, values: list, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def _input_ids(self, rows: Batch, starts: list[int]) -> Tensor:
        ids: list[int] = []
        in_flight: list[tuple[int, int]] = []  # (place in the batch, place in the last step's ids)
        for row, place in zip(rows, starts, strict=False):
            known = row.seq.token_ids[row.start : row.end]
            if not known:
                in_flight.append((place, self._last_row[row.seq]))
            ids += known or [0]
        input_ids = self._tensor(ids)
        if in_flight:
            places, sources = self._tensor(in_flight).T
            input_ids[places] = self._last_ids[sources]
        return input_ids

    def _attention_metadata(
        self, rows: Batch, starts: list[int], positions: Tensor
    ) -> AttentionMetadata:
        counts = self._tensor([row.num_tokens for row in rows])
        owner = torch.arange(len(rows), device=self.device).repeat_interleave(counts)
        width = max(len(row.seq.block_table) for row in rows)
        tables = [row.seq.block_table + [0] * (width - len(row.seq.block_table)) for row in rows]
        block_tables = self._tensor(tables)
        blocks = block_tables[owner, positions // self.block_size]
        slots = blocks * self.block_size + positions % self.block_size
        # What a shared block holds is not stored again: such a block is never written.
        held = positions < self._tensor([row.seq.num_cached for row in rows])[owner]
        return AttentionMetadata(
            slot_mapping=slots.masked_fill(held, -1),
            block_tables=block_tables,
            context_lens=self._tensor([row.end for row in rows]),
            query_starts=starts,
            num_decodes=next((i for i, r in enumerate(rows) if r.num_tokens > 1), len(rows)),
        )

    def _sampling_metadata(self, rows: Batch) -> SamplingMetadata:
        params = [row.seq.params for row in rows]
        temperatures = [0.0 if p.is_greedy else p.temperature for p in params]
        return SamplingMetadata(
            temperature=self._tensor(temperatures, torch.float32)[:, None],
            seeds=self._tensor([row.seq.seed for row in rows])[:, None],
            positions=self._tensor([row.end for row in rows])[:, None],
            all_greedy=not any(temperatures),
            filtered=[i for i, p in enumerate(params) if p.filters],
            top_k=self._tensor([p.top_k if p.top_k > 0 else LARGEST_INT for p in params])[:, None],
            top_p=self._tensor([p.top_p for p in params], torch.float32)[:, None],
            min_p=self._tensor([p.min_p for p in params], torch.float32)[:, None],
        )
