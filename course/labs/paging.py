"""What lesson 03 counts and measures beside its own steps.

mix = short_answers()                         # a workload whose answers differ much in length
rows_history(stage_02, mix)                   # (places held, places live) at every step
blocks_history(stage_03, mix)
for running in traffic(manager, 2000): ...    # requests that arrive, grow and end
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from course.measure.ladder_workload import LadderWorkload
from course.measure.roofline import kv_bytes_per_token
from course.measure.timing import measure
from course.stages import ContiguousCache, PagedStatic, Recorder
from course.stages.paged import live_tokens
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence
from nanovllm.models.model_config import ModelConfig
from nanovllm.sampling_params import SamplingParams

History = list[tuple[int, int]]  # places held and places live, step by step
TOKENS = 8192  # held while a block size is timed
ROWS = 8  # requests that hold them


def short_answers() -> LadderWorkload:
    """16 requests, prompts of 8 to 64 tokens, most answers short and one of 128; 1,536 places."""
    rng = random.Random(1)
    prompts = [64, *(rng.randint(8, 64) for _ in range(15))]
    outputs = [*(min(128, 1 + int(rng.expovariate(1 / 30))) for _ in range(15)), 128]
    return LadderWorkload([[7] * n for n in prompts], outputs, 0, kv_tokens=1536)


class _Log(Recorder):
    def __init__(self, num_requests: int):
        super().__init__(num_requests)
        self.history: History = []

    def cache(self, reserved: int, live: int) -> None:
        self.history.append((reserved, live))


def rows_history(stage: ContiguousCache, workload: LadderWorkload) -> History:
    """Stage 02 serves a workload; what it reports at every step."""
    log = _Log(len(workload.prompts))
    stage.prepare(workload)
    stage.serve(workload, log)
    stage.release()
    return log.history


def blocks_history(stage: PagedStatic, workload: LadderWorkload) -> tuple[History, int]:
    """Stage 03 serves a workload; its places at every step, and the most requests at once."""
    stage.prepare(workload)
    engine, manager = stage.engine, stage.engine.block_manager
    seqs, history = stage.add(workload), []
    while engine.has_unfinished_requests():
        engine.advance()
        held = (manager.num_blocks - manager.num_free_blocks) * manager.block_size
        history.append((held, live_tokens(seqs, manager.block_size)))
    most = max(record.num_running for record in engine.trace)
    stage.release()
    return history, most


# -- requests without a model --------------------------------------------------------------------


def sequence(num_tokens: int) -> Sequence:
    """A request as the engine holds it, of so many tokens."""
    return Sequence("some id", None, [0] * num_tokens, SamplingParams(), max_length=2**30)


def traffic(manager: BlockManager, count: int, seed: int = 1) -> Iterator[list[Sequence]]:
    """The running requests after each of `count` arrivals or growths by a token.

    When there is no room, the first in line end until there is.
    """
    rng = random.Random(seed)
    running: list[Sequence] = []
    for _ in range(count):
        arrives = not running or rng.random() < 0.1
        seq = sequence(rng.randint(1, 40)) if arrives else running.pop(rng.randrange(len(running)))
        seq.token_ids.append(0)
        while manager.num_new_blocks(seq, len(seq.token_ids)) > manager.num_free_blocks:
            manager.free(running.pop(0))
        manager.allocate(seq, len(seq.token_ids))
        running.append(seq)
        yield running


def lengths_in_life(prompt_median: float, output_mean: float, requests: int = 1000) -> Tensor:
    """Tokens [steps] of requests at every step of their lives: the prompt, then one more each."""
    rng, lengths = random.Random(2), list[int]()
    for _ in range(requests):
        prompt = 1 + int(rng.lognormvariate(math.log(prompt_median), 0.8))
        lengths += range(prompt, prompt + 1 + int(rng.expovariate(1 / output_mean)))
    return torch.tensor(lengths, dtype=torch.float64)


# -- attention, and what a block size costs ------------------------------------------------------


def contiguous_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention of the last `new` tokens, query [new, H, D], over key, value [n, H_kv, D]."""
    mask = torch.ones(len(query), len(key)).tril(len(key) - len(query)).bool()
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out.transpose(0, 1)


@dataclass(frozen=True)
class Costs:
    """What blocks of one size cost 8 requests of 1,024 tokens each."""

    block_size: int
    table_bytes: int
    empty_bytes: float  # of keys and values, at half a block a request
    gather_seconds: float  # one layer's keys; the lowest of 15
    manage_seconds: float  # to take and free all blocks; the lowest of 15

    def __str__(self) -> str:
        gather, manage = (f"{1e6 * t:,.0f} µs" for t in (self.gather_seconds, self.manage_seconds))
        empty = f"{self.empty_bytes / 2**20:,.2f} MiB"
        return f"{self.block_size:10}{self.table_bytes:13,}{empty:>17}{gather:>23}{manage:>19}"


HEADING = "block size  table bytes  empty, expected  gather a layer's keys  take and free all"


def costs_of(block_size: int, config: ModelConfig, device: torch.device) -> Costs:
    """Measure them, with keys of a model's shape."""
    shape = TOKENS // block_size, block_size, config.num_key_value_heads, config.head_dim
    keys = torch.randn(shape).to(device, config.dtype)
    table = torch.randperm(len(keys), dtype=torch.int32, device=device).view(ROWS, -1)
    manager, seq = BlockManager(len(keys), block_size), sequence(0)

    def take_and_free() -> None:
        manager.allocate(seq, TOKENS)
        manager.free(seq)

    empty = ROWS * (block_size - 1) / 2 * kv_bytes_per_token(config)
    gather, manage = measure(lambda: keys[table], 15), measure(take_and_free, 15)
    return Costs(block_size, 4 * table.numel(), empty, gather.lowest, manage.lowest)
