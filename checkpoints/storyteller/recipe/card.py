"""Judge a trained model through this engine, and write its model card.

The numbers are of stories nobody picked: requests drawn from the grid, answered once, and judged
by rules (filters.py) that look at form and topic, not at sense. Ten answers at temperature 0 and
ten at 0.7 stand in the card in full, so that readers can judge sense themselves.
"""

import random
from collections import Counter
from pathlib import Path
from typing import Any

from checkpoints.storyteller.recipe import grid
from checkpoints.storyteller.recipe.filters import story_problem, tone_of
from checkpoints.storyteller.recipe.outline import with_article

SAMPLES: list[tuple[str | None, str]] = [  # (system prompt, request)
    (None, "Tell me a story about a fox who finds a key."),
    (None, "Tell me a story about a robot who finds a feather."),
    (None, "Write a short story about an owl and a lantern."),
    (None, "Tell me a story about a king who finds a cookie in the snow."),
    ("You tell happy stories.", "Tell me a story about a bear who finds a drum."),
    ("You tell sad stories.", "Tell me a story about a bear who finds a drum."),
    ("You tell funny stories.", "Tell me a story about a bear who finds a drum."),
    ("Your stories are sad.", "Can you tell me a story about a girl who finds a boat?"),
    (None, "Tell me a funny story about a duck who finds an umbrella."),
    (None, "What is the capital of France?"),
]
TEMPERATURES = (0.0, 0.7)


def judge(model: Path, count: int) -> dict[str, Any]:
    """Sample the model: `count` stories on topics of the grid, a third for each tone; and SAMPLES.

    Gives the share of stories with each problem, for each tone what their words speak for, and the
    texts of the samples at each temperature.
    """
    from nanovllm import LLM

    with LLM(model, max_model_len=1024, use_tqdm_on_load=False) as llm:
        judged = judge_stories(llm, count)
        samples = {str(t): answer(llm, SAMPLES, t) for t in TEMPERATURES}
    return {**judged, "samples": samples}


def judge_stories(llm: Any, count: int) -> dict[str, Any]:
    """Shares, from 0 to 1, of `count` stories at temperature 0.7; their tone is asked for."""
    rng = random.Random(1)
    pairs = [(c, t) for c in grid.CHARACTERS for t in grid.THINGS]
    unseen = [pair for pair in pairs if grid.is_held_out(*pair)]
    topics = [rng.choice(unseen if i % 2 else pairs) for i in range(count)]
    tones = [grid.TONES[i % len(grid.TONES)] for i in range(count)]
    asked = [
        (
            f"You tell {tone} stories.",
            f"Tell me a story about {with_article(character)} who finds {with_article(thing)}.",
        )
        for tone, (character, thing) in zip(tones, topics, strict=True)
    ]
    answers = answer(llm, asked, 0.7)
    found = [
        story_problem(answer["text"], *topic, answer["ended"]) or "none"
        for topic, answer in zip(topics, answers, strict=True)
    ]
    problems = Counter(found)
    new = [p for p, topic in zip(found, topics, strict=True) if grid.is_held_out(*topic)]
    heard: dict[str, Counter] = {tone: Counter() for tone in grid.TONES}
    for tone, given in zip(tones, answers, strict=True):
        heard[tone][tone_of(given["text"]) or "neither"] += 1
    return {
        "stories": count,
        "good_on_unseen_pairs": new.count("none") / max(1, len(new)),
        "problems": {name: number / count for name, number in problems.most_common()},
        "tone_heard": {
            tone: {name: number / sum(found.values()) for name, number in found.items()}
            for tone, found in heard.items()
        },
    }


def answer(llm: Any, asked: list[tuple[str | None, str]], temperature: float) -> list[dict]:
    """Each request's answer: its text, and whether it ended by itself within 300 tokens."""
    from nanovllm import SamplingParams

    params = [
        SamplingParams(temperature=temperature, max_tokens=300, seed=i) for i in range(len(asked))
    ]
    outputs = llm.chat([as_messages(*request) for request in asked], params, use_tqdm=False)
    return [
        {"text": o.outputs[0].text, "ended": o.outputs[0].finish_reason == "stop"} for o in outputs
    ]


def as_messages(system: str | None, request: str) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": request}]


# -- the card ------------------------------------------------------------------------------------

CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# A small storyteller

A Qwen3 model of {parameters:.2f} million parameters ({megabytes:.1f} MB in bfloat16) that tells
very short stories in simple English. It was trained from nothing for a course on how the inference
of language models works, so that anybody can run a real model in seconds without a GPU. It is no
use for anything else.

