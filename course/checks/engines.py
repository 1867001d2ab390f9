"""A learner's classes inside the real engine, beside the engine's own; and what they are fed."""

from collections.abc import Sequence as Many
from functools import cache
from typing import Any

from course.checks import attempt, expect
from course.serving import ask, start_engine
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams

TEXTS = (
    "Once upon a time there was a fox who found a small golden key under an old oak tree. One",
    "A robot lived by the sea. Every",
    "The little mouse was hungry, so she went to the kitchen and",
)


def sequence(prompt: int | Many[int], max_length: int = 64) -> Sequence:
    """A request as the engine holds it, of so many equal tokens or of these."""
    ids = [7] * prompt if isinstance(prompt, int) else list(prompt)
    return Sequence("some id", None, ids, SamplingParams(), max_length=max_length)


def check_base(kind: Any, base: type, name: str) -> None:
    """Before anything is made of it: else it fails in a line that is not the learner's."""
    expect(
        isinstance(kind, type) and issubclass(kind, base),
        f"{name} no longer inherits from {base.__name__}: class {name}({base.__name__}).",
    )


@cache
def _prompts() -> tuple[tuple[int, ...], ...]:
    tokenizer = start_engine().get_tokenizer()
    return tuple(tuple(tokenizer(text).input_ids) for text in TEXTS)


def three_prompts() -> list[list[int]]:
    """Beginnings of stories, of different lengths, as token ids."""
    return [list(ids) for ids in _prompts()]


def answers_of(options: dict[str, Any]) -> tuple[list[list[int]], Any]:
    """20 tokens for each prompt in a small cache, all at once and then again; and the engine."""
    cramped = {"block_size": 4, "num_gpu_blocks_override": 24, "max_model_len": 64}
    engine = start_engine(**cramped | options)
    seqs = [*ask(engine, three_prompts(), count=20), *ask(engine, three_prompts(), count=20)]
    return [seq.output_ids for seq in seqs], engine


@cache
def right_answers() -> list[list[int]]:
    return answers_of({})[0]


def check_answers(**options: Any) -> None:
    """Expect the engine's own tokens with a learner's classes, and all blocks back at the end."""
    right = right_answers()
    answers, engine = attempt(answers_of, options)
    expect(
        answers == right,
        "By itself your class does what was asked, but inside the engine the stories are others.",
    )
    manager = engine.block_manager
    expect(
        manager.num_free_blocks == manager.num_blocks,
        f"All requests are done, and {manager.num_blocks - manager.num_free_blocks} blocks are "
        "still "
        "not free.",
    )
