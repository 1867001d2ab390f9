"""Checks of lesson 07's exercises: launches and padding, a captured step, sizes to capture."""

from typing import Any

import torch
from torch import Tensor

from course.checks import CheckFailed, attempt, check, compare, expect
from course.models.choice import has_gpu
from course.models.toy_decoder import LONGEST, ToyDecoder, padding


@check
def check_launches_and_padding(
    eager_us: Any, replayed_us: Any, padded: Any, overlapped_ms: Any
) -> None:
    wrong = {
        200 * 35: "The host does not wait for a kernel: it launches the next one meanwhile.",
        200 * 5: "The kernels alone take that; each waits until it is launched.",
        200 * 30: "That is when the last one is launched. It has to run, too.",
        200 * 5 + 30: "The device is faster than the host here: after each kernel it waits.",
    }
    compare("eager_us", eager_us, 200 * 30 + 5, wrong, "The last launch, and then its kernel.")
    wrong = {
        200 * 25: "One replay launches all 200: its 20 µs are paid once.",
        200 * 5: "The replay itself takes the host 20 µs, before the first kernel can run.",
        20 + 5: "All 200 kernels still run, one after the other: a graph makes none faster.",
        200 * 20 + 5: "One replay launches all 200 kernels.",
    }
    look = "One launch of 20 µs, then 200 kernels without a gap."
    compare("replayed_us", replayed_us, 20 + 200 * 5, wrong, look)
    wrong = {
        1: "16 rows cannot hold a batch of 17: take the smallest size that holds it.",
        15: "32 holds it, but a smaller size does, too.",
        24: "That is the size it runs with. How many of these rows are padding?",
        0: "No step is captured for 17 rows.",
    }
    compare("padded", padded, padding([1, 2, 4, 8, 16, 24, 32], 17), wrong, "24 rows, 17 in use.")
    wrong = {
        50 * 8: "That is the plain loop, in which device and host wait for each other.",
        50 * 6: "The first step's plan hides behind nothing: no step runs yet.",
        50 * 2: "The longer of the two counts: planning hides behind running.",
        50 * 2 + 6: "The longer of the two counts: planning hides behind running.",
    }
    look = "The first plan, then 50 runs without a gap."
    compare("overlapped_ms", overlapped_ms, 2 + 50 * 6, wrong, look)


# -- a captured step -----------------------------------------------------------------------------

SIZES = [1, 2, 4, 8]