- **Architecture**: {layers} layers, hidden size {hidden}, {heads} query heads and {kv_heads} key
  and value heads of {dim}, q/k-norm, tied embeddings, a byte-level BPE of {vocab:,} tokens, a
  context of {length:,} tokens. Chat format and chat tokens are Qwen3's.
- **Data**: {kept:,} stories, {story_tokens:,} tokens, and the chats made from them. Their outlines
  (who, what, where, the beginnings of the sentences, the last sentence) are drawn from a grid in
  `recipe/`; the rest of each sentence was written by SmolLM2-135M-Instruct (Apache-2.0)
  through this course's engine, and filtered by rules.
- **Recipe**: {tokens:,} tokens seen in {steps:,} steps of {batch} rows of {length:,}, AdamW,
  learning rate {rate:g}, {seconds:.0f} s on {machine}. Two commands, `python -m
  checkpoints.storyteller.recipe.generate` and `python -m checkpoints.storyteller.recipe.train`,
  make it again.
- **Licence**: Apache-2.0.

## What is measured

Held-out loss: {loss:.3f} nats a token of the model's own turns, over {held_out:,} stories. One in
fifty pairs of character and thing is held out: no story with it was trained on. By position in the
row of {length:,} tokens:

| positions | loss |
|---|--:|
{positions}

{stories} stories on topics of the grid at temperature 0.7, judged by rules: ended by itself, 40 to
160 words, names the character and the thing asked for, no sentence twice. Without a problem:
{good:.0%}; of those about a pair that was held out, {unseen:.0%}.{problems}
The rules do not see whether a story makes sense; the samples show that.

The system prompt named a tone. What the stories' words speak for:

| asked for | happy words prevail | sad words prevail | neither |
|---|--:|--:|--:|
{tones}

## Limits

It knows the characters and things of its grid, and little else; its stories are built alike, and
what happens in them often does not follow. It answers most other questions by saying that it only
tells stories, and some by telling one. It has not been tested for safety.

## Samples

Nobody picked these.
{samples}
"""


def write_card(folder: Path, record: dict[str, Any]) -> None:
    """Write FOLDER/model/README.md from the training's record and the model's own files."""
    import json

    config = json.loads((folder / "model" / "config.json").read_text())
    size = (folder / "model" / "model.safetensors").stat().st_size
    judged, data, recipe = record["judged"], record["data"], record["recipe"]
    losses = record["held_out_loss"]
    faults = {name: share for name, share in judged["problems"].items() if name != "none"}
    listed = ", ".join(f"{name} {share:.0%}" for name, share in faults.items())
    card = CARD.format(
        parameters=record["parameters"] / 1e6,
        megabytes=size / 1e6,
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        dim=config["head_dim"],
        vocab=config["vocab_size"],
        length=config["max_position_embeddings"],
        kept=data["kept"],
        story_tokens=data["story_tokens"],
        tokens=record["steps_done"] * recipe["batch"] * config["max_position_embeddings"],
        steps=record["steps_done"],
        batch=recipe["batch"],
        rate=recipe["learning_rate"],
        seconds=record["seconds"],
        machine=record["machine"],
        loss=losses["all"],
        held_out=data["held_out"],
        positions="\n".join(f"| {k} | {v:.3f} |" for k, v in losses.items() if k != "all"),
        stories=judged["stories"],
        unseen=judged["good_on_unseen_pairs"],
        good=judged["problems"].get("none", 0.0),
        problems=f" Problems: {listed}." if listed else "",
        tones="\n".join(tone_row(t, heard) for t, heard in judged["tone_heard"].items()),
        samples="\n".join(sample_lines(judged["samples"])),
    )
    (folder / "model" / "README.md").write_text(card, encoding="utf-8")


def tone_row(tone: str, heard: dict[str, float]) -> str:
    return f"| {tone} |" + "".join(f" {heard.get(h, 0):.0%} |" for h in ("happy", "sad", "neither"))


def sample_lines(samples: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The samples as Markdown, request by request."""
    lines = []
    for temperature, answers in samples.items():
        lines.append(f"\n### Temperature {temperature}\n")
        for (system, request), given in zip(SAMPLES, answers, strict=True):
            told = f"System: {system} " if system else ""
            text = " ".join(given["text"].split())
            lines.append(f"**{told}User: {request}**\n")
            lines.append(f"> {text}{'' if given['ended'] else ' (cut at 300 tokens)'}\n")
    return lines
