# %% [markdown]
# # 08 · Exercises: one model on several GPUs
#
# Three exercises on [lesson 08](../notebooks/08_tensor_parallelism.ipynb), about 45 minutes. Write in the
# marked cells, run them, then run the check below. Hints stand below each exercise, in three folds: a nudge,
# the steps, the solution. No GPU is needed: ranks are threads of this process.

# %%
import torch
import torch.nn.functional as F

from course.checks import lesson08

torch.set_num_threads(1)

# %% [markdown]
# ## 1 · Predict: what a rank holds, and what it sends
#
# *medium, 5 minutes*
#
# Qwen3-8B has 36 layers, hidden size 4,096, 32 query heads and 8 KV heads of 128 numbers, and an MLP (gate, up
# and down) of 12,288 features. A number takes two bytes. First on **4 ranks**:
#
# - `mlp_bytes`: bytes of one layer's three MLP matrices on one rank.
# - `token_bytes`: bytes of keys and values a token, in all layers, on one rank.
# - `reduced`: bytes that one rank brings to all-reduces in a decode step of 32 rows. (The sampler's exchange
#   of best values does not count.)
#
# And on **16 ranks**:
#
# - `token_bytes_16`: bytes of keys and values a token on one rank.

# %% tags=["exercise-a_rank"]
### BEGIN SOLUTION
mlp_bytes = 3 * 4096 * 12288 * 2 // 4
token_bytes = 2 * 36 * (8 // 4) * 128 * 2
reduced = (2 * 36 + 1) * 32 * 4096 * 2
token_bytes_16 = 2 * 36 * 1 * 128 * 2
### INSTEAD
# mlp_bytes = None
# token_bytes = None
# reduced = None
# token_bytes_16 = None
### END SOLUTION

# %%
lesson08.check_a_rank(mlp_bytes, token_bytes, reduced, token_bytes_16)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# Weights and KV heads are cut. What an all-reduce adds is not: all outputs, incomplete. And can a head be cut?
#
# </details>
# <details><summary>Hint 2: the steps</summary>
#
# Each MLP matrix has 4,096 · 12,288 numbers; a rank has a quarter. A token keeps a key and a value for each
# layer and each KV head *of the rank*. All-reduces: two a layer and one for the embedding, each of rows · hidden
# numbers. With 16 ranks and 8 KV heads, two ranks hold the same head.
#
# </details>
# <details><summary>Hint 3: the solution</summary>
#
# {{solution a_rank}}
#
# </details>

# %% [markdown]
# ## 2 · Implement: columns, then rows
#
# *medium, 20 minutes*
#
# Every rank runs both functions. Weights are whole here, stored as `nn.Linear` does, [outputs, inputs], and each
# rank uses only its part. `ranks.shard(units, width)` says which: the features from `start`, `count` of
# them, of `units` units of `width` features each. A unit (a head) is never cut.
#
# - `column_linear`: `x` is whole. Returns this rank's outputs, complete, with their bias.
# - `row_linear`: `x` is this rank's features. Returns on every rank `residual` + the whole product + `bias`.
#
# With 3 heads of 2 features on 2 ranks:
#
# | | `ranks.shard(3, 2)` | the rank's features |
# |:--|:--|:--|
# | rank 0 | `start=0, count=2` | 0, 1 |
# | rank 1 | `start=2, count=4` | 2, 3, 4, 5 |
#
# `bias` may be None. `ranks.all_reduce(x)` adds up **in place** what all ranks bring, and returns it; `residual`
# is still the caller's. All must be right for any number of ranks, one included.


# %% tags=["exercise-two_linears"]
def column_linear(x, weight, bias, ranks, units):
    """x [tokens, inputs], weight [outputs, inputs] -> this rank's outputs [tokens, count]."""
    width = weight.shape[0] // units
    ### BEGIN SOLUTION use the rows of the weight, and the part of the bias, that are this rank's
    shard = ranks.shard(units, width)
    mine = slice(shard.start, shard.start + shard.count)
    return F.linear(x, weight[mine], None if bias is None else bias[mine])
    ### END SOLUTION


def row_linear(x, weight, bias, residual, ranks, units):
    """x [tokens, count], weight [outputs, inputs] -> residual + all outputs [tokens, outputs]."""
    width = weight.shape[1] // units
    ### BEGIN SOLUTION multiply with this rank's columns, and let the sum hold all else once
    shard = ranks.shard(units, width)
    part = F.linear(x, weight[:, shard.start : shard.start + shard.count])
    if ranks.rank == 0:
        part = part + residual
        if bias is not None:
            part = part + bias
    return ranks.all_reduce(part)
    ### END SOLUTION


# %%
lesson08.check_two_linears(column_linear, row_linear)

# %% [markdown]
# Passed, your two functions have computed an MLP of the storyteller on one, two and four ranks.
#
# <details><summary>Hint 1: a nudge</summary>
#
# The all-reduce adds what the ranks bring. What of `residual + product + bias` has each rank only a part of, and
# what has each rank whole?
#
# </details>
# <details><summary>Hint 2: the steps</summary>
#
# Column: `shard = ranks.shard(units, width)`; rows `start` to `start + count` of `weight`, the same of `bias`.
# Row: the same shard, as *columns* of `weight`; on rank 0 alone add `bias` (if there is one) and `residual`,
# into a new tensor; *every* rank enters `ranks.all_reduce`.
#
# </details>
# <details><summary>Hint 3: the solution</summary>
#
# {{solution two_linears}}
#
# </details>

# %% [markdown]
# ## 3 · Break and fix: a rank that sizes its own cache
#
# *hard, 20 minutes*
#
# Each rank calls this at its start: how many blocks has its cache? On one GPU all was well. Now there are two, and
# on the second something else holds a little memory. The demonstration has both ranks plan the same three
# requests, as in lesson 08: nobody sends a plan.


# %% tags=["exercise-cache_blocks"]
def cache_blocks(ranks, free_bytes, block_bytes, needed):
    """Blocks of this rank's cache; ValueError if the longest request's `needed` do not fit."""
    ### BEGIN SOLUTION
    num_blocks = ranks.all_reduce_min(free_bytes // block_bytes)
    ### INSTEAD
    # num_blocks = free_bytes // block_bytes
    ### END SOLUTION
    if num_blocks < needed:
        raise ValueError(f"{num_blocks} blocks, but the longest request needs {needed}")
    return num_blocks


# %%
lesson08.tell_the_plans(cache_blocks)

# %% [markdown]
# A sum of rows of different requests, or an all-reduce that waits for a rank that never comes: both begin here.
# Repair it so that plans agree, so that nobody writes where a rank has no block, and so that ranks also agree
# when memory is too small on *one* of them. The check runs two and three ranks. Collectives that may help:
# `ranks.all_reduce_min(number)`, the smallest of all ranks' numbers; `ranks.broadcast(message)`, rank 0's message.

# %%
lesson08.check_cache_blocks(cache_blocks)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# Whose number can all ranks live with? And if one rank raises before a collective, who waits in it?
#
# </details>
# <details><summary>Hint 2: the steps</summary>
#
# Rank 0's number is too large for a rank that has less. Agree on the smallest, and do so *first*: before anything
# that may end differently on different ranks.
#
# </details>
# <details><summary>Hint 3: the solution</summary>
#
# {{solution cache_blocks}}
#
# </details>
