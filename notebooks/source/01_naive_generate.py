# %% [markdown]
# # 01 · One token at a time
#
# | This lesson | |
# |---|---|
# | Minutes | 45 |
# | Difficulty | medium |
# | Hardware | any laptop; a GPU is used if there is one |
# | Needs | lesson 00; Python, and PyTorch tensors |
# | Ends in | `nanovllm/sampling_params.py`, `nanovllm/models/model_config.py`, `nanovllm/models/decoder.py`, `nanovllm/layers/functional.py`, `nanovllm/layers/norm.py`, `nanovllm/layers/rope.py`, `nanovllm/layers/sampler.py` |

# %% [markdown]
# ## What hurts now
#
# A model scores every token that could come next. You pick one, append it, and call the model again;
# **stage 01** hands it the *whole* text each time. A prompt of 24 tokens, 256 to come, on the CPU.
#
# **Predict** before you run: how many times as long as the first 32 tokens do all 256 take?

# %%
import torch
import torch.nn.functional as F

from course import machine
from course.drawings import generate_plots
from course.labs import naive_lab
from course.models.choice import measured_model, own_model
from course.show import plots
from course.show.display import show
from course.show.reading import show_source
from course.stages import Recompute

torch.set_num_threads(1)
plots.use_style()
torch.set_grad_enabled(False)  # nothing is trained here
folder = own_model()  # the small model that ships with the course
tokenizer, prompt = naive_lab.question(folder)
stage = Recompute(folder, device="cpu", dtype="float32")
answer = naive_lab.timed_answer(stage, prompt, 256)
clock = answer.times[0]  # clock[i]: seconds until token i had come
print(f"{machine.describe('cpu')}: {clock[31]:.2f} s for 32 tokens, {clock[255]:.2f} s for 256")
print(f"8 times as many tokens took {clock[255] / clock[31]:.1f} times as long")

# %% [markdown]
# Each step reads a longer text. At the end you compute this factor. You will
#
# 1. **compute** a next token by hand, from text to logits,
# 2. **sample** so that a seed gives the same story in any company,
# 3. **predict** what an answer costs.
#
# ## The whole machine
#
# ![Token ids become vectors; every layer adds the results of attention and of an MLP to them; a norm and the head make logits.](../figures/decoder.svg)
#
# | symbol | meaning, name in `config.json` |
# |:--|:--|
# | $n$ | tokens in the text so far |
# | $V$ | different tokens, `vocab_size` |
# | $d$ | numbers in a token's vector, `hidden_size` |
# | $L$ | layers, `num_hidden_layers` |
# | $H$ | query heads, `num_attention_heads` |
# | $K$ | key and value heads, `num_key_value_heads` |
# | $D$ | numbers in a head, `head_dim` |
# | $I$ | inner size of the MLP, `intermediate_size` |
#
# ## Step 1: from text to ids to logits
#
# A **byte-level BPE** (byte-pair) tokenizer begins with bytes and joins the pairs that were most frequent in
# its training text. A space (`·`) belongs to the next word. The last line is our prompt; below it stand the
# best **logits**, the $V$ scores of the next token, as probabilities.
#
# **Predict**: ü is two bytes, and rare in English. Can *Zürich* be one token?

# %%
visible = str.maketrans(" \n", "·⏎")
for text in ["an unbelievable lantern", "Zürich", tokenizer.decode(prompt)]:
    ids = tokenizer(text).input_ids
    pieces = [tokenizer.decode([i]).translate(visible) for i in ids]
    print(" | ".join(f"{piece} {i}" for piece, i in zip(pieces, ids, strict=True)))
    assert tokenizer.decode(ids) == text  # nothing is lost

logits = stage.last_logits(prompt)[0]  # [V], after the last token
best = logits.softmax(dim=-1).topk(10)
words = [tokenizer.decode([i]) for i in best.indices]
for word, p in zip(words, best.values.tolist(), strict=True):
    print(f"{word:>6} {p:6.3f} {'█' * round(100 * p)}")

