# %% [markdown]
# # 00 · A tour: the speed of a language model from two numbers
#
# | This lesson | |
# |---|---|
# | Minutes | 50 |
# | Difficulty | easy |
# | Hardware | any laptop; a GPU is used if there is one |
# | Needs | Python, a little PyTorch |
# | Ends in | `nanovllm/llm.py`, `nanovllm/config.py`, `nanovllm/outputs.py`, `nanovllm/validation.py` |

# %% [markdown]
# A language model writes an answer one word after the other. Why does it not write faster? On this page
# you meet the engine that this course rebuilds, and find out. Afterwards you can
#
# 1. **run** requests through the engine and read every field of an answer,
# 2. **count** the bytes and the arithmetic that one token costs,
# 3. **predict** the speed of any model on any machine from two numbers, and say why the truth is slower.
#
# **How to work here.** Where it says *Predict*, write your number down before you run the cell: being
# wrong on paper is what makes the explanation stick. The explanation is folded below the cell. Every
# lesson starts cold, so any order works. The cells are the same on a CPU and on a GPU. What you measure
# goes into the folder `.course/`, which git ignores.

# %%
import random
import statistics

import torch
from transformers.utils import logging

from course import machine, plots
from course.display import show

logging.disable_progress_bar()
torch.set_num_threads(1)  # timings of one thread vary least
plots.use_style()
HERE = machine.describe()
print(HERE)

# %% [markdown]
# ## A first answer
#
# The course ships with a model of 7 million parameters that knows one thing: short stories. `LLM` loads
# a model, `chat` asks it. Temperature 0 means: always take the likeliest next token.

# %%
from course.models import own_model
from nanovllm import LLM, SamplingParams

llm = LLM(own_model(), dtype="float32", num_gpu_blocks_override=512, use_tqdm_on_load=False)
greedy = SamplingParams(temperature=0, max_tokens=120)
question = [{"role": "user", "content": "Tell me a story about a fox who finds a key."}]
(answer,) = llm.chat(question, greedy, use_tqdm=False)
print(answer.outputs[0].text)

# %% [markdown]
# The model sees no words. A **token** is a number that stands for a word or a piece of one; full stops
# are tokens too. One run of the model over the text so far gives one new token.
#
# **Predict** before you run: the answer above has about 80 words. How many times did the model run?
# Write it down.

# %%
ids = answer.outputs[0].token_ids
pieces = [llm.get_tokenizer().decode([i]) for i in ids]
print(" | ".join(pieces[:16]), "| ...")
print(f"{len(answer.outputs[0].text.split())} words, {len(ids)} tokens, last: {pieces[-1]!r}")
assert len(ids) >= len(answer.outputs[0].text.split())

# %% [markdown]
# <details><summary>Why more runs than words?</summary>
#
# Commas and full stops are tokens of their own, rare words are several, and the last token,
# `<|im_end|>`, says that the answer is over. Each token is one run: nobody can know the next word before
# this one is chosen. That is why an answer takes time, however fast the machine is.
#
# </details>
#
# ## Several requests at once, as they are written
#
# `stream` takes a list of prompts and yields `(index of the prompt, new text)`. **Predict**: does the
# engine finish prompt 0 before it begins prompt 1? In which order do the indices below come?

# %%
prompts = ["Once upon a time", "The dragon", "One morning, a cat"]
sampled = SamplingParams(temperature=0.7, seed=1, max_tokens=8)
stream = llm.stream(prompts, sampled)
arrived = list(stream)
print("order:", *[index for index, _ in arrived])
for index, prompt in enumerate(prompts):
    print(f"{prompt} ->", "".join(text for i, text in arrived if i == index))
assert [index for index, _ in arrived[:6]] == [0, 1, 2, 0, 1, 2]
assert "".join(t for i, t in arrived if i == 1) == stream.outputs[1].outputs[0].text

