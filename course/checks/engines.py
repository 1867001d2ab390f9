"""A learner's classes inside the real engine, beside the engine's own; and what they are fed."""

from collections.abc import Sequence as Many
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Ending:
    """A request, and how it ends: at `count` tokens, at a stop id, or because it is aborted."""

    prompt: int  # index into three_prompts()
    count: int = 20
    stop_at: int | None = None  # the token that the engine's own answer has here is a stop id
    abort_at: int | None = None  # the request is aborted when it has so many tokens

    @property
    def name(self) -> str:
        ends = f"a stop id ends at token {self.stop_at}" if self.stop_at is not None else ""
        ends = f"is aborted after {self.abort_at} tokens" if self.abort_at is not None else ends
        return f"story {self.prompt + 1}, which {ends or f'ends after {self.count} tokens'}"

    @property
    def stop_ids(self) -> list[int]:
        return [] if self.stop_at is None else [right_answers()[self.prompt][self.stop_at]]

    def right_answer(self) -> list[int]:
        """The beginning of the engine's own answer that this request should get."""
        answer = right_answers()[self.prompt][: self.abort_at or self.count]
        found = (i + 1 for i, token_id in enumerate(answer) if token_id in self.stop_ids)
        return answer[: next(found, len(answer))]


# Neighbours end at different times, and some end while their next token is already in flight. A
# stop id or an abort does that: the scheduler sees the end of `count` tokens coming.
ENDINGS = (
    Ending(0, stop_at=3),
    Ending(1),
    Ending(2, abort_at=5),
    Ending(1, stop_at=6),
    Ending(0, count=2),
    Ending(2, count=17),
    Ending(0, abort_at=9),
    Ending(2, stop_at=11),
    Ending(1, count=9),
)
BLOCK_SIZES = (1, 4, 16)


def endings_of(options: dict[str, Any]) -> tuple[list[list[int]], Any]:
    """Run all ENDINGS together; each request's answer, and the engine."""
    engine, prompts = start_engine(**options), three_prompts()
    seqs = []
    for number, end in enumerate(ENDINGS):
        params = SamplingParams(
            temperature=0, max_tokens=end.count, ignore_eos=True, stop_token_ids=end.stop_ids
        )
        request = engine.make_request(str(number), prompts[end.prompt], params)
        seqs += engine.add([request])
    while engine.has_unfinished_requests():
        engine.advance()
        for end, seq in zip(ENDINGS, seqs, strict=True):
            if end.abort_at == len(seq.output_ids):
                engine.abort_request(seq.request_id)
    return [seq.output_ids for seq in seqs], engine


def check_answers(**options: Any) -> None:
    """Expect the engine's own tokens with a learner's classes, and all blocks back at the end."""
    answers, engine = attempt(answers_of, options)
    expect(
        answers == right_answers(),
        "By itself your class does what was asked, but inside the engine the stories are others.",
    )
    expect_all_free(engine.block_manager, "")
    check_endings(**options | {"store_kv": None})  # a store was compared above, and may be slow


def check_endings(**options: Any) -> None:
    """As check_answers, in both loops, with requests that end at different times.

    The cache has room for 128 tokens, whatever the block size.
    """
    right = [end.right_answer() for end in ENDINGS]
    for block_size in BLOCK_SIZES:
        for overlapped in (False, True):
            loop = {"block_size": block_size, "async_scheduling": overlapped}
            cache_size = {"num_gpu_blocks_override": 128 // block_size, "max_model_len": 64}
            answers, engine = attempt(endings_of, options | loop | cache_size)
            where = f"In the {'overlapped' if overlapped else 'plain'} loop, with blocks of "
            where += f"{block_size}"
            wrong = [e.name for e, a, b in zip(ENDINGS, answers, right, strict=True) if a != b]
            expect(
                not wrong,
                f"{where}, requests that end at different times get other tokens than from the "
                f"engine's own classes. The first is {wrong[0] if wrong else ''}.",
            )
            expect_all_free(engine.block_manager, f"{where}: ")


def expect_all_free(manager: Any, where: str) -> None:
    taken = manager.num_blocks - manager.num_free_blocks
    expect(taken == 0, f"{where}All requests are done, and {taken} blocks are still not free.")
