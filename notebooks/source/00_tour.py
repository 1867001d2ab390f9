# %% [markdown]
# # 00 · A tour: a model's speed from two numbers
#
# | This lesson | |
# |---|---|
# | Minutes | 50 |
# | Difficulty | easy |
# | Hardware | any laptop; a GPU is used if there is one |
# | Needs | Python, a little PyTorch |
# | Ends in | `nanovllm/llm.py`, `nanovllm/config.py`, `nanovllm/outputs.py`, `nanovllm/validation.py` |

# %% [markdown]
# A language model writes word by word. Why not faster? Here you meet the engine that this course rebuilds,
# and find out. Afterwards you can
#
# 1. **run** requests and read every field of an answer,
# 2. **count** the bytes and the arithmetic that one token costs,
# 3. **predict** the speed of a model on a machine from two numbers, and say why the truth is slower.
#
# **How to work here.** At *Predict*, write down your answer, then run the cell; the explanation is folded
# below it. The same cells run on a CPU and on a GPU. What you measure is kept in `.course/`, which git
# ignores. Each lesson has three exercises in `exercises/`.

# %%
import inspect
import random
import textwrap
from pathlib import Path

import torch
from transformers.utils import logging

from course import machine, plots
from course.display import show
from course.drawings import tour_plots

logging.disable_progress_bar()
torch.set_num_threads(1)  # timings of one thread vary least
plots.use_style()
HERE = machine.describe()
print(HERE)

# %% [markdown]
# ## A first answer
#
# The course ships with a model of 7 million parameters that does one thing: it tells short stories.
# Temperature 0 always takes the likeliest next token. The `options` keep the engine small: at most 64
# requests at once, and room for 512 · 16 tokens.

# %%
from course.models import own_model
from nanovllm import LLM, SamplingParams

options = {"num_gpu_blocks_override": 512, "max_num_seqs": 64, "use_tqdm_on_load": False}
llm = LLM(own_model(), dtype="float32", **options)  # compared with a reference below
greedy = SamplingParams(temperature=0, max_tokens=120)
question = [{"role": "user", "content": "Tell me a story about a fox who finds a key."}]
(answer,) = llm.chat(question, greedy, use_tqdm=False)
print(textwrap.fill(answer.outputs[0].text, 90))

# %% [markdown]
# The model sees no words. A **token** is a number that stands for a word or a piece of one. Each run of
# the model gives one new token. **Predict**: the story has 75 words. Did the model run fewer than 75
# times, 75 times, or more?

# %%
ids = answer.outputs[0].token_ids
pieces = [llm.get_tokenizer().decode([i]) for i in ids]
num_words = len(answer.outputs[0].text.split())
print(", ".join(f"{i} {piece!r}" for i, piece in zip(ids[:9], pieces, strict=False)), "...")
print(f"{num_words} words, {len(ids)} tokens, the last is {pieces[-1]!r}")
assert len(ids) > num_words

# %% [markdown]
# <details><summary>More: punctuation, and an end</summary>
#
# Full stops are tokens too, and `<|im_end|>` ends the answer. No token can be computed before the one
# ahead of it is chosen: 89 tokens take 89 runs, on any machine.
#
# </details>
#
# ## Several requests at once
#
# `stream` yields `(index of the prompt, new text)` as text is written. **Predict**: in which order do the
# indices of three prompts come?

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
# All three are one **batch**: each run of the model gives each of them a token.
#
# </details>
#
# ## What an answer holds
#
# `chat` and `generate` return a `RequestOutput` for each prompt. Its `outputs` hold one completion, which
# ended by `stop`, `length` or `abort`. Its `metrics` are points in time. Users feel two differences of
# them: **TTFT**, the time to the first token, and **TPOT**, the time per output token after that.

# %%
from dataclasses import fields

for part in (answer, answer.outputs[0]):
    for field in fields(part):
        print(f"{field.name:<17}", repr(getattr(part, field.name))[:68])
    print()
times = answer.metrics
for name in ("first_scheduled_time", "first_token_time", "finished_time"):
    print(f"{name:<21}{1000 * (getattr(times, name) - times.arrival_time):7.1f} ms after arrival")
print(f"TTFT {1000 * times.ttft:.1f} ms, TPOT {1000 * answer.tpot:.2f} ms\n")
print(inspect.getsource(type(answer).tpot.fget))
pace = (times.finished_time - times.first_token_time) / (len(ids) - 1)
assert abs(answer.tpot - pace) < 1e-9

# %% [markdown]
# The engine divides by one token less, since the first came with the TTFT. Times differ between runs: the
# course prints them, and never asserts them.
#
# ## The door
#
# This is the body of the real `generate`. `_add` checks and queues requests; then the engine advances,
# step by step, until all are finished. All else in this course happens inside `advance`.

