# %% [markdown]
# # 05 · Exercises: requests come and go
#
# Three exercises on [lesson 05](../notebooks/05_scheduler.ipynb), about 55 minutes. Write in the marked cells,
# run them, then run the check below. Hints stand below each exercise, in three folds: a nudge, the steps, the
# solution. Save this page when you are done: the last lesson runs what you wrote here.

# %%
import torch

from course.checks import lesson05
from nanovllm.engine.scheduler import ScheduledSequence, Scheduler
from nanovllm.engine.sequence import SequenceStatus

torch.set_grad_enabled(False)
torch.set_num_threads(1)

# %% [markdown]
# ## 1 · Predict: four requests under a budget
#
# *medium, 10 minutes*
#
# The engine's scheduler: three rows, a budget of 8 tokens a step, 8 blocks of 4 tokens, no prefix cache. Four
# requests wait, in this order, each with an answer of 6 tokens:
#
# | | A | B | C | D |
# |:--|--:|--:|--:|--:|
# | prompt | 5 | 12 | 4 | 6 |
#
# Write down step by step how many tokens each computes.
#
# - `b_in_step_2`: how many tokens of B are in step 2?
# - `c_answers`: in which step does C get its first answer token? (The first step is 1.)
# - `step_3`: how many tokens does step 3 compute in all?
# - `goes_back`: in step 5 A needs a third block, and none is free. Who is preempted? (`"A"`, `"B"`, ...)
# - `computed_again`: when that one is admitted again, how many tokens does its next step compute?

# %% tags=["exercise-four_requests"]
### BEGIN SOLUTION
b_in_step_2 = 8 - 1
c_answers = 3
step_3 = 1 + 2 + 4
goes_back = "C"
computed_again = 4 + 2
### INSTEAD
# b_in_step_2 = None
# c_answers = None
# step_3 = None
# goes_back = None
# computed_again = None
### END SOLUTION

# %%
lesson05.check_four_requests(b_in_step_2, c_answers, step_3, goes_back, computed_again)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# In step 1 A computes its 5 tokens, and B what is left of 8. Running requests always take theirs first. And
# what does a request that goes back still know?
#
# </details>
# <details><summary>Hint 2: the steps</summary>
#
# Step 1: A 5, B 3. Step 2: A 1, B 7. Step 3: A 1, B the last 2, and C's whole prompt, which gives it its first
# token. Step 4: one each. Then blocks run out, and the youngest of those that run goes back. Its prompt and its
# answer tokens stay known; all of them are computed again.
#
# </details>
# <details><summary>Hint 3: the solution</summary>
#
# {{solution four_requests}}
#
# </details>

# %% [markdown]
# ## 2 · Implement: the scheduler's loop
#
# *hard, 25 minutes*
#
# `schedule` calls the two methods below, one after the other. They append rows to `batch` until the budget is
# spent. What you can use:
#
# | | |
# |:--|:--|
# | `self.running`, `self.waiting` | a list, oldest first; a deque, its head at the left |
# | `seq.num_unscheduled` | tokens the next step could compute for it; may be 0 |
# | `self.allocate_or_preempt(seq, n)` | lets `seq` grow to `n` tokens, preempting the youngest; False if that failed |
# | `self.schedule_tokens(seq, n, admitted)` | the row with the next `n` tokens of `seq`; moves `num_scheduled` |
# | `self.block_manager.find_cached_blocks(seq)` | cached blocks of its beginning, a list; each holds `self.block_manager.block_size` tokens |
# | `self.can_admit(seq, cached_block_ids)` | whether there are blocks for it, and headroom |
# | `self.admit(seq, cached_block_ids, num_computed)` | takes its blocks and makes it run |
#
# **Running.** Each gets what it could compute, or what is left of the budget. Skip one that has nothing to
# compute. If there is no room for one, stop: nobody younger gets anything. While you walk, `allocate_or_preempt`
# may send somebody back to the queue whom you have not reached yet: its `status` is then no longer
# `SequenceStatus.RUNNING`, and it is not to be planned. Return the budget that is left.
#
# **Waiting.** While somebody waits and budget and rows (`self.max_num_seqs`) are left, look at the head of the
# queue. Cached tokens need not be computed, but at least one token must. What does not fit in the budget is for
# the next step; without `self.enable_chunked_prefill` all that is left to compute of the prompt must fit, or it
# waits. If the head does not fit, stop: nobody overtakes it. Tell `schedule_tokens` that these rows are `admitted`.