def batch(n: int, begin: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """n rows' ids and positions: [n] int64 each."""
    rows = torch.arange(n, device=device)
    return 3 + 7 * rows + begin, begin + 0 * rows


def eagerly(model: ToyDecoder, ids: Tensor, positions: Tensor, count: int) -> list[list[int]]:
    """`count` tokens a row, without buffers and without a recording."""
    tokens = []
    for _ in range(count):
        ids, positions = model(ids, positions), positions + 1
        tokens.append(ids.tolist())
    return tokens


class Watched:
    """A learner's captured decoder beside an eager one; both have the same model."""

    def __init__(self, kind: Any):
        self.device = torch.device("cuda" if has_gpu() else "cpu")
        self.model, self.twin = (ToyDecoder(max(SIZES), self.device) for _ in range(2))
        self.mine = attempt(kind, self.model, SIZES, self.device)
        self.replayed: list[int] = []
        recordings = getattr(self.mine, "recordings", {})
        expect(
            sorted(recordings) == SIZES,
            f"self.recordings should hold one recording for each of the sizes {SIZES}; it has "
            f"{sorted(recordings)}.",
        )
        for name in ("ids", "positions"):
            buffer = getattr(self.mine, name, None)
            expect(
                buffer is None or buffer.shape == (max(SIZES),),
                f"self.{name} is no longer the buffer of {max(SIZES)} rows: an assignment gave its "
                "name to another tensor. Write into it, with copy_ or [:size] =.",
            )
        for size, recording in recordings.items():
            self.watch(size, recording)

    def watch(self, size: int, recording: Any) -> None:
        replay = recording.replay

        def noted() -> None:
            self.replayed.append(size)
            replay()

        recording.replay = noted

    def run(self, n: int, begin: int, count: int) -> tuple[list, list]:
        """What the learner's gave, and what it should be."""
        self.replayed.clear()
        ids, positions = batch(n, begin, self.device)
        wanted = eagerly(self.twin, ids, positions, count)
        size = min(size for size in SIZES if size >= n)
        try:
            found = attempt(self.mine.run, ids.clone(), positions.clone(), count)
        except CheckFailed as failure:
            raise CheckFailed(
                f"{n} rows, with captures for {SIZES} (so {size} rows run): {failure}"
            ) from None
        expect(
            isinstance(found, Tensor) and found.shape == (count, n),
            f"{count} tokens for {n} rows are a tensor [{count}, {n}]; yours is "
            f"{tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__}. "
            "Padding is not an answer.",
        )
        return found.tolist(), wanted


@check
def check_my_decode(MyDecode: Any) -> None:
    watched = Watched(MyDecode)
    calls = watched.model.calls
    expect(
        calls >= 2 * len(SIZES),
        "While a step was captured, the model was not run: step calls self.model(ids, positions).",
    )
    expect(
        not watched.model.stored.any(),
        "The captures stored keys in the cache: at first all positions are -1, and a row of -1 "
        "stays there. Add 1 only where a position is at least 0.",
    )
    found, wanted = watched.run(4, 0, 1)
    expect(
        watched.model.calls == calls,
        "run called the model, or step: Python runs them while capturing, and never again. Replay.",
    )
    expect(
        watched.replayed == [4],
        f"One token for 4 rows is one replay of size 4, the smallest that holds them; yours "
        f"replayed {watched.replayed}.",
    )
    expect(
        found == wanted,
        f"One token for 4 rows: {wanted}; yours: {found}. Write the ids and positions into the "
        "buffers that were captured (self.ids[:n] = ...), and the model's answer into ids, too.",
    )
    check_many_tokens(watched)
    check_padding(watched)
    check_any_number(watched)


def check_many_tokens(watched: Watched) -> None:
    found, wanted = watched.run(4, 1, 5)
    expect(
        found[0] == wanted[0] or found[0] != found[-1],
        "All five tokens are the last one: the buffer is written at each replay, so copy it "
        "(.clone()) before the next.",
    )
    expect(watched.replayed == [4] * 5, f"Five tokens are five replays; yours: {watched.replayed}.")
    expect(
        found == wanted,
        f"Five tokens for 4 rows: the first is {'right' if found[0] == wanted[0] else 'wrong'}, "
        "others are not. Does step write the new ids into the buffer, and move positions on by "
        "one?",
    )


def check_padding(watched: Watched) -> None:
    before = watched.model.stored.clone()
    found, wanted = watched.run(3, 8, 4)
    expect(
        watched.replayed == [4] * 4,
        f"4 is the smallest size that holds 3 rows; yours replayed {watched.replayed}.",
    )
    expect(
        torch.equal(before[:, 3:], watched.model.stored[:, 3:]),
        "3 rows ran as 4, and the fourth wrote into the cache of a request that is not in this "
        "batch. Padding has position -1, and stays there: set self.positions[n:], whatever an "
        "earlier batch has left.",
    )
    expect(found == wanted, "3 rows that run as 4: their tokens are wrong.")


def check_any_number(watched: Watched) -> None:
    begin = 13
    for n in (8, 1, 5, 2, 7, 6):
        before = watched.model.stored.clone()
        found, wanted = watched.run(n, begin, 3)
        expect(found == wanted, f"After batches of other sizes, {n} rows: some tokens are wrong.")
        expect(
            torch.equal(before[:, n:], watched.model.stored[:, n:]),
            f"{n} rows ran, and something was stored for rows that are not in the batch.",
        )
        begin += 3
    expect(begin < LONGEST, "the contexts fit")
    expect(
        torch.allclose(watched.model.stored, watched.twin.stored),  # a product of 8 rows may round
        "The tokens are right, but the cache holds other keys and values than it should.",
    )


# -- sizes to capture ----------------------------------------------------------------------------


def tell_sizes(capture_sizes: Any) -> None:
    for most in (256, 20, 5):
        sizes = capture_sizes(most)
        lost = [n for n in range(1, most + 1) if padding(sizes, n) is None]
        print(f"at most {most} requests: {len(sizes)} sizes, the last ones {sizes[-3:]}")
        print(f"    batches that no size holds: {lost or 'none'}")
        print(f"    sizes that the buffers have no rows for: {[s for s in sizes if s > most]}")


@check
def check_between(capture_sizes: Any) -> None:
    for most in (20, 256, 5, 1, 17, 16, 100, *range(2, 300)):
        sizes = attempt(capture_sizes, most)
        expect(
            isinstance(sizes, list) and bool(sizes),
            f"A list of sizes is wanted; for at most {most} requests yours is {sizes!r}.",
        )
        lost = [n for n in range(1, most + 1) if padding(sizes, n) is None]
        expect(
            not lost,
            f"At most {most} requests, sizes up to {max(sizes)}: a batch of "
            f"{next(iter(lost), None)} finds no size that holds it, and the engine stops. The last "
            "size must hold the largest batch.",
        )
        expect(
            max(sizes) <= most,
            f"At most {most} requests, but a step of {max(sizes)} rows is captured: the buffers "
            f"have {most}. No size may be above max_num_seqs.",
        )
        expect(
            sizes == sorted(set(sizes)),
            f"For at most {most} requests a size stands there twice, or they do not rise: {sizes}.",
        )
        expect(
            len(sizes) <= 5 + most // 8 + 1,
            f"For at most {most} requests you capture {len(sizes)} sizes. Each takes time and "
            "memory: most batches may well be padded a little.",
        )
        worst = max(range(1, most + 1), key=lambda n: padding(sizes, n) or 0)
        expect(
            (padding(sizes, worst) or 0) < max(16, worst / 2) and padding(sizes, 1) == 0,
            f"At most {most} requests: a batch of {worst} is padded with {padding(sizes, worst)} "
            "rows. Keep the small sizes and those in between: padding is computed in vain.",
        )
