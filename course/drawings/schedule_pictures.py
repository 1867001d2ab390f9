"""Drawings of who runs in which step, from the rows of each step.

steps = [record.rows for record in engine.trace]     # a step: (request, first position, tokens)
show(rows_chart(steps, rows=3, title="Static"), alt)       # who sits in which row of the batch
show(requests_chart(steps, prompts, "Chunked"), alt)       # what each request had computed
frames = frames_of(steps, prompts, "Step by step")         # the same, growing

Each function says in its `.alt` what is seen. Cells differ in their words and borders, not in
colour alone.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from course.show.svg import BLUE, FONT, GREY, ORANGE, SKY, Picture

Row = tuple[str, int, int]  # request, first position, tokens computed
Steps = Sequence[Sequence[Row]]
LEFT, TOP, HEIGHT = 64, 62, 26  # pixels: before the first column, above the first line, a line
WIDTH = 700
LEGEND = {
    "prompt": (BLUE, "prompt tokens"),
    "answer": (SKY, "1 answer token"),
    "again": (ORANGE, "computed again"),
    "waits": (GREY, "waits"),
}


# -- counting ------------------------------------------------------------------------------------


def num_idle(steps: Steps, rows: int) -> int:
    """Row-steps in which a row of a batch of `rows` had nothing to compute."""
    return rows * len(steps) - sum(map(len, steps))


def num_again(steps: Steps) -> int:
    """Tokens that were computed though they had been computed before."""
    done: dict[str, int] = {}
    again = 0
    for step in steps:
        for name, start, count in step:
            again += max(0, min(start + count, done.get(name, 0)) - start)
            done[name] = max(done.get(name, 0), start + count)
    return again


def kinds(steps: Steps, prompts: Mapping[str, int]) -> list[dict[str, tuple[str, int]]]:
    """For each step and request: what it computed ("prompt", "answer", "again"), and how much.

    A request that has begun or is yet to begin, and is not done, "waits" in a step without it.
    """
    done = dict.fromkeys(prompts, 0)
    last = {name: i for i, step in enumerate(steps) for name, _, _ in step}
    table = []
    for i, step in enumerate(steps):
        cells = {name: ("waits", 0) for name in prompts if i < last.get(name, -1)}
        for name, start, count in step:
            kind = "prompt" if start < prompts[name] else "answer"
            cells[name] = ("again" if start < done[name] else kind, count)
            done[name] = max(done[name], start + count)
        table.append(cells)
    return table


def places(steps: Steps, rows: int) -> list[list[str | None]]:
    """Which request sits in each row of the batch, step by step; it keeps its row to its end."""
    last = {name: i for i, step in enumerate(steps) for name, _, _ in step}
    seats: list[str | None] = [None] * rows
    table = []
    for i, step in enumerate(steps):
        for name, _, _ in step:
            if name not in seats:
                seats[seats.index(None)] = name
        present = {name for name, _, _ in step}
        table.append([name if name in present else None for name in seats])
        seats = [name if name is not None and last[name] > i else None for name in seats]
    return table


# -- drawing -------------------------------------------------------------------------------------


def rows_chart(steps: Steps, rows: int, title: str) -> Picture:
    """A line for each row of the batch: the request in it, or "idle"."""
    table = places(steps, rows)
    share = num_idle(steps, rows) / (rows * len(steps))
    lines = [
        f"row {row}: " + " ".join(seats[row] or "idle" for seats in table) for row in range(rows)
    ]
    head = f"{title}: {len(steps)} steps, {share:.0%} of row-steps idle"
    picture, width = canvas(len(steps), rows, head, f"{head}. {'; '.join(lines)}.", legend=False)
    for i, seats in enumerate(table):
        for row, name in enumerate(seats):
            first = i == 0 or name not in table[i - 1]
            colour = GREY if name is None else BLUE if first else SKY
            cell(picture, i, row, width, name or "idle", colour, dashed=name is None)
    for row in range(rows):
        picture.text((LEFT - 10, middle(row)), f"row {row}", 13, "end")
    return picture


def requests_chart(
    steps: Steps, prompts: Mapping[str, int], title: str, upto: int | None = None
) -> Picture:
    """A line for each request: the tokens that each step computed for it; below, their sum.

    prompts: each request's prompt tokens. upto: draw this many steps only, on the same canvas.
    """
    shown = len(steps) if upto is None else upto
    table = kinds(steps, prompts)[:shown]
    alt = f"{title}. " + "; ".join(in_words(name, table) for name in prompts) + "."
    picture, width = canvas(len(steps), len(prompts) + 1, title, alt)
    for i, cells in enumerate(table):
        for line, name in enumerate(prompts):
            kind, count = cells.get(name, ("", 0))
            if kind == "waits":
                y, x = middle(line), LEFT + i * width
                picture.line((x + 3, y), (x + width - 3, y), colour=GREY, dashed=True)
            elif kind:
                cell(picture, i, line, width, str(count), LEGEND[kind][0], kind == "again")
        total = sum(count for _, _, count in steps[i])
        picture.text((LEFT + (i + 0.5) * width, middle(len(prompts))), str(total), 13, bold=True)
    for line, name in enumerate([*prompts, "sum"]):
        picture.text((LEFT - 10, middle(line)), name, 13, "end", bold=name == "sum")
    return picture


def in_words(name: str, table: list[dict[str, tuple[str, int]]]) -> str:
    """One request's line, for the alternative text."""
    parts = [f"{kind} {count}".removesuffix(" 0") for kind, count in
             (cells.get(name, ("-", 0)) for cells in table)]  # fmt: skip
    return f"{name}: {', '.join(parts)}"


