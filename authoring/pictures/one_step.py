"""figures/one_step.svg: the scheduler's two lists, and the step it cuts from them."""

from course.show.svg import BLUE, GREEN, GREY, ORANGE, SKY, VERMILLION, Picture

TITLE = "One step: running requests first, then waiting ones"
ALT = (
    "A queue of waiting requests D and E on the left; a list of running requests A, B and C, the "
    "oldest first, in the middle; on the right a step of 8 tokens: one answer token each for A and "
    "B, four that were left of C's prompt, and the first two of D's six. Admission leads from the "
    "queue to the list if a row, budget and blocks are there. Preemption leads from the youngest "
    "running request back to the head of the queue. After the step A, B and C get a token each."
)
CELL = 30


def draw() -> Picture:
    p = Picture(700, 330, TITLE, ALT)
    p.text((24, 28), TITLE, 15, "start", bold=True)
    waiting(p)
    running(p)
    step(p)
    return p


def waiting(p: Picture) -> None:
    p.text((90, 66), "waiting", 14, bold=True)
    p.text((90, 86), "first come, first served", 11, colour=GREY)
    p.box(30, 104, 120, 34, "D: prompt 6", colour=GREY)
    p.box(30, 146, 120, 34, "E: prompt 3", colour=GREY)
    p.arrow((156, 118), (254, 118), colour=GREEN)
    p.text((205, 84), "admit, if there is\na row, budget\nand blocks", 10.5, colour=GREEN)
    p.arrow((254, 208), (90, 208), (90, 186), colour=VERMILLION)
    p.text((172, 234), "preempt the youngest,\nif blocks run out", 10.5, colour=VERMILLION)


def running(p: Picture) -> None:
    p.text((330, 66), "running", 14, bold=True)
    p.text((330, 86), "oldest first", 11, colour=GREY)
    for line, (text, colour) in enumerate(
        (("A: answers", SKY), ("B: answers", SKY), ("C: 4 of 9 to go", BLUE))
    ):
        p.box(260, 104 + 42 * line, 140, 34, text, colour=colour)
        p.arrow((402, 121 + 42 * line), (436, 121 + 42 * line))


def step(p: Picture) -> None:
    left = 444
    p.text((left + 4 * CELL, 66), "the step: 8 tokens", 14, bold=True)
    cells = [("A", SKY), ("B", SKY), *[("C", BLUE)] * 4, *[("D", ORANGE)] * 2]
    for i, (name, colour) in enumerate(cells):
        p.box(left + CELL * i, 104, CELL - 3, 118, name, colour=colour)
    p.text((left + CELL, 240), "decode", 11.5)
    p.text((left + 4 * CELL, 240), "rest of C's prompt", 11.5)
    p.text((left + 7 * CELL, 240), "2 of 6", 11.5)
    p.arrow((left + 4 * CELL, 254), (left + 4 * CELL, 284))
    p.text((left + 4 * CELL, 302), "A, B, C get a token; D none yet", 12)
    p.text((24, 302), "A finished request leaves; its blocks are free.", 12, "start")
