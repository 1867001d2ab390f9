# %% [markdown]
# # 08 · One model on several GPUs
#
# | This lesson | |
# |---|---|
# | Minutes | 45 |
# | Difficulty | hard |
# | Hardware | any laptop |
# | Needs | lessons 01, 02, 05 and 07 |
# | Ends in | `nanovllm/distributed/ranks.py`, `nanovllm/layers/linear.py`, `nanovllm/engine/llm_engine.py` |

# %% [markdown]
# ## What hurts now
#
# A decode step reads every weight, two bytes each in bfloat16. An H100 has 80 GB, and reads at most 3.35
# TB/s by its datasheet.
#
# **Predict**: Qwen3-32B has 32.8 billion weights. Does it fit? How many tokens a second has one request at
# most?

# %%
import json

import torch

from course.labs.rank_lab import all_reduce_curves, curves_in_words, recorded
from course.models.choice import own_model
from course.rank_threads import on_ranks
from course.show import plots
from course.show.display import show
from course.show.reading import show_source

torch.set_num_threads(1)
plots.use_style()
billions = {"Qwen3-0.6B": 0.6, "Qwen3-8B": 8.2, "Qwen3-32B": 32.8}
for name, count in billions.items():
    gigabytes = 2 * count
    floor = gigabytes / 3350  # seconds a step
    print(f"{name:11}{gigabytes:5.1f} GB  {1e3 * floor:5.2f} ms a step  {1 / floor:6,.0f} tok/s")
assert gigabytes < 80

# %% [markdown]
# <details><summary>Barely, and 51 tokens a second</summary>
#
# 65.6 GB leave 14 for keys and values. Two GPUs would read half the weights each.
#
# </details>
#
# **Tensor parallelism**: every GPU has a process, a **rank**, with a part of **every** layer.
#
# After this lesson you can
#
# 1. **cut** a layer so that ranks talk twice in it,
# 2. **explain** why ranks are sent requests and never schedules,
# 3. **predict** when more ranks help.
#
# ## The picture, and the symbols
#
# ![Two ranks: each half of A's columns, SiLU, half of B's rows; then an all-reduce adds.](../figures/tensor_parallel.svg)
#
# | symbol | meaning |
# |:--|:--|
# | $n$ | ranks (`tensor_parallel_size`) |
# | $x$, $y$ | hidden states, [tokens, hidden], whole on every rank |
# | $A$, $B$ | a half layer's matrices: $y = f(xA)B$ |
# | shard | a rank's part of a tensor |
# | all-reduce | each rank brings a tensor, each gets the sum |

# %% [markdown]
# ## Step 1: by columns
#
# Two tokens of size 4, and $A$ of 4 × 4. Rank 0 takes two columns, rank 1 the other two.

# %%
x = torch.tensor([[1.0, 2, 0, -1], [0, 1, 1, 3]])
A = torch.tensor([[1.0, 0, 2, -1], [0, 1, -1, 2], [3, 1, 0, 1], [-1, 2, 1, 0]])
halves = [x @ A[:, :2], x @ A[:, 2:]]
print(halves[0], halves[1], sep="\n")
assert torch.equal(torch.cat(halves, dim=1), x @ A)

# %% [markdown]
# Each rank has *some outputs*, complete; nothing was exchanged. (`nn.Linear` stores [outputs, inputs]: in
# the engine's code these columns are rows.)
#
# ## Step 2: by rows
#
# **Predict**: each rank has half of the *inputs*, and the rows of $B$ they meet. What does it get?

# %%
B = torch.tensor([[2.0, 1, 0, 0], [1, 0, 1, -1], [0, 1, 1, 2], [1, -1, 0, 1]])
h = x @ A
parts = [h[:, :2] @ B[:2], h[:, 2:] @ B[2:]]
print(parts[0], parts[1], sep="\n")
assert torch.equal(parts[0] + parts[1], h @ B)

# %% [markdown]
# *All outputs*, incomplete: an all-reduce must **add** them. And what a cut by columns leaves on a rank is
# just what the next cut wants.
#
# ## Step 3: what may stand between them
#
# **Predict**: which is the whole MLP, SiLU *between* column and row, or $A$ cut by rows and SiLU on each
# rank's part?

# %% tags=["nbval-check-output"]
from torch.nn.functional import silu

whole = silu(x @ A) @ B
column_row = sum(silu(x @ A[:, c]) @ B[c] for c in (slice(0, 2), slice(2, 4)))
row_first = sum(silu(x[:, c] @ A[c]) for c in (slice(0, 2), slice(2, 4))) @ B
print("column, then row:", torch.allclose(column_row, whole))
print("row, then activate:", torch.allclose(row_first, whole))
assert torch.allclose(column_row, whole)
assert not torch.allclose(row_first, whole)

