# %% [markdown]
# # 07 · A step that the host does not hold up
#
# | This lesson | |
# |---|---|
# | Minutes | 50 |
# | Difficulty | hard |
# | Hardware | any laptop |
# | Needs | lessons 01, 05 and 06 |
# | Ends in | `nanovllm/engine/model_runner.py`, `nanovllm/engine/engine.py`, `nanovllm/engine/persistent_batch.py`, `nanovllm/engine/memory.py` |

# %% [markdown]
# ## What hurts now
#
# Lesson 06's kernels are fast. A decode step of Qwen3-0.6B's shape for **one** request launches 210 of them.
# On an H200 they keep the GPU busy for 0.8 ms in all, one after the other.
#
# **Predict** before you run: how many tokens a second would that be, with no gap between them? And how many did lesson 06's engine
# reach there? Write both down.

# %%
import torch

from course import plots
from course.display import show
from course.drawings.step_drawings import ladder, padding, recorded, timelines, uploads, watching
from course.labs.recording import Recording
from course.models import has_gpu, own_model
from course.reading import show_source

torch.set_num_threads(1)
plots.use_style()
report = recorded()
plain = report["rows"][0]
step = report["timelines"][plain["name"]]
print(f"{report['machine']}: {len(step['kernels'])} kernels, {step['busy_us']:.0f} µs busy")
print(f"one after the other, without a gap: {1e6 / step['busy_us']:,.0f} tok/s")
print(f"{plain['name']}: {plain['tokens_per_second']['1'][0]:,.0f} tok/s")
assert plain["tokens_per_second"]["1"][0] < 0.2 * 1e6 / step["busy_us"]

# %% [markdown]
# <details><summary>A tenth of it</summary>
#
# A step took 7.5 ms; for 6.7 of them the GPU waited for Python, which needs about 35 µs to launch a kernel
# that runs for 4.
#
# </details>
#
# After this lesson you can
#
# 1. **tell** a step that the host holds up from one that fills the GPU,
# 2. **capture** a step as a CUDA graph, and say what may not be in it,
# 3. **overlap** planning with running, and count what that wastes.
#
# ## The picture, and the symbols

# %%
show(*timelines(report, microseconds=740))

# %% [markdown]
# White is a GPU that waits. (The profiler that recorded this doubles the host's time. Replayed, kernels even
# begin before the last one has ended, and then wait: so a step is a little shorter than its kernels' sum.)
#
# | symbol | meaning |
# |:--|:--|
# | host, device | the CPU that runs Python; the GPU |
# | launch | the host puts a kernel into the device's queue, and goes on without waiting |
# | $l$, $k$ | time to launch a kernel; time it runs |
# | $p$, $g$ | host: to plan a step and take in its tokens; device: to run it |
# | capture, replay | record a step's launches once; launch all of them with one call |
#
# ## Step 1: a queue and two workers
#
# The host launches kernel after kernel; the device runs each once it is launched *and* the one before is
# done. **Predict** the end of 5 kernels for $l = 30, k = 4$, and for $l = 4, k = 30$.


# %% tags=["nbval-check-output"]
def run_queue(launch, kernel, count):
    """When the device is done, and how long it worked."""
    launched = done = 0
    for _ in range(count):
        launched += launch  # the host never waits
        done = max(launched, done) + kernel  # the device waits for the launch
    return done, count * kernel


for launch, kernel in ((30, 4), (4, 30)):
    end, busy = run_queue(launch, kernel, 5)
    print(f"l = {launch:2}, k = {kernel:2}: done at {end} µs, busy {busy / end:.0%} of the time")
    assert end == 5 * max(launch, kernel) + min(launch, kernel)

# %% [markdown]
# <details><summary>154 µs both times, and nothing in common</summary>
#
# First the host is the limit, and a faster kernel gains nothing; then the device. One request makes short
# kernels, 256 make long ones.
#
# </details>
#
# ## Step 2: record it, then play it
#
# A **CUDA graph** is the list of launches a function made, with their arguments. `Recording` captures one.
# Without a GPU it writes down torch's operations instead, with the tensors they touched, and does them
# again: same rules, no gain in time.
#
# **Predict**: how often does Python run `layer`, for a recording and three replays?

# %%
device = torch.device("cuda" if has_gpu() else "cpu")
x = torch.tensor([[1.0, -2.0]], device=device)
weight = torch.tensor([[1.0, 1.0], [0.0, 1.0]], device=device)
calls = []


def layer():
    calls.append("Python was here")
    return torch.relu(x @ weight)


recording = Recording(layer, device)
for value in (1.0, 2.0, 3.0):
    x.fill_(value)
    recording.replay()
    print(f"x = {x.tolist()} gives {recording.result.tolist()}")
