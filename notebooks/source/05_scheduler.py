# %% [markdown]
# # 05 · Requests come and go
#
# | This lesson | |
# |---|---|
# | Minutes | 60 |
# | Difficulty | medium |
# | Hardware | any laptop; a GPU is used at the end if there is one |
# | Needs | lessons 00 to 04 |
# | Ends in | `nanovllm/engine/sequence.py`, `nanovllm/engine/scheduler.py` |

# %% [markdown]
# ## What hurts now
#
# Stage 04 pages its cache and shares prefixes, but its batch is **static**: requests start together,
# and nobody comes in until the last is done. Of the 16 requests below, 11 fit in the cache; five wait.
# (Timings on this page are of one CPU thread, or of your GPU.)
#
# **Predict** before you run. A batch runs as many steps as its longest answer has tokens; a row whose
# request is done is **idle** in a step. Of all row-steps (11 rows times the first batch's steps, and 5
# times the second's), what share is idle? Write it down.

# %%
import torch

from course import machine, plots
from course.display import show
from course.models import own_model
from course.reading import show_source
from course.schedule_pictures import num_again, num_idle, requests_chart, rows_chart, rows_in_time
from course.stages import ContinuousBatching, PrefixCache
from course.workload import ladder_workload

torch.set_num_threads(1)
plots.use_style()
stage = PrefixCache(own_model(), device="cpu")
workload = ladder_workload(stage.vocab_size, device="cpu")
print("tokens to answer:", workload.num_outputs[:11], "and", workload.num_outputs[11:])

# %%
result = stage.run(workload)
static = [record.rows for record in stage.trace]  # of each step: (request, position, tokens)
idle = num_idle(static[:64], rows=11) + num_idle(static[64:], rows=5)
figure = rows_in_time({"stage 04": static})
show(figure, "11 rows fall to 1 in 64 steps, then 5 rows fall to 1 in 64 more")
print(f"{idle} of {64 * 11 + 64 * 5} row-steps are idle: {idle / (64 * 16):.0%}")
print(f"time to first token: {min(result.ttft):.2f} s at best, {max(result.ttft):.2f} s at worst")
assert idle == 64 * 16 - sum(workload.num_outputs)

# %% [markdown]
# <details><summary>Where the 47% come from</summary>
#
# Both batches have an answer of 64 tokens: $64 \cdot (11 + 5) = 1{,}024$ row-steps. Each of 543 answer
# tokens takes one; 481 are idle.
#
# </details>
#
# And five users see nothing until a stranger's story is finished. A **scheduler** decides, before every
# step, who is in it and with how many tokens.
#
# After this lesson you can
#
# 1. **build** a scheduler that mixes prompts and answers under a budget,
# 2. **explain** preemption, and what headroom at admission is for,
# 3. **measure** what a load does to throughput and to each user's wait.
#
# ## The picture, and the symbols
#
# ![Waiting requests are admitted to a list of running ones; a step of 8 tokens takes one for A and B, four of C's prompt, two of D's; the youngest goes back if blocks run out.](../figures/one_step.svg)
#
# | symbol | meaning |
# |:--|:--|
# | known | tokens whose ids we have: the prompt, and the answer so far |
# | computed | of them, those whose keys and values are in the cache |
# | rows | requests that may run at once (`max_num_seqs`) |
# | budget | tokens a step may compute (`max_num_batched_tokens`) |
# | TTFT | time to first token, from a request's arrival |
# | TPOT | time per output token, after the first |

# %% [markdown]
# ## Step 1: fill the row at once
#
# No model is needed to see what a scheduler does: two counters will do. A step brings each request's
# *computed* up to its *known*; then one more token is known. So the step that computes a prompt gives
# the first answer token, and the last answer token is never computed.

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
    """The steps that answer all requests; of each, (name, first position, tokens) a row.

    budget: tokens a step may compute, for Step 2.
    """
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
# `static=True` is stage 04. Without it a free row is filled in the next step: **continuous batching**.
#
# **Predict**: three rows, and answers of A 6, B 2, C 4, D 5, E 3 tokens. How many steps does each way
# take?


