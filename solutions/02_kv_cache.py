# %% [markdown]
# # 02 · Exercises: keep the keys and values
#
# Three exercises on [lesson 02](../notebooks/02_kv_cache.ipynb), about 45 minutes. Write in the marked
# cells, run them, then run the check below. Hints stand below each exercise, in three folds: a nudge,
# the steps, the solution.

# %%
import torch

from course.checks import lesson02
from course.checks.learner import stage_with
from course.stages.common import greedy

torch.set_grad_enabled(False)
torch.set_num_threads(1)

# %% [markdown]
# ## 1 · Predict: how many requests fit
#
# *easy, 5 minutes*
#
# Qwen3-32B has $L = 64$ layers, $H = 64$ query heads, $H_{kv} = 8$ key and value heads and $D = 128$
# numbers in a head, in bfloat16. A GPU of 80 GB ($80 \cdot 10^9$ bytes) holds 66 GB of weights and 3 GB of
# other things. The rest is for keys and values.
#
# - `token_bytes`: bytes a token.
# - `fit`: how many requests of 2,048 tokens fit, if each takes what it needs?
# - `reserved`: how many fit, if each reserves a row of 8,192 places?

# %% tags=["exercise-cache_size"]
### BEGIN SOLUTION
token_bytes = 2 * 64 * 8 * 128 * 2
fit = 11_000_000_000 // (2048 * token_bytes)
reserved = 11_000_000_000 // (8192 * token_bytes)
### INSTEAD
# token_bytes = None
# fit = None
# reserved = None
### END SOLUTION

# %%
lesson02.check_cache_size(token_bytes, fit, reserved)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# Each layer keeps a key *and* a value. Which heads have one: those of $H$, or those of $H_{kv}$?
#
# </details>
# <details><summary>Hint 2: the steps</summary>
#
# Bytes a token: $2 \cdot L \cdot H_{kv} \cdot D \cdot b$ with $b = 2$. Room: $80 - 66 - 3$ GB. Divide by the
# bytes of a request and round down: a request that fits by half does not run.
#
# </details>
# <details><summary>Hint 3: the solution</summary>
#
# {{solution cache_size}}
#
# </details>

# %% [markdown]
# ## 2 · Implement: a decode step over a cache
#
# *medium, 20 minutes*
#
# One layer, one new token in each row of a batch. A row's newest token has a query, a key and a value; the
# rows have got to different lengths. With lengths 2 and 4, the new tokens stand at places 2 and 4:
#
# | row | `lengths` | its key and value go to | its query reads |
# |--:|--:|--:|--:|
# | 0 | 2 | place 2 | places 0 to 2 |
# | 1 | 4 | place 4 | places 0 to 4 |
#
# Store, in place; then attend over what each row has, its new token included. What stands behind it in the
# cache is rubbish. With grouped heads, query head $h$ uses key and value head $h // (H / H_{kv})$. Scores are
# divided by $\sqrt D$. A loop over rows gives the right numbers, but a batch may have 256: try without.


# %% tags=["exercise-decode_step"]
def decode_step(query, key, value, k_cache, v_cache, lengths):
    """Store one token a row and attend: returns [rows, H, D].

    query: [rows, H, D]. key, value: [rows, H_kv, D]. k_cache, v_cache: [rows, places, H_kv, D].
    lengths: [rows], tokens each row had in the cache before this one.
    """
    ### BEGIN SOLUTION store key and value at place lengths[row], then attend
    row = torch.arange(len(lengths))
    k_cache[row, lengths], v_cache[row, lengths] = key, value
    group = query.shape[1] // key.shape[1]
    keys = k_cache.repeat_interleave(group, dim=2)  # [rows, places, H, D]
    values = v_cache.repeat_interleave(group, dim=2)
    scores = torch.einsum("rhd,rphd->rhp", query, keys) / query.shape[-1] ** 0.5
    behind = torch.arange(keys.shape[1]) > lengths[:, None]  # [rows, places]
    weights = scores.masked_fill(behind[:, None], -torch.inf).softmax(dim=-1)
    return torch.einsum("rhp,rphd->rhd", weights, values)
    ### END SOLUTION


# %%
lesson02.check_decode_step(decode_step)

# %% [markdown]
# If it passes, it has already told a story: the check ran it in all layers of the real model, and the tokens
# were those of the engine's own.
#
# <details><summary>Hint 1: a nudge</summary>
#
# Every token sees itself. So what must happen before the scores are computed?
#
# </details>
# <details><summary>Hint 2: the steps</summary>
#
# `k_cache[torch.arange(rows), lengths] = key`, the same for values. Repeat each key head for its group of
# query heads: `repeat_interleave` on the dimension of heads. Scores `[rows, H, places]` by `einsum`. Mask
# the places that are `> lengths[:, None]` with $-\infty$. Softmax, and the weighted sum of the values.
#
# </details>
# <details><summary>Hint 3: the solution</summary>
#
# {{solution decode_step}}
#
# </details>

# %% [markdown]
# ## 3 · Break and fix: positions that count the padding
#
# *medium, 20 minutes*
#
# Three prompts are padded on the right to the longest and answered together. Alone, each gets a good story.
# Run the next three cells: which rows go wrong, and which does not?

# %%
stage = stage_with()
prompts = lesson02.three_prompts()
print("tokens:", [len(prompt) for prompt in prompts])


# %% tags=["exercise-answer_together"]
def answer_together(stage, prompts, count):
    """`count` greedy tokens for each prompt, computed as one batch: a list for each."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    longest = int(lengths.max())
    cache = stage.new_cache(len(prompts), longest + count)
    logits, answers = stage.prefill(prompts, cache), []
    for step in range(count):
        next_ids, _ = greedy(logits)
        answers.append(next_ids)
        ### BEGIN SOLUTION
        positions = lengths + step
        ### INSTEAD
        # positions = torch.full_like(lengths, longest + step)
        ### END SOLUTION
        logits = stage.decode(next_ids, positions, cache)  # writes and reads up to here
    return torch.tensor(answers).T.tolist()


# %%
lesson02.tell(answer_together(stage, prompts, 24))

# %% [markdown]
# `stage.decode` takes a position for each row. It stores the new token's key and value at that place, turns
# them by that position (RoPE), and reads all places up to it. Find what the short rows read, and repair it.

# %%
lesson02.check_answer_together(answer_together)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# A row of 8 tokens was padded to 21. Where does its first answer token belong, and where is it put? What
# stands in between?
#
# </details>
# <details><summary>Hint 2: the steps</summary>
#
# The bug is one line: all rows go on from the longest prompt's end. The short ones then read the padding's
# keys, which are rubbish, and are turned as if they stood far behind their own prompt. Each row must go on
# from its own length.
#
# </details>
# <details><summary>Hint 3: the solution</summary>
#
# {{solution answer_together}}
#
# </details>