print(f"Python ran {len(calls)} times; a CUDA graph: {recording.is_cuda_graph}")
assert len(calls) == 2
assert recording.result.tolist() == [[3.0, 6.0]]

# %% [markdown]
# <details><summary>Twice: once to warm up, once to record</summary>
#
# The warm-up compiles what there is to compile. A replay is one call, whatever the graph holds.
#
# </details>
#
# ## Step 3: what a graph holds are addresses
#
# **Predict** what the third line prints, and whether `kept` is still the answer for ones.

# %% tags=["nbval-check-output"]
x.fill_(1.0)
recording.replay()
kept = recording.result
print("x filled with ones:  ", recording.result.tolist())
x.copy_(torch.tensor([[5.0, 5.0]]))
recording.replay()
print("fives copied into x: ", recording.result.tolist())
buffer, x = x, torch.tensor([[9.0, 9.0]], device=device)  # a new tensor under the old name
recording.replay()
print("x is another tensor: ", recording.result.tolist())
print("kept:                ", kept.tolist())
assert kept.tolist() == recording.result.tolist() == [[5.0, 10.0]]

# %% [markdown]
# <details><summary>Fives, twice; and kept is gone</summary>
#
# Names are Python's. The graph reads the first `x`'s memory and writes where its result stood. So inputs are
# **static buffers** that are written *into*, and a result that is to last must be copied.
#
# </details>
#
# ## Step 4: what may not be captured
#
# Nothing runs during a capture, so no operation may ask for a number: `.item()`, `print(x)`, `if x > 0`.
# And what Python decided then, it decided for ever. **Predict** the second line.

# %% tags=["nbval-check-output"]
total, factor = torch.ones(1), 2.0
try:
    Recording(lambda: total * 2 if total.sum() > 0 else total, total.device)
except RuntimeError as error:
    print(error)
frozen = Recording(lambda: total * factor, total.device)
factor = 3.0
frozen.replay()
print("total x 3 =", frozen.result.item())
assert frozen.result.item() == 2.0

# %% [markdown]
# <details><summary>Two</summary>
#
# The number 2.0 was in the recorded call. In an engine it might be a longest context or a temperature: a
# wrong answer without an error. What changes must be in a buffer.
#
# </details>
#
# ## Step 5: sizes
#
# Batch size is baked in, too. So a step is captured for some sizes, and a batch takes the smallest that
# holds it. Rows too many are **padding**: with slot −1 (lesson 06) they store nothing.
#
# **Predict**: to what size is a batch of 130 padded? At most how many rows are wasted?

# %% tags=["nbval-check-output"]
from types import SimpleNamespace as Namespace

from nanovllm.engine.memory import graph_sizes

gpu = Namespace(backend=Namespace(capturable=True), ranks=Namespace(capturable=True))
sizes = graph_sizes(gpu, Namespace(enforce_eager=False, max_num_seqs=256))
wasted = [padding(sizes, batch) for batch in range(1, 257)]
print(len(sizes), "sizes:", *sizes[:7], "...", *sizes[-2:])
print("130 rows run as", 130 + wasted[129], "and at most", max(wasted), "rows are padding")
small = graph_sizes(gpu, Namespace(enforce_eager=False, max_num_seqs=20))
naive = [1, 2, 4, 8, *range(16, 20 + 1, 16)]  # nano-vLLM's rule, for at most 20 requests
print("at most 20 requests:", small, "against", naive)
print("18 requests are padded by:", padding(small, 18), "against", padding(naive, 18))
assert None not in wasted

# %% [markdown]
# <details><summary>136; seven; and a hole</summary>
#
# For 17 to 20 requests that engine finds no size, and stops. Ours always captures `max_num_seqs` itself.
#
# </details>
#
# ## Step 6: a step that feeds the next
#
# A step's sampled id *is* the next step's input. If the **sampler is inside the graph** and writes into the
# buffer that the embedding reads, the host sends nothing. A toy: `best` says which of six tokens follows each.
#
# **Predict** the six tokens after token 3.

# %% tags=["nbval-check-output"]
best = torch.tensor([2, 0, 5, 1, 3, 4], device=device)
ids, position = torch.tensor([3], device=device), torch.tensor([0], device=device)
text = torch.zeros(8, dtype=torch.int64, device=device)


def decode():
    ids.copy_(best[ids])  # the sampled id is the next input
    text.index_copy_(0, position % 8, ids)
    position.add_(1)


decode_step = Recording(decode, device)
ids.fill_(3)
position.fill_(0)
for _ in range(6):
    decode_step.replay()
print(text[:6].tolist())
assert text[:6].tolist() == [1, 0, 2, 5, 4, 3]

# %% [markdown]
# (Frozen noise would be the same each time. Ours comes from a seed and the *position*, which moves.)
#
# The engine's buffers are `PersistentBatch`: a row a request, with id, position, seed, temperature and block
# table. **Predict**: two prompts of 5 tokens, blocks of 4. In which of eight steps does the host send anything?

