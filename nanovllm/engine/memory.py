"""How large the KV cache may be, and for which batch sizes a step is captured.

On a GPU the cache takes what is left. So first everything else is made to happen once, with a cache
of one block: the capture of the largest graph, then the largest step. The graph is dropped, and its
memory set aside; what the step took stays with torch, whose later steps are smaller and fit in it.
"""

import gc
import math

import torch
from torch import Tensor

from nanovllm.config import EngineArgs
from nanovllm.distributed.ranks import Ranks
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.models.model_config import ModelConfig

CPU_CACHE_BYTES = 2**30  # the KV cache's default limit on a CPU
OTHER_GRAPHS_BYTES = 2**28  # CUDA's own for graphs, and what allocation in large pieces wastes
MOST_CONTEXT_BYTES = 2**30  # CUDA's context and kernels; what is more belongs to other processes


def make_kv_cache(config: ModelConfig, args: EngineArgs, ranks: Ranks, num_blocks: int) -> Tensor:
    """A zeroed cache [layers, 2, num_blocks, block_size, local kv_heads, head_dim]."""
    kv_heads = ranks.shard(config.num_key_value_heads).count
    shape = (config.num_hidden_layers, 2, num_blocks, args.block_size, kv_heads, config.head_dim)
    try:
        return torch.zeros(shape, dtype=config.dtype, device=args.device)
    except RuntimeError as error:
        raise ValueError(
            f"no memory for num_gpu_blocks_override={num_blocks} blocks of the KV cache with "
            f"block_size={args.block_size}: {error}"
        ) from error


def most_blocks(config: ModelConfig, args: EngineArgs, ranks: Ranks) -> int:
    """Blocks that the cache can have at the most, known before the model is loaded; at least 1.

    On a CPU it will have no fewer, unless `count_blocks` needs fewer. On a GPU this is what fits if
    the cache is all that the engine keeps there.
    """
    if args.num_gpu_blocks_override is not None:
        return args.num_gpu_blocks_override
    kv_heads = ranks.shard(config.num_key_value_heads).count
    numbers = 2 * config.num_hidden_layers * args.block_size * kv_heads * config.head_dim
    block_bytes = numbers * config.dtype.itemsize
    device = torch.device(args.device)
    budget = CPU_CACHE_BYTES if device.type == "cpu" else gpu_share(device, args, ranks)
    return max(1, budget // block_bytes)


def gpu_share(device: torch.device, args: EngineArgs, ranks: Ranks) -> int:
    """Bytes of a GPU that one rank may take, for everything."""
    _, total = torch.cuda.mem_get_info(device)
    return int(args.gpu_memory_utilization * total / ranks.max_ranks_per_gpu())


def reserved_bytes(device: torch.device) -> int:
    """GPU memory that torch holds in this process, for whichever engine is alive."""
    if device.type == "cpu":
        return 0
    gc.collect()
    torch.cuda.empty_cache()  # what a closed engine has left is no one's
    return torch.cuda.memory_reserved(device)


def count_blocks(runner: ModelRunner, args: EngineArgs, reserved_before: int) -> int:
    """Blocks that the cache may have, the same on all ranks; `runner` has a cache of one block.

    As many as the arguments say; else what memory allows, on a CPU at most what max_num_seqs
    sequences of max_model_len need. reserved_before: bytes torch held before the model was loaded.
    """
    if (wanted := args.num_gpu_blocks_override) is not None:
        if runner.device.type == "cuda":  # so that no request waits for a kernel to be compiled
            runner.rehearse(min(args.max_num_batched_tokens, wanted * args.block_size))
        return wanted
    block_bytes = math.prod(runner.kv_cache.shape) * runner.kv_cache.itemsize
    if runner.device.type == "cpu":
        budget = CPU_CACHE_BYTES
        enough = args.max_num_seqs * -(-args.max_model_len // args.block_size)
        num_blocks = min(enough, budget // block_bytes)
    else:
        budget = gpu_budget(runner, args, reserved_before)
        num_blocks = budget // block_bytes
    num_blocks = runner.ranks.all_reduce_min(num_blocks)
    if num_blocks < 1:
        raise ValueError(
            f"no memory for the KV cache: a block of {args.block_size} tokens takes "
            f"{block_bytes:,} bytes, and {max(budget, 0):,} are left for it; lower max_num_seqs or "
            f"max_num_batched_tokens, or raise gpu_memory_utilization={args.gpu_memory_utilization}"
        )
    return num_blocks


def gpu_budget(runner: ModelRunner, args: EngineArgs, reserved_before: int) -> int:
    """Bytes for the cache: this engine's share of the GPU, less what all else takes at the most."""
    device = runner.device
    before = torch.cuda.memory_reserved(device)
    runner.capture(graph_sizes(runner, args)[-1:])
    graphs = torch.cuda.memory_reserved(device) - before + OTHER_GRAPHS_BYTES
    runner.graphs.clear()
    gc.collect()
    torch.cuda.empty_cache()
    runner.rehearse(args.max_num_batched_tokens)  # torch keeps what it took, for every later step
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    context = min(total - free - reserved, MOST_CONTEXT_BYTES)
    share = gpu_share(device, args, runner.ranks)
    return min(share - context - (reserved - reserved_before), free) - graphs


def graph_sizes(runner: ModelRunner, args: EngineArgs) -> list[int]:
    """Batch sizes to capture, rising, the last one max_num_seqs; none if nothing is captured."""
    if args.enforce_eager or not (runner.backend.capturable and runner.ranks.capturable):
        return []
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, args.max_num_seqs, 32)]
    return [size for size in sizes if size < args.max_num_seqs] + [args.max_num_seqs]
