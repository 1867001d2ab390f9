# %% [markdown]
# # 03 · Exercises: blocks instead of rows
#
# Four exercises on [lesson 03](../notebooks/03_paged_blocks.ipynb), about 55 minutes. Write in the marked
# cells, run them, then run the check below. Hints stand below each exercise, in three folds: a nudge, the
# steps, the solution. Save this page when you are done: the last lesson runs what you wrote here.

# %%
import torch

from course.checks import lesson03
from course.serving import ask, start_engine
from nanovllm.engine.block_manager import BlockManager

torch.set_grad_enabled(False)
torch.set_num_threads(1)

# %% [markdown]
# ## 1 · Predict: blocks, empty places, a slot
#
# *easy, 5 minutes*
#
# Three requests hold 10, 33 and 64 tokens.
#
# - `blocks`: how many blocks of 16 do the three hold together?
# - `empty`: how many places in these blocks are empty?
# - `small_blocks`: how many blocks would it be with a block size of 4?
# - `slot`: with a block size of 16, a request's table is `[3, 9, 4]`. Which slot has the token at position
#   37? (Positions count from 0.)

# %% tags=["exercise-blocks_and_slots"]
### BEGIN SOLUTION
blocks = 1 + 3 + 4
empty = 16 * blocks - (10 + 33 + 64)
small_blocks = 3 + 9 + 16
slot = 4 * 16 + 5
### INSTEAD
# blocks = None
# empty = None
# small_blocks = None
# slot = None
### END SOLUTION

# %%
lesson03.check_blocks_and_slots(blocks, empty, small_blocks, slot)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# A request owns whole blocks, and shares none here. Is 64 tokens 4 blocks or 5?
#
# </details>
# <details><summary>Hint 2: the steps</summary>
#
# Divide by the block size and round up, for each request by itself. Empty places: all places less all
# tokens. Position 37: `37 // 16` says which entry of the table, `37 % 16` the offset in that block.
#
# </details>
# <details><summary>Hint 3: the solution</summary>
#
# {{solution blocks_and_slots}}
#
# </details>

# %% [markdown]
# ## 2 · Implement: the slot mapping of a batch of prompts
#
# *medium, 20 minutes*
#
# The new tokens of all rows stand in one flat row, as in the lesson: row $i$ has those from `query_start_loc[i]` up to
# `query_start_loc[i + 1]`. Its context, `seq_lens[i]` tokens, *ends* with them: earlier ones were stored in an
# earlier step. A padding row has a context of 0; what it computes must not be stored.
#
# With a block size of 4:
#
# | row | table | context | new | positions | slots |
# |--:|:--|--:|--:|:--|:--|
# | 0 | `[5, 2, 7]` | 10 | 3 | 7, 8, 9 | 11, 28, 29 |
# | 1 | `[1, 0, 0]` | 2 | 2 | 0, 1 | 4, 5 |
# | 2 | `[0, 0, 0]` | 0 | 2 | none | −1, −1 |
#
# Here `query_start_loc` is `[0, 3, 5, 7]`. A loop gives the right slots, but a step has thousands of tokens: try
# without. Return int64. (Tables are int32. A GPU's cache may have more than $2^{31}$ numbers, so an address
# must not be.)