# %% tags=["nbval-check-output"]
def five():
    lengths = {"A": (3, 6), "B": (2, 2), "C": (4, 4), "D": (3, 5), "E": (2, 3)}
    return [Request(name, *both) for name, both in lengths.items()]


waits, flows = serve(five(), rows=3, static=True), serve(five(), rows=3)
for trace, title in ((waits, "Static"), (flows, "Continuous")):
    chart = rows_chart(trace, 3, title)
    show(chart.svg(), chart.alt)
print(len(waits), "steps,", len(flows), "steps")
assert num_idle(flows, 3) == 3 * 7 - (6 + 2 + 4 + 5 + 3)

# %% [markdown]
# <details><summary>11 and 7</summary>
#
# Static: $\max(6, 2, 4) + \max(5, 3) = 11$. Continuous: D takes B's row in step 3, E takes C's in
# step 5; 20 tokens in 21 row-steps.
#
# </details>
#
# A dark cell is a prompt. In step 3, D's is computed beside answer tokens of A and C. The model does not
# mind: each row has its own positions and blocks (lesson 03). So a step is neither prefill nor decode. It
# is a list of rows with a number of tokens each.
#
# ## Step 2: a budget, and prompts cut at its edge
#
# A prompt of 900 tokens makes a long step, and holds up everyone in it. So a step has a **budget**.
# Running requests take theirs first; a prompt gets what is left, and its rest in the next steps:
# **chunked prefill**.
#
# **Predict**: a budget of 6. A has a prompt of 3 and an answer of 6, B of 2 and 7, L of 12 and 3. In
# which step does L get its first token?

# %% tags=["nbval-check-output"]
chunked = serve([Request("A", 3, 6), Request("B", 2, 7), Request("L", 12, 3)], rows=3, budget=6)
chart = requests_chart(chunked, {"A": 3, "B": 2, "L": 12}, "A budget of 6 tokens a step")
show(chart.svg(), chart.alt)
tokens = [sum(count for _, _, count in step) for step in chunked]
print("tokens of each step:", tokens)
assert max(tokens) <= 6
assert all(name in [row[0] for row in step] for step in chunked[:6] for name in "AB")

# %% [markdown]
# <details><summary>In step 4</summary>
#
# L gets what A and B leave: 1, 4, 4, and the last 3. They still get a token in every step.
#
# </details>
#
# ## Step 3: when blocks run out
#
# Nobody knows how long an answer gets, so a request is admitted with blocks for the tokens it *knows*,
# and grows. If one cannot grow, the **youngest** gives up its blocks and goes back to the head of the
# queue: **preemption by recompute**. Its tokens stay known, prompt and answer; all must be computed
# again. Take blocks of 4 tokens. `spare` is how many blocks admission leaves free for each request that
# runs already.


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
# Six requests, prompts of 4 tokens, answers of 5, 6 blocks in all. **Predict** for `spare=0` and
# `spare=1`: how many run in step 1? In step 2 each of them needs a second block: how many go back, and
# how many computed tokens do they lose?

# %% tags=["nbval-check-output"]
names = dict.fromkeys("ABCDEF", 4)
for spare in (0, 1):
    trace = serve_in(6, [Request(name, 4, answer=5) for name in names], spare)
    title = f"{spare} blocks spare for each running request: {num_again(trace)} tokens again"
    chart = requests_chart(trace, names, title)
    show(chart.svg(), chart.alt)
    assert num_again(trace) == (12, 0)[spare]

# %% [markdown]
# <details><summary>Six, of which three go back; or three</summary>
#
# With `spare=0` six blocks admit six requests. Step 2 needs 12 blocks, so D, E and F go back, with 4
# computed tokens each: 12 are lost. (They keep their first answer token, so step 6 computes 5.)
# With `spare=1`: A needs 1; B $1 + 1 + 1$ spare $= 3$; C $2 + 1 + 2 = 5$; D would make it
# $3 + 1 + 3 = 7 > 6$, and waits. One step more, and nothing is lost.
#
# </details>
#
# Spare blocks are **headroom**. An answer that grows by two blocks may still be preempted, but a full
# cache no longer **thrashes**: admits and throws out the same prompts again and again.