# %% [markdown]
# *Zürich* is five tokens, two of them *half* of ü, shown as �. (The engine's `Detokenizer` holds half a
# character back.) Eight words begin a story well; then comes a cliff.
#
# ## Step 2: attention on four tokens
#
# A token's **query** is what it looks for, its **key** what it is found by, its **value** what it passes on.
# A score is the product of a query and a key, divided by $\sqrt D$; here $D = 4$. Token 2 looks for keys 1 and 3:
# its query has a 2 where each has one, which gives $2 \cdot 2 / \sqrt 4 = 2$. But token 3 comes later, and the
# **causal mask** sets such scores to $-\infty$. Softmax makes each row weights that sum to 1; they weigh the values.
#
# **Predict** ($e^2 \approx 7.4$) row 1's weights, with open scores 2 and 2, and row 2's, with 0, 2 and 0.

# %%
key = 2 * torch.eye(4)
query = torch.tensor([[2.0, 0, 0, 0], [2, 2, 0, 0], [0, 2, 0, 2], [0, 0, 2, 0]])
value = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [9, 9, 9, 9]])
scores = query @ key.T / 4**0.5  # [4 queries, 4 keys]
future = torch.ones(4, 4, dtype=torch.bool).triu(diagonal=1)  # above the diagonal
weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
show(generate_plots.attention_weights(weights))
output = weights @ value
print(output)
built_in = F.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True)
assert torch.allclose(output, built_in[0])
assert output[:3].max() <= 1  # no nine has leaked

# %% [markdown]
# Two equal scores share; in row 2, key 1 has $7.4 / (1 + 7.4 + 1) = 0.79$.
#
# ## Step 3: heads in groups
#
# Attention runs $H$ times side by side, in **heads** with queries of their own. In *grouped-query attention*
# neighbouring heads share keys and values.
#
# **Predict**, for $H = 4$ and $K = 2$: which key head does query head 2 use? (Heads count from 0.)


# %% tags=["nbval-check-output"]
def attend(query, key, value):
    """Causal attention: query [n, H, D], key and value [n, K, D] give [n, H, D]."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))  # [n, H, D]
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
    future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(diagonal=1)
    weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


torch.manual_seed(0)
query, key, value = torch.randn(4, 4, 4), torch.randn(4, 2, 4), torch.randn(4, 2, 4)
grouped = attend(query, key, value)
alone = attend(query[:, 2:3], key[:, 1:2], value[:, 1:2])  # query head 2 with key head 1
assert torch.allclose(grouped[:, 2:3], alone)
print("query heads 0 to 3 use key heads", [head // (4 // 2) for head in range(4)])

# %% [markdown]
# Key head 1. But attention does not know *where* a token stands.
#
# ## Step 4: RoPE (rotary position embedding)
#
# Take two numbers of a query or key as a point, and turn it by the angle $pf$: the token's position $p$ times
# a speed $f$. The product of a query at $i$ and a key at $j$ depends on the angle *between* them, $(i - j) f$.
#
# **Predict**: with $f = 0.5$, positions 3 and 1 give $\cos(2 \cdot 0.5) = 0.54$. What do 103 and 101
# give?


# %%
def turn(pair, angle):
    """A point (a, b) in the plane, turned by an angle in radians."""
    (a, b), cos, sin = pair, torch.cos(angle), torch.sin(angle)
    return torch.stack([a * cos - b * sin, b * cos + a * sin])


point = torch.tensor([1.0, 0.0])
for m, n in [(3, 1), (103, 101), (3, 0)]:
    query_at_m, key_at_n = (turn(point, torch.tensor(0.5 * p)) for p in (m, n))
    product = query_at_m @ key_at_n
    print(f"query at {m:>3}, key at {n:>3}: {product:.4f}")
    assert torch.isclose(product, torch.cos(torch.tensor(0.5 * (m - n))), atol=1e-5)

# %% [markdown]
# 0.54 again: only the distance counts. A head has $D/2$ pairs; pair $i$ is its numbers $i$ and $i + D/2$,
# and turns at its own speed, here with $\theta = 10{,}000$:
#
# $$f_i = \theta^{-2i/D}$$
#
# The engine keeps cosines and sines in a table.

# %%
from nanovllm.layers.rope import apply_rope, rope_table

c = stage.config  # a ModelConfig, read from config.json
table = rope_table(torch.tensor(c.rope_frequencies), 512)
show_source(apply_rope)
head = torch.randn(1, 1, c.head_dim)  # one token with one head
pair, speed = [3, 3 + c.head_dim // 2], 10_000 ** (-2 * 3 / c.head_dim)  # pair 3
ours = turn(head[0, 0, pair], torch.tensor(100 * speed))
assert torch.allclose(ours, apply_rope(head, table[100:101])[0, 0, pair], atol=1e-4)
show(generate_plots.rope_turns(table, pairs=(0, 8, 16)))

# %% [markdown]
# ## Step 5: one layer of the real model
#
# A layer adds two results to each token's vector $x$. Before each it divides $x$ by its root mean square and
# scales it (**RMSNorm**). First attention: one product, `qkv_proj`, makes queries, keys and values.


# %%
def rms_norm(x, module):  # eps: no division by 0
    return x / (x.pow(2).mean(dim=-1, keepdim=True) + module.eps).sqrt() * module.weight


def attention_half(layer, x):
    """x + attention(norm(x)); x [n, d]."""
    attn = layer.self_attn
    qkv = rms_norm(x, layer.input_layernorm) @ attn.qkv_proj.weight.T  # [n, (H + 2 K) D]
    H, K = c.num_attention_heads, c.num_key_value_heads
    query, key, value = qkv.unflatten(-1, (-1, c.head_dim)).split([H, K, K], dim=1)
    # this model norms each head, too
    query = apply_rope(rms_norm(query, attn.q_norm), table[: len(x)])
    key = apply_rope(rms_norm(key, attn.k_norm), table[: len(x)])
    return x + attend(query, key, value).flatten(1) @ attn.o_proj.weight.T  # mixes the heads


# %% [markdown]
# Then the MLP, which sees each token alone. It makes two vectors of $I$ numbers; one, through
# $\mathrm{silu}(z) = z / (1 + e^{-z})$, gates the other. After all layers, a last norm, and the **head**: a
# product of the last token's vector with the embedding, a row of $d$ numbers for each id.


# %%
def mlp_half(layer, x):
    """x + down(silu(gate) * up); gate and up of norm(x)."""
    both = rms_norm(x, layer.post_attention_layernorm) @ layer.mlp.gate_up_proj.weight.T
    gate, up = both.chunk(2, dim=-1)  # each [n, I]
    return x + (F.silu(gate) * up) @ layer.mlp.down_proj.weight.T


model = stage.model


def vectors(ids):
    """Each token's vector [n, d] after all layers, everything computed afresh."""
    x = model.embed_tokens(torch.tensor(ids))
    for layer in model.layers:
        x = mlp_half(layer, attention_half(layer, x))
    return x


