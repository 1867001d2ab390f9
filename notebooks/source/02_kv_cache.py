# %% [markdown]
# # 02 · Keep the keys and values
#
# | This lesson | |
# |---|---|
# | Minutes | 55 |
# | Difficulty | medium |
# | Hardware | any laptop; a GPU is used if there is one |
# | Needs | lessons 00 and 01 |
# | Ends in | `nanovllm/ops/attention.py` (preview; lesson 03 completes it) |

# %% [markdown]
# Lesson 01 ended with a loop that reads the whole text again for every new token. Here you keep what
# that loop threw away: the keys and values of every layer. A new token then costs the work of one
# token. The price is memory, and at the end you measure how much of it a simple cache wastes.
#
# After this lesson you can
#
# 1. **show** why keys and values can be kept and queries need not be, and write a cache by hand,
# 2. **compute** a cache's bytes from a model's config, and say what limits prefill and decode,
# 3. **measure** what a padded, reserved cache wastes when requests differ.

# %% [markdown]
# ## What hurts now
#
# A prompt has $P$ tokens; $N$ tokens are to be answered. Stage 01 is lesson 01's loop as a class:
# `last_logits(ids)` computes all of `ids` and returns the scores of the token that follows.
# All timings in this lesson use one CPU thread, or the GPU if there is one.

# %%
import torch
from transformers import AutoTokenizer

from course import machine, plots
from course.models import text_model
from course.stages import ContiguousCache, Recompute
from course.stages.common import greedy
from course.workload import LadderWorkload

torch.set_num_threads(1)
torch.set_grad_enabled(False)
plots.use_style()
model = text_model()
tokenizer = AutoTokenizer.from_pretrained(model.path)
chat = [{"role": "user", "content": "Tell me a story about a fox who finds a key."}]
text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
prompt, N = tokenizer(text).input_ids, 64
P = len(prompt)
print(model, f"P = {P}, N = {N}.", machine.describe())

# %% [markdown]
# **Predict** before you run: the loop makes $N$ = 64 passes. The first computes $P$ tokens, the next
# $P + 1$, and so on. How many tokens does it compute in all? How many would do, if each were computed
# once? Write both down.

# %%
job = LadderWorkload([prompt], [N], 0, kv_tokens=P + N)
old = Recompute(model.path, dtype="float32")
old.prepare(job)  # loads the model

ids, computed = list(prompt), 0
for _ in range(N):
    computed += len(ids)
    [next_id], _ = greedy(old.last_logits(ids))
    ids.append(next_id)
answer = ids[P:]
print(tokenizer.decode(answer))
print(f"{computed:,} tokens computed; {P + N - 1} differ")
assert computed == N * P + N * (N - 1) // 2

# %% [markdown]
# <details>
# <summary>Where the numbers come from</summary>
#
# $P + (P+1) + \dots + (P+N-1) = NP + N(N-1)/2$. For the course's own model $P = 24$, so
# $1{,}536 + 2{,}016 = 3{,}552$. Computed once each, the prompt and all answered tokens but the last
# are $24 + 63 = 87$: nothing follows the last one, so nobody computes it. The loop does 41 times the
# work, and the factor grows with $N$.
#
# </details>

# %% [markdown]
# ## The picture, and the symbols
#
# ![Prefill stores the keys and values of four tokens; decode reads them and adds
# one](../figures/kv_cache.svg)
#
# | symbol | meaning | shape, for one layer |
# |:--|:--|:--|
# | $n$ | tokens that a pass computes | |
# | $t$ | a token's position, from 0 | |
# | $H$, $H_{kv}$ | query heads; key and value heads, shared by groups of query heads | |
# | $D$ | numbers in a head | |
# | $Q$ | queries of a pass | `[n, H, D]` |
# | $K$, $V$ | keys and values of every token so far | `[t + 1, H_kv, D]` each |
# | $L$ | layers | |

# %% [markdown]
# ## Step 1: the past does not change
#
# Take one head of dimension 4 and four tokens of small whole numbers. Query $t$ sees keys $0$ to $t$
# only (lesson 01's causal mask). So nothing about token $t$ can depend on a later token.
#
# **Predict**: compute three tokens, then all four. Which rows of $K$, of $V$ and of the output change
# for the first three?

