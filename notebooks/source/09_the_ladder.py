# %% [markdown]
# # 09 · The ladder
#
# | This lesson | |
# |---|---|
# | Minutes | 25 |
# | Difficulty | medium |
# | Hardware | any laptop; a GPU runs more stages |
# | Needs | lessons 00 to 08 |
# | Ends in | all of `nanovllm/` |

# %% [markdown]
# ## What hurts now
#
# Eight lessons, eight stages, each measured beside the one before. Now all of them do one job, in one
# process, one after the other.
#
# | stage | new in it | lesson |
# |--:|:--|:--|
# | 01 | recompute everything for every token | 01 |
# | 02 | a contiguous cache, a static batch | 02 |
# | 03 | blocks instead of rows | 03 |
# | 04 | common beginnings are computed once | 04 |
# | 05 | requests come and go; prompts in chunks | 05 |
# | 06, 07 | our kernels; graphs and overlap (GPU) | 06, 07 |
# | 08 | two ranks | 08 |
#
# **Predict** before you run: which *one* step buys most here? Which buys nothing? How many times faster
# is the last stage than the first? Write it down.

# %%
import torch

from course import plots
from course.display import show
from course.drawings import ladder_drawings as drawings
from course.models import has_gpu, measured_model
from course.stages import STAGES
from course.workload import ladder_workload

torch.set_num_threads(1)
plots.use_style()
model = measured_model().path
gpus = torch.cuda.device_count()
stages = {n: kind(model) for n, kind in STAGES.items() if kind.fits(has_gpu(), gpus)}
job = ladder_workload(stages[5].vocab_size)
job = job.first(16)  # on a CPU all there are; on a GPU a quarter: 40 s, not three minutes
results = {n: stage.run(stage.part_of(job)) for n, stage in stages.items()}
first = results[1].tokens_per_second
for number, result in results.items():
    gain = result.tokens_per_second / first
    ttft = 1e3 * sum(result.ttft) / len(result.ttft)
    rate = f"{result.tokens_per_second:8,.0f} tok/s {gain:6.1f} x   TTFT {ttft:7,.0f} ms"
    print(f"{number:02} {result.name:22}{rate}   KV {result.kv_reserved_bytes / 2**20:6,.1f} MiB")
assert all(r.num_tokens == r.workload.num_output_tokens for r in results.values())

# %% [markdown]
# <details><summary>How to read it</summary>
#
# The cache (02) buys most: work per token no longer grows with the text. Blocks (03) buy *room*, which these
# even lengths hardly need, and cost a gather. Then sharing and refilling the batch pay. Two ranks on one CPU
# lose: a tiny model has nothing to split. (Stage 01 may run fewer requests, one at a time; its TTFT is that
# of its own queue.)
#
# </details>
#
# After this lesson you can
#
# 1. **say** what each step buys, on which load, and on which it does not,
# 2. **place** an engine between its floor and its peers,
# 3. **name** what a production engine has beyond this one.
#
# ## Step 1: did they all say the same?
#
# A faster engine that says something else has not won. Greedy tokens are compared with stage 01's, up to near
# ties (two best logits closer than rounding).

# %%
from course.stages import compare

for number, result in results.items():
    print(f"{number:02}: {compare(result, results[1])}")

# %% [markdown]
# (Random weights in bfloat16, which a GPU measures with, tie soon and often; the lessons' own checks use a real
# model in float32.)
#
# ## Step 2: the floor
#
# A stage's job needs at least its bytes and its FLOPs: lesson 00's roofline, summed over the steps that stage 05
# took, a common prefix read once a step.
#
# **Predict**: what share of that floor does the fastest stage reach on this machine? 10%, 50%, 90%?

# %%
from course.timing import machine_peaks

peaks = machine_peaks(results[5].device)
floor = drawings.floor_seconds(stages[5], job, peaks)
whole = [result for n, result in results.items() if n != 1 or not has_gpu()]
print(f"reads {peaks.bandwidth / 1e9:,.0f} GB/s, multiplies {peaks.flops / 1e9:,.0f} GFLOP/s")
show(*drawings.against_the_floor(whole, floor))
assert floor < min(result.seconds for result in whole)