# %% tags=["nbval-check-output"]
from course.serving import start_engine
from nanovllm.sampling_params import SamplingParams

engine = start_engine(block_size=4, max_model_len=64)
greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
engine.add([engine.make_request(str(i), [5, 6, 7, 8, 9 + i], greedy) for i in range(2)])
with uploads() as sent:
    for number in range(1, 9):
        before = len(sent)
        engine.advance()
        print(f"step {number}: {sum(sent[before:]):4} bytes", end="" if number % 4 else "\n")
        print("  |  " * (number % 4 > 0), end="")
        assert bool(sent[before:]) == (number in (1, 5))

# %% [markdown]
# <details><summary>Prompts, then nothing, then two block ids</summary>
#
# Five tokens in blocks of 4: two blocks, room for eight. Step 2 stores at position 5, step 4 at position 7;
# step 5 needs a third block each, and which one the device cannot know.
#
# </details>
#
# ## Step 7: two loops
#
# A graph ends the gaps *in* a step. Between steps the **plain loop** leaves one: plan, launch, wait, read,
# take in. The **overlapped loop** launches step $N + 1$ before it reads step $N$'s tokens.
#
# **Predict** for $p = 3$ and $g = 5$ ms: how long are 100 steps in each? And for $p = 5$, $g = 3$?


# %% tags=["nbval-check-output"]
def plain_loop(p, g, steps):
    return steps * (p + g)


def overlapped_loop(p, g, steps):
    host = device_done = 0
    for _ in range(steps):
        host += p  # plan and launch; the step before it still runs
        previous, device_done = device_done, max(host, device_done) + g
        host = max(host, previous)  # read the tokens of the step before
    return device_done


for p, g in ((3, 5), (5, 3)):
    print(f"p = {p}, g = {g}: {plain_loop(p, g, 100)} and {overlapped_loop(p, g, 100)} ms")
    assert overlapped_loop(p, g, 100) == 100 * max(p, g) + min(p, g)

# %% [markdown]
# <details><summary>800 ms become 503, either way</summary>
#
# The shorter vanishes behind the longer: Step 1's queue, one floor up.
#
# </details>
#
# How can a step be planned whose input nobody has read? The scheduler needs only the **number** of tokens:
# one in flight is a placeholder, its id on the device alone. Both loops, and the order of what they do:

# %%
from nanovllm.engine.engine import EngineCore

show_source(EngineCore.plain_step, EngineCore.overlapped_step, EngineCore._take_in)

# %% tags=["nbval-check-output"]
for overlapped in (False, True):
    engine = start_engine(async_scheduling=overlapped)
    three = SamplingParams(max_tokens=3, ignore_eos=True)
    engine.add([engine.make_request("a", [5, 6, 7], three)])
    with watching(engine) as log:
        while engine.has_unfinished_requests():
            engine.advance()
    print("overlapped:" if overlapped else "plain:", ", ".join(log))
    assert (log.index("launch 2") < log.index("read 1")) == overlapped

# %% [markdown]
# A request's *length* is known without its tokens; its last word is not: by then one more row of it has
# been launched. **Predict**: four stories end by themselves. How many rows are computed in vain?

# %% tags=["nbval-check-output"]
prompts = ["Tell a funny story about a fox.", "Tell a sad story about a cat."]
rows = {}
for overlapped in (False, True):
    engine = start_engine(async_scheduling=overlapped, max_model_len=512)
    end = SamplingParams(temperature=0, max_tokens=400)
    seqs = engine.add([engine.make_request(str(i), p, end) for i, p in enumerate(2 * prompts)])
    while engine.has_unfinished_requests():
        engine.advance()
    rows[overlapped] = sum(record.num_tokens for record in engine.trace)
    ends = [seq.finish_reason for seq in seqs]
    print("overlapped:" if overlapped else "plain:", ends, rows[overlapped], "rows")
assert rows[True] - rows[False] == ends.count("stop")

# %% [markdown]
# <details><summary>One for each that stopped</summary>
#
# Its token is dropped; its blocks are free only when that step is over.
#
# </details>
#
# ## Assemble: the runner
#
# `_launch` replays if all rows decode; with a prompt, of any length, it runs eagerly. `capture` is Step 2, the
# largest size first, so that the others fit in its memory.

# %%
from nanovllm.engine.model_runner import ModelRunner, PendingTokens

show_source(ModelRunner._launch, ModelRunner._decode, ModelRunner.capture, ModelRunner._graph_size)

# %%
from nanovllm.engine.persistent_batch import PersistentBatch

show_source(PendingTokens, PersistentBatch.place)

