# %% [markdown]
# # 03 · Blocks instead of rows
#
# | This lesson | |
# |---|---|
# | Minutes | 55 |
# | Difficulty | medium |
# | Hardware | any laptop; a GPU is used in measurements if there is one |
# | Needs | lessons 00 to 02 |
# | Ends in | `nanovllm/ops/attention.py`; previews `nanovllm/engine/block_manager.py` |

# %% [markdown]
# Lesson 02's cache gives every request a row as long as the longest may become. Most of it stays empty.
# Here a request takes memory as it grows, in small blocks, wherever one is free.
#
# ## What hurts now
#
# The mix from the end of lesson 02: 16 requests, prompts of 8 to 64 tokens, answers of at most 128, and
# room for the keys and values of 1,536 tokens. A **place** holds one token's. A row has
# $64 + 128 = 192$ places. `Log` keeps, for each step, the places reserved and those that are **live**: they
# hold a token of a request that still runs.

# %%
import random

import torch

from course import plots
from course.models import measured_model, own_model
from course.stages import ContiguousCache, Recorder
from course.workload import LadderWorkload

torch.set_num_threads(1)
torch.set_grad_enabled(False)
plots.use_style()

rng = random.Random(1)
prompts = [64, *(rng.randint(8, 64) for _ in range(15))]
outputs = [*(min(128, 1 + int(rng.expovariate(1 / 30))) for _ in range(15)), 128]
mix = LadderWorkload([[7] * n for n in prompts], outputs, 0, kv_tokens=1536)
print("places each request will need:", [p + n - 1 for p, n in zip(prompts, outputs, strict=True)])


class Log(Recorder):
    reports = ()

    def cache(self, reserved, live):
        self.reports += ((reserved, live),)


# %% [markdown]
# (The last token of an answer is never computed, so it needs no place.)
#
# **Predict** before you run: how many of the 16 can stage 02 hold at once? How many could the room hold if
# each took what it needs and no more? Write both down.

# %% tags=["nbval-check-output"]
log, contiguous_stage = Log(len(prompts)), ContiguousCache(measured_model().path)
contiguous_stage.prepare(mix)
contiguous_stage.serve(mix, log)
contiguous_stage.release()
live = sum(live for _, live in log.reports) / len(log.reports)
print(f"rows at once: {mix.kv_tokens // mix.max_len}; steps: {len(log.reports)}")
print(f"live on average: {live:.0f} of {mix.kv_tokens:,} places, {live / mix.kv_tokens:.0%}")
print(f"needed by all 16 together: {sum(prompts) + sum(outputs) - 16} places")
assert sum(prompts) + sum(outputs) - 16 < mix.kv_tokens

# %% [markdown]
# Eight at once, in two batches. All sixteen would have fitted.
#
# ## What you will be able to do
#
# 1. **Compute** a token's slot from its request's block table.
# 2. **Show** that attention over scattered blocks is the attention of lesson 02, and read the engine's.
# 3. **Choose** a block size from measured waste and measured costs.
#
# ## The picture, and the symbols
#
# ![A block table: ten tokens in three rows of four lead through the table 5, 2, 7 to blocks 5, 2 and 7 of memory; token 9 lies in slot 29.](../figures/paged_blocks.svg)
#
# | symbol | meaning | toy | engine |
# |:--|:--|--:|--:|
# | block | `block_size` places that lie together | 4 | 16 |
# | block table | a request's block ids, in the order of its tokens | `[5, 2, 7]` | |
# | slot | a place's number in all of memory: `block_id * block_size + offset` | 0–31 | |
# | $H$, $H_{kv}$, $D$ | query heads; key and value heads; numbers in a head | 4, 2, 4 | 4, 2, 64 |
# | `k_cache` | a layer's keys: `[num_blocks, block_size, H_kv, D]`; `v_cache` alike | 8 blocks | |

# %% [markdown]
# ## Step 1: two kinds of waste
#
# Take a memory of 32 places. A request reserves, in one piece, all it may ever need: the first run of
# free places that is long enough.

# %%
memory = [None] * 32  # who has reserved each place


def reserve(name, size):
    """Give `name` the first run of `size` free places; say whether there was one."""
    for start in range(len(memory) - size + 1):
        if not any(memory[start : start + size]):
            memory[start : start + size] = [name] * size
            return True
    return False


