# %% [markdown]
# # 09 · Exercises: the whole ladder
#
# The last three exercises, about 45 minutes. Write in the marked cells, run them, then run the check below.
# Hints stand below each exercise, in three folds: a nudge, the steps, the solution. No GPU is needed.

# %%
import torch

from course.checks import lesson09
from course.checks.learner import joined, own_pieces
from course.serving import start_engine
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler

torch.set_num_threads(1)

# %% [markdown]
# ## 1 · Predict: how fast can a decode step be?
#
# *medium, 5 minutes*
#
# A GPU reads 3.35 TB/s ($3.35 \cdot 10^{12}$ bytes) and computes 990 TFLOP/s. The model has $0.6 \cdot 10^9$
# weights, 28 layers, 8 KV heads of 128 numbers; a number takes two bytes. 128 requests decode, and each has
# 1,000 tokens in the cache.
#
# - `read_gb`: gigabytes ($10^9$) that one step must read: every weight once, and all keys and values.
# - `step_ms`: milliseconds a step takes at least.
# - `tokens_per_second`: output tokens a second at most.
# - `share`: the step was measured at 7.1 ms. What share of the roofline is that? (Between 0 and 1.)
# - `rows`: a row costs two FLOPs a weight. At how many rows does computing take as long as reading the weights?
#
# Within 1% is right.

# %% tags=["exercise-roofline"]
### BEGIN SOLUTION
read_gb = (0.6e9 * 2 + 128 * 1000 * 2 * 28 * 8 * 128 * 2) / 1e9
step_ms = read_gb / 3350 * 1e3
tokens_per_second = 128 / step_ms * 1e3
share = step_ms / 7.1
rows = 990 / 3.35
### INSTEAD
# read_gb = None
# step_ms = None
# tokens_per_second = None
# share = None
# rows = None
### END SOLUTION

# %%
lesson09.check_roofline(read_gb, step_ms, tokens_per_second, share, rows)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# Which is larger here, the weights or the cache? And who shares the reading of weights?
#
# </details>
# <details><summary>Hint 2: the steps</summary>
#
# Weights: two bytes each, once a step. A token in the cache: $2 \cdot 28 \cdot 8 \cdot 128 \cdot 2$ bytes; there
# are 128 · 1,000. Divide by the bandwidth. A step gives each request one token. `rows`: $r \cdot 2W / 990 =
# 2W / 3.35$.
#
# </details>
# <details><summary>Hint 3: the solution</summary>
#
# {{solution roofline}}
#
# </details>

# %% [markdown]
# ## 2 · Implement: your engine
#
# *medium, 20 minutes*
#
# `own_pieces()` reads your saved pages, and runs the check of each piece. What does not pass is None:
#
# | key | what it is |
# |:--|:--|
# | `"my_blocks"` | 03: allocates and frees; a `BlockManager` |
# | `"my_prefix_cache"` | 04: matches and registers; a `BlockManager` |
# | `"my_scheduler"` | 05: the loop; a `Scheduler` |
# | `"my_store"` | 06: stores keys and values; a function |

# %%
pieces = own_pieces()

# %% [markdown]
# `my_engine` puts them into the real engine. Where a piece is None, the engine's own takes its place.
# `joined(A, B)` is one class with the methods of both; where both define one, A's counts.
# `start_engine(block_manager_class, scheduler_class=..., store_kv=..., **options)` starts it; a `store_kv` of
# None is the engine's own.


# %% tags=["exercise-my_engine"]
def my_engine(pieces, **options):
    """An engine of these pieces; its options are start_engine's."""
    ### BEGIN SOLUTION join what manages blocks, and start an engine with every piece there is
    managers = [pieces[name] for name in ("my_prefix_cache", "my_blocks") if pieces[name]]
    return start_engine(
        joined(*managers) if managers else BlockManager,
        scheduler_class=pieces["my_scheduler"] or Scheduler,
        store_kv=pieces["my_store"],
        **options,
    )
    ### END SOLUTION


# %%
lesson09.check_my_engine(my_engine)

# %% [markdown]
# Your engine and the finished one, on the same requests, by turns; their tokens must be the same.

# %%
lesson09.race(my_engine, pieces)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# Two pieces are block managers, and the engine takes one class. What if only one of the two is there?
#
# </details>
# <details><summary>Hint 2: the steps</summary>
#
# List those of the two managers that are not None. Join them, or take `BlockManager` if there is none. `x or
# Scheduler` is `Scheduler` where x is None. Hand on `**options`.
#
# </details>
# <details><summary>Hint 3: the solution</summary>
#
# {{solution my_engine}}
#
# </details>

# %% [markdown]
# ## 3 · Break and fix: a benchmark that lies
#
# *medium, 20 minutes*
#
# Wanted: output tokens a second of an engine that is warm. The engine below is made of paper, with a clock of
# its own, so that every number is known: it gives 100 tokens a second, and compiles for 5 seconds when it is
# first used. `generate` returns when all is *launched*; `synchronize` waits until the GPU is done.


# %% tags=["exercise-benchmark"]
def benchmark(engine, prompts, count):
    """Output tokens a second; ValueError if a request did not get its `count` tokens."""
    ### BEGIN SOLUTION
    engine.generate(prompts, count)  # compiles
    engine.synchronize()
    start = engine.clock()
    answers = engine.generate(prompts, count)
    engine.synchronize()
    seconds = engine.clock() - start
    if any(len(answer) != count for answer in answers):
        raise ValueError("a request did not get its tokens")
    return sum(len(answer) for answer in answers) / seconds
    ### INSTEAD
    # start = engine.clock()
    # answers = engine.generate(prompts, count)
    # seconds = engine.clock() - start
    # tokens = sum(len(prompt) + count for prompt in prompts)
    # return tokens / seconds
    ### END SOLUTION


# %%
lesson09.tell_the_benchmark(benchmark)

# %% [markdown]
# It lies four times, and lies may cancel. Find all four.

# %%
lesson09.check_benchmark(benchmark)

# %% [markdown]
# Passed? On a real engine warm up with *other* prompts: the same ones are in the prefix cache the second time,
# and the benchmark would lie a fifth way.
#
# <details><summary>Hint 1: a nudge</summary>
#
# When does the clock start, when does it stop, what is counted, and was it delivered?
#
# </details>
# <details><summary>Hint 2: the steps</summary>
#
# Run once and wait, before the clock starts. Wait again before it stops. Count answers' tokens, not prompts'.
# Raise if an answer is shorter than asked for.
#
# </details>
# <details><summary>Hint 3: the solution</summary>
#
# {{solution benchmark}}
#
# </details>
