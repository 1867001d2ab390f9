"""The ranks of one model: process groups, collectives, and the life of worker processes.

Scripts that were written for vLLM import `cleanup_dist_env_and_memory` from here.
"""

from nanovllm.distributed.cleanup import cleanup_dist_env_and_memory

__all__ = ["cleanup_dist_env_and_memory"]