def logits_by_hand(ids):
    """Logits [V] of the token after `ids`."""
    return rms_norm(vectors(ids)[-1], model.norm) @ model.embed_tokens.weight.T


error = (logits_by_hand(prompt) - logits).abs().max().item()
print(f"{len(logits):,} logits: largest difference to the engine's {error:.0e}")
assert error < 1e-4

# %% [markdown]
# ## Step 6: from logits to a token
#
# **Greedy** takes the largest. To sample, first divide the logits by the **temperature**: 0.5 squares all odds.
# Filters cut the tail: *top-k* keeps the $k$ likeliest, *top-p* the likeliest until their sum reaches $p$,
# *min-p* all that are at least $p$ times as likely as the best.
#
# **Predict** from the list in Step 1: how many words do top-k 4, top-p 0.8 and min-p 0.2 keep?

# %%
kept = {}
for name, limit in [("top_k", 4), ("top_p", 0.8), ("min_p", 0.2)]:
    kept[f"{name} {limit}"] = naive_lab.kept_by(logits, **{name: limit})[best.indices].tolist()
assert sum(kept["top_k 4"]) == 4
show(generate_plots.kept_words(words, best.values.tolist(), kept))

# %% [markdown]
# Top-p keeps the word that passes 0.8, too. Min-p cuts at the cliff: $0.2 \cdot 0.179 = 0.036$.
#
# **Noise that is a function.** Add **Gumbel noise** $-\ln(-\ln u)$, $u$ random between 0 and 1, to each
# logit: the largest is then a draw from the softmax. The engine computes $u$ from the request's seed, the
# position and the token's id, so that no neighbour changes your draws.
#
# **Predict**: three tokens have 0.6, 0.3, 0.1. Over 20,000 positions, how often does each win?


# %%
from nanovllm.layers.sampler import draw, filter_scores, gumbel_noise


def noise(seed, position, ids):
    """[len(ids)]: the engine's noise for one request at one position."""
    return gumbel_noise(torch.tensor([[seed]]), torch.tensor([[position]]), ids)[0]