# %% [markdown]
# <details><summary>0 1 2, 0 1 2, ...</summary>
#
# All three are in one **batch**: each run of the model gives every request one token. This is the main
# trick of a fast engine, and by the end of this page you can say what it is worth.
#
# </details>
#
# ## What an answer holds
#
# `chat` and `generate` return one `RequestOutput` a prompt, `stream` has them when it ends. Its `metrics`
# are points in time, in seconds. Two differences of them are what users feel:
#
# - **TTFT**, time to first token: from arrival until there is something to read;
# - **TPOT**, time per output token: the pace after that.

# %%
print(f"request {answer.request_id}, {len(answer.prompt_token_ids)} prompt tokens")
print("prompt        ", repr(answer.prompt[:38]), "...")
print("finish_reason ", answer.outputs[0].finish_reason, "(or 'length', or 'abort')")
times = answer.metrics
for name in ("first_scheduled_time", "first_token_time", "finished_time"):
    print(f"{name:<22}{1000 * (getattr(times, name) - times.arrival_time):8.1f} ms after arrival")
print(f"TTFT {1000 * times.ttft:.1f} ms, TPOT {1000 * answer.tpot:.2f} ms")
pace = (times.finished_time - times.first_token_time) / (len(ids) - 1)
assert answer.finished and abs(answer.tpot - pace) < 1e-9

# %% [markdown]
# The division is by one token less: the first one came with the TTFT. Times differ from run to run, so
# this course prints them and never asserts them.
#
# ## The door: what the engine takes, and how it says no
#
# The arguments of `LLM` are the fields of a dataclass, `EngineArgs` in `config.py`. Beside its default
# each field says what it accepts. Here are some of the real lines, and the helper `only` of
# `validation.py`.

# %%
import inspect

from nanovllm import validation
from nanovllm.config import EngineArgs

wanted = ("max_num_seqs", "block_size", "gpu_memory_utilization", "quantization")
for line in inspect.getsource(EngineArgs).splitlines():
    if line.strip().startswith(wanted):
        print(line)
print()
print(inspect.getsource(validation.only))

# %% [markdown]
# Names and defaults are vLLM's. A parameter that vLLM has and this engine lacks is `only(default)`: a
# script that leaves it alone runs, and one that needs it hears so. Nothing is ignored in silence.

# %%
bad = [
    (EngineArgs, {"model": "m", "max_num_seqs": 0}, ValueError),
    (EngineArgs, {"model": "m", "block_size": "16"}, TypeError),
    (EngineArgs, {"model": "m", "quantization": "fp8"}, ValueError),
    (SamplingParams, {"temperature": -1.0}, ValueError),
]
for kind, arguments, expected in bad:
    try:
        kind(**arguments)
    except (TypeError, ValueError) as error:
        print(f"{type(error).__name__}: {error}")
        assert type(error) is expected and list(arguments)[-1] in str(error)
    else:
        raise AssertionError(f"{arguments} was let in")

# %% [markdown]
# Each message names the argument, the limit and the value. Requests pass the same checks before any of
# a list is queued, so one bad prompt never leaves half of a batch behind.
#
# ## The map
#
# Behind the door a request goes through a dozen files. The number after a file is the lesson that
# rebuilds it.
#
# ![The way of one request: llm.py checks it and makes token ids, llm_engine.py queues them; a loop of
# scheduler, block manager, model runner, decoder and sampler runs step after step; detokenizer and
# outputs.py make the answer. Below: the prefill step reads all tokens of a prompt and gives one new
# token, each decode step reads only the newest.](../figures/request_path.svg)
#
# The first step of a request, **prefill**, reads the whole prompt. Each later one, a **decode** step,
# reads only the newest token: what the model computed for the earlier ones, their *keys and values*
# (KV), is kept in a cache. Remember these two words; they have different speed limits.
#
# ![Ten lessons and the files of nanovllm they end in; 00 tour: llm, config, outputs, validation; 01 naive
# generate: sampling params, model config, decoder, rope, loader, linear, sampler, detokenizer; 02 KV
# cache begins attention; 03 paged blocks: attention; 04 prefix hashing: block manager; 05 scheduler:
# sequence, scheduler; 06 Triton kernels: kernels, backend; 07 CUDA graphs: persistent batch, model
# runner, memory, engine; 08 tensor parallelism: parallel, llm engine; 09 measures all of
# it.](../figures/course_map.svg)
#
# **Predict**: which lesson has the most lines to read?