# %% tags=["exercise-my_scheduler"]
class MyScheduler(Scheduler):
    def schedule_running(self, batch, budget):
        """Plan the running sequences, oldest first; returns the budget that is left."""
        ### BEGIN SOLUTION give each running sequence its tokens, as far as budget and room last
        for seq in list(self.running):
            num_tokens = min(seq.num_unscheduled, budget)
            if num_tokens == 0 or seq.status is not SequenceStatus.RUNNING:
                continue
            if not self.allocate_or_preempt(seq, seq.num_scheduled + num_tokens):
                break
            batch.append(self.schedule_tokens(seq, num_tokens))
            budget -= num_tokens
        return budget
        ### END SOLUTION

    def schedule_waiting(self, batch, budget):
        """Admit waiting sequences, the head of the queue first."""
        ### BEGIN SOLUTION admit from the head of the queue while budget, rows and blocks last
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            seq = self.waiting[0]
            cached_block_ids = self.block_manager.find_cached_blocks(seq)
            num_cached = len(cached_block_ids) * self.block_manager.block_size
            num_computed = min(num_cached, len(seq.token_ids) - 1)
            missing = len(seq.token_ids) - num_computed
            if missing > budget and not self.enable_chunked_prefill:
                break
            if not self.can_admit(seq, cached_block_ids):
                break
            self.waiting.popleft()
            self.admit(seq, cached_block_ids, num_computed)
            batch.append(self.schedule_tokens(seq, min(missing, budget), admitted=True))
            budget -= min(missing, budget)
        ### END SOLUTION


# %%
lesson05.check_my_scheduler(MyScheduler)

# %% [markdown]
# Passed, it has made the same plans as the engine's scheduler for a hundred random workloads, and answered
# requests.
#
# <details><summary>Hint 1: a nudge</summary>
#
# Lesson 05's `serve` is both loops in small. What is new: somebody may leave the list while you walk over it (so
# walk over a copy), and cached tokens.
#
# </details>
# <details><summary>Hint 2: the steps</summary>
#
# Running: for each of `list(self.running)`, `n = min(seq.num_unscheduled, budget)`; `continue` if 0 or not
# running; `break` unless `allocate_or_preempt(seq, seq.num_scheduled + n)`; append `schedule_tokens(seq, n)`; take
# `n` off the budget.
# Waiting: `cached_block_ids = find_cached_blocks(seq)`; `num_computed` is what these blocks hold, but at most
# `len(token_ids) - 1`; the rest, cut at the budget; `break` if it may not be cut, or does not fit; `popleft`,
# `admit`, append `schedule_tokens(..., admitted=True)`.
#
# </details>
# <details><summary>Hint 3: the solution</summary>
#
# {{solution my_scheduler}}
#
# </details>

# %% [markdown]
# ## 3 · Break and fix: computed, before it is
#
# *hard, 20 minutes*
#
# A scheduler with one counter less to think about: it moves `num_computed` when it plans, as then all is in one
# place. For weeks all goes well. Then one step fails, for lack of memory; the engine rolls it back and goes on.
# In the demonstration the third step of three stories fails, and then each is asked for once more.


# %% tags=["exercise-early"]
class Early(Scheduler):
    def schedule_tokens(self, seq, num_tokens, admitted=False):
        start = seq.num_scheduled
        seq.num_scheduled += num_tokens
        ### BEGIN SOLUTION
        ### INSTEAD
        # seq.num_computed += num_tokens
        ### END SOLUTION
        self.block_manager.cache_full_blocks(seq)
        samples = seq.num_scheduled >= len(seq.token_ids)
        return ScheduledSequence(seq, start, num_tokens, samples, admitted)

    def update(self, batch, token_ids):
        """Take in a finished step; `token_ids` holds one id for each row that samples."""
        sampled, updated = iter(token_ids), []
        for row in batch:
            seq = row.seq
            ### BEGIN SOLUTION
            seq.num_computed += row.num_tokens
            ### INSTEAD
            # # its tokens are counted already
            ### END SOLUTION
            token_id = next(sampled) if row.samples else None
            if token_id is not None and not seq.is_finished:  # else the extra token is dropped
                seq.append(token_id)
                self.block_manager.cache_full_blocks(seq)
                updated.append(seq)
            if seq.is_finished:
                self.remove_finished(seq)
        return updated


# %%
lesson05.tell_with_a_failed_step(Early)

# %% [markdown]
# `roll_back` (shown in the lesson) takes out of the prefix cache what was entered beyond `num_computed`: those
# keys and values were never written. What did it find here? Move the counter to where it belongs.

# %%
lesson05.check_early(Early)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# Between planning and taking in lies the forward pass, which may fail. Which of the two calls is made when it
# does?
#
# </details>
# <details><summary>Hint 2: the steps</summary>
#
# `num_scheduled` says what was planned, `num_computed` what has succeeded; their difference is in flight. So
# the first moves in `schedule_tokens`, the second in `update`, by the row's number of tokens.
#
# </details>
# <details><summary>Hint 3: the solution</summary>
#
# {{solution early}}
#
# </details>
