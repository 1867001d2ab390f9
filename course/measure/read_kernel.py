"""A Triton kernel that does nothing but read: how fast can memory be read on this GPU?

torch's sum reaches well under the bandwidth. Here each program adds up a stretch of a large buffer
of its own, tile after tile, and writes a single number. Which tile is fastest differs between
cards, so several are tried.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

SHAPES = ((1024, 8, 4), (2048, 8, 4), (2048, 16, 4), (4096, 4, 8), (4096, 16, 8), (8192, 8, 8))


@triton.jit
def read_kernel(source, sums, TILE: tl.constexpr, TILES: tl.constexpr):
    """sums[i] = sum of the i-th stretch of TILE * TILES float32s; its 64-bit start cannot wrap."""
    program = tl.program_id(0).to(tl.int64)
    places = program * TILE * TILES + tl.arange(0, TILE)
    total = tl.zeros((TILE,), tl.float32)
    for tile in range(TILES):
        total += tl.load(source + places + tile * TILE)
    tl.store(sums + program, tl.sum(total))


def read(source: torch.Tensor, sums: torch.Tensor, tile: int, tiles: int, warps: int) -> None:
    """Read all of `source` [n] float32, n a multiple of tile * tiles; sums [n / (tile * tiles)]."""
    read_kernel[(len(sums),)](source, sums, TILE=tile, TILES=tiles, num_warps=warps)


def ways_to_read(source: torch.Tensor) -> list[Callable[[], None]]:
    """Functions that each read `source` [n] float32 once, n a power of two of at least 2^16."""

    def way(tile: int, tiles: int, warps: int) -> Callable[[], None]:
        sums = torch.empty(len(source) // (tile * tiles), device=source.device)
        return lambda: read(source, sums, tile, tiles, warps)

    return [way(*shape) for shape in SHAPES]
