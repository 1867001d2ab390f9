"""Stories in, rows of tokens out: drop what is there twice or is rare, then chats, tokenizer, rows.

A story in a hundred is held out, by its number: nothing of it is trained on.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from course.checkpoint.chats import ASKS, BEYOND, LONG_SYSTEM, QUESTIONS, Story, documents
from course.checkpoint.filters import words_of
from course.checkpoint.pack import encode, pack
from course.checkpoint.tokenizer import save_tokenizer, train_tokenizer

LENGTH = 1024  # tokens a row, and the model's context
HELD_OUT_EVERY = 100
RARE = 4  # a word in fewer stories than this is rare, where there are thousands of them
FILES = ("train", "held_out")


@dataclass(frozen=True)
class Rows:
    """tokens [n, LENGTH] uint16; learn [n, LENGTH] bool, the tokens whose prediction counts."""

    tokens: np.ndarray
    learn: np.ndarray


def prepare(folder: Path, copies: int, seed: int = 0) -> dict[str, Rows]:
    """Rows to train on and rows held out; made on the first call, read on the next ones."""
    data = folder / "data"
    if not (data / "report.json").exists():
        data.mkdir(parents=True, exist_ok=True)
        report = _make(folder, data, copies, seed)
        (data / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return {name: Rows(**np.load(data / f"{name}.npz")) for name in FILES}


def _make(folder: Path, data: Path, copies: int, seed: int) -> dict[str, int]:
    written = read_stories(folder)
    stories = without_rare_words(without_copies(written))
    held_out = [s for s in stories if s["number"] % HELD_OUT_EVERY == 0] or stories[:1]
    train = [s for s in stories if s["number"] % HELD_OUT_EVERY]
    extra = [*ASKS, *BEYOND, *LONG_SYSTEM, *(text for pair in QUESTIONS for text in pair)]
    tokenizer = train_tokenizer([story["text"] for story in train] + extra * 20)
    save_tokenizer(tokenizer, data / "tokenizer", LENGTH)
    report = {"written": len(written), "kept": len(stories), "held_out": len(held_out)}
    report["story_tokens"] = sum(
        len(e.ids) for e in tokenizer.encode_batch([story["text"] for story in stories])
    )
    for name, part, times in (("train", train, copies), ("held_out", held_out, 1)):
        tokens, learn = pack(encode(documents(part, times, seed), tokenizer), LENGTH)
        np.savez(data / f"{name}.npz", tokens=tokens, learn=learn)
        report[f"{name}_rows"] = len(tokens)
        report[f"{name}_tokens_learned"] = int(learn.sum())
    return report


def read_stories(folder: Path) -> list[Story]:
    """Every story of every shard, in order."""
    files = sorted((folder / "stories").glob("*.jsonl"))
    stories = [json.loads(line) for file in files for line in file.open(encoding="utf-8")]
    if not stories:
        raise SystemExit(f"no stories in {folder}: run course.checkpoint.generate first")
    return stories


def without_copies(stories: list[Story]) -> list[Story]:
    """Of stories in which the model wrote the same, the first."""
    found: dict[tuple[str, ...], Story] = {}
    for story in stories:
        found.setdefault((story["tone"], *(end.lower() for end in story["written"])), story)
    return list(found.values())


def without_rare_words(stories: list[Story]) -> list[Story]:
    """Stories made of words that others use as well; a small model has no room for the others."""
    if len(stories) < 1000:
        return stories
    seen = Counter(word for story in stories for word in set(words_of(story["text"])))
    return [s for s in stories if all(seen[word] >= RARE for word in words_of(s["text"]))]