# %%
torch.manual_seed(0)
x = torch.randint(-2, 3, (4, 4)).double()  # 4 tokens of dimension 4
W_q, W_k, W_v = torch.randint(-1, 2, (3, 4, 4)).double()


def attention(q, k, v):
    """The queries are the last len(q) of len(k) tokens; each sees the tokens up to its own."""
    scores = q @ k.T / 2  # 2 is the root of the dimension
    later = torch.ones(len(q), len(k)).triu(1 + len(k) - len(q)).bool()
    return scores.masked_fill(later, -torch.inf).softmax(-1) @ v


Q, K, V = x @ W_q, x @ W_k, x @ W_v
full = attention(Q, K, V)
three = x[:3]
print("keys of three tokens:", (three @ W_k).int().tolist())
print("keys of four tokens: ", K.int().tolist())
assert torch.equal(three @ W_k, K[:3]) and torch.equal(three @ W_v, V[:3])
assert torch.allclose(attention(three @ W_q, K[:3], V[:3]), full[:3])

# %% [markdown]
# None. The fourth token added a row to each and touched no other. Now look at who asks with a query:
# row 3 of the output needs `Q[3]`, and all of `K` and `V`. No other row needs `Q[3]`, and row 3 needs
# no other query. Keys and values are read by every later token; a query is used once.

# %%
last = attention(Q[3:], K, V)  # one query is enough for the new token
print(last.round(decimals=3).tolist())
assert torch.allclose(last, full[3:])

# %% [markdown]
# Deeper layers mix tokens, yet the argument holds: each layer's output at $t$ depends on positions up
# to $t$, and it is the next layer's input. Check it on the real model. The tensor `new_cache` returns
# has the shape `[L, 2, rows, places, H_kv, D]`; the 2 stands for keys and values. We compute the
# story twice, the second time with every token from 40 on replaced, and compare the first 40 exactly.

# %%
cached = ContiguousCache(model.path, dtype="float32")
cached.prepare(job)


def keys_and_values(token_ids):
    cache = cached.new_cache(1, len(token_ids))
    cached.prefill([token_ids], cache)
    return cache


other = ids[:40] + [(token + 7) % cached.vocab_size for token in ids[40:]]
one, two = keys_and_values(ids), keys_and_values(other)
for layer, (a, b) in enumerate(zip(one, two, strict=True)):
    same = [torch.equal(a[:, :, t], b[:, :, t]) for t in range(len(ids))]
    assert all(same[:40]) and not all(same[40:])
    if layer < 5:
        print(f"layer {layer}: the first {same.index(False)} tokens have equal keys and values")
shorter = (keys_and_values(ids[:40]) - one[:, :, :, :40]).abs().max()
print(f"a text of only 40 tokens: the largest difference is {shorter:.0e}")
assert shorter < 1e-3

# %% [markdown]
# Equal to the last bit, in every layer. The last line cuts the text off instead of changing it. A
# product of another size may add its terms in another order, so its results differ by rounding;
# nothing else separates a cached answer from a recomputed one.
#
# ## Step 2: a cache by hand
#
# A cache is two tables with room for four tokens. Each step computes one token's query, key and
# value, **stores** key and value, and only then **reads** the table: a token sees itself too.

# %%
from course.cache_pictures import token_frame
from course.display import show, steps

k_cache, v_cache = torch.zeros(2, 4, 4).double()
frames, rows = [], []
for t in range(4):
    q, k, v = (x[t : t + 1] @ W for W in (W_q, W_k, W_v))  # [1, 4] each
    k_cache[t], v_cache[t] = k, v
    rows.append(attention(q, k_cache[: t + 1], v_cache[: t + 1]))
    frames.append(token_frame(k_cache, v_cache, q, t))
captions = [f"token {t} is stored; its query reads {t + 1} keys and values" for t in range(4)]
steps(frames, captions, "The query of one token beside a table of cached keys and one of values")
assert torch.allclose(torch.cat(rows), full)

