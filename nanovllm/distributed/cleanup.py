"""Free the memory of dropped engines, as scripts written for vLLM do between two engines."""

import gc

import torch

from nanovllm.validation import check_options
from nanovllm.validation.vllm_defaults import CLEANUP


def cleanup_dist_env_and_memory(shutdown_ray: bool = False) -> None:
    """Close every engine that has no references left, and return its memory to the GPU.

    Raises ValueError for shutdown_ray=True, because this engine does not use Ray.
    """
    check_options("cleanup_dist_env_and_memory", {"shutdown_ray": shutdown_ray}, CLEANUP)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
