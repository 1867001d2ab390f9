# %% [markdown]
# # 06 · One program, one token, one row
#
# | This lesson | |
# |---|---|
# | Minutes | 45 |
# | Difficulty | hard |
# | Hardware | any laptop; on a GPU the same cells compile their kernels |
# | Needs | lessons 02, 03 and 05 |
# | Ends in | `nanovllm/kernels/store.py`, `nanovllm/kernels/decode_attention.py`, `nanovllm/layers/backend.py` |

# %% [markdown]
# ## What hurts now
#
# Torch attention gathers each row's blocks into a copy and attends to that: it reads, writes, and reads again.
# Take 256 requests at 900 tokens, one layer: 8 KV heads of 128, two bytes a number.
#
# **Predict** before you run: how many bytes is one reading? How long does it take at 4,600 GB/s, an H200's
# bandwidth? And three passes? Write it down.

# %%
import torch

from course.drawings.kernel_plots import bars, makespan, recorded, timetable
from course.labs.kernel_lab import agree, call, device, has_triton, launch, tl, triton, where
from course.show import plots
from course.show.display import show
from course.show.reading import show_from, show_source

torch.set_num_threads(1)
plots.use_style()
report = recorded()
row, peak = report["decode"]["256 x 900"]["torch"], report["read_bytes_per_second"]
print(where())
print(f"recorded on {report['machine']}: {row['microseconds']:,.0f} µs with torch,")
print(
    f"{row['bytes'] / 1e6:,.0f} MB in {1e6 * row['bytes'] / peak:,.0f} µs at {peak / 1e9:,.0f} GB/s"
)

# %% [markdown]
# <details><summary>944 MB, 205 µs, 615 µs</summary>
#
# $256 \cdot 900 \cdot 8 \cdot 128 \cdot 2 \cdot 2 = 943{,}718{,}400$ bytes, keys and values. Torch takes longer. (Cards differ:
# the recorded one read 4,709.)
#
# </details>
#
# A **kernel** of our own reads blocks where they lie. After this lesson you can
#
# 1. **write** a Triton kernel, with masks, strides and 64-bit offsets,
# 2. **explain** online softmax, and why decode splits a context,
# 3. **measure** a kernel against the bandwidth that is its ceiling.
#
# ## The picture, and the symbols
#
# ![Program i reads token i's row and slot, and writes the row to that slot of the cache; slot −1 is not written.](../figures/kernel_grid.svg)
#
# | symbol | meaning |
# |:--|:--|
# | program | one run of a kernel's code |
# | grid | how many programs, in up to 3 dimensions |
# | `tl.program_id(0)` | which program this is |
# | `tl.arange(0, 8)` | 0 … 7; a power of two long |
# | `tl.constexpr` | a number known when the kernel is compiled |
# | multiprocessor | runs programs; an H200 has 132 |
#
# ## Step 1: one program, one token
#
# A kernel gets a tensor as a **pointer** to its first number; pointer plus offset is an address.
#
# **Predict**: tokens (1 1 1 1), (2 2 2 2), (3 3 3 3), slots 4, 0, 2. What does the cache hold?


# %% tags=["nbval-check-output"]
@triton.jit
def store_kernel(key, cache, slots, SIZE: tl.constexpr):
    token = tl.program_id(0)
    slot = tl.load(slots + token)
    at = tl.arange(0, SIZE)
    tl.store(cache + slot * SIZE + at, tl.load(key + token * SIZE + at))


key = torch.arange(1, 4, device=device)[:, None].expand(3, 4).contiguous()
slots = torch.tensor([4, 0, 2], device=device)
cache = torch.zeros(6, 4, dtype=torch.int64, device=device)
wanted = cache.clone()
wanted[slots] = key
ran = launch(store_kernel, (3,), key, cache, slots, 4)
print(agree(cache, wanted, ran))

