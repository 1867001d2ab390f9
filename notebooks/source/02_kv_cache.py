# %% [markdown]
# # 02 · Keep the keys and values
#
# | This lesson | |
# |---|---|
# | Minutes | 40 |
# | Difficulty | medium |
# | Hardware | any laptop; a GPU is used in measurements if there is one |
# | Needs | lessons 00 and 01 |
# | Ends in | `nanovllm/layers/attention.py` (preview; lesson 03 completes it) |

# %% [markdown]
# ## What hurts now
#
# Stage 01, lesson 01's loop, computes the whole text for each new token. **Predict**: a prompt has $P = 24$
# tokens, the answer $N = 64$; the first pass computes 24 tokens, the next 25, and so on. How many in all? How
# many would do, if each were computed once?

# %%
import textwrap

import torch
from transformers import AutoTokenizer

from course.measure.ladder_workload import LadderWorkload
from course.models.choice import own_model
from course.show import plots
from course.stages import ContiguousCache, Recompute
from course.stages.common import greedy

torch.set_num_threads(1)
torch.set_grad_enabled(False)
plots.use_style()
tokenizer = AutoTokenizer.from_pretrained(own_model())
chat = [{"role": "user", "content": "Tell me a story about a fox who finds a key."}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
P, N = len(prompt), 64
job = LadderWorkload([prompt], [N], shared_prefix=0)
old = Recompute(own_model(), device="cpu")  # the course's own model, in float32
old.prepare(job)  # loads the weights

ids, computed = list(prompt), 0
for _ in range(N):
    computed += len(ids)
    [next_id], _ = greedy(old.last_logits(ids))  # the best token, and by how much it won
    ids.append(next_id)
answer = ids[P:]
print(textwrap.fill(tokenizer.decode(answer), 90))
print(f"{computed:,} tokens computed, {P + N - 1} of them different")
assert computed == N * P + N * (N - 1) // 2

# %% [markdown]
# <details>
# <summary>Where the numbers come from</summary>
#
# $24+25+\dots+87 = 64\cdot24 + 64\cdot63/2 = 3{,}552$. Once each: $24+63=87$, as nobody computes the last
# token.
#
# </details>
#
# ## What you will be able to do
#
# 1. **Show** why keys and values can be kept.
# 2. **Compute** a cache's bytes, and say what limits prefill and decode.
# 3. **Measure** what a padded, reserved cache wastes.
#
# ## The picture, and the symbols
#
# ![Prefill: four queries, a triangle of keys. Decode: one query reads the cache.](../figures/kv_cache.svg)
#
# | symbol | meaning | the course's model |
# |:--|:--|--:|
# | $P$, $N$ | tokens of the prompt, of the answer | 24, 64 |
# | $n$ | tokens computed in one pass | |
# | $L$ | layers | 5 |
# | $H$, $H_{kv}$ | query heads; key and value heads | 4, 2 |
# | $D$ | numbers in a head | 64 |
# | $b$ | bytes a number (2 in bfloat16) | 4 |
# | $Q$; $K$, $V$ | a layer's queries: `[n, H, D]`; keys, values: `[tokens, H_kv, D]` | |
#
# ## Step 1: the past does not change
#
# One head of dimension 4, four tokens of small numbers.
#
# **Predict**: compute three tokens, then four. Which of the first three rows of $K$, $V$ and the output
# change?

# %%
torch.manual_seed(0)
x = torch.randint(-2, 3, (4, 4)).double()  # four tokens of dimension 4
W_q, W_k, W_v = torch.randint(-1, 2, (3, 4, 4)).double()


def attention(q, k, v):
    """Row i of q is token len(k) - len(q) + i, and sees the tokens up to its own."""
    scores = q @ k.T / 2  # the root of the dimension
    later = torch.ones(len(q), len(k)).triu(1 + len(k) - len(q)).bool()
    return scores.masked_fill(later, -torch.inf).softmax(-1) @ v


Q, K, V = x @ W_q, x @ W_k, x @ W_v
Q3, K3, V3 = x[:3] @ W_q, x[:3] @ W_k, x[:3] @ W_v
out = attention(Q, K, V)
print("keys of three tokens, and of four:", K3.int().tolist(), K.int().tolist(), sep="\n")
assert torch.equal(K3, K[:3])
assert torch.equal(V3, V[:3])
assert torch.allclose(attention(Q3, K3, V3), out[:3])
assert torch.allclose(attention(Q[3:], K, V), out[3:])  # row 3 takes one query, its own

# %% [markdown]
# None. The new row takes all keys and values, but only its own query.
#
# Deeper layers mix tokens, but only with earlier ones. **Predict**: in the real model, replace all tokens
# from 40 on. Which cached tokens change in any layer? A cache is `[L, 2, rows, places, H_kv, D]`: 2 for keys and
# values, a row for each request, a place for each token.

# %%
cached = ContiguousCache(own_model(), device="cpu")
cached.prepare(job)


def keys_and_values(token_ids):
    cache = cached.new_cache(1, len(token_ids))
    cached.prefill([token_ids], cache)
    return cache


changed = ids[:40] + [(token + 7) % cached.vocab_size for token in ids[40:]]
one, two = keys_and_values(ids), keys_and_values(changed)
same = [torch.equal(one[:, :, :, t], two[:, :, :, t]) for t in range(len(ids))]
print(f"equal to the last bit, in all {len(one)} layers: tokens 0 to {same.index(False) - 1}")
assert same == [True] * 40 + [False] * (len(ids) - 40)

# %% [markdown]
# ## Step 2: a cache by hand
#
# **Store** a token's key and value in two tables, then **read** them: a token sees itself too.

# %%
from course.drawings.cache_pictures import token_frame
from course.show.display import show, steps

k_cache, v_cache = torch.zeros(2, 4, 4).double()
frames, new_rows = [], []
for t in range(4):
    q, k, v = (x[t : t + 1] @ W for W in (W_q, W_k, W_v))  # [1, 4] each
    k_cache[t], v_cache[t] = k, v
    new_rows.append(attention(q, k_cache[: t + 1], v_cache[: t + 1]))
    frames.append(token_frame(k_cache, v_cache, q, t))
captions = [f"store token {t}; its query reads rows 0 to {t}" for t in range(4)]
steps(frames, captions, "One token's query beside the tables of cached keys and of cached values")
assert torch.allclose(torch.cat(new_rows), out)

# %% [markdown]
# ## Step 3: two phases
#
# A prompt's tokens go through together: **prefill**, $n = P$. Answer tokens come one at a time:
# **decode**, $n = 1$. A pass reads each of $W$ weights once, $bW$ bytes, and makes $2nW$ FLOPs (a product
# and a sum for each weight and token).
#
# $$\text{intensity} = \frac{2nW}{bW} = \frac{2n}{b}\ \text{FLOPs a byte}$$
#
# Below the **ridge**, FLOP/s over bytes/s, where lesson 00's roof bends, memory limits a pass; above it arithmetic does.

# %%
from course.measure.roofline import layer_weights
from course.measure.timing import machine_peaks
from course.models.choice import measured_model

timed = ContiguousCache(measured_model().path)
timed.prepare(job)
config, peaks = timed.config, machine_peaks()
W = config.num_hidden_layers * layer_weights(config) + config.vocab_size * config.hidden_size
b, ridge = config.dtype.itemsize, peaks.flops / peaks.bandwidth
print(measured_model())
print(f"W = {W / 1e6:,.1f} million, b = {b}; ridge {ridge:.1f} FLOPs a byte; decode {2 / b:g}")

# %% [markdown]
# **Predict**: up to which $n$ should a pass cost as much as one token? Solve $2n/b =$ ridge.

# %%
from course.drawings.cache_pictures import pass_times
from course.labs.cache_lab import pass_ms

sizes = [2**i for i in range(10)]
passes = [pass_ms(timed, n) for n in sizes]  # each the fastest of five
fig = pass_times(sizes, passes, 1e3 * b * W / peaks.bandwidth, 1e3 * 2 * W / peaks.flops)
show(fig, f"A pass of 1 token: {passes[0]:.1f} ms; of 32: {passes[5]:.1f}; of 512: {passes[9]:.1f}")

# %% [markdown]
# The floors cross at your $n$. Measured passes take longer: starting hundreds of operations takes
# milliseconds, on a large GPU 20 to 30 whatever the size. (Lesson
# 00's engine has kernels and graphs: lessons 06 and 07.) Long prefill is limited by **compute**, decode by **memory**;
# rows of a batch share one reading of the weights.
#
# ## Step 4: bytes a token
#
# Each layer keeps a key and a value, of $H_{kv}$ heads of $D$ numbers, for every token:
#
# $$\text{bytes a token} = 2 \cdot L \cdot H_{kv} \cdot D \cdot b$$
#
# **Predict** those of Qwen3-32B: $L = 64$, $H_{kv} = 8$, $D = 128$, $b = 2$.


# %%
def bytes_per_token(L, H_kv, D, b):
    return 2 * L * H_kv * D * b


shapes = {  # L, H, H_kv, D, b
    "the course's, float32": (5, 4, 2, 64, 4),
    "Qwen3-0.6B": (28, 16, 8, 128, 2),
    "Qwen3-32B": (64, 64, 8, 128, 2),
}
print(f"{'':24}{'a token':>14}{'4,096 tokens':>14}{'if H_kv were H':>17}")
for name, (L, H, H_kv, D, b) in shapes.items():
    size = bytes_per_token(L, H_kv, D, b)
    mib = size * 4096 / 2**20
    print(f"{name:24}{size:>8,} bytes{mib:>10,.0f} MiB{mib * H / H_kv:>13,.0f} MiB")
cache = cached.new_cache(num_rows=3, length=100)
assert cache.numel() * cache.element_size() == 300 * bytes_per_token(5, 2, 64, 4)

# %% [markdown]
# A quarter of a MiB: a GiB for 4,096 tokens, and eight if no heads shared keys and values.
#
# ## Assemble: rows, positions, masks
#
# In a batch, each request has a row of `max_len` **places**. Short prompts are **padded** on the right.
# Positions count from 0 in each row; a mask hides places after a token's own. Take prompts of 2 and 4 tokens;
# a row's context is the tokens it reads.


# %% tags=["nbval-check-output"]
def mask_of(contexts, new):
    """[rows, new, places]: which places each of a row's last `new` tokens reads."""
    own_place = contexts[:, None] - new + torch.arange(new)
    return (torch.arange(contexts.max()) <= own_place[..., None]).int()


prefill_mask = mask_of(torch.tensor([4, 4]), new=4)
decode_mask = mask_of(torch.tensor([2 + 1, 4 + 1]), new=1)
print("prefill, row 0, a line for each token; the last two are padding", prefill_mask[0], sep="\n")
print("decode, row 0 and row 1", decode_mask[:, 0], sep="\n")
assert decode_mask.sum(-1).flatten().tolist() == [3, 5]

# %% [markdown]
# What padding computes is rubbish that nobody reads. In decode, row 0's new token **overwrites** the
# rubbish at place 2, and the mask hides place 3.
#
# In stage 02, `attend` is your `attention` for rows and groups of heads. `forward` puts row $i$'s token at
# position $p$ into **slot** $i \cdot \text{max\_len} + p$. (A row is one block; tables come in lesson 03.)
# Every layer stores with the engine's `rope_store`; then `attend` reads nothing but the cache.

# %%
from course.show.reading import show_source
from course.stages import contiguous
from nanovllm.layers import attention as ops

stage_02 = ContiguousCache
show_source(contiguous.attend, stage_02.prefill, stage_02.decode, stage_02.forward)
show_source(ops.rope_store)

# %% [markdown]
# The toy left out norms and **RoPE**, which turns a key before it is stored: it is right at its own position
# only.
#
# **Predict**: fill the cache with 99 before use. How many answer tokens change?


# %%
def generate(prompts, count, fill=0.0):
    """Greedy answers [rows, count] to a padded batch; of each step, the logits [rows, vocab]."""
    lengths = torch.tensor([len(p) for p in prompts])
    cache = cached.new_cache(len(prompts), int(lengths.max()) + count).fill_(fill)
    logits, answers = [cached.prefill(prompts, cache)], []
    for step in range(count):
        answers.append(greedy(logits[-1])[0])
        logits.append(cached.decode(answers[-1], lengths + step, cache))
    return torch.tensor(answers).T, logits[:-1]


batch = [prompt, prompt[:12], prompt[3:]]
clean, _ = generate(batch, 20)
dirty, _ = generate(batch, 20, fill=99.0)
print(f"{(clean != dirty).sum()} of {clean.numel()} tokens changed")
assert torch.equal(clean, dirty)

# %% [markdown]
# None: a hidden place has weight exactly 0.
#
# ## Check: the same answer
#
# Products of another size may round otherwise. So compare each step's logits with `transformers`, which computes
# the whole text at once, up to 0.001; then greedy tokens, up to the first near tie (a lead below 0.0001).

# %%
from course.labs.reference import compare_with_transformers

ours, logits = generate([prompt], N)
comparison = compare_with_transformers(own_model(), prompt, ours[0].tolist(), torch.cat(logits))
print(comparison)
certain = comparison.tokens
assert ours[0, :certain].tolist() == answer[:certain], "stage 01 says something else"

# %% [markdown]
# ## Measure: speed
#
# For the token after $n$, stage 01 makes a pass of $n$ tokens, stage 02 of one. **Predict** from the plot
# of passes: how many times faster is stage 02 at 16? At 512?

# %%
from course.drawings.cache_pictures import next_token_times
from course.labs.cache_lab import next_token_ms

again = Recompute(measured_model().path)
again.prepare(job)
lengths = [n for n in (4, 16, 64, 512, 2048, 7200) if n < config.max_position_embeddings]
times = [next_token_ms(again, timed, n) for n in lengths]
gains = {n: round(a / k, 1) for n, (a, k) in zip(lengths, times, strict=True)}
show(next_token_times(lengths, times), f"Times faster with a cache, by tokens so far: {gains}")

# %% [markdown]
# <details>
# <summary>A pass of n over a pass of one</summary>
#
# Little at 16; at 512 some twenty on a laptop's CPU, little on a GPU, where starting operations takes longest.
#
# </details>
#
# A cache does **not** help an answer of one token: that is prefill alone.
#
# Now the ladder's workload. **Predict**: stage 02 also serves 4 rows at once (on a GPU 16); how many times the
# tokens a second?

# %%
from course.measure.ladder_workload import ladder_workload
from course.stages.records import measured

for used in (old, cached, timed, again):
    used.release()  # so that their weights are not counted as a stage's memory
workload = ladder_workload(timed.vocab_size)
print(workload)
rows = measured(again, again.part_of(workload)), measured(timed, workload)
print(*rows, sep="\n")
rates = [row.numbers["tokens_per_second"] for row in rows]
print(f"{rates[1] / rates[0]:.1f} times the tokens a second")
fig = plots.ladder(upto=2)
show(fig, fig.alt_text)

# %% [markdown]
# Fewer than gain times rows: a batch waits for its slowest, as you count below. (Stage 01 got 4 of a GPU's 64 requests:
# its queue was shorter, so TTFTs do not compare.) Between the filled and the hollow mark lies memory that held no needed
# token.
#
# ## Measure: waste
#
# Rows are reserved for the longest request, and a batch ends with its slowest. Take prompts of 3, 5 and 2 tokens,
# answers of 6, 2 and 4: three rows of $5 + 6 = 11$ places. Prefill gives each row its first answer token, a
# decode step one more. A place is **live** if it holds a token of a request that still runs; one that has just got its
# last token counts until the next step.
#
# **Predict**: after 4 decode steps, how many of 33 places are live? Of 18 answer tokens computed, how many
# are wanted?

# %%
from course.drawings.cache_pictures import batch_map, row_spans, share

prompts, outputs = [3, 5, 2], [6, 2, 4]
moments = [row_spans(prompts, outputs, step, max_len=11) for step in range(6)]
captions = [f"{i} decode steps, {share(rows, 'live'):.0%} live" for i, rows in enumerate(moments)]
maps = [batch_map(rows, "Three rows of 11 places", cells=True) for rows in moments]
steps(maps, captions, "Three rows of a cache fill up, finish and wait for the slowest")
assert share(moments[4], "live") == 7 / 33
assert sum(outputs) / (len(outputs) * max(outputs)) == 12 / 18

# %% [markdown]
# <details>
# <summary>7 of 33, and 12 of 18</summary>
#
# Only row 0 still runs, with 3 + 4 tokens: its fifth is not stored yet. Six rounds of three rows are 18 tokens; $6 + 2 + 4 = 12$ are wanted.
#
# </details>
#
# Now 16 requests: prompts of 41 tokens on average (64 at most), answers of 30 (128 at most), room for 8 rows of 192
# places. `rows_history` counts places reserved and live at every step. **Predict** the average share live.

# %% tags=["nbval-check-output"]
from course.labs.paging import rows_history, short_answers

mix = short_answers()
prompts, outputs = list(map(len, mix.prompts)), mix.num_outputs
history = rows_history(cached, mix)
reserved, live = map(sum, zip(*history, strict=True))
rounds = 8 * max(outputs[:8]) + 8 * max(outputs[8:])  # two batches of eight rows
print(f"live, on average over {len(history)} steps: {live / reserved:.0%} of what is reserved")
print(f"answer tokens that nobody wanted: {rounds - sum(outputs)} of {rounds}")
spans = row_spans(prompts[:8], outputs[:8], step=30, max_len=192)
title = f"First batch after 30 decode steps: {share(spans, 'live'):.0%} live"
show(batch_map(spans, title), f"{title}. Five of eight rows are finished and held; most is empty")

# %% [markdown]
# An eighth is live. vLLM's authors found 20 to 38% in use in engines of 2023 ([Kwon et al.](https://arxiv.org/abs/2309.06180)).
#
# ## In real vLLM
#
# Release v0.24.0 has your formula in
# [`vllm/v1/kv_cache_interface.py`](https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/v1/kv_cache_interface.py#L184-L202).
# Three differences:
#
# 1. It counts a **block** of tokens in one layer; no request has a row.
# 2. The cache gets what the largest step leaves, found by trial:
#    [`determine_available_memory`](https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/v1/worker/gpu_worker.py#L400).
# 3. With `kv_cache_dtype="fp8"` a cached number takes one byte.
#
# ## Exercises
#
# In `exercises/02_kv_cache.ipynb`:
#
# 1. **Predict** (5 min): how many requests fit beside Qwen3-32B on a GPU.
# 2. **Implement** (20 min): a decode step for rows of different lengths.
# 3. **Break and fix** (20 min): a batch whose positions count the padding.

# %% [markdown]
# ## Recap
#
# Keys and values depend on no later token, so they are kept. Prefill is limited by arithmetic, decode by
# memory. A contiguous cache wastes most of its memory when requests differ.
#
# **Check yourself.**
#
# <details><summary>1. Why no cache of queries?</summary>
#
# Query $t$ is used in row $t$ of the output alone.
#
# </details>
# <details><summary>2. Which phase gains from batching eight requests?</summary>
#
# Decode: one reading of the weights serves eight tokens.
#
# </details>
#
# **The next question**: could a request take memory as it grows, wherever some is free?
