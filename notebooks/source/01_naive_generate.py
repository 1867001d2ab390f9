# %% [markdown]
# # 01 · One token at a time
#
# | This lesson | |
# |---|---|
# | Minutes | 60 |
# | Difficulty | medium |
# | Hardware | any laptop; a GPU is used in the last measurement if there is one |
# | Needs | lesson 00; Python, and PyTorch tensors |
# | Ends in | `nanovllm/model/decoder.py`, `nanovllm/model/rope.py`, `nanovllm/model/loader.py`, `nanovllm/model/model_config.py`, `nanovllm/ops/linear.py`, `nanovllm/ops/sampler.py`, `nanovllm/sampling_params.py`, `nanovllm/engine/detokenizer.py` |

# %% [markdown]
# ## What hurts now
#
# A language model maps token ids to one score for every possible next token. To write, you pick a
# token, append it, and call the model again. The simplest loop hands it the *whole* text each time.
# That loop is **stage 01** of the course.
#
# We ask the course's own model for 256 tokens, on the CPU, in float32.
#
# **Predict** before you run: how many times as long as the first 32 tokens do all 256 take? Write it
# down.

# %%
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt

from course import machine, plots
from course.display import show
from course.models import measured_model, own_model
from course.reading import show_source
from course.stages import Recompute, Recorder
from course.workload import LadderWorkload, ladder_workload
from nanovllm.config import EngineArgs
from nanovllm.model.loader import load_tokenizer

plots.use_style()
torch.set_grad_enabled(False)  # nothing is trained here
folder = own_model()
tokenizer = load_tokenizer(EngineArgs(str(folder)), folder)
chat = [{"role": "user", "content": "Tell me a story about a fox who finds a key."}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)

# %%
stage = Recompute(folder, device="cpu", dtype="float32")
request = LadderWorkload(prompts=[prompt], num_outputs=[256], shared_prefix=0)
stage.prepare(request)  # loads the weights
stage.last_logits(prompt)  # the first call is slower than all others
answer = Recorder(num_requests=1)
stage.serve(request, answer)

clock = answer.times[0]  # clock[i]: seconds until token i had come
print(f"{machine.describe('cpu')}, prompt of {len(prompt)} tokens")
print(f" 32 tokens: {clock[31]:5.2f} s, {32 / clock[31]:4.0f} tokens a second")
print(f"256 tokens: {clock[255]:5.2f} s, {256 / clock[255]:4.0f} tokens a second")
print(f"8 times as many tokens took {clock[255] / clock[31]:.1f} times as long")

# %% [markdown]
# <details><summary>Why not 8 times?</summary>
#
# Each step reads a longer text than the one before, so late tokens cost more than early ones. On one
# CPU thread the factor is about 15. By the end of this page you can compute it.
#
# </details>
#
# ## What you will be able to do
#
# 1. **Compute** a next token by hand, from text to logits, and prove it equal to the engine's.
# 2. **Sample** from logits so that a seed gives the same story in any company.
# 3. **Predict** the cost of a step, and of an answer, from the model's config.

# %% [markdown]
# ## The whole machine on one picture
#
# ![One forward pass of the decoder. Token ids are looked up in the embedding and become vectors; every layer adds an attention and an MLP result to them; a norm and the head turn the last vector into logits.](../figures/decoder.svg)
#
# | symbol | meaning | here |
# |:--|:--|--:|
# | $n$ | tokens in the text so far | 24 |
# | $V$ | vocabulary: different tokens there are | 4,096 |
# | $d$ | hidden size: numbers in a token's vector | 256 |
# | $L$ | layers | 5 |
# | $H$, $K$ | query heads; key and value heads | 4, 2 |
# | $D$ | numbers in a head | 64 |
# | $I$ | inner size of the MLP | 1,280 |
#
# **Logits** are the $V$ scores for the next token; their softmax gives probabilities.

# %% [markdown]
# ## Step 1: text becomes ids
#
# The tokenizer is a **byte-level BPE**. It starts from single bytes and merges the pairs that were
# most frequent in its training text. *lantern*, common in this model's stories, is one token; a word
# it has hardly seen falls apart. A leading space belongs to its word, written `·` below.
#
# **Predict**: ü is two bytes in UTF-8, and rare in English. How many tokens has *Zürich*?