def release(name):
    memory[:] = [None if owner == name else owner for owner in memory]


# %% [markdown]
# A, B, C and D reserve 8, 10, 6 and 8 places and fill some. Then A and C finish, and E asks for 10.
#
# **Predict**: how many places are free then? Does E get its 10?

# %%
from course.block_pictures import block_cells, count, reserved_cells, strip
from course.display import show, steps

for name, size in {"A": 8, "B": 10, "C": 6, "D": 8}.items():
    assert reserve(name, size)
tokens = {"A": 3, "B": 4, "C": 2, "D": 3}  # stored: the prompts
frames = [strip(reserved_cells(memory, tokens), "Four prompts are stored")]
tokens = {name: n + 2 for name, n in tokens.items()}
frames.append(strip(reserved_cells(memory, tokens), "Two tokens later"))
release("A"), release("C")
frames.append(strip(reserved_cells(memory, tokens), "A and C are done"))
fits = reserve("E", 10)
cells = reserved_cells(memory, tokens, refused=not fits)
frames.append(strip(cells, "E asks for 10 places and is refused"))
steps([f.svg() for f in frames], [f.title for f in frames], "32 places, reserved in one piece")
assert not fits
assert (count(cells, "live"), count(cells, "inside"), count(cells, "outside")) == (11, 7, 14)

# %% [markdown]
# <details>
# <summary>14 are free, and E waits</summary>
#
# A left 8, C left 6, and the two holes do not touch. Of 32 places 11 hold a token. **Inside** reservations,
# 7 are empty: B and D may need them later, or never. **Outside**, 14 are free, and in pieces too small for
# E. These are internal and external fragmentation.
#
# </details>
#
# Moving B to close the gap would copy all its keys and values, again and again. The other way is the one
# operating systems took: give memory out in pieces of one size, and any free piece fits.
#
# ## Step 2: table and slots, by hand
#
# A request with a prompt of ten tokens and a block size of 4 needs $\lceil 10 / 4 \rceil = 3$ blocks. Say it
# got blocks 5, 2 and 7. **Predict** the slots of tokens 4 and 9.

# %% tags=["nbval-check-output"]
block_size, table = 4, torch.tensor([5, 2, 7])
positions = torch.arange(10)
index, offset = positions // block_size, positions % block_size
slots = table[index] * block_size + offset
print("position  index  block  offset  slot")
for row in zip(positions, index, table[index], offset, slots, strict=True):
    print("{:8}{:7}{:7}{:8}{:6}".format(*map(int, row)))
assert (slots[4], slots[9]) == (8, 29)

# %% [markdown]
# Token 4 opens the second block, 2: slot $2 \cdot 4 + 0 = 8$. Neighbours in a block are neighbours in memory;
# tokens 3 and 4 are far apart.
#
# Some tokens of a batch must not be stored at all. A recorded step (lesson 07) always has the same number
# of rows, and rows with no request compute rubbish. Their slot is −1. **Predict**: what does `memory[slots] =
# numbers` do with it?

# %% tags=["nbval-check-output"]
numbers, targets = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([8, 29, -1])
careless, careful = torch.zeros(2, 32)
careless[targets] = numbers
wanted = targets >= 0
careful[targets[wanted]] = numbers[wanted]
print("careless: slots", careless.nonzero().flatten().tolist())
print("careful:  slots", careful.nonzero().flatten().tolist())
assert careful[-1] == 0

# %% [markdown]
# Index −1 is the **last** slot, some other request's token. Nothing would crash; an answer would be wrong.
#
# Now the story of step 1 again. Free blocks stand in a queue. A request takes the one at the head when its
# last block is full, and gives all back when it is done. **Predict** E's table for 10 tokens.

# %%
from collections import deque

free, tables = deque(range(8)), {name: [] for name in "ABCDE"}


def grow(name, num_tokens):
    """Take blocks from the queue until the table has room for num_tokens tokens."""
    while len(tables[name]) * block_size < num_tokens:
        tables[name].append(free.popleft())


def give_back(name):
    while tables[name]:
        free.append(tables[name].pop())  # the last block first


