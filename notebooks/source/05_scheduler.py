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
# A **scheduler** decides, before every step, which requests are in it and how many tokens each may
# compute. You build one on counters alone, then read the engine's.
#
# ## What hurts now
#
# Stage 04 pages its cache and shares prefixes, but its batch is **static**: requests start together,
# and nobody comes in until the last is done. Here are 16 requests. At first there are blocks for 11;
# the other five wait.
#
# **Predict** before you run. A batch runs as many steps as its longest answer has tokens. In a step, a
# row whose request is done is **idle**. Of all row-steps (11 rows times the first batch's steps, and 5
# times the second's), what share is idle? Write it down.

# %%
import torch

from course import machine, plots
from course.display import show, steps
from course.models import own_model
from course.reading import show_source
from course.schedule_pictures import (
    frames_of,
    num_again,
    num_idle,
    requests_chart,
    rows_chart,
    rows_in_time,
)
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
first, second = static[:64], static[64:]
idle = num_idle(first, rows=11) + num_idle(second, rows=5)
figure = rows_in_time({"stage 04": static})
show(figure, "11 rows fall to 1 in 64 steps, then 5 rows fall to 1 in 64 more")
print(f"{idle} of {64 * 11 + 64 * 5} row-steps are idle: {idle / (64 * 16):.0%}")
print(f"time to first token: {min(result.ttft):.2f} s at best, {max(result.ttft):.2f} s at worst")
assert idle == 64 * 16 - sum(workload.num_outputs)

# %% [markdown]
# <details><summary>Where the 47% come from</summary>
#
# Both batches have an answer of 64 tokens, so both take 64 steps: $64 \cdot (11 + 5) = 1{,}024$
# row-steps. Each answer token takes one of them: 543. The other 481 are idle, 47%.
#
# </details>
#
# And five users see nothing until a stranger's story is finished.
#
# After this lesson you can
#
# 1. **build** a scheduler that mixes prompts and answers under a budget of tokens,
# 2. **explain** preemption, and what a spare block at admission is for,
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
# No model is needed to see what a scheduler does: counters will do. A step brings each request's
# *computed* up to its *known*. Then a new token is known, and so on. A prompt takes one step, which
# also gives the first answer token. The last answer token is never computed.

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
    """The steps that answer all requests; of each step (name, first position, tokens)."""
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
            r.known += r.computed == r.known  # all computed: a new token is known
        running = [r for r in running if r.known < r.prompt + r.answer]
        trace.append(step)
    return trace


# %% [markdown]
# `static=True` is stage 04; without it, a free row is filled in the next step: **continuous batching**.
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
# Static: $\max(6, 2, 4) + \max(5, 3) = 11$. Continuous: D takes B's row at step 3, E takes C's at
# step 5, and D ends at step 7. 20 tokens in 21 row-steps.
#
# </details>
#
# Orange marks a request's first step. At step 3, D's prompt is computed beside one answer token of A
# and one of C. The model does not mind: each row has its own positions and its own blocks (lesson 03).
# So a step needs no kind, "prefill" or "decode". It is a list of rows with a number of tokens each.
#
# ## Step 2: a budget, and prompts cut at its edge
#
# A step takes as long as its tokens: a prompt of 900 would hold up everyone beside it. So a step has a
# **budget**. Running requests take theirs first; a prompt gets what is left, and its rest in the next
# steps: **chunked prefill**.
#
# **Predict**: a budget of 6. A has a prompt of 3 and an answer of 6, B of 2 and 7, L of 12 and 3. In
# which step does L get its first token?

# %% tags=["nbval-check-output"]
prompts = {"A": 3, "B": 2, "L": 12}
answers = {"A": 6, "B": 7, "L": 3}
chunked = serve([Request(n, prompts[n], answers[n]) for n in prompts], rows=3, budget=6)
chart = requests_chart(chunked, prompts, "A budget of 6 tokens a step")
show(chart.svg(), chart.alt)
tokens = [sum(count for _, _, count in step) for step in chunked]
print("tokens of each step:", tokens)
assert max(tokens) <= 6
assert all(name in [row[0] for row in step] for step in chunked[:6] for name in "AB")

