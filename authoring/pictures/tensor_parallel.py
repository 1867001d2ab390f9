"""figures/tensor_parallel.svg: half a layer on two ranks, and where they must talk."""

import itertools

from course.show.svg import BLUE, GREEN, GREY, ORANGE, VERMILLION, Box, Picture

TITLE = "Column, then row: one all-reduce a half layer"
ALT = (
    "Two ranks hold the same x. Rank 0 multiplies it with the left half of A's columns, applies "
    "SiLU, and multiplies with the upper half of B's rows; rank 1 does the same with the "
    "other halves. Nothing is exchanged until the end, where one all-reduce adds the two partial "
    "results; then both ranks hold the same y."
)
ROWS = {"rank 0": (90, BLUE, "0"), "rank 1": (210, ORANGE, "1")}


def draw() -> Picture:
    p = Picture(700, 330, TITLE, ALT)
    p.text((30, 30), TITLE, 17, anchor="start", bold=True)
    add = p.box(510, 110, 76, 130, "all-\nreduce", "+", VERMILLION)
    for name, (y, colour, i) in ROWS.items():
        last = rank(p, name, y, colour, i)
        p.arrow(last.right, (add.x, y + 25), colour=colour)
        y_box = p.box(620, y, 50, 50, "y", colour=GREEN)
        p.arrow((add.x + add.width, y + 25), y_box.left, colour=GREEN)
    p.text((45, 300), "Each rank holds half of A and half of B;", 13, "start", GREY)
    p.text((320, 300), "x and y, one row a token, are whole on both.", 13, "start", GREY)
    return p


def rank(p: Picture, name: str, y: float, colour: str, i: str) -> Box:
    p.text((30, y - 14), name, 13, "start", bold=True)
    boxes = [
        p.box(30, y, 50, 50, "x", colour=GREEN),
        p.box(104, y, 132, 50, f"A{i}", "half the columns", colour),
        p.box(262, y, 70, 50, "SiLU", colour=colour),
        p.box(362, y, 116, 50, f"B{i}", "half the rows", colour),
    ]
    for before, after in itertools.pairwise(boxes):
        p.arrow(before.right, after.left, colour=colour)
    return boxes[-1]