# %%
for text in ["a fox found a lantern", "an unbelievable lantern", "Zürich"]:
    ids = tokenizer(text).input_ids
    pieces = [tokenizer.decode([i]).replace(" ", "·") for i in ids]
    print(" | ".join(f"{piece} {i}" for piece, i in zip(pieces, ids)))
    assert tokenizer.decode(ids) == text  # nothing is lost

# %% [markdown]
# Five: `Z`, two tokens that each hold *half* of ü, `ri` and `ch`. Half a character shows as �. We
# come back to that when ids become text again.
#
# ## Step 2: ids become scores
#
# The model gives a score to each of 4,096 tokens. Here are the likeliest first words of its answer.

# %%
logits = stage.last_logits(prompt)[0]  # [V]
probs = logits.softmax(dim=-1)
best = probs.topk(10)
words = [tokenizer.decode([i]) for i in best.indices]
for word, p in zip(words, best.values.tolist()):
    print(f"{word:>6} {p:6.3f} {'█' * round(100 * p)}")
assert logits.shape == (stage.vocab_size,)

# %% [markdown]
# Eight good beginnings, then a cliff, then a long tail: 4,086 other tokens share what is left.
# Between ids and scores lies the decoder. Its heart is attention.
#
# ## Step 3: attention on four tokens
#
# Every token asks a question (its **query**) and offers an answer (its **value**) under a label (its
# **key**). A score is the product of a query with a key, divided by $\sqrt D$. Take 4 tokens, $D=4$.
# Keys differ in one place each, so a score is easy to see: 2 where a query wants that key.

# %%
key = 2 * torch.eye(4)
query = torch.tensor([[2.0, 0, 0, 0], [2, 2, 0, 0], [0, 2, 0, 2], [0, 0, 2, 0]])
value = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [9, 9, 9, 9]])

scores = query @ key.T / 4**0.5  # [4 queries, 4 keys]
print(scores)

# %% [markdown]
# Row 2 wants keys 1 and 3. But token 3 comes *after* token 2: when token 2 is computed it may not
# exist yet. The **causal mask** sets such scores to $-\infty$, and softmax turns each row into weights
# that sum to 1.
#
# **Predict** row 1, whose scores are 2, 2 and two masked ones. Then row 2: after the mask its scores
# are 0, 2, 0. Which weight is largest, and is it more than 0.7? ($e^2 \approx 7.4$.)

# %%
future = torch.ones(4, 4, dtype=torch.bool).triu(diagonal=1)  # above the diagonal
weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
assert torch.allclose(weights.sum(dim=-1), torch.ones(4))
assert (weights[future] == 0).all()


def draw_weights(weights, title):
    figure, axes = plt.subplots(figsize=(3.6, 3.2))
    axes.imshow(weights, cmap="Blues", vmin=0, vmax=1.3)
    for row, column in [(i, j) for i in range(4) for j in range(4)]:
        axes.text(column, row, f"{weights[row, column]:.2f}", ha="center", va="center")
    axes.set(xticks=range(4), yticks=range(4), xlabel="key of token", ylabel="query of token")
    axes.set_title(title)
    axes.grid(visible=False)
    return figure


show(
    draw_weights(weights, "Attention weights"),
    "Four by four weights, zero above the diagonal. Row 1: 0.50, 0.50. Row 2: 0.11, 0.79, 0.11.",
)

# %% [markdown]
# Row 1 is ½ and ½; in row 2 key 1 has $7.4 / (1 + 7.4 + 1) = 0.79$. The output of a token is the sum
# of the values, each times its weight. The last value is four nines on purpose: would it leak into an
# earlier row, you would see it.

# %%
output = weights @ value
print(output)
built_in = F.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True)
assert torch.allclose(output, built_in[0])
value[3] = 1000  # change the last token: earlier rows do not notice
assert torch.equal((weights @ value)[:3], output[:3])

# %% [markdown]
# ## Step 4: heads in groups
#
# Real attention runs $H$ times side by side, each **head** with its own queries. In *grouped-query
# attention* several query heads share one key and value head, so there are fewer keys and values to
# make, and, from the next lesson on, to keep. This model has $H=4$, $K=2$.
#
# **Predict**: which key head does query head 2 use? (Heads count from 0; neighbours share.)