# %% [markdown]
# <details><summary>In step 4</summary>
#
# A and B take 5 of step 1's six tokens, L gets 1; then 4, 4 and the last 3. A and B got a token in
# every one of these steps.
#
# </details>
#
# ## Step 3: when blocks run out
#
# Nobody knows how long an answer gets, so requests are admitted with blocks for the tokens they *know*,
# and grow. If one cannot grow, the **youngest** gives up its blocks and goes back to the head of the
# queue: **preemption by recompute**. Its known tokens are kept, prompt and answer; all of them must be
# computed again. Take blocks of 4 tokens. `spare` is the number of blocks that admission leaves free
# for each request already running.


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
# Six requests, prompts of 4 tokens, answers of 5, and 6 blocks in all. **Predict** for `spare=0` and
# `spare=1`: how many run in step 1? In step 2 every one of them needs a second block. How many go back,
# and how many tokens are computed again in the end?

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
# computed tokens each: 12 tokens for nothing. (They kept their first answer token, so step 6 computes 5.)
# With `spare=1`: A needs 1; B $1 + 1 + 1$ spare $= 3$; C $2 + 1 + 2 = 5$; D would make it
# $3 + 1 + 3 = 7 > 6$, and waits. All have room to grow. It takes one step more and wastes nothing.
#
# </details>
#
# Spare blocks are **headroom**. It is not a promise: an answer that grows by two blocks may still be
# preempted. It keeps a full cache from **thrashing**, admitting and throwing out the same prompts again
# and again.

# %% [markdown]
# ## Step 4: two counters
#
# The engine's `Sequence` keeps our two numbers and one more. Known is `len(token_ids)`. **`num_scheduled`**
# moves when a step is *planned*, **`num_computed`** when it has *succeeded*. The engine's `Scheduler`
# needs no model either: we hand it a token ourselves.
#
# **Predict**: budget 4, a prompt of 6. What are known, scheduled, computed after each of the calls?

# %% tags=["nbval-check-output"]
from nanovllm import SamplingParams
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence

scheduler = Scheduler(BlockManager(8, block_size=4), max_num_seqs=3, max_num_batched_tokens=4)
seq = Sequence("A", None, [11, 12, 13, 14, 15, 16], SamplingParams(max_tokens=3), max_length=9)
scheduler.add(seq)
print("                known  scheduled  computed")
while scheduler.has_work:
    for call in ("schedule", "update"):
        if call == "schedule":
            batch = scheduler.schedule()
        else:
            scheduler.update(batch, [99] * batch[0].samples)  # a token, if the row samples one
        counters = len(seq.token_ids), seq.num_scheduled, seq.num_computed
        print(f"after {call:10}{counters[0]:5}{counters[1]:11}{counters[2]:10}")
assert counters == (9, 8, 8)  # nobody computes the last token

# %% [markdown]
# Between the two calls a step is **in flight**. If it fails, `num_scheduled` falls back to
# `num_computed`, and nothing is lost. And a fast engine plans step $N + 1$ while $N$ is in flight
# (lesson 07); there the two stay apart.
#
# ## Assemble: the sequence
#
# `num_unscheduled` is our `known - computed`, with one twist: while the newest token is in flight its
# id is not known, but one token may be planned all the same.

# %%
show_source(Sequence)

# %% [markdown]
# `append` takes a sampled token and ends the request at a stop token, a stop string or its length.
# What the toy left out: blocks and their hashes (lessons 03 and 04), the seed, text, and metrics.
#
# ## Assemble: planning
#
# A row of the batch, then the step: our loop in two halves. Rows that decode are put first, where the
# attention kernels want them.

# %%
from nanovllm.engine.scheduler import ScheduledSequence

show_source(ScheduledSequence, Scheduler.__init__, Scheduler.has_work.fget, Scheduler.add)
show_source(Scheduler.schedule, Scheduler._schedule_running)

# %% [markdown]
# Growing, and making room. One rule is new: a sequence in flight is never preempted, since the device
# is writing into its blocks. Then nobody younger is planned either, so the next step can preempt it.

# %%
show_source(Scheduler._make_room, Scheduler._preempt, Scheduler._return_to_queue)

# %% [markdown]
# Admission stops at the first request that does not fit: who came first is never overtaken. `match`
# finds a cached prefix, but at least one token is computed, or there would be no logits. `_fits` is
# our `spare=1`. Without chunking a prompt waits until the budget holds all of it.

# %%
show_source(Scheduler._admit_waiting, Scheduler._fits, Scheduler._admit, Scheduler._plan)