# %%
from pathlib import Path

import nanovllm
from course.lessons import FILES_OF_LESSON

folder = Path(nanovllm.__file__).parent
lines = {
    lesson: {name: len((folder / name).read_text().splitlines()) for name in files}
    for lesson, files in FILES_OF_LESSON.items()
}
totals = {lesson: sum(files.values()) for lesson, files in lines.items()}
fig, ax = plots.figure("The engine, a bar a lesson, a piece a file", f"{sum(totals.values()):,} lines")
for row, files in enumerate(lines.values()):
    left = 0
    for i, (name, count) in enumerate(files.items()):
        ax.barh(row, count, left=left, color=plots.COLOURS[i % 7], hatch=plots.HATCHES[i % 7],
                edgecolor="white")
        left += count
    ax.annotate(f"{left:,}" if left else "no file of its own", (left, row), (5, 0),
                textcoords="offset points", va="center")
ax.set_yticks(range(len(lines)), list(lines))
ax.invert_yaxis()
ax.set(xlabel="lines, with comments and blanks")
show(fig, "Lines of code a lesson: " + ", ".join(f"{k} {v}" for k, v in totals.items()))
assert max(totals, key=totals.get) == "06_triton_kernels"

# %% [markdown]
# Lesson 06, the GPU kernels; all the rest is read in an evening or two.
#
# ## Two numbers of this machine
#
# A computer does two things for a model: it **reads** numbers from memory, and it **multiplies** them.
#
# | symbol | meaning | unit |
# |:--|:--|--:|
# | $\beta$ | bandwidth: how fast memory is read | bytes/s |
# | $F$ | rate of a large matrix product | FLOP/s |
# | $P$ | parameters of the model that are multiplied | numbers |
# | $b$ | bytes a number: 4 in float32 (CPU), 2 in bfloat16 (GPU) | bytes |
# | $k$ | keys and values of one token | bytes |
# | $R$, $C$ | requests in a step, tokens each has so far | |
# | $T$ | tokens of a prompt | tokens |
#
# One FLOP is one multiplication or one addition of floating-point numbers. First, reading: sum up
# buffers of different size, again and again. A small one stays in the processor's caches; a large one
# must come from memory each time. **Predict** the shape of the curve.

# %%
from course.timing import machine_peaks, measure