# %%
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
print("query heads read key heads", [h // (4 // 2) for h in range(4)])

# %% [markdown]
# Key head 1. So far attention does not know where a token stands: swap two earlier tokens and the
# last output stays the same.
#
# ## Step 5: RoPE, a position is a rotation
#
# Take two numbers of a query as a point in the plane and turn it by the angle $p f$, where $p$ is the
# token's position and $f$ a fixed speed. Do the same to the keys. The product of two points depends
# on the angle *between* them, which is $(m - n) f$: how far apart query $m$ and key $n$ stand.
#
# **Predict**: with $f = 0.5$, a query at 3 and a key at 1 give $\cos(2 \cdot 0.5) = 0.54$. And at 103
# and 101?

# %%
def turn(pair, angle):
    """Turn points [..., 2] in the plane by an angle in radians."""
    (a, b), cos, sin = pair.unbind(-1), torch.cos(angle), torch.sin(angle)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1)


point = torch.tensor([1.0, 0.0])
for m, n in [(3, 1), (103, 101), (3, 0)]:
    at_m, at_n = (turn(point, torch.tensor(0.5 * p)) for p in (m, n))
    print(f"query at {m:>3}, key at {n:>3}: {at_m @ at_n:.4f}")
    assert torch.isclose(at_m @ at_n, torch.cos(torch.tensor(0.5 * (m - n))), atol=1e-5)

# %% [markdown]
# The same 0.54: only the distance counts. A head of $D$ numbers holds $D/2$ such pairs, and pair $i$
# turns at its own speed $f_i = \theta^{-2i/D}$, here with $\theta = 10{,}000$. Fast pairs tell
# neighbours apart; slow ones tell near from far. The engine keeps all cosines and sines in one table.

# %%
from nanovllm.model.rope import apply_rope, rope_table

c = stage.config
table = rope_table(c.head_dim, c.rope_parameters, 512, c.max_position_embeddings)
print("table:", tuple(table.shape), "positions, (cos, sin), pairs")
head = torch.randn(1, 1, c.head_dim)  # one token, one head
turned = apply_rope(head, table[100:101])  # at position 100
i = 3  # any pair: its two numbers stand at i and i + D / 2
speed = c.rope_parameters["rope_theta"] ** (-2 * i / c.head_dim)
pair = torch.stack([head[0, 0, i], head[0, 0, i + c.head_dim // 2]])
same = torch.stack([turned[0, 0, i], turned[0, 0, i + c.head_dim // 2]])
assert torch.allclose(turn(pair, torch.tensor(100 * speed)), same, atol=1e-4)

# %% jupyter={"source_hidden": true}
figure, panels = plt.subplots(1, 3, figsize=(7.6, 2.8))
for panel, i in zip(panels, (0, 8, 16)):
    for p in range(6):
        x, y = table[p, :, i].tolist()
        panel.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "->", "color": plots.BLUE})
        panel.text(1.17 * x, 1.17 * y, p, ha="center", va="center", fontsize=9)
    panel.set(xlim=(-1.35, 1.35), ylim=(-1.35, 1.35), aspect="equal", xticks=[], yticks=[])
    panel.set_title(f"pair {i}: {c.rope_parameters['rope_theta'] ** (-2 * i / c.head_dim):.3f} rad")
show(
    figure,
    "Arrows turned by the positions 0 to 5 in three pairs: pair 0 turns by a radian a position, "
    "pair 8 by a tenth, pair 16 by a hundredth, so that its arrows lie on each other.",
)

# %% [markdown]
# ## Step 6: one layer of the real model
#
# A layer adds two results to each token's vector $x$. Before each it divides $x$ by its root mean
# square and scales it (**RMSNorm**). Here is the attention half, with the real weights. `qkv_proj`
# holds the weights of queries, keys and values below each other: one product instead of three. Qwen3
# also norms every query and key head.

# %%
model = stage.model


def rms_norm(x, module):
    return x / (x.pow(2).mean(dim=-1, keepdim=True) + module.eps).sqrt() * module.weight


def attention_half(layer, x):
    """x + attention(norm(x)), x [n, d]."""
    attn = layer.self_attn
    qkv = rms_norm(x, layer.input_layernorm) @ attn.qkv_proj.weight.T  # [n, (H + 2 K) D]
    heads = qkv.unflatten(-1, (-1, c.head_dim))
    num_heads, num_kv = c.num_attention_heads, c.num_key_value_heads
    query, key, value = heads.split([num_heads, num_kv, num_kv], dim=1)
    query = apply_rope(rms_norm(query, attn.q_norm), table[: len(x)])
    key = apply_rope(rms_norm(key, attn.k_norm), table[: len(x)])
    return x + attend(query, key, value).flatten(1) @ attn.o_proj.weight.T


x = model.embed_tokens(torch.tensor(prompt))
halfway = attention_half(model.layers[0], x)
print("n and d before and after:", tuple(x.shape), tuple(halfway.shape))
assert x.shape == halfway.shape

# %% [markdown]
# The MLP half looks at each token alone. It makes two vectors of $I$ numbers; one, through
# $\mathrm{silu}(z) = z / (1 + e^{-z})$, gates the other (**SwiGLU**). To check, we listen to the real
# layer 0 while the stage runs.

# %%
def mlp_half(layer, x):
    """x + down(silu(gate) * up), gate and up of norm(x)."""
    both = rms_norm(x, layer.post_attention_layernorm) @ layer.mlp.gate_up_proj.weight.T
    gate, up = both.chunk(2, dim=-1)  # each [n, I]
    return x + (F.silu(gate) * up) @ layer.mlp.down_proj.weight.T


heard = []
hook = model.layers[0].register_forward_hook(lambda module, inputs, out: heard.append(out))
stage.last_logits(prompt)
hook.remove()
error = (mlp_half(model.layers[0], halfway) - heard[0]).abs().max().item()
print(f"largest difference to the engine's layer: {error:.0e}")
assert error < 1e-4

# %% [markdown]
# The rest is repetition: all layers, then a last norm and the **head**, a product with the embedding
# itself. Only the last row is needed: the logits after token $n$.

# %%
def logits_by_hand(ids):
    """Logits [V] of the token after `ids`, everything computed afresh."""
    x = model.embed_tokens(torch.tensor(ids))
    for layer in model.layers:
        x = mlp_half(layer, attention_half(layer, x))
    return rms_norm(x[-1], model.norm) @ model.embed_tokens.weight.T


error = (logits_by_hand(prompt) - stage.last_logits(prompt)[0]).abs().max().item()
print(f"largest difference to the engine's logits: {error:.0e}")
assert error < 1e-4

# %% [markdown]
# ## Step 7: scores become a token
#
# **Greedy** takes the largest. To sample, divide the logits by the **temperature** $T$ first: below 1
# favours the likely, above 1 evens out. Three filters then cut the tail. *top-k* keeps the $k$
# likeliest. *top-p* keeps the likeliest until their sum reaches $p$. *min-p* keeps what is at least
# $p$ times as likely as the best.
#
# **Predict** from the table of Step 2: how many words do top-k 4, top-p 0.8 and min-p 0.2 keep?

# %%
from nanovllm.ops.sampler import filter_scores

everything = {"top_k": stage.vocab_size, "top_p": 1.0, "min_p": 0.0}
asked = [{"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.2}]
kept = []
for limits in asked:
    columns = {k: torch.tensor([[v]]) for k, v in (everything | limits).items()}
    kept.append(filter_scores(logits[None], **columns)[0] > -torch.inf)
    print(limits, "keeps", kept[-1].sum().item())
assert kept[0].sum() == 4
assert torch.equal(kept[2], probs >= 0.2 * probs.max())
# top-p: what it keeps is enough, and without its least likely token it would not be
assert probs[kept[1]].sum() >= 0.8 > probs[kept[1]].sum() - probs[kept[1]].min()

# %% jupyter={"source_hidden": true}
figure, panels = plt.subplots(1, 3, figsize=(8, 3), sharey=True)
for panel, limits, keep in zip(panels, asked, kept):
    for place, token in enumerate(best.indices.tolist()):
        dropped = {"color": "white", "edgecolor": "#888888", "hatch": "///"}
        style = {"color": plots.BLUE} if keep[token] else dropped
        panel.bar(place, best.values[place].item(), **style)
    panel.set_xticks(range(10), words, rotation=60)
    panel.set_title(" ".join(f"{k} = {v}" for k, v in limits.items()))
panels[0].set_ylabel("probability")
show(
    figure,
    "Bars of the ten likeliest first words, three times; filled are those kept, hatched those "
    f"dropped. Of all tokens, top-k 4, top-p 0.8, min-p 0.2 keep {[int(k.sum()) for k in kept]}.",
)

# %% [markdown]
# Four, seven and eight. *Far* and *Not* are equally likely, but top-k drops one of them; min-p cuts
# at the cliff.
#
# ### Noise that is a function
#
# Adding **Gumbel noise**, $-\ln(-\ln u)$ with $u$ uniform between 0 and 1, to each scaled logit and
# taking the largest draws exactly from the softmax. Where does $u$ come from? A random generator has
# a state: who draws first changes what the next gets, and in a batch that is your neighbour's
# business. So the engine computes $u$ from three numbers: the request's seed, the position and the
# token's id.

# %%
from nanovllm.ops.sampler import gumbel_noise


def noise(seed, position, ids):
    """[len(ids)]: the engine's noise for one request at one position."""
    return gumbel_noise(torch.tensor([[seed]]), torch.tensor([[position]]), ids)[0]


toy = torch.tensor([0.6, 0.3, 0.1]).log()  # logits of three tokens
for position in range(4):
    drawn = noise(7, position, torch.arange(3))
    total = toy + drawn
    row = " ".join(f"{a:5.2f}{b:+5.2f}={s:5.2f}" for a, b, s in zip(toy, drawn, total))
    print(f"position {position}: {row}  -> token {total.argmax()}")

# %% [markdown]
# **Predict**: over 20,000 positions, how often is each token the largest? And if only token 2's noise
# is computed, or all 4,096, does token 2 get another number?

# %%
many = torch.arange(20_000)[:, None]
drawn = gumbel_noise(torch.full_like(many, 7), many, torch.arange(3))
share = torch.bincount((toy + drawn).argmax(dim=1), minlength=3) / len(many)
print("drawn:", [f"{s:.3f}" for s in share.tolist()], "softmax: 0.6, 0.3, 0.1")
assert (share - toy.exp()).abs().max() < 0.02
assert noise(7, 5, torch.tensor([2]))[0] == noise(7, 5, torch.arange(4096))[2]

# %% [markdown]
# As often as the softmax says, and token 2's noise is the same either way. So a filter changes *which*
# tokens compete, never their noise.
#
# ## Step 8: the loop
#
# Everything is here. Call, pick, append, until the end-of-sequence token.

# %%
from nanovllm.model.loader import stop_ids_of

stop_ids, defaults = stop_ids_of(folder, stage.config, tokenizer)
all_ids = torch.arange(stage.vocab_size)
read = []  # tokens computed in each step


def generate(ids, limit, temperature=0.0, seed=0, logits_of=logits_by_hand):
    """At most `limit` new ids after `ids`; temperature 0 is greedy."""
    new = []
    while len(new) < limit and (not new or new[-1] not in stop_ids):
        text = [*ids, *new]
        read.append(len(text))
        logits = logits_of(text)
        if temperature:
            logits = logits / temperature + noise(seed, len(text), all_ids)
        new.append(int(logits.argmax()))
    return new


stories = {seed: generate(prompt, 40, defaults["temperature"], seed) for seed in (1, 2)}
for seed, ids in stories.items():
    print(f"seed {seed}: {tokenizer.decode(ids)}\n")
assert generate(prompt, 8, defaults["temperature"], seed=1) == stories[1][:8]

# %% [markdown]
# Two seeds, two stories; one seed, the same story again.
#
# **Predict**: a prompt of 24 tokens and an answer of 4. How many tokens does the model compute in
# all, and how many of them more than once?

# %% tags=["nbval-check-output"]
read.clear()
generate(list(range(100, 124)), 4)
print(" + ".join(map(str, read)), "=", sum(read))
P, N = 24, len(read)
assert sum(read) == N * P + N * (N - 1) // 2

# %% [markdown]
# 102, for 27 different ones. In general $NP + N(N-1)/2$ tokens for an answer of $N$ after a prompt of
# $P$: **quadratic in $N$**.

# %% [markdown]
# ## Assemble: the same in the engine
#
# You have written what these lines do. `linear` and `gated_linear` take the norm before a product and
# the sum or gate after it, because a GPU does them in one pass.

# %%
from nanovllm.model.decoder import Attention, Decoder, DecoderLayer
from nanovllm.ops.linear import gated_linear, linear

show_source(Attention.forward, DecoderLayer.forward, Decoder.forward, linear, gated_linear)

# %% [markdown]
# Three things are more than ours. `kv`: keys and values go into a **cache**, and attention reads them
# there (lessons 02 and 03); stage 01 throws it away after each step. `batch`: tokens of many requests
# stand in one row. `backend`: the same functions may be GPU kernels (lesson 06).
#
# The sampler does Step 7 for many requests at once, a row each. Greedy rows get no noise.

# %%
from nanovllm.ops.sampler import candidates

show_source(candidates, filter_scores)

# %% [markdown]
# ### Loading, and refusing
#
# Module names are those of the checkpoint's tensors, so loading is: find the place, compare the shape,
# copy. The hard part is what a loader does when something does *not* fit. A weight left out keeps
# whatever was in memory, and the text is subtly wrong.
#
# **Predict**: we delete one tensor of 58 and load. What should happen?

# %%
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file

from nanovllm.model.loader import load_weights, parameters_by_name

places = parameters_by_name(model)
tensors = load_file(folder / "model.safetensors")
print(f"{len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} numbers")
assert places.keys() - tensors.keys() <= {"lm_head.weight"}  # tied: the embedding is the head
del tensors["model.norm.weight"]
with tempfile.TemporaryDirectory() as broken:
    save_file(tensors, Path(broken) / "model.safetensors")
    try:
        load_weights(model, [Path(broken) / "model.safetensors"], use_tqdm=False)
    except ValueError as error:
        message = str(error)
print(message)
assert "missing: model.norm.weight" in message

# %% [markdown]
# It names the tensor. `ModelConfig` and `SamplingParams` have the same manners: what would change the
# result and is not supported is refused by name, not ignored.

# %%
from dataclasses import asdict

from nanovllm import SamplingParams

print({k: v for k, v in asdict(stage.config).items() if "size" in k or "num" in k})
try:
    SamplingParams(n=2)  # two answers to one prompt: vLLM can, this engine cannot
except ValueError as error:
    refusal = str(error)
print(refusal)
assert "n" in refusal

# %% [markdown]
# ### Ids become text
#
# A token may end inside a character, so text is not the sum of the tokens' texts. `Detokenizer` holds
# half a character back until the rest has come, and cuts the text at a **stop string**.

# %%
from nanovllm.engine.detokenizer import Detokenizer

detokenizer = Detokenizer(tokenizer, SamplingParams(stop="!"))
for token_id in tokenizer("Zürich 🦊! The end").input_ids:
    stopped = detokenizer.append(token_id)
    print(f"{tokenizer.decode([token_id])!r:>8} -> {detokenizer.text!r}")
    if stopped:
        break
assert detokenizer.text == "Zürich 🦊"

# %% [markdown]
# ## Check
#
# First what needs no reference: what comes later changes nothing before it, to the last bit.

# %%
changed = prompt[:-1] + [prompt[0]]
first, second = (model.embed_tokens(torch.tensor(ids)) for ids in (prompt, changed))
for layer in model.layers:
    first, second = (mlp_half(layer, attention_half(layer, x)) for x in (first, second))
assert torch.equal(first[:-1], second[:-1])
assert not torch.equal(first[-1], second[-1])
print(f"the last of {len(prompt)} tokens was changed: the vectors before it are bit for bit equal")

# %% [markdown]
# Then the logits, against Hugging Face's transformers in float32: the engine reads each beginning of
# the prompt by itself, transformers the whole prompt at once.

# %%
from transformers import AutoModelForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
theirs = reference(torch.tensor([prompt])).logits[0]
ours = torch.cat([stage.last_logits(prompt[: i + 1]) for i in range(len(prompt))])
error = (ours - theirs).abs().max().item()
print(f"{ours.shape[0]} x {ours.shape[1]:,} logits, largest difference {error:.0e}")
assert error < 1e-4

# %% [markdown]
# Last, 64 greedy tokens, up to the first near tie: two tokens less than $10^{-4}$ apart may change
# places by rounding alone.

# %%
settings = {"do_sample": False, "max_new_tokens": 64, "eos_token_id": None}
theirs = reference.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()
ours = answer.token_ids[0][:64]  # of stage 01, at the top of this page
certain = next((i for i, gap in enumerate(answer.gaps[0][:64]) if gap < 1e-4), 64)
assert ours[:certain] == theirs[:certain]
print(f"{certain} of 64 tokens compared, all equal:\n{tokenizer.decode(ours)}")

# %% [markdown]
# ## Measure: what does a step cost?
#
# Multiplying $n$ rows by a matrix of $w$ numbers takes $2nw$ operations: a product and a sum each.
# Attention adds, in each layer and query head, $n \times n$ scores and $n \times n$ weighted values,
# of $D$ products each. (Half are masked; plain torch computes them anyway.) The head is one row.
#
# $$F(n) = 2n\underbrace{L\,(2dD(H + K) + 3dI)}_{\text{weights }W} + 4n^2 LHD + 2Vd$$
#
# **Predict** with $W = 5.9$ million and $LHD = 1{,}280$: at which $n$ do the two first terms meet?
# The model's context ends at 1,024. So is one step linear or quadratic in $n$ here?

# %%
from torch.utils.flop_counter import FlopCounterMode


def step_flops(c, n):
    """Operations of one forward pass over n tokens that keeps the last one's logits."""
    heads = c.num_attention_heads + c.num_key_value_heads
    layer = 2 * c.hidden_size * c.head_dim * heads + 3 * c.hidden_size * c.intermediate_size
    attention = 4 * n * n * c.num_attention_heads * c.head_dim
    head = 2 * c.vocab_size * c.hidden_size
    return c.num_hidden_layers * (2 * n * layer + attention) + head


for n in (24, 256):
    with FlopCounterMode(display=False) as counted:
        stage.last_logits([1] * n)
    print(f"n = {n:>3}: formula {step_flops(c, n):,}, counted {counted.get_total_flops():,}")
    assert counted.get_total_flops() == step_flops(c, n)

# %% [markdown]
# They meet at $n = W / (2LHD) = 2{,}304$, beyond the context: **a step is nearly linear in $n$, and so
# an answer nearly quadratic in its length.**
#
# Operations are not yet seconds. We take $t(n) = t_0 + F(n) / r$ with two numbers from measured steps:
# $t_0$ is paid at any length (reading the weights, starting some 100 functions), $r$ is operations a
# second. The hollow points give the numbers; the filled ones test the shape, and so does the clock of
# the 256 tokens from the top of the page.

# %%
from course.models import has_gpu
from course.timing import measure

places = [(stage, (16, 32, 64, 128, 256, 512))]
measured = Recompute(measured_model().path)  # on a GPU, if there is one
if has_gpu():
    measured.prepare(request)
    places.append((measured, (64, 512, 1024, 2048, 4096, 8192)))

curves = []
for place, lengths in places:
    # the fastest of five: other programs can only slow a run down
    seconds = [measure(lambda: place.last_logits([1] * n)).lowest for n in lengths]
    flops = [step_flops(place.config, n) for n in lengths]
    rate = (flops[-1] - flops[0]) / (seconds[-1] - seconds[0])
    fixed = seconds[0] - flops[0] / rate
    curves.append((place, lengths, seconds, rate, fixed))
    print(f"{machine.describe(place.device.type)}, {place.folder.name}: ", end="")
    print(f"t0 = {1000 * fixed:.1f} ms, r = {rate / 1e9:,.0f} GFLOP/s")

# %% jupyter={"source_hidden": true}
figure, (left, right) = plots.figure("What recomputing costs", machine.describe("cpu"), columns=2)
for colour, marker, (place, lengths, seconds, rate, fixed) in zip(
    (plots.BLUE, plots.VERMILLION), "os", curves
):
    line = range(lengths[0], lengths[-1] + 1, 8)
    shape = [1000 * (fixed + step_flops(place.config, n) / rate) for n in line]
    left.plot(line, shape, color=colour, marker="", label=f"{place.folder.name}: t0 + F(n) / r")
    for n, value in zip(lengths, seconds):
        face = "white" if n in (lengths[0], lengths[-1]) else colour
        left.plot(n, 1000 * value, marker, color=colour, markerfacecolor=face)
left.set(xlabel="tokens in the text, n", ylabel="ms a step", title="One step")
left.set_ylim(bottom=0)
left.legend(fontsize=9)
if len(curves) > 1:
    left.set(xscale="log", yscale="log")

_, _, _, rate, fixed = curves[0]
steps = [fixed + step_flops(c, len(prompt) + i) / rate for i in range(256)]
predicted = torch.tensor(steps).cumsum(0).tolist()
right.plot(range(1, 257), predicted, color=plots.BLACK, marker="", label="sum of t(n)")
shown = range(15, 256, 16)
right.plot([i + 1 for i in shown], [clock[i] for i in shown], "o", label="measured, at the top")
right.plot([1, 256], [clock[0], 256 * clock[31] / 32], "--", color="#888888", marker="")
right.annotate("if each cost what\nthe first 32 did", (256, 8 * clock[31]), ha="right", fontsize=9)
right.set(xlabel="tokens of the answer, N", ylabel="seconds", title="A whole answer")
right.legend(fontsize=9)
show(
    figure,
    f"Left: milliseconds a step rise with the text's length, from {1000 * curves[0][2][0]:.0f} at "
    f"16 tokens to {1000 * curves[0][2][-1]:.0f} at 512, close to the predicted line. Right: the "
    f"clock of 256 tokens bends upwards to {clock[255]:.1f} s; predicted were {predicted[-1]:.1f}.",
)

# %%
print(f"256 tokens against 32, predicted: {predicted[255] / predicted[31]:.1f} times as long")
print(f"256 tokens against 32, measured:  {clock[255] / clock[31]:.1f} times as long")

# %% [markdown]
# In operations alone the ratio would be 31; $t_0$, the same for each step, brings it down. On a GPU
# $t_0$ rules far longer: until thousands of tokens a step costs what its launches cost, and the curve
# is flat.
#
# Now the workload that every stage of the course is given: many requests, one after the other.

# %%
from course.records import record

workload = ladder_workload(measured.vocab_size, measured.device.type)
print(measured_model(), workload, sep="\n")
result = measured.run(workload)
record(result)
print(result)

# %%
figure = plots.ladder(upto=1)
show(figure, figure.alt_text)

# %% [markdown]
# The first rung. Its memory is the smallest you will see: no key or value outlives a step. And where
# an answer is a *single* token (a yes or no, a label), nothing is recomputed at all: stage 01 is then
# the right program, and no cache can beat it.
#
# ## In real vLLM
#
# Release v0.11.0, in Python:
# [`Qwen3Attention` and `Qwen3DecoderLayer`](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/model_executor/models/qwen3.py#L55-L238),
# [`Sampler`](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/v1/sample/sampler.py#L69-L125) and
# [`random_sample`](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/v1/sample/ops/topk_topp_sampler.py#L232-L253).
#
# 1. Each model family has a file of its own there, hundreds in all. Here one decoder serves three
#    families whose differences are four flags in `ModelConfig`.
# 2. vLLM hands a layer *two* tensors, `hidden_states` and `residual`, and adds them inside the next
#    norm's kernel. Here the product adds the residual: one tensor passes through.
# 3. vLLM divides the probabilities by exponential noise and takes the largest, which is the same law
#    as Gumbel-max. Its noise comes from generators with a state, one for each request with a seed.
#    Here it is a function.
#
# ## Exercises
#
# In `exercises/01_naive_generate.ipynb`:
#
# 1. **Predict** (5 minutes): tokens and operations of an answer of another shape of model.
# 2. **Implement** (20 minutes, 12 lines): top-p for one row of logits.
# 3. **Break and fix** (20 minutes): a RoPE that pairs neighbours, $2i$ with $2i + 1$. The first words
#    are fine, then the story falls apart. Why only then?
#
# ## Recap
#
# Text becomes ids, ids become vectors, and layers mix them: attention looks back over the text, with
# positions as rotations. Logits become a token by taking the largest, after scaling, filtering and
# noise that is a function of seed, position and id. Calling the model on the whole text for each token
# is right but makes an answer's cost quadratic in its length.

# %% [markdown]
# **Check yourself.**
#
# <details><summary>1. Why is the score of a key after the query set to −∞, and not to 0?</summary>
#
# Softmax of 0 is $e^0 = 1$ before dividing: the future would get weight. $e^{-\infty} = 0$.
#
# </details>
# <details><summary>2. You prepend 50 tokens to a text. Which products of old queries and old keys change by RoPE?</summary>
#
# None: each pair stands as far apart as before. (Their *contents* change in layers after the first.)
#
# </details>
# <details><summary>3. A seeded request runs alone, then in a batch of 64. Why can it still draw the same noise?</summary>
#
# Its noise depends on its seed, its position and the token's id, none of which knows the batch.
#
# </details>
# <details><summary>4. P = 100, N = 50. How many tokens are computed? How many would do?</summary>
#
# $50 \cdot 100 + 50 \cdot 49 / 2 = 6{,}225$. There are only 149 different ones (the last is never read).
#
# </details>
# <details><summary>5. Twice the answer's length: twice the time of a step, or of the answer?</summary>
#
# The last step takes up to twice as long, the answer up to four times.
#
# </details>
#
# **The next question**: token 3 does not notice token 4. So what, of all that a step computes for old
# tokens, could be kept, and what would keeping it cost?
