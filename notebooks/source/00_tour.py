# %% [markdown]
# # 00 · A first answer
#
# | This lesson | |
# |---|---|
# | Minutes | 15 |
# | Difficulty | easy |
# | Hardware | any laptop; a GPU is used if there is one |
# | Needs | Python; you have met a language model before |
# | Ends in | `nanovllm/llm.py`, `nanovllm/config.py`, `nanovllm/outputs.py`, `nanovllm/validation.py` |

# %% [markdown]
# You will ask a model three questions, look at what comes back, and count the work behind it. The
# engine that answers is `nanovllm/`. In the nine lessons that follow you rebuild it, one file after
# the other.
#
# After this lesson you can
#
# 1. **run** a prompt through the engine and read every field of its answer,
# 2. **count** the tokens a request costs, on the way in and on the way out,
# 3. **predict** how much memory the attention cache takes for a token.

# %% [markdown]
# ## What an engine does
#
# A language model is a function: token ids go in, and one score for each word piece of its
# vocabulary comes out. Everything else is the engine's work. It turns text into token ids, decides
# which requests run now, keeps what the model computed for earlier tokens, picks the next token from
# the scores, and turns ids back into text.
#
# Take the prompt *The capital of France is*. It has five or six tokens. The model reads them all at
# once; this pass is called **prefill**. It then produces one token a pass, and each pass reads every
# weight of the model again; these passes are called **decode**. An answer of 20 tokens takes one
# prefill and 19 decode passes.
#
# | symbol | meaning | unit |
# |:--|:--|--:|
# | $P$ | tokens of the prompt | tokens |
# | $N$ | tokens of the answer | tokens |
# | $L$ | layers of the model | |
# | $H_{kv}$ | key and value heads of a layer | |
# | $D$ | size of a head | numbers |

# %%
from course.models import pick_model
from nanovllm import LLM, SamplingParams

llm = LLM(pick_model(), use_tqdm_on_load=False)

# %% [markdown]
# The model is loaded. `pick_model` takes the model that ships with the course; set the environment
# variable `MODEL` to a folder or a Hugging Face id to take another one.
#
# ## One answer
#
# `SamplingParams` says how to pick tokens and when to stop. Temperature 0 always takes the token of
# the highest score, so you will see the same answer each time.

# %%
params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
prompt = "The capital of France is"
(output,) = llm.generate([prompt], params, use_tqdm=False)
print(output.outputs[0].text)

# %% [markdown]
# **Predict** before you run the next cell: how many token ids does the answer have? The parameters
# above hold what you need. `ignore_eos` tells the engine to go on past the token that ends a text.

# %% tags=["nbval-check-output"]
answer_ids = output.outputs[0].token_ids
print(len(answer_ids), "tokens, because of", output.outputs[0].finish_reason)

# %%
assert len(answer_ids) == params.max_tokens

# %% [markdown]
# Twenty, and the reason to stop is the length. Without `ignore_eos` the answer may end earlier, with
# the reason `stop`.
#
# ## Tokens are pieces of words
#
# The tokenizer cuts text into pieces. Frequent words are one piece, rare ones several. What the
# model reads are the numbers.

# %%
tokenizer = llm.get_tokenizer()
for token_id in output.prompt_token_ids:
    print(f"{token_id:>6}  {tokenizer.decode([token_id])!r}")

# %%
prompt_tokens = len(output.prompt_token_ids)
assert prompt_tokens == len(tokenizer(prompt).input_ids)

# %% [markdown]
# ## Several requests at once
#
# The engine answers a list of prompts in one batch. The order of the answers is the order of the
# prompts, however early or late each one finished.

# %%
prompts = ["The sea is", "A fox found a key and", "Two plus two is"]
outputs = llm.generate(prompts, params, use_tqdm=False)
for one in outputs:
    print(f"{one.prompt!r} -> {one.outputs[0].text!r}")

# %%
assert [one.prompt for one in outputs] == prompts
assert all(len(one.outputs[0].token_ids) == 20 for one in outputs)

# %% [markdown]
# ## Passes through the model
#
# The next figure steps through the four passes of a prompt of 4 tokens and an answer of 4. A filled
# cell is a token that the model has read; the outlined one is the token that this pass produces.
# Every pass after the first reads a single new token, since what was computed for the others is kept.

# %% jupyter={"source_hidden": true}
from matplotlib import pyplot as plt

from course.display import show, steps


def draw_pass(read, size=8):
    """A row of cells: `read` tokens read by now, and the one that this pass produces."""
    figure, axes = plt.subplots(figsize=(6, 1.1))
    for position in range(size):
        filled = "#0072B2" if position < read else "white"
        edge = "#D55E00" if position == read else "#999999"
        width = 3 if position == read else 1
        box = plt.Rectangle((position, 0), 0.9, 0.9, facecolor=filled, edgecolor=edge, lw=width)
        axes.add_patch(box)
    axes.set(xlim=(-0.1, size), ylim=(-0.1, 1), xticks=[i + 0.45 for i in range(size)])
    axes.set(xticklabels=range(size), yticks=[], xlabel="position (tokens)")
    axes.spines[:].set_visible(False)
    return figure


captions = ["prefill reads 4 tokens", *[f"decode reads token {n}" for n in (4, 5, 6)]]
frames = [draw_pass(read) for read in (4, 5, 6, 7)]
steps(frames, captions, "Tokens in a row, filled one by one as the model reads them")

# %% [markdown]
# ## What each token leaves behind
#
# For every token the engine keeps a key and a value in each layer and head, so that later passes can
# look at them. With 4 bytes a number (float32) that is
#
# $$\text{bytes per token} = 2 \cdot L \cdot H_{kv} \cdot D \cdot 4$$
#
# The factor 2 stands for key and value. **Predict**: does the sum depend on the length of the prompt?

# %%
cache = llm.llm_engine.core.runner.kv_cache
print("shape of the cache:", tuple(cache.shape), cache.dtype)

# %%
total_bytes = cache.numel() * cache.element_size()
blocks = llm.llm_engine.block_manager
bytes_per_token = total_bytes / (blocks.num_blocks * blocks.block_size)
print(f"{bytes_per_token:,.0f} bytes per token")

# %% [markdown]
# It does not: each token costs the same, so the cache of a request grows in a straight line with its
# length. The line below is drawn from the number you just printed.

# %%
lengths = [0, 256, 512, 768, 1024]
figure, axes = plt.subplots(figsize=(6, 3))
axes.plot(lengths, [n * bytes_per_token / 2**20 for n in lengths], marker="o", color="#0072B2")
axes.set(xlabel="tokens of a request", ylabel="cache (MiB)", title="Cache of one request")
show(figure, alt="Cache in MiB against tokens of a request: a straight line through the origin.")

# %%
assert total_bytes % blocks.num_blocks == 0
llm.close()

# %% [markdown]
# ## In short
#
# - A request costs one prefill pass, then one decode pass for each further token.
# - The answer of 20 tokens stopped because of its length, as its `finish_reason` says.
# - The cache costs a fixed number of bytes for each token.
#
# <details>
# <summary>Check yourself: how many passes does an answer of 1 token take?</summary>
#
# One. The prefill pass already gives the scores for the first token of the answer, so an answer of
# $N$ tokens takes $1 + (N - 1)$ passes.
#
# </details>
#
# The next question: what would it cost to keep nothing, and to read the whole text again for every
# token?
