# %% [markdown]
# # 07 · Exercises: a step that the host does not hold up
#
# Three exercises on [lesson 07](../notebooks/07_cuda_graphs.ipynb), about 40 minutes. Write in the marked cells,
# run them, then run the check below. Hints stand below each exercise, in three folds: a nudge, the steps, the
# solution. Save this page when you are done.
#
# With a GPU `Recording` captures CUDA graphs; without one it does again what torch did. The rules are the same,
# and all checks run on both.

# %%
from functools import partial

import torch

from course.checks import lesson07
from course.labs.recording import Recording

torch.set_grad_enabled(False)
torch.set_num_threads(1)

# %% [markdown]
# ## 1 · Predict: launches, padding, two loops
#
# *easy, 5 minutes*
#
# A decode step has 200 kernels. The host takes 30 µs to launch one, and each runs for 5 µs once it is launched
# and the one before is done.
#
# - `eager_us`: when is the last kernel done, counted from when the first launch begins?
# - `replayed_us`: now the step is captured. The host takes 20 µs to replay it, then the kernels run without a gap.
#   When is the last one done?
# - `padded`: steps are captured for 1, 2, 4, 8, 16, 24 and 32 rows. With how many rows is a batch of 17 padded?
# - `overlapped_ms`: the host takes 2 ms to plan a step, the device 6 ms to run it. How long do 50 steps take in
#   the overlapped loop?

# %% tags=["exercise-launches_and_padding"]
### BEGIN SOLUTION
eager_us = 200 * 30 + 5
replayed_us = 20 + 200 * 5
padded = 24 - 17
overlapped_ms = 2 + 50 * 6
### INSTEAD
# eager_us = None
# replayed_us = None
# padded = None
# overlapped_ms = None
### END SOLUTION

# %%
lesson07.check_launches_and_padding(eager_us, replayed_us, padded, overlapped_ms)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# Two workers, one after the other, on many pieces: the slower one sets the pace. What of the faster one's work is
# still seen?
#
# </details>
# <details><summary>Hint 2: the steps</summary>
#
# Launching is slower: the last launch ends at 200 times 30, and then its kernel runs. Replayed: one launch, then
# all kernels. Padding: up to the smallest size that holds 17. Overlapped: running is slower than planning, so all
# steps run one after the other; only the first one's planning hides behind nothing.
#
# </details>
# <details><summary>Hint 3: the solution</summary>
#
# {{solution launches_and_padding}}
#
# </details>

# %% [markdown]
# ## 2 · Implement: a captured decode step
#
# *hard, 20 minutes*
#
# `model(ids, positions)` is a small decoder: for each row a token and its position go in, the next token's id comes
# out. It stores keys and values; a row with position −1 stores nothing. Two buffers feed it, `self.ids` and
# `self.positions`, both int64, with a row for each request up to the largest size. All positions are −1 at first,
# so captures store nothing.
#
# **`step(size)`** is what is captured: run the model on the first `size` rows of both buffers, write the new ids
# *into* these rows, and move their positions on by one, but those of −1 stay −1. The next replay then needs
# nothing from the host.
#
# **`run(ids, positions, count)`** decodes `count` tokens for $n$ rows, where `ids` and `positions` are [n]. Take
# the smallest captured size that holds $n$ rows; write the rows into the buffers; rows beyond $n$ are padding, and
# may hold an earlier batch. Then replay `count` times: `self.recordings[size].replay()`. Return all new ids,
# [count, n]. (What a buffer holds is gone after the next replay: copy it with `.clone()`.)


# %% tags=["exercise-my_decode"]
class MyDecode:
    def __init__(self, model, sizes, device):
        self.model = model
        self.ids = torch.zeros(max(sizes), dtype=torch.int64, device=device)
        self.positions = torch.full_like(self.ids, -1)
        self.recordings = {}
        for size in sorted(sizes, reverse=True):
            self.recordings[size] = Recording(partial(self.step, size), device)

    def step(self, size):
        """One token more for the first `size` rows, from buffer to buffer."""
        ### BEGIN SOLUTION run the model on the buffers, and write what the next step needs into them
        ids, positions = self.ids[:size], self.positions[:size]
        ids.copy_(self.model(ids, positions))
        positions += positions >= 0
        ### END SOLUTION

    def run(self, ids, positions, count):
        """`count` tokens for each of n rows, from ids [n] at positions [n]: [count, n]."""
        ### BEGIN SOLUTION choose a size, fill the buffers, replay, and keep what comes out
        n = len(ids)
        size = min(size for size in self.recordings if size >= n)
        self.ids[:n] = ids
        self.positions[:n] = positions
        self.positions[n:] = -1
        tokens = []
        for _ in range(count):
            self.recordings[size].replay()
            tokens.append(self.ids[:n].clone())
        return torch.stack(tokens)
        ### END SOLUTION


# %%
lesson07.check_my_decode(MyDecode)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# The capture notes addresses. Which of your lines write into a buffer, and which give its name to another tensor?
# And whose keys would a padding row overwrite?
#
# </details>
# <details><summary>Hint 2: the steps</summary>
#
# `step`: slices `[:size]` of both buffers are views, so `ids.copy_(...)` writes into the buffer. `positions += 1`
# would wake the padding; add `positions >= 0`, which is 1 or 0. `run`: `min` of the sizes that are at least `n`;
# `self.ids[:n] = ids` and the same for positions; `self.positions[n:] = -1`; in a loop replay, and append
# `self.ids[:n].clone()`; at the end `torch.stack`.
#
# </details>
# <details><summary>Hint 3: the solution</summary>
#
# {{solution my_decode}}
#
# </details>

# %% [markdown]
# ## 3 · Break and fix: a batch between two sizes
#
# *medium, 15 minutes*
#
# For which sizes should a step be captured? `capture_sizes` has nano-vLLM's rule. Any batch of up to
# `max_num_seqs` requests may come, and the buffers have that many rows. Run the demonstration.


# %% tags=["exercise-between"]
def capture_sizes(max_num_seqs):
    """Batch sizes to capture, rising."""
    ### BEGIN SOLUTION
    sizes = [1, 2, 4, 8, *range(16, max_num_seqs, 16)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]
    ### INSTEAD
    # return [1, 2, 4, 8, *range(16, max_num_seqs + 1, 16)]
    ### END SOLUTION


# %%
lesson07.tell_sizes(capture_sizes)

# %% [markdown]
# With at most 256 requests, the usual choice, all goes well, so nobody saw it. Repair the rule for every
# `max_num_seqs`. What it must keep: few sizes, since each costs time and memory at the start, and few rows of
# padding. And a size above `max_num_seqs` has no rows in the buffers.

# %%
lesson07.check_between(capture_sizes)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# What is the largest batch, and which size holds it?
#
# </details>
# <details><summary>Hint 2: the steps</summary>
#
# Keep of the rule's sizes those below `max_num_seqs`, and append `max_num_seqs` itself: then no batch is above the
# last size, and no size above the largest batch.
#
# </details>
# <details><summary>Hint 3: the solution</summary>
#
# {{solution between}}
#
# </details>
