"""How the course draws: colours that colour-blind readers can tell apart, units, and the machine.

    use_style()                        # once a notebook: crisp SVG, the course's look
    fig = ladder(upto=2)               # what is measured so far; fig.alt_text says it in words
    fig, ax = figure("Tokens a second", machine.describe())

No meaning rests on colour alone: lines differ in markers, bars in hatches.
"""

import math
import textwrap
from pathlib import Path
from typing import Any

from course.stages.records import Record, load

# Okabe and Ito, "Color Universal Design" (2008)
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
COLOURS = (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, BLACK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "//", "..", "xx", "\\\\", "--", "++")
WIDTH = 8.0  # inches: a notebook's cell on a laptop, without scaling
NO_DATE = {"Date": None, "Creator": None}  # the same figure gives the same file
STYLE: dict[str, Any] = {
    "figure.figsize": (WIDTH, 4.0),
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 6.5,
    "svg.fonttype": "none",  # text stays text: small, crisp, and readable to a screen reader
    "svg.hashsalt": "course",  # ids inside a figure do not change from run to run
}


def use_style() -> None:
    """Set the course's look; in a notebook, figures become SVG."""
    import matplotlib
    from cycler import cycler

    cycle = cycler(color=COLOURS) + cycler(marker=MARKERS)
    matplotlib.rcParams.update({**STYLE, "axes.prop_cycle": cycle})
    try:
        from IPython import get_ipython
        from matplotlib_inline.backend_inline import set_matplotlib_formats
    except ModuleNotFoundError:
        return
    if get_ipython() is not None:
        set_matplotlib_formats("svg", metadata=NO_DATE)


