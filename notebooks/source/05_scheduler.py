# %% [markdown]
# # 05 · Requests come and go
#
# | This lesson | |
# |---|---|
# | Minutes | 45 |
# | Difficulty | medium |
# | Hardware | any laptop; a GPU is used at the end if there is one |
# | Needs | lessons 00 to 04 |
# | Ends in | `nanovllm/engine/sequence.py`, `nanovllm/engine/waiting_queue.py`, `nanovllm/engine/scheduler.py` |

# %% [markdown]
# ## What hurts now
#
# Stage 04's batch is **static**: nobody comes in until the last is done. Of 16 requests 11 fit in the cache; five wait.
# A batch runs as many steps as its longest answer, here 64; a row whose request is done is **idle**. **Predict**: the
# answers have 543 tokens. What share of all row-steps, $64 \cdot 11 + 64 \cdot 5$, is idle?

# %%
import torch

from course import machine
from course.drawings import schedule_pictures as pictures
from course.measure.ladder_workload import ladder_workload
from course.models.choice import own_model
from course.show import plots
from course.show.display import show
from course.stages import ContinuousBatching, PrefixCache

torch.set_num_threads(1)
plots.use_style()
before = PrefixCache(own_model(), device="cpu")
workload = ladder_workload(before.vocab_size, device="cpu")
result = before.run(workload)
static = [record.rows for record in before.trace]  # of each step: (request, position, tokens)
idle = pictures.num_idle(static[:64], rows=11) + pictures.num_idle(static[64:], rows=5)
print(f"{idle} of {64 * 11 + 64 * 5} row-steps are idle: {idle / (64 * 16):.0%}")
print(f"time to first token: {min(result.ttft):.2f} s at best, {max(result.ttft):.2f} s at worst")
assert idle == 64 * 16 - sum(workload.num_outputs)

# %% [markdown]
# 543 tokens in 1,024 row-steps; and five users see nothing until a stranger's story is finished. A **scheduler** decides,
# before every step, who is in it and with how many tokens.
#
# ## What you will be able to do
#
# 1. **Build** a scheduler that mixes prompts and answers under a budget.
# 2. **Explain** preemption and headroom.
# 3. **Measure** what load does to throughput and waiting.
#
# ## The picture, and the symbols
#
# ![A step of 8 tokens takes one for A and B, four of C's prompt, two of D's.](../figures/one_step.svg)
#
# | symbol | meaning |
# |:--|:--|
# | known | prompt and answer tokens so far |
# | computed | of them, those with keys and values in the cache |
# | rows | requests that may run at once (`max_num_seqs`) |
# | budget | tokens a step may compute (`max_num_batched_tokens`) |
# | TTFT, TPOT | time to first token; per token after it |
#
# ## Step 1: fill the row at once
#
# A step brings each request's *computed* up to its *known*; then one more token is known. So the step that computes a prompt
# gives the first answer token, and the last is never computed.

# %%
from collections import deque
from dataclasses import dataclass


@dataclass
class Request:
    name: str
    prompt: int  # tokens
    answer: int
    computed: int = 0

    def __post_init__(self):
        self.known = self.prompt


def serve(requests, rows, budget=100, static=False):
    """Answer all requests; of each step, (name, first position, tokens) a row."""
    waiting, running, trace = deque(requests), [], []
    while waiting or running:
        if not (static and running):
            while waiting and len(running) < rows:
                running.append(waiting.popleft())
        step, left = [], budget
        for r in running:  # oldest first
            if count := min(r.known - r.computed, left):
                step.append((r.name, r.computed, count))
            r.computed, left = r.computed + count, left - count
            if r.computed == r.known:
                r.known += 1  # the model has said the next token
        running = [r for r in running if r.known < r.prompt + r.answer]
        trace.append(step)
    return trace


# %% [markdown]
# `static=True` is stage 04. Without it a free row is filled in the next step: **continuous batching**. **Predict**: three
# rows, and answers of A 6, B 2, C 4, D 5, E 3 tokens. How many steps does each way take?