# %% [markdown]
# <details><summary>What fills the rest</summary>
#
# On a CPU with a model of 7 million weights, mostly Python and many small operations, which the floor does not
# know; weights may come from a cache besides. The larger the model, the nearer the floor: see the H200 below.
#
# </details>
#
# ## Step 3: the whole ladder, as recorded
#
# Records that ship with the course, and your own; `course ladder` measures yours with nothing else running,
# `course ladder --shipped --draw figures/ladder.svg figures/ladder.png` redraws the README's picture.

# %%
from course.records import record

for number in (n for n in results if n != 1):
    record(results[number])
figure = plots.ladder()
show(figure, figure.alt_text)

# %% [markdown]
# Left: throughput, logarithmic. Right: the memory for keys and values that was reserved (hollow) and in use
# (filled). A stage that moves the filled mark toward the hollow one wastes less.
#
# ## Step 4: beside transformers
#
# `generate` from transformers is correct, general, and for one batch at a time. Both sides get the same 12 prompts
# and lengths; transformers runs static batches of 6, padded on the left.
#
# **Predict**: how many times faster is the engine? And for a *single* request?

# %%
from functools import partial
from types import SimpleNamespace as Namespace

from transformers.utils import logging

from course.benchmarks.against_transformers import Engine, Transformers, make_workload
from course.models import own_model
from course.timing import measure

logging.disable_progress_bar()
engine = Engine(str(own_model()), Namespace(max_num_seqs=None, dtype="auto"))
other = Transformers(str(own_model()), engine.dtype, engine.device, batch_size=6)
for count in (1, 12):
    work = make_workload(count, 4096, seed=count)
    tokens = sum(request.num_output for request in work)
    seconds = [measure(partial(side.run, work), repeats=2).lowest for side in (other, engine)]
    rates = ", ".join(f"{tokens / s:,.0f}" for s in seconds)
    print(f"{count:2} requests: transformers and engine {rates} tok/s")
engine.llm.close()

# %% [markdown]
# <details><summary>One request: about the same on a CPU. Twelve: a few times faster</summary>
#
# For one request there is nothing to schedule, and what counts is how little happens beside the products. With
# several, `generate` waits for the longest of each batch and computes its padding.
#
# </details>
#
# ## Step 5: beside nano-vLLM and vLLM
#
# W1: 256 prompts of 100 to 1,024 tokens, as many out. W2: one prompt of 128, 512 out. W3: 256 prompts that share
# 2,048 tokens, 64 out. One H200, Qwen3-0.6B's shape, random weights. (The peers ran at other times than ours; both
# used FlashAttention-3.)
#
# **Predict**: in which workload is this engine furthest ahead, and why?

# %%
import json

from course.records import SHIPPED

bench = json.loads((SHIPPED / "h200_workloads.json").read_text())
ours = drawings.recorded_runs(bench)
show(*drawings.beside(ours, bench["machine"]))
for name, workload in bench["workloads"].items():
    share = workload["median"]["share_of_roofline_prefix_read_once"]
    print(f"{name}: {ours[name][1]:,.0f} tok/s, {share:.0%} of its floor")
    assert ours[name][0] > drawings.PEERS["vLLM 0.24"][name][1]

# %% [markdown]
# <details><summary>W2 and W3</summary>
#
# W2 is one row: fused matrix-vector kernels and a step that is captured whole leave few gaps (lesson 07). W3 reads
# a common prefix once for several rows (lesson 06). W1 is bound by reading keys and values, and there all are
# near the memory's limit.
#
# </details>

# %%
import importlib.util

if importlib.util.find_spec("vllm") is None:
    print("vLLM is not installed here. Where it is, this cell runs it on the prompts of Step 4.")
else:
    from vllm import LLM, SamplingParams

    vllm = LLM(str(own_model()), dtype="float32", max_model_len=256, gpu_memory_utilization=0.3)
    params = [SamplingParams(temperature=0, max_tokens=r.num_output, ignore_eos=True) for r in work]
    prompts = [{"prompt_token_ids": r.prompt} for r in work]
    timing = measure(lambda: vllm.generate(prompts, params, use_tqdm=False))
    print(f"vLLM: {tokens / timing.median:,.0f} tok/s")

