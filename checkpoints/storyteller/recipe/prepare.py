"""Stories in, rows of tokens out: drop what is there twice or is rare, then chats, tokenizer, rows.

One in fifty pairs of character and thing is held out: no story with that pair is trained on.
"""

import json
import os
import random
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.storyteller.recipe.chats import ASKS, BEYOND, CANNOT, QUESTIONS, Story, documents
from checkpoints.storyteller.recipe.filters import words_of
from checkpoints.storyteller.recipe.grid import is_held_out
from checkpoints.storyteller.recipe.pack import encode, pack
from checkpoints.storyteller.recipe.tokenizer import save_tokenizer, train_tokenizer
from course.models.storyteller import LONG_SYSTEM
from course.processes import spawned_safely

LENGTH = 1024  # tokens a row, and the model's context
RARE = (4, 20_000)  # a rare word is in fewer than 4 stories, or in fewer than one of 20,000
TOKENIZER_STORIES = 50_000  # to learn the vocabulary from
TASK = 10_000  # stories packed at once
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
    return {
        name: Rows(*(np.load(data / f"{name}_{array}.npy") for array in ("tokens", "learn")))
        for name in FILES
    }


def _make(folder: Path, data: Path, copies: int, seed: int) -> dict[str, Any]:
    start = time.perf_counter()
    written = read_stories(folder)
    stories = without_rare_words(without_copies(written))
    held_out, train = split(stories)
    extra = [*ASKS, *CANNOT, *BEYOND, *LONG_SYSTEM, *(text for pair in QUESTIONS for text in pair)]
    sample = random.Random(seed).sample(train, min(len(train), TOKENIZER_STORIES))
    tokenizer = train_tokenizer([story["text"] for story in sample] + extra * 20)
    save_tokenizer(tokenizer, data / "tokenizer", LENGTH)
    report: dict[str, Any] = {
        "written": len(written),
        "kept": len(stories),
        "held_out": len(held_out),
        "story_tokens": 0,
    }
    for name, part, times in (("train", train, copies), ("held_out", held_out, 1)):
        rows, story_tokens = make_rows(part, times, seed, data / "tokenizer" / "tokenizer.json")
        np.save(data / f"{name}_tokens.npy", rows.tokens)
        np.save(data / f"{name}_learn.npy", rows.learn)
        report["story_tokens"] += story_tokens
        report[f"{name}_rows"] = len(rows.tokens)
        report[f"{name}_tokens_learned"] = int(rows.learn.sum())
    report["seconds"] = time.perf_counter() - start
    return report


def make_rows(stories: list[Story], copies: int, seed: int, tokenizer: Path) -> tuple[Rows, int]:
    """Rows in which every story is told `copies` times; and the tokens of the stories alone.

    A copy of 10,000 stories is a task of its own, and several processes share the tasks: the rows
    are the same however many there are.
    """
    tasks = [
        (stories[at : at + TASK], f"{seed}/{copy}/{at}", str(tokenizer), copy == 0)
        for copy in range(copies)
        for at in range(0, len(stories), TASK)
    ]
    if len(tasks) < 3:
        parts = [make_part(*task) for task in tasks]
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
        workers = min(16, cores, len(tasks))
        with spawned_safely(), ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            parts = list(pool.map(make_part, *zip(*tasks, strict=True)))
    tokens, learn, counts = zip(*parts, strict=True)
    return Rows(np.concatenate(tokens), np.concatenate(learn)), sum(counts)


def make_part(
    stories: list[Story], seed: str, tokenizer_file: str, count: bool
) -> tuple[np.ndarray, np.ndarray, int]:
    """The rows of one telling of some stories; and, if asked, the tokens of the stories alone."""
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are parallel already
    tokenizer = Tokenizer.from_file(tokenizer_file)
    tokens, learn = pack(encode(documents(stories, 1, seed), tokenizer), LENGTH)
    texts = [story["text"] for story in stories] if count else []
    return tokens, learn, sum(len(e.ids) for e in tokenizer.encode_batch_fast(texts))


def split(stories: list[Story]) -> tuple[list[Story], list[Story]]:
    """Stories held out, and stories to train on; of a handful, the first is held out."""
    held_out = [s for s in stories if is_held_out(s["character"], s["thing"])]
    train = [s for s in stories if not is_held_out(s["character"], s["thing"])]
    return (held_out, train) if held_out and train else (stories[:1], stories[1:] or stories)


def read_stories(folder: Path) -> list[Story]:
    """Every story of every shard, in order."""
    files = sorted((folder / "stories").glob("*.jsonl"))
    stories = [json.loads(line) for file in files for line in file.open(encoding="utf-8")]
    if not stories:
        raise SystemExit(
            f"no stories in {folder}: run checkpoints.storyteller.recipe.generate first"
        )
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
    # Only what the model wrote: the words of the outlines are everywhere.
    words = [set(words_of(" ".join(story["written"]))) for story in stories]
    seen = Counter(word for found in words for word in found)
    least = max(RARE[0], len(stories) // RARE[1])
    rare = {word for word, times in seen.items() if times < least}
    return [s for s, found in zip(stories, words, strict=True) if not found & rare]