toy = torch.tensor([0.6, 0.3, 0.1]).log()  # logits whose softmax these are
many = torch.arange(20_000)[:, None]
winners = (toy + gumbel_noise(torch.full_like(many, 7), many, torch.arange(3))).argmax(dim=1)
share = winners.bincount(minlength=3) / len(many)
print("share of 20,000:", [round(s, 3) for s in share.tolist()])
assert (share - toy.exp()).abs().max() < 0.02
assert noise(7, 5, torch.tensor([2]))[0] == noise(7, 5, torch.arange(4096))[2]

# %% [markdown]
# As often as the softmax says. And token 2's noise is the same alone and among 4,096 tokens.
#
# ## Step 7: the loop
#
# Call, pick, append, until a token ends the text. This model asks for temperature 0.7.

# %%
from nanovllm.checkpoint.generation_config import read_generation_config
from nanovllm.checkpoint.weights import load_weights

stop_ids, defaults = read_generation_config(folder, c, tokenizer)
read = []  # how many tokens each step computed


def generate(ids, limit, temperature=0.0, seed=0):
    """At most `limit` new ids after `ids`; temperature 0 is greedy."""
    new = []
    while len(new) < limit and not stop_ids.intersection(new):
        text = [*ids, *new]
        read.append(len(text))
        logits = logits_by_hand(text)
        if temperature:  # the new token will stand at position len(text)
            logits = logits / temperature + noise(seed, len(text), torch.arange(len(logits)))
        new.append(int(logits.argmax()))
    return new


for seed in (1, 2):
    story = generate(prompt, 40, defaults["temperature"], seed)
    print(f"seed {seed}: {tokenizer.decode(story)}\n")
    assert generate(prompt, 8, defaults["temperature"], seed) == story[:8]

# %% [markdown]
# **Predict**: after a prompt of 24 tokens we ask for 4. How many tokens does the model compute, and how
# many different ones?

# %% tags=["nbval-check-output"]
read.clear()
generate(list(range(100, 124)), 4)
print(" + ".join(map(str, read)), "=", sum(read))
assert sum(read) == 4 * 24 + 4 * 3 // 2
show_source(Recompute.serve)
show(generate_plots.recomputed(prompt=8, count=8))

# %% [markdown]
# 102, but only 27 different ones (the last is never read). For a prompt of $P$ and an answer of $N$ it is
# $NP + N(N-1)/2$: **quadratic in $N$**, the triangle above. Stage 01 is this very loop.
#
# ## Assemble: the same in the engine
#
# You wrote what these lines do. `norm_linear` is `linear(norm(x))` in one function, because a GPU can do both in one pass; so are the others.

# %%
from nanovllm.layers.functional import linear_add, norm_linear, norm_swiglu
from nanovllm.models.decoder import Attention, Decoder, DecoderLayer

show_source(DecoderLayer.forward, Attention.forward, Decoder.forward)
show_source(norm_linear, linear_add, norm_swiglu)
show_source(draw, filter_scores, load_weights)  # a missing tensor is an error

# %% [markdown]
# Ours left out: `rope_store` also writes keys and values into a **cache**, `kv_cache`, which `paged_attention`
# reads (lesson 02); stage 01 throws it away. `metadata`: tokens of many requests stand in one row. `backend`: the
# functions may be GPU kernels (lesson 06). `shard`, `first_id`: one GPU's part (lesson 08).
#
# ## Check
#
# First an invariant: change the last token, and no vector before it moves by a bit. Then logits, against
# transformers in float32. Last, greedy tokens, up to the first near tie (less than $10^{-4}$ apart).

# %%
from course.labs.reference import logits_along, num_certain

changed = [*prompt[:-1], prompt[0]]
same = (vectors(prompt) == vectors(changed)).all(dim=1).tolist()
print(f"{sum(same)} of {len(same)} vectors are the same to the bit")
assert same == [True] * (len(prompt) - 1) + [False]

chosen = answer.token_ids[0][:64]  # by stage 01, at the top
theirs = logits_along(folder, prompt + chosen)  # [24 + 64, V], by transformers
ours = torch.cat([stage.last_logits(prompt[: i + 1]) for i in range(len(prompt))])
error = (ours - theirs[: len(prompt)]).abs().max().item()
print(f"{ours.shape[0]} x {ours.shape[1]:,} logits, largest difference {error:.0e}")
assert error < 1e-4

