# %% [markdown]
# # 00 · A tour: a model's speed from two numbers
#
# | This lesson | |
# |---|---|
# | Minutes | 40 |
# | Difficulty | easy |
# | Hardware | any laptop; a GPU is used if there is one |
# | Needs | Python, a little PyTorch |
# | Ends in | `nanovllm/llm.py`, `nanovllm/config.py`, `nanovllm/outputs.py` |

# %% [markdown]
# A language model writes word by word. Why not faster? Here you meet the engine that this course rebuilds,
# and find out. You will
#
# 1. **run** requests and read every field of an answer,
# 2. **count** the bytes and the arithmetic that one token costs,
# 3. **predict** a model's speed from two numbers of a machine, and say why the truth is slower.
#
# At *Predict*, write down your answer, then run the cell; what follows explains it.

# %%
import textwrap
from pathlib import Path

import torch

from course import machine
from course.drawings import tour_plots
from course.labs import tour_lab
from course.models.choice import measured_model, own_model
from course.show import plots
from course.show.display import show
from course.show.reading import show_source
from nanovllm import LLM, SamplingParams

torch.set_num_threads(1)  # timings of one thread vary least
plots.use_style()
HERE = machine.describe()
print(HERE)

# %% [markdown]
# ## A first answer
#
# The course ships with a model of 7 million parameters that tells short stories. Temperature 0 always takes
# the likeliest next token. The `options` keep the engine small.

# %%
# room for 512 blocks of 16 tokens, at most 64 requests at once, no progress bar
options = {"num_gpu_blocks_override": 512, "max_num_seqs": 64, "use_tqdm_on_load": False}
llm = LLM(own_model(), dtype="float32", **options)  # compared with a reference below
greedy = SamplingParams(temperature=0, max_tokens=120)
question = [{"role": "user", "content": "Tell me a story about a fox who finds a key."}]
(answer,) = llm.chat(question, greedy, use_tqdm=False)
print(textwrap.fill(answer.outputs[0].text, 90))

# %% [markdown]
# A model sees no words. A **token** is a number that stands for a word or a piece of one. Each run of the
# model gives one new token. **Predict**: the story has 75 words. How many runs were that?

# %%
ids = answer.outputs[0].token_ids
pieces = [llm.get_tokenizer().decode([i]) for i in ids]
print(", ".join(f"{i} {piece!r}" for i, piece in zip(ids[:9], pieces, strict=False)), "...")
print(f"{len(ids)} tokens, the last is {pieces[-1]!r}")
assert len(ids) > len(answer.outputs[0].text.split())

# %% [markdown]
# More than 75: full stops are tokens too, and `<|im_end|>` ends the answer. No token can be computed before the
# one ahead of it is chosen.
#
# `stream` yields `(index of the prompt, new text)` as text is written. **Predict**: in which order do the
# indices of three prompts come?

# %%
prompts = [answer.prompt.replace("a fox", animal) for animal in ("an owl", "a robot", "a king")]
arrived = list(llm.stream(prompts, SamplingParams(temperature=0.7, seed=1, max_tokens=12)))
print("order:", *[index for index, _ in arrived])
for index in range(len(prompts)):
    print(f"{index}:", "".join(text for i, text in arrived if i == index))
assert [index for index, _ in arrived[:6]] == [0, 1, 2, 0, 1, 2]

# %% [markdown]
# All three are one **batch**: each run of the model gives each of them a token.
#
# ## What an answer holds
#
# `chat` and `generate` return a `RequestOutput` for each prompt: a completion in `outputs`, points in time in
# `metrics`. Users feel two differences of them: **TTFT**, the time to the first token, and **TPOT**, the time
# per output token after that.

# %%
tour_lab.print_answer(answer)
times = answer.metrics
print(f"TTFT {1000 * times.ttft:.1f} ms, TPOT {1000 * answer.tpot:.2f} ms")
pace = (times.last_token_ts - times.first_token_ts) / (len(ids) - 1)  # the first came with TTFT
assert abs(answer.tpot - pace) < 1e-9

# %% [markdown]
# `chat` wrapped the question in markers. A request is *scheduled* when a step first takes it. `stop`: the model ended
# the answer (`length`: `max_tokens` did).
#
# ## The door
#
# In `generate`, below, `_add` checks and queues requests; then the engine advances, step by step, until all
# are finished.
#
# `LLM` takes the fields of `EngineArgs` in `config.py`, with vLLM's names and defaults. Each says what it
# accepts, and `check_fields` holds it to that. **Predict**: which of these four get in?

