"""Size the KV cache, and capture the decode steps.

On a GPU the cache takes the memory that everything else leaves. We cannot compute how much that is,
so we measure it. With a cache of one block we capture the largest graph, and then run the largest
step. The graph is dropped, and we set aside the memory that it took. Torch keeps the memory that
the step took. Every later step is smaller, so it fits in there.
"""

import gc
import math
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from nanovllm.config import EngineArgs
from nanovllm.distributed.ranks import Ranks
from nanovllm.engine.cuda_graphs import capture_sizes
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.layers.attention import MAX_GATHERED_SLOTS
from nanovllm.logprobs import MAX_LOGPROBS
from nanovllm.models.decoder import Decoder
from nanovllm.models.model_config import ModelConfig

CPU_CACHE_BYTES = 2**30  # the default limit of the KV cache on a CPU
GRAPH_OVERHEAD_BYTES = 2**28  # CUDA's own memory for graphs, and what large allocations waste
MAX_CONTEXT_BYTES = 2**30  # CUDA's context and kernels; more than this belongs to other processes


def make_model_runner(
    model: Decoder, config: ModelConfig, args: EngineArgs, reserved_before: int
) -> ModelRunner:
    """Make a runner with the KV cache that memory allows, and capture its decode steps.

    reserved_before: the `reserved_bytes` before the model was loaded. Raises ValueError if there is
    no memory for the cache.
    """
    runner = ModelRunner(model, make_kv_cache(config, args, model.ranks, num_blocks=1), args)
    num_blocks = determine_num_blocks(runner, args, reserved_before)
    runner.kv_cache = make_kv_cache(config, args, model.ranks, num_blocks)
    runner.capture_graphs(sizes_to_capture(runner, args))
    return runner


# -- the cache -----------------------------------------------------------------------------------


def kv_cache_shape(
    config: ModelConfig, args: EngineArgs, ranks: Ranks, num_blocks: int
) -> tuple[int, ...]:
    """Return [layers, 2, num_blocks, block_size, local kv_heads, head_dim]."""
    kv_heads = ranks.shard(config.num_key_value_heads).count
    return (config.num_hidden_layers, 2, num_blocks, args.block_size, kv_heads, config.head_dim)


def make_kv_cache(config: ModelConfig, args: EngineArgs, ranks: Ranks, num_blocks: int) -> Tensor:
    """Make a zeroed KV cache of `kv_cache_shape`. Raises ValueError if memory is too small."""
    shape = kv_cache_shape(config, args, ranks, num_blocks)
    try:
        return torch.zeros(shape, dtype=config.dtype, device=args.device)
    except RuntimeError as error:
        raise ValueError(
            f"no memory for num_gpu_blocks_override={num_blocks} blocks of the KV cache with "
            f"block_size={args.block_size}: {error}"
        ) from error