# %% tags=["exercise-slot_mapping"]
def slot_mapping(block_tables, query_start_loc, seq_lens, block_size):
    """The slot of every new token: [num_tokens] int64; -1 for what must not be stored.

    block_tables: [rows, max_blocks] int32. query_start_loc: [rows + 1]. seq_lens: [rows].
    """
    ### BEGIN SOLUTION find each token's row, then its position, then its slot
    new = query_start_loc.diff()  # [rows]
    row = torch.arange(len(new)).repeat_interleave(new)  # [num_tokens]
    first = seq_lens - new  # the position of each row's first new token
    positions = first[row] + torch.arange(len(row)) - query_start_loc[row]
    positions = positions.clamp(min=0)  # those of padding are below 0
    blocks = block_tables[row, positions // block_size].long()
    slots = blocks * block_size + positions % block_size
    return slots.masked_fill(seq_lens[row] == 0, -1)
    ### END SOLUTION


# %%
lesson03.check_slot_mapping(slot_mapping)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# First make a list that says for each token which row it is in: `[0, 0, 0, 1, 1, 2, 2]`. All else can be
# looked up with it.
#
# </details>
# <details><summary>Hint 2: the steps</summary>
#
# `query_start_loc.diff()` counts each row's new tokens; `repeat_interleave` makes the list of rows. A token's position
# is its row's first one, `context - new`, plus how far it stands behind `query_start_loc[row]`. Table entry
# `position // block_size`, as int64, times `block_size`, plus `position % block_size`. Last, −1 where the
# context is 0. (Padding has positions below 0: clamp them before you look anything up.)
#
# </details>
# <details><summary>Hint 3: the solution</summary>
#
# {{solution slot_mapping}}
#
# </details>

# %% [markdown]
# ## 3 · Implement: take blocks, and give them back
#
# *medium, 15 minutes*
#
# Your own block manager. It inherits from the engine's, and replaces the two methods that lesson 03 was
# about. What you can use:
#
# | | |
# |:--|:--|
# | `seq.block_table` | the request's block ids, a list |
# | `self.block_size` | places in a block |
# | `self.allocate_block()` | takes the block that is free for longest, and returns its id; its `ref_count` is then 1 |
# | `self.blocks[i].ref_count` | in how many tables block `i` stands |
# | `self.free_block_ids` | the free blocks, an ordered dict of ids; `self.free_block_ids[i] = None` puts block `i` at its end |
#
# `allocate` grows a table until it holds `num_tokens` tokens, and does nothing if it does already. `free`
# gives all of a request's blocks back, **the last one first**. A block may stand in another table as well
# (lesson 04): only when nobody has it any more is it free. Afterwards the request holds no block.


# %% tags=["exercise-my_blocks"]
class MyBlocks(BlockManager):
    def allocate(self, seq, num_tokens):
        """Grow the sequence's table to hold `num_tokens` tokens; there are enough free blocks."""
        ### BEGIN SOLUTION take blocks until the table has room for num_tokens
        while len(seq.block_table) * self.block_size < num_tokens:
            seq.block_table.append(self.allocate_block())
        ### END SOLUTION

    def free(self, seq):
        """Give back all its blocks, the last one first."""
        ### BEGIN SOLUTION count each block's owner out, and queue what has no owner
        while seq.block_table:
            block_id = seq.block_table.pop()
            self.blocks[block_id].ref_count -= 1
            if self.blocks[block_id].ref_count == 0:
                self.free_block_ids[block_id] = None
        ### END SOLUTION
        seq.num_cached_blocks = 0  # for lesson 04


# %%
lesson03.check_my_blocks(MyBlocks)

# %% [markdown]
# Passed, it has served requests: the check ran it inside the engine.
#
# <details><summary>Hint 1: a nudge</summary>
#
# `allocate` is called before every step, also when the last block still has room. And a table whose blocks
# were given back must not name them any more.
#
# </details>
# <details><summary>Hint 2: the steps</summary>
#
# `allocate`: while the table's places are fewer than `num_tokens`, append a block taken. `free`: take the last
# id out of the table (`pop`), count down its `ref_count`, and if that is 0, put it at the end of `self.free_block_ids`;
# until the table is empty.
#
# </details>
# <details><summary>Hint 3: the solution</summary>
#
# {{solution my_blocks}}
#
# </details>

# %% [markdown]
# ## 4 · Break and fix: one token over the border
#
# *medium, 15 minutes*
#
# How many blocks do `num_tokens` tokens need? The manager below answers with a sum of its own, as engines do
# in many places, and some had it wrong by one. Run the demonstration, with blocks of 8: three stories by this
# manager, and the engine's.


# %% tags=["exercise-border"]
class Border(BlockManager):
    def num_new_blocks(self, seq, num_tokens):
        """Blocks the sequence lacks to hold its first `num_tokens` tokens."""
        ### BEGIN SOLUTION
        needed = (num_tokens + self.block_size - 1) // self.block_size
        ### INSTEAD
        # needed = (num_tokens + self.block_size - 2) // self.block_size
        ### END SOLUTION
        return max(0, needed - len(seq.block_table))


# %%
prompts = lesson03.three_prompts()
right, ours = (
    ask(start_engine(kind, block_size=8), prompts, count=24) for kind in (BlockManager, Border)
)
for good, seq in zip(right, ours, strict=True):
    print(f"the engine: {good.detokenizer.text!r}\nthis one:   {seq.detokenizer.text!r}\n")

# %% [markdown]
# Nothing crashes. Make a table of `num_tokens` from 1 to 9, `needed` with blocks of 4, and what it should be.
# Then repair the sum. (A token without a block is written to whatever the padding of the table names: block 0,
# which is somebody's.)

# %%
lesson03.check_border(Border)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# Five tokens, blocks of 4. How many blocks, and what does the sum say?
#
# </details>
# <details><summary>Hint 2: the steps</summary>
#
# To divide and round up: `(n + B - 1) // B`, or `-(-n // B)`. With `- 2` the first token of each block finds
# no block until the second one comes. With `n // B + 1` a full block would ask for one more.
#
# </details>
# <details><summary>Hint 3: the solution</summary>
#
# {{solution border}}
#
# </details>
