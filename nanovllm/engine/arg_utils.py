"""EngineArgs at vLLM's path, and the arguments that depend on the model and the machine."""

from dataclasses import replace

import torch

from nanovllm.config import EngineArgs
from nanovllm.models.model_config import ModelConfig

__all__ = ["EngineArgs", "resolve_args", "resolve_max_model_len"]

CPU_BATCHED_TOKENS, GPU_BATCHED_TOKENS = 512, 16_384  # the default tokens of a step


def resolve_args(args: EngineArgs, config: ModelConfig) -> EngineArgs:
    """Return the arguments with a value for each one that the model or the machine decides.

    Raises ValueError for a device that is not usable, for a max_model_len over the model's limit,
    and for a max_num_batched_tokens that is too small for a whole prompt without chunked prefill.
    """
    cuda = torch.cuda.is_available()
    device = ("cuda" if cuda else "cpu") if args.device == "auto" else args.device
    if device != "cpu" and not (cuda and device.partition(":")[0] == "cuda"):
        raise ValueError(f"device={device!r} is not usable here; try 'cpu' or 'auto'")
    limit = config.derived_max_model_len
    length = args.max_model_len or limit
    if length > limit:
        raise ValueError(f"max_model_len={length} is over the model's limit of {limit} positions")
    default = CPU_BATCHED_TOKENS if device == "cpu" else GPU_BATCHED_TOKENS
    least = 1 if args.enable_chunked_prefill else length
    budget = args.max_num_batched_tokens or max(default, least)
    if budget < least:
        raise ValueError(
            f"max_num_batched_tokens={budget} must be at least max_model_len={length} with "
            f"enable_chunked_prefill=False"
        )
    return replace(args, device=device, max_model_len=length, max_num_batched_tokens=budget)


def resolve_max_model_len(args: EngineArgs, resolved: EngineArgs, num_blocks: int) -> int:
    """Return the number of tokens that a request may have, prompt and output together.

    A request must fit in the cache alone, so that it can always end. args: what the user gave.
    Raises ValueError if the user asked for more than the cache holds.
    """
    capacity = num_blocks * args.block_size
    if args.max_model_len is not None and args.max_model_len > capacity:
        raise ValueError(
            f"max_model_len={args.max_model_len} does not fit in the KV cache of {capacity} "
            f"tokens; lower it, or give the cache more blocks (num_gpu_blocks_override)"
        )
    return min(resolved.max_model_len or capacity, capacity)
