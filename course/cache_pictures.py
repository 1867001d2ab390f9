"""Drawings of a contiguous cache: one token's step by hand, and what a batch's rows hold.

frame = token_frame(keys, values, query, step)      # numbers in their cells
spans = row_spans(prompts, outputs, step, max_len)  # of each row: live, done, padded, empty
fig = batch_map(spans, "Cache after 20 steps")
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from course.plots import BLUE, ORANGE, SKY, VERMILLION

EMPTY = "#FFFFFF"
KINDS = {  # what places of a row hold: colour, hatch
    "prompt, live": (BLUE, ""),
    "output, live": (SKY, ".."),
    "finished, still held": (ORANGE, "//"),
    "padding": (VERMILLION, "xx"),
    "reserved, empty": (EMPTY, ""),
}


# -- one token a step ----------------------------------------------------------------------------


def token_frame(keys: Any, values: Any, query: Any, step: int) -> Any:
    """Caches [tokens, dim] after token `step` was stored, and the query that reads them."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 3, figsize=(7.6, 2.3))
    titles = (f"query of token {step}", "cached keys", "cached values")
    for panel, title, table in zip(axes, titles, (query, keys, values), strict=True):
        kept = panel is not axes[0]
        panel.set_title(title, fontsize=10.5)
        names = [f"token {i}" for i in range(len(table))] if kept else [f"token {step}"]
        draw_numbers(panel, table.tolist(), step if kept else 0, names)
        panel.set_ylim(len(keys), 0)
    return fig


def draw_numbers(axes: Any, table: list[list[float]], step: int, names: list[str]) -> None:
    """A table of numbers, one row a token: those before `step`, the new one, and empty ones."""
    import matplotlib.pyplot as plt

    for y, row in enumerate(table):
        colour = "#DBF1EA" if y < step else "#FCF0D6" if y == step else EMPTY
        for x, value in enumerate(row):
            edge = {"edgecolor": "#999999" if y <= step else "#DDDDDD"}
            axes.add_patch(plt.Rectangle((x, y), 1, 1, facecolor=colour, **edge))
            if y <= step:
                axes.text(x + 0.5, y + 0.5, f"{value:g}", ha="center", va="center", fontsize=10)
    axes.set(xlim=(0, len(table[0])), xticks=[])
    axes.set_yticks([y + 0.5 for y in range(len(table))], names)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)


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

    prompts and outputs are lengths; the output's last token is never computed, so row i is done
    when outputs[i] - 1 of them are stored. Prompts are padded to the longest; what padding left
    behind an output is rubbish until the output has overwritten it.
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


def batch_map(rows: list[list[Span]], title: str, cells: bool = False) -> Any:
    """The rows as bars; cells: a line between places, for a cache small enough to count them."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(figsize=(7.6, 1.4 + 0.28 * len(rows)))
    for y, row in enumerate(rows):
        for span in row:
            colour, hatch = KINDS[span.kind]
            style = {"facecolor": colour, "hatch": hatch, "edgecolor": "#444444", "linewidth": 0.5}
            axes.barh(y, span.stop - span.start, left=span.start, height=0.82, **style)
    longest = rows[0][-1].stop
    if cells:
        axes.vlines(range(1, longest), -0.41, len(rows) - 0.59, color="#444444", linewidth=0.5)
        axes.set_xticks(range(0, longest + 1, 2))
    axes.set_yticks(range(len(rows)), [f"row {i}" for i in range(len(rows))])
    axes.set(xlim=(0, longest), ylim=(len(rows) - 0.5, -0.5), xlabel="place in the row (tokens)")
    axes.set_title(title, fontsize=11)
    axes.grid(False)
    keys = [
        plt.Rectangle((0, 0), 1, 1, facecolor=colour, hatch=hatch, edgecolor="#444444", label=kind)
        for kind, (colour, hatch) in KINDS.items()
    ]
    fig.legend(handles=keys, loc="outside lower center", ncols=3, fontsize=9.5)
    return fig


# -- measured ------------------------------------------------------------------------------------


def pass_times(sizes: Sequence[int], ms: Sequence[float], reading: float, computing: float) -> Any:
    """Milliseconds of a pass against its tokens, over two floors.

    reading: ms to read all weights once; computing: ms of one token's arithmetic.
    """
    from course import machine
    from course.plots import figure

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
    from course.plots import GREEN, figure

    fig, (left, right) = figure("One more token", machine.describe(), columns=2)
    left.plot(lengths, times, label=["stage 01: compute all", "stage 02: compute one"])
    left.set(xlabel="tokens so far, n", ylabel="ms for the next token", yscale="log")
    left.legend()
    right.plot(lengths, [again / kept for again, kept in times], color=GREEN, marker="^")
    right.axhline(1, color="black", lw=1, marker="")
    right.set(xlabel="tokens so far, n", ylabel="times faster with the cache", ylim=0)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(n) for n in lengths])
        axes.minorticks_off()
    return fig
