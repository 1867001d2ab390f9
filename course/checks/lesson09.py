"""Checks of lesson 09's exercises: a roofline, the learner's engine, a benchmark that lies."""

import io
import time
from contextlib import redirect_stdout
from typing import Any

from course.checks import CheckFailed, attempt, check, expect
from course.checks.core import plain
from course.checks.engines import check_answers, three_prompts
from course.checks.learner import own_pieces
from course.serving import ask, start_engine
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler
from nanovllm.layers.attention import store_kv

WEIGHTS, CACHE = 0.6 * 2, 128 * 1000 * 2 * 28 * 8 * 128 * 2 / 1e9  # GB


def near(name: str, given: Any, truth: float, wrong: list[tuple[float, str]], look: str) -> None:
    """As compare, within 1%."""
    expect(given is not None, f"Predict first: write your number in place of None, `{name} = ...`.")
    given = plain(given)
    is_number = isinstance(given, (int, float)) and not isinstance(given, bool)
    expect(is_number, f"{name} should be a number, got {given!r}.")
    if abs(given - truth) <= 0.01 * truth:
        return expect(True, name)
    hint = next((text for number, text in wrong if abs(given - number) <= 0.01 * number), look)
    raise CheckFailed(f"{name} is not {given}. {hint}")


@check
def check_roofline(
    read_gb: Any, step_ms: Any, tokens_per_second: Any, share: Any, rows: Any
) -> None:
    total = WEIGHTS + CACHE
    wrong = [
        (WEIGHTS, "Attention reads the keys and values of every request, too."),
        (WEIGHTS + CACHE / 2, "A token has a key and a value, of two bytes a number."),
        (128 * WEIGHTS + CACHE, "All rows share one reading of the weights: that is batching."),
        (WEIGHTS + CACHE / 128, "There are 128 requests, and each has its own keys and values."),
    ]
    near("read_gb", read_gb, total, wrong, "Weights once, and 128 * 1,000 tokens of the cache.")
    floor = total / 3.35
    wrong = [(WEIGHTS / 3.35, "That reads the weights alone."), (floor / 1e3, "In milliseconds.")]
    near("step_ms", step_ms, floor, wrong, "Bytes by bytes a second.")
    wrong = [(1e3 / floor, "A step gives one token to each of 128 requests.")]
    near("tokens_per_second", tokens_per_second, 128e3 / floor, wrong, "128 tokens a step.")
    wrong = [
        (7.1 / floor, "The floor is the best that is possible: the share is below 1."),
        (100 * floor / 7.1, "Between 0 and 1, not in percent."),
    ]
    near("share", share, floor / 7.1, wrong, "The time at least, by the time measured.")
    wrong = [(990 / 3.35 / 2, "A weight has two bytes, and a row costs it two FLOPs.")]
    near("rows", rows, 990 / 3.35, wrong, "Set rows * 2 * weights / FLOPs = 2 * weights / bytes.")


# -- the learner's engine ------------------------------------------------------------------------


class Blocks(BlockManager):
    """Stands for a learner's."""


class Prefixes(BlockManager):
    """Stands for a learner's."""


class Plans(Scheduler):
    """Stands for a learner's."""


@check
def check_my_engine(my_engine: Any) -> None:
    check_seams(my_engine)
    with redirect_stdout(io.StringIO()):  # the page has said already which are there
        pieces = own_pieces()
    expect(
        any(pieces.values()),
        "None of your pieces passes its check yet, so this would be the engine against itself. "
        "Solve one of 03·2, 04·2, 05·2, save that page, and come back.",
    )
    check_answers_of(my_engine, pieces)


def check_seams(my_engine: Any) -> None:
    stored: list[int] = []

    def store(key: Any, *rest: Any) -> None:
        stored.append(len(key))
        store_kv(key, *rest)

    every = {"my_blocks": Blocks, "my_prefix_cache": Prefixes, "my_scheduler": Plans}
    for missing in (None, *every, "all"):
        given: dict[str, Any] = {k: None if missing in (k, "all") else v for k, v in every.items()}
        given["my_store"] = None if missing == "all" else store
        stored.clear()
        engine = attempt(my_engine, given, block_size=8)
        where = f"With {'every piece' if missing is None else f'{missing} missing'}: "
        expect(hasattr(engine, "core"), f"{where}return the engine, not {engine!r}.")
        expect(
            engine.block_manager.block_size == 8,
            f"{where}the options do not reach the engine: a block size of 8 was asked for.",
        )
        for name in ("my_blocks", "my_prefix_cache"):
            if given[name]:
                expect(
                    isinstance(engine.block_manager, given[name]),
                    f"{where}{name} is not in the engine's block manager. Both count: `joined`.",
                )
        if given["my_scheduler"]:
            expect(
                isinstance(engine.core.scheduler, Plans),
                f"{where}the engine plans with its own scheduler, and my_scheduler was there.",
            )
        ask(engine, [[5, 6, 7]], count=2)
        expect(
            bool(stored) == bool(given["my_store"]),
            f"{where}my_store was {'not called' if given['my_store'] else 'called'}.",
        )