# %%
source = inspect.getsource(LLM.generate)
print(textwrap.dedent(source[source.index("        seqs =") :]))

# %% [markdown]
# `LLM` takes the fields of a dataclass in `config.py`. Beside its default each field says what it accepts;
# `validation.py` holds it to that. Some of the lines, and the loop that checks them:

# %%
from nanovllm import validation
from nanovllm.config import EngineArgs

wanted = ("max_num_seqs", "block_size", "enable_prefix_caching", "quantization")
for line in inspect.getsource(EngineArgs).splitlines():
    if line.strip().startswith(wanted):
        print(line.strip())
print("\n" + inspect.getsource(validation.check_fields))
num_only = inspect.getsource(EngineArgs).count("= only(")
print(f"{len(fields(EngineArgs))} fields, {num_only} of them only(...)")

# %% [markdown]
# Names and defaults are vLLM's. `only(None)` marks what vLLM has and this engine lacks: a script that
# leaves it alone runs, one that needs it is told. **Predict**: which of these four get in?

# %%
attempts = [
    (EngineArgs, {"model": "m", "max_num_seqs": 0}),
    (EngineArgs, {"model": "m", "block_size": "16"}),
    (EngineArgs, {"model": "m", "quantization": "fp8"}),
    (SamplingParams, {"temperature": -1.0}),
]
for kind, arguments in attempts:
    message = "let in"
    try:
        kind(**arguments)
    except (TypeError, ValueError) as error:
        message = f"{type(error).__name__}: {error}"
    print(message)
    assert list(arguments)[-1] in message

# %% [markdown]
# None. Each message names the argument, the limit and the value.
#
# ## The map
#
# Inside `advance` a request meets the other files. The number is the lesson that rebuilds each.
#
# ![llm.py checks a request, llm_engine.py queues it; scheduler, block manager, runner, decoder, sampler run
# in a loop; outputs.py holds the answer. Below: what prefill and decode steps
# read.](../figures/request_path.svg)
#
# A request's first step, **prefill**, reads the whole prompt. Each later one, a **decode** step, reads
# only the newest token: what was computed for the others, their *keys and values* (KV), is kept. The two
# have different speed limits.
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
longest = sorted(lines, key=lambda lesson: sum(lines[lesson].values()))[-2:]
assert set(longest) == {"01_naive_generate", "06_triton_kernels"}