# %% [markdown]
# ## Step 4: two counters
#
# In the engine's `Sequence`, known is `len(token_ids)`, and computed is two counters: **`num_scheduled`**
# moves when a step is *planned*, **`num_computed`** when it has *succeeded*. Its `Scheduler` needs no
# model either: we hand it a token ourselves.
#
# **Predict**: budget 4, a prompt of 6. What are the three numbers after each call?

# %% tags=["nbval-check-output"]
from nanovllm import SamplingParams
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence

scheduler = Scheduler(BlockManager(8, block_size=4), max_num_seqs=3, max_num_batched_tokens=4)
seq = Sequence("A", None, [11, 12, 13, 14, 15, 16], SamplingParams(max_tokens=3), max_length=9)
scheduler.add(seq)


def report(call):
    print(f"{call:9}{len(seq.token_ids):6}{seq.num_scheduled:11}{seq.num_computed:10}")


print("after      known  scheduled  computed")
while scheduler.has_work:
    batch = scheduler.schedule()
    report("schedule")
    scheduler.update(batch, [99] * batch[0].samples)  # a token, if the row samples one
    report("update")
assert (len(seq.token_ids), seq.num_scheduled, seq.num_computed) == (9, 8, 8)

# %% [markdown]
# Between the two calls a step is **in flight**. If it fails, `num_scheduled` falls back to
# `num_computed`, and nothing is lost. And lesson 07's loop plans step $N + 1$ while $N$ is in flight.
#
# ## Assemble: the sequence
#
# `num_unscheduled` is our `known - computed`. Its `max(1, ...)` is for lesson 07: while the newest token
# is in flight its id is not known, but one token may be planned all the same.

# %%
from nanovllm.engine import sequence

print(sequence.__doc__)
show_source(sequence.Status, Sequence)

# %% [markdown]
# `append` takes a sampled token and ends the request at a stop token, a stop string or its length.
# The toy left out blocks and hashes (lessons 03 and 04), the seed, text, and metrics.
#
# ## Assemble: the scheduler
#
# First a row of a batch, then the step: our loop in two halves. Rows that decode stand first, where
# attention wants them.

# %%
from nanovllm.engine.scheduler import ScheduledSequence

show_source(ScheduledSequence, Scheduler.__init__, Scheduler.has_work.fget, Scheduler.add)
show_source(Scheduler.schedule, Scheduler._schedule_running)

# %% [markdown]
# Growing, and making room. One rule is new: a sequence in flight is not preempted, since the device is
# writing into its blocks. The loop then stops, so that it is not in flight when the next step is planned.

# %%
show_source(Scheduler._make_room, Scheduler._preempt, Scheduler._return_to_queue)

# %% [markdown]
# Admission stops at the first request that does not fit: nobody is overtaken. `match` finds a cached
# prefix, and `_fits` is our `spare=1`. Without chunking, a prompt waits until a budget holds all of it.

# %%
show_source(Scheduler._admit_waiting, Scheduler._fits, Scheduler._admit, Scheduler._plan)

# %% [markdown]
# `update` moves `num_computed`, hands out tokens, and frees the blocks of what is finished. `abort` is
# for a user who left, `roll_back` for a step that failed.

# %%
show_source(Scheduler.update, Scheduler._retire, Scheduler.abort, Scheduler.roll_back)

# %% [markdown]
# The loop around it, in its plain form (lesson 07 has the other): plan, launch, take in. Each step
# leaves a `StepRecord` in `engine.trace`: its rows, and when it began and ended.

# %%
from nanovllm.engine.engine import EngineCore
from nanovllm.outputs import StepRecord

show_source(EngineCore.plain_step, EngineCore._launch, EngineCore._take_in, StepRecord)

# %% [markdown]
# ## The engine's own steps
#
# Four requests on the real model: three rows, a budget of 8, 9 blocks of 4 tokens. `start` makes an
# engine without prefix cache, `ask` queues a request, `run` steps until all are answered.
#
# **Predict**, for prompts of A 3, B 10, C 11 and D 10 tokens: what do steps 1 and 2 compute?