# %% [markdown]
# Four passes of one token gave the same four rows as one pass of four. The query of the step before
# is gone in each frame, and nobody missed it.
#
# ## Step 3: two phases
#
# The prompt is known, so its tokens go through together: **prefill**, $n = P$. Answer tokens come
# one at a time: **decode**, $n = 1$. Both read all weights once a pass. With $W$ weights of $b$ bytes,
# a pass does $2nW$ FLOPs (a multiplication and an addition for each weight and token) and reads
# $bW$ bytes:
#
# $$\text{intensity} = \frac{2nW}{bW} = \frac{2n}{b}\ \text{FLOPs a byte}$$
#
# Lesson 00's roofline says what limits a pass. Below the ridge (FLOP/s over bytes/s) memory does,
# above it arithmetic. Attention itself stays low in decode: it reads each cached number for the
# few query heads of its group, whatever the length.

# %%
from course.models import measured_model
from course.timing import machine_peaks

timed = ContiguousCache(measured_model().path)  # bfloat16 on a GPU, float32 on a CPU
timed.prepare(job)
b = timed.config.dtype.itemsize
peaks = machine_peaks()
ridge = peaks.flops / peaks.bandwidth
print(f"{peaks.bandwidth / 1e9:,.0f} GB/s, {peaks.flops / 1e9:,.0f} GFLOP/s; b = {b}")
print(f"ridge: {ridge:.1f} FLOPs a byte; decode has {2 / b:g}, prefill of 512 tokens {2 * 512 / b:g}")

# %% [markdown]
# **Predict**: from these numbers, at which $n$ does a pass stop costing the same as a pass of one
# token? Solve $2n/b = \text{ridge}$. Then time passes of 1 to 512 tokens.

# %%
from course.benchmarks.roofline import layer_weights
from course.timing import measure

c = timed.config
W = c.num_hidden_layers * layer_weights(c) + c.vocab_size * c.hidden_size
begin = torch.zeros(1, dtype=torch.int64, device=timed.device)  # the pass starts at position 0


def pass_ms(n):
    some, cache = torch.randint(c.vocab_size, (1, n), device=timed.device), timed.new_cache(1, n)
    return 1e3 * measure(lambda: timed.model.logits(timed.forward(some, begin, cache)[-1:])).median


sizes = [2**i for i in range(10)]
passes = [pass_ms(n) for n in sizes]
fig, axes = plots.figure("Time of one pass", machine.describe())
axes.plot(sizes, passes, label="measured")
axes.plot(sizes, [b * W / peaks.bandwidth * 1e3] * 10, label="floor: reading the weights", ls="--")
axes.plot(sizes, [2 * n * W / peaks.flops * 1e3 for n in sizes], label="floor: arithmetic", ls=":")
axes.set(xscale="log", yscale="log", xlabel="tokens computed in the pass, n", ylabel="ms")
axes.set_xticks(sizes, sizes)
axes.legend()
show(fig, "A pass's milliseconds against its tokens: nearly flat at first, then a straight rise.")

# %% [markdown]
# <details>
# <summary>How to read it</summary>
#
# The crossing of the two floors is your $n = b \cdot \text{ridge} / 2$. To its left a pass of many
# tokens costs about as much as a pass of one: decode wastes the arithmetic units. The measured line
# lies above the floors, most of all on the left: starting some hundred small operations takes
# milliseconds whatever their size. A model as small as the course's own may also stay in the
# processor's cache, which is faster than the memory that was measured. Prefill is limited by
# **compute**, decode by **memory** (and, here, by overhead).
#
# </details>
#
# ## Step 4: bytes a token
#
# Each layer keeps a key and a value of $H_{kv}$ heads for each token:
#
# $$\text{bytes a token} = 2 \cdot L \cdot H_{kv} \cdot D \cdot b$$
#
# **Predict** Qwen3-32B's from its config: $L = 64$, $H_{kv} = 8$, $D = 128$, $b = 2$ (bfloat16).

# %%
def bytes_per_token(layers, kv_heads, head_dim, itemsize):
    return 2 * layers * kv_heads * head_dim * itemsize


