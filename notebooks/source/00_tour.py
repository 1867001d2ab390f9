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
# A language model writes its answer one word after the other. Why not faster? Here you meet the engine
# that this course rebuilds, and find out. Afterwards you can
#
# 1. **run** requests and read every field of an answer,
# 2. **count** the bytes and the arithmetic that one token costs,
# 3. **predict** the speed of a model on a machine from two numbers, and say why the truth is slower.
#
# **How to work here.** Where it says *Predict*, write down your number before you run the cell; the
# explanation is folded below it. The same cells run on a CPU and on a GPU, and every lesson starts cold.
# What you measure is kept in `.course/`, which git ignores.

# %%
import random
import statistics
from pathlib import Path

import torch
from transformers.utils import logging

from course import machine, plots, tour_plots
from course.display import show

logging.disable_progress_bar()
torch.set_num_threads(1)  # timings of one thread vary least
plots.use_style()
HERE = machine.describe()
print(HERE)

# %% [markdown]
# ## A first answer
#
# The course ships with a model of 7 million parameters that can do one thing: tell short stories. `LLM`
# loads a model, `chat` asks it. Temperature 0 always takes the likeliest next token.

# %%
from course.models import own_model
from nanovllm import LLM, SamplingParams

llm = LLM(own_model(), dtype="float32", num_gpu_blocks_override=512, use_tqdm_on_load=False)
greedy = SamplingParams(temperature=0, max_tokens=120)
question = [{"role": "user", "content": "Tell me a story about a fox who finds a key."}]
(answer,) = llm.chat(question, greedy, use_tqdm=False)
print(answer.outputs[0].text)

# %% [markdown]
# The model sees no words. A **token** is a number that stands for a word or a piece of one; a full stop
# is a token too. Each run of the model gives one new token.
#
# **Predict**: the story has 75 words. Did the model run fewer than 75 times to write it, 75 times, or
# more?

# %%
ids = answer.outputs[0].token_ids
pieces = [llm.get_tokenizer().decode([i]) for i in ids]
num_words = len(answer.outputs[0].text.split())
print(" | ".join(pieces[:16]), "| ...")
print(f"{num_words} words, {len(ids)} tokens, the last is {pieces[-1]!r}")
assert len(ids) > num_words

# %% [markdown]
# <details><summary>More: punctuation, and an end</summary>
#
# Commas and full stops are tokens of their own, and the last token, `<|im_end|>`, says that the answer
# is over. No token can be computed before the one ahead of it is chosen. So an answer takes as many runs
# as it has tokens, on any machine.
#
# </details>
#
# ## Several requests at once
#
# `stream` takes a list of prompts, and yields `(index of the prompt, new text)` as text is written.
# **Predict**: in which order do the indices of three prompts come?

# %%
prompts = [answer.prompt.replace("a fox", animal) for animal in ("an owl", "a robot", "a king")]
stream = llm.stream(prompts, SamplingParams(temperature=0.7, seed=1, max_tokens=12))
arrived = list(stream)
print("order:", *[index for index, _ in arrived])
for index in range(len(prompts)):
    print(f"{index}:", "".join(text for i, text in arrived if i == index))
assert [index for index, _ in arrived[:6]] == [0, 1, 2, 0, 1, 2]
assert "".join(text for i, text in arrived if i == 1) == stream.outputs[1].outputs[0].text

# %% [markdown]
# <details><summary>0 1 2, 0 1 2, ...</summary>
#
# All three are one **batch**: each run of the model gives each of them a token. Below you will see what
# that is worth.
#
# </details>
#
# ## What an answer holds
#
# `chat` and `generate` return a `RequestOutput` for each prompt. Its `metrics` are points in time;
# differences of them are what users feel:
#
# - **TTFT**, time to first token: from arrival until there is something to read,
# - **TPOT**, time per output token: the pace after that.