# %%
from course.display import steps
from course.load import ask, run, start
from course.schedule_pictures import frames_of

tight = {"max_num_seqs": 3, "max_num_batched_tokens": 8, "block_size": 4}
engine = start(own_model(), **tight, num_gpu_blocks_override=9, max_model_len=36)
prompts = {"A": 3, "B": 10, "C": 11, "D": 10}
for (name, length), answer in zip(prompts.items(), (6, 6, 6, 2), strict=True):
    ask(engine, name, workload.prompts[0][:length], answer)
trace = run(engine)
captions = [", ".join(f"{name} {count}" for name, _, count in step) for step in trace]
frames = frames_of(trace, prompts, "Three rows, 8 tokens a step, 9 blocks of 4")
steps(frames, captions, "Tokens each request computes, step by step")
assert num_again(trace) == 12
assert engine.block_manager.num_free_blocks == 9

# %% [markdown]
# <details><summary>A 3 and B 5; then A 1, B 5, C 2</summary>
#
# In step 6, A and B hold 2 and 4 of nine blocks and C wants a fourth: it goes back with 12 computed
# tokens. Later its prompt *and* its two answer tokens are computed again.
#
# </details>
#
# Now stage 05 with the 16 requests from the top, in milliseconds.

# %%
from course.schedule_pictures import timeline

after = ContinuousBatching(own_model(), device="cpu")
better = after.run(workload)
flowing = [record.rows for record in after.trace]
ids = sorted({name for step in flowing for name, _, _ in step}, key=int)
lengths = {name: len(workload.prompts[i]) for i, name in enumerate(ids)}
figure = timeline(after.trace, lengths, "Stage 05, every step", machine.describe("cpu"))
show(figure, "16 bars, one a request: ten begin in the first step and six in the second")
figure = rows_in_time({"stage 04": static, "stage 05": flowing})
show(figure, "Stage 05 runs up to 16 rows and needs 65 steps; stage 04 needs 128")
print(f"worst time to first token: {max(result.ttft):.2f} s, now {max(better.ttft):.2f} s")
assert max(map(len, flowing)) > max(map(len, static))

# %% [markdown]
# ## Check
#
# A random workload, in a cache and a budget so small that prompts are cut and requests preempted.
# First what must hold in every step. Then tokens, against stage 02, where each request has the cache to
# itself, up to the first near tie (a lead below 0.0001).

# %%
import random

from course.stages import ContiguousCache, compare
from course.workload import LadderWorkload


class Cramped(ContinuousBatching):
    def budget(self, workload):
        return {"max_num_seqs": 5, "max_num_batched_tokens": 24}

    def release(self):
        manager = self.engine.block_manager
        self.leaked = manager.num_blocks - manager.num_free_blocks
        super().release()


rng = random.Random(5)
texts = [[rng.randrange(1, 4000) for _ in range(rng.randint(1, 60))] for _ in range(20)]
mix = LadderWorkload(texts, [rng.randint(1, 40) for _ in texts], 0, kv_tokens=128)
cramped = Cramped(own_model(), device="cpu")
ours = cramped.run(mix)  # raises unless every request gets exactly its tokens
alone = ContiguousCache(own_model(), device="cpu").run(mix)
trace = [record.rows for record in cramped.trace]
assert all(record.num_tokens <= 24 and record.num_running <= 5 for record in cramped.trace)
assert cramped.leaked == 0
assert num_again(trace) > 0  # some were preempted, or this checks less than it says
print(f"{len(trace)} steps, {num_again(trace)} tokens computed again; {compare(ours, alone)}")

# %% [markdown]
# ## Measure: the ladder
#
# The workload of every stage. **Predict**: how many times stage 04's throughput has stage 05, if a step
# took the same time whatever its rows? (The last chart has the steps.)

# %%
from course.models import measured_model
from course.records import record

model = measured_model().path
before, stage = PrefixCache(model), ContinuousBatching(model)
job = ladder_workload(stage.vocab_size)
pairs = [(before.run(job), stage.run(job)) for _ in range(2)]  # by turns: the same conditions
for runs in zip(*pairs, strict=True):
    record(runs)
    print(runs[-1])