# %% [markdown]
# After the step, `update` moves `num_computed`, hands out the tokens, and frees the blocks of what is
# finished. `abort` is for a user who left, `roll_back` for a step that failed.

# %%
show_source(Scheduler.update, Scheduler._retire, Scheduler.abort, Scheduler.roll_back)

# %% [markdown]
# The loop around it is three lines. (`overlapped_step` is lesson 07's.) Each step leaves a `StepRecord`
# in `engine.trace`: its rows, and when it began and ended.

# %%
from nanovllm.engine.engine import EngineCore
from nanovllm.outputs import StepRecord

show_source(EngineCore.plain_step, EngineCore._launch, EngineCore._take_in, StepRecord)

# %% [markdown]
# ## The engine's own steps
#
# Four requests on the real model: three rows, a budget of 8, and 8 blocks of 4 tokens.
#
# **Predict**: prompts A 12, B 5, C 10, D 4. What does step 1 compute? And who goes back, if anybody?

# %%
from course.load import ask
from course.stages.paged import PLAIN
from nanovllm.config import EngineArgs
from nanovllm.llm_engine import LLMEngine


def start(model, scheduler_class=Scheduler, device="cpu", **options):
    args = EngineArgs(str(model), device=device, **(PLAIN | options))
    return LLMEngine(args, scheduler_class=scheduler_class)


def run(engine):
    while engine.has_unfinished_requests():
        engine.advance()
    return [record.rows for record in engine.trace]


tight = {"max_num_seqs": 3, "max_num_batched_tokens": 8, "block_size": 4}
small = start(own_model(), **tight, num_gpu_blocks_override=8, max_model_len=32)
prompts = {"A": 12, "B": 5, "C": 10, "D": 4}
for (name, length), count in zip(prompts.items(), (6, 8, 5, 6), strict=True):
    ask(small, name, workload.prompts[0][:length][::-1], count)
trace = run(small)
title = "Three rows, 8 tokens a step, 8 blocks of 4"
captions = [", ".join(f"{name} {count}" for name, _, count in step) for step in trace]
steps(frames_of(trace, prompts, title), captions, "Tokens each request computes, step by step")
assert small.block_manager.num_free_blocks == 8

# %% [markdown]
# Orange with a dashed border is computed again. Below, stage 05 with the 16 requests from the top, in
# milliseconds. Each request begins as soon as there are blocks; a short answer makes room for the next.

# %%
from course.schedule_pictures import timeline

after = ContinuousBatching(own_model(), device="cpu")
better = after.run(workload)
ids = sorted({name for record in after.trace for name, _, _ in record.rows}, key=int)
lengths = {name: len(workload.prompts[i]) for i, name in enumerate(ids)}
show(
    timeline(after.trace, lengths, "Stage 05, every step", machine.describe("cpu")),
    "16 bars, one a request: prompts first, then answers; all but a few begin at once",
)
flowing = [record.rows for record in after.trace]
show(
    rows_in_time({"stage 04": static, "stage 05": flowing}),
    "Stage 05 runs up to 16 rows and needs about half the steps of stage 04",
)
print(f"worst time to first token: {max(result.ttft):.2f} s, now {max(better.ttft):.2f} s")

# %% [markdown]
# ## Check
#
# A random workload, in a cache and a budget so small that prompts are cut and requests preempted.
# First what must hold in every step. Then tokens: each request alone, in stage 02's contiguous cache,
# must say the same, up to the first near tie.

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
# The workload of every stage, on a GPU with a model of Qwen3-0.6B's shape. **Predict**: throughput of
# stage 05 against stage 04, if a step took the same time however many rows it has.

# %%
from course.models import measured_model
from course.records import record

print(measured_model())
for kind in (PrefixCache, ContinuousBatching):
    measured = kind(measured_model().path)
    runs = [measured.run(ladder_workload(measured.vocab_size)) for _ in range(2)]
    record(runs)
    print(len(measured.trace), "steps;", runs[-1])
figure = plots.ladder(upto=5)
show(figure, figure.alt_text)

# %% [markdown]
# Fewer steps for the same tokens, and more of the reserved memory is live. The gain is less than the
# ratio of steps where a step with more rows takes longer.
#
# ## Measure: a long prompt beside short answers
#
# Three requests are decoding when a long prompt arrives. Once the budget holds all of it; once it is 64
# tokens. **Predict**: which way has the longest gap between two tokens of a running request, and about
# how many steps does the long prompt take with a budget of 64?

