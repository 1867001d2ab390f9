"""Wrong and right answers to lesson 06's exercises."""

from course.labs.kernel_lab import tl, triton
from exercise_cases import Case


@triton.jit
def head_kernel(
    source, target, slots, stride, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr
):
    """One program, one head of one token; keys or values."""
    token, head, at = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK)
    slot = tl.load(slots + token)
    mask = (at < DIM) & (slot >= 0)
    numbers = tl.load(source + token * stride + head * DIM + at, mask)
    tl.store(target + (slot * HEADS + head) * DIM + at, numbers, mask)


def store_kv(key, value, k_cache, v_cache, slots):
    """A program a head, first all keys, then all values."""
    tokens, heads, dim = key.shape
    for new, cache in ((key, k_cache), (value, v_cache)):
        block = triton.next_power_of_2(dim)
        head_kernel[tokens, heads](new, cache, slots, new.stride(0), heads, dim, block)


@triton.jit
def offset_kernel(
    blocks, places, sources, targets, stride, BLOCK_SIZE: tl.constexpr, SIZE: tl.constexpr
):
    token = tl.program_id(0)
    block, place = tl.load(blocks + token), tl.load(places + token)
    tl.store(sources + token, tl.cast(token, tl.int64) * stride)
    long = tl.cast(block, tl.int64)
    tl.store(targets + token, long * (BLOCK_SIZE * SIZE) + place * SIZE)


TOKEN, BLOCK = "tl.program_id(0).to(tl.int64)", "tl.load(blocks + token).to(tl.int64)"
SLOT, PLAIN = "slot = block * BLOCK_SIZE + place", "tl.load(blocks + token)"
CASES = {
    "bytes_and_time": Case(
        mutants=[
            ("* (8 * 128) * 2 * 2 * 2", "* (8 * 128) * 2 * 2", "it moves twice that"),
            ("256 * (8 * 128) * 2 * 2 * 2", "256 * (8 * 128) * 2", "there are values"),
            ("* 2 * 2 / 4_096_000", "* 2 / 4_096_000", "Keys and values are read"),
            ("64 * 1000 * (8 * 128)", "64 * 1000 * (16 * 128)", "query heads were counted"),
            ("64 * 1000", "1000", "there are 64"),
            ("132 - 4 * 16", "132 - 4", "one row and one query head"),
            ("132 - 4 * 16", "4 * 16", "How many are not"),
            ("2**31 // 512", "2**31 // 1024", "with heads of 128"),
            ("2**31 // 512", "2**32 // 512", "the sign"),
            ("2**31 // 512", "2**31 // 512 - 1", "still fits"),
        ],
        other={
            "store_bytes": 2_097_152,
            "decode_us": 64.00000000000001,
            "idle": 68,
            "first_slot": 4_194_304.0,
        },
    ),
    "my_store": Case(
        mutants=[
            ("if slot >= 0:", "if True:", "outside the cache"),
            ("if slot >= 0:", "if slot > 0:", "It is a slot like all others"),
            ("new_key, inside)", "new_key)", "mask the lanes"),
            ("inside = at < SIZE", "inside = at <= SIZE", "slot 6 was written"),
            ("inside = at < SIZE", "inside = at < SIZE - 1", "numbers of its key"),
            ("token * key_stride + at", "token * SIZE + at", "There stands a value of token 0"),
            ("key + token * key_stride + at", "key + at", "Every slot has token 0's key"),
            ("token * value_stride + at", "token * SIZE + at", "have a stride each"),
            (
                "v_cache + slot * SIZE + at, new_value",
                "v_cache + slot * SIZE + at, new_key",
                "where",
            ),
            ("        tl.store(v_cache + slot * SIZE + at, new_value, inside)\n", "", "Both are"),
            ("token * value_stride + at", "token * key_stride + at", "have a stride each"),
            ("token * key_stride + at", "token * value_stride + at", "have a stride each"),
            ("key[0].numel()", "key[0].numbers()", "store_kv raised an error"),
            ("slot * SIZE", "slot", "slot 5 is still empty"),
            ("slot * SIZE", "token * SIZE", "slot 5 is still empty"),
        ],
        other=store_kv,
    ),
    "offsets": Case(
        mutants=[
            (BLOCK, "tl.load(blocks + token)", "slot * SIZE wrapped"),
            (TOKEN, "tl.program_id(0)", "The program's number has 32 bits too"),
            (SLOT, f"slot = ({PLAIN} * BLOCK_SIZE + place).to(tl.int64)", "where it is loaded"),
            (SLOT, f"slot = ({PLAIN} * BLOCK_SIZE + place) * 1", "slot * SIZE wrapped"),
            ("slot * SIZE)", "(slot * SIZE).to(tl.int32).to(tl.int64))", "later it has wrapped"),
            (SLOT, "slot = block + place", "Small numbers first"),
            (SLOT, "slot = blok * BLOCK_SIZE + place", "offset_kernel raised an error"),
        ],
        other={"offset_kernel": offset_kernel},
    ),
}
