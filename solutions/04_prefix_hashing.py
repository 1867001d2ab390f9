# %% [markdown]
# # 04 · Exercises: the same beginning, computed once
#
# Four exercises on [lesson 04](../notebooks/04_prefix_hashing.ipynb), about 50 minutes. Write in the marked
# cells, run them, then run the check below. Hints stand below each exercise, in three folds: a nudge, the
# steps, the solution. Save this page when you are done: the last lesson runs what you wrote here.

# %%
import torch

from course.checks import lesson04
from nanovllm.engine.block_manager import BlockManager, hash_block

torch.set_grad_enabled(False)
torch.set_num_threads(1)

# %% [markdown]
# ## 1 · Predict: what ten requests compute
#
# *easy, 5 minutes*
#
# Blocks of 16, an empty cache with room for everything, and ten requests, **one after another**. How many
# prompt tokens do the ten compute together, if
#
# - `system`: each has the same system prompt of 100 tokens, then 30 tokens of its own?
# - `clock`: the same, but a clock of 10 tokens stands in front, and shows each request another time?
# - `same`: all ten are the very same prompt of 96 tokens?

# %% tags=["exercise-ten_requests"]
### BEGIN SOLUTION
system = 130 + 9 * (130 - 96)
clock = 10 * 140
same = 96 + 9 * 1
### INSTEAD
# system = None
# clock = None
# same = None
### END SOLUTION

# %%
lesson04.check_ten_requests(system, clock, same)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# The first request finds nothing. What does the second find: tokens, or blocks?
#
# </details>
# <details><summary>Hint 2: the steps</summary>
#
# Of 100 common tokens, whole blocks are shared: `100 // 16 * 16`. With another first token, nothing is. And
# 96 tokens are six whole blocks: but where do the logits come from, if nothing is computed?
#
# </details>
# <details><summary>Hint 3: the solution</summary>
#
# {{solution ten_requests}}
#
# </details>

# %% [markdown]
# ## 2 · Implement: find and cache blocks
#
# *hard, 25 minutes*
#
# Your own prefix cache. It inherits taking and giving back from the engine's manager, and replaces the two
# methods by which blocks are found. What you can use:
#
# | | |
# |:--|:--|
# | `seq.token_ids` | the tokens that are known: the prompt, and the answer so far |
# | `seq.num_scheduled` | how many of its first tokens are computed, or will be in the step being planned |
# | `seq.block_table` | its block ids |
# | `self.hash_to_block_id` | the cache: a dict from a block's key to its id |
# | `self.blocks[i].hash` | the key under which block `i` is cached, or None; who evicts it looks here |
# | `hash_block(parent, tokens)` | a key from the parent's key (`b""` for the first block) and a tuple of tokens |
#
# `find_cached_blocks` returns the ids of the cached blocks of a sequence's beginning: the run of known keys from the first
# block on, whole blocks only. It takes nothing. (The engine sees to the last token, and counts references.)
#
# `cache_full_blocks` enters the sequence's blocks, those that are full of tokens that are known *and* scheduled. It is
# called again and again as a sequence grows. If a key is in the cache already, that block stays the cached one.


# %% tags=["exercise-my_prefix_cache"]
class MyPrefixCache(BlockManager):
    def find_cached_blocks(self, seq):
        """Ids of the cached blocks that hold the longest beginning of the sequence."""
        ### BEGIN SOLUTION walk the full blocks, chain their keys, stop at the first unknown one
        hits, key = [], b""
        for start in range(0, len(seq.token_ids) - self.block_size + 1, self.block_size):
            key = hash_block(key, tuple(seq.token_ids[start : start + self.block_size]))
            if key not in self.hash_to_block_id:
                break
            hits.append(self.hash_to_block_id[key])
        return hits
        ### END SOLUTION

    def cache_full_blocks(self, seq):
        """Enter each full block whose tokens are known and scheduled."""
        ### BEGIN SOLUTION chain the keys of the full blocks, and enter those that are new
        key, size = b"", self.block_size
        num_full = min(seq.num_scheduled, len(seq.token_ids)) // size
        for index, block_id in enumerate(seq.block_table[:num_full]):
            key = hash_block(key, tuple(seq.token_ids[index * size : (index + 1) * size]))
            if key not in self.hash_to_block_id:
                self.hash_to_block_id[key] = block_id
                self.blocks[block_id].hash = key
        ### END SOLUTION


