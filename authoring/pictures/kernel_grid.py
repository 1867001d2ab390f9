"""figures/kernel_grid.svg: four programs copy four tokens' rows into their slots."""

from course.show.svg import BLUE, GREEN, GREY, ORANGE, SKY, Picture

TITLE = "One program, one token"
ALT = (
    "Four programs run the same code; program i reads token i's row and its slot, and writes the "
    "row to that slot of the cache. Tokens 0, 1 and 3 go to slots 4, 0 and 2 of six; token 2 has "
    "slot -1 and is not written."
)
SLOTS = (4, 0, -1, 2)
COLOURS = (BLUE, ORANGE, GREY, GREEN)


def draw() -> Picture:
    p = Picture(700, 330, TITLE, ALT)
    p.text((24, 28), TITLE, 15, "start", bold=True)
    for x, text in ((110, "key"), (330, "programs"), (580, "cache")):
        p.text((x, 60), text, 14, bold=True)
    for slot in range(6):
        y = 78 + 40 * slot
        token = SLOTS.index(slot) if slot in SLOTS else None
        p.text((492, y + 16), f"slot {slot}", 11, "end", GREY)
        if token is None:
            p.box(500, y, 160, 32, dashed=True)
        else:
            p.box(500, y, 160, 32, f"token {token}", colour=COLOURS[token])
    for token, slot in enumerate(SLOTS):
        y = 94 + 60 * token
        p.box(30, y, 160, 32, f"token {token}", colour=COLOURS[token])
        what = f"slot {slot}" if slot >= 0 else "slot -1: nothing"
        p.box(260, y - 4, 140, 40, f"program {token}", what, SKY, 12)
        p.arrow((192, y + 16), (256, y + 16))
        if slot >= 0:
            p.arrow((402, y + 16), (450, 94 + 40 * slot), colour=COLOURS[token])
    return p
