"""The plan of a decode step: which program of the attention kernel reads which tokens.

The rows of a decode step differ in length, and the whole GPU should stay busy to the end. We
therefore cut all contexts into tiles of a few tokens, list the tiles row by row, and give every
program the same number of consecutive tiles, for one KV head. Where several programs read one row,
each leaves a partial result, and a second kernel merges them. This is split-KV, as in
Flash-Decoding (Dao et al., 2023), with splits of equal work.

A tile of a tensor core has at least 16 rows, but one sequence has only a few query heads for each
KV head. Adjacent rows that begin with the same blocks therefore share tiles, so that their common
prefix is read once for all of them (cascade attention). We call such rows a *prefix group*.

For example, let a tile hold 64 tokens. Two rows of 300 and 200 tokens share their first 128. The
list then has two tiles for the common prefix, three for the first row and two for the second. Four
programs take two tiles each, and the last one takes only one.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.gpu_limits import MIN_TILE, GpuLimits, power_of_2
from nanovllm.metadata import PhaseMetadata

# Columns of the table of tiles. A tile holds the tokens [TILE_START, TILE_END) of TILE_NUM_ROWS
# adjacent rows, the first of which is TILE_ROW. TILE_PARTIAL counts a row's partial results: the
# program that reads the tile writes the row's result number TILE_PARTIAL. TILE_IS_LAST is 1 in the
# last tile of a row's own tokens, and in the last tile of a common prefix.
TILE_ROW, TILE_NUM_ROWS, TILE_START, TILE_END, TILE_PARTIAL, TILE_IS_LAST, TILE_COLUMNS = (
    tl.constexpr(i) for i in range(7)
)
# Columns of the table of rows: where a row's partial results begin, and how many it has.
FIRST_PARTIAL, NUM_PARTIALS, ROW_COLUMNS = (tl.constexpr(i) for i in range(3))

MAX_TILE, PROGRAMS_PER_SM = 64, 4
MIN_SHARED_TOKENS = 64  # a shorter common prefix is not worth tiles of its own


@dataclass(frozen=True)
class DecodePlan:
    """The tiles of a decode step, which the programs of the attention kernel divide evenly."""

    tiles: Tensor  # [max_tiles, TILE_COLUMNS] int32
    rows: Tensor  # [num_rows, ROW_COLUMNS] int32
    num_tiles: Tensor  # [1] int32
    partials: Tensor  # [max_partials, heads, head_dim + 2] float32: acc, running max, running sum
    tile_size: int  # tokens
    num_programs: int  # for each KV head


def plan_decode(
    positions: Tensor, block_tables: Tensor, k_cache: Tensor, num_heads: int
) -> PhaseMetadata:
    """Do what `layers.attention.plan_decode` does, and plan the work of `decode_attention`."""
    (block_size, kv_heads, head_dim), device = k_cache.shape[1:], positions.device
    limits, queries_per_kv, num_rows = GpuLimits.of(device), num_heads // kv_heads, len(positions)
    tile = decode_tile_size(limits, power_of_2(head_dim), k_cache.itemsize)
    num_programs = max(1, limits.num_sms * PROGRAMS_PER_SM // kv_heads)
    group_rows = max(MIN_TILE, power_of_2(queries_per_kv)) // queries_per_kv
    num_groups = triton.cdiv(num_rows, group_rows)
    tiles_per_row = triton.cdiv(block_tables.shape[1] * block_size, tile) + 1
    max_tiles = num_groups + num_rows * tiles_per_row
    tables = (max_tiles, TILE_COLUMNS.value), (num_rows, ROW_COLUMNS.value)
    shapes = (num_groups,), (num_rows,), *tables, (1,), (num_rows + 1,)
    ints = (torch.empty(shape, dtype=torch.int32, device=device) for shape in shapes)
    prefix_lens, seq_lens, tiles, rows, num_tiles, query_start_loc = ints
    slots = torch.empty(num_rows, dtype=torch.int64, device=device)
    strides = (positions.stride(0), block_tables.stride(0))
    shared_prefix_kernel[(num_groups,)](
        block_tables, positions, prefix_lens, num_rows, *strides, block_size, group_rows,
        power_of_2(group_rows), 128, MIN_SHARED_TOKENS,
    )  # fmt: skip
    decode_plan_kernel[(num_rows,)](
        positions, block_tables, prefix_lens, slots, seq_lens, query_start_loc, tiles, rows,
        num_tiles, num_rows, *strides, block_size, group_rows, tile, num_programs,
        max(256, power_of_2(num_rows)), 32,
    )  # fmt: skip
    # See `max_programs`: n tiles have at most n / per_program + 2 partial results. Every row of a
    # group reserves room for its own tiles, and for all of the group's shared tiles.
    max_partials = 4 * num_rows + (group_rows + 1) * num_programs
    shape = (max_partials, num_heads, head_dim + 2)
    partials = torch.empty(shape, dtype=torch.float32, device=device)
    plan = DecodePlan(tiles, rows, num_tiles, partials, tile, num_programs)
    return PhaseMetadata(slots, seq_lens, block_tables, query_start_loc, plan=plan)


def decode_tile_size(limits: GpuLimits, head_dim: int, itemsize: int) -> int:
    """Tokens of a tile: two tiles of keys and two of values must fit in half the shared memory."""
    return limits.fit_tile(MAX_TILE, 8 * head_dim * itemsize)


@triton.jit(do_not_specialize=["num_rows"])
def shared_prefix_kernel(
    block_tables, positions, prefix_lens, num_rows, position_stride, table_stride,
    BLOCK_SIZE: tl.constexpr, GROUP_ROWS: tl.constexpr, ROWS_PADDED: tl.constexpr,
    COLUMNS: tl.constexpr, MIN_TOKENS: tl.constexpr,
):  # fmt: skip
    """Find how many leading tokens are in the same blocks for all rows of one prefix group.

    Compares COLUMNS entries of the block tables at a time. A prefix below MIN_TOKENS counts as 0.
    """
    first_row = tl.program_id(0) * GROUP_ROWS
    member = tl.arange(0, ROWS_PADDED)
    row = first_row + member
    length = tl.load(positions + row * position_stride, row < num_rows, -1) + 1
    in_group = (member < GROUP_ROWS) & (length > 0)
    shortest = tl.min(tl.where(in_group, length, 2147483647), axis=0)
    several = tl.sum(in_group.to(tl.int32), axis=0) > 1
    num_same = tl.where(several, (shortest - 1) // BLOCK_SIZE, 0)  # blocks that may be the same
    start = 0
    while start < num_same:
        column = start + tl.arange(0, COLUMNS)
        entries = block_tables + row[:, None] * table_stride + column[None, :]
        mask = in_group[:, None] & (column < num_same)[None, :]
        wanted = tl.load(block_tables + first_row * table_stride + column, column < num_same, 0)
        differs = mask & (tl.load(entries, mask, 0) != wanted[None, :])
        first_difference = tl.where(differs, column[None, :], num_same)
        num_same = tl.min(tl.min(first_difference, axis=1), axis=0)
        start += COLUMNS
    tokens = num_same * BLOCK_SIZE
    tl.store(prefix_lens + tl.program_id(0), tl.where(tokens >= MIN_TOKENS, tokens, 0))


@triton.jit(do_not_specialize=["num_rows"])
def decode_plan_kernel(
    positions, block_tables, prefix_lens, slot_mapping, seq_lens, query_start_loc, tiles, rows,
    num_tiles, num_rows, position_stride, table_stride,
    BLOCK_SIZE: tl.constexpr, GROUP_ROWS: tl.constexpr, TILE_SIZE: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr, ROWS_PADDED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write one row's metadata and its tiles.

    Every program adds up the tiles of all rows, because it needs to know where the tiles of its own
    row begin and how many tiles each program of the attention kernel takes.
    """
    row = tl.program_id(0)
    position = tl.load(positions + row * position_stride)
    block = tl.load(block_tables + row * table_stride + tl.maximum(position, 0) // BLOCK_SIZE)
    slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
    tl.store(slot_mapping + row, tl.where(position < 0, -1, slot))
    tl.store(seq_lens + row, position + 1)
    tl.store(query_start_loc + row + 1, row + 1)

    # Count the tiles of every row.
    i = tl.arange(0, ROWS_PADDED)
    valid = i < num_rows
    length = tl.load(positions + i * position_stride, valid, -1) + 1
    shared = tl.where(length > 0, tl.load(prefix_lens + i // GROUP_ROWS, valid, 0), 0)
    own_tiles = tl.maximum(tl.cdiv(length - shared, TILE_SIZE), 1)  # a padding row has a tile, too
    shared_tiles = tl.where(i % GROUP_ROWS == 0, tl.cdiv(shared, TILE_SIZE), 0)
    row_tiles = tl.where(valid, own_tiles + shared_tiles, 0)
    total_tiles = tl.sum(row_tiles, axis=0)
    per_program = tl.cdiv(total_tiles, NUM_PROGRAMS)
    max_partials = max_programs(own_tiles, per_program)
    max_partials += max_programs(tl.cdiv(shared, TILE_SIZE), per_program)
    first_partial = tl.sum(tl.where(i < row, max_partials, 0), axis=0)
    first_tile = tl.sum(tl.where(i < row, row_tiles, 0), axis=0)
    group_row = row // GROUP_ROWS * GROUP_ROWS  # the first row of the prefix group
    group_tile = tl.sum(tl.where(i < group_row, row_tiles, 0), axis=0)
    if row == 0:
        tl.store(num_tiles, total_tiles)
        tl.store(query_start_loc, 0)

    # Write the tiles: the first row of a group writes those of the common prefix as well.
    start = tl.where(position >= 0, tl.load(prefix_lens + row // GROUP_ROWS), 0)
    count = tl.cdiv(start, TILE_SIZE)
    num_partials = tl.where(count > 0, num_programs_of(group_tile, count, per_program), 0)
    if row == group_row:
        in_group = (i >= row) & (i < row + GROUP_ROWS) & (length > 0)
        num_sharing = tl.sum(in_group.to(tl.int32), axis=0)
        write_tiles(
            tiles, first_tile, count, row, num_sharing, 0, start, 0, per_program, TILE_SIZE, CHUNK
        )
        first_tile += count
    count = tl.maximum(tl.cdiv(position + 1 - start, TILE_SIZE), 1)
    write_tiles(
        tiles, first_tile, count, row, 1, start, position + 1, num_partials, per_program,
        TILE_SIZE, CHUNK,
    )  # fmt: skip
    num_partials += num_programs_of(first_tile, count, per_program)
    tl.store(rows + row * ROW_COLUMNS + FIRST_PARTIAL, first_partial)
    tl.store(rows + row * ROW_COLUMNS + NUM_PARTIALS, num_partials)


@triton.jit
def num_programs_of(first_tile, count, per_program):
    """Return how many programs read the tiles [first_tile, first_tile + count), for count >= 1."""
    return (first_tile + count - 1) // per_program - first_tile // per_program + 1


@triton.jit
def max_programs(count, per_program):
    """Return how many programs may read `count` consecutive tiles, wherever the tiles begin."""
    return tl.where(count > 0, (count + per_program - 2) // per_program + 1, 0)


@triton.jit
def write_tiles(
    tiles, first_tile, count, row, num_sharing, start, end, first_partial, per_program,
    TILE_SIZE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Cut the tokens [start, end) of a row into `count` tiles, and list them from first_tile on."""
    for chunk in range(0, count, CHUNK):
        i = chunk + tl.arange(0, CHUNK)
        mask = i < count
        entry = tiles + (first_tile + i) * TILE_COLUMNS
        token = start + i * TILE_SIZE
        partial = first_partial + (first_tile + i) // per_program - first_tile // per_program
        tl.store(entry + TILE_ROW, row + i * 0, mask)
        tl.store(entry + TILE_NUM_ROWS, num_sharing + i * 0, mask)
        tl.store(entry + TILE_START, token, mask)
        tl.store(entry + TILE_END, tl.minimum(token + TILE_SIZE, end), mask)
        tl.store(entry + TILE_PARTIAL, partial, mask)
        tl.store(entry + TILE_IS_LAST, (i == count - 1).to(tl.int32), mask)
