"""Checks of lesson 06's exercises: bytes and time, the store kernel, offsets of 32 bits.

Kernels run on the GPU if there is one, else in Triton's interpreter; without Triton, not at all.
"""

from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from course.checks import CheckFailed, attempt, check, compare, expect, need
from course.checks.core import plain
from course.checks.engines import answers_of
from course.machine import has_triton
from course.models.choice import has_gpu

device = torch.device("cuda" if has_gpu() else "cpu")
TRITON = "Triton (it has builds for Linux; Windows has it in WSL)"


@check
def check_bytes_and_time(store_bytes: Any, decode_us: Any, idle: Any, first_slot: Any) -> None:
    token = 8 * 128 * 2 * 2  # bytes of a token's keys and values
    wrong = {
        256 * token: "A store reads each number and writes it: it moves twice that.",
        256 * token // 2: "That is the keys, read once: there are values, and they are written.",
        256 * token // 4: "Those are numbers. Each has two bytes, and is read and written.",
        256 * token * 4: "16 query heads have no part in it: only the KV heads are stored.",
    }
    look = "Tokens times KV heads times 128, two bytes each, keys and values, read and written."
    compare("store_bytes", store_bytes, 256 * token * 2, wrong, look)
    wrong = {
        32: "Keys and values are read: that is twice as much.",
        128: "The cache is only read, not written; or query heads were counted: there are 8 KV "
        "heads, and their keys serve 16 query heads.",
        1: "That is one row: there are 64.",
        64_000: "That is in nanoseconds: 4,096 GB/s are 4,096,000 bytes in a microsecond.",
    }
    given = plain(decode_us)
    given = round(given, 6) if isinstance(given, float) else given
    look = "64 rows of 1,000 tokens, 4,096 bytes each, by 4,096,000 bytes in a microsecond."
    compare("decode_us", given, 64 * 1000 * token / 4_096_000, wrong, look)
    wrong = {
        132 - 4: "A program is one row and one query head: there are 16 for each row.",
        132 - 4 * 8: "There is a program for each query head here, and 16 of these.",
        4 * 16: "So many are busy. How many are not?",
    }
    compare("idle", idle, 132 - 4 * 16, wrong, "Programs: rows times query heads.")
    wrong = {
        2**31 // 1024: "That is with heads of 128. Here a slot has 8 * 64 = 512 numbers.",
        2**32 // 512: "One of the 32 bits is the sign: offsets go up to 2^31 - 1.",
        2**31 // 512 - 1: "Its offset is 2^31 - 512, which still fits. The next one's does not.",
        2**31 // 512 + 1: "The offset of the slot before it is 2^31: that wraps already.",
    }
    compare("first_slot", first_slot, 2**31 // 512, wrong, "slot * 512 reaches 2^31.")


# -- the store kernel ----------------------------------------------------------------------------

SHAPE = (3, 4, 2, 6)  # 12 slots; 2 KV heads of 6: 12 numbers, in 16 lanes
GUARD = 8  # slots before and behind the cache, to see what is written beside it


def run_kernels(function: Any, *args: Any) -> None:
    """As `attempt`; a kernel that is still a stub cannot say so by itself."""

    @wraps(function)
    def run() -> None:
        try:
            function(*args)
        except Exception as error:
            if "NotImplementedError" in f"{error!r} {error} {error.__cause__!r}":
                raise CheckFailed(
                    "The kernel is still to be written: find the token and its slot, then copy "
                    "SIZE numbers of key and value."
                ) from None
            raise

    attempt(run)


class Stored:
    """What a store function left in two caches that were filled with -1."""

    def __init__(self, store_kv: Any, slots: list[int]):
        count = len(slots)  # one token more, for whoever reads too far
        keys, values = (
            torch.arange((count + 1) * row, device=device).view(-1, row // 6, 6)[:count] + first
            for row, first in ((60, 1.0), (72, 1001.0))  # key and value have strides of their own
        )
        self.key, self.value = keys[:, 5:7], values[:, 8:10]
        self.slots = slots
        blocks, size, heads, dim = SHAPE
        around = torch.full((2, blocks * size + 2 * GUARD, heads, dim), -1.0, device=device)
        inner = around[:, GUARD:-GUARD].unflatten(1, (blocks, size))
        self.found, self.wanted = around, around.clone()
        for i, slot in enumerate(slots):
            if slot >= 0:
                self.wanted[0, GUARD + slot], self.wanted[1, GUARD + slot] = (
                    self.key[i],
                    self.value[i],
                )
        numbers = torch.tensor(slots, device=device)
        run_kernels(store_kv, self.key, self.value, *inner, numbers)

    def at(self, slot: int) -> Tensor:
        """What was found there: [key and value, kv_heads, head_dim]."""
        return self.found[:, GUARD + slot]

    def right(self, slot: int) -> bool:
        return torch.equal(self.at(slot), self.wanted[:, GUARD + slot])

    def untouched(self, slot: int) -> bool:
        return bool((self.at(slot) == -1).all())


@check(slow="Does a loop end? Or does it copy number by number? Take all lanes at once.")
def check_my_store(store_kv: Any) -> None:
    need(has_triton(), TRITON)
    check_one_token(Stored(store_kv, [5]))
    check_three_tokens(Stored(store_kv, [7, 3, 0]))
    skipped = Stored(store_kv, [4, -1, 9])
    expect(
        skipped.untouched(-1),
        "The token of slot -1 was written before slot 0, outside the cache: -1 means that it is "
        "not stored. Do nothing unless slot >= 0.",
    )
    expect(
        skipped.right(4) and skipped.right(9),
        "Slots 4, -1, 9: the tokens beside the one that is not stored are wrong.",
    )
    for slots in ([0], [11, 0, 6, 1, -1, 2], list(range(11, -1, -1))):
        stored = Stored(store_kv, slots)
        expect(
            torch.equal(stored.found, stored.wanted),
            f"Slots {slots}: something in the caches, or beside them, differs from what it should.",
        )
    options = {"device": str(device), "attention_backend": "torch"}
    right, _ = answers_of(options)
    answers, _ = attempt(answers_of, options | {"store_kv": store_kv})
    expect(answers == right, "The store passes by itself, but in the engine the stories differ.")


def check_one_token(stored: Stored) -> None:
    key, value = stored.at(5)
    expect(
        not stored.untouched(5) or torch.equal(stored.found, stored.wanted),
        "One token, slot 5: slot 5 is still empty. A slot begins slot * SIZE numbers behind "
        "slot 0.",
    )
    expect(
        not (key == -1).any() and not (value == -1).any(),
        "One token, slot 5: numbers of its key or its value are missing. Both are stored, all "
        "SIZE numbers of each.",
    )
    expect(
        not torch.equal(key, stored.value[0]) and not torch.equal(value, stored.key[0]),
        "A value stands where a key should, or a key where a value should.",
    )
    expect(stored.right(5), "One token, slot 5: not its own key and value are found there.")
    expect(
        stored.untouched(6),
        "One token, slot 5: slot 6 was written as well. A key has 12 numbers, BLOCK is 16: mask "
        "the lanes from SIZE on when you store.",
    )
    expect(torch.equal(stored.found, stored.wanted), "One token, slot 5: other slots were written.")


def check_three_tokens(stored: Stored) -> None:
    expect(
        stored.right(7),
        "Three tokens, slots 7, 3, 0: token 0 is not in slot 7 as it should be.",
    )
    expect(
        not stored.untouched(0),
        "Slots 7, 3, 0: nothing is in slot 0. It is a slot like all others; only -1 means that a "
        "token is not stored.",
    )
    first = stored.at(3)[0]
    expect(
        not torch.equal(first, stored.key[0]),
        "Every slot has token 0's key: the next one's begins key_stride numbers further on.",
    )
    expect(
        first.flatten()[0] != stored.key[0, 0, 0] + 12,
        "Token 1's key was taken SIZE numbers behind token 0's. There stands a value of token 0: "
        "keys are parts of qkv, the next one begins key_stride numbers further on.",
    )
    expect(
        torch.equal(first, stored.key[1]) and torch.equal(stored.at(3)[1], stored.value[1]),
        "Three tokens, slots 7, 3, 0: slot 3 has not token 1's own key and value. Key and value "
        "have a stride each.",
    )
    expect(
        torch.equal(stored.found, stored.wanted),
        "Three tokens, slots 7, 3, 0: slot 0 or one beside them is wrong.",
    )


# -- offsets of 32 bits --------------------------------------------------------------------------


def offsets_of(
    kernel: Any, blocks: list[int], places: list[int], stride: int, size: int
) -> tuple[list[int], list[int]]:
    """What the kernel writes down for these tokens: offsets of sources, and of targets."""
    ids, at = (torch.tensor(x, dtype=torch.int32, device=device) for x in (blocks, places))
    sources, targets = torch.zeros(2, len(blocks), dtype=torch.int64, device=device)
    kernel[(len(blocks),)](ids, at, sources, targets, stride, 16, size)
    return sources.tolist(), targets.tolist()


def tell_offsets(kernel: Any) -> None:
    if not has_triton():
        print("not run here: it needs Triton")
        return
    blocks, places = [5, 131_071, 131_072, 262_145], [3, 15, 0, 2]
    _, targets = offsets_of(kernel, blocks, places, 4096, 1024)
    print(f"{'block':>8}{'place':>7}{'offset':>16}   should be")
    for block, place, offset in zip(blocks, places, targets, strict=True):
        print(f"{block:>8,}{place:>7}{offset:>16,}   {(block * 16 + place) * 1024:,}")


@check
def check_offsets(offset_kernel: Any) -> None:
    need(has_triton(), TRITON)

    def run(blocks: list[int], places: list[int], stride: int = 4096, size: int = 1024) -> Any:
        named = partial(offsets_of, offset_kernel)
        named.__qualname__ = "offset_kernel"  # in messages
        return attempt(named, blocks, places, stride, size)

    sources, targets = run([5, 2], [3, 0])
    expect(
        sources == [0, 4096] and targets == [(5 * 16 + 3) * 1024, 2 * 16 * 1024],
        f"Small numbers first: blocks 5 and 2, places 3 and 0, should give 0 and 4,096 as sources, "
        f"84,992 and 32,768 as targets; yours: {sources} and {targets}.",
    )
    _, targets = run([131_072, 262_145], [0, 2])
    expect(
        targets == [2**31, (262_145 * 16 + 2) * 1024],
        f"Block 131,072 begins at offset 2^31 = 2,147,483,648, and yours is {targets[0]:,}: slot * "
        "SIZE wrapped. Turn the block id to int64 before you multiply; later it has wrapped.",
    )
    _, targets = run([2**27], [1], size=4)
    expect(
        targets == [(2**31 + 1) * 4],
        "Block 134,217,728 has slots from 2^31 on, and the first product, block * BLOCK_SIZE, "
        "wrapped before the slot was turned to int64. Turn the block id where it is loaded.",
    )
    sources, _ = run([1, 2, 3, 4, 5, 6], [0] * 6, stride=2**30)
    expect(
        sources == [i * 2**30 for i in range(6)],
        f"With a stride of 2^30, token 2 begins at 2^31; yours: {sources[2]:,}. The program's "
        "number has 32 bits too: turn it to int64 before you multiply.",
    )
