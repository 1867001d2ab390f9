# %% [markdown]
# # 09 · The whole ladder, and its ceiling
#
# | This lesson | |
# |---|---|
# | Minutes | 35 |
# | Difficulty | medium |
# | Hardware | any laptop |
# | Needs | lessons 01 to 05; 06 to 08 help |
# | Ends in | all of `nanovllm/`, measured |

# %% [markdown]
# ## What hurts now
#
# Each lesson claims a gain. Here all stages serve the **same** requests. First two: stage 01, which computes
# everything again for each token, and stage 05, which keeps, shares and schedules; both on the CPU.
#
# **Predict** before you run: 4 requests with prompts of 68 to 80 tokens, and 4 to 64 tokens out. How many
# times as fast is stage 05? Write it down.

# %%
import importlib.util
from argparse import Namespace

import torch

from course.benchmarks import against_transformers
from course.clone import ROOT
from course.labs import climb
from course.measure import roofline
from course.measure.ladder_workload import LadderWorkload, ladder_workload
from course.measure.roofline import Peaks, Work, measure_peaks
from course.models.choice import has_gpu, measured_model, own_model
from course.show import plots
from course.show.display import show
from course.show.reading import show_source
from course.stages import STAGES, compare

torch.set_num_threads(1)
plots.use_style()
first, fifth = (STAGES[number](own_model(), device="cpu") for number in (1, 5))
few = ladder_workload(first.vocab_size, "cpu").first(4)
print(few)
ends = [stage.run(few) for stage in (first, fifth)]
for result in ends:
    print(f"{result.number:02} {result.name:<22} {result.tokens_per_second:8,.1f} tok/s")
assert [len(ids) for ids in ends[1].token_ids] == few.num_outputs

# %% [markdown]
# <details><summary>Four to five times, and what that says</summary>
#
# Stage 01's work grows with the square of the length; stage 05 gains with every row. So a ratio of two stages says as much
# about the *workload*. We need a yardstick that is no stage.
#
# </details>
#
# After this lesson you can
#
# 1. **count** the least that a schedule must move and compute, and turn it into seconds,
# 2. **tell** work done badly from work that need not be done,
# 3. **say** what is left to gain in this engine, and what a production engine has that it lacks.
#
# ## The picture, and the symbols

# %%
show(
    ROOT / "figures/one_step.svg",
    "One step of the engine: rows are picked, computed and sampled.",
)

# %% [markdown]
# | symbol | meaning | unit |
# |:--|:--|:--|
# | $W$ | bytes of all weights, read once a step | bytes |
# | $K$ | bytes of keys and values that a step reads | bytes |
# | $O$ | floating-point operations of a step | FLOP |
# | $\beta$, $F$ | read bandwidth; rate of a large matrix product, both measured | bytes/s, FLOP/s |
# | floor | $\sum_\text{steps} \max\left((W + K) / \beta,\ O / F\right)$ | s |
# | share | floor / measured seconds | – |
#
# ## Step 1: the floor of one step
#
# A toy model has 1,000 weights of 2 bytes. Its machine reads 1,000 bytes a second and does 10,000 FLOP/s; a
# weight costs 2 FLOPs for each token. Leave out keys and values.
#
# **Predict** the seconds *a token* for batches of 1, 5, 10, 20 and 40.


# %% tags=["nbval-check-output"]
machine = Peaks(bandwidth=1_000, flops=10_000)
per_token = {}
for batch in (1, 5, 10, 20, 40):
    step = Work(weight_bytes=2_000, kv_bytes=0, kv_bytes_shared=0, flops=2 * 1_000 * batch)
    read, compute = 2_000 / machine.bandwidth, step.flops / machine.flops
    per_token[batch] = machine.seconds([step]) / batch
    print(f"batch {batch:2}: read {read} s, compute {compute} s: {per_token[batch]:.2f} a token")
assert per_token[10] == per_token[40] == 0.2