# %%
def frame(title, tokens):
    for name, n in tokens.items():
        grow(name, n)
    lines = ["  ".join(f"{name}: {t}" for name, t in tables.items() if t), f"free: {list(free)}"]
    return strip(block_cells(tables, tokens, 8, block_size), title, lines, block_size)


frames = [frame("Four prompts are stored", {"A": 3, "B": 4, "C": 2, "D": 3})]
frames.append(frame("Two tokens later", {"A": 5, "B": 6, "C": 4, "D": 5}))
give_back("A"), give_back("C")
frames.append(frame("A and C are done", {"B": 6, "D": 5}))
frames.append(frame("E stores a prompt of 4", {"B": 6, "D": 5, "E": 4}))
frames.append(frame("E has grown to 10 tokens", {"B": 6, "D": 5, "E": 10}))
steps([f.svg() for f in frames], [f.title for f in frames], "The same memory as 8 blocks of 4")
assert tables["E"] == [7, 4, 0]
held = sum(tables.values(), [])
assert len(held) == len(set(held)), "a block has one owner"

# %% [markdown]
# E fits, and nothing was reserved ahead. Outside, nothing is wasted: every free block is of use to anybody.
# Inside, only a request's **last** block can have empty places, at most `block_size` − 1.
#
# ## Step 3: attention over scattered blocks
#
# Attention wants a request's keys in order. `k_cache[table]` fetches them: indexing with a tensor copies the
# blocks it names, in its order. This is a **gather**.
#
# **Predict**: all of memory holds 99 before ten keys are stored. How many rows does the gather bring, and
# what is in the last ones?

# %% tags=["nbval-check-output"]
def attention(q, k, v):
    return (q @ k.T / 2).softmax(-1) @ v  # one query; 2 is the root of the dimension


torch.manual_seed(0)
K, V = torch.randint(-2, 3, (2, 10, 4)).double()
q = torch.ones(1, 4).double()
k_cache, v_cache = torch.full((2, 8, block_size, 4), 99.0).double()
k_cache.flatten(0, 1)[slots], v_cache.flatten(0, 1)[slots] = K, V
gathered = k_cache[table].flatten(0, 1)
print(gathered.int())
assert torch.equal(gathered[:10], K)
paged = attention(q, gathered[:10], v_cache[table].flatten(0, 1)[:10])
assert torch.equal(paged, attention(q, K, V))

# %% [markdown]
# Three blocks are twelve rows. The two of 99 belong to no token and are cut off. The rest are the very same
# numbers, so the result is equal **to the last bit**: where a key lies does not enter the formula.
#
# In a batch, requests differ in length. Tables are padded to the longest with any id, and a mask hides all
# that stands after a row's own tokens. **Predict**: with tables of 3 and 1 blocks and contexts of 10 and 3
# tokens, how many of the gathered places are masked?

# %% tags=["nbval-check-output"]
both = torch.tensor([[5, 2, 7], [1, 0, 0]])  # the second request has block 1; the zeros are padding
contexts = torch.tensor([10, 3])
k_cache[1, :3], v_cache[1, :3] = K[:3], V[:3]
k, v = k_cache[both].flatten(1, 2), v_cache[both].flatten(1, 2)  # [2, 12, 4]
mask = torch.arange(12) < contexts[:, None]
scores = (q @ k.mT / 2).masked_fill(~mask[:, None], -torch.inf)
out = (scores.softmax(-1) @ v)[:, 0]
print(f"{(~mask).sum()} of {mask.numel()} places masked")
torch.testing.assert_close(out[:1], attention(q, K, V))
torch.testing.assert_close(out[1:], attention(q, K[:3], V[:3]))

# %% [markdown]
# $2 + 9 = 11$. Block 0, which the zeros name, may be another request's: it is read, and has weight 0.
#
# ## Step 4: the engine's own
#
# `nanovllm/ops/attention.py` does this for all heads. First what a step says about its rows, and the store:

# %%
from course.reading import show_source
from nanovllm.ops import attention as ops

show_source(ops.Rows, ops.store_kv)

# %% [markdown]
# A row is one request in one step. `starts` says which tokens of the flat batch are its new ones. For decode
# rows, which have one new token each, everything follows from positions and tables:

# %%
show_source(ops.plan_decodes)

