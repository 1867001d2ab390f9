"""What scripts written for vLLM call between two engines of one process."""

import gc

import torch

from nanovllm.validation import check_options
from nanovllm.validation.vllm_defaults import CLEANUP


def cleanup_dist_env_and_memory(shutdown_ray: bool = False) -> None:
    """Close every engine that has no references left, and give its memory back to the GPU."""
    check_options("cleanup_dist_env_and_memory", {"shutdown_ray": shutdown_ray}, CLEANUP)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