def max_num_blocks(config: ModelConfig, args: EngineArgs, ranks: Ranks) -> int:
    """Return the most blocks that the cache can have, before the model is loaded; at least 1.

    On a CPU the cache has as many, unless `determine_num_blocks` finds that fewer are enough. On a
    GPU it would have as many if the engine kept nothing else there.
    """
    if args.num_gpu_blocks_override is not None:
        return args.num_gpu_blocks_override
    block_bytes = math.prod(kv_cache_shape(config, args, ranks, 1)) * config.dtype.itemsize
    device = torch.device(args.device)
    limit = CPU_CACHE_BYTES if device.type == "cpu" else requested_memory(device, args, ranks)
    return max(1, limit // block_bytes)


def determine_num_blocks(runner: ModelRunner, args: EngineArgs, reserved_before: int) -> int:
    """Return the number of blocks that the cache gets, the same on all ranks.

    The runner has a cache of one block. num_gpu_blocks_override decides if it is given. Otherwise
    the cache takes the available memory, but on a CPU no more than max_num_seqs sequences of
    max_model_len tokens need.
    """
    max_model_len = cast(int, args.max_model_len)  # both are resolved
    max_num_batched_tokens = cast(int, args.max_num_batched_tokens)
    if (num_blocks := args.num_gpu_blocks_override) is not None:
        if runner.device.type == "cuda":  # so that no request waits for a kernel to be compiled
            profile_run(runner, min(max_num_batched_tokens, num_blocks * args.block_size))
        return num_blocks
    block_bytes = math.prod(runner.kv_cache.shape) * runner.kv_cache.itemsize
    if runner.device.type == "cpu":
        available = CPU_CACHE_BYTES
        enough = args.max_num_seqs * -(-max_model_len // args.block_size)
        num_blocks = min(enough, available // block_bytes)
    else:
        available = determine_available_memory(runner, args, reserved_before)
        num_blocks = available // block_bytes
    num_blocks = runner.ranks.all_reduce_min(num_blocks)
    if num_blocks < 1:
        raise ValueError(
            f"no memory for the KV cache: a block of {args.block_size} tokens takes "
            f"{block_bytes:,} bytes, and {max(available, 0):,} are left for it; lower max_num_seqs "
            f"or max_num_batched_tokens, or raise "
            f"gpu_memory_utilization={args.gpu_memory_utilization}"
        )
    return num_blocks


# -- the memory of a GPU -------------------------------------------------------------------------


def requested_memory(device: torch.device, args: EngineArgs, ranks: Ranks) -> int:
    """Return the bytes of a GPU that one rank may take for everything."""
    _, total = torch.cuda.mem_get_info(device)
    return int(args.gpu_memory_utilization * total / ranks.max_ranks_per_gpu())


def reserved_bytes(device: torch.device) -> int:
    """Return the bytes of a GPU that torch holds for all engines of this process; 0 on a CPU."""
    if device.type == "cpu":
        return 0
    free_unused_memory()
    return torch.cuda.memory_reserved(device)


def free_unused_memory() -> None:
    """Return to the GPU what closed engines and dropped graphs have left."""
    gc.collect()
    torch.cuda.empty_cache()


def determine_available_memory(runner: ModelRunner, args: EngineArgs, reserved_before: int) -> int:
    """Return the bytes that the cache may take: the requested memory less what all else takes."""
    device = runner.device
    # The graphs: all of them take hardly more than the largest, because they share one pool.
    before = torch.cuda.memory_reserved(device)
    runner.capture_graphs(sizes_to_capture(runner, args)[-1:])
    graph_bytes = torch.cuda.memory_reserved(device) - before + GRAPH_OVERHEAD_BYTES
    runner.graph_runner.graphs.clear()
    free_unused_memory()
    # The steps: torch keeps what the largest one took, for every later step.
    profile_run(runner, cast(int, args.max_num_batched_tokens))  # resolved
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    context = min(total - free - reserved, MAX_CONTEXT_BYTES)
    requested = requested_memory(device, args, runner.ranks)
    return min(requested - context - (reserved - reserved_before), free) - graph_bytes


def sizes_to_capture(runner: ModelRunner, args: EngineArgs) -> list[int]:
    """Return the batch sizes to capture, in rising order; none if nothing can be captured."""
    if args.enforce_eager or not (runner.backend.capturable and runner.ranks.capturable):
        return []
    return capture_sizes(args.max_num_seqs)


# -- the largest steps ---------------------------------------------------------------------------


@torch.inference_mode()
def profile_run(runner: ModelRunner, max_num_batched_tokens: int) -> None:
    """Run the steps that need the most memory. They may write to block 0 of the cache.

    Several ranks sample with other kernels if they gather whole rows of logits. We run each step in
    both ways, so that no request waits for a kernel to be compiled. Adjustments need no kernels of
    their own, because the sampling kernels look for them in every row.
    """
    with torch.accelerator.device_index(runner.device.index):
        max_len = runner.ranks.all_reduce_min(len(runner.model.rope))  # of all requests
        profile_decode(runner, max_len)
        profile_prefill(runner, max_len, max_num_batched_tokens)


def profile_decode(runner: ModelRunner, max_len: int) -> None:
    """Run the decode step that reads the most tokens at once.

    Attention in torch gathers MAX_GATHERED_SLOTS tokens at a time, or one longer row.
    """
    max_slots = MAX_GATHERED_SLOTS[runner.device.type]
    size = min(len(runner.input_batch.input_ids), -(-max_slots // max_len))
    length = max_len if size == 1 else min(max_len, max_slots // size)
    for whole_rows in runner.whole_rows_cases:
        runner.input_batch.positions.fill_(length - 1)
        runner.decode_step(size, whole_rows)


def profile_prefill(runner: ModelRunner, max_len: int, max_num_batched_tokens: int) -> None:
    """Run a step of one decode row and as many prompt tokens as the budget allows.

    Every row has filters, and every token is asked for the most logprobs.
    """
    rows = runner.input_batch
    num_rows = len(rows.input_ids)
    num_decodes = min(1, num_rows - 1)
    num_tokens = min(max_num_batched_tokens, (num_rows - num_decodes) * max_len)
    counts = [1] * num_decodes + [max_len] * (num_tokens // max_len) + [num_tokens % max_len]
    # Attention in torch copies what it reads, so its rows end where the longest context does.
    ends = [count if runner.backend.capturable else max_len for count in counts]
    seq = SimpleNamespace(
        block_table=[0] * max_len, num_cached_tokens=max_len, token_ids=[0] * max_len,
        num_prompt_tokens=max_len, params=SimpleNamespace(prompt_logprobs=MAX_LOGPROBS),
    )  # fmt: skip
    batch: Any = [
        SimpleNamespace(seq=seq, start=end - count, end=end, num_tokens=count)
        for count, end in zip(counts, ends, strict=True)
        if count
    ]
    rows.temperature.fill_(1)
    rows.top_k.fill_(1)
    rows.num_logprobs.fill_(MAX_LOGPROBS)
    for whole_rows in runner.whole_rows_cases:
        rows.positions.zero_()
        runner.mixed_step(batch, num_decodes, [0] * num_rows, whole_rows)