# %% [markdown]
# <details><summary>2, 0.4, 0.2, 0.2, 0.2</summary>
#
# Up to 10 rows one more is free: the weights are read anyway. From there each costs its FLOPs.
#
# </details>
#
# ## Step 2: fewer steps, or shorter ones
#
# The floor belongs to a *schedule*. Three requests have prompts of 4 tokens, and get 2, 4 and 6.
#
# **Predict** for stage 01 (one at a time, everything again) and stage 02 (a batch that starts together): how
# many steps, and how many tokens are computed in all? Count useful work: no padding, no rows that are done.

# %% tags=["nbval-check-output"]
toy = LadderWorkload([[1] * 4] * 3, [2, 4, 6], 0, kv_tokens=30)
computed = {}
schedules = {"01 recompute": climb.recompute_steps(toy), "02 contiguous": climb.static_steps(toy)}
for name, schedule in schedules.items():
    computed[name] = sum(count for step in schedule for _, _, count in step.rows)
    print(f"{name}: {len(schedule):2} steps, {computed[name]} tokens computed")
    print("   rows a step:", [len(step.rows) for step in schedule])
assert list(computed.values()) == [9 + 22 + 39, 3 * 4 + 1 + 3 + 5]

# %% [markdown]
# <details><summary>12 steps and 70 tokens; 6 steps and 21</summary>
#
# (Stage 02 in fact computes 27, as done rows run on: a floor counts what is needed.) Half the steps read the weights half
# as often. But the last two have one row: stage 05 would fill them up.
#
# </details>
#
# The real count adds keys and values, attention's FLOPs and the vocabulary's product (`head`). `shared`: tokens of a common
# prefix, which a kernel may read once for all.

# %%
show_source(roofline._work)

# %% [markdown]
# It leaves out norms, softmax, sampling and all writes: no stage reaches 100%.
#
# ## Step 3: what this machine can do
#
# **Predict**: how many FLOPs can this machine do in the time it reads one byte? (Lesson 00 measured both.)

# %%
model = measured_model()
print(model)
stage = STAGES[5](model.path)
config, peaks = stage.config, measure_peaks(stage.device, stage.config.dtype)
ridge = peaks.flops / peaks.bandwidth
weights = roofline._work(config, [("one row", 0, 1)], 1, 0).weight_bytes
print(f"reads {peaks.bandwidth / 1e9:,.1f} GB/s, computes {peaks.flops / 1e9:,.0f} GFLOP/s")
print(f"ridge: {ridge:,.1f} FLOP a byte, {ridge * config.dtype.itemsize / 2:,.0f} rows a step")
print(f"reading {weights / 2**20:,.0f} MiB of weights: {1e3 * weights / peaks.bandwidth:.2f} ms")
assert ridge > 1

# %% [markdown]
# <details><summary>A few to some tens on a CPU core; about 170 on an H200</summary>
#
# A row does 2 FLOPs with a weight: with two bytes a weight the ridge is as many rows, in float32 twice as many.
# An H200 does 790 TFLOP/s and reads 4.6 to 4.7 TB/s. Below its ridge decode is bound by memory, and batching is
# *the* gain. (A CPU may keep a small model in its cache, and read it faster.)
#
# </details>
#
# ## Step 4: the climb
#
# Every stage that one process of this machine can run, 12 requests that arrive at once. TTFT is the mean time to a
# request's first token, waiting included.
#
# **Predict**: which stage has the *lowest* floor a token? Which comes *nearest* to its own?

# %%
workload = ladder_workload(config.vocab_size, "cpu")  # a quarter of a GPU's, and its lengths
stages = [n for n in STAGES if n <= 7 and STAGES[n].fits(has_gpu(), 1)]
rungs = climb.climb(model.path, workload.first(12), peaks, stages)
print(climb.HEADER)
for rung in rungs:
    print(rung)
floors = {r.result.number: r.floor_seconds / r.result.num_tokens for r in rungs}  # a token
assert floors[1] > floors[2]
assert floors[3] > floors[4], "a shared prefix is work that need not be done"

# %%
show(*climb.shares(rungs))