def frames_of(steps: Steps, prompts: Mapping[str, int], title: str) -> list[str]:
    """The chart of `steps` after one step, after two, and so on, as SVG texts.

    Each names its font once: a page of many frames stays small.
    """
    texts = [requests_chart(steps, prompts, title, i + 1).svg() for i in range(len(steps))]
    return [t.replace(f" {FONT}", "").replace("<svg", f"<svg {FONT}", 1) for t in texts]


def canvas(
    num_steps: int, lines: int, title: str, alt: str, legend: bool = True
) -> tuple[Picture, float]:
    """A picture with its title, a numbered column a step, and the keys; the columns' width."""
    width = min(46.0, (WIDTH - LEFT - 16) / num_steps)
    picture = Picture(WIDTH, TOP + lines * HEIGHT + (44 if legend else 14), title, alt)
    picture.text((16, 20), title, 14, "start", bold=True)
    for i in range(num_steps):
        if num_steps <= 20 or i % 5 == 4:
            picture.text((LEFT + (i + 0.5) * width, TOP - 14), str(i + 1), 12, colour=GREY)
    picture.text((LEFT - 10, TOP - 14), "step", 12, "end", GREY)
    if legend:
        y = TOP + lines * HEIGHT + 12
        for i, (kind, (colour, text)) in enumerate(LEGEND.items()):
            x = LEFT + 158 * i
            if kind == "waits":
                picture.line((x, y + 9), (x + 24, y + 9), colour=GREY, dashed=True)
            else:
                box(picture, x, y, 24, 18, "n" if kind != "answer" else "1", colour, kind)
            picture.text((x + 32, y + 9), text, 12, "start")
    return picture, width


def middle(line: int) -> float:
    return TOP + (line + 0.5) * HEIGHT


def cell(
    picture: Picture, step: int, line: int, width: float, text: str, colour: str, dashed: bool
) -> None:
    box(picture, LEFT + step * width + 1, TOP + line * HEIGHT + 2, width - 2, HEIGHT - 4, text,
        colour, "again" if dashed else "")  # fmt: skip


