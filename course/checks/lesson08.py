"""Checks of lesson 08's exercises: a rank's share, two linears, a rank that sizes its own cache."""

from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear, silu

from course.checks import attempt, check, compare, expect
from course.checks.loads import Load
from course.models.choice import own_model
from course.rank_threads import on_ranks
from nanovllm.distributed.ranks import Ranks
from nanovllm.engine.scheduler import Scheduler

LAYERS, HIDDEN, KV_HEADS, HEAD, FEATURES = 36, 4096, 8, 128, 12288  # Qwen3-8B


def cache_bytes(size: int) -> int:
    """Bytes of keys and values a token, on one of `size` ranks."""
    return 2 * LAYERS * Ranks(0, size).shard(KV_HEADS).count * HEAD * 2


@check
def check_a_rank(mlp_bytes: Any, token_bytes: Any, reduced: Any, token_bytes_16: Any) -> None:
    truth = 3 * HIDDEN * Ranks(0, 4).shard(FEATURES).count * 2
    wrong = {
        4 * truth: "That is the whole MLP. A rank reads its part alone.",
        truth // 2: "A number takes two bytes.",
        truth * 2 // 3: "There are three matrices: gate, up and down.",
    }
    compare("mlp_bytes", mlp_bytes, truth, wrong, "3 matrices of 4,096 * 12,288, and 4 ranks.")
    wrong = {
        4 * cache_bytes(4): "You counted 8 heads. Those are all KV heads, or a rank's query heads; "
        "a rank keeps its own KV heads, 2 of 8.",
        cache_bytes(4) // 2: "Each layer keeps a key and a value, of two bytes a number.",
    }
    look = "A key and a value, 36 layers, the rank's KV heads, 128 numbers, 2 bytes."
    compare("token_bytes", token_bytes, cache_bytes(4), wrong, look)
    call = 32 * HIDDEN * 2
    truth = (2 * LAYERS + 1) * call
    wrong = {
        truth // 4: "What an all-reduce adds is not cut: each rank brings all outputs, incomplete.",
        2 * LAYERS * call: "The embedding is cut by vocabulary, and ends in an all-reduce, too.",
        (LAYERS + 1) * call: "A layer has two halves, attention and MLP, and each ends in one.",
        truth // 32: "The step has 32 rows.",
        truth // 2: "A number takes two bytes.",
    }
    look = "All-reduces of a step, times rows * hidden * 2 bytes."
    compare("reduced", reduced, truth, wrong, look)
    wrong = {
        cache_bytes(4) // 4: "A head is never cut. There are fewer heads than ranks, so two ranks "
        "hold the same one, whole.",
    }
    look = "How many KV heads has a rank, if there are 8 and 16 ranks?"
    compare("token_bytes_16", token_bytes_16, cache_bytes(16), wrong, look)


# -- columns, then rows --------------------------------------------------------------------------


class Listening(Ranks):
    """A rank alone, without the others: notes what it brings; its sums are as it is told."""

    def __init__(self, rank: int, size: int, total: Tensor | None = None):
        super().__init__(rank, size)
        self.brought: list[Tensor] = []
        self.total = total

    def all_reduce(self, x: Tensor) -> Tensor:
        self.brought.append(x.clone())
        return x if self.total is None else x.copy_(self.total)