# %% [markdown]
# <details><summary>Lowest: 05 and after, one schedule. Nearest: on a GPU 07, on a CPU 01</summary>
#
# On a CPU stage 01 does needless work, in long products, *efficiently*. A share says how well a schedule is carried out;
# the floor, how good it is. Lessons 02, 04 and 05 lower the floor (03 gives room, not less work), 06 and 07 raise
# the share. (On a GPU stage 01 answers one request.)
#
# </details>
#
# ## Check: one answer
#
# Stages 03 and up must give stage 02's greedy tokens, up to near ties. In bfloat16 random weights nearly tie at once, so the
# course's own model answers, in float32.

# %%
few = ladder_workload(STAGES[2](own_model()).vocab_size, "cpu").first(3)
reference, *others = [STAGES[n](own_model(), dtype="float32").run(few) for n in stages[1:]]
for result in others:
    agreement = compare(result, reference)
    print(f"{result.number:02} {result.name:<22} {agreement}")
    assert agreement.compared > 50

# %% [markdown]
# ## Assemble: the records
#
# `course ladder` measures all stages in full. Your records are laid over those that ship. **Predict**: at which
# stage is *live* memory nearest to what is reserved?

# %%
figure = plots.ladder()
show(figure, figure.alt_text)

# %% [markdown]
# <details><summary>On a CPU at 05; on a GPU at 03, by a little</summary>
#
# Stage 01 keeps nothing. At 03 every row holds the common prefix; 04 holds it once; 05 fills the room with more requests.
#
# </details>
#
# Stage 08 on two GPUs, recorded with random weights of two models' shapes: W1 answers 256 requests, W2 one.

# %%
from course.labs import rank_lab

reports = rank_lab.recorded("ranks")
show(rank_lab.rank_curves(reports), rank_lab.gains_in_words(reports))

# %% [markdown]
# Ranks share the reading and pay for each all-reduce (lesson 08): large models and large batches gain.
#
# ## Measure: beside transformers
#
# `generate` runs static batches, here of 4, until the longest answer is done. Both get the same 8 prompts, tokens
# out, dtype and threads. **Predict**: by what factor does the engine win or lose?

# %%
from transformers.utils import logging

logging.disable_progress_bar()
race = Namespace(model=str(own_model()), dtype="auto", requests=8, runs=1, batch=4, max_num_seqs=8)
report = against_transformers.compare(race)
against_transformers.print_report(report)
batches = against_transformers.in_batches(against_transformers.make_workload(8, 290, 0), 4)
rows = sum(len(batch) * max(r.num_output for r in batch) for batch in batches)
wanted = report["output_tokens"]
print(f"transformers computes {rows} tokens for the {wanted} wanted, {rows / wanted:.2f} times")
assert report["engine"]["kv_bytes_used"] > 0

# %% [markdown]
# <details><summary>Count before you credit the code</summary>
#
# The last line is a part of the factor above it; the rest is 8 rows against 4, and overhead a step: on a GPU nearly all.
# `course bench transformers` measures more rounds.
#
# </details>
#
# ## Beside vLLM
#
# Three workloads, Qwen3-0.6B's shape: **W1** 256 prompts of 100 to 1,024 tokens, answers of as many; **W2** one
# prompt of 128, 512 out; **W3** 256 prompts that share 2,048 tokens, 64 out. The engine, vLLM 0.24 and nano-vLLM, the
# small engine that this course rebuilds, are recorded on H200s; where vLLM is installed, W2 runs. **Predict**: on which is this engine closest to vLLM, on which farthest?

# %%
if importlib.util.find_spec("vllm") and has_gpu():
    print(f"vLLM here, W2: {climb.run_vllm(model.path):,.0f} tok/s")
recorded = climb.reference_workloads()
show(*climb.rivals(recorded))

# %%
for name, entry in recorded["workloads"].items():
    ours, (_, vllm) = entry["median"]["output_tokens_per_second"], climb.OTHERS["vLLM 0.24"][name]
    share = entry["median"]["share_of_roofline_prefix_read_once"]
    ttft = entry["median"]["ttft_median_seconds"]
    print(
        f"{name}: {ours:8,.0f} tok/s, {ours / vllm:.2f} times vLLM's best; "
        f"TTFT {1000 * ttft:,.0f} ms; {share:.0%} of the roofline"
    )
    assert 0 < share < 1, "no share passes 1, once a common prefix is counted once"