# %%
from nanovllm.config import EngineArgs
from nanovllm.validation import check_fields

show_source(LLM.generate, check_fields)
attempts = [
    (EngineArgs, {"model": "m", "max_num_seqs": 0}),
    (EngineArgs, {"model": "m", "block_size": "16"}),
    (EngineArgs, {"model": "m", "quantization": "fp8"}),
    (SamplingParams, {"temperature": -1.0}),
]
refused = []
for kind, arguments in attempts:
    try:
        kind(**arguments)
    except (TypeError, ValueError) as error:
        refused.append(f"{type(error).__name__}: {error}")
print(*refused, sep="\n")
assert len(refused) == 4

# %% [markdown]
# None: a wrong value is an error, and so is what this engine cannot do.
#
# ## The map
#
# Inside `advance`, a request meets the other files. The number is the lesson that rebuilds each.
#
# ![llm.py checks a request; scheduler, runner, decoder and sampler run in a loop; outputs.py holds the
# answer. Below: what prefill and decode steps read.](../figures/request_path.svg)
#
# A request's first step, **prefill**, reads the whole prompt. Each later one, a **decode** step, reads
# only the newest token: the *keys and values* (KV) computed for the others are kept.
#
# ![Ten lessons, each with the files of nanovllm it ends in.](../figures/course_map.svg)
#
# ## Two numbers of this machine
#
# A computer **reads** a model's numbers from memory and **multiplies** them.
#
# | symbol | meaning |
# |:--|:--|
# | $\beta$ | bandwidth, bytes/s read from memory |
# | $F$ | FLOP/s of a large matrix product |
# | $P$ | parameters in the model's matrices |
# | $b$ | bytes of a number: 4 on a CPU, 2 on a GPU |
# | $k$ | bytes of one token's keys and values |
# | $R$, $C$ | requests in a step, tokens of each so far |
# | $T$ | tokens of a prompt |
#
# A FLOP is one multiplication or addition of floating-point numbers. First we sum up a buffer, again and
# again. A small one stays in the processor's caches, a large one comes from memory. **Predict** the curve.

# %%
from course.measure.peaks import record_peaks
from course.measure.timing import machine_peaks

llm.close()
device = "cuda" if torch.cuda.is_available() else "cpu"
peaks = machine_peaks(device)
record_peaks(peaks)  # into .course/peaks.json
limits = peaks.bandwidth, peaks.flops  # beta, F
sizes, rates = tour_lab.read_rates(device)
marks = {"the shipped model": 27_800_000}  # its weights in bytes, counted below
show(tour_plots.bandwidth_curve(sizes, rates, peaks.bandwidth, marks, HERE))
memory = tour_lab.memory_bytes(device)
print(f"{HERE}, {memory / 2**30:,.0f} GiB of memory")
print(f"beta {peaks.bandwidth / 1e9:,.1f} GB/s, F {peaks.flops / 1e9:,.0f} GFLOP/s")
print(f"in the time to read one byte it can do {peaks.flops / peaks.bandwidth:.0f} FLOPs")

# %% [markdown]
# A step down is a cache that no longer holds the buffer; the dashed line is $\beta$. (Buffers look slow where starting
# takes longer than reading: on a GPU, most of them.) **Reading is the expensive part**, unless what was read is
# used many times.
#
# ## Count on a toy
#
# To a matrix of a model, a token is a vector. Multiply the two number by number, adding to sums that begin
# at zero. **Predict** for 4 × 4: how many FLOPs, and how many bytes of matrix in float32?

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
# If $R$ requests share the matrix, it is read once and used $R$ times. Take a toy machine with $\beta$ = 16
# bytes/s and $F$ = 32 FLOP/s. Reading and computing overlap, so a step takes the longer of the two.
# **Predict** its seconds for 1, 4, 8 and 16 requests.


# %% tags=["nbval-check-output"]
def bound(num_bytes, flops, bandwidth, rate):
    """Seconds that a step takes at least."""
    return max(num_bytes / bandwidth, flops / rate)


for R in (1, 2, 4, 8, 16):
    seconds = bound(64, R * 32, bandwidth=16, rate=32)
    print(f"{R:>2} requests: {seconds:>2.0f} s a step, {R / seconds:.2f} tokens/s in all")
assert bound(64, 4 * 32, 16, 32) == bound(64, 32, 16, 32)

