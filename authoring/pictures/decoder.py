"""figures/decoder.svg: the data flow of one decoder, with the shape at every step."""

from itertools import pairwise

from course.show.svg import BLUE, GREEN, GREY, ORANGE, PURPLE, Picture

ALT = (
    "The decoder from bottom to top. Token ids, one per token, are looked up in the embedding and "
    "become vectors of d numbers. Every layer adds two things to them. First attention: norm, a "
    "product that gives queries, keys and values, norms and rotary position on queries and keys, "
    "attention over the keys and values, and an output product. Then the MLP: norm, the "
    "gate and up products, SiLU of gate times up, and the down product. After the last layer a "
    "norm and the head give logits over the vocabulary, for the last token."
)
TITLE = "One forward pass of the decoder"
TOP, BOTTOM = 84, 676  # of both columns
Step = tuple[str, str, str, float]  # label, shape, colour, height
ATTENTION: list[Step] = [
    ("norm", "", PURPLE, 30),
    ("query, key, value products", "[n, H + 2K, D]", BLUE, 46),
    ("norm of q and k, then RoPE", "", PURPLE, 30),
    ("attention over keys, values", "[n, H, D]", GREEN, 46),
    ("output product", "[n, d]", BLUE, 42),
]
MLP: list[Step] = [
    ("norm", "", PURPLE, 30),
    ("gate and up products", "[n, 2I]", BLUE, 42),
    ("SiLU(gate) · up", "[n, I]", GREEN, 42),
    ("down product", "[n, d]", BLUE, 42),
]


def draw() -> Picture:
    p = Picture(700, BOTTOM + 20, TITLE, ALT)
    p.text((30, 30), TITLE, 17, anchor="start", bold=True)
    p.text((30, 54), "read upwards; n tokens, each a vector of d numbers", 12.5, "start", GREY)
    boxes = [
        p.box(30, BOTTOM - 50, 170, 50, "token ids", "[n]"),
        p.box(30, BOTTOM - 148, 170, 50, "embedding", "[n, d]", BLUE),
        p.box(30, 248, 170, 230, colour=ORANGE),
        p.box(30, 172, 170, 34, "norm", colour=PURPLE),
        p.box(30, TOP, 170, 50, "head", "[1, V]", BLUE),
    ]
    for lower, upper in pairwise(boxes):
        p.arrow(lower.top, upper.bottom)
    layers = boxes[2]
    x, y = layers.centre
    p.text((x, y - 24), "decoder layer", 14, bold=True)
    p.text((x, y), "[n, d]", 12, mono=True)
    p.text((x, y + 24), "as many as the model has", 12, colour=GREY)
    for corner, edge in ((layers.y, TOP), (layers.y + layers.height, BOTTOM)):
        p.line((200, corner), (240, edge), colour=ORANGE, dashed=True)
    p.box(240, TOP, 430, BOTTOM - TOP, colour=ORANGE, dashed=True)
    p.text((254, TOP + 18), "inside one layer", 13, "start", GREY)
    p.line((X + WIDTH / 2, BOTTOM), (X + WIDTH / 2, BOTTOM - 22))
    middle = half(p, BOTTOM - 22, ATTENTION)
    out = half(p, middle, MLP)
    p.arrow((X + WIDTH / 2, out), (X + WIDTH / 2, TOP))
    return p


X, WIDTH, GAP, SIDE = 300, 290, 11, 632


def half(p: Picture, bottom: float, steps: list[Step]) -> float:
    """A column of steps from y = bottom up, and the way around it to a sum; y above the sum."""
    y = bottom - 12
    entry = (X + WIDTH / 2, bottom)
    previous = entry
    for label, shape, colour, height in steps:
        y -= height
        box = p.box(X, y, WIDTH, height, label, shape, colour, size=13)
        p.arrow(previous, box.bottom)
        previous = box.top
        y -= GAP
    plus = p.box(entry[0] - 13, y - 26, 26, 26, "+", size=16)
    p.arrow(previous, plus.bottom)
    p.line(entry, (SIDE, bottom), (SIDE, plus.right[1]))
    p.arrow((SIDE, plus.right[1]), plus.right)
    p.line(plus.top, (entry[0], plus.y - 12))
    return plus.y - 12