# %%
lesson04.check_my_prefix_cache(MyPrefixCache)

# %% [markdown]
# Passed, it has served requests in the engine, and found as many tokens as the engine's own. What the engine's
# has and yours has not: it keeps a sequence's keys, where yours hashes all again at every step, and it compares
# the tokens of a hit, where yours trusts the key.
#
# <details><summary>Hint 1: a nudge</summary>
#
# Both methods walk over the same keys: each is made from the one before it. What differs is where they stop.
#
# </details>
# <details><summary>Hint 2: the steps</summary>
#
# `find_cached_blocks`: `key = b""`; for each full block of `seq.token_ids`, `key = hash_block(key, tokens)`; if it is not in
# `self.hash_to_block_id`, stop; else append the block's id. `cache_full_blocks`: full blocks are `min(num_scheduled,
# len(token_ids)) // block_size`; chain the same way; a key that is not in the cache is entered, in
# `self.hash_to_block_id` and as the block's `hash`.
#
# </details>
# <details><summary>Hint 3: the solution</summary>
#
# {{solution my_prefix_cache}}
#
# </details>

# %% [markdown]
# ## 3 · Break and fix: a key that forgets
#
# *easy, 10 minutes*
#
# The function below makes the keys of a text's blocks. In the demonstration an engine trusts them, with blocks
# of 4. It has answered the beginning of the dragon's question and a question about a fox, which differs in the
# animal alone. Now it is asked about the dragon; then once more, with an empty cache.


# %% tags=["exercise-block_keys"]
def block_keys(token_ids, block_size):
    """The key of each full block of a text, in order."""
    keys, parent = [], b""
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        key = hash_block(parent, tuple(token_ids[start : start + block_size]))
        keys.append(key)
        ### BEGIN SOLUTION
        parent = key
        ### INSTEAD
        # # the next block
        ### END SOLUTION
    return keys


# %%
lesson04.ask_about_the_dragon(block_keys)

# %% [markdown]
# Found should be 12 tokens, the dragon's own beginning. Which blocks were found beyond it, and why? Repair the
# function.

# %%
lesson04.check_block_keys(block_keys)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# Print the keys of two texts with the same second block and different first ones. Compare the second keys.
#
# </details>
# <details><summary>Hint 2: the steps</summary>
#
# `parent` is nothing for every block, so a key stands for a block's own tokens alone. It must stand for all
# tokens up to the block's end: the key just made is the next block's parent.
#
# </details>
# <details><summary>Hint 3: the solution</summary>
#
# {{solution block_keys}}
#
# </details>

# %% [markdown]
# ## 4 · Break and fix: nothing left to run
#
# *easy, 10 minutes*
#
# When a request is admitted, the scheduler asks where to begin computing. What was found in the cache need not be
# computed again, so the answer seems clear. In the demonstration a prompt of 32 tokens is asked twice, with
# blocks of 16.


# %% tags=["exercise-first_to_compute"]
def first_to_compute(num_tokens, num_hits, block_size):
    """Position of the first token to compute; the first `num_hits` blocks are cached."""
    ### BEGIN SOLUTION
    return min(num_hits * block_size, num_tokens - 1)
    ### INSTEAD
    # return num_hits * block_size
    ### END SOLUTION


# %%
lesson04.ask_twice(first_to_compute)

# %% [markdown]
# Engines have crashed here, waited for ever, or answered with another request's token. Repair it, so that no
# more is computed than must be.

# %%
lesson04.check_first_to_compute(first_to_compute)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# What does the first answer token come from, and is that in the cache?
#
# </details>
# <details><summary>Hint 2: the steps</summary>
#
# From the last prompt token's query, through all layers: queries are not kept. So at least one token is
# computed, also if all are cached: begin at `num_tokens - 1` at the latest.
#
# </details>
# <details><summary>Hint 3: the solution</summary>
#
# {{solution first_to_compute}}
#
# </details>
