"""figures/decoder.svg: the data flow of one decoder, with the shape at every step."""

from course.pictures.svg import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, Picture

ALT = (
    "The decoder from bottom to top. Token ids, one per token, are looked up in the embedding and "
    "become vectors of the hidden size. Every layer adds two things to them. First attention: norm, "
    "a product that gives queries, keys and values, norms and rotary position on queries and keys, "
    "attention over the stored keys and values, and an output product. Then the MLP: norm, the gate "
    "and up products, SiLU of gate times up, and the down product. After the last layer a norm and "
    "the head give logits over the vocabulary, for each token whose successor is wanted."
)
TITLE = "One forward pass of the decoder"


def draw() -> Picture:
    p = Picture(700, 640, TITLE, ALT)
    p.text((30, 30), TITLE, 17, anchor="start", bold=True)
    p.text((30, 54), "read upwards; n tokens, each a vector of d numbers", 12.5, "start", GREY)
    ids = p.box(30, 572, 170, 46, "token ids", "[n]")
    embed = p.box(30, 484, 170, 50, "embedding", "[n, d]", BLUE)
    layers = p.box(30, 236, 170, 200, colour=ORANGE)
    p.text((115, 320), "decoder layer", 14, bold=True)
    p.text((115, 342), "[n, d]", 12, mono=True)
    p.text((115, 366), "× number of layers", 12, colour=GREY)
    norm = p.box(30, 164, 170, 34, "norm", colour=PURPLE)
    head = p.box(30, 84, 170, 50, "head", "[rows, vocabulary]", BLUE)
    for lower, upper in ((ids, embed), (embed, layers), (layers, norm), (norm, head)):
        p.arrow(lower.bottom if lower.y < upper.y else lower.top, upper.bottom)
    p.line((200, 236), (240, 84), colour=ORANGE, dashed=True)
    p.line((200, 436), (240, 618), colour=ORANGE, dashed=True)
    p.box(240, 84, 430, 534, colour=ORANGE, dashed=True)
    p.text((455, 102), "inside one layer", 13, colour=GREY)
    inside(p)
    return p


def inside(p: Picture) -> None:
    """The two halves of a layer: attention below, the MLP above, each added to what came in."""
    attention = [
        ("norm", "", PURPLE, 30),
        ("query, key, value products", "[n, heads + 2·kv_heads, head_dim]", BLUE, 46),
        ("norm of q and k, then RoPE", "", PURPLE, 30),
        ("attention over stored keys, values", "[n, heads, head_dim]", GREEN, 46),
        ("output product", "[n, d]", BLUE, 42),
    ]
    mlp = [
        ("norm", "", PURPLE, 30),
        ("gate and up products", "[n, 2·inner]", BLUE, 42),
        ("SiLU(gate) × up", "[n, inner]", GREEN, 42),
        ("down product", "[n, d]", BLUE, 42),
    ]
    middle = half(p, 606, attention)
    half(p, middle, mlp)


def half(p: Picture, bottom: float, steps: list[tuple[str, str, str, float]]) -> float:
    """A column of steps from y = bottom up, and around it the sum; returns where the next begins."""
    x, width, gap, side = 300, 290, 11, 630
    y = bottom - 14
    entry = (x + width / 2, bottom)
    previous = entry
    for label, shape, colour, height in steps:
        y -= height
        box = p.box(x, y, width, height, label, shape, colour, size=13)
        p.arrow(previous, box.bottom)
        previous = box.top
        y -= gap
    plus = p.box(x + width / 2 - 13, y - 22, 26, 24, "+", size=16)
    p.arrow(previous, plus.bottom)
    p.line(entry, (side, bottom), (side, plus.right[1]), colour=INK)
    p.arrow((side, plus.right[1]), plus.right)
    return plus.top[1]