# %%
print("prompt       ", repr(answer.prompt[:38]), "... is", len(answer.prompt_token_ids), "tokens")
print("finish_reason", repr(answer.outputs[0].finish_reason), "(others: 'length', 'abort')")
times = answer.metrics
for name in ("first_scheduled_time", "first_token_time", "finished_time"):
    print(f"{name:<21}{1000 * (getattr(times, name) - times.arrival_time):7.1f} ms after arrival")
print(f"TTFT {1000 * times.ttft:.1f} ms, TPOT {1000 * answer.tpot:.2f} ms")
pace = (times.finished_time - times.first_token_time) / (len(ids) - 1)
assert answer.finished and abs(answer.tpot - pace) < 1e-9

# %% [markdown]
# TPOT divides by one token less, since the first came with the TTFT. Times differ between runs, so the
# course prints them and never asserts them.
#
# ## The door
#
# This is the real `generate`, without its signature. A request is checked and queued by `_add`; then the
# engine advances, step after step, until all are finished. Everything else in this course happens inside
# of `advance`.

# %%
import inspect

source = inspect.getsource(LLM.generate)
print(source[source.index("        seqs =") :])

# %% [markdown]
# The arguments of `LLM` are the fields of a dataclass in `config.py`. Beside its default each field says
# what it accepts, and `validation.py` holds it to that. Some of the real lines, and the loop that checks
# them:

# %%
from nanovllm import validation
from nanovllm.config import EngineArgs

wanted = ("max_num_seqs", "block_size", "enable_prefix_caching", "quantization")
for line in inspect.getsource(EngineArgs).splitlines():
    if line.strip().startswith(wanted):
        print(line)
print("\n" + inspect.getsource(validation.check_fields))

# %% [markdown]
# Names and defaults are vLLM's. `only(None)` stands for what vLLM has and this engine lacks: a script
# that leaves it alone runs, one that needs it is told. **Predict**: which of these four get in?

# %%
attempts = [
    (EngineArgs, {"model": "m", "max_num_seqs": 0}),
    (EngineArgs, {"model": "m", "block_size": "16"}),
    (EngineArgs, {"model": "m", "quantization": "fp8"}),
    (SamplingParams, {"temperature": -1.0}),
]
for kind, arguments in attempts:
    try:
        kind(**arguments)
    except (TypeError, ValueError) as error:
        print(f"{type(error).__name__}: {error}")
        assert list(arguments)[-1] in str(error)
    else:
        raise AssertionError(f"{arguments} was let in")

# %% [markdown]
# None, and each message names the argument, the limit and the value. A list of prompts is checked whole
# before any of it is queued.
#
# ## The map
#
# Inside `advance` a request meets the other files. The number beside each is the lesson that rebuilds it.
#
# ![llm.py checks a request, llm_engine.py queues it; scheduler, block manager, runner, decoder and sampler
# run step after step; outputs.py holds the answer. A prefill step reads the whole prompt, a decode step
# only the newest token.](../figures/request_path.svg)
#
# A request's first step, **prefill**, reads the whole prompt. Each later one, a **decode** step, reads
# only the newest token: what was computed for the others, their *keys and values* (KV), is kept. Remember
# the two words; they have different speed limits.
#
# ![Ten lessons, each with the files of nanovllm it ends in.](../figures/course_map.svg)
#
# **Predict**: which lesson has the most lines to read?

# %%
import nanovllm
from course.lessons import FILES_OF_LESSON

folder = Path(nanovllm.__file__).parent
lines = {
    lesson: {name: len((folder / name).read_text().splitlines()) for name in files}
    for lesson, files in FILES_OF_LESSON.items()
}
fig = tour_plots.lesson_sizes(lines)
show(fig, fig.alt_text)
print("this lesson:", lines["00_tour"])
assert max(lines, key=lambda lesson: sum(lines[lesson].values())) == "06_triton_kernels"