# %% [markdown]
# <details><summary>Only the first</summary>
#
# $f(a + b) \ne f(a) + f(b)$: what is not linear wants complete numbers, and after columns they are. So a
# half layer needs **one** all-reduce, at its end.
#
# </details>
#
# ## Step 4: two ranks that talk
#
# A rank is a process, but a spawned process cannot import a cell's function. So here ranks are threads.
# `on_ranks` gives each the engine's `Ranks`, joined through gloo, a library of collectives for CPUs.


# %%
def mlp_on(ranks):
    mine = slice(0, 2) if ranks.rank == 0 else slice(2, 4)
    part = silu(x @ A[:, mine]) @ B[mine]
    return part.clone(), ranks.all_reduce(part)


for rank, (before, after) in enumerate(on_ranks(2, mlp_on)):
    print(f"rank {rank} brings {before[0].numpy().round(2)} and gets {after[0].numpy().round(2)}")
    assert torch.allclose(after, whole)

# %% [markdown]
# ## Step 5: attention, by heads
#
# Softmax is not linear, but each head has its own: cut **between heads**. $W_Q, W_K, W_V$ by columns,
# $W_O$ by rows. `Ranks.shard(units)` never cuts a unit.
#
# **Predict**: the storyteller has 4 query heads and 2 KV heads. What has each of two ranks? And of four?

# %% tags=["nbval-check-output"]
from nanovllm.distributed.ranks import Ranks