wanted = theirs[len(prompt) - 1 : -1]  # the row before each answer token
certain = num_certain(wanted)
assert chosen[:certain] == wanted.argmax(dim=-1).tolist()[:certain]
print(f"{certain} of 64 greedy tokens compared, all equal: {tokenizer.decode(chosen[:12])} ...")

# %% [markdown]
# ## Measure
#
# Multiplying $n$ vectors by a matrix of $w$ numbers takes $2nw$ operations, a product and a sum each.
# Attention makes, in each layer and head, $n \times n$ scores of $D$ products, and weighs as many values.
# Logits are needed once:
#
# $$F(n) = 2nW + 4n^2 LHD + 2Vd \qquad W = L\,(2dD(H + K) + 3dI)$$
#
# A step takes $t(n) = t_0 + F(n) / r$ seconds: $t_0$ at any length, and $r$ operations a second. (A GPU computes while
# operations are started: there the longer of the two.)
#
# **Predict** with $W = 5{,}898{,}240$ and $LHD = 1{,}280$: at which $n$ are the first two terms equal? And
# by $F$ alone, 256 tokens cost 32.5 times what 32 cost. Which term of $t$ makes the clock say less?

# %%
for n in (24, 256):
    counted = naive_lab.counted_flops(stage, n)  # by PyTorch
    assert counted == naive_lab.step_flops(c, n)
measured = Recompute(measured_model().path)  # on the GPU, if there is one
costs, machines = naive_lab.step_costs(stage, measured)
print(*costs, sep="\n")
ratios = [t[255] / t[31] for t in (costs[0].answer(len(prompt), 256), clock)]
print("256 tokens against 32: predicted {:.1f}, measured {:.1f} times as long".format(*ratios))
show(generate_plots.step_and_answer(costs, clock, len(prompt), machines))

# %% [markdown]
# Two measured steps (the white points) gave $t_0$ and $r$; the others, and the clock, test them. The terms are equal at
# $n = W / (2LHD) = 2{,}304$, beyond this model's context. So, beyond $t_0$, **a step is nearly linear in $n$, and
# an answer nearly quadratic in its length**. Early and late steps pay $t_0$ alike, which lowers the ratio.
#
# Now the workload of every stage (on a GPU here 4 of 64 requests; one after another, hence TTFT).

# %%
from course.measure.ladder_workload import ladder_workload
from course.stages import records

workload = measured.part_of(ladder_workload(measured.vocab_size, measured.device.type))
print(measured_model(), workload, records.measured(measured, workload), sep="\n")
show(plots.ladder(upto=1))

# %% [markdown]
# Recomputing does *not* hurt when the answer is a single token.
#
# ## In real vLLM
#
# Release v0.24.0:
# [`Qwen3Attention` and `Qwen3DecoderLayer`](https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/model_executor/models/qwen3.py#L65-L242),
# [`Sampler.forward`](https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/v1/sample/sampler.py#L72-L149),
# [`random_sample`](https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/v1/sample/ops/topk_topp_sampler.py#L446-L468).
#
# 1. Each model family has its own file. Here one decoder serves three.
# 2. A layer passes on `hidden_states` and `residual`; the next norm's kernel adds them.
# 3. Noise comes from generators with a state, one for each seeded request.
#
# ## Exercises
#
# In `exercises/01_naive_generate.ipynb`:
#
# 1. **Predict** (5 minutes): what an answer costs.
# 2. **Implement** (20 minutes, 8 lines): top-p.
# 3. **Break and fix** (15 minutes): a chat with two beginnings.
#
# ## Recap
#
# Layers mix vectors by attention, with positions as rotations. Temperature, filters and noise make a token
# of logits. Reading the whole text for each makes an answer's cost quadratic.
#
# <details><summary>1. Why does the mask set scores to −∞ and not to 0?</summary>
#
# $e^0 = 1$: the future would get weight. $e^{-\infty} = 0$.
#
# </details>
# <details><summary>2. Why does a neighbour not change a request's noise?</summary>
#
# Seed, position and id do not know the batch.
#
# </details>
# <details style='margin-bottom:1em'><summary>3. When is a step's cost quadratic in the text's length?</summary>
#
# Beyond $n = W / (2LHD)$, where the scores outweigh the matrices.
#
# </details>
#
# **The next question**: no earlier vector noticed the changed token. What of a step could the next one keep?