c = cached.config
own = (c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads, c.head_dim)
shapes = {  # L, H, H_kv, D, b
    "this lesson's": (*own, c.dtype.itemsize),
    "storyteller": (5, 4, 2, 64, 2),
    "Qwen3-0.6B": (28, 16, 8, 128, 2),
    "Qwen3-32B": (64, 64, 8, 128, 2),
    "Llama-3-70B": (80, 64, 8, 128, 2),
}
print(f"{'':14}{'bytes a token':>14}{'4,096 tokens':>14}{'with H_kv = H':>15}")
for name, (L, H, H_kv, D, itemsize) in shapes.items():
    size = bytes_per_token(L, H_kv, D, itemsize)
    gib = size * 4096 / 2**30
    print(f"{name:14}{size:>14,}{gib:>10.2f} GiB{gib * H / H_kv:>11.2f} GiB")
cache = cached.new_cache(num_rows=3, length=100)
assert cache.numel() * cache.element_size() == 300 * bytes_per_token(own[0], *own[2:], 4)

# %% [markdown]
# Qwen3-32B needs 262,144 bytes a token, a quarter of a MiB: one request of 4,096 tokens takes a GiB.
# Had each of its 64 query heads a key and value head of its own, it would take eight. Sharing one KV
# head among a **group** of query heads saves that factor, $H / H_{kv}$.
#
# ## Assemble: rows, positions, masks
#
# A batch needs one more idea. Stage 02 gives row $i$ a place of `max_len` tokens in one tensor
# `[rows, max_len]`. Prompts differ, so shorter ones are **padded** on the right to the longest. Two
# things keep padding out of the answer: each token's position is its own row's, and a mask hides
# every place after it. Take prompts of 2 and 4 tokens, and `context_lens` = tokens to read in a row.

# %% tags=["nbval-check-output"]
def mask_of(context_lens, new):
    """[rows, new, places]: what each new token may read; 1 yes, 0 no."""
    readable = torch.arange(int(context_lens.max()))
    last = context_lens[:, None] - new + torch.arange(new)  # each new token's own place
    return (readable <= last[..., None]).int()


prefill_mask = mask_of(torch.tensor([4, 4]), new=4)  # both rows padded to 4
decode_mask = mask_of(torch.tensor([3, 5]), new=1)  # row 0 writes place 2, row 1 place 4
print("prefill, row 0:", prefill_mask[0].tolist())
print("decode, row 0: ", decode_mask[0].tolist())
print("decode, row 1: ", decode_mask[1].tolist())
assert decode_mask.sum().item() == 3 + 5

# %% [markdown]
# In prefill, row 0's real tokens at places 0 and 1 see nothing to their right; the rows of its padding
# compute rubbish that nobody reads. In decode, row 0's new token **overwrites** the padding at place
# 2, and the mask hides place 3. Now the stage itself; it is these ideas and no more.

# %%
from course.reading import show_source
from course.stages import contiguous

show_source(contiguous.attend, ContiguousCache.prefill, ContiguousCache.decode)

# %% [markdown]
# `attend` is your `attention` for many rows and heads: the same mask, and `enable_gqa` for the groups.
# `forward` tells the decoder where new tokens go: row $i$ at position $p$ writes **slot**
# $i \cdot \text{max\_len} + p$ of the flat cache. `serve_batch` is the loop around them.

# %%
show_source(ContiguousCache.forward, ContiguousCache.serve_batch)

# %% [markdown]
# The engine does its writing and reading in `nanovllm/ops/attention.py`, as every layer of the decoder
# does: store first, then read the cache and nothing else. (Blocks and `block_tables` are lesson 03; a
# row of stage 02 is one long block.)

# %%
from nanovllm.ops import attention as engine_attention

show_source(engine_attention.rope_store, engine_attention.store_kv)

# %% [markdown]
# What the toy left out: **RoPE** is applied before a key is stored, so a cached key is right at its
# own position only; the norm of query and key; and $L$ layers, each with its own table.
#
# **Predict**: fill the whole cache with 99 before the prompt is stored. Which tokens change?

