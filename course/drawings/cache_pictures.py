"""Drawings of a contiguous cache: one token's step by hand, and what a batch's rows hold.

frame = token_frame(keys, values, query, step)      # numbers in their cells
spans = row_spans(prompts, outputs, step, max_len)  # of each row: live, done, padded, empty
picture = batch_map(spans, "Cache after 20 steps")
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from course.show.svg import BLUE, GREEN, GREY, ORANGE, SKY, VERMILLION, Picture

KINDS = {  # what places of a row hold: colour, and the letter that says the same
    "prompt, live": (BLUE, "P"),
    "output, live": (SKY, "O"),
    "finished, still held": (ORANGE, "F"),
    "padding": (VERMILLION, "x"),
    "reserved, empty": (GREY, ""),
}
CELL, ROW = 40, 26  # pixels: width of a number, height of a row


# -- one token a step ----------------------------------------------------------------------------


def token_frame(keys: Any, values: Any, query: Any, step: int) -> str:
    """Caches [tokens, dim] after token `step` was stored, and the query that reads them."""
    height = 60 + ROW * len(keys)
    p = Picture(800, height, f"Token {step}", alt=f"The query of token {step} and both caches.")
    tables = {f"query of token {step}": query, "cached keys": keys, "cached values": values}
    for i, (title, table) in enumerate(tables.items()):
        left = 80 + 250 * i
        p.text((left, 22), title, 14, "start", bold=True)
        kept = title.startswith("cached")
        draw_numbers(p, left, table.tolist(), step if kept else 0, 0 if kept else step)
    return p.svg()


def draw_numbers(p: Picture, left: float, table: list[list[float]], step: int, first: int) -> None:
    """Numbers, one row a token from `first` on: those before `step`, the new one, empty ones."""
    for i, row in enumerate(table):
        y = 40 + ROW * i
        p.text((left - 8, y + ROW / 2), f"token {first + i}", 12, "end")
        colour = GREEN if i < step else ORANGE if i == step else GREY
        for x, value in enumerate(row):
            label = f"{value:g}" if i <= step else ""
            p.box(left + CELL * x, y, CELL, ROW, label, colour=colour, size=13, radius=0)


# -- a batch -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """Places [start, stop) of one row, and what they hold."""

    kind: str
    start: int
    stop: int


def row_spans(
    prompts: Sequence[int], outputs: Sequence[int], step: int, max_len: int
) -> list[list[Span]]:
    """What each row of [rows, max_len] holds once `step` output tokens were computed for it.

    prompts and outputs are lengths. Row i has its last token after outputs[i] - 1 steps, and counts
    as live until the next one, as in stage 02's record. Prompts are padded to the longest; what
    padding left behind an output is rubbish until the output has overwritten it.
    """
    rows = []
    for prompt, output in zip(prompts, outputs, strict=True):
        end = prompt + min(step, max(outputs) - 1)
        if step >= output:  # answered: the row computes on, for nothing
            parts = [("finished, still held", 0, end)]
        else:
            parts = [("prompt, live", 0, prompt), ("output, live", prompt, end)]
        rubbish = max(end, max(prompts))
        parts += [("padding", end, rubbish), ("reserved, empty", rubbish, max_len)]
        rows.append([Span(*part) for part in parts if part[1] < part[2]])
    return rows


def share(rows: list[list[Span]], kind: str) -> float:
    """The share of all places whose kind contains a word: share(rows, "live")."""
    total = sum(span.stop - span.start for row in rows for span in row)
    return sum(s.stop - s.start for row in rows for s in row if kind in s.kind) / total


def batch_map(rows: list[list[Span]], title: str, cells: bool = False) -> str:
    """The rows as bars; cells: a line between places, for a cache small enough to count them."""
    left, top, width = 70, 44, 704
    longest = rows[0][-1].stop
    place = width / longest  # pixels
    bottom = top + ROW * len(rows)
    p = Picture(800, bottom + 72, title, alt=title)
    p.text((left, 22), title, 15, "start", bold=True)
    for i, row in enumerate(rows):
        y = top + ROW * i
        p.text((left - 8, y + ROW / 2), f"row {i}", 12, "end")
        for span in row:
            colour, letter = KINDS[span.kind]
            size = (span.stop - span.start) * place
            p.box(left + span.start * place, y, size, ROW - 4, letter, colour=colour, radius=0)
    for at in range(0, longest + 1, 1 if cells else 32):
        x = left + at * place
        if cells and 0 < at < longest:
            p.line((x, top), (x, bottom - 4), colour=GREY, dashed=True)
        p.text((x, bottom + 8), str(at), 12, colour=GREY)
    p.text((left + width / 2, bottom + 28), "place in the row (tokens)", 12.5, colour=GREY)
    legend = " · ".join(f"{letter or 'no letter'}: {kind}" for kind, (_, letter) in KINDS.items())
    p.text((left, bottom + 54), legend, 12.5, "start")
    return p.svg()


# -- measured ------------------------------------------------------------------------------------


def pass_times(sizes: Sequence[int], ms: Sequence[float], reading: float, computing: float) -> Any:
    """Milliseconds of a pass against its tokens, over two floors.

    reading: ms to read all weights once; computing: ms of one token's arithmetic.
    """
    from course import machine
    from course.show.plots import figure

    fig, axes = figure("Time of one pass", machine.describe())
    axes.plot(sizes, ms, label="measured")
    axes.plot(sizes, [reading] * len(sizes), ls="--", label="floor: reading the weights once")
    axes.plot(sizes, [n * computing for n in sizes], ls=":", label="floor: arithmetic")
    axes.set(xscale="log", yscale="log", xlabel="tokens computed in the pass, n", ylabel="ms")
    axes.set_xticks(sizes, [str(n) for n in sizes])
    axes.minorticks_off()
    axes.legend()
    return fig


def next_token_times(lengths: Sequence[int], times: Sequence[tuple[float, float]]) -> Any:
    """Milliseconds of one more token by stages 01 and 02, and how many times faster 02 is."""
    from course import machine
    from course.show.plots import GREEN, figure

    fig, (left, right) = figure("One more token", machine.describe(), columns=2)
    left.plot(lengths, times, label=["stage 01: compute all", "stage 02: compute one"])
    left.set(xlabel="tokens so far, n", ylabel="ms for the next token", yscale="log")
    low, high = min(map(min, times)), max(map(max, times))
    ticks = [x * 10**n for n in range(-1, 5) for x in (1, 2, 5) if low / 2 < x * 10**n < high * 2]
    left.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    left.legend()
    right.plot(lengths, [again / kept for again, kept in times], color=GREEN, marker="^")
    right.axhline(1, color="black", lw=1, marker="")
    right.set(xlabel="tokens so far, n", ylabel="times faster with the cache", ylim=0)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(n) for n in lengths])
        axes.minorticks_off()
    return fig