# %% [markdown]
# <details><summary>Closest on W1, 1.14 times; farthest on W2, 2.4</summary>
#
# W1 is bound by attention, which both do well. W2 is 512 steps of one row: launches, and a kernel for products
# of one token. W3's prefix is read once for several rows. But the others were measured on another day, and this
# engine is tuned on this very shape and card. A general engine pays for generality.
#
# </details>
#
# ## What is left to gain
#
# A decode step of W1's kind (128 rows at 900 tokens, H200) takes 4.67 ms: attention 3.40, products and norms
# 0.94, head 0.09, sampler 0.07, the rest 0.17.
#
# **Predict**: attention becomes 1.1 times as fast. How much faster is the step? And if everything *but* attention were
# free?

# %% tags=["nbval-check-output"]
parts = {"attention": 3.40, "products, norms": 0.94, "head": 0.09, "sampler": 0.07, "rest": 0.17}
step = sum(parts.values())
for name, factor in (("attention", 1.1), ("products, norms", 2.0), ("sampler", 2.0)):
    faster = step - parts[name] + parts[name] / factor
    print(f"{name} {factor} times as fast: the step gains {step / faster - 1:.1%}")
print(f"all but attention free: {step / parts['attention'] - 1:.0%}")
assert 1.37 < step / parts["attention"] < 1.38

# %% [markdown]
# <details><summary>7%; and 37%</summary>
#
# Attention reads at 3.9 to 4.0 TB/s, of 4.6 that this card can. W2 has a third of its roofline: a single row's
# kernels are so short that memory's *latency* counts. Several tokens a step (speculation) would gain most there.
#
# </details>
#
# ## In real vLLM
#
# Release v0.24.0 has, and this engine has not:
#
# 1. **Speculative decoding**: a small head [proposes](https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/v1/spec_decode/eagle.py#L10)
#    tokens, one step checks several.
# 2. **Quantization**: [FP8](https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/model_executor/layers/quantization/fp8.py#L99)
#    halves $W$, an [FP8 cache](https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/model_executor/layers/quantization/fp8.py#L983) halves $K$.
# 3. **LoRA**: [many adapters](https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/lora/worker_manager.py#L237) over one base, in one batch.
# 4. **Structured output**: a [grammar](https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/v1/structured_output/__init__.py#L36) masks the logits.
# 5. **Images and sound**: [encoders](https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/v1/worker/gpu_model_runner.py#L2892), and a cache for them.
# 6. **Mixtures of experts**: [fused experts](https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/model_executor/layers/fused_moe/layer.py#L103), spread over GPUs.
# 7. **Moving keys and values** [between engines](https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/distributed/kv_transfer/kv_connector/v1/base.py#L171):
#    prefill on one machine, decode on another.
# 8. **Layers of several kinds**: a cache for [sliding windows](https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/v1/core/kv_cache_coordinator.py#L506) beside full attention.
#
# It also has an [HTTP server](https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/entrypoints/openai/api_server.py#L650).
#
# ## Exercises
#
# In `exercises/09_the_ladder.ipynb`:
#
# 1. **Predict** (5 minutes): a decode step's floor.
# 2. **Implement** (20 minutes): your scheduler, block manager and store, in the real engine.
# 3. **Break and fix** (20 minutes): a benchmark that lies.
#
# ## Recap
#
# A floor is counted from a schedule: the longer of bytes over bandwidth and FLOPs over rate, step by step.
# Better schedules lower it; better kernels and graphs come nearer to it. What is left is attention for many
# requests, and latency for one.

# %% [markdown]
# **Check yourself**
#
# <details><summary>1. A stage reaches 80% of its roofline and is the slowest. How?</summary>
#
# Its schedule needs much more work than another; it does that work well.
#
# </details>
# <details><summary>2. W3's share came out at 190%. What was counted wrongly?</summary>
#
# The common prefix: once for each request, though the kernel reads it once for several.
#
# </details>
# <details><summary>3. Which helps W2 more: half the bytes of the weights, or half those of the cache?</summary>
#
# The weights: one short request reads few keys and values.
#
# </details>
#
# **The next question** is yours: which of the eight would you build first, and what would its floor be?