# %%
def generate(prompts, count, fill=0.0):
    """Greedy answers of a padded batch, over a cache that held `fill` everywhere."""
    lengths = torch.tensor([len(p) for p in prompts], device=cached.device)
    cache = cached.new_cache(len(prompts), int(lengths.max()) + count).fill_(fill)
    logits = cached.prefill(prompts, cache)
    answers = []
    for step in range(count):
        next_ids, _ = greedy(logits)
        answers.append(next_ids)
        logits = cached.decode(next_ids, lengths + step, cache)
    return [list(row) for row in zip(*answers, strict=True)], logits


batch = [prompt, prompt[: P // 2], prompt[3:]]
clean, _ = generate(batch, 20)
dirty, _ = generate(batch, 20, fill=99.0)
print("tokens that changed:", sum(a != b for a, b in zip(sum(clean, []), sum(dirty, []), strict=True)))
assert clean == dirty

# %% [markdown]
# None: a masked place has weight exactly 0. (NaN would survive that, since $0 \cdot \text{NaN}$ is
# NaN; caches start as zeros or are masked twice for that reason.)
#
# ## Check: the same answer
#
# Integers came first: slots, masks, counts. Next the logits in float32, against `transformers`, which
# reads the whole text at once. Then greedy tokens, against `transformers` and stage 01.

# %%
from transformers import AutoModelForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
reference = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32).to(cached.device)
(ours,), logits = generate([prompt], N)
everything = torch.tensor([prompt + ours], device=cached.device)
theirs = reference(everything).logits[0]
print(f"logits after {P + N} tokens: largest difference {(logits[0] - theirs[-1]).abs().max():.1e}")
torch.testing.assert_close(logits[0], theirs[-1], atol=1e-3, rtol=1e-3)

best_two = theirs[P - 1 : -1].topk(2).values
gaps = (best_two[:, 0] - best_two[:, 1]).tolist()  # by how much each token won
certain = next((i for i, gap in enumerate(gaps) if gap < 1e-4), N)  # up to the first near tie
assert ours[:certain] == theirs[P - 1 : -1].argmax(-1)[:certain].tolist() == answer[:certain]
print(f"{certain} of {N} greedy tokens compared with transformers and stage 01, all equal")

# %% [markdown]
# ## Measure: speed
#
# For the next token of a text of $n$ tokens, stage 01 computes $n$ tokens and stage 02 one.
# **Predict** from the plot of passes: the speed-up at 16 tokens, and at 900.

# %%
lone = Recompute(measured_model().path)
lone.prepare(job)


def ms_of_next_token(n):
    """Milliseconds of the token after n others: by stage 01, and by stage 02."""
    some = torch.randint(timed.vocab_size, (n,)).tolist()
    at, cache = torch.tensor([n], device=timed.device), timed.new_cache(1, n + 1)
    again = measure(lambda: lone.last_logits(some), repeats=3)
    return 1e3 * again.median, 1e3 * measure(lambda: timed.decode([5], at, cache), 9).median


limit = timed.config.max_position_embeddings
lengths = [n for n in (4, 16, 64, 256, 900, 3600, 7200) if n < limit]
times = [ms_of_next_token(n) for n in lengths]
speedups = [again / kept for again, kept in times]

# %%
fig, (left, right) = plots.figure("One more token", machine.describe(), columns=2)
left.plot(lengths, times, label=["stage 01: compute all", "stage 02: compute one"])
left.set(xlabel="tokens so far, n", ylabel="ms for the next token", xscale="log", yscale="log")
left.legend()
right.plot(lengths, speedups, color=plots.GREEN, marker="^")
right.axhline(1, color="black", lw=1, marker="")
right.set(xlabel="tokens so far, n", ylabel="times faster with the cache", xscale="log", ylim=0)
show(fig, "Left: without a cache the next token's time rises with n, with one it is nearly flat. "
    + "Right, the speed-up: " + ", ".join(f"{s:.1f} at {n}" for n, s in zip(lengths, speedups)))

# %% [markdown]
# When it does **not** help: with few tokens so far, a pass of all costs about what a pass of one does
# (step 3); on a GPU that holds for much longer texts. An answer of **one token**, as in classification,
# is a prefill and nothing else. And where memory is scarce rather than time, recomputing may be the
# better bargain: lesson 05 will throw caches away and compute them again.
#
# Now the ladder's workload, which every stage is given. Stage 02 first proves on two requests that it
# says what stage 01 says; its record then joins the others'. A missing record of stage 01 is made up
# for, which takes a while.

# %%
from course.records import load, record
from course.stages import compare
from course.workload import ladder_workload

workload = ladder_workload(timed.vocab_size)
print(workload)
stage = ContiguousCache(measured_model().path)
two = workload.first(2)
print(compare(stage.run(two), Recompute(measured_model().path).run(two)))
row = record([stage.run(workload) for _ in range(3)])
if not any((r.stage, r.machine, r.model) == (1, row.machine, row.model) for r in load()):
    record(Recompute(measured_model().path).run(workload))
print(stage.run(workload))

# %%
fig = plots.ladder(upto=2)
show(fig, fig.alt_text)

# %% [markdown]
# Two gains are in the first number: nothing is computed twice, and several rows share one reading of
# the weights. The memory is new: stage 01 kept nothing. Some of what stage 02 reserves never holds a
# live token.
#
# ## Measure: waste
#
# Stage 02 must set aside a row's place before it knows how long the answer will be. Take three rows:
# prompts of 3, 5 and 2 tokens, answers of 6, 2 and 4. The longest that may happen is $5 + 6 = 11$
# places a row, 33 in all. A row whose answer is done waits for the slowest.
#
# **Predict** for the moment after 4 decode steps: how many of the 33 places hold tokens that somebody
# still needs? And over the whole batch, how many of the 18 answer tokens computed are wanted?

# %%
from course.cache_pictures import batch_map, row_spans, share

prompts, outputs, max_len = [3, 5, 2], [6, 2, 4], 11
moments = [row_spans(prompts, outputs, step, max_len) for step in range(6)]
steps(
    [batch_map(rows, "Three rows of 11 places", cells=True) for rows in moments],
    [f"{step} decode steps: {share(rows, 'live'):.0%} live" for step, rows in enumerate(moments)],
    "Three rows of a cache fill up, finish and wait",
)
assert share(moments[4], "live") == 7 / 33
assert sum(outputs) / (len(outputs) * max(outputs)) == 12 / 18

# %% [markdown]
# <details>
# <summary>7 of 33, and 12 of 18</summary>
#
# After 4 steps row 0 has 3 + 4 tokens and is the only one running: row 1 finished with its second
# token, row 2 with its fourth. So 7 places are live, 21%. Three rows run six steps; they are wanted
# for 6 + 2 + 4 = 12 of the 18. A third of the decode work is for nothing.
#
# </details>
#
# Now a mix as a chat service sees it: 16 requests, prompts of 8 to 64 tokens, answers mostly short
# and sometimes long, 128 at most. There is room for 8 rows of 192 places. The stage reports how many
# places are reserved and live at each step; we keep every report.

# %% tags=["nbval-check-output"]
import random

from course.stages import Recorder

rng = random.Random(1)
prompts = [64, *(rng.randint(8, 64) for _ in range(15))]
outputs = [*(min(128, 1 + int(rng.expovariate(1 / 30))) for _ in range(15)), 128]
mix = LadderWorkload(
    [[1 + i % 9] * n for i, n in enumerate(prompts)], outputs, 0, kv_tokens=8 * 192
)


class Log(Recorder):
    reports = ()

    def cache(self, reserved, live):
        self.reports += ((reserved, live),)


log = Log(len(prompts))
timed.serve(mix, log)
reserved, live = map(sum, zip(*log.reports, strict=True))
wanted, rows = sum(outputs), [outputs[:8], outputs[8:]]
computed = sum(8 * max(batch) for batch in rows)
print(f"answers: {outputs}")
print(f"places live: {live / reserved:.1%} of those reserved, on average over {len(log.reports)} steps")
print(f"decode rows that ran idle: {computed - wanted:,} of {computed:,}, {1 - wanted / computed:.0%}")
padded = sum(8 * max(batch) for batch in (prompts[:8], prompts[8:]))
print(f"prompt tokens computed for padding: {padded - sum(prompts)} of {padded}")

# %%
spans = row_spans(prompts[:8], outputs[:8], 30, 192)
show(
    batch_map(spans, f"First batch after 30 steps: {share(spans, 'live'):.0%} live"),
    "Eight rows of 192 places. Few of them are live; most are reserved and empty, or held by rows "
    + "that have finished.",
)
assert round(share(spans, "live") * 8 * 192) == log.reports[30][1]

# %%
fig, axes = plots.figure("How much of the reserved cache is live", "the mix; any machine")
axes.plot([100 * live / reserved for reserved, live in log.reports], marker="")
axes.set(xlabel="step (both batches)", ylabel="live places, % of reserved", ylim=(0, 100))
show(fig, "The live share rises while all rows run, and falls as they finish one by one, twice.")

# %% [markdown]
# In this mix a small part of the reserved memory holds what somebody needs, and over half of the decode
# rows ran for nothing. The authors of vLLM measured the same in engines of 2023: 20 to 38% of the cache
# held tokens ([Kwon et al., 2023](https://arxiv.org/abs/2309.06180)). Three losses add up:
#
# - **reserved, empty**: a place as long as the longest answer allowed,
# - **finished, still held**: nobody leaves before the batch ends, and nobody comes in,
# - **padding**: prompts computed and stored to the length of the longest.
#
# ## In real vLLM
#
# Release v0.11.0 has your formula in
# [`vllm/v1/kv_cache_interface.py`, lines 63 to 66](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/v1/kv_cache_interface.py#L63-L66),
# `page_size_bytes`. Three differences:
#
# 1. It counts a **block** of tokens of one layer, `block_size` of them, and never a place of `max_len`:
#    there is no contiguous cache.
# 2. The size is found, not given:
#    [`determine_available_memory`](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/v1/worker/gpu_worker.py#L222)
#    runs the largest step once, and the cache gets what `gpu_memory_utilization` leaves.
# 3. `dtype` is the cache's own: with `kv_cache_dtype="fp8"` a number takes one byte, whatever the
#    model computes in.
#
# ## Exercises
#
# In `exercises/02_kv_cache.ipynb`:
#
# 1. **Predict** (5 min): how many requests of 2,048 tokens fit beside a model's weights, from its config.
# 2. **Implement** (20 min): `attend` for a padded batch whose prompts are padded on the *left*.
# 3. **Break and fix** (15 min): a decode that stores its key one place too late; find out why short
#    answers still look right.

# %% [markdown]
# ## Recap
#
# A token's keys and values depend on earlier tokens only, so they are computed once and kept; its query
# is used once and dropped. Prefill computes many tokens a pass and is limited by arithmetic, decode one
# and is limited by memory. A contiguous cache gives the same answers faster, and wastes most of what it
# reserves when requests differ.
#
# **Check yourself.**
#
# <details>
# <summary>Why is there no query cache?</summary>
#
# Row $t$ of the output is the only one that uses query $t$, and it is computed in the pass that made it.
#
# </details>
# <details>
# <summary>A model has 28 layers, 8 KV heads of 128 numbers, in bfloat16. What does a token cost?</summary>
#
# $2 \cdot 28 \cdot 8 \cdot 128 \cdot 2 = 114{,}688$ bytes: 112 KiB.
#
# </details>
# <details>
# <summary>Which phase gains from batching eight requests, and why?</summary>
#
# Decode: one reading of the weights then serves eight tokens, at almost the same time. A long prefill
# is limited by arithmetic already.
#
# </details>
# <details>
# <summary>Why may padding stay in the cache after prefill?</summary>
#
# It stands to the right of the prompt. The mask hides it until an answer token overwrites it.
#
# </details>
# <details>
# <summary>A batch of 4 has answers of 10, 10, 10 and 90 tokens. How many decode rows run idle?</summary>
#
# $4 \cdot 90 = 360$ are computed, $120$ wanted: 240, two thirds.
#
# </details>
#
# **Next**: could a request take memory as it grows, from wherever there is some, and give it back the
# moment it is done?