# %% [markdown]
# The model of lesson 01 and the GPU kernels of lesson 06, about equally long.
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
# A FLOP is one multiplication or addition of floating-point numbers. Reading first: we sum up a buffer,
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
rates = [size / measure(buffer[: size // 4].sum, repeats=9).lowest for size in sizes]
del buffer
marks = {"the shipped model": 27_800_000}  # its weights in bytes, counted below
fig = tour_plots.bandwidth_curve(sizes, rates, peaks.bandwidth, marks, HERE)
show(fig, fig.alt_text)

# %% [markdown]
# <details><summary>Steps down to a floor</summary>
#
# On a CPU each step down is a cache that no longer holds the buffer. On one thread of a server: 79 GB/s at 1
# MiB, 28 at 16 MiB, and memory's 13 at 512 MiB. The smallest buffers look slow, on a GPU all small ones:
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
# So **reading is the expensive part**, unless what was read is used many times.
#
# ## Count on a toy
#
# To a matrix of a model, a token is a vector. Multiply the two number by number. **Predict** for 4 × 4: how
# many FLOPs, and how many bytes of matrix in float32?

# %% tags=["nbval-check-output"]
W = torch.arange(16.0).reshape(4, 4)
x = torch.tensor([1.0, 0.0, 2.0, 1.0])
y, flops = [0.0] * 4, 0
for row in range(4):
    for column in range(4):
        y[row] += float(W[row, column] * x[column])
        flops += 2  # a multiplication and an addition
print(y, f"{flops} FLOPs, {W.nbytes} bytes: {flops / W.nbytes} FLOP a byte")
assert y == (W @ x).tolist()

# %% [markdown]
# Every number of the matrix is read for 2 FLOPs. If $R$ requests share it, it is read once and used $R$
# times. Take a toy machine with $\beta$ = 16 bytes/s and $F$ = 32 FLOP/s. Reading and computing overlap,
# so a step takes the longer of the two. **Predict** its seconds for 1, 4, 8 and 16 requests.


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
# step is **memory-bound**: one more costs nothing. Beyond, it is **compute-bound**: the total stays at one
# token a second.
#
# </details>
#
# ## Count the real model
#
# In the shipped model a token is 256 numbers. Each of 5 layers has attention (4 query heads, 2 key and
# value heads, of 64 numbers each) and an MLP with 1,280 inner numbers; the head scores 4,096 possible
# tokens. Lesson 01 says what they do; here only sizes matter.
#
# | matrices | parameters |
# |:--|--:|
# | query, output: 256 × 256 each | 131,072 |
# | key, value: 256 × 128 each | 65,536 |
# | gate, up, down: 256 × 1,280 each | 983,040 |
# | **one layer** | **1,179,648** |
# | **head**: 256 × 4,096 | **1,048,576** |
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
# **Check** it against a reference: transformers runs the same model on $T$ = 100 tokens while PyTorch
# counts FLOPs. We expect 2 for each token and layer parameter, and the head once, since only the last
# token's successor is wanted. In each layer, attention multiplies every query with every key, $2\,T^2
# \cdot 4 \cdot 64$ FLOPs, and the result with the values, as many again.

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
rest, attention = sum(counted.values()) - counted["aten.mm"], 5 * 2 * (2 * T**2 * 4 * 64)
assert (
    abs(rest / attention - 1) < 1e-3
)  # some versions count RoPE's angles too, or name it otherwise
assert reference.num_parameters() - (layers + head) == 3456  # the norms: vectors, 0.05%

# %% [markdown]
# The matrices are equal to the last FLOP. And does our engine say what transformers says? A **logit** is the model's score
# of a possible next token. All along the first answer, the token that the engine took must have the
# reference's highest logit, up to 0.001 for rounding.

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
# On a CPU we measure the shipped model, on a GPU a larger one with random weights: speed depends on
# shapes, not on what the weights know. (`COURSE_MODEL` names another.)

# %%
from course.models import measured_model


def work(config, requests, new, context):
    """Bytes and FLOPs of a step that computes `new` tokens of each request, up to `context`."""
    layers, head, kept = count(config)
    size = config.dtype.itemsize
    pairs = new * (context - new) + new * (new + 1) / 2  # a token sees itself and those before
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs
    num_bytes = (layers + head) * size + requests * context * kept * size
    return num_bytes, requests * (2 * layers * new + 2 * head + attention)


choice = measured_model()
options["max_num_batched_tokens"] = 1024  # a prompt of 1,000 tokens fits into one step
llm = LLM(choice.path, **options)
config = llm.llm_engine.model_config
layers, head, kept = count(config)
size = config.dtype.itemsize
print(f"{choice}\nP = {layers + head:,}, b = {size}, k = {kept * size:,}")
assert work(config, 3, 1, 20)[0] == (layers + head) * size + 3 * 20 * kept * size

# %% [markdown]
# **Predict** from these three, your $\beta$ and $C$ = 20: how many tokens a second does one request get?


# %%
def decode_seconds(llm, requests, runs=6):
    """Seconds of a decode step with so many requests: the fastest run's TPOT."""
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    tpots = []
    for _ in range(runs):
        prompts = [random.choices(range(5, 500), k=8) for _ in range(requests)]
        tpots.append(llm.generate(prompts, params, use_tqdm=False)[-1].tpot)
    return min(tpots)  # beta and F are those of the fastest run, too


limits = peaks.bandwidth, peaks.flops
batches, context = (1, 4, 16, 64), 20  # contexts grow from 8 to 32 tokens
needs = [work(config, R, 1, context) for R in batches]
bounds = [bound(*need, *limits) for need in needs]
steps = [decode_seconds(llm, R) for R in batches]
print(f"one request: at most {1 / bounds[0]:,.0f} tokens/s, measured {1 / steps[0]:,.0f}")

# %% [markdown]
# ## Where is the rest?
#
# Suspect a cost that each step has, whatever the model's size: on a CPU Python, and the start of hundreds
# of small operations; on a GPU the start of as many kernels. To see it alone, run a **hollow** model: as
# many layers, hardly any weights. **Predict** its milliseconds a step, if the suspicion is right: the
# measured ones less the bound.

# %%
import tempfile

from course.random_model import hollow_model

with tempfile.TemporaryDirectory() as scratch:
    name = hollow_model(Path(scratch), config.num_hidden_layers)
    hollow = LLM(name, dtype=config.dtype, **options)
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
# **1 request.** On one thread of a server CPU: bound 2.1 ms, hollow 1.7, measured 3.5. The fixed cost is
# nearly as large as the bound: a small model is as fast as its engine's overhead lets it be. The sum is
# too much, since some of the 28 MB of weights stayed in a cache (the dotted line in the bandwidth curve).
#
# **More requests** share the fixed cost. Now a CPU misses the sum, since products of few rows are slower
# than the large one that gave $F$: 4 rows ran at a fifth of its rate, 16 at half. The bound also leaves
# out norms, gathering keys and values, softmax, and choosing the token.
#
# </details>
#
# 64 times the tokens for a few times the step: that is what a batch is worth. It does *not* help a single
# user, whose tokens now come more slowly.
#
# ## Predict prefill
#
# A prompt is a batch by itself: each parameter is read for $T$ tokens. So $F$ is the limit, and prefill
# takes at least about $2\,P\,T / F$ seconds. **Predict** the milliseconds for 256 tokens.


# %%
def prefill_seconds(llm, tokens, runs=4):
    """Seconds to the first token of a new prompt: the fastest TTFT."""
    params = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    prompts = [random.choices(range(5, 500), k=tokens) for _ in range(runs)]
    outputs = [llm.generate([prompt], params, use_tqdm=False)[0] for prompt in prompts]
    return min(output.metrics.ttft for output in outputs)


lengths = (16, 64, 256, 1000)
prompt_needs = [work(config, 1, T, T) for T in lengths]
prefills = [prefill_seconds(llm, T) for T in lengths]
llm.close()
for T, need, seconds in zip(lengths, prompt_needs, prefills, strict=True):
    print(
        f"{T:>5} tokens: at least {1000 * bound(*need, *limits):6.1f} ms, "
        f"measured {1000 * seconds:6.1f}; {T / seconds:8,.0f} tokens/s"
    )

# %% [markdown]
# <details><summary>Why short and long prompts miss it</summary>
#
# 16 tokens pay the fixed cost. At 1,000 tokens a CPU spends a good part of its time in attention: it
# computes all 1,000 × 1,000 scores of a head and masks half of them, while the bound counts only those that
# are needed. A GPU's kernel skips the others: lesson 06.
#
# </details>
#
# Long questions cost little, long answers much.
#
# ## The roofline
#
# To the right: FLOPs for each byte read. Upwards: FLOP/s. The roof is
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
# Decode of one request stands far left, where arithmetic waits for memory. A batch moves it to the right.
# 64 requests and a prompt of 64 tokens are nearly the same point: a matrix cannot tell whose a token is.
# The lessons move points to the right (batches) or up to the roof (kernels, graphs).
#
# ## Predict what you cannot run
#
# `course bench` recorded an H200's two numbers; the shapes below are published. **Predict** from $P\,b$
# alone: how fast is Qwen3-8B, $P$ = 7.6 billion and $b$ = 2, for one request here?

# %%
import json

from course.records import SHIPPED
from course.shapes import PUBLISHED

bench = json.loads((SHIPPED / "h200_workloads.json").read_text())
h200 = bench["peaks"]["read_bytes_per_second"], bench["peaks"]["flops_per_second"]
print("tokens/s at most   H200, R=1  H200, R=64  here, R=1   weights   fits here")
for name, shape in PUBLISHED.items():
    cases = ((1, h200), (64, h200), (1, limits))
    speeds = [R / bound(*work(shape, R, 1, 1000), *machine) for R, machine in cases]
    num_bytes = work(shape, 1, 1, 0)[0]
    cells = "".join(f"{speed:12,.2f}" for speed in speeds)
    print(f"{name:<16}{cells}{num_bytes / 1e9:8.1f} GB   {'yes' if num_bytes < total else 'no'}")
W2 = bench["workloads"]["W2"]["median"]["output_tokens_per_second"]
print(f"recorded on the H200 for Qwen3-0.6B's shape, one request: {W2:,.0f} tokens/s")

# %% [markdown]
# <details><summary>The record is a third of the bound</summary>
#
# Reading takes 0.26 ms a step, and 28 layers of short kernels have a fixed cost as well. With 256 requests
# at once the engine came to 63% of its bound.
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
# 1. `EngineArgs` has 139 fields there, 25 here.
# 2. Its `RequestOutput` drops unknown arguments with a warning; here nothing unknown is let in.
# 3. Its `RequestOutput.metrics` stays `None`: the engine
#    [does not fill it](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/v1/engine/output_processor.py#L251).
#
# ## Exercises
#
# They begin with [lesson 01](../exercises/01_naive_generate.ipynb). One to take along: at how many requests does
# *your* machine's decode turn from reading to arithmetic? Compute it from its two numbers.
#
# ## Recap
#
# An answer is one prefill and a decode step for each further token. Decode is limited by what it reads,
# $(P\,b + R\,C\,k)/\beta$, prefill by arithmetic, $2\,P\,T/F$. A fixed cost comes on top of each step; a batch
# shares it, and the reading.
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
# $\beta$ is memory's; small weights may come from a cache.
#
# </details>
#
# **The next question**: what if no keys and values are kept, and each step reads the whole text again?
# Lesson 01 builds that engine.
