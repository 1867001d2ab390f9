"""figures/prefix_tree.svg: three prompts cut into blocks, and the tree their chained keys make."""

from course.show.svg import BLUE, GREEN, GREY, ORANGE, Box, Picture

TITLE = "Keys that chain: equal keys mean equal text from the first token on"
ALT = (
    "Three prompts cut into blocks of four tokens. A is 7 7 7 7, 1 2 3 4, 5 6. B is 7 7 7 7, "
    "1 2 3 4, 8. C is 9 9 9 9, 1 2 3 4, 5. Each full block has a key made of the key before it and "
    "its own tokens. A and B have the keys k0 and k1 in common and share both blocks. The second "
    "block of C holds the same tokens as theirs, but its key is k1', since the key before it is "
    "k0': it is not shared. The last block of each is not full, so it has no key."
)
ROWS = (("A", 56, "5 6"), ("B", 116, "8"), ("C", 186, "5"))


def draw() -> Picture:
    p = Picture(700, 272, TITLE, ALT)
    p.text((20, 24), TITLE, 15, anchor="start", bold=True)
    upper = chain(p, 70, "7 7 7 7", "key k0", "key k1 = hash(k0, 1 2 3 4)", BLUE)
    lower = chain(p, 182, "9 9 9 9", "key k0'", "key k1' = hash(k0', 1 2 3 4)", ORANGE)
    for name, y, own in ROWS:
        parent = lower if name == "C" else upper
        tail = p.box(540, y, 110, 44, shape=own, colour=GREEN)
        p.arrow(parent.right, tail.left)
        p.text((668, y + 22), name, 15, bold=True)
    p.text((595, 44), "not full: no key", 12, colour=GREY)
    p.text((350, 256), "the same four tokens after another beginning: another key", 12, colour=GREY)
    return p


def chain(p: Picture, y: float, first: str, key: str, child: str, colour: str) -> Box:
    """Two full blocks with their keys; the second."""
    parent = p.box(20, y, 150, 52, key, first, colour)
    block = p.box(230, y, 230, 52, child, "1 2 3 4", colour)
    p.arrow(parent.right, block.left)
    return block
