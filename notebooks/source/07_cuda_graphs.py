# %% [markdown]
# # 07 · A step that the host does not hold up
#
# | This lesson | |
# |---|---|
# | Minutes | 50 |
# | Difficulty | hard |
# | Hardware | any laptop |
# | Needs | lessons 01, 05 and 06 |
# | Ends in | `nanovllm/engine/input_batch.py`, `nanovllm/engine/cuda_graphs.py`, `nanovllm/engine/model_runner.py`, `nanovllm/engine/memory.py`, `nanovllm/engine/core.py` |

# %% [markdown]
# ## What hurts now
#
# Lesson 06's kernels are fast. A decode step of Qwen3-0.6B's shape for **one** request launches 210 of them.
# On an H100 they keep the GPU busy for 0.95 ms in all, one after the other.
#
# **Predict** before you run: how many tokens a second is that, with no gap between kernels? And how many does
# lesson 06's engine reach? Write both down.

# %%
import torch

from course.drawings.step_drawings import ladder, loops, recorded, timelines
from course.labs.recording import Recording
from course.labs.two_loops import four_stories, order, uploads
from course.models.choice import has_gpu, own_model
from course.models.toy_decoder import padding
from course.show import plots
from course.show.display import show
from course.show.reading import show_source

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
# A step takes 9.2 ms, 44 µs a kernel. That is how long Python needs to launch one, which then runs for 4.5 µs.
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
show(*timelines(report))

# %% [markdown]
# White is a GPU that waits. (The profiler that recorded this slows the host down.) In the lower row kernels overlap: each
# starts while the one before ends (`PDL`, lesson 06). So the ceiling above can be passed.
#
# | symbol | meaning |
# |:--|:--|
# | host, device | the CPU that runs Python; the GPU |
# | launch | the host queues a kernel for the device, and does not wait |
# | $l$, $k$ | time to launch a kernel; to run it |
# | $p$, $g$ | time to plan a step and take in its tokens (host); to run it (device) |
# | capture, replay | record a step's launches; launch all with one call |
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
# First the host is the limit, and a faster kernel gains nothing; then the device is. One request makes short
# kernels, 256 long ones.
#
# </details>
#
# ## Step 2: record it, then play it
#
# A **CUDA graph** is the list of launches a function made, with their arguments. `Recording` captures one,
# after a run that compiles. Without a GPU it lists torch's operations instead: same rules, no gain in time.
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
# <details><summary>Twice: once to compile, once to record</summary>
#
# A replay is one call, whatever the graph holds.
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
# <details><summary>[[5, 10]] again; and kept is overwritten</summary>
#
# Names are Python's. The graph reads the first `x`'s memory and writes where its result stood. So inputs are
# **static buffers**, written *into*; a result that is to last must be copied.
#
# </details>
#
# ## Step 4: what may not be captured
#
# Nothing runs during a capture, so nothing may ask for a number: `.item()`, `print(x)`, `if x > 0`. And what
# Python decides then, it decides for ever. **Predict** the second line. (This cell stays on the CPU: a failed capture may
# spoil a GPU for this process.)

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
# The recorded call holds 2.0. Were it a temperature, answers would be wrong without an error. So what changes
# must be in a buffer.
#
# </details>
#
# ## Step 5: sizes
#
# The batch size is recorded, too. So a step is captured for 1, 2, 4 and every eighth size, and a batch takes
# the smallest that holds it. Rows too many are **padding**: with slot −1 (lesson 06) they store nothing.
#
# **Predict**: to what size is a batch of 130 padded? At most how many rows are wasted?

# %% tags=["nbval-check-output"]
from nanovllm.engine.cuda_graphs import capture_sizes

sizes = capture_sizes(256)
wasted = [padding(sizes, batch) for batch in range(1, 257)]
print(len(sizes), "sizes:", *sizes[:7], "...", *sizes[-2:])
print("130 rows run as", 130 + wasted[129], "and at most", max(wasted), "rows are padding")
assert max(wasted) == 7

