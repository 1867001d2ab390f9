"""figures/request_path.svg: the way of one request through the engine's files, and its steps."""

from itertools import pairwise

from course.show.svg import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, Box, Picture

TITLE = "The way of one request"
ALT = (
    "The way of one request. LLM in llm.py checks it and turns text into token ids, llm_engine.py "
    "queues them. Then a loop runs step after step: scheduler.py decides who runs and with how "
    "many tokens, block_manager.py finds room for keys and values, model_runner.py makes tensors, "
    "decoder.py turns them into logits, sampler.py picks the next ids. detokenizer.py makes text "
    "of them, and outputs.py holds the answer. Below, a prompt of 4 tokens: the prefill step reads "
    "all 4 and gives one new token, and each decode step reads one token and gives the next."
)
STEP = 118  # width of a box in the loop


def draw() -> Picture:
    p = Picture(700, 424, TITLE, ALT)
    p.text((20, 28), TITLE, 17, anchor="start", bold=True)
    door = p.box(20, 60, 200, 52, "check, text → ids", "llm.py · 00", BLUE)
    queue = p.box(250, 60, 200, 52, "queue", "llm_engine.py · 08", BLUE)
    answer = p.box(480, 60, 200, 52, "the answer", "outputs.py · 00", BLUE)
    p.arrow(door.right, queue.left)
    loop(p, queue, answer)
    passes(p)
    return p


def loop(p: Picture, queue: Box, answer: Box) -> None:
    """One step: five files in a row, and the way back from the last to the first."""
    p.box(20, 146, 660, 122, colour=ORANGE, dashed=True)
    p.text((32, 164), "one step, again and again", 12.5, "start", GREY)
    names = [
        ("who runs", "scheduler · 05", ORANGE),
        ("room for KV", "blocks · 03, 04", ORANGE),
        ("tensors", "runner · 07", ORANGE),
        ("logits", "decoder · 01", PURPLE),
        ("next ids", "sampler · 01", GREEN),
    ]
    boxes = [
        p.box(30 + i * (STEP + 12), 180, STEP, 48, label, file, colour, size=13)
        for i, (label, file, colour) in enumerate(names)
    ]
    for left, right in pairwise(boxes):
        p.arrow(left.right, right.left)
    (x0, bottom), (x1, _) = boxes[-1].bottom, boxes[0].bottom
    p.arrow((x0, bottom), (x0, 252), (x1, 252), (x1, bottom))
    p.arrow((queue.bottom[0] - 60, queue.bottom[1]), (queue.bottom[0] - 60, 146))
    p.arrow((answer.bottom[0], 146), answer.bottom)
    p.text((answer.bottom[0] - 84, 130), "ids → text · 01", 12, "middle", GREY)


def passes(p: Picture) -> None:
    """Four tokens of prompt: what each of three steps reads, and the token it gives."""
    rows = [("prefill", 0, 4), ("decode", 4, 5), ("decode", 5, 6)]
    p.text(
        (20, 298),
        "What a step reads (blue) and gives (dashed); grey: kept keys and values",
        12.5,
        "start",
        GREY,
    )
    for i, (name, first, last) in enumerate(rows):
        y = 316 + i * 34
        p.text((20, y + 12), f"step {i + 1}: {name}", 13, "start")
        for token in range(last + 1):
            reads, gives = first <= token < last, token == last
            colour = BLUE if reads else ORANGE if gives else GREY
            p.box(150 + token * 52, y, 44, 24, f"t{token}", colour=colour, dashed=gives, size=12)
        words = "the whole prompt" if i == 0 else "the newest token"
        p.text((530, y + 12), words, 12, "start", INK)
