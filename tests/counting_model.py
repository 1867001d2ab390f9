"""A model that notices any wrong slot: its next token is a function of its whole prefix as read
back from the paged cache, so one stale or misplaced slot changes all the text that follows."""

import random

import torch
from torch import Tensor

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.engine import EngineCore
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.model.parallel import Ranks
from nanovllm.ops.attention import AttentionMetadata, store_kv
from nanovllm.sampling_params import SamplingParams

VOCAB = 97
PRIME = 65_521


def prefix_hash(tokens: list[int]) -> int:
    value = 1
    for position, token in enumerate(tokens):
        value = (value * 31 + token * 7 + position + 1) % PRIME
    return value


def expected_output(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(prefix_hash(tokens) % VOCAB)
    return tokens[len(prompt) :]


class CountingModel:
    """Stores each position's (token + 1, prefix hash) in the cache and reads the prefix back."""

    def __call__(
        self, input_ids: Tensor, positions: Tensor, kv_cache: Tensor, metadata: AttentionMetadata
    ) -> Tensor:
        k_cache, v_cache = kv_cache[0]
        fresh = (input_ids + 1).double()[:, None, None]
        store_kv(fresh, fresh, k_cache, v_cache, metadata.slot_mapping)
        hidden = torch.zeros(len(input_ids), 1, dtype=torch.double)
        for row, table in enumerate(metadata.block_tables):
            start, stop = metadata.query_starts[row : row + 2]
            length = int(metadata.context_lens[row])
            slots = k_cache[table].flatten()[:length].long().tolist()
            read = [token - 1 for token in slots]
            first = length - (stop - start)
            for place in range(start, stop):
                hidden[place] = prefix_hash(read[: first + place - start + 1])
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(hidden[:, 0].long() % VOCAB, VOCAB).float()


def make_core(rng: random.Random, num_blocks: int, block_size: int) -> EngineCore:
    manager = BlockManager(num_blocks, block_size, rng.random() < 0.8)
    scheduler = Scheduler(manager, rng.randint(1, 6), rng.randint(1, 40))
    cache = torch.zeros(1, 2, num_blocks, block_size, 1, 1, dtype=torch.double)
    runner = ModelRunner(CountingModel(), cache, Ranks(), VOCAB)
    return EngineCore(scheduler, runner, async_scheduling=rng.random() < 0.5)


def make_sequence(name: str, prompt: list[int], max_tokens: int, stop_ids=frozenset()) -> Sequence:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    return Sequence(name, None, list(prompt), params, stop_ids, len(prompt) + max_tokens, 0)
