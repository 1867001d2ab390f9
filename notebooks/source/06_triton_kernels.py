# %% [markdown]
# # 06 · One program, one token, one row
#
# | This lesson | |
# |---|---|
# | Minutes | 60 |
# | Difficulty | hard |
# | Hardware | any laptop; on a GPU the same cells compile their kernels and time them |
# | Needs | lessons 02, 03 and 05 |
# | Ends in | `nanovllm/ops/kernels.py`, `nanovllm/ops/backend.py` |

# %% [markdown]
# ## What hurts now
#
# A decode step reads every request's keys and values once; it can take no less time than that. Our
# torch attention gathers each row's blocks into one long copy, then attends to the copy: it reads, writes,
# and reads again.
#
# Take 256 requests at 900 tokens, one layer of Qwen3-0.6B's shape: 8 KV heads of 128, two bytes a number.
#
# **Predict** before you run. How many bytes are that? How long must an H200 take at least, which reads
# 4,600 GB/s? And how long if everything is moved three times? Write it down.

# %%
import torch

from course import plots
from course.display import show
from course.kernel_lab import agree, call, device, has_triton, launch, tl, triton, where
from course.kernel_plots import bars, ceiling, makespan, recorded, table, timetable, words
from course.reading import show_from, show_source

torch.set_num_threads(1)
plots.use_style()
report = recorded()
print(where())
row = report["decode"]["256 x 900"]["torch"]
print(f"recorded on {report['machine']}: {row['microseconds']:,.0f} µs with torch")
print(f"{row['bytes'] / 1e6:,.0f} MB; at {ceiling(report, 'decode') / 1e9:,.0f} GB/s:", end=" ")
print(f"{1e6 * row['bytes'] / ceiling(report, 'decode'):,.0f} µs")

# %% [markdown]
# <details><summary>944 MB, 205 µs, and more than three times that</summary>
#
# $256 \cdot 900 \cdot 8 \cdot 128 \cdot 2 \cdot 2 = 943{,}718{,}400$ bytes (keys and values, two bytes
# each). At 4,600 GB/s: 205 µs. Three times: 615 µs. Torch takes longer still: its copy
# reads and writes below the ceiling, and rows are padded.
#
# </details>
#
# Only code that reads blocks where they lie can do better: a **kernel** of our own. After this lesson you
# can
#
# 1. **write** a Triton kernel, with masks, strides and 64-bit offsets,
# 2. **explain** online softmax, and why decode splits a context,
# 3. **measure** a kernel against the bandwidth that is its ceiling.
#
# ## The picture, and the symbols
#
# ![Four programs run the same code; program i reads token i's row and its slot, and writes the row to that slot of the cache; a token of slot −1 is not written.](../figures/kernel_grid.svg)
#
# | symbol | meaning |
# |:--|:--|
# | program | one run of a kernel's code; many run at once |
# | grid | how many programs, in up to three dimensions |
# | `tl.program_id(0)` | which program this is |
# | `tl.arange(0, 8)` | the vector 0 … 7; its length must be a power of two |
# | `tl.constexpr` | a number that is compiled in |
# | multiprocessor (SM) | what runs programs on a GPU; an H200 has 132 |
#
# ## Step 1: one program, one token
#
# A kernel gets tensors as **pointers** to their first number. Pointer plus offset is an address; a vector of
# offsets loads a vector. Below, each program copies one token's key, four numbers, into its slot.


# %%
@triton.jit
def store_kernel(key, cache, slots, SIZE: tl.constexpr):
    token = tl.program_id(0)
    slot = tl.load(slots + token)
    at = tl.arange(0, SIZE)
    tl.store(cache + slot * SIZE + at, tl.load(key + token * SIZE + at))


# %% [markdown]
# **Predict**: tokens of (1 1 1 1), (2 2 2 2), (3 3 3 3), slots 4, 0, 2. What does the cache of six slots
# hold?

# %% tags=["nbval-check-output"]
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
# One row a program. On a GPU all three run at once, in no order. So two programs must never write the
# same place: slots are distinct.
#
# </details>
#
# ## Step 2: masks, and the slot −1
#
# Heads have 80 numbers in some models, and `tl.arange` knows powers of two only. So a program takes more
# lanes than it needs, and a **mask** keeps the rest from memory. A slot of −1 means "do not store": padding
# of lesson 07, for one. Here `MASKED` leaves the mask away, to see what it is for.