# %% [markdown]
# The GPU kernels of lesson 06. The rest is an evening or two of reading.
#
# ## Two numbers of this machine
#
# For a model, a computer does two things: it **reads** numbers from memory and **multiplies** them.
#
# | symbol | meaning | unit |
# |:--|:--|--:|
# | $\beta$ | bandwidth: bytes read from memory | bytes/s |
# | $F$ | rate of a large matrix product | FLOP/s |
# | $P$ | parameters in the model's matrices | |
# | $b$ | size of a number: 4 in float32 (CPU), 2 in bfloat16 (GPU) | bytes |
# | $k$ | keys and values of one token | bytes |
# | $R$, $C$ | requests in a step, tokens that each has so far | |
# | $T$ | tokens of a prompt | |
#
# A FLOP is one multiplication or addition of floating-point numbers. Reading first: sum up a buffer,
# again and again. A small one stays in the processor's caches, a large one comes from memory each time.
# **Predict** the shape of the curve.

# %%
from course.peaks import record_peaks
from course.timing import machine_peaks, measure

llm.close()
device = "cuda" if torch.cuda.is_available() else "cpu"
peaks = machine_peaks(device)
record_peaks(peaks)  # into .course/peaks.json
sizes = [2**n for n in range(18, 32 if device == "cuda" else 30)]
buffer = torch.zeros(sizes[-1] // 4, device=device)
rates = [size / measure(buffer[: size // 4].sum, warmup=2).median for size in sizes]
del buffer
marks = {"the shipped model": 27_800_000}  # its weights in bytes, counted below
fig = tour_plots.bandwidth_curve(sizes, rates, peaks.bandwidth, marks, HERE)
show(fig, fig.alt_text)

# %% [markdown]
# <details><summary>Steps down to a floor</summary>
#
# On a CPU each step down is a cache that no longer holds the buffer. On one thread of a server it fell
# from 53 GB/s at 1 MiB to 22 at 16 MiB and 12 at 512 MiB: memory. On a GPU small buffers look slow, since
# starting a read takes longer than reading.
#
# </details>
#
# The dashed line is the first number, $\beta$. The second, $F$, was measured in the same call.

# %%
total = torch.cuda.mem_get_info()[1] if device == "cuda" else machine.total_memory_bytes()
ridge = peaks.flops / peaks.bandwidth
print(f"{HERE}, {total / 2**30:,.0f} GiB of memory")
print(f"beta {peaks.bandwidth / 1e9:,.1f} GB/s, F {peaks.flops / 1e9:,.0f} GFLOP/s")
print(f"in the time to read one byte it can do {ridge:.0f} FLOPs")

# %% [markdown]
# The last line decides all that follows: **reading is the expensive part**, unless what was read is used
# many times.
#
# ## Count on a toy
#
# A layer is a matrix, a token is a vector. Multiply them by hand and count. **Predict** for a matrix of
# 4 × 4: how many FLOPs, and how many bytes of matrix in float32?

# %% tags=["nbval-check-output"]
W = torch.arange(16.0).reshape(4, 4)
x = torch.tensor([1.0, 0.0, 2.0, 1.0])
y, flops = [0.0] * 4, 0
for row in range(4):
    for column in range(4):
        y[row] += float(W[row, column] * x[column])
        flops += 2  # a multiplication and an addition
print(y, f"{flops} FLOPs, {W.nbytes} bytes: {flops / W.nbytes} FLOP a byte")
assert y == (W @ x).tolist() and flops == 2 * W.numel()

# %% [markdown]
# Every number of the matrix is read for 2 FLOPs. Now let $R$ requests share it: it is read once and used
# $R$ times. Take a toy machine with $\beta$ = 16 bytes/s and $F$ = 32 FLOP/s. Reading and computing
# overlap, so a step takes the longer of the two. **Predict** its seconds for 1, 4, 8 and 16 requests.

# %% tags=["nbval-check-output"]
def bound(num_bytes, flops, bandwidth, rate):
    """Seconds that a step takes at least."""
    return max(num_bytes / bandwidth, flops / rate)


for R in (1, 2, 4, 8, 16):
    seconds = bound(64, R * 32, bandwidth=16, rate=32)
    print(f"{R:>2} requests: {seconds:>2.0f} s a step, {R / seconds:.2f} tokens/s in all")
assert bound(64, 4 * 32, 16, 32) == bound(64, 32, 16, 32)

# %% [markdown]
# <details><summary>Free up to 4, then no longer</summary>
#
# Reading takes 64 / 16 = 4 s, whoever shares it; computing takes 32 R / 32 = R seconds. Up to 4 requests a
# step is **memory-bound**, and one more request costs nothing. Beyond, it is **compute-bound**, and the
# total stays at one token a second. The bend is where R · 0.5 FLOP a byte reaches the machine's 32 / 16.
#
# </details>
#
# ## Count the real model
#
# The shipped model is a stack of such matrices. A token is 256 numbers. Each of 5 layers has attention
# (4 query heads, 2 key and value heads, of 64 numbers each) and an MLP with 1,280 inner numbers. A last
# matrix, the head, scores 4,096 possible tokens.
#
# | matrix | inputs × outputs | parameters |
# |:--|:--|--:|
# | query, output | 256 × 256, two | 131,072 |
# | key, value | 256 × 128, two | 65,536 |
# | gate, up, down | 256 × 1,280, three | 983,040 |
# | **one layer** | | **1,179,648** |
# | **head** | 256 × 4,096 | **1,048,576** |
#
# **Predict** $P$; and $k$: a token keeps a key and a value, in 5 layers, for 2 heads of 64 numbers of 4
# bytes.

# %%
from nanovllm.model.model_config import ModelConfig


def count(config):
    """Parameters of all layers' matrices and of the head, and numbers that a token keeps."""
    d, dim, kv_heads = config.hidden_size, config.head_dim, config.num_key_value_heads
    attention = (2 * config.num_attention_heads + 2 * kv_heads) * dim * d
    layers = config.num_hidden_layers * (attention + 3 * d * config.intermediate_size)
    return layers, d * config.vocab_size, 2 * config.num_hidden_layers * kv_heads * dim


shipped = ModelConfig.from_folder(own_model())
layers, head, kept = count(shipped)
print(f"P = {layers:,} + {head:,} = {layers + head:,}, {4 * (layers + head):,} bytes in float32")
print(f"k = {4 * kept:,} bytes")

# %% [markdown]
# **Check** the count against a reference: transformers runs the same model on $T$ = 100 tokens while
# PyTorch counts FLOPs. We expect 2 for each layer parameter and token, and the head once, since only the
# last token's successor is wanted. Attention multiplies each query with each key, then the weights it
# gets with the values: $4\,T^2 \cdot 4 \cdot 64$ a layer.

# %%
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

reference = AutoModelForCausalLM.from_pretrained(
    own_model(), dtype=torch.float32, attn_implementation="eager"
)
T = 100
with torch.no_grad(), FlopCounterMode(display=False) as counter:
    reference(torch.arange(T)[None], logits_to_keep=1)
counted = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
print(counted)
assert counted["aten.mm"] == 2 * layers * T + 2 * head  # the matrices
assert counted["aten.bmm"] == 5 * 4 * T**2 * 4 * 64  # attention
assert reference.num_parameters() - (layers + head) == 3456  # the norms: vectors, 0.05%

# %% [markdown]
# Equal to the last FLOP. Does our engine say what transformers says, too? A **logit** is the model's score
# of one possible next token. At each place of the first answer, the token that the engine took must have
# the reference's highest logit (0.001 allows for rounding).

# %%
prompt_ids = answer.prompt_token_ids
with torch.no_grad():
    logits = reference(torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1]
behind = logits.max(dim=1).values - logits[range(len(ids)), ids]
print(f"{int((behind == 0).sum())} of {len(ids)} tokens are the reference's first choice")
assert behind.max() < 1e-3

# %% [markdown]
# ## Predict decode
#
# A decode step reads each parameter once, and the keys and values of each request's $C$ tokens:
#
# $$\text{bytes} = P\,b + R\,C\,k \qquad \text{FLOPs} \approx 2\,P\,R \qquad
# \text{seconds} \ge \max\left(\frac{\text{bytes}}{\beta},\ \frac{\text{FLOPs}}{F}\right)$$
#
# We measure the shipped model on a CPU. On a GPU it is a larger one with random weights: speed depends on
# shapes, not on what the weights know. The next cell prints its $P$, $b$ and $k$. **Predict** from them
# and your $\beta$, before you go on: tokens a second of one request with $C$ = 20.

# %%
from course.models import measured_model


def work(config, requests, new, context):
    """Bytes and FLOPs of a step: requests, each with `new` tokens, the last of `context`."""
    layers, head, kept = count(config)
    size = config.dtype.itemsize
    pairs = new * (context - new) + new * (new + 1) / 2  # a token attends to itself and earlier ones
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs
    num_bytes = (layers + head) * size + requests * context * kept * size
    return num_bytes, requests * (2 * layers * new + 2 * head + attention)


choice = measured_model()
options = {"num_gpu_blocks_override": 512, "max_num_seqs": 64, "max_num_batched_tokens": 1024}
llm = LLM(choice.path, use_tqdm_on_load=False, **options)
config = llm.llm_engine.model_config
layers, head, kept = count(config)
size = config.dtype.itemsize
print(f"{choice}\nP = {layers + head:,}, b = {size}, k = {kept * size:,}")
assert work(config, 3, 1, 20)[0] == (layers + head) * size + 3 * 20 * kept * size

# %%
def decode_seconds(llm, requests, runs=5):
    """Seconds of a decode step with so many requests: the median run's TPOT."""
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    tpots = []
    for _ in range(runs + 1):
        prompts = [random.choices(range(5, 500), k=8) for _ in range(requests)]
        tpots.append(llm.generate(prompts, params, use_tqdm=False)[-1].tpot)
    return statistics.median(tpots[1:])  # the first run is a warm-up


limits = peaks.bandwidth, peaks.flops
batches, context = (1, 4, 16, 64), 20  # contexts grow from 8 to 32 tokens
needs = [work(config, R, 1, context) for R in batches]
bounds = [bound(*need, *limits) for need in needs]
steps = [decode_seconds(llm, R) for R in batches]
print(f"one request: at most {1 / bounds[0]:,.0f} tokens/s, measured {1 / steps[0]:,.0f}")

# %% [markdown]
# ## Where is the rest?
#
# Suspect a cost that each step has, whatever the size of the model. On a CPU that is Python, and the
# start of some hundred small operations; on a GPU the start of as many kernels. To see it alone, run a
# **hollow** model: as many layers, hardly any weights, in the same engine. **Predict** its
# milliseconds a step, if the suspicion is right: the measured time less the bound.

# %%
import tempfile

from course.random_model import hollow_model

with tempfile.TemporaryDirectory() as scratch:
    name = hollow_model(Path(scratch), config.num_hidden_layers)
    hollow = LLM(name, dtype=config.dtype, use_tqdm_on_load=False, **options)
fixed = [decode_seconds(hollow, R) for R in batches]
hollow.close()
sums = [least + cost for least, cost in zip(bounds, fixed, strict=True)]
print("requests   bound  hollow     sum   measured ms   tokens/s in all")
for R, *row, seconds in zip(batches, bounds, fixed, sums, steps, strict=True):
    cells = "".join(f"{1000 * value:8.2f}" for value in row)
    print(f"{R:>8}{cells}{1000 * seconds:14.2f}{R / seconds:18,.0f}")

# %%
drawn = {"bound": bounds, "bound + hollow": sums, "measured": steps}
fig = tour_plots.step_times(batches, drawn, f"{Path(choice.path).name}, {HERE}")
show(fig, fig.alt_text)

# %% [markdown]
# <details><summary>How to read it</summary>
#
# **At 1 request** the fixed cost is as large as the bound. On one thread of a server: bound 2.4 ms,
# hollow 1.7, measured 3.5. That is less than their sum, since the 28 MB of weights stay in that
# processor's large cache: your bandwidth curve says what yours does with them. For a small model, the
# engine's overhead *is* the speed.
#
# **At 64 requests** all share the fixed cost, and arithmetic takes over. Now the bound misses what it
# left out: norms, gathering keys and values, softmax, choosing the token, and products of 64 rows, which
# run slower than the large one that gave $F$.
#
# </details>
#
# From 1 to 64 requests, 64 times the tokens cost a few times the step: that is what a batch is worth. It
# does *not* help a single user, whose tokens now come more slowly.
#
# ## Predict prefill
#
# A prompt is a batch by itself: each parameter that is read is used for $T$ tokens, so $F$ is the limit,
# and prefill takes at least about $2\,P\,T / F$ seconds. **Predict** the milliseconds for 256 tokens.
# (`work` is exact: the head once, and attention's $T^2$.)

# %%
def prefill_seconds(llm, tokens, runs=3):
    """Seconds to the first token of a new prompt: the median TTFT."""
    params = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    prompts = [random.choices(range(5, 500), k=tokens) for _ in range(runs + 1)]
    outputs = [llm.generate([prompt], params, use_tqdm=False)[0] for prompt in prompts]
    return statistics.median(output.metrics.ttft for output in outputs[1:])


lengths = (16, 64, 256, 1000)
prompt_needs = [work(config, 1, T, T) for T in lengths]
prefills = [prefill_seconds(llm, T) for T in lengths]
llm.close()
for T, need, seconds in zip(lengths, prompt_needs, prefills, strict=True):
    print(f"{T:>5} tokens: at least {1000 * bound(*need, *limits):6.1f} ms, "
          f"measured {1000 * seconds:6.1f}; {T / seconds:8,.0f} tokens/s")

# %% [markdown]
# <details><summary>Short and long prompts fall short for different reasons</summary>
#
# 16 tokens pay the fixed cost. 1,000 tokens pay for what lies between the matrices: 1,000 × 2,560 inner
# numbers, 10 MB in float32, are written and read again several times in each layer, and attention
# computes the half of its scores that is then masked.
#
# </details>
#
# The same model reads far more tokens a second than one request writes. So a long question is answered
# soon, and a long answer takes its time.
#
# ## The roofline
#
# One picture holds it all. To the right: FLOPs for each byte read. Upwards: FLOP/s. The roof is
# $\min(F,\ \beta \cdot \text{FLOP a byte})$. Each point is a step that you measured.

# %%
series = {
    "decode, by requests": [(R, *n, s) for R, n, s in zip(batches, needs, steps, strict=True)],
    "prefill, by tokens": [
        (T, *n, s) for T, n, s in zip(lengths, prompt_needs, prefills, strict=True)
    ],
}
fig = tour_plots.roofline(peaks, series, f"{Path(choice.path).name}, {HERE}")
show(fig, fig.alt_text)

# %% [markdown]
# Decode begins far left, where the arithmetic units wait for memory. A batch moves it to the right, up
# the slope. Prefill stands to the right from the start. Every lesson moves points: to the right (batches,
# shared prefixes) or up to the roof (kernels, graphs, less Python).
#
# ## Predict what you cannot run
#
# The shapes below are published; the H200's two numbers were recorded by `course bench`. **Predict** from
# $P\,b$ alone: how fast is a model of 7.6 billion parameters, 2 bytes each, for one request here?

# %%
import json
from types import SimpleNamespace

from course.records import SHIPPED

NAMES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads", "num_key_value_heads", "head_dim")  # fmt: skip
SHAPES = {
    "Qwen3-0.6B": (151_936, 1024, 3072, 28, 16, 8, 128),
    "Qwen3-8B": (151_936, 4096, 12_288, 36, 32, 8, 128),
    "Llama-3.1-70B": (128_256, 8192, 28_672, 80, 64, 8, 128),
}
bench = json.loads((SHIPPED / "h200_workloads.json").read_text())
h200 = bench["peaks"]["read_bytes_per_second"], bench["peaks"]["flops_per_second"]
print("tokens/s at most   H200, R=1  H200, R=64  here, R=1   weights   fits here")
for name, shape in SHAPES.items():
    model = SimpleNamespace(**dict(zip(NAMES, shape, strict=True)), dtype=torch.bfloat16)
    cases = ((1, h200), (64, h200), (1, limits))
    speeds = [R / bound(*work(model, R, 1, 1000), *machine) for R, machine in cases]
    num_bytes = work(model, 1, 1, 0)[0]
    print(f"{name:<16}" + "".join(f"{speed:12,.3g}" for speed in speeds)
          + f"{num_bytes / 1e9:8.1f} GB   {'yes' if num_bytes < total else 'no'}")  # fmt: skip
W2 = bench["workloads"]["W2"]["median"]["output_tokens_per_second"]
print(f"recorded on the H200 for Qwen3-0.6B's shape, one request: {W2:,.0f} tokens/s")

# %% [markdown]
# <details><summary>The record is a third of the bound</summary>
#
# You know why: reading takes 0.26 ms a step, and 28 layers of short kernels have a fixed cost of that
# size. With 256 requests at once the engine came to 63% of its bound.
#
# </details>
#
# ## In real vLLM
#
# At release v0.11.0 the same names are in
# [`vllm/outputs.py`](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/outputs.py#L79) and
# [`vllm/engine/arg_utils.py`](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/engine/arg_utils.py#L284).
# Three differences:
#
# 1. `EngineArgs` has 139 fields there. Ours has 34, of which 13 only say no.
# 2. Its `RequestOutput` drops unknown arguments with a warning; here nothing unknown is let in.
# 3. Its `RequestOutput.metrics` stays `None`: the engine
#    [does not fill it](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/v1/engine/output_processor.py#L250),
#    and gives statistics over all requests instead. Ours times every request.
#
# ## Exercises
#
# In `exercises/00_tour.ipynb`:
#
# 1. **Predict** (5 minutes): a model of 1.7 billion parameters on a laptop that reads 100 GB/s, and the
#    $R$ at which its decode turns compute-bound.
# 2. **Implement** (20 minutes, 12 lines): `most_requests`, how many requests of a length fit into memory
#    beside the weights, and how fast they are together.
# 3. **Break and fix** (15 minutes): a benchmark that reports twice the true tokens a second.
#
# ## Recap
#
# An answer is one prefill and a decode step for each further token. Decode is limited by what it reads,
# $(P\,b + R\,C\,k)/\beta$, prefill by arithmetic, $2\,P\,T/F$. What comes on top is a fixed cost a step,
# and a batch shares the reading and that cost.
#
# <details><summary>1. Weights of 10 GB, read at 500 GB/s: how fast is one request at most?</summary>
#
# 10 / 500 s = 20 ms a step: 50 tokens a second.
#
# </details>
#
# <details><summary>2. You store weights in half the bytes. What gets faster?</summary>
#
# Decode of few requests, up to twice. Prefill only if the machine also multiplies smaller numbers faster.
#
# </details>
#
# <details><summary>3. Ten times the FLOP/s, the same bandwidth: who notices?</summary>
#
# Long prompts and large batches. The decode of one request stays as it was.
#
# </details>
#
# <details><summary>4. How can a measured step be faster than the bound?</summary>
#
# The bound takes $\beta$ from memory; small weights may come from a cache.
#
# </details>
#
# All of this took for granted that a decode step reads only the newest token. **The next question**: what
# if nothing is kept, and each step reads the whole text again? Lesson 01 builds that engine.