gain = pairs[-1][1].tokens_per_second / pairs[-1][0].tokens_per_second
print(f"{gain:.1f} times the throughput. {measured_model()}")
figure = plots.ladder(upto=5)
show(figure, figure.alt_text)

# %% [markdown]
# <details><summary>Twice, if steps cost the same</summary>
#
# $128 / 65 = 1.97$ on a CPU. But TPOT is about the time of a step, and it grew: a step with more rows
# takes longer. The fewer rows keep a machine busy, the less is gained. More memory is live, too.
#
# </details>
#
# ## Measure: a long prompt beside short answers
#
# Two requests decode when a long prompt arrives, on a CPU one of 900 tokens. First the budget holds all
# of it, then 64 tokens. **Predict**: which way has the longer gap between two tokens of a request that is
# decoding, and how many steps does the prompt take with a budget of 64?

# %%
from course.load import interrupted
from course.schedule_pictures import token_times

device = stage.args.device
length, budget = (900, 64) if device == "cpu" else (8_000, 1024)
room = {"device": device, "max_model_len": length + 40, "num_gpu_blocks_override": 1100}
whole = {"enable_chunked_prefill": False, "max_num_batched_tokens": length + 40}
times = {}
for name, options in {
    "in one step": whole,
    "in chunks": {"max_num_batched_tokens": budget},
}.items():
    engine = start(model, **room, **options)
    times[name], ttft = interrupted(engine, [5] * length)
    print(f"{name:12} first token of the long prompt after {1e3 * ttft:.0f} ms")
    engine.close()
figure = token_times(times, machine.describe())
show(figure, "Tokens of a running request: one long gap in one step, small gaps in chunks")

# %% [markdown]
# <details><summary>One step against fifteen</summary>
#
# $900 / (64 - 2) \approx 15$ steps: two tokens of each go to those that decode. In one step, both wait
# for the whole prompt. Cutting costs the long prompt little: 64 tokens keep the arithmetic busy
# (lesson 02).
#
# </details>
#
# ## Measure: thrashing
#
# `LLMEngine(..., scheduler_class=...)` takes a scheduler of your own. This one admits whatever fits at
# the moment. 64 requests, prompts of 16 tokens, answers of 12, 32 blocks of 16, a budget of 512.
#
# **Predict**, as in Step 3: without headroom, how many run in step 1, and how many go back in step 2?


# %% tags=["nbval-check-output"]
class NoHeadroom(Scheduler):
    def _fits(self, seq, hits):
        num_new = self.block_manager.num_missing(seq, len(seq.token_ids)) - len(hits)
        return num_new <= self.block_manager.num_free_after_sharing(hits)


for kind in (Scheduler, NoHeadroom):
    engine = start(own_model(), kind, max_model_len=64, num_gpu_blocks_override=32)
    seqs = [ask(engine, str(i), [i + 1] * 16, 12) for i in range(64)]
    trace = run(engine)
    total = sum(record.num_tokens for record in engine.trace)
    print(f"{kind.__name__:11}{total:,} tokens computed, {num_again(trace)} of them again")
    assert sum(seq.metrics.num_preempted_tokens for seq in seqs) == num_again(trace)
    assert (num_again(trace) > 0) == (kind is NoHeadroom)

# %% [markdown]
# <details><summary>32 run, and 16 go back</summary>
#
# 32 prompts fill 32 blocks. In step 2 each needs a second, and only 16 can have one. Headroom admits 16:
# $16 + 15 \le 32$ blocks. With prefix caching (off here) a preempted request often finds its blocks
# still standing, and less is computed again.
#
# </details>
#
# ## Measure: load
#
# Users do not come all at once. `offer` lets them arrive at random moments, so many a second. Its clock
# is the engine's steps, end to end; on a CPU it leaves out what other programs take.

# %%
from course.load import offer, sweep

show_source(offer)

# %% [markdown]
# `sweep` first measures the **capacity**: requests a second when all wait from the start. Then it offers
# shares of it to an engine of eight rows. The **knee** is where throughput divided by TTFT is greatest.
#
# **Predict**: which grows first, TPOT or TTFT? Which goes on growing beyond the capacity?