# %% tags=["nbval-check-output"]
lengths = {"A": (3, 6), "B": (2, 2), "C": (4, 4), "D": (3, 5), "E": (2, 3)}
for static_batch, title in ((True, "Static"), (False, "Continuous")):
    requests = [Request(name, *both) for name, both in lengths.items()]
    flows = serve(requests, rows=3, static=static_batch)
    chart = pictures.rows_chart(flows, 3, title)
    show(chart.svg(), chart.alt)
assert pictures.num_idle(flows, 3) == 3 * 7 - (6 + 2 + 4 + 5 + 3)

# %% [markdown]
# $\max(6, 2, 4) + \max(5, 3) = 11$, and 7. In step 3, D's prompt (dark) is computed beside answer tokens of A and C: a step is
# neither prefill nor decode.
#
# ## Step 2: a budget, and prompts cut at its edge
#
# A long prompt holds up everyone in its step. So a step has a **budget**: running requests first, a prompt gets what is
# left, and its rest in the next steps: **chunked prefill**.
#
# **Predict**: a budget of 6; A has a prompt of 3 and an answer of 6, B 2 and 7, L 12 and 3. When does L get its first token?

# %% tags=["nbval-check-output"]
chunked = serve([Request("A", 3, 6), Request("B", 2, 7), Request("L", 12, 3)], rows=3, budget=6)
chart = pictures.requests_chart(chunked, {"A": 3, "B": 2, "L": 12}, "A budget of 6 tokens a step")
show(chart.svg(), chart.alt)
assert max(sum(count for _, _, count in step) for step in chunked) <= 6
assert all(name in [row[0] for row in step] for step in chunked[:6] for name in "AB")

# %% [markdown]
# In step 4: L gets what A and B leave, 1, 4, 4, and the last 3.
#
# ## Step 3: when blocks run out
#
# A request is admitted with blocks for the tokens it *knows*, and grows. If one cannot, the **youngest** gives up its
# blocks and goes back to the head of the queue: **preemption by recompute**. Its tokens stay known; all must be computed
# again (but those that a prefix cache still holds; here there is none). `spare` blocks are left free at admission for each request that runs.


