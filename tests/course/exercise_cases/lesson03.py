"""Wrong and right answers to lesson 03's exercises."""

import torch

from exercise_cases import Case
from nanovllm.engine.block_manager import BlockManager


def slot_mapping(block_tables, query_start_loc, seq_lens, block_size):
    """From the end of each row, and by gathering from all slots of a row."""
    token = torch.arange(int(query_start_loc[-1]))
    row = torch.searchsorted(query_start_loc, token, right=True) - 1
    back = query_start_loc[row + 1] - token  # 1 for a row's last token
    offsets = torch.arange(block_size)
    all_slots = (block_tables.long()[:, :, None] * block_size + offsets).flatten(1)
    at = seq_lens[row] - back
    return torch.where(at < 0, -1, all_slots[row, at.clamp(min=0)])


def by_loops(block_tables, query_start_loc, seq_lens, block_size):
    """Token by token, in Python."""
    slots, (*begins, _) = [], query_start_loc.tolist()
    for row, (begin, context) in enumerate(zip(begins, seq_lens.tolist(), strict=True)):
        end = int(query_start_loc[row + 1])
        for at in range(context - (end - begin), context):
            block = int(block_tables[row, max(at, 0) // block_size])
            slots.append(block * block_size + at % block_size if context else -1)
    return torch.tensor(slots)


class MyBlocks(BlockManager):
    def allocate(self, seq, num_tokens):
        count = -(-num_tokens // self.block_size) - len(seq.block_table)
        seq.block_table += [self.allocate_block() for _ in range(count)]

    def free(self, seq):
        for block in map(self.blocks.__getitem__, reversed(seq.block_table)):
            block.ref_count -= 1
            if not block.ref_count:
                self.free_block_ids.update({block.block_id: None})
        seq.block_table = []
        seq.num_cached_blocks = 0


class Border(BlockManager):
    def num_new_blocks(self, seq, num_tokens):
        held, missing = len(seq.block_table), 0
        while (held + missing) * self.block_size < num_tokens:
            missing += 1
        return missing


FREED = """            if self.blocks[block_id].ref_count == 0:
                self.free_block_ids[block_id] = None
"""
NEEDED = "(num_tokens + self.block_size - 1) // self.block_size"
CASES = {
    "blocks_and_slots": Case(
        mutants=[
            ("blocks = 1 + 3 + 4", "blocks = 1 + 3 + 5", "fill 4 blocks of 16 exactly"),
            ("blocks = 1 + 3 + 4", "blocks = 0 + 2 + 4", "round up"),
            ("blocks = 1 + 3 + 4", "blocks = 7", "Each request has blocks of its own"),
            ("16 * blocks - (10 + 33 + 64)", "10 + 1 + 0", "not the empty places"),
            ("16 * blocks - (10 + 33 + 64)", "6 + 15 + 16", "it has no empty place"),
            ("4 * 16 + 5", "37", "use the table"),
            ("4 * 16 + 5", "9 * 16 + 5", "counted from 0"),
            ("4 * 16 + 5", "4 * 16 + 4", "Offsets count from 0"),
            ("4 * 16 + 5", "4 + 5", "A block has 16 slots"),
        ],
        other={"blocks": 8, "empty": 21, "small_blocks": 28, "slot": 69},
    ),
    "slot_mapping": Case(
        mutants=[
            ("block_tables[row, positions // block_size]", "(positions // block_size)", "not been"),
            ("first[row] + ", "", "yours begin at 0"),
            (" - query_start_loc[row]", "", "begin at its own start"),
            (".masked_fill(seq_lens[row] == 0, -1)", "", "is padding"),
            (".long()", "", "int64"),
            (".long()", ".int().mul(1)", "int64"),
            (
                "blocks * block_size + positions % block_size",
                "(block_tables[row, positions // "
                "block_size] * block_size + positions % block_size).long()",
                "wrapped around",
            ),
            ("return slots", "return slots[None]", "One slot for each new token"),
            (
                "(seq_lens[row] == 0, -1)",
                "(seq_lens[row] == 0, -1).tolist()",
                "yours is a list",
            ),
            (
                ", seq_lens, block_size):",
                ", seq_lens):",
                "slot_mapping raised an error\nType",
            ),
            ("positions % block_size", "positions % (block_size + 1)", "Table [5, 2, 7]"),
        ],
        other=slot_mapping,
        more=({"slot_mapping": by_loops},),
    ),
    "my_blocks": Case(
        mutants=[
            ("* self.block_size < num_tokens", "* self.block_size <= num_tokens", "round up once"),
            ("< num_tokens:", "<= num_tokens - self.block_size:", "only"),
            (
                "while len(seq.block_table) * self.block_size < num_tokens:",
                "for _ in range(-(-num_tokens // self.block_size)):",
                "Count what the table holds already",
            ),
            (
                "while seq.block_table:\n            block_id = seq.block_table.pop()",
                "for block_id in reversed(seq.block_table):",
                "its table still names",
            ),
            ("block_table.pop()", "block_table.pop(0)", "The first block was given back first"),
            (
                FREED,
                "            self.free_block_ids[block_id] = None\n",
                "the other still reads them",
            ),
            ("            self.blocks[block_id].ref_count -= 1\n", "", "ref_count 0"),
            (
                "                self.free_block_ids[block_id] = None",
                "                pass",
                "0 are free",
            ),
            (
                "self.allocate_block()",
                "next(iter(self.free_block_ids))",
                "stands in the table twice",
            ),
            (
                "while len(seq.block_table) *",
                "if len(seq.block_table) *",
                "two blocks more at once",
            ),
            (
                "while len(seq.block_table) * self.block_size < num_tokens:\n",
                "seq.block_table = []\n"
                "        for _ in range(-(-num_tokens // self.block_size)):\n",
                "must stay first in the table",
            ),
            ("class MyBlocks(BlockManager)", "class MyBlocks", "no longer inherits"),
            (
                "self.free_block_ids[block_id] = None",
                "self.free_block_ids[block_id] = None\n"
                "            self.free_block_ids.move_to_end(block_id, last=False)",
                "first",
            ),
        ],
        other=MyBlocks,
    ),
    "border": Case(
        mutants=[
            ("- 1)", "- 2)", "the first token over the border has no block"),
            (NEEDED, "num_tokens // self.block_size", "has no block"),
            (NEEDED, "num_tokens // self.block_size + 1", "needs no next one yet"),
            ("max(0, needed - len(seq.block_table))", "needed", "Blocks it has are not missing"),
            ("max(0, needed - len(seq.block_table))", "needed - len(seq.block_table)", "never are"),
            ("class Border(BlockManager)", "class Border", "no longer inherits"),
        ],
        other=Border,
    ),
}