# %%
from course.schedule_pictures import load_curves

texts = [rng.choices(range(1, 4000), k=rng.randint(16, 64)) for _ in range(24)]
users = LadderWorkload(texts, [rng.randint(8, 16) for _ in texts], 0)
engine = start(model, device=device, max_num_seqs=8, max_num_batched_tokens=128, max_model_len=128)
capacity, points = sweep(engine, users, (0.2, 0.5, 0.8, 1.0, 1.3, 2.0))
figure = load_curves(points, capacity, machine.describe())
words = [f"{p.rate:.0f}/s: {p.throughput:.0f} tok/s, {1e3 * p.ttft:.0f} ms" for p in points]
show(figure, f"TTFT and TPOT rise with throughput. TTFT at each rate: {'; '.join(words)}")
knee = max(points, key=lambda p: p.power)
print(f"capacity {capacity:.1f} requests a second; the knee is at {knee.rate / capacity:.0%} of it")

# %% [markdown]
# <details><summary>How to read it</summary>
#
# TPOT grows first, as steps get more rows, and is bounded: who waits is in no step. Near the capacity
# all eight rows are taken and requests queue. Beyond it throughput stays, and TTFT would grow for ever
# if 24 requests did not have an end.
#
# </details>
#
# When continuous batching does **not** help: with **one request at a time**, as there is no batch; and
# with **equal lengths that arrive together**, as no row is ever idle:

# %% tags=["nbval-check-output"]
waits, flows = (
    serve([Request(name, 3, 5) for name in "ABCDEF"], rows=3, static=static)
    for static in (True, False)
)
print(len(waits), "steps and", len(flows))
assert waits == flows
assert num_idle(waits, rows=3) == 0

# %% [markdown]
# ## In real vLLM
#
# Release v0.11.0:
# [`Scheduler.schedule`](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/v1/core/sched/scheduler.py#L179-L189).
# Its comment says what you built: no prefill phase, no decoding phase. Three differences:
#
# 1. A request needs blocks for this step's tokens only, without headroom; but it
#    [admits nobody](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/v1/core/sched/scheduler.py#L335-L336)
#    in a step that preempted somebody.
# 2. Its *priority* policy
#    [preempts](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/v1/core/sched/scheduler.py#L260-L271)
#    the least important request, not the youngest.
# 3. `long_prefill_token_threshold`
#    [caps](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/v1/core/sched/scheduler.py#L216-L220)
#    one prompt's share of a step.
#
# ## Exercises
#
# In `exercises/05_scheduler.ipynb`:
#
# 1. **Predict** (10 minutes): four requests' steps under a budget, and who is preempted first.
# 2. **Implement** (25 minutes): `_schedule_running` and `_admit_waiting`.
# 3. **Break and fix** (20 minutes): a counter that moves too early. One step fails, and stories go wrong.
#
# ## Recap
#
# A step brings each row's computed tokens up to its known ones: running requests first, then waiting
# ones, and prompts are cut at the budget's edge. If blocks run out, the youngest goes back and is
# computed again; headroom keeps that rare. Beyond the knee, more load buys waiting, not throughput.

# %% [markdown]
# **Check yourself**
#
# <details><summary>1. Three rows, answers of 8, 2, 2, 2, 2 tokens. Steps, static and continuous?</summary>
#
# $8 + 2 = 10$, and 8: four short answers fit beside the long one.
#
# </details>
# <details><summary>2. Budget 16, five requests decode, a prompt of 40 arrives. When is its first token?</summary>
#
# In the fourth step: 11, 22, 33, 40.
#
# </details>
# <details><summary>3. A preempted request had a prompt of 10 and 6 answer tokens. What is lost?</summary>
#
# No text: 16 tokens stay known. The keys and values of 15 of them.
#
# </details>
# <details><summary>4. Why the youngest?</summary>
#
# So the oldest always gets on, and all end. And as a rule the youngest loses least.
#
# </details>
#
# **The next question**: attention copies every row's blocks together before it computes. Could it read
# them where they are?