# %% [markdown]
# <details><summary>136, and seven</summary>
#
# From 8 on, sizes are 8 apart. The last is `max_num_seqs` itself: every batch fits.
#
# </details>
#
# ## Step 6: a step that feeds the next
#
# The id that a step samples is the next step's input. If the **sampler is in the graph** and writes into the
# buffer that the embedding reads, the host sends nothing. Here `best` says which of six tokens follows each.
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
# The engine's buffers are `InputBatch`: a row a request, with id, position, seed, temperature and block
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
        print(f"step {number}: {sum(sent[before:])} bytes")
        assert bool(sent[before:]) == (number in (1, 5))

# %% [markdown]
# <details><summary>Prompts, then nothing, then two block ids, with row and column</summary>
#
# Two blocks hold positions 0 to 7. Step 2 stores at 5, step 4 at 7. Step 5 needs a third block each, which the
# scheduler picks.
#
# </details>
#
# ## Step 7: two loops
#
# A graph ends the gaps *in* a step. Between steps the **plain loop** leaves one: it plans a step, launches it,
# and waits for its tokens. The **overlapped loop** launches step $N + 1$ before it reads step $N$'s tokens.
#
# **Predict** for $p = 3$ and $g = 5$ ms: how long do 100 steps take in each loop? And for $p = 5$, $g = 3$?


# %%
def loop(p, g, steps, overlapped):
    """Of each step: when the host begins to plan it, when the device begins to run it."""
    host = done = 0
    begun = []
    for _ in range(steps):
        run = max(host + p, done)
        begun.append((host, run))
        done = run + g
        host = run if overlapped else done  # then it reads the step before's tokens, or this one's
    return begun


for p, g in ((3, 5), (5, 3)):
    plain, overlapped = (loop(p, g, 100, flag)[-1][1] + g for flag in (False, True))
    print(f"p = {p}, g = {g}: {plain} and {overlapped} ms")
    assert (plain, overlapped) == (100 * (p + g), 100 * max(p, g) + min(p, g))
show(*loops({"plain": loop(3, 5, 4, False), "overlapped": loop(3, 5, 4, True)}, plan=3, run=5))

# %% [markdown]
# <details><summary>800 ms become 503, either way</summary>
#
# The shorter hides behind the longer, as in Step 1.
#
# </details>
#
# A step can be planned before its input is read: the scheduler needs only the **number** of tokens. One in
# flight is a placeholder, its id on the device alone (hence lesson 05's `max(1, ...)`). But when a token ends an answer, that request's next row is
# launched already.
#
# **Predict**: four stories end by themselves. How many rows are computed in vain?

# %%
from nanovllm.engine.core import EngineCore

show_source(EngineCore.plain_step, EngineCore.overlapped_step)
rows = {}
for overlapped in (False, True):
    log = order(overlapped)
    ends, rows[overlapped] = four_stories(overlapped)
    print("overlapped:" if overlapped else "plain:", ", ".join(log))
    print(f"    stories: {ends}, {rows[overlapped]} rows")
    assert (log.index("launch 2") < log.index("read 1")) == overlapped
assert rows[True] - rows[False] == ends.count("stop")

# %% [markdown]
# <details><summary>One for each that stopped</summary>
#
# The row's token is dropped when it is read. (Plan 4 is empty.)
#
# </details>
#
# ## Assemble: the runner
#
# `execute_model` replays a graph if all rows decode, and runs a step with a prompt eagerly. `GraphRunner.capture` is
# Step 2. It is called with the largest size first: graphs share one pool of memory, and the smaller ones fit into
# the memory that the largest one needs.

# %%
from nanovllm.engine.cuda_graphs import GraphRunner
from nanovllm.engine.input_batch import InputBatch
from nanovllm.engine.model_runner import AsyncModelRunnerOutput, ModelRunner