# %%
def serve_in(blocks, requests, spare):
    """As `serve`, in a cache of so many blocks of 4; rows and budget without limit."""
    waiting, running, trace = deque(requests), [], []

    def held(*more):
        return sum(-(-r.known // 4) for r in (*running, *more))  # rounded up

    while waiting or running:
        while held() > blocks:
            waiting.appendleft(running.pop())  # the last one in goes back
            waiting[0].computed = 0
        while waiting and held(waiting[0]) + spare * len(running) <= blocks:
            running.append(waiting.popleft())
        trace.append([(r.name, r.computed, r.known - r.computed) for r in running])
        for r in running:
            r.computed, r.known = r.known, r.known + 1
        running = [r for r in running if r.known < r.prompt + r.answer]
    return trace


# %% [markdown]
# Six requests, prompts of 12, answers of 3, 10 blocks. **Predict** for `spare=0` and `spare=1`: how many run in step 1?
# Who goes back in step 2, and how many computed tokens are lost?

# %% tags=["nbval-check-output"]
names = dict.fromkeys("ABCDEF", 12)
for spare in (0, 1):
    trace = serve_in(10, [Request(name, 12, answer=3) for name in names], spare)
    again = pictures.num_again(trace)
    title = f"{spare} blocks spare for each running request: {again} tokens again"
    chart = pictures.requests_chart(trace, names, title)
    show(chart.svg(), chart.alt)
    assert (again, len(trace)) == ((24, 0)[spare], 9)

# %% [markdown]
# <details><summary>Three, and C goes back; or two</summary>
#
# With `spare=0` step 2 wants 12 blocks: C loses its 12 tokens, later E. (The orange 13
# are those and a new one.) With `spare=1` B makes it $3 + 1 + 3 = 7$ blocks; C
# would need $6 + 2 + 3 = 11$.
#
# </details>
#
# Spare blocks are **headroom**. Without it a full cache **thrashes**: it admits, throws out and computes again, and here
# saves not a step.
#
# ## Step 4: two counters
#
# In the engine's `Sequence`, known is `len(token_ids)`, and computed is two counters: **`num_scheduled`** moves when a step
# is *planned*, **`num_computed`** when it has *succeeded*. **Predict**: budget 4, a prompt of 6, an answer of 3. What
# are the three numbers after each call?

# %% tags=["nbval-check-output"]
from nanovllm import SamplingParams
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import FailedAdmission, ScheduledSequence, Scheduler
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.engine.waiting_queue import WaitingQueue

scheduler = Scheduler(BlockManager(8, block_size=4), max_num_seqs=3, max_num_batched_tokens=4)
seq = Sequence("A", None, [11, 12, 13, 14, 15, 16], SamplingParams(max_tokens=3), max_length=9)
scheduler.add(seq)
print("known, scheduled and computed after schedule(), and after update()")
while scheduler.has_work:
    batch = scheduler.schedule()
    planned = len(seq.token_ids), seq.num_scheduled, seq.num_computed
    scheduler.update(batch, [99] * batch[0].samples)  # no model: a token, if the row samples one
    print(planned, (len(seq.token_ids), seq.num_scheduled, seq.num_computed))
assert (len(seq.token_ids), seq.num_scheduled, seq.num_computed) == (9, 8, 8)

# %% [markdown]
# Between the two calls a step is **in flight**. If it fails, what it entered in the prefix cache is taken out, and all that
# run go back to the queue.
#
# ## Assemble: `sequence.py` and `scheduler.py`
#
# `num_unscheduled` is our `known - computed` (`max(1, ...)`: lesson 07).

# %%
from course.show.reading import show_source
from nanovllm.engine import sequence

print(sequence.__doc__)
show_source(SequenceStatus, Sequence)

# %% [markdown]
# The scheduler is our loop in two halves; `can_admit` is our `spare=1` for each sequence that can still grow. New: a
# sequence in flight is not preempted, as the device is writing into its blocks; nobody is overtaken at admission; rows that decode stand first, where attention
# wants them. `abort` is for a user who left, `roll_back` for a step that failed. The queue is a class of its own, because
# a user may leave from its middle. `would_fail_again` saves a second look at a head of the queue that cannot come in yet.

# %%
s = Scheduler
show_source(ScheduledSequence, WaitingQueue, s.__init__, s.has_work.fget, s.add, s.schedule)
show_source(s.schedule_running, s.allocate_or_preempt, s.preempt)
show_source(s.schedule_waiting, s.can_admit, s.num_spare_blocks, s.admit, s.schedule_tokens)
show_source(FailedAdmission, s.would_fail_again)
show_source(s.update, s.remove_finished, s.abort, s.roll_back)

# %% [markdown]
# The loop around it, and a step's record in `engine.trace`:

# %%
from nanovllm.engine.core import EngineCore
from nanovllm.outputs import StepRecord

show_source(EngineCore.plain_step, EngineCore.launch, EngineCore.complete_step, StepRecord)

# %% [markdown]
# ## The engine's own steps
#
# On the real model, without prefix cache: three rows, a budget of 8, 9 blocks of 4. **Predict**, for prompts of A 3, B 10, C 11 and D 10 tokens:
# what do steps 1 and 2 compute?

# %%
from course.labs.load import start
from course.serving import queue, run
from course.show.display import steps

tight = {"max_num_seqs": 3, "max_num_batched_tokens": 8, "block_size": 4}
engine = start(own_model(), **tight, num_gpu_blocks_override=9, max_model_len=36)
prompts = {"A": 3, "B": 10, "C": 11, "D": 10}
for (name, length), answer in zip(prompts.items(), (6, 6, 6, 2), strict=True):
    queue(engine, name, workload.prompts[0][:length], answer)
trace = run(engine)  # steps until all are answered
captions = [", ".join(f"{name} {count}" for name, _, count in step) for step in trace]
frames = pictures.frames_of(trace, prompts, "Three rows, 8 tokens a step, 9 blocks of 4")
steps(frames, captions, "Tokens each request computes, step by step")
assert pictures.num_again(trace) == 12
assert engine.block_manager.num_free_blocks == 9

# %% [markdown]
# <details><summary>A 3 and B 5; then A 1, B 5, C 2</summary>
#
# In step 6, A and B hold 6 of nine blocks and C wants a fourth: it goes back with 12 tokens.
#
# </details>
#
# Now stage 05 with the 16 requests from the top, and a budget of 144 tokens: ten come in at once, the rest in step 2.

# %%
after = ContinuousBatching(own_model(), device="cpu")
better = after.run(workload)
flowing = [record.rows for record in after.trace]
figure = pictures.rows_in_time({"stage 04": static, "stage 05": flowing})
show(figure, "Stage 05 runs up to 16 rows and needs 65 steps; stage 04 needs 128")
print(f"worst time to first token: {max(result.ttft):.2f} s, now {max(better.ttft):.2f} s")
assert (len(static), len(flowing)) == (128, 65)

# %% [markdown]
# ## Check
#
# A random workload in 128 places, five rows and a budget of 24. (With the prefix cache, which finds again most of what
# preempted requests lose.) First **invariants**, then tokens against stage 02, up to
# the first near tie. Last, a prompt that the engine above cuts in three: its logits and tokens against `transformers`.

# %%
from course.labs.cramped import Cramped, cramped_workload
from course.labs.reference import ask_and_compare
from course.stages import ContiguousCache, compare

cramped, mix = Cramped(own_model(), device="cpu"), cramped_workload()
ours = cramped.run(mix)  # raises unless every request gets exactly its tokens
alone = ContiguousCache(own_model(), device="cpu").run(mix)
again = pictures.num_again([record.rows for record in cramped.trace])
assert all(record.num_tokens <= 24 and record.num_running <= 5 for record in cramped.trace)
assert cramped.leaked == 0
assert again > 0  # some were preempted, or this checks less than it says
print(f"{len(cramped.trace)} steps, {again} tokens computed again; {compare(ours, alone)}")
print(ask_and_compare(engine, workload.prompts[0][:20], count=16)[1])

# %% [markdown]
# ## Measure: the ladder
#
# **Predict** from the chart: how many times stage 04's throughput, if all steps took the same time?

# %%
from course.models.choice import measured_model
from course.stages.records import measured, record

model = measured_model().path
job = ladder_workload(PrefixCache(model).vocab_size)
old = measured(PrefixCache(model), job)  # this machine's record; without one, a run
print(f"{old}\n{measured_model()}")

# %%
new = record(ContinuousBatching(model).run(job))
gain = new.numbers["tokens_per_second"] / old.numbers["tokens_per_second"]
print(f"{new}\n{gain:.1f} times the throughput")
figure = plots.ladder(upto=5)
show(figure, figure.alt_text)

# %% [markdown]
# <details><summary>Twice, if steps cost the same</summary>
#
# $128 / 65 = 1.97$ with a CPU's workload, about as much with a GPU's. But a step with more rows takes longer: TPOT grows, and less is gained.
#
# </details>
#
# It does **not** help with one request at a time, or with equal lengths that arrive together: no row is ever idle.
#
# ## Measure: a long prompt beside short answers
#
# Two requests decode when a prompt of 900 tokens arrives (on a GPU 8,000), with a budget for all of it, then of 64
# (1,024). **Predict**: which way has the longer gap between their tokens? How many steps are the chunks?

# %%
from course.labs.load import interrupted

device = ContinuousBatching(model).args.device
length, budget = (900, 64) if device == "cpu" else (8_000, 1024)
room = {"device": device, "max_model_len": length + 40, "num_gpu_blocks_override": 1100}
times = {}
for name, tokens in {"in one step": length + 40, "in chunks": budget}.items():
    engine = start(model, **room, max_num_batched_tokens=tokens)
    times[name] = interrupted(engine, [5] * length)  # when tokens came; the newcomer's TTFT
    print(f"{name:12} first token of the long prompt after {1e3 * times[name][1]:.0f} ms")
    engine.close()
figure = pictures.token_times(times, machine.describe())
show(figure, "Tokens of a running request: one long gap in one step, small gaps in chunks")

# %% [markdown]
# In one step. $\lceil 900 / (64 - 2) \rceil = 15$ chunks (on a GPU 8): two tokens of each go to those that decode. The
# price: the long prompt's own first token comes later.
#
# ## Measure: load
#
# `sweep` sends 24 requests to eight rows. All at once they give the **capacity**, in requests a second; then they arrive at
# random, at shares of it. The **knee** is where throughput divided by TTFT is greatest. **Predict**: which is bounded beyond the
# capacity, TPOT or TTFT?

# %%
from course.labs.load import sweep, users

room = {"device": device, "max_model_len": 128, "num_gpu_blocks_override": 128}
engine = start(model, **room, max_num_seqs=8, max_num_batched_tokens=128)
capacity, points = sweep(engine, users(24), (0.2, 0.5, 0.8, 1.2, 2.0))
figure = pictures.load_curves(points, capacity, machine.describe())
words = [f"{p.rate:.0f}/s: {p.throughput:.0f} tok/s, {1e3 * p.ttft:.0f} ms" for p in points]
show(figure, f"TTFT and TPOT against throughput. TTFT at each rate: {'; '.join(words)}")
knee = max(points, key=lambda p: p.power)
print(f"capacity {capacity:.1f} requests a second; the knee is at {knee.rate / capacity:.0%} of it")

# %% [markdown]
# TPOT: who waits is in no step. Beyond the capacity requests queue: with more than 24, throughput
# would level off, and TTFT grow for ever.
#
# ## In real vLLM
#
# Release v0.24.0: [`vllm/v1/core/sched/scheduler.py`](https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/v1/core/sched/scheduler.py#L389-L399).
# Three differences:
#
# 1. It keeps no headroom unless `watermark` is set, but [admits nobody](https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/v1/core/sched/scheduler.py#L625-L626)
#    in a step that preempted somebody.
# 2. Its *priority* policy [preempts](https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/v1/core/sched/scheduler.py#L535-L563) the least important request, not the youngest.
# 3. `long_prefill_token_threshold` [caps](https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/v1/core/sched/scheduler.py#L468-L469) one prompt's share of a step.
#
# ## Exercises
#
# In `exercises/05_scheduler.ipynb`:
#
# 1. **Predict** (10 minutes): four requests' steps under a budget, and who is preempted first.
# 2. **Implement** (25 minutes): `schedule_running` and `schedule_waiting`.
# 3. **Break and fix** (20 minutes): a counter that moves too early. One step fails, and stories go wrong.
#
# ## Recap
#
# A step brings each row's computed tokens up to its known ones: running requests first, prompts cut at the budget's edge. If
# blocks run out, the youngest is computed again; headroom keeps that rare.
#
# **Check yourself.**
#
# <details><summary>1. Budget 16, five decode, a prompt of 40 arrives. Its first token?</summary>
#
# In the fourth step: 11, 22, 33, 40.
#
# </details>
# <details><summary>2. Preempted with a prompt of 10 and 6 answer tokens, no prefix cache. What is lost?</summary>
#
# No text; the keys and values of 15 tokens.
#
# </details>
#
# **The next question**: attention copies every row's blocks together. Could it read them where they are?
