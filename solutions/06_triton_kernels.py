# ---
# jupyter:
#   course:
#     requires: [triton]
# ---

# %% [markdown]
# # 06 · Exercises: one program, one token, one row
#
# Three exercises on [lesson 06](../notebooks/06_triton_kernels.ipynb), about 50 minutes. Write in the marked
# cells, run them, then run the check below. Hints stand below each exercise, in three folds: a nudge, the
# steps, the solution. Save this page when you are done: the last lesson runs what you wrote here.
#
# Without a GPU the kernels run in Triton's interpreter. Without Triton (macOS, Windows) the checks of exercises
# 2 and 3 say "not run here", and these count as open: read their solutions, or go to a machine that has it.

# %%
import torch

from course.checks import lesson06
from course.labs.kernel_lab import tl, triton, where

torch.set_grad_enabled(False)
torch.set_num_threads(1)
print(where())

# %% [markdown]
# ## 1 · Predict: bytes, microseconds, idle processors
#
# *easy, 5 minutes*
#
# One layer: 16 query heads, 8 KV heads of 128 numbers, two bytes a number. The GPU has 132 multiprocessors and
# moves 4,096 GB/s, that is 4,096,000 bytes in a microsecond.
#
# - `store_bytes`: 256 new tokens, a decode step. How many bytes does the store move in all, reading and writing,
#   keys and values?
# - `decode_us`: 64 rows attend to contexts of 1,000 tokens each, and every key and value is read once. How many
#   microseconds does this take at that bandwidth?
# - `idle`: 4 rows decode, with one program for each row and query head, one on a multiprocessor. How many
#   multiprocessors have nothing to do?
# - `first_slot`: now a model with 8 KV heads of **64**. Offsets into the keys, `slot * 512`, are made in 32 bits,
#   which hold numbers below $2^{31}$. Which is the first slot whose offset wraps?

# %% tags=["exercise-bytes_and_time"]
### BEGIN SOLUTION
store_bytes = 256 * (8 * 128) * 2 * 2 * 2
decode_us = 64 * 1000 * (8 * 128) * 2 * 2 / 4_096_000
idle = 132 - 4 * 16
first_slot = 2**31 // 512
### INSTEAD
# store_bytes = None
# decode_us = None
# idle = None
# first_slot = None
### END SOLUTION

# %%
lesson06.check_bytes_and_time(store_bytes, decode_us, idle, first_slot)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# A token has a key **and** a value in each KV head. A store reads them from one place and writes them to another;
# attention reads them.
#
# </details>
# <details><summary>Hint 2: the steps</summary>
#
# Keys of one token: `8 * 128` numbers, two bytes each; the values are as many. Times the tokens; times two if they
# are read and written. Time: bytes divided by bytes in a microsecond. Programs: rows times query heads. And
# `slot * 512` reaches $2^{31}$ at `2**31 // 512`.
#
# </details>
# <details><summary>Hint 3: the solution</summary>
#
# {{solution bytes_and_time}}
#
# </details>

# %% [markdown]
# ## 2 · Implement: the store kernel
#
# *medium, 25 minutes*
#
# Write what one program does: copy one token's key and value into its slot. The launcher below the kernel is
# complete; it starts one program for each token.
#
# | what the kernel gets | |
# |:--|:--|
# | `key`, `value` | pointers to token 0's first number |
# | `key_stride`, `value_stride` | how many numbers further on the next token's begin |
# | `k_cache`, `v_cache` | pointers to slot 0's first number; slot `s` begins `s * SIZE` numbers further on |
# | `slots` | pointer to the tokens' slots, int64; −1: do not store |
# | `SIZE` | numbers in a token's key (all KV heads, side by side), and in its value |
# | `BLOCK` | the next power of two: `SIZE` is 12 and `BLOCK` 16, for example |
#
# Keys and values are parts of `qkv`, so the strides are not `SIZE`. The lanes of `tl.arange(0, BLOCK)` from
# `SIZE` on belong to somebody else. And take the token's number in 64 bits, `.to(tl.int64)`: token times stride
# is an offset. (No check of this exercise has so many numbers that it shows; exercise 3 checks it.)


