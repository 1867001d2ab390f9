"""figures/lesson_speeds.svg: output tokens a second after each lesson, recorded on one GPU.

The numbers come from figures/data/stages_h200.json. A hatched bar marks a stage that ran only a
part of the workload.
"""

import math
import re

from course.show.svg import BLUE, GREY, INK, ORANGE, Box, Picture
from course.stages.records import SHIPPED, Record, read

RECORDS = SHIPPED / "stages_h200.json"
TITLE = "Output tokens a second by lesson"
WIDTH, LEFT, RIGHT = 640, 232, 556  # pixels: the picture, and the first and last of the scale
TOP, ROW, BAR = 84, 27, 20
DECADES = (10, 100, 1_000, 10_000)
FULL_SCALE = 20_000  # tokens a second at RIGHT
GRID = "#DDDDDD"  # pale, because numbers stand on these lines
HATCH = 8  # pixels between two lines of a hatched bar


def requests_of(row: Record) -> int:
    """How many requests of the workload a stage ran."""
    count = re.match(r"(\d+) requests: ", row.workload)
    if count is None:
        raise ValueError(f"stage {row.stage}: its workload names no requests: {row.workload!r}")
    return int(count[1])


def speed_of(row: Record) -> float:
    return row.numbers["tokens_per_second"]


def draw(rows: list[Record] | None = None) -> Picture:
    """One bar for each lesson that has a record, the first lesson on top, on a logarithmic scale.

    rows: records of one machine and one model, in the order of the lessons (default: RECORDS).
    """
    rows = read(RECORDS, "shipped") if rows is None else rows
    [(machine, model, dtype)] = {(row.machine, row.model, row.dtype) for row in rows}
    whole = max(map(requests_of, rows))
    bottom = TOP + len(rows) * ROW
    p = Picture(WIDTH, bottom + 70, TITLE, alt(rows))
    p.text((20, 30), f"{TITLE}, one {machine}", 17, "start", bold=True)
    p.text((20, 58), f"{whole} requests, {model} in {dtype}", 15, "start", GREY)
    scale(p, bottom)
    for i, row in enumerate(rows):
        bar(p, TOP + i * ROW, row, part=requests_of(row) < whole)
    part = [row for row in rows if requests_of(row) < whole]
    notes = [
        f"hatched: lesson {r.stage:02} ran {requests_of(r)} of the {whole} requests" for r in part
    ]
    p.text((20, bottom + 48), "; ".join(notes), 15, "start", INK)
    return p


def place(speed: float) -> float:
    """The x of a speed, in pixels."""
    first, last = math.log10(DECADES[0]), math.log10(FULL_SCALE)
    return LEFT + (math.log10(speed) - first) / (last - first) * (RIGHT - LEFT)


def scale(p: Picture, bottom: float) -> None:
    """A line at each power of ten, with its number below."""
    for speed in DECADES:
        p.line((place(speed), TOP - 6), (place(speed), bottom), colour=GRID)
        p.text((place(speed), bottom + 14), f"{speed:,}", 14, colour=GREY)
    p.text((20, bottom + 14), "tokens a second, log scale", 14, "start", GREY)


def bar(p: Picture, y: float, row: Record, part: bool) -> None:
    """One lesson: its number and what its stage adds, the bar, and the speed beside it."""
    end = place(speed_of(row))
    p.text((20, y + BAR / 2), f"{row.stage:02}", 15, "start", bold=True)
    p.text((50, y + BAR / 2), row.name, 15, "start")
    box = p.box(LEFT, y, end - LEFT, BAR, colour=ORANGE if part else BLUE, radius=0)
    if part:
        hatch(p, box)
    p.text((end + 8, y + BAR / 2), f"{speed_of(row):,.0f}", 15, "start", bold=True)


def hatch(p: Picture, box: Box) -> None:
    """Lines across a bar, from its lower left to its upper right."""
    right, bottom = box.x + box.width, box.y + box.height
    start = box.x - box.height + HATCH
    for n in range(int((right - start) / HATCH)):
        x = start + n * HATCH  # where the line would meet the lower edge
        first, last = max(box.x, x), min(right, x + box.height)
        p.line((first, bottom - (first - x)), (last, bottom - (last - x)), colour=ORANGE)


def alt(rows: list[Record]) -> str:
    """Every bar in words."""
    whole = max(map(requests_of, rows))
    bars = [
        f"{row.stage:02} {row.name} {speed_of(row):,.0f}"
        + (f" ({requests_of(row)} of {whole} requests)" if requests_of(row) < whole else "")
        for row in rows
    ]
    return f"{TITLE}, on one {rows[0].machine}: {', '.join(bars)}."
