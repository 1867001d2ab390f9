"""What lesson 04's planted bugs do in the engine: for its notebook and its checks."""

from typing import Any

from course.checks.learner import manager_with, scheduler_with
from course.serving import ask, start_engine
from nanovllm.engine.sequence import Sequence

RULES = "Use short sentences and simple words. A story has a beginning, a middle and an end."


def questions() -> tuple[list[int], list[int], list[int]]:
    """The fox's, the dragon's, and the dragon's up to the animal, in whole blocks of 4."""
    tokenizer = start_engine().get_tokenizer()
    texts = (f"Tell me a story about a {a} who finds a key. {RULES}" for a in ("fox", "dragon"))
    fox, dragon = (
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in texts
    )
    differ = next(i for i, (a, b) in enumerate(zip(fox, dragon, strict=True)) if a != b)
    return fox, dragon, dragon[: 4 * (differ // 4 + 1)]


def dragons(block_keys: Any) -> tuple[Sequence, Sequence]:
    """The dragon's question after the other two, and at an empty cache."""
    fox, dragon, beginning = questions()
    engine = start_engine(manager_with(block_keys), block_size=4)
    for prompt in (beginning, fox):
        ask(engine, [prompt])
    [after] = ask(engine, [dragon], count=26)
    [alone] = ask(start_engine(block_size=4), [dragon], count=26)
    return after, alone


def ask_about_the_dragon(block_keys: Any) -> None:
    after, alone = dragons(block_keys)
    print(f"found {after.metrics.num_cached_tokens} tokens: {after.detokenizer.text!r}")
    print(f"empty cache:     {alone.detokenizer.text!r}")


def second_time(first_to_compute: Any) -> tuple[Sequence, tuple[int, int]]:
    """A prompt of two blocks of 16, asked again; (first position, tokens) it computed."""
    engine = start_engine(scheduler_class=scheduler_with(first_to_compute))
    for _ in range(2):
        [seq] = ask(engine, [list(range(100, 132))], count=4)
    rows = next(record.rows for record in engine.trace if record.rows[0][0] == seq.request_id)
    return seq, rows[0][1:]


def ask_twice(first_to_compute: Any) -> None:
    try:
        seq, (start, count) = second_time(first_to_compute)
        print(f"the second time: {count} token from position {start}, answer {seq.output_ids}")
    except (IndexError, RuntimeError, ValueError) as error:
        print(f"the second time: the engine stops with {type(error).__name__}: {error}")