# %% [markdown]
# ## Step 6: what is left to gain
#
# W1's decode step of 256 rows at 900 tokens took 8.07 ms there. **Predict** from lesson 06's record: how much of it
# is attention?

# %%
kernels = json.loads((SHIPPED / "h200_kernel_ladder.json").read_text())
row = kernels["decode"]["256 x 900"]["the engine's"]
attention, step, layers = row["microseconds"] * 28 / 1e3, 8.07, 28
best = row["bytes"] * layers / kernels["read_bytes_per_second"] * 1e3
print(f"attention {attention:.2f} ms of {step} ms; at full bandwidth {best:.2f} ms")
print(f"all else {step - attention:.2f} ms: products, norms, the head, sampling, launches")
assert best < attention < step

# %% [markdown]
# <details><summary>Four fifths</summary>
#
# At full bandwidth attention would save about 0.7 ms, a tenth of the step; the rest is many short kernels.
# Larger steps need fewer bytes: smaller numbers in the cache (8 bits), or models that share heads.
#
# </details>
#
# ## Check: nothing in the engine is unexplained
#
# Every file of `nanovllm/` ends in one lesson.

# %% tags=["nbval-check-output"]
from pathlib import Path

from course.lessons import FILES_OF_LESSON

engine_files = {p.relative_to("../nanovllm").as_posix() for p in Path("../nanovllm").rglob("*.py")}
read = {file for files in FILES_OF_LESSON.values() for file in files}
print("not in a lesson:", sorted(f for f in engine_files - read if not f.endswith("__init__.py")))
assert read <= engine_files

# %% [markdown]
# ## In real vLLM
#
# What release v0.11.0 does that this engine does not:
#
# 1. It is a **server**: [OpenAI's API](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/entrypoints/openai/api_server.py#L1511)
#    over an [asynchronous engine](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/v1/engine/async_llm.py#L52).
# 2. **Quantization**, such as [8-bit floats](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/model_executor/layers/quantization/fp8.py#L71).
# 3. **Speculative decoding**: a [small model proposes](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/v1/spec_decode/eagle.py#L42),
#    the large one checks several tokens in a step.
# 4. **Mixtures of experts**: [fused kernels](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/model_executor/layers/fused_moe/layer.py#L912),
#    and experts spread over GPUs.
# 5. **Adapters**: [LoRA](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/lora/layers/base.py#L16), a different one for each request.
# 6. **Pictures and sound** as [inputs](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/multimodal/registry.py#L89).
# 7. **Grammars**: [output that fits a schema](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/v1/structured_output/__init__.py#L32).
# 8. **Prefill elsewhere**: keys and values that [travel between machines](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/distributed/kv_transfer/kv_connector/v1/base.py#L83).
# 9. Layers with [different caches](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/v1/core/kv_cache_coordinator.py#L268), such as sliding windows; hundreds of models, and hardware beyond NVIDIA's.
#
# When our engine is the wrong one: for any of these.
#
# ## Exercises
#
# In `exercises/09_the_ladder.ipynb`:
#
# 1. **Predict** (5 minutes): a decode step's floor from numbers on the page.
# 2. **Implement** (20 minutes): your scheduler, block manager and store, inside the real engine, in a race.
# 3. **Break and fix** (20 minutes): a benchmark that lies.
#
# ## Recap
#
# A cache ends the quadratic cost; blocks and hashes make room; the scheduler keeps rows full; kernels, graphs and
# overlap take away what is neither reading nor arithmetic. A number counts with its machine, its spread, and the
# floor beside it.

# %% [markdown]
# **Check yourself**
#
# <details><summary>1. A change makes W2 a third faster and leaves W1 as it was. What kind of change?</summary>
#
# One of launches, gaps or small products: with 256 rows, reading the cache hides them.
#
# </details>
# <details><summary>2. Throughput doubled, TTFT tripled. Better?</summary>
#
# For a batch job, yes; for a chat, no. Look for the knee (lesson 05).
#
# </details>
# <details><summary>3. An engine reports 190% of its roofline. How?</summary>
#
# The floor counted a common prefix once for each request, and the engine read it once for several.
#
# </details>
#
# **The next question** is yours: pick a line of the list above, find its file, and read it. You know the words now.