# %% tags=["exercise-my_store"]
@triton.jit
def store_kernel(
    key,
    value,
    k_cache,
    v_cache,
    slots,
    key_stride,
    value_stride,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: copy one token's key and value to its slot."""
    ### BEGIN SOLUTION find the token and its slot, then copy SIZE numbers of key and value
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot >= 0:
        at = tl.arange(0, BLOCK)
        inside = at < SIZE
        new_key = tl.load(key + token * key_stride + at, inside)
        new_value = tl.load(value + token * value_stride + at, inside)
        tl.store(k_cache + slot * SIZE + at, new_key, inside)
        tl.store(v_cache + slot * SIZE + at, new_value, inside)
    ### END SOLUTION


def store_kv(key, value, k_cache, v_cache, slots):
    """Store key and value [tokens, kv_heads, head_dim] in caches [blocks, block_size, ...]."""
    size = key[0].numel()
    block = triton.next_power_of_2(size)
    strides = key.stride(0), value.stride(0)
    store_kernel[(len(key),)](key, value, k_cache, v_cache, slots, *strides, size, block)


# %%
lesson06.check_my_store(store_kv)

# %% [markdown]
# Passed, it has stored every key and value of six stories in the engine. `LLMEngine(args, store_kv=store_kv)`
# takes it, and lesson 09 races it.
#
# <details><summary>Hint 1: a nudge</summary>
#
# Lesson 06's `masked_kernel` is nearly this. Three things are new: strides, a value beside the key, 64 bits.
#
# </details>
# <details><summary>Hint 2: the steps</summary>
#
# `token`: the program's number, as int64. `slot`: load `slots + token`. If it is at least 0: `at`, the lanes;
# `inside = at < SIZE`. Load `key + token * key_stride + at` with the mask, store to `k_cache + slot * SIZE + at`
# with the mask. The same with the value, its own stride and its own cache.
#
# </details>
# <details><summary>Hint 3: the solution</summary>
#
# {{solution my_store}}
#
# </details>

# %% [markdown]
# ## 3 · Break and fix: an offset of 32 bits
#
# *medium, 20 minutes*
#
# A store that gets block ids instead of slots. Each program makes two offsets: where its token's key begins among
# the new keys, and where it goes in the cache. This kernel only writes them down, so a laptop can ask for blocks
# that only a large GPU has. Block ids are int32, as in the engine's block tables. Run the demonstration: blocks of
# 16 slots, 1,024 numbers a slot.


# %% tags=["exercise-offsets"]
@triton.jit
def offset_kernel(
    blocks, places, sources, targets, stride, BLOCK_SIZE: tl.constexpr, SIZE: tl.constexpr
):
    """Program i: token i's offset among the new keys, and in the cache."""
    ### BEGIN SOLUTION
    token = tl.program_id(0).to(tl.int64)
    block = tl.load(blocks + token).to(tl.int64)
    ### INSTEAD
    # token = tl.program_id(0)
    # block = tl.load(blocks + token)
    ### END SOLUTION
    place = tl.load(places + token)  # in the block
    slot = block * BLOCK_SIZE + place
    tl.store(sources + token, token * stride)
    tl.store(targets + token, slot * SIZE)


# %%
lesson06.tell_offsets(offset_kernel)

# %% [markdown]
# A negative offset lies before the cache: with luck the GPU reports an illegal address. The last block's offset
# looks harmless, and is somebody else's key. The arrays that take the offsets are int64: that came too late.
# Repair the kernel. (The check also makes the stride so long that the other product wraps.)

# %%
lesson06.check_offsets(offset_kernel)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# A product of two 32-bit integers has 32 bits, whatever it is stored to. Which factors here have 32 bits?
#
# </details>
# <details><summary>Hint 2: the steps</summary>
#
# Both products begin with a 32-bit number: `tl.program_id(0)` and a block id. Turn each to `tl.int64` where it is
# made, before anything is multiplied. `(slot * SIZE).to(tl.int64)` turns a number that has wrapped already.
#
# </details>
# <details><summary>Hint 3: the solution</summary>
#
# {{solution offsets}}
#
# </details>