def check_answers_of(my_engine: Any, pieces: dict[str, Any]) -> None:
    engine = attempt(my_engine, pieces)
    kinds = {
        "block_manager_class": type(engine.block_manager),
        "scheduler_class": type(engine.core.scheduler),
    }
    check_answers(**kinds, store_kv=pieces["my_store"])


def race(my_engine: Any, pieces: dict[str, Any], rounds: int = 2) -> None:
    """Print tokens a second of both engines, by turns; raise unless their tokens are the same."""
    try:
        engines = {"finished": start_engine(), "yours": my_engine(pieces)}
    except NotImplementedError:
        print("my_engine is still to be written.")
        return
    own = [name for name, piece in pieces.items() if piece]
    print("yours has your own:", ", ".join(own) or "nothing; the engine races itself")
    prompts, count = three_prompts(), 32
    for engine in engines.values():  # warm, with a prompt that nobody finds in the prefix cache
        ask(engine, [[5, 6, 7]], count=8)
    for number in range(rounds):
        told = {}
        for name, engine in engines.items():
            start = time.perf_counter()
            told[name] = [seq.output_ids for seq in ask(engine, prompts, count)]
            seconds = time.perf_counter() - start
            speed = sum(map(len, told[name])) / seconds
            print(f"round {number + 1}, {name:8} {speed:6,.0f} tok/s")
        if told["yours"] != told["finished"]:
            raise CheckFailed("Your engine tells other stories than the finished one.")


# -- a benchmark that lies -----------------------------------------------------------------------


class PaperEngine:
    """100 tokens a second, 5 s of compiling at first.

    `lost` tokens of its last answer are lost, or `astray`, in the first answer.
    """

    def __init__(self, lost: int = 0, astray: bool = False):
        self.now, self.done, self.warm = 0.0, 0.0, False
        self.lost, self.astray = lost, astray

    def clock(self) -> float:
        return self.now

    def generate(self, prompts: list[list[int]], count: int) -> list[list[int]]:
        self.now += 0.125 + (0 if self.warm else 5)
        self.warm = True
        answers = [[9] * count for _ in prompts]
        lost = min(self.lost, count)
        answers[-1] = answers[-1][lost:]
        answers[0] += [9] * lost if self.astray else []
        start = max(self.now, self.done)
        self.done = start + len(prompts) * count / 100 - 0.125
        return answers

    def synchronize(self) -> None:
        self.now = max(self.now, self.done)


PROMPTS, COUNT = [[1] * 30, [1] * 50, [1] * 20], 100


def tell_the_benchmark(benchmark: Any) -> None:
    """Print what it says of a fresh engine, and of one that has compiled already."""
    for name, warm in (("fresh", False), ("used before", True)):
        engine = PaperEngine()
        engine.warm = warm
        print(f"{name}: {benchmark(engine, PROMPTS, COUNT):,.1f} tok/s; it is 100")


@check
def check_benchmark(benchmark: Any) -> None:
    got = attempt(benchmark, PaperEngine(), PROMPTS, COUNT)
    longer = attempt(benchmark, PaperEngine(), [[1] * 500] * 3, COUNT)
    says = f"It says {got!r} tok/s, and 100 is right. "
    expect(isinstance(got, (int, float)), f"A number is wanted, got {got!r}.")
    expect(
        abs(got - longer) < 0.01,
        f"{says}With prompts of 500 tokens it says {longer:,.1f}: it counts prompts. They are "
        "read, not written.",
    )
    warm = PaperEngine()
    warm.warm = True
    second = attempt(benchmark, warm, PROMPTS, COUNT)
    expect(
        abs(got - second) < 0.01,
        f"{says}Of an engine used before, {second:,.1f}. Compiling is in the time: run once before "
        "the clock starts.",
    )
    expect(
        got <= 101,
        f"{says}No GPU is that fast: the clock stops when all is launched, and nothing is done. "
        "Wait for the GPU first.",
    )
    expect(
        got >= 99,
        f"{says}The GPU was busy with the warm-up when the clock started: wait for it before, too.",
    )
    for lost, astray in ((1, False), (40, False), (40, True)):
        check_refused(benchmark, lost, astray)


def check_refused(benchmark: Any, lost: int, astray: bool) -> None:
    try:
        told = benchmark(PaperEngine(lost, astray), PROMPTS, COUNT)
    except ValueError:
        return expect(True, "short answers are refused")
    except Exception as error:
        raise CheckFailed(
            "A short answer is to be a ValueError; yours raises " + type(error).__name__
        ) from error
    told = f"{told:,.1f} tok/s" if isinstance(told, (int, float)) else repr(told)
    if astray:
        raise CheckFailed(
            f"A request lost {lost} of its tokens to another one, and it says {told}: the sum is "
            "as it should be. Look at each answer's length."
        )
    raise CheckFailed(
        f"A request lost {lost} of its tokens, and it says {told}. An engine that delivers less is "
        "not measured: raise ValueError unless each got `count` tokens."
    )