def box(
    picture: Picture, x: float, y: float, width: float, height: float, text: str, colour: str,
    kind: str,
) -> None:  # fmt: skip
    """A tinted box; what is computed again, or idle, has a dashed border as well."""
    dashed = kind == "again"
    if not dashed or colour != GREY:
        picture.box(x, y, width, height, "", colour=colour)
    if dashed:
        picture.box(x, y, width, height, "", colour=colour, dashed=True)
    size = 13 if width > 20 else 10
    picture.text((x + width / 2, y + height / 2), text, min(size, 11 if text == "idle" else 13),
                 bold=colour == BLUE, colour=GREY if text == "idle" else "#222222")  # fmt: skip


# -- measured ------------------------------------------------------------------------------------


def ms(seconds: float) -> float:
    return 1e3 * seconds


def token_times(times: Mapping[str, tuple[Sequence[float], float]], machine: str) -> Any:
    """A tick for each token of one request, a line for each way to run it.

    times: seconds since a long prompt arrived, and its TTFT. The longest gap until then is marked.
    """
    from course.show.plots import VERMILLION, figure

    fig, axes = figure("When the tokens of a running request come", machine, height=2.3)
    for y, (moments, ttft) in enumerate(times.values()):
        axes.plot([ms(t) for t in moments], [y] * len(moments), "|", color=BLUE, markersize=17)
        meanwhile = [gap for gap in itertools.pairwise(moments) if gap[1] > 0 and gap[0] < ttft]
        before, after = max(meanwhile, key=lambda gap: gap[1] - gap[0])
        axes.annotate(
            f"longest gap {ms(after - before):.0f} ms",
            (ms(before + after) / 2, y - 0.32),
            ha="center",
        )
    axes.axvline(0, color=VERMILLION, ls="--", marker="", label="the long prompt arrives")
    axes.set_yticks(range(len(times)), list(times))
    axes.set(xlabel="ms", ylim=(len(times) - 0.5, -0.7))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.42))
    return fig


def load_curves(points: Sequence[Any], capacity: float, machine: str) -> Any:
    """TTFT and TPOT against throughput, a point an arrival rate; a star marks the knee."""
    from course.show.plots import BLACK, figure

    fig, panels = figure("Throughput against waiting", machine, columns=2, height=3.6)
    knee = max(points, key=lambda p: p.power)
    for axes, name in zip(panels, ("ttft", "tpot"), strict=True):
        values = [ms(getattr(point, name)) for point in points]
        axes.plot([p.throughput for p in points], values)
        for point, value in zip(points, values, strict=True):
            at = (point.throughput, value)
            if axes is panels[1] and point not in (points[0], knee):
                continue  # those beyond the capacity lie on each other
            axes.annotate(f"{point.rate / capacity:.0%}", at, (6, 5), textcoords="offset points",
                          fontsize=9)  # fmt: skip
        star = (knee.throughput, ms(getattr(knee, name)))
        axes.plot(*star, "*", color=ORANGE, markeredgecolor=BLACK, markersize=15, label="the knee")
        axes.set(xlabel="output tokens a second\n(%: arrivals, of the capacity)", ylim=0)
        axes.set_ylabel(f"{name.upper()}, ms (mean)")
        axes.margins(x=0.14, y=0.12)
    panels[0].legend(loc="upper left")
    return fig


def rows_in_time(runs: Mapping[str, Steps]) -> Any:
    """How many rows compute in each step of some runs, the room above a falling line hatched."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(figsize=(8, 2.6))
    for (name, steps), colour, style in zip(
        runs.items(), (BLUE, ORANGE), ("-", "--"), strict=False
    ):
        counts = [len(step) for step in steps]
        axes.step(range(1, len(counts) + 1), counts, where="mid", color=colour, ls=style, marker="",
                  label=f"{name}: {len(counts)} steps")  # fmt: skip
    axes.set(xlabel="step", ylabel="rows that compute", ylim=0, xlim=0)
    axes.locator_params(axis="y", integer=True)
    axes.legend()
    return fig
