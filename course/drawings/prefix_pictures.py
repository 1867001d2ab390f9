"""Drawings of a prefix cache: a pool of blocks at one moment, and what a cache saved.

frame = pool_frame(pool, tables, contents)        # an SVG's text, for course.show.display.steps
frames, queues, tables = play(pool, prompts, enter, leave)      # STORY, told to a pool
fig = turns(prompts, found)                       # tokens of a chat's turns
fig = hit_rates(blocks, rates, needed)            # against the size of the cache
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from course.show.plots import BLUE as BAR
from course.show.plots import ORANGE as SAVED
from course.show.plots import figure
from course.show.svg import BLUE, GREY, INK, ORANGE, Picture

STORY = {  # the toy pool's events: a request enters (+) or leaves (-), and what that does
    "+A": "A takes 0, 1, 2; two of them are full, and cached",
    "+B": "B finds two blocks, whose refs are 2 now, and takes 3 for its last token",
    "-A": "A leaves: 2 is free and empty, as it was never full; 0 and 1 are still B's",
    "-B": "B leaves, last block first: 3, 1, 0. Free, and two of them still cached",
    "+D": "D takes the five oldest: 4, 5, 2, 3 and 1, which evicts the tail of A's beginning",
    "-D": "D leaves, last block first; its four full blocks stay cached",
    "+A again": "A again: 0 is revived; it takes 1 and 3, which evicts D's last full block",
}
LEFT, STEP, WIDTH, HEIGHT = 14, 112, 104, 58  # pixels: a block's place and its size


class Pool(Protocol):
    """What a frame shows of a pool: the lesson's toy has these."""

    refs: list[int]  # of each block, the tables it stands in
    free: dict[int, None]  # least recently used first
    key_of: dict[int, Any]  # of cached blocks


def pool_frame(
    pool: Pool, tables: Mapping[str, Sequence[int]], contents: Mapping[int, Sequence[int]]
) -> str:
    """The pool's blocks with their tokens and reference counts, and the free queue below."""
    p = Picture(LEFT * 2 + STEP * len(pool.refs) - 8, 182, "A pool of blocks", "A pool of blocks")
    for block, refs in enumerate(pool.refs):
        x = LEFT + STEP * block
        cached = block in pool.key_of
        colour = BLUE if refs else ORANGE if cached else GREY
        ids = " ".join(map(str, contents.get(block, ()))) if refs or cached else "-"
        p.box(x, 12, WIDTH, HEIGHT, f"block {block}", ids, colour, 13, dashed=not (refs or cached))
        p.text((x + WIDTH / 2, 84), held_by(block, tables), 12)
        p.text(
            (x + WIDTH / 2, 101),
            "cached" if cached else "no key",
            12,
            colour=INK if cached else GREY,
        )
    p.text((LEFT, 146), "free queue:", 13, "start", bold=True)
    for place, block in enumerate(pool.free):
        colour = ORANGE if block in pool.key_of else GREY
        p.box(120 + 58 * place, 128, 44, 36, str(block), colour=colour, size=14)
    if pool.free:
        p.text((120 + 58 * len(pool.free) + 4, 146), "the left one goes first", 12, "start", GREY)
    else:
        p.text((120, 146), "empty", 13, "start", GREY)
    return p.svg()


def play(
    pool: Pool,
    prompts: Mapping[str, Sequence[int]],
    enter: Callable[[Pool, Sequence[int]], list[int]],
    leave: Callable[[Pool, list[int]], None],
) -> tuple[list[str], list[list[int]], dict[str, list[int]]]:
    """STORY in blocks of 4 tokens: its frames, the free queue after each event, the last tables."""
    tables: dict[str, list[int]] = {}
    contents: dict[int, Sequence[int]] = {}
    frames, queues = [], []
    for event in STORY:
        name = event[1:]
        if event[0] == "+":
            tables[name] = enter(pool, prompts[name])
            for i, block in enumerate(tables[name]):
                contents[block] = prompts[name][i * 4 : (i + 1) * 4]
        else:
            leave(pool, tables.pop(name))
        frames.append(pool_frame(pool, tables, contents))
        queues.append([*pool.free])
    return frames, queues, tables


def held_by(block: int, tables: Mapping[str, Sequence[int]]) -> str:
    """How many tables a block stands in, and whose."""
    holders = [name for name, table in tables.items() if block in table]
    return f"refs {len(holders)}: {', '.join(holders)}" if holders else "refs 0: free"


def turns(prompts: Sequence[int], cached: Sequence[int]) -> Any:
    """Prompt tokens of each turn of the storyteller's chat: found in the cache, and computed."""
    machine = "the course's own model, on any machine"
    fig, axes = figure("Prompt tokens of a chat, turn by turn", machine, height=2.9)
    at = range(1, len(prompts) + 1)
    computed = [total - found for total, found in zip(prompts, cached, strict=True)]
    axes.bar(at, cached, color=SAVED, hatch="//", edgecolor="white", label="found in the cache")
    axes.bar(at, computed, bottom=cached, color=BAR, label="computed")
    for x, total, new in zip(at, prompts, computed, strict=True):
        axes.annotate(
            f"{new} of {total}", (x, total), (0, 3), textcoords="offset points", ha="center"
        )
    axes.set(xlabel="turn", ylabel="prompt tokens", ylim=(0, 1.18 * max(prompts)))
    axes.set_xticks(list(at))
    axes.legend(loc="upper left")
    return fig


def hit_rates(blocks: Sequence[int], rates: Sequence[float], needed: int) -> Any:
    """Share of prompt tokens found, against the cache's size; `needed`: where all of it fits."""
    fig, axes = figure("Prompt tokens found", "pure bookkeeping, on any machine", height=2.9)
    axes.plot(blocks, [100 * rate for rate in rates])
    axes.axvline(needed, color="#444444", linestyle="--", marker="")
    axes.annotate("all chats fit", (needed, 30), (6, 0), textcoords="offset points")
    axes.set(xlabel="blocks in the cache", ylabel="% of prompt tokens found", ylim=(-3, 103))
    return fig