# %% [markdown]
# <details><summary>Rows 2, 0, 3, 0, 1, 0</summary>
#
# Programs run in no order, so no two may write the same place.
#
# </details>
#
# ## Step 2: masks, and the slot −1
#
# Three numbers a token need four lanes (places of a vector); a **mask** keeps the fourth from memory. Slot −1 means "do not store".
#
# **Predict**: tokens (1 1 1), (2 2 2), (3 3 3), slots 0, 2, −1. What does a cache of four slots hold, with the
# mask and without?


# %% tags=["nbval-check-output"]
@triton.jit
def masked_kernel(key, cache, slots, SIZE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    token = tl.program_id(0)
    slot = tl.load(slots + token)
    if slot >= 0:
        at = tl.arange(0, BLOCK)
        inside = at < (SIZE if MASKED else BLOCK)
        row = tl.load(key + token * SIZE + at, inside, 0)
        tl.store(cache + slot * SIZE + at, row, inside)


key = torch.arange(1, 4, device=device)[:, None].expand(3, 3).contiguous()
slots = torch.tensor([0, 2, -1], device=device)
for masked in (True, False):
    cache = torch.zeros(4, 3, dtype=torch.int64, device=device)
    wanted = cache.clone()
    wanted[slots[:2]] = key[:2]
    if not masked:
        wanted[1, 0], wanted[3, 0] = 2, 3  # the fourth lane: the next token's first number
    ran = launch(masked_kernel, (3,), key, cache, slots, 3, 4, masked)
    print("with a mask" if masked else "without", agree(cache, wanted, ran), sep="\n")

# %% [markdown]
# <details><summary>Without a mask, each token spills into the next slot</summary>
#
# Nothing crashes; another request's key is wrong. Without `if slot >= 0`, the third token lands *before* the cache.
#
# </details>
#
# ## Step 3: strides, and 64 bits
#
# Keys are a part of `qkv`: the next token's key is a row of `qkv` further on. That distance is the **stride**.
# And a kernel's integers have 32 bits unless told otherwise.
#
# **Predict**: with 8 KV heads of 128, at which slot does an offset wrap? How many GiB of keys lie below?

# %% tags=["nbval-check-output"]
for slot in (2_097_151, 2_097_152):
    offset = torch.tensor(slot, dtype=torch.int32) * 1024
    print(f"slot {slot:,}: offset {offset.item():,}; {slot * 1024 * 2 / 2**30:.1f} GiB")
assert offset < 0

# %% [markdown]
# <details><summary>Slot 2,097,152, or 4 GiB</summary>
#
# $2^{31} / 1{,}024 = 2^{21}$; a model of 8 layers then takes 64 GiB. Hence `.to(tl.int64)` below, on the token; slots
# come with 64 bits.
#
# </details>
#
# With strides, 64 bits and a value beside the key, `masked_kernel` becomes the engine's kernel:

# %%
from nanovllm.layers import attention

show_from("nanovllm/kernels/store.py", "store_kv_kernel", "store_kv")
if has_triton:
    from course.benchmarks import toy_kernels as toy
    from nanovllm.kernels import store
qkv = torch.randn(5, 10, 6, device=device)  # 6 query heads, 2 key heads, 2 value heads; 6 numbers
parts = qkv[:, 6:8], qkv[:, 8:]
slots = torch.tensor([7, 3, -1, 0, 2], device=device)
caches = [torch.zeros(2, 4, 2, 6, device=device) for _ in range(4)]
attention.store_kv(*parts, *caches[:2], slots)
call(lambda: store.store_kv(*parts, *caches[2:], slots))
for found, wanted in zip(caches[2:], caches[:2], strict=True):
    agree(found, wanted)
assert not parts[0].is_contiguous()

# %% [markdown]
# A store's ceiling is the bandwidth of a copy. **Predict**: a program a head (256 bytes of key) or a program a
# token (2,048): which is faster for 16,384 tokens, a prefill? And for 256, a decode step? (In all charts torch's times
# contain Python's launches, ours do not: they are replayed, lesson 07. Where torch's time is short, it is mostly launches.)

# %%
chart = bars(report, "store", "Storing keys and values (recorded)")
show(chart.svg(), chart.alt)

# %% [markdown]
# <details><summary>A token, 2.4 times; then neither</summary>
#
# A prefill moves 134 MB: bandwidth counts, and a short program has too few loads in flight. A decode step moves
# 2 MB, half a microsecond at the ceiling; starting a kernel takes longer.
#
# </details>
#
# ## Step 4: fuse neighbours
#
# Norm and RoPE each read and write queries and keys; then the store reads and writes keys and values. **Fused**
# into one kernel, all is read once and written once.
#
# **Predict**, in heads a token (16 query, 8 key, 8 value): what do three kernels move, what does one?

# %%
separate = 2 * (16 + 8) + 2 * (16 + 8) + 2 * (8 + 8)
fused = 2 * (16 + 8 + 8)
for tokens, rows in report["rope"].items():
    gain = rows["three kernels"]["microseconds"] / rows["the engine's, fused"]["microseconds"]
    print(f"{separate} heads against {fused}: {separate / fused:.1f}; {tokens}: {gain:.1f} times")
chart = bars(report, "rope", "Norm, RoPE and store (recorded)")
show(chart.svg(), chart.alt)
assert separate == 2 * fused

# %% [markdown]
# <details><summary>128 and 64, and one start instead of three</summary>
#
# The bars count only the 64 heads that *must* be moved. Fusing gains more than 2: norm and RoPE also start a
# program a head, which is slow (Step 3).
#
# </details>
#
# The engine's kernel; RoPE pairs dimensions $i$ and $i + D/2$, so it holds two halves. `pdl_wait` is for
# programmatic dependent launch (`PDL`): it lets the next kernel start early, and waits for the one ahead.

# %%
show_from("nanovllm/kernels/store.py", "rope_store_kernel")

# %% [markdown]
# ## Step 5: softmax in one pass
#
# Attention is $\sum_i e^{s_i}v_i / \sum_i e^{s_i}$ over scores $s_i$ and values $v_i$. Against overflow the highest
# score is subtracted first; but a kernel sees scores tile by tile. **Online softmax** keeps the `best` score so
# far, the `total` of the weights $e^{s-best}$, and `acc`, the weighted sum of values. When a higher score comes,
# both sums *shrink* by $e^{best-higher}$.
#
# **Predict**: tiles of scores (1, 3) and (2, 5), of values (10, 20) and (30, 40). By what factor does the
# first tile shrink?

# %% tags=["nbval-check-output"]
from math import exp, inf


def online_softmax_step(best, total, acc, scores, values):
    higher = max(best, *scores)
    weights = [exp(s - higher) for s in scores]
    shrink = exp(best - higher)
    acc = acc * shrink + sum(w * v for w, v in zip(weights, values, strict=True))
    return higher, total * shrink + sum(weights), acc


state = (-inf, 0.0, 0.0)
for scores, values in (((1, 3), (10, 20)), ((2, 5), (30, 40))):
    state = online_softmax_step(*state, scores, values)
    print("best {}, total {:.3f}, acc {:.2f}".format(*state), f"-> {state[2] / state[1]:.3f}")
whole = torch.tensor([1.0, 3, 2, 5]).softmax(0) @ torch.tensor([10.0, 20, 30, 40])
assert abs(state[2] / state[1] - whole) < 1e-4

# %% [markdown]
# <details><summary>By $e^{3-5} \approx 0.135$</summary>
#
# The first tile's total, 1.135, becomes 0.154; the second adds $e^{-3}+e^{0}=1.050$.
#
# </details>
#
# ## Step 6: a row reads its own blocks
#
# One program for each sequence and query head walks over its context in tiles of 32 tokens.

# %%
show_from("course/benchmarks/toy_kernels.py", "attend_range", "whole_kernel")
lengths = torch.tensor([10, 3, 37], dtype=torch.int32, device=device)
tables = torch.randperm(30, device=device).view(3, 10).int()
k_cache, v_cache = torch.randn(2, 30, 4, 2, 8, device=device)  # 30 blocks of 4, 2 KV heads of 8
query = torch.randn(3, 4, 8, device=device)  # 3 sequences, 4 query heads
rows = attention.plan_decode(lengths - 1, tables, k_cache, num_heads=4)
data = (query, k_cache, v_cache, rows, 8**-0.5)
wanted = attention.decode_attention(*data)
result = agree(call(lambda: toy.attend_whole(*data)), wanted)

# %% [markdown]
# ## Step 7: split a long row
#
# **Predict**: one sequence, 16 query heads: how many of 132 multiprocessors are idle? And four processors,
# sequences of 12, 4, 2 and 2 tiles: when is the last one done, if a sequence is one program? If the longer two
# are cut in four? If all tiles are dealt evenly? (Programs start in this order, each on the first processor free.)

# %%
ways = {
    "a program a sequence": [12, 4, 2, 2],
    "12 and 4 cut in four": [3] * 4 + [1] * 4 + [2, 2],
    "20 tiles dealt evenly": [5] * 4,
}
chart = timetable(ways, processors=4)
show(chart.svg(), chart.alt)
assert [makespan(lengths, 4) for lengths in ways.values()] == [12, 6, 5]

# %% [markdown]
# <details><summary>116; 12, 6 and 5</summary>
#
# In decode a row has one query, so only its context can be cut: **split-KV**. The engine deals tiles evenly.
#
# </details>
#
# Each part leaves `best`, `total` and `acc`. A second kernel merges them: both shrink to the higher `best`.

# %%
left = online_softmax_step(-inf, 0, 0, (1, 3), (10, 20))
right = online_softmax_step(-inf, 0, 0, (2, 5), (30, 40))
higher = max(left[0], right[0])
total, acc = (sum(part[i] * exp(part[0] - higher) for part in (left, right)) for i in (1, 2))
assert abs(acc / total - whole) < 1e-4
show_from("course/benchmarks/toy_kernels.py", "split_kernel", "merge_kernel")
result = agree(call(lambda: toy.attend_split(*data, num_splits=3)), wanted)

# %% [markdown]
# ## Measure: decode attention, version by version
#
# **Predict** for 256 rows of 900 tokens, 130 of 100 to 1,900, 16 of 1,500, and one of 640: where does splitting help
# most, where not at all?

# %%
chart = bars(report, "decode", "Decode attention (recorded)")
show(chart.svg(), chart.alt)

# %% [markdown]
# <details><summary>One row gains most; 256 rows, and 130, nothing</summary>
#
# $256 \cdot 16 = 4{,}096$ programs, or 2,080, fill 132 multiprocessors without a cut. The engine reads keys once for both query heads of a KV head, on
# matrix units, with the next tile's loads in flight. One row is 0.6 µs at the ceiling; the rest is starting
# kernels. (FlashAttention is a library's kernel; its bars are of another H200.)
#
# </details>
#
# Here (without a GPU torch's alone, on smaller shapes):

# %%
from course.labs.kernel_lab import decodes_here

for line in decodes_here():
    print(line)

# %% [markdown]
# ## Assemble: the engine's kernels
#
# `decode_plan_kernel` lists a step's tiles, once for all layers; a program takes its share of the list. The toys left
# out: a tile's queries as a matrix for `tl.dot`; rows that begin with the same blocks (lesson 04) and share it, so
# that a prefix is read once; `exp2`, which the hardware has (`scale` takes in $\log_2 e$). A tile is six numbers with the names `TILE_ROW` and so on: its first row, the number of rows that share it, its first
# token, the one after its last, the number of its partial result, whether it is the last of its row. `rows` says where a row's partial results begin, and how many it has. `NUM_STAGES`: tiles whose loads are in flight. A `Backend` names what a layer calls.

# %%
from nanovllm.layers import backend as backends

show_from("nanovllm/kernels/device_functions.py", "online_softmax_step")
show_from("nanovllm/kernels/decode_attention.py", "decode_attention_kernel")
show_source(backends.Backend, backends.choose_backend, backends.why_no_triton)
chosen = backends.choose_backend("auto", device, head_dim=128, block_size=16)
print(f"here 'auto' takes {chosen.name!r} for decode rows")

# %% [markdown]
# ## Check: the real model, with the store inside
#
# The engine takes a store function as an argument: Step 3's and torch's must give the same tokens.

# %%
from course.serving import ask, start_engine


def story(store):
    engine = start_engine(device=str(device), attention_backend="torch", store_kv=store)
    [seq] = ask(engine, [[5, 17, 290, 41, 77, 8]], 10)
    engine.close()
    return torch.tensor(seq.token_ids)


tokens = agree(call(lambda: story(store.store_kv)), story(attention.store_kv))
print(tokens[6:].tolist())

# %% [markdown]
# ## Measure: the ladder
#
# Stage 06 is stage 05 with our kernels. **Predict**: what do they gain on a GPU, and on a CPU?

# %%
from course.measure.ladder_workload import ladder_workload
from course.models.choice import measured_model
from course.stages import ContinuousBatching, TritonKernels
from course.stages.records import record

job = ladder_workload(ContinuousBatching(measured_model().path).vocab_size)
for kind in (ContinuousBatching, TritonKernels):
    if kind is TritonKernels and device.type == "cpu":
        print("stage 06 is not run here: it needs a GPU")
        break
    runs = [kind(measured_model().path).run(job) for _ in range(2 if device.type == "cpu" else 1)]
    record(runs)
    print(runs[-1])
figure = plots.ladder(upto=6)
show(figure, figure.alt_text)

# %% [markdown]
# <details><summary>Two to three times on a large GPU; nothing</summary>
#
# On a CPU `auto` takes torch. On a GPU a small model waits for Python to start kernels: now there are fewer.
#
# </details>
#
# ## In real vLLM
#
# Release v0.24.0:
# [`reshape_and_cache_flash`](https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/_custom_ops.py#L2531) stores,
# [`triton_unified_attention.py`](https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/v1/attention/ops/triton_unified_attention.py)
# can attend (by default FlashAttention does). Three differences:
#
# 1. Its store is CUDA C++, and may write 8-bit floats.
# 2. Prefill and decode rows share one launch.
# 3. It cuts rows only in small batches that all decode, each into 16 parts; we deal out tiles.
#
# ## Exercises
#
# In `exercises/06_triton_kernels.ipynb`:
#
# 1. **Predict** (5 minutes): a kernel's time from its bytes.
# 2. **Implement** (25 minutes): the store kernel.
# 3. **Break and fix** (20 minutes): an offset of 32 bits.
#
# ## Recap
#
# A kernel is one program run many times; masks keep it from its neighbours' memory. A good one moves each byte
# once and keeps every multiprocessor busy. Online softmax lets a row be cut.

# %% [markdown]
# **Check yourself**
#
# <details><summary>1. A head has 96 numbers. How many lanes are masked?</summary>
#
# 32 of 128.
#
# </details>
# <details><summary>2. Two parts have best 2 and 6, total 3 and 1. The total of both?</summary>
#
# $3 e^{-4} + 1 \approx 1.055$.
#
# </details>
# <details><summary>3. Why does prefill need no split?</summary>
#
# Many queries a row are many programs.
#
# </details>
#
# **The next question**: a decode step is hundreds of short kernels. Who starts them, and how long does that
# take?