llm.close()
device = "cuda" if torch.cuda.is_available() else "cpu"
peaks = machine_peaks(device)
sizes = [2**n for n in range(18, 32 if device == "cuda" else 30)]
memory = torch.zeros(sizes[-1] // 4, device=device)
rates = [size / measure(memory[: size // 4].sum, warmup=2).median for size in sizes]
del memory
fig, ax = plots.figure("Read bandwidth against what is read", HERE)
ax.plot([size / 2**20 for size in sizes], [rate / 1e9 for rate in rates])
ax.axhline(peaks.bandwidth / 1e9, color=plots.VERMILLION, linestyle="--", marker="")
ax.set(xscale="log", xlabel="buffer (MiB)", ylabel="GB/s", ylim=0)
ax.annotate("memory", (0.3, peaks.bandwidth / 1e9), (0, 5), textcoords="offset points")
show(fig, f"Read bandwidth against buffer size, {max(rates) / 1e9:.0f} GB/s at best; "
     f"memory alone, a dashed line, gives {peaks.bandwidth / 1e9:.1f}")

# %% [markdown]
# <details><summary>Steps down, and a floor</summary>
#
# On a CPU each step is a cache that no longer holds the buffer; the floor on the right is memory. On one
# thread of a server it fell from 53 GB/s at 1 MiB to 23 at 16 and 12 at 512. On a GPU small buffers look
# slow instead: starting a read takes longer than the read.
#
# </details>
#
# The dashed line is our first number, $\beta$. The second is the rate of a large matrix product,
# measured in the same call.

# %%
total = torch.cuda.mem_get_info()[1] if device == "cuda" else machine.total_memory_bytes()
print(HERE)
print(f"beta   = {peaks.bandwidth / 1e9:,.1f} GB/s read")
print(f"F      = {peaks.flops / 1e9:,.0f} GFLOP/s")
print(f"memory = {total / 2**30:,.0f} GiB")
print(f"While it reads one byte, it could do {peaks.flops / peaks.bandwidth:.0f} FLOPs")

# %% [markdown]
# The last line decides everything below: **reading is the expensive part**, unless each byte that was
# read is used many times.
#
# ## Count on a toy
#
# A layer of a model is a matrix; a token is a vector. Multiply a matrix of 4 × 4 with one vector, number
# by number, and count. **Predict**: how many FLOPs, and how many bytes of matrix in float32?

# %% tags=["nbval-check-output"]
W = torch.arange(16.0).reshape(4, 4)
x = torch.tensor([1.0, 0.0, 2.0, 1.0])
y, flops = [0.0] * 4, 0
for row in range(4):
    for column in range(4):
        y[row] += float(W[row, column] * x[column])
        flops += 2  # one multiplication, one addition
print(y, f"{flops} FLOPs, {W.nbytes} bytes, {flops / W.nbytes} FLOP a byte")
assert y == (W @ x).tolist() and flops == 2 * W.numel()

# %% [markdown]
# Each number of the matrix is used for 2 FLOPs, and then no more: 0.5 FLOP a byte. Now let *n* requests
# share the matrix. It is read once, and used *n* times.
#
# Take a toy machine that reads 16 bytes/s and does 32 FLOP/s. Reading and computing overlap, so a step
# takes the longer of the two. **Predict** the seconds for 1, 2, 4, 8 and 16 requests.

# %% tags=["nbval-check-output"]
def floor_seconds(num_bytes, flops, bandwidth, rate):
    """No step can be faster than this."""
    return max(num_bytes / bandwidth, flops / rate)


for n in (1, 2, 4, 8, 16):
    seconds = floor_seconds(64, n * 32, bandwidth=16, rate=32)
    print(f"{n:>2} requests: {seconds:>4.0f} s a step, {n / seconds:.2f} tokens/s in all")
assert floor_seconds(64, 4 * 32, 16, 32) == floor_seconds(64, 32, 16, 32)

# %% [markdown]
# <details><summary>Free up to 4, then no longer</summary>
#
# Reading takes 64 / 16 = 4 s whoever shares it; computing takes 32n / 32 = n seconds. Up to 4 requests
# the step is **bound by memory**, and another request costs nothing. Beyond, it is **bound by
# compute**: the total stays at one token a second. The bend lies where n × 0.5 FLOP a byte meets the
# machine's 2 FLOP a byte.
#
# </details>
#
# ## Count the real model
#
# The shipped model is a stack of such matrices: $d$ = 256 numbers a token, 5 layers. Attention has 4
# query heads and 2 key and value heads of 64 numbers each; the MLP has 1,280 inner numbers; a last
# matrix, the head, scores 4,096 possible tokens.
#
# | matrix | inputs × outputs | parameters |
# |:--|:--|--:|
# | query, output | 256 × 256, twice | 131,072 |
# | key, value | 256 × 128, twice | 65,536 |
# | gate, up, down | 256 × 1,280, three times | 983,040 |
# | **one layer** | | **1,179,648** |
# | head | 256 × 4,096 | 1,048,576 |
#
# **Predict** $P$, and $k$: each token keeps a key and a value, in every layer, for 2 heads of 64 numbers
# of 4 bytes.

# %%
from nanovllm.model.model_config import ModelConfig


def count(config):
    """Parameters of one layer's matrices, and of the head."""
    d, dim = config.hidden_size, config.head_dim
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    return heads * dim * d + 3 * d * config.intermediate_size, d * config.vocab_size


def kv_numbers(config):
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


shipped = ModelConfig.from_folder(Path(own_model()))
layer, head = count(shipped)
P = shipped.num_hidden_layers * layer + head
print(f"P = {shipped.num_hidden_layers} x {layer:,} + {head:,} = {P:,}; in float32 {4 * P:,} bytes")
print(f"k = {4 * kv_numbers(shipped):,} bytes a token")

# %% [markdown]
# ## Check the counts against a reference
#
# transformers runs the same model, and PyTorch can count the FLOPs of what it runs. For a prompt of $T$
# tokens we expect $2 \cdot 5 \cdot 1{,}179{,}648 \cdot T$ in the layers, and the head once, since only
# the last token's successor is wanted. Attention itself multiplies every token's query with every
# token's key, and the result with the values: $4 \cdot T^2 \cdot 256$ FLOPs a layer (half of it is
# masked, and a good kernel skips that half).

# %%
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

reference = AutoModelForCausalLM.from_pretrained(
    own_model(), dtype=torch.float32, attn_implementation="eager"
)
T = 100
with torch.no_grad(), FlopCounterMode(display=False) as counter:
    reference(torch.arange(T)[None], logits_to_keep=1)
counted = {str(op).removeprefix("aten."): n for op, n in counter.get_flop_counts()["Global"].items()}
expected = {
    "mm": 2 * shipped.num_hidden_layers * layer * T + 2 * head,
    "bmm": shipped.num_hidden_layers * 4 * T * T * shipped.num_attention_heads * shipped.head_dim,
}
norms = reference.num_parameters() - P
print("counted ", counted, "\nexpected", expected, f"\nparameters not in P: {norms:,} (norms)")
assert counted == expected and norms < 0.001 * P

# %% [markdown]
# Equal to the last FLOP. And does our engine say what transformers says? At each position of the first
# answer the token that the engine took must have the reference's highest logit. (A *logit* is the
# model's score of one possible next token; 0.001 allows for rounding.)

# %%
text = torch.tensor([answer.prompt_token_ids + ids])
with torch.no_grad():
    logits = reference(text).logits[0, len(answer.prompt_token_ids) - 1 : -1]
behind = logits.max(dim=1).values - logits[range(len(ids)), ids]
print(f"{int((behind == 0).sum())} of {len(ids)} tokens are the reference's first choice")
assert behind.max() < 1e-3

# %% [markdown]
# ## Predict decode
#
# A decode step reads every parameter once, and the keys and values of every request's $C$ tokens. With
# $R$ requests:
#
# $$\text{bytes} = P\,b + R\,C\,k \qquad \text{FLOPs} \approx 2\,P\,R$$
#
# $$\text{seconds} \ge \max\left(\frac{\text{bytes}}{\beta},\ \frac{\text{FLOPs}}{F}\right)$$
#
# (Attention's own FLOPs are counted too below; at short contexts they are few.) The model that is
# measured is the shipped one on a CPU, and on a GPU a larger one with random weights: speed depends on
# shapes, not on what the weights know. The next cell prints its $P$, $b$ and $k$. **Predict** tokens a
# second for one request, $C$ = 20, from them and your $\beta$, before you run the one after.

# %%
from course.models import measured_model


def work(config, requests, new, context):
    """Bytes and FLOPs of one step: so many requests, new tokens and tokens in all of each."""
    layer, head = count(config)
    layers, b = config.num_hidden_layers, config.dtype.itemsize
    pairs = new * (context - new) + new * (new + 1) / 2  # a token sees itself and those before
    attention = 4 * layers * config.num_attention_heads * config.head_dim * pairs
    num_bytes = (layers * layer + head) * b + requests * context * kv_numbers(config) * b
    return num_bytes, requests * (2 * layers * layer * new + 2 * head + attention)


choice = measured_model()
options = {"num_gpu_blocks_override": 512, "max_num_seqs": 64, "max_num_batched_tokens": 1024}
llm = LLM(choice.path, use_tqdm_on_load=False, **options)
config = llm.llm_engine.model_config
P = config.num_hidden_layers * count(config)[0] + count(config)[1]
print(choice)
print(f"P = {P:,}, b = {config.dtype.itemsize}, k = {kv_numbers(config) * config.dtype.itemsize:,}")
assert work(config, 1, 1, 0)[0] == P * config.dtype.itemsize

# %%
def decode_seconds(llm, requests, tokens=24, runs=3):
    """Seconds of a decode step with so many requests at once: the median run's TPOT."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    tpots = []
    for _ in range(runs + 1):  # the first is a warm-up
        prompts = [random.choices(range(5, 500), k=8) for _ in range(requests)]
        tpots.append(llm.generate(prompts, params, use_tqdm=False)[-1].tpot)
    return statistics.median(tpots[1:])


BATCHES, CONTEXT = (1, 4, 16, 64), 20  # contexts grow from 8 to 32 tokens
floors = [floor_seconds(*work(config, n, 1, CONTEXT), peaks.bandwidth, peaks.flops) for n in BATCHES]
steps = [decode_seconds(llm, n) for n in BATCHES]
print(f"predicted {1 / floors[0]:,.0f} tokens/s at most, measured {1 / steps[0]:,.0f}: "
      f"{floors[0] / steps[0]:.0%} of it")

# %% [markdown]
# ## Where is the rest?
#
# The prediction is a bound, and we do not reach it. Suspect: a step costs something whatever the
# model's size. On a CPU that is Python, and the start of each of some 150 small operations; on a GPU the
# start of some hundred kernels. To see it alone, take a **hollow** model: as many layers, hardly any
# weights, in the same engine. **Predict** its time for a step in milliseconds, if the suspicion is right.

# %%
import tempfile

from course.random_model import hollow_model

with tempfile.TemporaryDirectory() as scratch:
    hollow = LLM(hollow_model(Path(scratch), config.num_hidden_layers), dtype=str(config.dtype),
                 use_tqdm_on_load=False, **options)
fixed = [decode_seconds(hollow, n) for n in BATCHES]
hollow.close()
print("ms a step  bound  hollow  sum    measured   tokens/s in all")
for n, bound, cost, step in zip(BATCHES, floors, fixed, steps, strict=True):
    row = "".join(f"{1000 * t:7.2f}" for t in (bound, cost, bound + cost, step))
    print(f"{n:>4} at once{row}   {n / step:12,.0f}")

# %%
fig, ax = plots.figure("One decode step against requests in it", f"{Path(choice.path).name}, {HERE}")
for values, label in (
    (floors, "bound: bytes / bandwidth, FLOPs / rate"),
    ([f + c for f, c in zip(floors, fixed, strict=True)], "bound + hollow model's step"),
    (steps, "measured"),
):
    ax.plot(BATCHES, [1000 * value for value in values], label=label)
ax.set(xscale="log", yscale="log", xlabel="requests in the step", ylabel="ms a step")
ax.set_xticks(BATCHES, BATCHES)
ax.legend()
show(fig, "Milliseconds a decode step for 1, 4, 16 and 64 requests: the bound "
     + ", ".join(f"{1000 * v:.2f}" for v in floors) + "; measured "
     + ", ".join(f"{1000 * v:.2f}" for v in steps))

# %% [markdown]
# <details><summary>How to read it</summary>
#
# **At 1 request** bound and fixed cost are of one size. On one thread of a server CPU: 2.4 ms to read
# the weights, 1.7 ms hollow, and 3.5 measured. Less than their sum, since the 27.8 MB of weights partly
# stayed in that processor's cache: look at 27 MiB in your curve above. On a small model, an engine's
# overhead *is* the speed; lesson 07 takes most of it away on a GPU.
#
# **At 64 requests** the fixed cost is shared by all, and arithmetic takes over. What is missing now is
# work that the bound leaves out, or counts at full speed: norms, gathering keys and values, softmax,
# choosing the token, and products of 64 rows, which run slower than those of 2,048.
#
# **Between**, a step grows far less than the number of requests: that is what a batch is worth.
#
# </details>
#
# Batching does *not* help where compute is the limit already, and it never makes a single answer faster:
# each step takes a little longer.
#
# ## Predict prefill
#
# A prompt of $T$ tokens is a batch by itself: every parameter that is read is used $T$ times. So
# prefill has the other limit: $2 \cdot P \cdot T / F$ seconds, roughly. (The head is applied to one
# token only, and attention adds its $T^2$; `work` counts both.) **Predict** the milliseconds for 256
# tokens with your $F$.

# %%
def prefill_seconds(llm, tokens, runs=3):
    """Seconds until a prompt's first token: the median TTFT of fresh prompts."""
    params = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    prompts = [random.choices(range(5, 500), k=tokens) for _ in range(runs + 1)]
    outputs = [llm.generate([prompt], params, use_tqdm=False)[0] for prompt in prompts]
    return statistics.median(output.metrics.ttft for output in outputs[1:])


PROMPTS = (16, 64, 256, 1000)
works = [work(config, 1, tokens, tokens) for tokens in PROMPTS]
prefills = [prefill_seconds(llm, tokens) for tokens in PROMPTS]
llm.close()
for tokens, needed, seconds in zip(PROMPTS, works, prefills, strict=True):
    bound = floor_seconds(*needed, peaks.bandwidth, peaks.flops)
    print(f"{tokens:>5} tokens: at least {1000 * bound:6.1f} ms, measured {1000 * seconds:6.1f} "
          f"({bound / seconds:.0%}), {tokens / seconds:8,.0f} tokens/s")

# %% [markdown]
# Compare tokens a second with decode's: the same model reads a prompt many times faster than it writes.
# It is why your first word comes quickly even after a long question.
#
# ## The roofline
#
# One picture holds all of it. To the right: how many FLOPs a step does for each byte it reads. Upwards:
# FLOP/s. The roof is $\min(F, \beta \cdot \text{FLOP per byte})$: a slope where memory is the limit, a
# flat part where arithmetic is. Every point is a step that you measured.

# %%
fig, ax = plots.figure("The roofline of this machine", f"{Path(choice.path).name}, {HERE}", height=4.6)
ridge = peaks.flops / peaks.bandwidth
reach = [0.2, ridge, max(ridge, 500) * 2]
ax.plot(reach, [min(peaks.flops, peaks.bandwidth * x) / 1e9 for x in reach], color=plots.BLACK,
        marker="", label="the roof")
decodes = [work(config, n, 1, CONTEXT) for n in BATCHES]
for name, needs, seconds, labels, style in (
    ("decode, requests", decodes, steps, BATCHES, {"marker": "o", "color": plots.BLUE}),
    ("prefill, tokens", works, prefills, PROMPTS, {"marker": "s", "color": plots.ORANGE}),
):
    xs = [flops / num_bytes for num_bytes, flops in needs]
    ys = [flops / t / 1e9 for (_, flops), t in zip(needs, seconds, strict=True)]
    ax.plot(xs, ys, linestyle=":", label=name, **style)
    for label, at in zip(labels, zip(xs, ys, strict=True), strict=True):
        ax.annotate(label, at, (6, -11), textcoords="offset points")
ax.set(xscale="log", yscale="log", xlabel="FLOP for each byte read", ylabel="GFLOP/s")
ax.legend(loc="lower right")
show(fig, f"Roofline: a slope up to {ridge:.0f} FLOP a byte, then flat at {peaks.flops / 1e9:,.0f} "
     "GFLOP/s. Decode steps lie to the left and climb with the batch, prefill lies to the right.")

# %% [markdown]
# Read it from left to right: decoding alone wastes the arithmetic units; batching moves a decode step
# to the right, up along the slope; prefill stands under the flat roof from the start. Nearly everything
# in this course moves points to the right (a batch, shared prefixes), or up to the roof (kernels,
# graphs, less Python). `course bench` draws its shares from the same counts.
#
# ## Other models, other machines
#
# Now predict what you cannot run. The shapes are published, the H200's two numbers were recorded by
# `course bench`. **Predict** from $P\,b$ alone: can an 8-billion-parameter model in bfloat16 write 20
# tokens a second for one request here?

# %%
import json
from types import SimpleNamespace

from course.records import SHIPPED

NAMES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads", "num_key_value_heads", "head_dim")
SHAPES = {
    "Qwen3-0.6B": (151_936, 1024, 3072, 28, 16, 8, 128),
    "Qwen3-8B": (151_936, 4096, 12_288, 36, 32, 8, 128),
    "Llama-3.1-70B": (128_256, 8192, 28_672, 80, 64, 8, 128),
}
bench = json.loads((SHIPPED / "h200_workloads.json").read_text())
h200 = bench["peaks"]["read_bytes_per_second"], bench["peaks"]["flops_per_second"]
print("at most, tokens/s          H200: 1    H200: 64     here: 1   weights  fits here")
for name, shape in SHAPES.items():
    model = SimpleNamespace(**dict(zip(NAMES, shape, strict=True)), dtype=torch.bfloat16)
    speeds = [
        n / floor_seconds(*work(model, n, 1, 1000), *limits)
        for n, limits in ((1, h200), (64, h200), (1, (peaks.bandwidth, peaks.flops)))
    ]
    weights = work(model, 1, 1, 0)[0]
    cells = "".join(f"{speed:12,.1f}" for speed in speeds)
    print(f"{name:<22}{cells}{weights / 1e9:7.1f} GB  {'yes' if weights < total else 'no'}")
measured = bench["workloads"]["W2"]["median"]["output_tokens_per_second"]
print(f"\nrecorded on the H200: Qwen3-0.6B's shape, one request, {measured:,.0f} tokens/s")

# %% [markdown]
# <details><summary>The bound and the record</summary>
#
# 8.2 billion parameters of 2 bytes are 15 GB that pass through the processor for each token (the table's
# weights leave out the embedding, which is only looked up). Divide your $\beta$ by it. The H200's record
# for the small model is about a third of its bound. You know why: 28 layers of small kernels have a
# fixed cost, 0.26 ms of reading is soon outweighed. With 256 requests the recorded run reached 63%.
#
# </details>
#
# ## In real vLLM
#
# At release v0.11.0 the same names are in
# [`vllm/outputs.py`](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/outputs.py#L79)
# (`RequestOutput`) and
# [`vllm/engine/arg_utils.py`](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/engine/arg_utils.py#L284)
# (`EngineArgs`). Three differences:
#
# 1. `EngineArgs` has 139 fields there; ours has 33, of which 13 only say no.
# 2. `RequestOutput` carries log-probabilities, LoRA and multi-modal data, and drops unknown arguments
#    with a warning; ours raises.
# 3. vLLM's engine runs in a process of its own by default, so that tokenizing and Python overhead
#    overlap with the GPU's work; ours is one process.
#
# ## Exercises
#
# In `exercises/00_tour.ipynb`:
#
# 1. **Predict** (5 minutes): the speed of a 1.7-billion-parameter model on a laptop of 100 GB/s, and the
#    number of requests at which its decode turns from memory-bound to compute-bound.
# 2. **Implement** (20 minutes, 12 lines): `max_requests`, how many requests of a length fit in memory
#    beside the weights, and `step_seconds` for them.
# 3. **Break and fix** (15 minutes): a benchmark that reports twice the true tokens a second.
#
# ## Recap
#
# An answer is one prefill and then a decode step a token. Decode is limited by the bytes it reads,
# $P\,b + R\,C\,k$ over $\beta$; prefill by arithmetic, $2PT$ over $F$. What is left is the fixed cost of
# a step, and batching shares both the reading and the fixed cost.
#
# <details><summary>1. Weights of 10 GB, 500 GB/s: how fast is one request at most?</summary>
#
# 50 tokens a second: 10 GB / 500 GB/s = 20 ms a step.
#
# </details>
#
# <details><summary>2. You store the weights in half the bytes. What gets faster?</summary>
#
# Decode of few requests, up to twice. Prefill does not, unless the machine also multiplies the smaller
# numbers faster.
#
# </details>
#
# <details><summary>3. Eight requests instead of one: what happens to TPOT and to tokens a second?</summary>
#
# While memory or the fixed cost is the limit, TPOT grows a little, and the total almost eightfold.
#
# </details>
#
# <details><summary>4. Your machine has ten times the FLOP/s, and the same bandwidth. Who notices?</summary>
#
# Those with long prompts, and large batches. One request's decode stays as it is.
#
# </details>
#
# <details><summary>5. Why can a measured step be faster than the bound?</summary>
#
# The bound assumes that weights come from memory. A small model may stay in the processor's cache.
#
# </details>
#
# All of this took one thing for granted: that a decode step reads only the newest token, since keys and
# values are kept. **The next question**: what does it cost if nothing is kept?
# Lesson 01 builds that engine.
