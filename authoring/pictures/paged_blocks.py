"""figures/paged_blocks.svg: a request's tokens, its block table, and the blocks in memory."""

from course.show.svg import BLUE, GREY, ORANGE, Picture

TITLE = "A block table says where a token's keys and values lie"
ALT = (
    "Ten tokens of a request in three rows of four: tokens 0 to 3, 4 to 7, and 8, 9 and two empty "
    "places. Its block table holds 5, 2 and 7. Arrows lead from each row through the table to "
    "blocks 5, 2 and 7 of a memory of eight blocks; the other blocks are other requests' or free. "
    "Token 9 has index 9 // 4 = 2, so in block 7, at offset 9 % 4 = 1: slot 7 times 4 plus 1 is 29."
)
TABLE, BLOCK_SIZE, NUM_BLOCKS, LENGTH = (5, 2, 7), 4, 8, 10
CELL, LEFT, TOP, MEMORY = 34, 30, 90, 440  # pixels; x of the memory's first place


def draw() -> Picture:
    p = Picture(700, 434, TITLE, ALT)
    p.text((LEFT, 30), TITLE, 17, anchor="start", bold=True)
    p.text((LEFT, 66), "as the request sees them", 13, "start", GREY)
    p.text((285, 66), "block table", 13, colour=GREY)
    p.text((MEMORY, 66), "memory", 13, "start", GREY)
    for index, block_id in enumerate(TABLE):
        y = TOP + 30 + index * 80
        tokens(p, LEFT, y, index)
        entry = p.box(262, y, 46, CELL, str(block_id), colour=ORANGE)
        p.arrow((LEFT + 4 * CELL + 6, y + CELL / 2), entry.left, colour=GREY)
        p.arrow(entry.right, (MEMORY - 60, block_y(block_id) + CELL / 2), colour=ORANGE)
    for block_id in range(NUM_BLOCKS):
        y = block_y(block_id)
        p.text((MEMORY - 52, y + 15), f"block {block_id}", 11.5, "start", GREY)
        if block_id in TABLE:
            tokens(p, MEMORY, y, TABLE.index(block_id), height=30)
        else:
            p.box(MEMORY, y, 4 * CELL, 30, colour=GREY, dashed=True)
        p.text(
            (MEMORY + 4 * CELL + 12, y + 15),
            f"slots {4 * block_id}-{4 * block_id + 3}",
            11.5,
            "start",
            GREY,
        )
    rule = "token 9: index 9 // 4 = 2, block 7, offset 9 % 4 = 1; slot 7 · 4 + 1 = 29"
    p.text((LEFT, 410), rule, 13.5, "start")
    return p


def block_y(block_id: int) -> float:
    return TOP - 6 + block_id * 37


def tokens(p: Picture, x: float, y: float, index: int, height: float = CELL) -> None:
    """One block's places, with the positions of the tokens in them."""
    for offset in range(BLOCK_SIZE):
        position = index * BLOCK_SIZE + offset
        held = position < LENGTH
        label = str(position) if held else ""
        p.box(
            x + offset * CELL,
            y,
            CELL,
            height,
            label,
            colour=BLUE if held else GREY,
            dashed=not held,
        )