# %% [markdown]
# **Predict**: positions are 9, 2 and −1 (no such row), tables `[5, 2, 7]`, `[1, 0, 0]` and zeros. Which slots,
# and how many tokens does each row read?

# %% tags=["nbval-check-output"]
H, H_kv, D, lengths = 4, 2, 4, (10, 3)
keys, values = ([torch.randn(n, H_kv, D) for n in lengths] for _ in range(2))
k_cache, v_cache = torch.full((2, 8, block_size, H_kv, D), 99.0)
tables = torch.tensor([[5, 2, 7], [1, 0, 0], [0, 0, 0]], dtype=torch.int32)
for row, n in enumerate(lengths):
    at = torch.arange(n)
    where = tables[row, at // block_size].long() * block_size + at % block_size
    ops.store_kv(keys[row], values[row], k_cache, v_cache, where)

rows = ops.plan_decodes(torch.tensor([9, 2, -1]), tables, k_cache, H)
print("slots:", rows.slot_mapping.tolist(), " tokens to read:", rows.context_lens.tolist())
assert rows.slot_mapping.tolist() == [29, 6, -1]

# %%
show_source(ops.attend_decodes)

# %% [markdown]
# `tables` is cut to the blocks that the longest context needs (`-(-a // b)` rounds up); then gather, mask,
# attention, as in step 3. `grouped` puts the query heads that share a key head where a prompt's tokens would
# stand, so no key is copied for them. Prompts go one by one, as each has another length:

# %%
show_source(ops.attend_prompts, ops._attend_prompt)

# %% [markdown]
# The mask's `diagonal` is for a row whose first tokens were computed earlier: new token $i$ of the last
# `num_new` sees tokens up to `length - num_new + i`. Check both against attention over keys that were never
# scattered; the last case is such a row, the last 4 of 10 tokens.


# %%
def unscattered(query, key, value):
    """Attention of the last len(query) tokens [new, H, D] over contiguous keys [n, H_kv, D]."""
    mask = torch.ones(len(query), len(key)).tril(len(key) - len(query)).bool()
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k, v, attn_mask=mask, scale=0.5, enable_gqa=True).transpose(0, 1)


query = torch.randn(3, H, D)
out = ops.attend_decodes(query, k_cache, v_cache, rows, scale=0.5)
for i in range(2):
    torch.testing.assert_close(out[i : i + 1], unscattered(query[i : i + 1], keys[i], values[i]))

for new in ((10, 3), (4, 3)):
    query, starts = torch.randn(sum(new), H, D), torch.tensor([0, new[0], sum(new)])
    some = ops.Rows(torch.empty(0), torch.tensor(lengths), tables[:2], starts)
    out = ops.attend_prompts(query, k_cache, v_cache, some, scale=0.5)
    for i, part in enumerate(query.split(new)):
        expected = unscattered(part, keys[i], values[i])
        torch.testing.assert_close(out[starts[i] : starts[i + 1]], expected)
print("decode rows, prompts and the rest of a prompt: equal to contiguous attention")

# %% [markdown]
# That is the file but for `rope_store`, read in lesson 02, and `AttentionMetadata`, which holds a step's decode
# rows and its prompts. Note the order in every layer: all rows **store**, then all **read the cache**. Fresh and
# old keys need no separate code.
#
# ## Assemble: the BlockManager
#
# Your `free`, `grow` and `give_back` are this part of the engine's `BlockManager`. It never sees a tensor.

# %%
from nanovllm.engine.block_manager import BlockManager

parts = "__init__ num_missing allocate _take_oldest_free _acquire free".split()
show_source(*(getattr(BlockManager, part) for part in parts))

# %% [markdown]
# What the toy left out is for lesson 04, where requests share blocks. `ref_count` counts the tables that a block
# stands in; here it is 0 or 1. `_cached`, `_uncache` and `num_registered` are about finding blocks by content. And
# the free queue is a **dict**, which keeps the order of insertion: its first key is the oldest, and unlike a
# deque it lets go of one in the middle at once.
#
# **Predict**: a manager has 4 blocks of 4. A takes room for 6 tokens, B for 3; A is freed; C takes room for
# 9. What is C's table?

# %% tags=["nbval-check-output"]
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams


def sequence(name, num_tokens):
    return Sequence(name, None, [0] * num_tokens, SamplingParams(), max_length=64)