def whole_numbers(*shape: int) -> Tensor:
    """Small integers as floats: their sums are exact in every order."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(1, 9, shape, generator=generator).float()


@check
def check_two_linears(column_linear: Any, row_linear: Any) -> None:
    for size in (1, 2, 3):
        check_column(column_linear, size)
        check_row(row_linear, size)
    check_mlp(column_linear, row_linear)


def check_column(column_linear: Any, size: int) -> None:
    x, weight, bias = whole_numbers(2, 4), whole_numbers(6, 4), whole_numbers(6)
    for given in (None, bias):
        whole = linear(x, weight, given)
        for rank in range(size):
            ranks = Listening(rank, size)
            part, at = attempt(column_linear, x, weight, given, ranks, 3), ranks.shard(3, 2)
            where = f"column_linear, rank {rank} of {size}, 3 heads of 2 features: "
            expect(isinstance(part, Tensor), f"{where}a tensor is wanted, got {part!r}.")
            expect(not ranks.brought, f"{where}its outputs are complete, nothing is to be added.")
            expect(
                part.shape == (2, at.count),
                f"{where}{at.count} outputs are this rank's, from {at.start} on; yours has shape "
                f"{list(part.shape)}. `count` is how many, not where they end, and heads stay "
                "whole.",
            )
            mine = slice(at.start, at.start + at.count)
            expect(
                given is None or not torch.equal(part, whole[:, mine] - bias[mine]),
                f"{where}the bias is missing. Each output is on one rank, with its own bias.",
            )
            expect(torch.equal(part, whole[:, mine]), f"{where}it has other numbers.")


def check_row(row_linear: Any, size: int) -> None:
    x, weight, bias, residual = (whole_numbers(*s) for s in ((2, 6), (5, 6), (5,), (2, 5)))
    for given in (None, bias):
        got = on_each(row_linear, x, weight, given, residual, size)
        product = linear(x, weight)
        whole = product + residual if given is None else product + residual + bias
        where = f"row_linear on {size} {'ranks' if size > 1 else 'rank'}: "
        times = f"comes in {size} times, as each of {size} ranks adds"
        for result in got:
            off = result - whole
            if given is None:
                extra = alike(off, (size - 1) * residual)
                expect(size == 1 or not extra, f"{where}the residual {times} it to its part.")
                expect(not alike(off, -residual), f"{where}the residual is missing.")
            else:
                extra = alike(off, (size - 1) * bias)
                expect(size == 1 or not extra, f"{where}the bias {times} it to its part.")
                missing = alike(off, -bias)
                expect(not missing, f"{where}the bias is missing.")
            expect(alike(result, whole), f"{where}its result is not residual + x W + bias.")


def alike(a: Tensor, b: Tensor) -> bool:
    """Whole numbers are the same, up to the rounding of thirds that were added up."""
    return bool(((a - b).abs() < 0.01).all())


def on_each(row_linear: Any, x: Tensor, weight: Tensor, bias: Any, residual: Tensor, size: int):
    """What each rank returns; the ranks run one after the other, first to hear what each brings."""
    total = None
    for _ in range(2):
        every, results = [Listening(rank, size, total) for rank in range(size)], []
        for ranks in every:
            at, mine = ranks.shard(3, 2), residual.clone()
            part = x[:, at.start : at.start + at.count].clone()
            results.append(attempt(row_linear, part, weight, bias, mine, ranks, 3))
            expect(
                torch.equal(mine, residual),
                "row_linear changed `residual`, which is its caller's. all_reduce and += work in "
                "place: add into a new tensor.",
            )
        calls = [len(ranks.brought) for ranks in every]
        total = summed(calls, every)
    wanted = residual.shape
    for result in results:
        right = isinstance(result, Tensor) and result.shape == wanted
        expect(right, f"row_linear returns [tokens, outputs] on every rank, got {result!r}.")
    return results


def summed(calls: list[int], every: list[Listening]) -> Tensor:
    expect(
        any(calls) or len(calls) == 1,
        "row_linear never calls ranks.all_reduce. Each rank has all outputs, and of each only a "
        "part: they must be added.",
    )
    expect(
        len(set(calls)) == 1,
        f"Rank by rank row_linear enters all_reduce {calls} times. Where one rank does not come, "
        "the others wait for ever.",
    )
    expect(calls[0] <= 1, f"One all-reduce is enough, row_linear makes {calls[0]}.")
    if not calls[0]:
        return torch.zeros(())  # one rank alone, which had nothing to add up
    shapes = {tuple(ranks.brought[0].shape) for ranks in every}
    expect(len(shapes) == 1, f"The ranks bring tensors of different shapes: {sorted(shapes)}.")
    return torch.stack([ranks.brought[0] for ranks in every]).sum(dim=0)


def check_mlp(column_linear: Any, row_linear: Any) -> None:
    """The storyteller's first MLP, on ranks that talk."""
    weights = load_file(own_model() / "model.safetensors")
    names = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
    gate, up, down = (weights[name].float() for name in names)
    x = torch.randn(5, gate.shape[1], generator=torch.Generator().manual_seed(0))
    whole = x + linear(silu(linear(x, gate)) * linear(x, up), down)
    units = len(gate)

    def mlp(ranks: Ranks) -> Tensor:
        inner = silu(column_linear(x, gate, None, ranks, units))
        inner = inner * column_linear(x, up, None, ranks, units)
        return row_linear(inner, down, None, x, ranks, units)

    for size in (1, 2, 4):
        for result in on_ranks(size, mlp):
            expect(
                (result - whole).abs().max() < 1e-4 * whole.abs().max(),
                f"With whole numbers all was right, but the storyteller's MLP on {size} ranks is "
                "another.",
            )


