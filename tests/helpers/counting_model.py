"""A model that notices any wrong slot: its next token is a function of its whole prefix as read
back from the paged cache, so one stale or misplaced slot changes all the text that follows."""

import random
from collections.abc import Iterator

import torch
from torch import Tensor

from nanovllm.config import EngineArgs
from nanovllm.distributed.ranks import Ranks
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.core import EngineCore
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.layers.attention import store_kv
from nanovllm.layers.backend import TORCH_BACKEND
from nanovllm.metadata import AttentionMetadata
from nanovllm.sampling_params import SamplingParams

VOCAB = 97
PRIME = 65_521


def hash_next(parent: int, token: int, position: int) -> int:
    return (parent * 31 + token * 7 + position + 1) % PRIME


def expected_output(prompt: list[int], count: int) -> list[int]:
    """What the model below must say, computed without any cache."""
    tokens, parent, total = list(prompt), 0, 0
    for position in range(len(prompt) + count - 1):
        parent = hash_next(parent, tokens[position], position)
        total += parent
        if position >= len(prompt) - 1:
            tokens.append(total % VOCAB)
    return tokens[len(prompt) :]


class CountingModel:
    """Each position stores the hash of its prefix, which it makes from the one before it in the
    cache; the next token is a function of all the hashes that it reads back."""

    ranks, backend, vocab_size, num_local_heads = Ranks(), TORCH_BACKEND, VOCAB, 1

    def __call__(self, input_ids: Tensor, kv_cache: Tensor, metadata: AttentionMetadata) -> Tensor:
        k_cache, v_cache = kv_cache[0]
        hidden = torch.zeros(len(input_ids), 1, dtype=torch.double)
        for place, (position, table) in enumerate(self.tokens(metadata)):
            assert position == metadata.positions[place]
            before = k_cache[table].flatten()[:position]
            parent = int(before[-1]) if position else 0
            fresh = torch.tensor(hash_next(parent, int(input_ids[place]), position)).double()
            fresh = fresh.view(1, 1, 1)
            slot = metadata.slot_mapping[place : place + 1]
            store_kv(fresh, fresh, k_cache, v_cache, slot)
            hidden[place] = k_cache[table].flatten()[: position + 1].sum()
        return hidden

    def tokens(self, metadata: AttentionMetadata) -> Iterator[tuple[int, Tensor]]:
        """Every token's position and its row's block table, in order."""
        if rows := metadata.decode:
            yield from zip((rows.seq_lens - 1).tolist(), rows.block_tables, strict=True)
        if rows := metadata.prefill:
            counts = rows.query_start_loc.diff().tolist()
            ends = rows.seq_lens.tolist()
            for count, end, table in zip(counts, ends, rows.block_tables, strict=True):
                yield from ((position, table) for position in range(end - count, end))

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(hidden[:, 0].long() % VOCAB, VOCAB).float()


def make_core(rng: random.Random, num_blocks: int, block_size: int) -> EngineCore:
    manager = BlockManager(num_blocks, block_size, rng.random() < 0.8)
    scheduler = Scheduler(manager, rng.randint(1, 6), rng.randint(1, 40))
    cache = torch.zeros(1, 2, num_blocks, block_size, 1, 1, dtype=torch.double)
    args = EngineArgs("counting", max_num_seqs=scheduler.max_num_seqs, max_model_len=1024)
    runner = ModelRunner(CountingModel(), cache, args)
    return EngineCore(scheduler, runner, async_scheduling=rng.random() < 0.5)


def make_sequence(name: str, prompt: list[int], max_tokens: int, stop_ids=frozenset()) -> Sequence:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    return Sequence(name, None, list(prompt), params, len(prompt) + max_tokens, stop_ids)


def check_blocks(core: EngineCore) -> None:
    """Reference counts are the tables' counts; free blocks are those that nobody holds."""
    manager = core.scheduler.block_manager
    seqs = set(core.scheduler.running) | {r.seq for s in core.in_flight for r in s.batch}
    held = [block_id for seq in seqs for block_id in seq.block_table]
    assert [block.ref_count for block in manager.blocks] == [
        held.count(block.block_id) for block in manager.blocks
    ]
    assert manager.num_free_blocks == manager.num_blocks - len(set(held))
    for seq in core.scheduler.running:
        assert len(seq.block_table) * manager.block_size >= seq.num_scheduled
    assert len(core.scheduler.running) <= core.scheduler.max_num_seqs
