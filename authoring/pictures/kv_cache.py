"""figures/kv_cache.svg: prefill and decode as rows of one causal table, over one cache."""

from course.show.svg import BLUE, GREEN, GREY, INK, ORANGE, Picture

TITLE = "Prefill fills the cache, decode reads it and adds one token"
ALT = (
    "Two tables with queries as rows and keys as columns. Left, prefill: four queries in one pass; "
    "query 0 sees key 0, query 1 keys 0 and 1, and so on, a triangle; all four keys and values are "
    "stored in the cache below. Right, decode: one query, of token 4, sees keys 0 to 3, which come "
    "from the cache, and key 4, its own, which is stored first. Queries are not kept."
)
CELL = 38
SIDE = {"prefill": 110, "decode": 430}  # x of each table's first column
TOP, CACHE = 120, 330  # y of the tables and of the caches below them


def draw() -> Picture:
    p = Picture(700, 430, TITLE, ALT)
    p.text((30, 30), TITLE, 17, anchor="start", bold=True)
    prefill(p, SIDE["prefill"])
    decode(p, SIDE["decode"])
    p.text((30, 410), "A query is used in its own row alone, and is not kept.", 13, "start")
    return p


def prefill(p: Picture, x: float) -> None:
    p.text((x - 80, 62), "prefill: 4 tokens in one pass", 14, "start", bold=True)
    column_names(p, x, 4)
    for row in range(4):
        p.text((x - 12, TOP + (row + 0.5) * CELL), f"q{row}", 13, "end", mono=True)
        for column in range(4):
            seen = column <= row
            cell(p, x, TOP + row * CELL, column, BLUE if seen else GREY, dashed=not seen)
    for column in range(4):
        at = x + (column + 0.5) * CELL
        p.arrow((at, TOP + 4 * CELL + 6), (at, CACHE - 6), colour=BLUE)
    p.text((x + 4 * CELL + 14, 300), "store", 13, "start", BLUE)
    cache(p, x, "stored", BLUE, 4)


def decode(p: Picture, x: float) -> None:
    p.text((x - 60, 62), "decode: 1 token a pass", 14, "start", bold=True)
    column_names(p, x, 5)
    p.text((x - 12, TOP + 0.5 * CELL), "q4", 13, "end", mono=True)
    for column in range(5):
        at = x + (column + 0.5) * CELL
        cell(p, x, TOP, column, GREEN if column < 4 else ORANGE)
        p.arrow((at, CACHE - 6), (at, TOP + CELL + 6), colour=GREEN if column < 4 else ORANGE)
    p.text((x + 2 * CELL, 240), "read", 13, colour=INK)
    p.text((x + 4.5 * CELL + 12, 300), "store,", 13, "start", ORANGE)
    p.text((x + 4.5 * CELL + 12, 317), "then read", 13, "start", ORANGE)
    cache(p, x, "kept", GREEN, 4)
    cell(p, x, CACHE, 4, ORANGE, "k4 v4")


def column_names(p: Picture, x: float, count: int) -> None:
    for column in range(count):
        p.text((x + (column + 0.5) * CELL, TOP - 14), f"k{column}", 13, mono=True)


def cell(
    p: Picture, x: float, y: float, column: int, colour: str, label: str = "", dashed: bool = False
) -> None:
    box = p.box(x + column * CELL + 2, y + 2, CELL - 4, CELL - 4, colour=colour, dashed=dashed)
    if label:
        p.text(box.centre, label.replace(" ", "\n"), 11, mono=True)


def cache(p: Picture, x: float, word: str, colour: str, count: int) -> None:
    p.text((x - 12, CACHE + CELL / 2), "cache", 13, "end")
    for column in range(count):
        cell(p, x, CACHE, column, colour, f"k{column} v{column}")
    p.text((x, CACHE + CELL + 14), f"{count} tokens {word}", 12, "start", GREY)