# -- a rank that sizes its own cache -------------------------------------------------------------

REQUESTS = [("A", 8, 6), ("B", 9, 6), ("C", 6, 6)]
BLOCK_BYTES, NEEDED = 1000, 5


def sizes(cache_blocks: Any, free_bytes: list[int]) -> list[Any]:
    """What each rank comes to: its blocks, or the error it ended with."""

    def outcome(ranks: Ranks) -> Any:
        try:
            return cache_blocks(ranks, free_bytes[ranks.rank], BLOCK_BYTES, NEEDED)
        except Exception as error:
            return error

    return on_ranks(len(free_bytes), outcome)


def tell_the_plans(cache_blocks: Any) -> None:
    """Print step by step what two ranks plan, the second with less memory."""
    free = [9900, 7300]
    blocks = sizes(cache_blocks, free)
    for rank, got in enumerate(blocks):
        print(f"rank {rank}: {free[rank]} bytes free, {BLOCK_BYTES} a block: {got!r} blocks")
    if not all(isinstance(got, int) for got in blocks):
        return
    plans = [Load(REQUESTS, blocks=got).run(Scheduler) for got in blocks]
    for number, steps in enumerate(zip(*plans, strict=False), start=1):
        rows = [" ".join(f"{name}:{count}" for name, _, count in step) for step in steps]
        print(f"step {number}: {' | '.join(rows)}{'' if rows[0] == rows[1] else '   <- differ'}")


@check
def check_cache_blocks(cache_blocks: Any) -> None:
    for free in ([9900, 9900], [9900, 7300], [7300, 9900], [9900, 8100, 7300]):
        check_sizes(free, sizes(cache_blocks, free))
    for free in ([9900, 3000], [3000, 9900]):
        check_too_small(free, sizes(cache_blocks, free))
    waited = sizes(cache_blocks, [5999, 5000])
    expect(waited == [5, 5], f"5 blocks are enough for a request of 5; yours came to {waited}.")


def check_sizes(free: list[int], got: list[Any]) -> None:
    own = [number // BLOCK_BYTES for number in free]
    says = f"Ranks have memory for {own} blocks and come to {got}. "
    waits = [rank for rank, error in enumerate(got) if isinstance(error, RuntimeError)]
    expect(
        not waits,
        f"Rank {waits} waits in a collective that another never enters. A collective is entered by "
        "all ranks or none: one came and waited for the others.",
    )
    errors = [error for error in got if isinstance(error, Exception)]
    expect(not errors, f"{says}There is room on every rank, so none should fail.")
    expect(
        len(set(got)) == 1,
        f"{says}Each rank plans by its own number, so plans differ when blocks run out: one "
        "preempts a request, the other runs it.",
    )
    expect(
        got[0] <= min(own),
        f"{says}Now all plan alike, but a rank has less than they plan with: it would write "
        f"keys and values to block {min(own)} and beyond, where it has no memory.",
    )
    expect(got[0] == min(own), f"{says}All ranks could have {min(own)}.")


def check_too_small(free: list[int], got: list[Any]) -> None:
    own = [number // BLOCK_BYTES for number in free]
    says = f"Ranks have memory for {own} blocks, one request needs {NEEDED}. "
    raised = [isinstance(error, ValueError) for error in got]
    waits = [rank for rank, error in enumerate(got) if isinstance(error, RuntimeError)]
    expect(
        not waits,
        f"{says}One rank raises, and rank {waits} waits in a collective that the other never "
        "enters. Agree first; then all come to the same end.",
    )
    expect(
        any(raised),
        f"{says}That is too little on one rank, and nobody raises ValueError: {got}. Compare what "
        "was agreed on.",
    )
    expect(all(raised), f"{says}One rank raises, and another goes on alone: {got}.")