# %% [markdown]
# What the toys left out: rows that move when a request leaves (`place` gathers them on the device); ids copied
# to **pinned** memory, which the device writes while the host goes on; filters; and memory: graphs keep
# theirs, so the cache is sized after the largest has been captured once.

# %%
from nanovllm.engine import memory

show_source(memory.gpu_budget)

# %% [markdown]
# ## Check
#
# Plain or overlapped, captured or not, tokens must be stage 02's (which lesson 02 held against
# transformers), up to near ties.

# %%
from course.stages import ContiguousCache, ContinuousBatching, compare
from course.workload import LadderWorkload


class Overlapped(ContinuousBatching):
    options = ContinuousBatching.options | {"async_scheduling": True}
    if has_gpu():
        options |= {"attention_backend": "triton", "enforce_eager": False}


texts = [[1 + (31 * i + 7 * j) % 4000 for j in range(3 + 5 * i)] for i in range(8)]
mix = LadderWorkload(texts, [24] * 8, 0, kv_tokens=1024)
alone = ContiguousCache(own_model(), dtype="float32").run(mix)
for stage in (ContinuousBatching, Overlapped):
    agreement = compare(stage(own_model(), dtype="float32").run(mix), alone)
    print(f"{stage.__name__}: {agreement}")
    assert agreement.compared > 100

# %% [markdown]
# ## Measure
#
# **Predict** from Step 1 and Step 7: which gains more from graphs, one request or 256? Which from overlap?

# %%
show(*ladder(report))

# %% [markdown]
# <details><summary>Graphs: one request. Overlap: 256</summary>
#
# One request: graphs 8 times, overlap an eighth more. 256: graphs 2.2 times; and the GPU need not wait while
# 256 rows are planned, so overlap gains 1.4 times. *Without* graphs it lost here: where the host is
# the limit, nothing can hide behind it.
#
# </details>
#
# **torch.compile** goes another way to fewer launches: it fuses the operations *around* the products (norm,
# SiLU, sums). Our kernels fuse them *into* the products of one token: with 256 requests nearly the same, with
# one twice as fast, and a (warm) start 3 s shorter. So it is an option.
#
# Now the ladder's workload. Stage 07 needs a GPU; elsewhere this runs stage 05 once more.

# %%
from course.models import measured_model
from course.records import record
from course.stages import GraphsAndOverlap
from course.workload import ladder_workload

stage = (GraphsAndOverlap if has_gpu() else ContinuousBatching)(measured_model().path)
result = stage.run(ladder_workload(stage.vocab_size))
record(result)
print(result)
figure = plots.ladder(upto=7)
show(figure, figure.alt_text)

# %% [markdown]
# When it does **not** help: steps with **prompts**; **large** batches of large models, whose kernels are long;
# **one** question, which pays for captures it never replays. And on a CPU nothing overlaps.
#
# ## In real vLLM
#
# Release v0.11.0:
#
# 1. [`CUDAGraphWrapper`](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/compilation/cuda_graph.py#L43-L66)
#    also captures *pieces* of a step, between attention layers, so that steps with prompts gain as well; a
#    [dispatcher](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/v1/cudagraph_dispatcher.py#L12-L29)
#    chooses. Ours captures whole decode steps alone.
# 2. The sampler runs after the graph; ours is in it.
# 3. Overlap is an option there (`--async-scheduling`), with
#    [placeholders](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/v1/core/sched/async_scheduler.py#L14-L48)
#    for tokens in flight, as here.
#
# ## Exercises
#
# In `exercises/07_cuda_graphs.ipynb`:
#
# 1. **Predict** (5 minutes): launches, padding, and the shorter of two times.
# 2. **Implement** (20 minutes): a decode step over static buffers, captured, for any number of rows.
# 3. **Break and fix** (15 minutes): a batch between two captured sizes.
#
# ## Recap
#
# A step of short kernels is held up by their launches; a graph launches all with one call. It holds addresses
# and numbers, so all that changes lives in buffers on the device. Then the host can plan one step ahead, and
# the shorter of planning and running costs nothing.

# %% [markdown]
# **Check yourself**
#
# <details><summary>1. A kernel gets twice as fast, and a step does not. Why?</summary>
#
# The host is the limit ($l > k$): the device waits for launches.
#
# </details>
# <details><summary>2. You copy a new prompt's ids into a new tensor and replay. What does the graph read?</summary>
#
# The old buffer. Copy *into* it.
#
# </details>
# <details><summary>3. Why is the largest size captured first?</summary>
#
# All graphs share one pool of memory: what the largest needs is enough for each of the others.
#
# </details>
# <details><summary>4. Can the overlapped loop preempt a request whose token is in flight?</summary>
#
# No: its blocks are being written. It must take in that step first.
#
# </details>
#
# **The next question**: one GPU is full. What if there are two?