def figure(title: str, machine: str, columns: int = 1, height: float = 4.0) -> tuple[Any, Any]:
    """A figure and its axes (an array if columns > 1); the machine stands in its title."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, columns, figsize=(WIDTH, height))
    fig.suptitle(f"{title}\n{machine}", x=0.01, ha="left", fontsize=12)
    return fig, axes


def save(fig: Any, file: Path) -> None:
    """Write a figure as SVG, the same bytes for the same figure; as PNG into a .png."""
    svg = Path(file).suffix != ".png"
    fig.savefig(file, format="svg" if svg else "png", dpi=120, metadata=NO_DATE if svg else None)


# -- the ladder ----------------------------------------------------------------------------------


def ladder(upto: int | None = None, records: list[Record] | None = None) -> Any:
    """Throughput and memory of every stage so far, shipped records and the reader's own overlaid.

    upto: the last stage to show. Of a stage that a source has measured on several workloads, the
    last recorded shows. The figure's `alt_text` says the same in words.
    """
    import matplotlib.pyplot as plt

    rows = [r for r in (load() if records is None else records) if upto is None or r.stage <= upto]
    if not rows:
        raise ValueError("no stage is recorded yet: run one, and record(result)")
    rows = list({(row.source, row.stage): row for row in rows}.values())
    groups: dict[tuple, list[Record]] = {}
    for row in sorted(rows, key=lambda r: r.stage):
        groups.setdefault(row.source, []).append(row)
    stages = sorted({row.stage: row.name for row in rows}.items())
    height = 2.6 + (0.22 + 0.2 * len(groups)) * len(stages)
    room = {"figsize": (WIDTH, height), "gridspec_kw": {"wspace": 0.1}}
    fig, (speed, memory) = plt.subplots(1, 2, sharey=True, **room)
    for i, (source, group) in enumerate(groups.items()):
        offset = (i - (len(groups) - 1) / 2) * 0.8 / max(2, len(groups))
        at = [[n for n, _ in stages].index(row.stage) + offset for row in group]
        draw_speed(speed, at, group, i, legend_text(*source))
        draw_memory(memory, at, group, i)
    finish_axes(speed, memory, stages)
    machines = textwrap.fill("; ".join(dict.fromkeys(r.machine for r in rows)), 90)
    fig.suptitle(f"The ladder so far\n{machines}", x=0.01, ha="left", fontsize=11.5)
    add_legend(fig, speed)
    fig.alt_text = ladder_in_words(groups)
    return fig


def legend_text(origin: str, machine: str, model: str) -> str:
    prefix = "recorded on" if origin == "shipped" else "yours, on"
    return f"{prefix} {machine}: {model}"


def draw_speed(axes: Any, at: list[float], group: list[Record], i: int, label: str) -> None:
    """Output tokens a second, with a line from the slowest to the fastest run."""
    values = [row.numbers["tokens_per_second"] for row in group]
    spread = [row.spread["tokens_per_second"] for row in group]
    errors = [
        [value - low for value, (low, _) in zip(values, spread, strict=True)],
        [high - value for value, (_, high) in zip(values, spread, strict=True)],
    ]
    colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
    axes.errorbar(values, at, xerr=errors, color=colour, marker=marker, label=label, capsize=3)
    for value, y in zip(values, at, strict=True):
        text = axes.annotate(f"{value:,.0f}", (value, y), (8, 4), textcoords="offset points")
        text.set(fontsize=9, bbox={"fc": "white", "ec": "none", "alpha": 0.8, "pad": 0.5})


def draw_memory(axes: Any, at: list[float], group: list[Record], i: int) -> None:
    """Keys and values live (filled) and reserved (hollow), joined; the peak of all (bar)."""
    colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
    for row, y in zip(group, at, strict=True):
        live, reserved, peak = (
            row.numbers[name] / 2**20
            for name in ("kv_live_bytes", "kv_reserved_bytes", "peak_memory_bytes")
        )
        axes.plot([peak], [y], "|", color=colour, markersize=13, markeredgewidth=3)
        if reserved:
            axes.plot([live, reserved], [y, y], color=colour, marker="", linewidth=1.2)
            axes.plot([reserved], [y], marker, color=colour, markerfacecolor="white")
            axes.plot([live], [y], marker, color=colour)


def finish_axes(speed: Any, memory: Any, stages: list[tuple[int, str]]) -> None:
    """Names, units, the first stage on top; both scales are logarithmic, of whole decades."""
    speed.set(
        xscale="log",
        xlabel="output tokens a second (line: slowest to fastest run)",
        title="Throughput",
    )
    speed.set_yticks(range(len(stages)), [f"{number:02} {name}" for number, name in stages])
    speed.set_ylim(len(stages) - 0.4, -0.7)
    memory.set(xscale="log", xlabel="MiB", title="Memory")
    for axes in (speed, memory):
        low, high = axes.get_xlim()
        axes.set_xlim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(1.5 * high)))
        axes.xaxis.set_major_formatter(lambda v, _: f"{v:,.0f}" if v >= 1 else f"{v:g}")
        axes.xaxis.set_minor_formatter("")


def add_legend(fig: Any, speed: Any) -> None:
    """Below both panels: on the left who measured, on the right what the marks mean."""
    from matplotlib.lines import Line2D

    grey: dict[str, Any] = {"color": "#444444", "linestyle": ""}
    keys = [
        Line2D([], [], marker="o", label="keys and values of live tokens", **grey),
        Line2D([], [], marker="o", markerfacecolor="white", label="reserved for them", **grey),
        Line2D([], [], marker="|", markersize=11, label="peak, weights and all", **grey),
    ]
    sources = speed.get_legend_handles_labels()[0]
    rows = max(len(sources), len(keys))
    blank = Line2D([], [], linestyle="", marker="", label=" ")
    padded = [column + [blank] * (rows - len(column)) for column in (sources, keys)]
    fig.legend(handles=[*padded[0], *padded[1]], loc="outside lower left", ncols=2, fontsize=9)


def ladder_in_words(groups: dict[tuple, list[Record]]) -> str:
    """The figure's alternative text: every number that it shows."""
    parts = []
    for source, group in groups.items():
        rungs = []
        for row in group:
            live, reserved, peak = (
                f"{row.numbers[name] / 2**20:,.1f}"
                for name in ("kv_live_bytes", "kv_reserved_bytes", "peak_memory_bytes")
            )
            rungs.append(
                f"stage {row.stage:02} {row.name}: {row.numbers['tokens_per_second']:,.0f} tokens "
                f"a second, {live} of {reserved} MiB of keys and values live, peak {peak} MiB"
            )
        parts.append(f"{legend_text(*source)}: " + "; ".join(rungs))
    return "Throughput and memory of each stage. " + ". ".join(parts) + "."