# %%
from course.schedule_pictures import token_times

model = measured_model().path
device = ContinuousBatching(model).args.device
long = [5] * (900 if device == "cpu" else 16_000)
options = {"device": device, "max_model_len": len(long) + 40, "num_gpu_blocks_override": 1100}
whole = options | {"enable_chunked_prefill": False, "max_num_batched_tokens": len(long) + 40}
cut = options | {"max_num_batched_tokens": 64 if device == "cpu" else 1024}
clocks = {}
for name, settings in {"in one step": whole, "in chunks": cut}.items():
    engine = start(model, **settings)
    watched = ask(engine, "watched", [1] * 16, 40)
    ask(engine, "other", [2] * 16, 40)
    for i in range(50):
        if i == 10:
            latecomer = ask(engine, "long", long, 4)
            arrival = engine.trace[-1].end_time
        engine.advance()
    times = [r.end_time for r in engine.trace if any(row[0] == "watched" for row in r.rows)]
    clocks[name] = [t - arrival for t in times]
    ttft = latecomer.metrics.first_token_time - arrival
    print(f"{name:12} the long prompt's first token after {1e3 * ttft:.0f} ms")
    assert watched.is_finished
    engine.close()
show(token_times(clocks, 0.0, machine.describe()), "Whole, one long gap; in chunks, none as long")

# %% [markdown]
# <details><summary>One step against fifteen</summary>
#
# $900 / (64 - 2) \approx 15$ steps: two tokens of each go to the requests that are decoding. In one
# step, both wait for the whole prompt. Chunks cost the long prompt little: it is computed at nearly
# the same rate, as 64 tokens already keep the arithmetic busy (lesson 02).
#
# </details>
#
# ## Measure: thrashing
#
# The seam `LLMEngine(..., scheduler_class=...)` takes a scheduler of your own. This one admits whatever
# fits at the moment. 48 requests, prompts of 32 tokens, answers of 24, 64 blocks of 16.
#
# **Predict**: without headroom, how many are admitted in the first two steps? How many blocks will they
# want once their answers begin?


# %%
class NoHeadroom(Scheduler):
    def _fits(self, seq, hits):
        num_new = self.block_manager.num_missing(seq, len(seq.token_ids)) - len(hits)
        return num_new <= self.block_manager.num_free_after_sharing(hits)


for kind in (Scheduler, NoHeadroom):
    engine = start(own_model(), kind, max_model_len=64, num_gpu_blocks_override=64)
    seqs = [ask(engine, str(i), [i + 1] * 32, 24) for i in range(48)]
    trace = run(engine)
    seconds = engine.trace[-1].end_time - engine.trace[0].start_time
    again = sum(seq.metrics.num_preempted_tokens for seq in seqs)
    total = sum(count for step in trace for _, _, count in step)
    print(f"{kind.__name__:10} {len(trace)} steps, {seconds:.1f} s: {total:,} tokens computed,", end="")
    print(f" {again} of them again")
    assert again == num_again(trace)
    assert (again > 0) == (kind is NoHeadroom)

# %% [markdown]
# <details><summary>32, and 96 of 64 blocks</summary>
#
# 16 prompts of 32 tokens fill a step's budget of 512, and 32 prompts fill all 64 blocks. The first
# answer token of each needs a third block: most of the youngest are thrown out, and later come in,
# and go, again. Headroom admits fewer and throws out none. With prefix caching on (here it is off),
# a preempted request often finds its blocks still there: then less is computed again than was lost.
#
# </details>
#
# ## Measure: load
#
# So far all requests came at once. Users come at random moments. `offer` lets them, at a rate of
# requests a second, and measures each one's wait.

# %%
from course.load import offer

show_source(offer)

# %% [markdown]
# First everything at once gives the **capacity** in requests a second. Then rates from an eighth of it
# to double. **Predict**: where does TTFT begin to grow, and why does TPOT grow before it? The **knee**
# is where throughput divided by latency is greatest.

# %%
from course.schedule_pictures import load_curves