show_source(ModelRunner.execute_model, GraphRunner.capture, GraphRunner.padded_size)
show_source(InputBatch.update, AsyncModelRunnerOutput)

# %% [markdown]
# Our toys left out four things. Rows move when a request leaves (`update`). The sampling parameters of each row,
# top-k, top-p and min-p included, are columns of the input batch too, so that one captured graph serves every
# mix of them. The sampled ids travel to **pinned** memory, which the device writes while the host goes on
# (`AsyncModelRunnerOutput`). And `determine_available_memory` in `nanovllm/engine/memory.py` sets aside the memory that
# the graphs take.
#
# ## Check
#
# Tokens must be stage 02's, up to near ties. (Lesson 02 checked those against transformers.)

# %%
from course.measure.ladder_workload import LadderWorkload
from course.stages import ContiguousCache, ContinuousBatching, compare


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
# Prompts of 64 tokens, answers of 128; planning 256 rows takes nearly 2 ms, planning one 0.1. **Predict** from
# Step 1 and Step 7: which gains more from graphs, one request or 256? Which from overlap? (Thin lines: slowest to fastest
# run.)

# %%
show(*ladder(report))

# %% [markdown]
# <details><summary>Graphs: one request. Overlap: 256</summary>
#
# One request: 9 times by graphs, a twelfth more by overlap: $p$ is 0.1 ms, $g$ 0.9. 256: 2.8 times, and 1.5: $p$ is
# 1.9 ms, $g$ 3.6. *Without* graphs kernels already run beside their launching, so overlap has little to gain: less
# than one run differs from the next.
#
# </details>
#
# **torch.compile** fuses the operations *around* the matrix products. For one request our kernels fuse them
# *into* the products: 1.7 times as fast; and in a new process the engine starts in 8 s instead of 19.
#
# Now the ladder's workload. Stage 07 needs a GPU; elsewhere this runs stage 05 once more. **Predict** what graphs and overlap
# gain over stage 06: in tokens a second, and in TTFT?

# %%
from course.measure.ladder_workload import ladder_workload
from course.models.choice import measured_model
from course.stages import GraphsAndOverlap
from course.stages.records import record

stage = (GraphsAndOverlap if has_gpu() else ContinuousBatching)(measured_model().path)
result = stage.run(ladder_workload(stage.vocab_size))
record(result)
print(result)
figure = plots.ladder(upto=7)
show(figure, figure.alt_text)

# %% [markdown]
# <details><summary>Four to eight times; nothing to rely on</summary>
#
# Most steps are decode steps. Prompts run eagerly, so the first token comes no sooner.
#
# </details>
#
# When it does **not** help: steps with **prompts**; **large** batches of large models, whose kernels are long;
# one **short** question, which hardly replays what was captured.
#
# ## In real vLLM
#
# Release v0.24.0:
#
# 1. [`CUDAGraphWrapper`](https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/compilation/cuda_graph.py#L145-L169)
#    also captures *pieces* of a step, between attention layers, so that prompts gain as well.
# 2. The sampler runs after the graph; ours is in it, but for top-k, top-p and min-p.
# 3. Overlap is the default there as well (`async_scheduling`), with
#    [placeholders](https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/v1/core/sched/async_scheduler.py#L19-L67)
#    as here.
#
# ## Exercises
#
# In `exercises/07_cuda_graphs.ipynb`:
#
# 1. **Predict** (5 minutes): launches, padding, and the shorter of two times.
# 2. **Implement** (20 minutes): a captured decode step, for any number of rows.
# 3. **Break and fix** (15 minutes): a batch between two captured sizes.
#
# ## Recap
#
# A step of short kernels is held up by their launches; a graph launches all with one call. It holds addresses
# and numbers, so what changes lives in buffers. With overlap the shorter of planning and running costs nothing.

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
# <details><summary>3. Can the overlapped loop preempt a request whose token is in flight?</summary>
#
# No: its blocks are being written. It must take in that step first.
#
# </details>
#
# **The next question**: one GPU is full. What if there are two?
