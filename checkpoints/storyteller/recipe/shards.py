"""Shards: files of stories, each written when it is whole, and what they took together.

FOLDER/stories/00007.jsonl holds the kept stories of shard 7, 00007.json what they cost. A shard is
made from its number alone, so it does not matter which process writes it, or when.
"""

import json
import os
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from checkpoints.storyteller.recipe.outline import draw_plan
from checkpoints.storyteller.recipe.writer import Draft, write_stories


def shard_file(folder: Path, index: int) -> Path:
    return folder / "stories" / f"{index:05d}.jsonl"


def write_shard(llm: Any, folder: Path, index: int, size: int, seed: int) -> dict[str, Any]:
    """Write one shard's stories and what they cost; the stories appear when they are whole."""
    began, start = time.time(), time.perf_counter()
    plans = [draw_plan(number, seed) for number in range(index * size, (index + 1) * size)]
    drafts, counts = write_stories(llm, plans, seed)
    kept = [draft for draft in drafts if draft.alive]
    cost = {
        "drawn": len(drafts),
        "kept": len(kept),
        "kept_words": sum(len(draft.text.split()) for draft in kept),
        "began": began,
        "seconds": time.perf_counter() - start,
        **dict(sorted(counts.items())),
    }
    file = shard_file(folder, index)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file.with_suffix(".json"), json.dumps(cost, indent=2) + "\n")
    lines = [json.dumps(as_record(draft), ensure_ascii=False) + "\n" for draft in kept]
    write_whole(file, "".join(lines))
    return cost


def write_whole(file: Path, text: str) -> None:
    """Write beside the file, then rename: a cut never leaves half of one."""
    scratch = file.with_name(f"{file.name}.{os.getpid()}.part")
    scratch.write_text(text, encoding="utf-8")
    scratch.rename(file)


def as_record(draft: Draft) -> dict[str, Any]:
    """A story as its line in a shard: its plan without the beats, its text, what was written."""
    plan = asdict(draft.plan)
    del plan["beats"]
    return {**plan, "text": draft.text, "written": draft.written}


def add_up(folder: Path) -> dict[str, Any]:
    """What all whole shards took together. `seconds` is time in which at least one was written."""
    total: Counter[str] = Counter()
    spans = []
    for file in sorted((folder / "stories").glob("*.jsonl")):
        cost = json.loads(file.with_suffix(".json").read_text())
        spans.append((cost.pop("began"), cost.pop("seconds")))
        total.update(cost)
    seconds = covered(spans)
    rates = {
        f"{name}_per_second": total[name] / max(seconds, 1e-9)
        for name in ("generated_tokens", "requests", "kept")
    }
    return {"shards": len(spans), "drawn": 0, "kept": 0, "seconds": seconds, **total, **rates}


def covered(spans: list[tuple[float, float]]) -> float:
    """Seconds covered by spans of (begin, length), which may overlap."""
    end, seconds = float("-inf"), 0.0
    for begin, length in sorted(spans):
        seconds += max(0.0, begin + length - max(begin, end))
        end = max(end, begin + length)
    return seconds