vocab = range(1, 4000)
texts = [rng.choices(vocab, k=rng.randint(16, 64)) for _ in range(32)]
users = LadderWorkload(texts, [rng.randint(8, 24) for _ in texts], 0)
engine = start(model, device=device, max_num_seqs=8, max_num_batched_tokens=128, max_model_len=128)
offer(engine, users.first(8), rate=1e9)  # warms up
full = offer(engine, users, rate=1e9)
capacity = 32 * full.throughput / users.num_output_tokens
points = [offer(engine, users, share * capacity) for share in (0.12, 0.3, 0.5, 0.7, 0.9, 1.2, 2.0)]
figure = load_curves(points, capacity, machine.describe())
words = [f"{p.rate:.0f}/s: {p.throughput:.0f} tok/s, {1e3 * p.ttft:.0f} ms" for p in points]
show(figure, f"TTFT and TPOT rise with throughput. TTFT at each rate: {'; '.join(words)}")
print(f"capacity {capacity:.1f} requests a second; knee at", end=" ")
print(f"{max(points, key=lambda p: p.power).rate / capacity:.0%} of it")

# %% [markdown]
# <details><summary>How to read it</summary>
#
# A little load costs little: TPOT grows as steps get more rows, TTFT hardly. Near the capacity all rows
# are taken, and requests queue: throughput stays, TTFT grows with every request that comes. Beyond the
# capacity it would grow for ever; here it stops because 32 requests have an end. TPOT stays bounded,
# since a request that waits is not in a step.
#
# </details>
#
# When continuous batching does **not** help: **one request at a time**, as there is no batch; and
# **equal lengths that arrive together**, as a static batch has no idle row:

# %% tags=["nbval-check-output"]
same = [Request(name, 3, 5) for name in "ABCDEF"]
again = [Request(name, 3, 5) for name in "ABCDEF"]
print(len(serve(same, rows=3, static=True)), "and", len(serve(again, rows=3)), "steps")
assert num_idle(serve([Request(name, 3, 5) for name in "ABC"], rows=3, static=True), 3) == 0

# %% [markdown]
# ## In real vLLM
#
# Release v0.11.0:
# [`Scheduler.schedule`](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/v1/core/sched/scheduler.py#L179-L189).
# Its comment says what you built: no decoding phase and no prefill phase, only tokens that catch up.
# Three differences:
#
# 1. **No headroom.** It admits whatever fits, but
#    [admits nobody](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/v1/core/sched/scheduler.py#L335-L336)
#    in a step that preempted somebody.
# 2. With the *priority* policy it
#    [preempts](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/v1/core/sched/scheduler.py#L260-L271)
#    the least important request, not the youngest.
# 3. `long_prefill_token_threshold`
#    [caps](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/v1/core/sched/scheduler.py#L216-L220)
#    one prompt's share of a step, so that several may advance.
#
# ## Exercises
#
# In `exercises/05_scheduler.ipynb`:
#
# 1. **Predict** (5 minutes): the steps of four requests under a budget, and the first to be preempted.
# 2. **Implement** (25 minutes): `_schedule_running` and `_admit_waiting`.
# 3. **Break and fix** (20 minutes): a preemption that forgets to reset a counter. Some stories go wrong,
#    and only under load.
#
# ## Recap
#
# A step is a list of rows, each with a number of tokens that bring its computed up to its known; running
# requests come first, waiting ones get the rest of the budget, and long prompts are cut at its edge. If
# blocks run out, the youngest goes back and is computed again; a spare block for each running request
# keeps that rare. Beyond the knee more load buys waiting, not throughput.

# %% [markdown]
# **Check yourself**
#
# <details><summary>1. Three rows, answers of 8, 2, 2, 2, 2 tokens. Steps, static and continuous?</summary>
#
# Static $8 + 2 = 10$; continuous 8: four short answers fit beside the long one.
#
# </details>
# <details><summary>2. Budget 16, five requests decode, a prompt of 40 arrives. When is its first token?</summary>
#
# It gets 11 tokens a step: 11, 22, 33, 40. In the fourth step.
#
# </details>
# <details><summary>3. A preempted request had a prompt of 10 and 6 answer tokens. What is lost?</summary>
#
# No text: 16 tokens are known. The keys and values of all that were computed, 15 of them.
#
# </details>
# <details><summary>4. Why the youngest, and not the longest?</summary>
#
# It has the least computed, as a rule, and who came first is served first: the oldest always gets on,
# so all end.
#
# </details>
# <details><summary>5. Why can a larger budget raise throughput and hurt a user?</summary>
#
# Prompts are done in fewer, fuller steps; but each of these steps is longer, and everybody's next
# token waits for its end.
#
# </details>
#
# **The next question**: a step's attention gathers every row's blocks into one long copy before it
# computes. Could it read them where they are?
