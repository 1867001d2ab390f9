"""Drawings of a cache's memory as a strip of places: whole reservations, or blocks.

cells = reserved_cells(owners, tokens)                      # places reserved in one piece
cells = block_cells(tables, tokens, num_blocks, block_size)  # places of blocks
picture = strip(cells, "E asks for 10 places", lines=["free: 0-7"])
fig = waste_plot(sizes, {"long": [...]}, {"long": [...]})
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from course.show.svg import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION, Picture

Cell = tuple[str, str]  # who holds a place ("" if nobody), and its kind
COLOURS = {"A": BLUE, "B": ORANGE, "C": GREEN, "D": PURPLE, "E": SKY}
KINDS = {
    "live": "holds a token",
    "inside": "taken, empty",
    "free": "free",
    "outside": "free, of no use to who asks",
}
LEFT, SIZE, TOP = 22, 20, 62  # pixels
WORDS = 6.7  # width of a letter in the legend


def reserved_cells(
    owners: Sequence[str | None], tokens: Mapping[str, int], refused: bool = False
) -> list[Cell]:
    """Places whose owners are given; each owner's first tokens[owner] places are live."""
    seen: dict[str, int] = {}
    cells = []
    for owner in owners:
        if owner is None:
            cells.append(("", "outside" if refused else "free"))
            continue
        seen[owner] = seen.get(owner, 0) + 1
        cells.append((owner, "live" if seen[owner] <= tokens[owner] else "inside"))
    return cells


def block_cells(
    tables: Mapping[str, Sequence[int]],
    tokens: Mapping[str, int],
    num_blocks: int,
    block_size: int,
) -> list[Cell]:
    """Places of blocks that the tables name, in the order of memory."""
    cells: list[Cell] = [("", "free")] * (num_blocks * block_size)
    for owner, table in tables.items():
        for index, block_id in enumerate(table):
            for offset in range(block_size):
                live = index * block_size + offset < tokens[owner]
                cells[block_id * block_size + offset] = (owner, "live" if live else "inside")
    return cells


def count(cells: Sequence[Cell], kind: str) -> int:
    return sum(found == kind for _, found in cells)


def strip(
    cells: Sequence[Cell], title: str, lines: Sequence[str] = (), block_size: int = 0
) -> Picture:
    """One row of memory with its owners' letters; block_size: mark blocks, and number them."""
    shown = [kind for kind in KINDS if count(cells, kind)]
    numbers = "; ".join(f"{KINDS[kind]}: {count(cells, kind)}" for kind in shown)
    height = TOP + SIZE + 62 + 22 * len(lines)
    p = Picture(700, height, title, alt=f"{title}. Places: {numbers}.")
    p.text((LEFT, 24), title, 15, "start", bold=True)
    for i, cell in enumerate(cells):
        draw_cell(p, LEFT + i * SIZE, TOP, *cell)
    step = block_size or 8
    for i in range(0, len(cells), step):
        x = LEFT + i * SIZE
        if block_size:
            p.text((x + step * SIZE / 2, TOP - 13), f"block {i // step}", 12, colour=GREY)
            p.line((x, TOP - 7), (x, TOP + SIZE + 7))
        else:
            p.text((x + SIZE / 2, TOP - 13), str(i), 12, colour=GREY)
    if block_size:
        x = LEFT + len(cells) * SIZE
        p.line((x, TOP - 7), (x, TOP + SIZE + 7))
    legend(p, TOP + SIZE + 20, {kind: count(cells, kind) for kind in shown})
    for i, line in enumerate(lines):
        p.text((LEFT, TOP + SIZE + 58 + 22 * i), line, 13, "start", mono=True)
    return p


def block_strip(
    title: str, tables: Mapping[str, Sequence[int]], free: Iterable[int], tokens: Mapping[str, int]
) -> Picture:
    """Eight blocks of four places, the tables that name them, and the queue of free ones."""
    lines = ["; ".join(f"{name}: {t}" for name, t in tables.items() if t), f"free: {list(free)}"]
    return strip(block_cells(tables, tokens, 8, 4), title, lines, block_size=4)


def draw_cell(p: Picture, x: float, y: float, owner: str, kind: str) -> None:
    """One place: filled if live, struck through if reserved and empty, crossed if of no use."""
    colour = COLOURS.get(owner, GREY)
    if kind == "live":
        p.box(x, y, SIZE, SIZE, owner, colour=colour, size=13, radius=0)
        return
    colour = VERMILLION if kind == "outside" else colour
    p.box(x, y, SIZE, SIZE, colour=colour, dashed=True, radius=0)
    if kind != "free":
        p.line((x + 3, y + SIZE - 3), (x + SIZE - 3, y + 3), colour=colour)
    if kind == "outside":
        p.line((x + 3, y + 3), (x + SIZE - 3, y + SIZE - 3), colour=colour)


def legend(p: Picture, y: float, counts: Mapping[str, int]) -> None:
    x = float(LEFT)
    for kind, number in counts.items():
        draw_cell(p, x, y, "A" if kind in ("live", "inside") else "", kind)
        words = f"{KINDS[kind]}: {number}"
        p.text((x + SIZE + 7, y + SIZE / 2), words, 12.5, "start")
        x += SIZE + 7 + WORDS * len(words) + 24


# -- measured ------------------------------------------------------------------------------------


def waste_plot(
    sizes: Sequence[int],
    wasted: Mapping[str, Sequence[float]],
    shares: Mapping[str, Sequence[float]],
) -> Any:
    """Empty tokens a request, and the share of held memory that is empty, against block size."""
    from course.show.plots import BLACK, figure

    fig, (left, right) = figure("Empty places in held blocks", "counted, on any machine", 2)
    expected = [(size - 1) / 2 for size in sizes]
    for i, name in enumerate(wasted):  # hollow and shrinking, so that equal points are all seen
        left.plot(sizes, wasted[name], ls="", markersize=11 - 4 * i, markerfacecolor="none")
        right.plot(sizes, [100 * share for share in shares[name]], label=name)
    left.plot(sizes, expected, color=BLACK, marker="", lw=1, label="(block_size - 1) / 2")
    left.set(ylabel="empty places a request (tokens)", yscale="symlog", ylim=(-0.2, 400))
    left.set_yticks([0, 1, 10, 100], ["0", "1", "10", "100"])
    right.set(ylabel="% of held places", ylim=0)
    right.legend(loc="upper left")
    left.legend(handles=[left.lines[-1]], loc="upper left")
    for axes in (left, right):
        axes.set(xscale="log", xlabel="block size (tokens)")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
    return fig


def held_plot(runs: Mapping[str, Sequence[tuple[int, int]]], room: int) -> Any:
    """Of each run, places held and places live at every step."""
    from course.show.plots import BLUE, ORANGE, figure

    fig, axes = figure("Places held, and live", "counted, on any machine", len(runs), height=3.2)
    longest = max(map(len, runs.values()))
    for panel, (name, history) in zip(axes, runs.items(), strict=True):
        held, live = zip(*history, strict=True)
        at = range(len(history))
        style = {"facecolor": "#FCF0D6", "edgecolor": ORANGE, "hatch": "//", "linewidth": 0.8}
        panel.fill_between(at, live, held, label="held, empty", **style)
        panel.fill_between(at, live, color=BLUE, label="live")
        panel.axhline(room, color="black", lw=1, ls="--", marker="")
        panel.set(title=name, xlabel="step", xlim=(0, longest), ylim=(0, 1.08 * room))
    axes[0].set_ylabel(f"places (the room has {room:,})")
    axes[-1].legend()
    return fig
