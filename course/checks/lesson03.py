"""Checks of lesson 03's exercises: blocks and slots, a slot mapping, and two block managers."""

import random
from typing import Any

import torch
from torch import Tensor

from course.checks import attempt, check, compare, expect
from course.checks.engines import check_answers, check_base, sequence, three_prompts
from nanovllm.engine.block_manager import BlockManager

__all__ = [
    "check_blocks_and_slots",
    "check_border",
    "check_my_blocks",
    "check_slot_mapping",
    "three_prompts",
]


@check
def check_blocks_and_slots(blocks: Any, empty: Any, small_blocks: Any, slot: Any) -> None:
    lengths = (10, 33, 64)
    for name, given, B in (("blocks", blocks, 16), ("small_blocks", small_blocks, 4)):
        wrong = {
            sum(n // B + 1 for n in lengths): f"64 tokens fill {64 // B} blocks of {B} exactly: "
            "no further block is needed until token 65 comes.",
            sum(n // B for n in lengths): "A block that is begun is a block: round up.",
            -(-sum(lengths) // B): "Each request has blocks of its own: round up for each of them.",
        }
        look = f"Divide each length by {B}, round up, then add."
        compare(name, given, sum(-(-n // B) for n in lengths), wrong, look)
    wrong = {
        sum(
            n % 16 for n in lengths
        ): "Those are the tokens in the last blocks, not the empty places.",
        3 * 15: "15 is the most a request can waste. How much does each?",
        sum(
            16 - n % 16 for n in lengths
        ): "64 tokens fill their last block: it has no empty place.",
    }
    look = "All places of these blocks, less all tokens."
    compare("empty", empty, sum(-n % 16 for n in lengths), wrong, look)
    table, position = [3, 9, 4], 37
    wrong = {
        position: "That would be its slot if the request had blocks 0, 1, 2: use the table.",
        position // 16 * 16 + position % 16: "That is the position again: use the table.",
        table[1] * 16 + position % 16: "37 = 2 * 16 + 5: entry 2 of the table, counted from 0.",
        table[2] * 16 + position % 16 - 1: "Offsets count from 0, as positions do: 37 - 32 = 5.",
        table[2] * 16 + position % 16 + 1: "Offsets count from 0, as positions do: 37 - 32 = 5.",
        table[2] + position % 16: "A block has 16 slots: its first is block_id * 16.",
    }
    truth = table[position // 16] * 16 + position % 16
    compare("slot", slot, truth, wrong, "Which entry of the table, and which offset in that block?")


# -- slot mapping --------------------------------------------------------------------------------

Rows = list[tuple[list[int], int, int]]  # (table, context, new) of each row
PAGE: Rows = [([5, 2, 7], 10, 3), ([1, 0, 0], 2, 2), ([0, 0, 0], 0, 2)]


def slots_of(slot_mapping: Any, rows: Rows, block_size: int) -> Tensor:
    tables, contexts, new = zip(*rows, strict=True)
    query_start_loc = torch.tensor([0, *new]).cumsum(0)
    block_tables = torch.tensor(tables, dtype=torch.int32)
    result = attempt(
        slot_mapping, block_tables, query_start_loc, torch.tensor(contexts), block_size
    )
    expect(
        isinstance(result, Tensor),
        f"A tensor of int64 is wanted; yours is a {type(result).__name__}.",
    )
    expect(
        result.shape == (sum(new),),
        f"One slot for each new token is wanted, {sum(new)} of them; yours has shape "
        f"{list(result.shape)}.",
    )
    return result


def true_slots(rows: Rows, block_size: int, restart: bool = False) -> list[int]:
    """Token by token; restart=True counts positions from the row's first new token."""
    slots = []
    for table, context, new in rows:
        for i in range(new):
            at = i if restart else context - new + i
            slot = table[at // block_size] * block_size + at % block_size
            slots.append(slot if context else -1)
    return slots


@check
def check_slot_mapping(slot_mapping: Any) -> None:
    simple: Rows = [([5, 2, 7], 10, 10)]
    slots = slots_of(slot_mapping, simple, 4).tolist()
    expect(
        slots != list(range(10)),
        "Your slots are the positions: the block table has not been used.",
    )
    wanted = true_slots(simple, 4)
    expect(slots == wanted, f"Table [5, 2, 7], ten new tokens: slots {wanted}; yours: {slots}.")
    cached: Rows = [([5, 2, 7], 10, 3)]
    slots = slots_of(slot_mapping, cached, 4).tolist()
    expect(
        slots != true_slots(cached, 4, restart=True),
        "3 new tokens of a context of 10 stand at positions 7, 8 and 9; yours begin at 0 and would "
        "overwrite what earlier steps stored. The context ends with the new tokens.",
    )
    two: Rows = PAGE[:2]
    slots = slots_of(slot_mapping, two, 4).tolist()
    wanted = true_slots(two, 4)
    expect(
        slots == wanted,
        f"Rows 0 and 1 of the page have slots {wanted}; yours: {slots}. Does each row's count "
        "begin "
        "at its own start?",
    )
    check_padding_and_size(slot_mapping)


def check_padding_and_size(slot_mapping: Any) -> None:
    slots, wanted = slots_of(slot_mapping, PAGE, 4).tolist(), true_slots(PAGE, 4)
    expect(
        slots[-2:] == [-1, -1],
        f"A row with a context of 0 is padding: its two tokens get -1, yours get {slots[-2:]}. "
        "Those slots are somebody else's.",
    )
    expect(slots == wanted, f"The page's three rows have slots {wanted}; yours: {slots}.")
    huge: Rows = [([2**28], 3, 3)]
    result = slots_of(slot_mapping, huge, 16)
    expect(
        result.dtype == torch.int64,
        f"Slots are int64, yours are {result.dtype}: turn block ids to int64 before you multiply.",
    )
    expect(
        result.tolist() == true_slots(huge, 16),
        "Block 268,435,456 has slots beyond 2^31, and yours wrapped around: int32 times an int is "
        "int32. Turn the block ids to int64 before you multiply.",
    )
    rng = random.Random(3)
    for block_size in (1, 4, 16):
        rows: Rows = []
        for _ in range(20):
            context = rng.randint(1, 60)
            rows.append((rng.sample(range(999), 60), context, rng.randint(1, context)))
        expect(
            slots_of(slot_mapping, rows, block_size).tolist() == true_slots(rows, block_size),
            f"On 20 random rows with a block size of {block_size} some slots are wrong.",
        )


# -- two block managers --------------------------------------------------------------------------


@check
def check_my_blocks(MyBlocks: Any) -> None:
    check_base(MyBlocks, BlockManager, "MyBlocks")
    check_allocate(attempt(MyBlocks, 8, 4))
    check_free(attempt(MyBlocks, 8, 4))
    check_shared(attempt(MyBlocks, 8, 4))
    check_at_random(attempt(MyBlocks, 40, 4))
    check_answers(block_manager_class=MyBlocks)


def check_allocate(manager: BlockManager) -> None:
    seq = sequence(20)
    for num_tokens, count in ((3, 1), (4, 1), (5, 2), (5, 2), (13, 4)):
        before = list(seq.block_table)
        attempt(manager.allocate, seq, num_tokens)
        table = seq.block_table
        expect(
            table[: len(before)] == before,
            f"The table was {before} and is {table}. Blocks it had must stay first in the table: "
            "take only what is missing.",
        )
        expect(
            len(table) <= count,
            f"With blocks of 4, {num_tokens} tokens need {count} blocks; the table has "
            f"{len(table)}. "
            "Count what the table holds already, and round up once.",
        )
        expect(
            (num_tokens, len(table)) != (13, 3),
            "A table of 2 blocks of 4 was to hold 13 tokens, and has 3 blocks: 13 tokens need two "
            "blocks more at once.",
        )
        expect(
            len(table) == count,
            f"With blocks of 4, {num_tokens} tokens need {count} blocks; the table has only "
            f"{len(table)}. A block that is begun is a block: round up.",
        )
    expect(len(set(table)) == 4, f"A block stands in the table twice: {table}.")
    expect(
        manager.num_free_blocks == 4,
        f"8 blocks, 4 taken: 4 are free, not {manager.num_free_blocks}. Take them by "
        "self.allocate_block().",
    )


def check_free(manager: BlockManager) -> None:
    seq, other = sequence(20), sequence(20)
    attempt(manager.allocate, seq, 12)
    attempt(manager.allocate, other, 20)
    table = list(seq.block_table)
    attempt(manager.free, seq)
    expect(
        seq.block_table == [],
        f"The request gave its blocks back, but its table still names {seq.block_table}. It would "
        "write into blocks that are somebody else's, or free them twice.",
    )
    counts = [manager.blocks[i].ref_count for i in table]
    expect(counts == [0, 0, 0], f"Freed blocks are in no table: ref_count 0, not {counts}.")
    expect(
        manager.num_free_blocks == 3,
        f"3 blocks were given back, {manager.num_free_blocks} are free.",
    )
    attempt(manager.allocate, seq, 12)
    expect(
        seq.block_table != table,
        "The first block was given back first. The last one goes first: what is queued first is "
        "reused first, and the beginning of a text is worth keeping longest (lesson 04).",
    )
    expect(
        seq.block_table == table[::-1],
        "Blocks that were given back go to the end of the queue, the last one of the table first.",
    )


def check_shared(manager: BlockManager) -> None:
    seq, other = sequence(8), sequence(8)
    attempt(manager.allocate, seq, 8)
    manager.touch(other, list(seq.block_table))
    attempt(manager.free, seq)
    expect(
        manager.num_free_blocks == 6,
        "Two requests had the same two blocks and one of them is done: the other still reads them, "
        "so they are not free. Queue a block only when its ref_count has come down to 0.",
    )
    attempt(manager.free, other)
    expect(
        manager.num_free_blocks == 8,
        "Both owners of a block are done, and it is still not free: is ref_count counted down?",
    )


def check_at_random(manager: BlockManager) -> None:
    rng, running = random.Random(3), []
    for _ in range(300):
        if running and (rng.random() < 0.3 or manager.num_free_blocks < 10):
            attempt(manager.free, running.pop(rng.randrange(len(running))))
        else:
            running.append(sequence(36))
            attempt(manager.allocate, running[-1], rng.randint(1, 36))
        held = [block for seq in running for block in seq.block_table]
        expect(
            len(held) == len(set(held)),
            "After some arrivals and departures a block has two owners.",
        )
        expect(
            len(held) + manager.num_free_blocks == manager.num_blocks,
            "After some arrivals and departures a block is neither free nor in a table: it is "
            "lost.",
        )


@check
def check_border(Border: Any) -> None:
    check_base(Border, BlockManager, "Border")
    manager = attempt(Border, 8, 4)
    for num_tokens in range(1, 30):
        wanted = -(-num_tokens // 4)
        needed = attempt(manager.num_new_blocks, sequence(40), num_tokens)
        expect(
            needed >= wanted,
            f"{num_tokens} tokens need {wanted} blocks of 4, yours asks for {needed}: the first "
            "token "
            "over the border has no block.",
        )
        expect(
            needed <= wanted,
            f"{num_tokens} tokens need {wanted} blocks of 4, yours asks for {needed}. A block "
            "that is "
            "full needs no next one yet; a request that just fits would be refused.",
        )
    seq = sequence(40)
    seq.block_table = [3, 1]
    for num_tokens, wanted in ((4, 0), (8, 0), (9, 1), (17, 3)):
        missing = attempt(manager.num_new_blocks, seq, num_tokens)
        expect(
            missing == wanted,
            f"A table of 2 blocks lacks {wanted} for {num_tokens} tokens, not {missing}. Blocks "
            "it has "
            "are not missing, and fewer than none never are.",
        )
    check_answers(block_manager_class=Border)