# %%
@triton.jit
def masked_kernel(key, cache, slots, SIZE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    token = tl.program_id(0)
    slot = tl.load(slots + token)
    if slot >= 0:
        at = tl.arange(0, BLOCK)
        inside = at < (SIZE if MASKED else BLOCK)
        row = tl.load(key + token * SIZE + at, inside, 0)
        tl.store(cache + slot * SIZE + at, row, inside)


# %% [markdown]
# Three numbers a token, so four lanes. Tokens (1 1 1) and (2 2 2), and a third, (3 3 3), whose slot is −1;
# slots 0 and 2. **Predict** both caches.

# %% tags=["nbval-check-output"]
key = torch.arange(1, 4, device=device)[:, None].expand(3, 3).contiguous()
slots = torch.tensor([0, 2, -1], device=device)
for masked in (True, False):
    cache = torch.zeros(4, 3, dtype=torch.int64, device=device)
    wanted = cache.clone()
    wanted[slots[:2]] = key[:2]
    if not masked:
        wanted[1, 0], wanted[3, 0] = 2, 3  # the fourth lane: the next row's first number
    ran = launch(masked_kernel, (3,), key, cache, slots, 3, 4, masked)
    print("with a mask" if masked else "without", agree(cache, wanted, ran), sep="\n")

# %% [markdown]
# <details><summary>Without a mask each token spills into its neighbour's slot</summary>
#
# The fourth lane reads the next token's first number and writes it into the next slot: slot 1 gets a 2, slot
# 3 a 3. Nothing crashes; another request's key is wrong. Without `if slot >= 0`, the third token would
# be written *before* the cache's first byte.
#
# </details>
#
# ## Step 3: strides, and 64 bits
#
# Keys arrive as a part of `qkv`: a token's next row is not `SIZE` numbers on, but a whole row of `qkv`. The
# distance is the **stride**. And `slot * SIZE` can be large. A kernel's integers have 32 bits unless you
# say otherwise.
#
# **Predict**: with 8 KV heads of 128, from which slot on does a 32-bit offset wrap? What does that take
# in GiB, of one layer's keys?

# %% tags=["nbval-check-output"]
for slot in (2_097_151, 2_097_152):
    offset = torch.tensor(slot, dtype=torch.int32) * 1024
    print(f"slot {slot:,}: offset {offset.item():,}; {slot * 1024 * 2 / 2**30:.1f} GiB in")
assert offset < 0

# %% [markdown]
# <details><summary>Slot 2,097,152: exactly 4 GiB</summary>
#
# $2^{31} / 1{,}024 = 2^{21}$. A small model on a large GPU has that many slots, and its first user above
# them gets memory that is not his. nano-vLLM's kernel had this bug. Hence `.to(tl.int64)` below.
#
# </details>
#
# The finished toy copies all heads of a token's key and value. Its launcher passes `key.stride(0)`.

# %%
show_from("course/toy_kernels.py", "store_token_kernel", "store_tokens")

# %%
from nanovllm.ops import attention

if has_triton:
    from course import toy_kernels as toy

qkv = torch.randn(5, 10, 6, device=device)  # 6 query heads, 2 key heads, 2 value heads; 6 numbers
parts = qkv[:, 6:8], qkv[:, 8:]
slots = torch.tensor([7, 3, -1, 0, 2], device=device)
caches = [torch.zeros(2, 4, 2, 6, device=device) for _ in range(4)]
attention.store_kv(*parts, *caches[:2], slots)
call(lambda: toy.store_tokens(*parts, *caches[2:], slots))
for found, wanted in zip(caches[2:], caches[:2], strict=True):
    agree(found, wanted)
assert not parts[0].is_contiguous()

# %% [markdown]
# ### How near the ceiling?
#
# A store reads a row and writes it, so its ceiling is a copy's bandwidth. **Predict**: a program a head
# moves 256 bytes of a key, a program a token 2,048. Which is faster for 16,384 tokens (a prefill), and
# does it matter for 256 (a decode step)?

# %%
figure = bars(report, "store", "Storing keys and values (recorded)")
show(figure, words(report, "store"))
print(table(report, "store"))

# %% [markdown]
# <details><summary>How to read it</summary>
#
# 134 MB for a prefill: there bandwidth counts, and torch pays for looking up which slots are wanted and for
# copies. 2 MB for a decode step: at the ceiling under a microsecond. Starting a kernel takes longer than that,
# so no kernel comes near the ceiling there, and fewer kernels is what helps.
#
# </details>
#
# ## Step 4: fuse neighbours
#
# Before the store, queries and keys are normed, then turned (RoPE). Three kernels each read what the one
# before wrote. **Fused** into one, the row is read once, and written once where it is wanted.
#
# **Predict**, in heads a token (16 query, 8 key, 8 value): norm and RoPE each read and write queries and
# keys; the store reads and writes keys and values. What do three kernels move, what does one?

# %%
separate = 2 * (16 + 8) + 2 * (16 + 8) + 2 * (8 + 8)
fused = 2 * (16 + 8 + 8)
rope = report["rope"]["16,384 tokens"]
gain = rope["three kernels"]["microseconds"] / rope["the engine's, fused"]["microseconds"]
print(
    f"{separate} heads a token against {fused}: {separate / fused:.1f} times; measured {gain:.1f}"
)
figure = bars(report, "rope", "Norm, RoPE and store: GB/s of what must be moved (recorded)")
show(figure, words(report, "rope"))
assert separate == 2 * fused

# %% [markdown]
# <details><summary>128 against 64, and a start in place of three</summary>
#
# The bars count only what *must* be moved, 64 heads, so that three kernels cannot look busy by moving more.
# At 256 tokens starts count more than bytes: 28 layers, 56 starts saved a step.
#
# </details>
#
# The engine's kernel. A program holds all heads of a token as a table [heads, half a head], twice, since RoPE
# pairs dimension $i$ with $i + d/2$ (lesson 01).

# %%
show_from("nanovllm/ops/kernels.py", "rope_store_kernel")

# %% [markdown]
# ## Step 5: softmax in one pass
#
# Attention needs $\sum_i e^{s_i} v_i / \sum_i e^{s_i}$. In float, $e^{s}$ overflows, so the
# highest score is subtracted first; but a kernel sees the scores tile by tile, and learns the highest last.
# **Online softmax** keeps three numbers: the `best` score so far, the `total` of the weights
# $e^{s - best}$, and `acc`, the weighted sum of values. If a higher score comes, what is there
# *shrinks* by $e^{best - higher}$.
#
# **Predict**: tiles of scores (1, 3) and (2, 5), values (10, 20) and (30, 40). By what factor does the
# second tile shrink the first?

# %% tags=["nbval-check-output"]
from math import exp


def absorb(best, total, acc, scores, values):
    higher = max(best, *scores)
    weights = [exp(s - higher) for s in scores]
    shrink = exp(best - higher)
    acc = acc * shrink + sum(w * v for w, v in zip(weights, values, strict=True))
    return higher, total * shrink + sum(weights), acc


state = (float("-inf"), 0.0, 0.0)
for scores, values in (((1, 3), (10, 20)), ((2, 5), (30, 40))):
    state = absorb(*state, scores, values)
    print("best {}, total {:.3f}, acc {:.2f}".format(*state), f"-> {state[2] / state[1]:.3f}")
whole = torch.tensor([1.0, 3, 2, 5]).softmax(0) @ torch.tensor([10.0, 20, 30, 40])
assert abs(state[2] / state[1] - whole) < 1e-4

# %% [markdown]
# <details><summary>By $e^{3-5} \approx 0.135$</summary>
#
# The first tile's total, 1.135, becomes 0.154; the second adds $e^{-3} + e^{0} = 1.050$. No score was
# kept.
#
# </details>
#
# ## Step 6: a row reads its own blocks
#
# Now a kernel: one program for each sequence and query head. It walks over its context in tiles of 32
# tokens. The slot of a token is lesson 03's: `block * BLOCK_SIZE + token % BLOCK_SIZE`; the rest
# is Step 5.

# %%
show_from("course/toy_kernels.py", "attend_range", "whole_kernel")

# %%
from nanovllm.ops.attention import Rows

lengths = torch.tensor([10, 3, 37], dtype=torch.int32, device=device)
tables = torch.randperm(30, device=device).view(3, 10).int()
k_cache, v_cache = torch.randn(2, 30, 4, 2, 8, device=device)  # 30 blocks of 4, 2 KV heads of 8
query = torch.randn(3, 4, 8, device=device)  # 3 sequences, 4 query heads
rows = Rows(slots, lengths, tables, lengths)  # attention reads the second and the third
data = (query, k_cache, v_cache, rows, 8**-0.5)
wanted = attention.attend_decodes(*data)
result = agree(call(lambda: toy.attend_whole(*data)), wanted)

# %% [markdown]
# ## Step 7: split a long row
#
# **Predict**: one sequence of 640 tokens, 16 query heads. How many programs run? How many of an H200's 132
# multiprocessors have nothing to do?
#
# And with many rows: four processors, four sequences of 12, 4, 2 and 2 tiles. When is the last one done, if
# a sequence is one program? If each is cut in four? If the 20 tiles are dealt out evenly?

# %%
ways = {
    "a program a sequence": [12, 4, 2, 2],
    "12 and 4 cut in four": [3] * 4 + [1] * 4 + [2, 2],
    "20 tiles dealt evenly": [5] * 4,
}
figure = timetable(ways, processors=4)
ends = {name: makespan(lengths, 4) for name, lengths in ways.items()}
show(figure, f"Four processors; the last is done after {list(ends.values())} tiles")
print(ends)
assert min(ends.values()) == 5 == (12 + 4 + 2 + 2) / 4

# %% [markdown]
# <details><summary>16 programs, 116 idle; 12, 6 and 5</summary>
#
# In decode a row has one query, so it offers no other work to split: the context must be cut. That is
# **split-KV**, or Flash-Decoding. A prefill has many queries a row, and needs none. Cutting rows alike leaves
# an uneven end; the engine deals out all tiles of a step evenly.
#
# </details>
#
# Each part leaves its three numbers, not divided, and a second kernel merges them. Merging is absorbing once
# more: both parts shrink to the higher `best`.

# %%
left, right = absorb(float("-inf"), 0.0, 0.0, (1, 3), (10, 20)), None
right = absorb(float("-inf"), 0.0, 0.0, (2, 5), (30, 40))
higher = max(left[0], right[0])
total, acc = (sum(part[i] * exp(part[0] - higher) for part in (left, right)) for i in (1, 2))
assert abs(acc / total - whole) < 1e-4
show_from("course/toy_kernels.py", "split_kernel", "merge_kernel")
result = agree(call(lambda: toy.attend_split(*data, num_splits=3)), wanted)

# %% [markdown]
# ## Measure: decode attention, version by version
#
# Four loads: 256 equal rows; 130 rows of 100 to 1,900 tokens; 16 of 1,500; one of 640. **Predict** where
# splitting helps most, and where not at all.

# %%
figure = bars(report, "decode", "Decode attention (recorded)")
show(figure, words(report, "decode"))
print(table(report, "decode"))

# %% [markdown]
# <details><summary>One row gains most; 256 rows nothing</summary>
#
# $256 \cdot 16 = 4{,}096$ programs keep 132 multiprocessors busy without a cut. One row has 16. The engine's
# kernel also reads keys once for both query heads of a KV head, on the matrix units, and deals tiles evenly,
# so ragged rows gain. 640 tokens are 2.6 MB, 0.6 µs at the ceiling: there the starts of two kernels are
# what is left. FlashAttention-3, the reference others are measured by, is beside it.
#
# </details>
#
# The same benchmark here: on a GPU all versions, without one torch's alone, on smaller shapes.

# %%
from course import machine
from course.benchmarks.attention import measure_shape, shapes
from course.benchmarks.kernel_ladder import DECODE_SCALE, decode_versions
from course.benchmarks.roofline import read_bandwidth

dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
peak = read_bandwidth(device)
print(f"{machine.describe()}: reads {peak / 1e9:,.0f} GB/s")
versions = decode_versions() if device.type == "cuda" else {"torch": decode_versions()["torch"]}
for shape, lens in shapes(DECODE_SCALE[device.type]).items():
    for name, backend in versions.items():
        row = measure_shape(backend, lens, device, dtype, peak, graph=name != "torch")
        print(f"{shape:28}{name:20}{row['microseconds']:>10,.0f} µs {row['bytes'] / 1e6:>8,.1f} MB")

# %% [markdown]
# ## Assemble: the engine's kernels
#
# The list of tiles is made on the GPU, once a step, by `plan_kernel`: of each tile its row, its tokens, and
# which part of the row it belongs to. Then each program takes its share of the list. New beside the toy: one
# tile of queries is a [16, head size] matrix, for `tl.dot`; rows that begin with the same blocks (lesson 04)
# share it, so their prefix is read once; `exp2` in place of `exp`, since the hardware has it.

# %%
show_from("nanovllm/ops/kernels.py", "absorb", "decode_attention_kernel")

# %% [markdown]
# `merge_parts_kernel` is our merge, `prefill_attention_kernel` Step 6 with many queries and a causal mask; the
# rest of the file fuses a layer's norm, gate and sum into its products, and samples. A `Backend` names the
# functions a layer calls, and `choose_backend` takes what was measured to be best: in the table `AUTO`.

# %%
from nanovllm.ops import backend as backends

show_source(backends.Backend, backends.choose_backend, backends.why_not_triton)
chosen = backends.choose_backend("auto", device, head_dim=128, block_size=16)
print(f"here 'auto' takes {chosen.name!r} for decode rows")

# %% [markdown]
# ## Check: the real model, with our store inside
#
# Kernels against their twins were equal. Now a whole model: the engine takes a store function as an argument,
# and we hand it Step 3's. On a CPU that runs in the interpreter, so the story is short.

# %%
from course.load import ask, run
from course.models import own_model
from course.stages.paged import PLAIN
from nanovllm.config import EngineArgs
from nanovllm.llm_engine import LLMEngine


def story(store):
    args = EngineArgs(str(own_model()), device=str(device), max_model_len=64, **PLAIN)
    engine = LLMEngine(args, store_kv=store)
    seq = ask(engine, "story", [5, 17, 290, 41, 77, 8], 10)
    run(engine)
    engine.close()
    return torch.tensor(seq.token_ids)


tokens = agree(call(lambda: story(toy.store_tokens)), story(attention.store_kv))
print(tokens[6:].tolist())

# %% [markdown]
# ## Measure: the ladder
#
# Stage 06 is stage 05 with the Triton backend, and needs a GPU. Without one there is nothing to gain: `auto`
# takes torch, and the step is the same.

# %%
from course.models import measured_model
from course.records import record
from course.stages import ContinuousBatching, TritonKernels
from course.workload import ladder_workload

job = ladder_workload(ContinuousBatching(measured_model().path).vocab_size)
for kind in (ContinuousBatching, TritonKernels):
    if kind is TritonKernels and device.type == "cpu":
        print("stage 06 is not run here: it needs a GPU")
        break
    runs = [kind(measured_model().path).run(job) for _ in range(2)]
    record(runs)
    print(runs[-1])
figure = plots.ladder(upto=6)
show(figure, figure.alt_text)

# %% [markdown]
# When does it *not* help? On a small model with few rows, the GPU waits for Python to start kernels, however
# quick they are. That is lesson 07's subject.
#
# ## In real vLLM
#
# Release v0.11.0:
# [`reshape_and_cache_flash`](https://github.com/vllm-project/vllm/blob/v0.11.0/csrc/cache_kernels.cu) is its
# store,
# [`triton_unified_attention.py`](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/attention/ops/triton_unified_attention.py)
# its attention in Triton. Three differences:
#
# 1. Its store is CUDA C++, and may write 8-bit floats, scaled, to halve the cache.
# 2. One kernel serves decode and prefill rows; another, with split contexts, serves steps of decode rows only.
# 3. Each row is cut into the same number of segments; ours are shares of a list of all rows' tiles.
#
# ## Exercises
#
# In `exercises/06_triton_kernels.ipynb`:
#
# 1. **Predict** (5 minutes): a kernel's microseconds from its bytes, and where that fails.
# 2. **Implement** (25 minutes): the store kernel, with masks, strides and slot −1.
# 3. **Break and fix** (20 minutes): a merge that forgets to shrink. Short contexts are right, long ones
#    wrong.
#
# ## Recap
#
# A kernel is one program run many times; masks keep it from its neighbours' memory. Most of decoding moves
# bytes, so a kernel is good if it moves each once, with every multiprocessor busy. Online softmax lets a row
# be read in tiles, cut into parts and put together again.

# %% [markdown]
# **Check yourself**
#
# <details><summary>1. A head has 96 numbers. How many lanes, and how many are masked?</summary>
#
# 128, of which 32 are masked.
#
# </details>
# <details><summary>2. A kernel moves 46 MB in 20 µs. What share of 4,600 GB/s is that?</summary>
#
# 2,300 GB/s: half.
#
# </details>
# <details><summary>3. Two parts have best 2 and 6, total 3 and 1. The total of both?</summary>
#
# $3 e^{-4} + 1 \approx 1.055$.
#
# </details>
# <details><summary>4. Why does prefill need no split?</summary>
#
# It has many query tiles a row and head; each is a program.
#
# </details>
#
# **The next question**: a decode step of a small model is some hundred kernels of a few microseconds. Who
# starts them, and how long does that take?