for size in (2, 4):
    for rank in range(size):
        query, key = Ranks(rank, size).shard(4), Ranks(rank, size).shard(2)
        heads = list(range(query.start, query.start + query.count))
        print(f"{size} ranks, rank {rank}: query heads {heads}, KV head {key.start}")
        assert {head // 2 for head in heads} == {key.start}  # two query heads share a KV head

# %% [markdown]
# <details><summary>Each KV head goes to one rank, or to two</summary>
#
# Of two: two query heads and their KV head, so half the **cache** too. Of four: each KV head is held
# twice. Weights still shrink, the cache no more.
#
# </details>
#
# ## Step 6: vocabulary
#
# Each rank holds a part of the **embedding**'s rows. For other ids it gives zeros, and one all-reduce
# completes the vectors. Toy: 6 ids, 3 a rank.

# %% tags=["nbval-check-output"]
table, ids = torch.arange(12.0).view(6, 2), torch.tensor([1, 4, 5])


def embed_on(ranks):
    local = ids - 3 * ranks.rank
    held = (local >= 0) & (local < 3)
    vectors = table[3 * ranks.rank :][local.clamp(0, 2)].masked_fill(~held[:, None], 0)
    return vectors.clone(), ranks.all_reduce(vectors)


for rank, (vectors, total) in enumerate(on_ranks(2, embed_on)):
    print(f"rank {rank}: {vectors.tolist()} --> {total.tolist()}")
    assert torch.equal(total, table[ids])

# %% [markdown]
# At the other end each rank's **head** gives its own ids' logits. **Predict**: to find the best of Qwen3's
# 151,936 tokens, must ranks exchange 608 kB of float32 a row?

# %% tags=["nbval-check-output"]
logits = torch.tensor([[0.5, 2.0, -1.0, 1.5, 2.0, 0.0]])


def best_on(ranks):
    shard = ranks.shard(6)
    mine = logits[:, shard.start : shard.start + shard.count]
    value, place = mine.max(dim=1, keepdim=True)
    return (place + shard.start).item(), ranks.all_reduce_argmax(value, place + shard.start).item()


for rank, (mine, chosen) in enumerate(on_ranks(2, best_on)):
    print(f"rank {rank}: its best is id {mine}, all take id {chosen}")
    assert chosen == logits.argmax()

# %% [markdown]
# <details><summary>Twelve bytes a rank will do</summary>
#
# Its best value (4 bytes) and its id (8); the lowest id wins a tie. Sampling is alike: each rank adds its
# own ids' Gumbel noise (lesson 01). Only top-k, top-p and min-p gather rows.
#
# </details>
#
# ## Assemble: the layers
#
# `ColumnParallelLinear` is Step 1, for several matrices of one input (query, key, value; gate, up).
# `RowParallelLinear` is Step 2; bias and residual would come in $n$ times, so only rank 0 adds them.

# %%
from nanovllm.layers.linear import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

show_source(Ranks.shard, ColumnParallelLinear.norm_linear)
show_source(RowParallelLinear.__init__, RowParallelLinear.linear_add)
show_source(VocabParallelEmbedding, Ranks.all_reduce_argmax)

# %% [markdown]
# The toy left out uneven sizes, and the checkpoint: of each parameter the loader reads its `Shard` alone.
#
# ## Step 7: who plans?
#
# All ranks must run the same rows, or a sum mixes requests. Rank 0 could send each schedule. Ours sends
# what it was *asked to do*: **every rank runs the same scheduler** on the same requests (*SPMD*: single
# program, multiple data). Here are two processes; we listen.
#
# **Predict**: three requests for 4 tokens each. Which messages? How large is a step's?

# %%
from course.labs.load import start
from course.serving import queue, run

engine = start(own_model(), tensor_parallel_size=2, max_model_len=64)
messages, broadcast = [], engine.ranks.broadcast
engine.ranks.broadcast = lambda m: messages.append(json.dumps(m)) or broadcast(m)
for name in "ABC":
    queue(engine, name, [5, 6, 7], 4)
run(engine)
for message in messages:
    print(f"{len(message):5} bytes  {message[:72]}")
schedules = [len(json.dumps(record.rows)) for record in engine.trace]
print("a schedule without tables would have been", max(schedules), "bytes for three requests")
engine.close()
assert [json.loads(message)[0] for message in messages] == ["add"] * 3 + ["step"] * 4 + ["close"]

# %% [markdown]
# <details><summary>Three adds, four steps; 14 bytes, whatever is in a step</summary>
#
# A schedule grows with rows and block tables, and all would wait for it. The price: nothing that differs
# between ranks may steer a plan: no clock, no `hash()`, no set's order, no free memory.
#
# </details>

# %%
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.worker import run_command, run_worker

show_source(Ranks.broadcast, LLMEngine.on_all_ranks, LLMEngine.advance, run_worker, run_command)

# %% [markdown]
# Commands go through a key-value store, and each is signed, since any process of this machine can write there; tensors through gloo, or with a GPU a rank **NCCL**, NVIDIA's library, which
# graphs can capture. (`torchrun` starts a script once a rank.) A collective, a call of all ranks together, that one
# rank never enters blocks the others: so rank 0 looks whether its workers live, and a step of 5 minutes is an error.
#
# ## Check
#
# Every unit on one rank; greedy tokens against stage 02's, up to near ties; then logits (rank 0's half of the
# vocabulary) and tokens against `transformers`.

# %%
from course.labs.reference import ask_and_compare
from course.measure.ladder_workload import LadderWorkload
from course.serving import start_engine
from course.stages import ContiguousCache, ContinuousBatching, TwoRanks, compare

for units in (4, 1280, 4096, 301):
    shards = [Ranks(rank, 3).shard(units) for rank in range(3)]
    assert [i for s in shards for i in range(s.start, s.start + s.count)] == list(range(units))
texts = [[1 + (31 * i + 7 * j) % 4000 for j in range(3 + 5 * i)] for i in range(8)]
mix = LadderWorkload(texts, [24] * 8, 0, kv_tokens=1024)
ours = TwoRanks(own_model(), device="cpu").run(mix)
alone = ContiguousCache(own_model(), device="cpu").run(mix)
agreement = compare(ours, alone)
print(agreement)
assert agreement.compared > 100
engine = start_engine(tensor_parallel_size=2)
print(ask_and_compare(engine, texts[7], count=16)[1])
engine.close()

# %% [markdown]
# ## Measure: what an all-reduce costs
#
# Here two processes on this CPU time all-reduces; beside it, as recorded, NCCL between two H100s. **Predict**
# the times' ratios: 64 KiB to 1 KiB, and 4 MiB to 1 MiB.

# %%
from course.benchmarks import all_reduce

here = all_reduce.measure(num_ranks=2, largest=2**22)
nccl = recorded("all_reduce")[0]  # two H100s
curves = [here, *recorded("all_reduce")]
show(all_reduce_curves(curves, f"here: {here['machine']}"), curves_in_words(curves))
assert here["rows"][-1]["seconds"] > here["rows"][0]["fastest"]

# %% [markdown]
# <details><summary>About 1, then 2 to 4</summary>
#
# Time is about $\alpha + \text{bytes} / \beta$: a **latency**, then a bandwidth. A decoding row of 1,024
# numbers in bfloat16 is 2 KiB: it pays $\alpha$ alone.
#
# </details>
#
# ## A cost model
#
# A decode step on $n$ ranks reads $1/n$ of the weights, and reduces twice a layer and once for the
# embedding, rows × hidden × 2 bytes each time:
#
# $$t(n) \approx \frac{\text{weight bytes}}{n \cdot \text{bandwidth}} + (2 \cdot \text{layers} + 1) \cdot t_\text{all-reduce}$$
#
# **Predict**, at 10 µs a call on two H100s: is Qwen3-0.6B (28 layers) faster than on one, for one request?
# And Qwen3-8B (36 layers)?


# %%
def step_seconds(billions, layers, hidden, n, rows=1):
    read = 2e9 * billions / (n * 3.35e12)
    call = all_reduce.seconds_for(nccl, rows * hidden * 2) if n > 1 else 0
    return read + (2 * layers + 1) * call


models = {"Qwen3-0.6B": (0.6, 28, 1024), "Qwen3-8B": (8.2, 36, 4096)}
gains = {}
for name, shape in models.items():
    one, two = step_seconds(*shape, n=1), step_seconds(*shape, n=2)
    gains[name] = one / two
    print(f"{name:11} one GPU {1e3 * one:.2f} ms, two {1e3 * two:.2f} ms: {one / two:.2f} times")
assert gains["Qwen3-0.6B"] < 1 < gains["Qwen3-8B"] < 2

# %% [markdown]
# <details><summary>The small model loses, the large one gains, and never twofold</summary>
#
# 0.6B saves 0.18 ms and pays 0.55 for 57 calls. 8B saves 2.45 and pays 0.77.
#
# </details>
#
# What two H100s did, recorded by `course bench ranks`: W1 is 256 requests at once, 100 to 1,024
# tokens in and 100 to 1,024 out; W2 a single one. **Predict**: which of them gains more?

# %%
from course.labs.rank_lab import engines_in_words, gains_in_words, rank_curves

reports = recorded("ranks")
print(*map(engines_in_words, reports), sep="\n")
show(rank_curves(reports), gains_in_words(reports))
for report in reports:
    weights = [engine["ranks"] * engine["memory"]["weight_bytes"] for engine in report["engines"]]
    assert max(weights) < 1.05 * weights[0], "a rank holds more than its part"

# %% [markdown]
# <details><summary>W1, against the model</summary>
#
# At 256 rows the model says 0.37 and 1.02, as it reads only weights. But many rows have keys and values to read, and more to
# compute: work that ranks share. W2 gains 0.62 and 1.24 times, where the model says 0.49 and 1.52: it leaves out all
# that a step does besides.
#
# </details>
#
# ## Measure: the ladder
#
# Stage 08 beside stage 05, both on this CPU. **Predict**: the storyteller has 5 layers and 28 MB of
# weights in float32. Do two processes help?

# %%
from course.measure.ladder_workload import ladder_workload
from course.stages.records import record

stages = ContinuousBatching(own_model(), device="cpu"), TwoRanks(own_model(), device="cpu")
job = ladder_workload(stages[0].vocab_size, device="cpu")
pairs = [[stage.run(job) for stage in stages] for _ in range(2)]  # by turns
for runs in zip(*pairs, strict=True):
    record(runs)
    print(runs[-1])
figure = plots.ladder(upto=8)
show(figure, figure.alt_text)

# %% [markdown]
# <details><summary>No: a tiny model gets slower</summary>
#
# 11 all-reduces, a message, and waiting for the slower process take longer than reading 28 MB. Ranks are for
# models that do not fit, or take milliseconds to read, on GPUs with fast links.
#
# </details>
#
# ## In real vLLM
#
# Release v0.24.0:
# [`RowParallelLinear`](https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/model_executor/layers/linear.py#L1628-L1653)
# adds the bias on rank 0 alone, too. Three differences:
#
# 1. One process plans, and
#    [sends its schedule](https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/v1/executor/multiproc_executor.py#L307-L317)
#    to every worker in every step.
# 2. Small tensors skip NCCL: a
#    [custom all-reduce](https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/distributed/device_communicators/cuda_communicator.py#L254-L297)
#    has less latency.
# 3. It
#    [pads the vocabulary](https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/model_executor/layers/vocab_parallel_embedding.py#L255-L264)
#    to equal shards.
#
# ## Exercises
#
# In `exercises/08_tensor_parallelism.ipynb`:
#
# 1. **Predict** (5 minutes): memory and all-reduce bytes of a rank.
# 2. **Implement** (20 minutes): a column and a row linear, right on any number of ranks.
# 3. **Break and fix** (20 minutes): a rank that sizes its own cache.
#
# ## Recap
#
# Columns, then rows: one all-reduce ends a half layer. Heads, vocabulary and cache are cut by whole units;
# every rank plans alike from the same requests. Reading shrinks with $n$, latency does not.

# %% [markdown]
# **Check yourself**
#
# <details><summary>1. Could Q be cut in the middle of a head?</summary>
#
# Its scores would be incomplete, and softmax is not linear: one more all-reduce.
#
# </details>
# <details><summary>2. A scheduler preempts whoever waited longest by the clock. What breaks?</summary>
#
# Clocks differ between ranks: sums mix requests, or wait for ever.
#
# </details>
#
# **The next question**: nine lessons, eight stages. What did each of them buy?