# %% [markdown]
# Reading takes 64 / 16 = 4 s, whoever shares it; computing takes 32 R / 32 = R seconds. Up to 4 requests a
# step is **memory-bound**: one more costs nothing. Beyond, it is **compute-bound**.
#
# ## Count the real model
#
# Lesson 01 says what these matrices do; here only sizes matter. A token is 256 numbers.
#
# | matrices | parameters |
# |:--|--:|
# | query, output: 256 × 256 each | 131,072 |
# | key, value: 256 × 128 each | 65,536 |
# | gate, up, down: 256 × 1,280 each | 983,040 |
# | **one layer of 5** | **1,179,648** |
# | **head**: 256 × 4,096 | **1,048,576** |
#
# **Predict** $P$; and $k$: a token keeps a key and a value of 128 numbers of 4 bytes in each layer.
#
# Then two checks. PyTorch counts FLOPs while transformers runs the model on 100 tokens: we expect 2 for each
# token and layer parameter, and the head once, for the last token. And each token of our first answer must have
# transformers' highest **logit**, its score of a possible next token.

# %%
from course.labs.reference import logits_along
from nanovllm.checkpoint.config_json import read_model_config

layers, head, kept = tour_lab.count(read_model_config(own_model()))
print(f"P = {layers:,} + {head:,} = {layers + head:,}, {4 * (layers + head):,} bytes in float32")
print(f"k = {4 * kept:,} bytes")

matrices, attention = tour_lab.reference_flops(own_model(), 100)
print(f"counted: {matrices:,} FLOPs in matrices, {attention:,} in attention")
assert matrices == 2 * layers * 100 + 2 * head  # the head for the last token alone
assert abs(attention / (5 * 2 * 2 * 100**2 * 4 * 64) - 1) < 1e-3  # 5 layers, 2 products

prompt_ids = answer.prompt_token_ids
logits = logits_along(own_model(), prompt_ids + ids)[len(prompt_ids) - 1 : -1]
behind = logits.max(dim=1).values - logits[range(len(ids)), ids]
print(f"{int((behind == 0).sum())} of {len(ids)} tokens are the reference's first choice")
assert behind.max() < 1e-3

# %% [markdown]
# The matrices are equal to the last FLOP. Attention multiplies $100 \times 100$ queries and keys, and the
# result with the values.
#
# ## Predict decode
#
# A decode step reads each parameter once, and the keys and values of each request's $C$ tokens:
#
# $$\text{bytes} = P\,b + R\,C\,k \qquad \text{FLOPs} \approx 2\,P\,R \qquad
# \text{seconds} \ge \max\left(\frac{\text{bytes}}{\beta},\ \frac{\text{FLOPs}}{F}\right)$$
#
# On a CPU we measure the shipped model, on a GPU a larger one with random weights: only shapes matter to speed.

# %%
choice = measured_model()
options["max_num_batched_tokens"] = 1024  # a prompt of 1,000 tokens fits into one step
llm = LLM(choice.path, **options)
config = llm.llm_engine.model_config
layers, head, kept = tour_lab.count(config)
P, b, k = layers + head, config.dtype.itemsize, kept * config.dtype.itemsize
print(f"{choice}\nP = {P:,}, b = {b}, k = {k:,}")
assert tour_lab.work(config, 3, 1, 20)[0] == P * b + 3 * 20 * k

# %% [markdown]
# **Predict** from these three, your $\beta$ and $C$ = 20: how many tokens a second does one request get?

# %%
batches = (1, 4, 16, 64)
decode = tour_lab.decode_steps(llm, batches)  # (requests, bytes, FLOPs, seconds) of each step
bounds = [bound(num_bytes, flops, *limits) for _, num_bytes, flops, _ in decode]
steps = [seconds for *_, seconds in decode]
print(f"one request: at most {1 / bounds[0]:,.0f} tokens/s, measured {1 / steps[0]:,.0f}")
print(f"its step: at least {1000 * bounds[0]:.2f} ms, measured {1000 * steps[0]:.2f}")

# %% [markdown]
# ## Where is the rest?
#
# Suspect a cost that each step has, whatever the model's size: Python, and the start of hundreds of
# operations. A **hollow** model has as many layers and hardly a weight. **Predict** its milliseconds a step.

