"""What a launcher must know about the GPU: its size, its shared memory, and what it supports."""

from functools import cache
from typing import Any

import torch
import triton

power_of_2 = triton.next_power_of_2  # `tl.arange` takes only powers of two
MIN_TILE = 16  # rows and columns of the smallest product that a tensor core computes


class GpuLimits:
    """The limits of one GPU.

    From compute capability 9.0 on, a kernel may start before the previous kernel has ended. This is
    called programmatic dependent launch (PDL), see `device_functions.pdl_wait`.
    """

    def __init__(self, num_sms: int, shared_memory: int, capability: int):
        self.num_sms = num_sms  # streaming multiprocessors
        self.shared_memory = shared_memory  # bytes that one program may use
        self.supports_pdl = capability >= 9  # capability: its major number
        self.launch_options = {"launch_pdl": True} if self.supports_pdl else {}

    @staticmethod
    @cache
    def of(device: torch.device) -> "GpuLimits":
        """The limits of `device`. For a CPU, which runs Triton's interpreter, they are made up."""
        if device.type == "cpu":
            return GpuLimits(4, 99 * 1024, 0)
        found: Any = torch.cuda.get_device_properties(device)
        memory = found.shared_memory_per_block_optin
        return GpuLimits(found.multi_processor_count, memory, found.major)

    def fit_tile(self, tile_size: int, bytes_per_row: int) -> int:
        """`tile_size`, halved until that many rows fit in shared memory, but at least MIN_TILE."""
        while tile_size > MIN_TILE and tile_size * bytes_per_row > self.shared_memory:
            tile_size //= 2
        return tile_size