manager = BlockManager(num_blocks=4, block_size=4, enable_prefix_caching=False)
a, b, c = sequence("A", 6), sequence("B", 3), sequence("C", 9)
manager.allocate(a, 6)
manager.allocate(b, 3)
print("A:", a.block_table, " B:", b.block_table, " free:", list(manager._free))
manager.free(a)
print("A is freed; free:", list(manager._free))
manager.allocate(c, 9)
print("C:", c.block_table)
assert c.block_table == [3, 1, 0]

# %% [markdown]
# ## Check
#
# First the **invariants**, after each of 2,000 random arrivals, growths and ends: no block is held twice, none
# is lost, and the slots of all live tokens are distinct.


# %% tags=["nbval-check-output"]
def check(manager, running):
    held = [block for seq in running for block in seq.block_table]
    assert len(held) == len(set(held)), "a block has two owners"
    assert len(held) + manager.num_free_blocks == manager.num_blocks, "a block is lost"
    slots = [s.block_table[i // 4] * 4 + i % 4 for s in running for i in range(len(s.token_ids))]
    assert len(slots) == len(set(slots)), "two tokens share a slot"
    return len(slots)


manager, running, most = BlockManager(64, 4, enable_prefix_caching=False), [], 0
for _ in range(2000):
    seq = rng.choice(running) if running and rng.random() < 0.9 else sequence("", rng.randint(1, 40))
    if seq in running:
        seq.token_ids.append(0)
    if manager.num_missing(seq, len(seq.token_ids)) <= manager.num_free_blocks:
        manager.allocate(seq, len(seq.token_ids))
        running += [seq] if seq not in running else []
    else:  # no room: the oldest ends, and this one tries no more
        manager.free(running.pop(0))
        running = [r for r in running if r is not seq or manager.free(r)]
    most = max(most, check(manager, running))
print(f"at most {most} of 256 places live; every invariant held")

# %% [markdown]
# Then **logits**, in float32. The real model, its cache in blocks of 4 that lie in random order; the prompt in one
# pass, then a token a pass. `transformers` computes the whole text at once and has no cache at all.

# %%
from transformers import AutoTokenizer

from course.stages import Recompute
from course.stages.common import greedy

tokenizer = AutoTokenizer.from_pretrained(own_model())
chat = [{"role": "user", "content": "Tell me a story about a fox who finds a key."}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
plain = Recompute(own_model(), device="cpu")  # for its model, loaded with the torch twin
plain.prepare(mix)


def generate(prompt, count):
    """Greedy ids over scattered blocks, and the logits [count, vocab_size] they were taken from."""
    P, blocks = len(prompt), -(-(len(prompt) + count) // block_size)
    table = torch.randperm(blocks, dtype=torch.int32)[None]
    cache = plain.new_cache(blocks, block_size)  # [layers, 2, num_blocks, block_size, H_kv, D]
    at, starts = torch.arange(P), torch.tensor([0, P])
    slots = table[0, at // block_size].long() * block_size + at % block_size
    rows = ops.Rows(slots, torch.tensor([P]), table, starts, longest=P)
    batch, ids, logits = ops.AttentionMetadata(at, None, rows), list(prompt), []
    for position in range(P, P + count):
        hidden = plain.model(torch.tensor(ids[-len(at) :]), cache, batch)
        logits.append(plain.model.logits(hidden[-1:]))
        ids += greedy(logits[-1])[0]
        at = torch.tensor([position])
        rows = ops.plan_decodes(at, table, cache[0, 0], plain.config.num_attention_heads)
        batch = ops.AttentionMetadata(at, rows, None)
    return ids[P:], torch.cat(logits)


# %%
import textwrap

from transformers import AutoModelForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
reference = AutoModelForCausalLM.from_pretrained(own_model(), dtype=torch.float32)
N = 64
answer, ours = generate(prompt, N)
theirs = reference(torch.tensor([prompt + answer[:-1]])).logits[0, -N:]
print(textwrap.fill(tokenizer.decode(answer), 90))
print(f"\n{N} rows of logits differ by {(ours - theirs).abs().max():.0e} at most")
torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)

best, second = theirs.topk(2).values.T
certain = ([*(best - second < 1e-4).tolist(), True]).index(True)  # up to the first near tie
assert answer[:certain] == theirs.argmax(-1).tolist()[:certain]
print(f"{certain} of {N} greedy tokens compared: all equal")

# %% [markdown]
# ## Measure: waste against block size
#
# When a request has $n$ tokens, its last block has $-n \bmod \text{block\_size}$ empty places. If all remainders
# are equally likely, these are 0 to `block_size` − 1, and $(\text{block\_size} - 1) / 2$ on average.
#
# **Predict** for block sizes of 16 and 256: how many empty places a request, and which share of what it holds, if
# requests have some 300 tokens? And if they have 50?


# %%
from course.block_pictures import waste_plot


def lengths_of(count, prompt_median, output_mean):
    """Each request's tokens at every step of its life: from its prompt on, one more each time."""
    for _ in range(count):
        prompt = 1 + int(rng.lognormvariate(torch.tensor(prompt_median).log().item(), 0.8))
        yield from range(prompt, prompt + 1 + int(rng.expovariate(1 / output_mean)))


sizes, wasted, shares = (1, 4, 16, 64, 256), {}, {}
for name, shape in {"long requests": (150, 150), "short requests": (30, 25)}.items():
    lengths = torch.tensor(list(lengths_of(1000, *shape)))
    name += f": {lengths.float().mean():.0f} tokens on average"
    empty = torch.stack([-lengths % size for size in sizes]).float().mean(1)
    wasted[name], shares[name] = empty.tolist(), (empty / (empty + lengths.float().mean())).tolist()
    print(name, "->", [f"{w:.1f} ({s:.0%})" for w, s in zip(wasted[name], shares[name], strict=True)])
show(waste_plot(sizes, wasted, shares), "Empty places follow the line; their share grows with size")
assert abs(wasted[name][2] - 7.5) < 0.5

# %% [markdown]
# <details>
# <summary>Where the line holds, and where it does not</summary>
#
# At 16 either mix wastes 7.5 places a request. At 256 the long ones follow the line, near 127. The short ones
# waste far more, as hardly any fills its first block: there is no remainder to be equally likely.
#
# </details>
#
# So why not blocks of 1, which waste nothing? Each block is an entry in a table, 4 bytes, sent to the GPU and
# looked up for every read. **Predict** how large the tables of 8 requests with 1,024 tokens are at block size 1, and
# which block size gathers their keys fastest.

# %%
from course import machine
from course.timing import measure

device, config = contiguous_stage.device, contiguous_stage.config
heads = (config.num_key_value_heads, config.head_dim)
print(f"one layer's keys, 8 x 1,024 tokens; {machine.describe()}")
for size in sizes:
    blocks = 8 * 1024 // size
    keys = torch.randn(blocks, size, *heads, dtype=config.dtype, device=device)
    table = torch.randperm(blocks, dtype=torch.int32, device=device).view(8, -1)
    empty = [size / 2 - 0.5] * 8
    time = measure(lambda keys=keys, table=table: keys[table], repeats=9)
    print(f"block size {size:>3}: tables {4 * table.numel():>6,} bytes; gather {time}")
rows = keys.view(8, 1024, *heads)
print(f"a plain copy of contiguous keys: {measure(lambda: rows.clone(), repeats=9)}")

# %% [markdown]
# Small blocks cost table and index work, large ones cost memory: 16 wastes a few percent, and its gather is near a
# plain copy. Our engine takes 16, as vLLM does on most GPUs.
#
# ## Measure: the same room, more requests
#
# Stage 03 is the engine with all later lessons switched off: blocks of 16, batches that start together. A request
# is let in if there are blocks for all it may need. **Predict** for the mix of the first cell: how many of the 16 run
# at once in 96 blocks, and how many steps does it take? (Stage 02 took two batches.)

# %%
from course.block_pictures import held_plot
from course.stages import PagedStatic
from course.stages.paged import live_tokens

paged_stage = PagedStatic(measured_model().path)
paged_stage.prepare(mix)
engine, manager = paged_stage.engine, paged_stage.engine.block_manager
seqs, history, most = paged_stage.add(mix), [], 0
while engine.has_unfinished_requests():
    engine.advance()  # one step
    held = (manager.num_blocks - manager.num_free_blocks) * manager.block_size
    history.append((held, live_tokens(seqs, manager.block_size)))
    most = max(most, sum(bool(seq.block_table) for seq in seqs))
paged_stage.release()
live, held = sum(live for _, live in history), sum(held for held, _ in history)
print(f"{most} at once, {len(history)} steps; {live / held:.0%} of the held places are live")
runs = {"02: rows": log.reports, "03: blocks of 16": history}
show(held_plot(runs, mix.kv_tokens), "Rows hold all and fill little; blocks hold what is live")
assert all(live <= held for held, live in history)

# %% [markdown]
# What blocks hold is live but for the last ones. Now the workload of the ladder. **Predict**: stage 03 gathers, that
# is copies, all keys and values at every step, which stage 02 need not. Its batches are larger. Which is faster
# here?

# %%
from course.records import load, record
from course.stages import compare
from course.workload import ladder_workload

del reference
plain.release()
workload = ladder_workload(paged_stage.vocab_size)
print(workload)
old, new = ([stage.run(workload) for _ in range(2)] for stage in (contiguous_stage, paged_stage))
for runs in (old, new):
    print(runs[1])
    record(runs)
print(compare(new[0], old[0]))

# %%
fig = plots.ladder(upto=3)
show(fig, fig.alt_text)

# %% [markdown]
# On a CPU stage 03 **need not be faster**, and for some workloads it is slower: each layer copies the whole context
# of every row before it attends. Paging is about memory; speed comes from what fits in it. It does **not** help
# when all requests have one length, known ahead: rows fit them exactly and need no gather. The gather itself goes away
# in lesson 06, where a kernel reads blocks where they lie.
#
# ## In real vLLM
#
# Release v0.11.0 hands out blocks in `get_new_blocks`, in
# [`vllm/v1/core/block_pool.py`](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/v1/core/block_pool.py#L257-L284);
# your slots are in
# [`block_table.py`](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/v1/worker/block_table.py#L107-L113).
# Three differences:
#
# 1. Block 0 is never given out: it is a
#    [`null_block`](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/v1/core/block_pool.py#L154-L158) that fills
#    tables where nothing is to be read.
# 2. The free queue is a
#    [linked list](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/v1/core/kv_cache_utils.py#L216-L231) through the
#    blocks themselves, which allocates no Python object; ours is a dict.
# 3. Nothing is gathered: FlashAttention takes cache and tables, and asks for a block size
#    [that 16 divides](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/v1/attention/backends/flash_attn.py#L85-L87).
#
# ## Exercises
#
# In `exercises/03_paged_blocks.ipynb`:
#
# 1. **Predict** (5 min): blocks, empty places and slots of three requests at block sizes 4 and 16.
# 2. **Implement** (20 min): the slot mapping of a batch of prompts, padding rows included, without a loop.
# 3. **Break and fix** (15 min): a manager that frees a request's blocks while it is still in the batch.

# %% [markdown]
# ## Recap
#
# Memory in blocks of one size has no useless holes, and a request's waste is less than one block. A block table
# and a slot, `block_id * block_size + offset`, say where each token lies. Attention that gathers through the table
# gives the same numbers as over contiguous keys, so paging changes what fits, not what is answered.
#
# **Check yourself.**
#
# <details><summary>1. Block size 16, table [3, 9]. Which slot has token 20?</summary>
#
# $20 = 16 + 4$: second block, offset 4. $9 \cdot 16 + 4 = 148$.
#
# </details>
# <details><summary>2. A request of 33 tokens and block size 16: how many blocks, and how many places empty?</summary>
#
# 3 blocks, 48 places, 15 empty: the worst case.
#
# </details>
# <details><summary>3. Why may a table be padded with any block's id?</summary>
#
# What it brings stands after the row's own tokens, and the mask gives it weight 0.
#
# </details>
# <details><summary>4. Why is the slot of a token that must not be stored −1 and not 0?</summary>
#
# Slot 0 is somebody's. A slot below 0 exists nowhere, so it can be told apart and skipped.
#
# </details>
# <details><summary>5. Half of a cache's blocks are free. Can a request be refused for fragmentation?</summary>
#
# No. Any free block will do; it is refused only if there are too few.
#
# </details>
#
# **The next question**: many requests begin with the same tokens. Must each compute and hold them again?