# %%
fixed = tour_lab.hollow_seconds(llm, batches, **options)
sums = [least + cost for least, cost in zip(bounds, fixed, strict=True)]
print(f"hollow: {1000 * fixed[0]:.2f} ms, bound + hollow: {1000 * sums[0]:.2f} ms")
drawn = {"bound": bounds, "bound + hollow": sums, "measured": steps}
show(tour_plots.step_times(batches, drawn, f"{Path(choice.path).name}, {HERE}"))

# %% [markdown]
# **One request.** The fixed cost is of the bound's size; kernels also read more slowly than $\beta$. (Where the
# sum is too much, part of the weights stayed in a cache: the dotted line in the bandwidth curve.) **More
# requests** share the fixed cost. Then products of few rows are slower than the large one that gave $F$, and
# the bound leaves out norms and softmax. (A GPU has faster kernels for one row: hence its rise from 1 to 4.)
#
# 64 times the tokens for at most a few times the step: that is what a batch is worth. It does *not* help a single
# user, who now waits longer.
#
# ## Predict prefill
#
# A prompt is a batch by itself: each parameter is read for $T$ tokens. So prefill takes at least about
# $2\,P\,T / F$ seconds (less the head, which runs once), and never less than reading, $P\,b / \beta$. **Predict** the
# milliseconds for 256 tokens.

# %%
prefill = tour_lab.prefill_steps(llm, (16, 64, 256, 1000))
llm.close()
for T, num_bytes, flops, seconds in prefill:
    least = 1000 * bound(num_bytes, flops, *limits)
    print(f"{T:>5} tokens: at least {least:6.1f} ms, measured {1000 * seconds:6.1f}")

# %% [markdown]
# 16 tokens pay a fixed cost; on a large GPU all do, far more than decode's: a prompt's kernels are started one by one
# (lesson 07). Up to hundreds of rows a CPU falls short of $F$. At 1,000 it also multiplies all 1,000 × 1,000
# queries and keys, and masks half.
#
# ## The roofline
#
# To the right: FLOPs for each byte read. Upwards: FLOP/s. The roof is
# $\min(F,\ \beta \cdot \text{FLOP a byte})$. Each point is a step that you measured.

# %%
series = {"decode, by requests": decode, "prefill, by tokens": prefill}
show(tour_plots.roofline(peaks, series, f"{Path(choice.path).name}, {HERE}"))

# %% [markdown]
# Decode of one request stands far left, where arithmetic waits for memory. 64 requests and a prompt of 64 tokens
# do nearly as many FLOPs a byte: a matrix cannot tell whose a token is. The lessons move points to the right
# (batches) or up to the roof (kernels, graphs).
#
# ## In real vLLM
#
# At release v0.24.0:
# [`vllm/outputs.py`](https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/outputs.py#L85) and
# [`vllm/engine/arg_utils.py`](https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/engine/arg_utils.py#L414).
#
# 1. `EngineArgs` has 212 public fields there, 28 here. [A table](../docs/vllm_api.md) says what becomes of each.
# 2. `RequestOutput` drops unknown arguments with a warning; here nothing unknown is let in.
# 3. `RequestOutput.metrics` is `None` unless you ask for it with `disable_log_stats=False`: the engine
#    [does not fill it](https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/v1/engine/output_processor.py#L176).
#
# ## Exercises
#
# They begin with [lesson 01](../exercises/01_naive_generate.ipynb). One to take along: from how many requests
# of $C$ = 20 on is *your* machine's decode compute-bound?
#
# ## Recap
#
# An answer is one prefill and a decode step for each further token. Decode is limited by what it reads,
# $(P\,b + R\,C\,k)/\beta$, long prefill by arithmetic, $2\,P\,T/F$. A batch shares the reading, and each step's
# fixed cost.
#
# <details><summary>1. An H200 reads 4.6 TB/s. At most how many tokens a second does Qwen3-8B (P = 7.6 billion, b = 2) give one request?</summary>
#
# 15.2 GB / 4.6 TB/s = 3.3 ms a step: about 300.
#
# </details>
# <details><summary>2. You store weights in half the bytes. What gets faster?</summary>
#
# Decode of few requests, up to twice. Prefill only if smaller numbers multiply faster.
#
# </details>
# <details style='margin-bottom:1em'><summary>3. Ten times the FLOP/s, the same bandwidth: who notices?</summary>
#
# Long prompts, and large batches of short texts ($R\,C\,k$ grows with the batch, too); not the decode of one request.
#
# </details>
#
# **The next question**: what if each step reads the whole text again? Lesson 01 builds that engine.
