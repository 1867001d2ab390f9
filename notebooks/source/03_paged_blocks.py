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
# Lesson 02's cache gives each request a row as long as the longest may become, and most of it stays empty.
# Here a request takes memory as it grows, in small blocks, wherever one is free.
#
# ## What hurts now
#
# The mix of lesson 02's end: 16 requests, prompts of 8 to 64 tokens, answers of at most 128, and room for 1,536
# **places**, each for one token's key and value. A row has $64 + 128 = 192$ places. One is **live** if it holds a
# token of a request that still runs.

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

# %% [markdown]
# (The last token of an answer is never computed, so it needs no place.)
#
# **Predict** before you run: how many of the 16 does stage 02 hold at once? How many could it, if each took what
# it needs and no more? Write both down.


# %% tags=["nbval-check-output"]
class Log(Recorder):
    reports = ()

    def cache(self, reserved, live):  # the stage reports this at every step, in places
        self.reports += ((reserved, live),)


log, stage_02 = Log(len(prompts)), ContiguousCache(measured_model().path)
stage_02.prepare(mix)
stage_02.serve(mix, log)
stage_02.release()
live = sum(live for _, live in log.reports) / len(log.reports)
print(f"rows at once: {mix.kv_tokens // mix.max_len}; steps: {len(log.reports)}")
print(f"live on average: {live:.0f} of {mix.kv_tokens:,} places, {live / mix.kv_tokens:.0%}")
print(f"needed by all 16 together: {sum(prompts) + sum(outputs) - 16} places")
assert sum(prompts) + sum(outputs) - 16 < mix.kv_tokens

# %% [markdown]
# Eight at once, as $1536 / 192 = 8$, in two batches. All sixteen would fit.
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
# Take 32 places. A request reserves all it may ever need in one piece: the first free run that is long enough.

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

assert all([reserve("A", 8), reserve("B", 10), reserve("C", 6), reserve("D", 8)])
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
# A left 8 and C left 6, but the two holes do not touch. 11 of 32 places hold a token. 7 are empty **inside**
# reservations, for tokens that may never come. 14 are free **outside**, in pieces too small for E. These are
# internal and external fragmentation.
#
# </details>
#
# Moving B would close the gap, and copy all its keys and values. Operating systems took another way: memory in
# pieces of one size, so that any free piece fits. For keys and values this is PagedAttention
# ([Kwon et al.](https://arxiv.org/abs/2309.06180)).
#
# ## Step 2: table and slots, by hand
#
# A request with a prompt of ten tokens and a block size of 4 needs $\lceil 10 / 4 \rceil = 3$ blocks. Say it
# got blocks 5, 2 and 7, as in the picture. **Predict** the slots of tokens 4 and 6.

# %% tags=["nbval-check-output"]
block_size, table = 4, torch.tensor([5, 2, 7])
positions = torch.arange(10)
index, offset = positions // block_size, positions % block_size
slots = table[index] * block_size + offset
print("position  index  block  offset  slot")
for row in zip(positions, index, table[index], offset, slots, strict=True):
    print("{:8}{:7}{:7}{:8}{:6}".format(*map(int, row)))
assert (slots[4], slots[6], slots[9]) == (8, 10, 29)

# %% [markdown]
# Token 4 opens block 2, at slot $2 \cdot 4 + 0 = 8$; token 6 has offset 2, slot 10. Tokens 3 and 4 are neighbours in the text, not in memory.
#
# Some rows of a batch have no request behind them, as a recorded step (lesson 07) always has the same number of
# rows. What they compute must not be stored; their slot is −1. **Predict**: what does `cache[slots] =
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
# Index −1 is the **last** slot, somebody else's. Nothing crashes; another answer goes wrong.
#
# Now step 1's story again. Free blocks stand in a queue. A request takes the one at its head when its last block is
# full, and gives all back when it is done, the last one first. **Predict** E's table at 10 tokens.

# %%
from collections import deque

free, table_of = deque(range(8)), {name: [] for name in "ABCDE"}


def grow(name, num_tokens):
    """Take blocks from the queue until the table has room for num_tokens tokens."""
    while len(table_of[name]) * block_size < num_tokens:
        table_of[name].append(free.popleft())


def give_back(name):
    while table_of[name]:
        free.append(table_of[name].pop())  # the last block first


# %%
def frame(title, **tokens):
    for name, n in tokens.items():
        grow(name, n)
    lines = ["; ".join(f"{name}: {t}" for name, t in table_of.items() if t), f"free: {list(free)}"]
    return strip(block_cells(table_of, tokens, 8, block_size), title, lines, block_size)


frames = [frame("Four prompts are stored", A=3, B=4, C=2, D=3)]
frames += [frame("Two tokens later", A=5, B=6, C=4, D=5)]
give_back("A"), give_back("C")
frames += [frame("A and C are done", B=6, D=5), frame("E stores 4 tokens", B=6, D=5, E=4)]
frames += [frame("E has grown to 10 tokens", B=6, D=5, E=10)]
steps([f.svg() for f in frames], [f.title for f in frames], "The same memory as 8 blocks of 4")
assert table_of["E"] == [7, 4, 0]
held = [block for table in table_of.values() for block in table]
assert len(held) == len(set(held)), "a block has one owner"

# %% [markdown]
# E takes 7, the oldest free one, then 4 and 0, which A gave back. They need not touch: any free block serves
# anybody, and nothing is wasted outside. Inside, only a request's **last** block can have empty places, at most
# `block_size` − 1.
#
# ## Step 3: attention over scattered blocks
#
# Attention wants a request's keys in order. `k_cache[table]` copies the blocks that the table names, in its
# order: a **gather**.
#
# **Predict**: all of memory holds 99 before ten keys are stored. How many rows does the gather bring, and
# what is in the last ones?


# %%
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
# Twelve rows; the two of 99 belong to no token and are cut off. The rest are the very same numbers, so the
# result is equal **to the last bit**.
#
# In a batch, tables are padded to the longest with any id, and a mask hides what stands after a row's own tokens.
# **Predict**: one request has 10 tokens in 3 blocks, another 3 tokens in 1. Of the 24 gathered places, how many are
# masked?

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
# $2 + 9 = 11$. Block 0, which the padding names, may be another request's: it is read, with weight 0.
#
# ## Step 4: the engine's own
#
# `nanovllm/ops/attention.py` does this for all heads. Each layer has its own `k_cache` and `v_cache`; a block id
# means the same block in all of them, so one table serves all layers. First a step's rows (a row is one request in
# one step), and the store:

# %%
from course.reading import show_source
from nanovllm.ops import attention as ops

show_source(ops.Rows, ops.AttentionMetadata, ops.store_kv)

# %% [markdown]
# All rows' new tokens stand in one flat batch, decode rows first; `starts` says whose is which. For decode rows all
# follows from positions and tables. (`longest`, `plan` and `heads` are for kernels, lesson 06.)

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
for row, n in enumerate(lengths):  # all but the newest token, as earlier steps stored them
    at = torch.arange(n - 1)
    where = tables[row, at // block_size].long() * block_size + at % block_size
    ops.store_kv(keys[row][:-1], values[row][:-1], k_cache, v_cache, where)

rows = ops.plan_decodes(torch.tensor([9, 2, -1]), tables, k_cache, H)
print("slots:", rows.slot_mapping.tolist(), " tokens to read:", rows.context_lens.tolist())
rubbish = torch.zeros(1, H_kv, D)
newest = (torch.cat([x[0][-1:], x[1][-1:], rubbish]) for x in (keys, values))
ops.store_kv(*newest, k_cache, v_cache, rows.slot_mapping)
assert rows.slot_mapping.tolist() == [29, 6, -1]
assert (k_cache[7, 3] == 99).all(), "slot 31, the last one, was written"

# %%
show_source(ops.attend_decodes)

# %% [markdown]
# This is step 3: cut the tables to what the longest context needs (`-(-a // b)` rounds up), gather, mask, attend.
# `grouped` puts query heads that share a key head where a prompt's tokens would stand, so no key is copied for
# them. Prompts go one by one:

# %%
show_source(ops.attend_prompts, ops._attend_prompt)

# %% [markdown]
# `diagonal` is for a row whose first tokens were stored earlier: the $i$-th of `num_new` tokens sees those up
# to `length - num_new + i`. Check it all against keys that were never scattered, last of all a row with only 4 of
# its 10 tokens new.


# %%
def unscattered(query, key, value):
    """Attention of the last len(query) tokens [new, H, D] over contiguous keys [n, H_kv, D]."""
    mask = torch.ones(len(query), len(key)).tril(len(key) - len(query)).bool()
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k, v, attn_mask=mask, scale=0.5, enable_gqa=True).transpose(0, 1)


# %%
def agrees(out, query, new):
    """Both requests' part of `out` [tokens, H, D] is attention over their own keys."""
    for i, (ours, q) in enumerate(zip(out.split(new), query.split(new), strict=True)):
        torch.testing.assert_close(ours, unscattered(q, keys[i], values[i]))


query = torch.randn(3, H, D)
out = ops.attend_decodes(query, k_cache, v_cache, rows, scale=0.5)
agrees(out[:2], query[:2], new=(1, 1))
for new in ((10, 3), (4, 3)):
    query, starts = torch.randn(sum(new), H, D), torch.tensor([0, new[0], sum(new)])
    some = ops.Rows(torch.empty(0), torch.tensor(lengths), tables[:2], starts)
    agrees(ops.attend_prompts(query, k_cache, v_cache, some, scale=0.5), query, new)
print("decode rows, prompts and the rest of a prompt: equal to contiguous attention")

# %% [markdown]
# With `rope_store`, read in lesson 02, that is the whole file. Mind the order in every layer: all rows **store**,
# then all **read the cache**. So fresh and old keys need no separate code.
#
# ## Assemble: the BlockManager
#
# Your `grow` and `give_back` are half of the engine's `BlockManager`. It never sees a tensor: a `Sequence`, the
# engine's request, carries its `block_table` as a list.

# %%
from nanovllm.engine.block_manager import Block, BlockManager

m = BlockManager
show_source(Block, m.__init__, m.num_missing, m.allocate, m._take_oldest_free, m._acquire, m.free)

# %% [markdown]
# What the toy left out is for lesson 04, where requests share blocks: `ref_count`, in how many tables a block
# stands (here 0 or 1), and `hash`, `_cached`, `_uncache` and `num_registered`, by which blocks are found. A found
# block may leave the middle of the free queue, which a deque does slowly: hence the `OrderedDict`.
#
# Tell it the story of step 2. **Predict**: what is E's table this time?

# %% tags=["nbval-check-output"]
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams


def sequence(num_tokens):
    """A request, as the engine holds it."""
    return Sequence("some id", None, [0] * num_tokens, SamplingParams(), max_length=64)


manager = BlockManager(num_blocks=8, block_size=4, enable_prefix_caching=False)
seqs = {name: sequence(10) for name in "ABCDE"}
for name, num_tokens in zip("ABCDABCD", (3, 4, 2, 3, 5, 6, 4, 5), strict=True):
    manager.allocate(seqs[name], num_tokens)
manager.free(seqs["A"]), manager.free(seqs["C"])
manager.allocate(seqs["E"], 10)
print({name: seq.block_table for name, seq in seqs.items()}, " free:", manager.num_free_blocks)
assert {name: seq.block_table for name, seq in seqs.items()} == table_of

# %% [markdown]
# ## Check
#
# First the **invariants**, after each of 2,000 random arrivals and growths: no block is held twice, none is lost,
# and the slots of all tokens are distinct.


# %%
def advance(manager, running):
    """A request arrives or grows by a token; the first in line end until there is room."""
    arrives = not running or rng.random() < 0.1
    seq = sequence(rng.randint(1, 40)) if arrives else running.pop(rng.randrange(len(running)))
    seq.token_ids.append(0)
    while manager.num_missing(seq, len(seq.token_ids)) > manager.num_free_blocks:
        manager.free(running.pop(0))
    manager.allocate(seq, len(seq.token_ids))
    running.append(seq)


def check(manager, running):
    held = [block for seq in running for block in seq.block_table]
    assert len(held) == len(set(held)), "a block has two owners"
    assert len(held) + manager.num_free_blocks == manager.num_blocks, "a block is lost"
    slots = [s.block_table[i // 4] * 4 + i % 4 for s in running for i in range(len(s.token_ids))]
    assert len(slots) == len(set(slots)), "two tokens share a slot"
    return len(slots)


# %% tags=["nbval-check-output"]
manager, running = BlockManager(64, 4, enable_prefix_caching=False), []
live = []
for _ in range(2000):
    advance(manager, running)
    live.append(check(manager, running))
print(f"up to {max(live)} of 256 places live; every invariant held, 2,000 times")

# %% [markdown]
# Then **logits**, in float32: the real model, its cache in blocks of 4 in random order, the prompt in one pass and
# then a token a pass. `transformers` computes the whole text at once, with no cache.

# %%
from transformers import AutoTokenizer

from course.stages import Recompute
from course.stages.common import greedy

tokenizer = AutoTokenizer.from_pretrained(own_model())
chat = [{"role": "user", "content": "Tell me a story about a fox who finds a key."}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
plain = Recompute(own_model(), device="cpu")  # for its model and the torch attention
plain.prepare(mix)


# %%
def generate(prompt, count):
    """Greedy ids over scattered blocks, and the logits [count, vocab_size] they were taken from."""
    P, blocks = len(prompt), -(-(len(prompt) + count) // block_size)
    table = torch.randperm(blocks, dtype=torch.int32)[None]
    cache = plain.new_cache(blocks, block_size)  # [layers, 2, num_blocks, block_size, H_kv, D]
    at = torch.arange(P)
    slots = table[0, at // block_size].long() * block_size + at % block_size
    rows = ops.Rows(slots, torch.tensor([P]), table, starts=torch.tensor([0, P]))
    batch, ids, logits = ops.AttentionMetadata(at, None, rows), list(prompt), []
    while len(logits) < count:
        hidden = plain.model(torch.tensor(ids[-len(at) :]), cache, batch)  # the new tokens
        logits.append(plain.model.logits(hidden[-1:]))
        at = torch.tensor([len(ids)])  # where the next token will stand
        ids += greedy(logits[-1])[0]
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
# Of a request with $n$ tokens, the last block has $-n \bmod \text{block\_size}$ empty places: 0 to `block_size` − 1,
# and if all are equally likely $(\text{block\_size} - 1) / 2$ on average.
#
# **Predict** for block sizes of 16 and 256: how many empty places a request, and which share of what it holds, if
# requests have some 350 tokens? If they have 70?


# %%
import math

from course.block_pictures import waste_plot


def lengths_of(count, prompt_median, output_mean):
    """Each request's tokens at every step of its life: from its prompt on, one more each time."""
    for _ in range(count):
        prompt = 1 + int(rng.lognormvariate(math.log(prompt_median), 0.8))
        yield from range(prompt, prompt + 1 + int(rng.expovariate(1 / output_mean)))


# %%
sizes, wasted, shares = (1, 4, 16, 64, 256), {}, {}
for name, shape in {"long": (150, 150), "short": (30, 25)}.items():
    lengths = torch.tensor(list(lengths_of(1000, *shape))).double()
    name += f": {lengths.mean():.0f} tokens on average"
    wasted[name] = [(-lengths % size).mean().item() for size in sizes]
    shares[name] = [w / (w + lengths.mean().item()) for w in wasted[name]]
    print(name, [f"{w:.1f} ({s:.1%})" for w, s in zip(wasted[name], shares[name], strict=True)])
show(waste_plot(sizes, wasted, shares), f"Empty places a request at block sizes {sizes}: {wasted}")
assert abs(wasted[name][2] - 7.5) < 0.5

# %% [markdown]
# <details>
# <summary>Where the line holds, and where it does not</summary>
#
# At 16 both waste 7.5 places a request: 2% of what long ones hold, 10% of what short ones do. At 256 the long ones
# still follow the line, near 127, a quarter of what they hold. Few short ones fill even their first block: remainders
# are not equally likely, and three quarters are waste.
#
# </details>
#
# So why not blocks of 1, which waste nothing? A block is an entry in a table (4 bytes), an index to look up at
# every read, and a step for the manager. **Predict** the bytes of the tables of 8 requests of 1,024 tokens at block
# size 1. Is that much, beside their keys and values?


# %%
from course import machine
from course.benchmarks.roofline import kv_bytes_per_token
from course.timing import measure

device, config = stage_02.device, stage_02.config


def times(size):
    """Bytes of the tables; µs to gather one layer's keys, and to take and free all blocks."""
    keys = torch.randn(8192 // size, size, config.num_key_value_heads, config.head_dim)
    keys = keys.to(device, config.dtype)
    table = torch.randperm(len(keys), dtype=torch.int32, device=device).view(8, -1)
    manager, seq = BlockManager(len(keys), size), sequence(0)
    take_and_free = measure(lambda: (manager.allocate(seq, 8192), manager.free(seq)), 15)
    return 4 * table.numel(), measure(lambda: keys[table], 15).lowest, take_and_free.lowest


# %%
token_bytes = kv_bytes_per_token(config)
print(f"keys and values of 8 x 1,024 tokens: {8192 * token_bytes:,} bytes; {machine.describe()}")
print("block size  table bytes  empty, expected  gather a layer's keys  take and free all")
for size in sizes:
    table_bytes, gather, manage = times(size)
    empty = f"{8 * (size - 1) / 2 * token_bytes:,.0f} bytes"
    print(f"{size:10}{table_bytes:13,}{empty:>17}{1e6 * gather:20,.0f} µs{1e6 * manage:16,.0f} µs")

# %% [markdown]
# (Times are the fastest of 15.) Tables are small: 32 KiB at most. Small blocks cost work, in the gather and above
# all in the manager; large blocks cost memory. At 16 both are low, and that is the engine's default.
#
# ## Measure: the same room, more requests
#
# Stage 03 is the engine with later lessons' work switched off: blocks of 16, and batches that start together. A
# request is let in if there are blocks for all it may need. **Predict** for the first cell's mix: how many run at
# once in 96 blocks, and in how many steps? (Stage 02 took two batches, 196 steps.)

# %% tags=["nbval-check-output"]
from course.block_pictures import held_plot
from course.stages import PagedStatic
from course.stages.paged import live_tokens

stage_03 = PagedStatic(measured_model().path)
stage_03.prepare(mix)
engine, manager = stage_03.engine, stage_03.engine.block_manager
seqs, history = stage_03.add(mix), []
while engine.has_unfinished_requests():
    engine.advance()  # one step
    held = (manager.num_blocks - manager.num_free_blocks) * manager.block_size
    history.append((held, live_tokens(seqs, manager.block_size)))
    if len(history) == 1:
        print(f"{sum(seq.num_admissions for seq in seqs)} requests in the first step")
stage_03.release()
held, live = map(sum, zip(*history, strict=True))
print(f"{len(history)} steps; {live / held:.0%} of the held places are live")
assert all(live <= held for held, live in history)

# %%
fig = held_plot({"02: rows": log.reports, "03: blocks of 16": history}, mix.kv_tokens)
show(fig, "Stage 02 holds all places and fills an eighth; stage 03 holds little more than is live")

# %% [markdown]
# All sixteen at once. Of what is held 91% is live, not 12%. White below the dashed line is free; nobody uses it before
# the batch is done (lesson 05).
#
# Now the ladder's workload, three times for each stage, in turns. Its lengths differ less: on a CPU stage 02 has 4 rows,
# and stage 03 holds 4 or 5 requests (on a GPU 16, and about 20). At every step stage 03 gathers, that is copies, the
# keys and values of all rows in every layer; stage 02 need not. **Predict**: which is faster?

# %%
from course.records import record
from course.stages import compare
from course.workload import ladder_workload

del reference
plain.release()
workload = ladder_workload(stage_03.vocab_size)
print(workload)
runs = [(stage_02.run(workload), stage_03.run(workload)) for _ in range(3)]
for results in zip(*runs, strict=True):
    speed = record(results).numbers["tokens_per_second"]
    print(f"{results[0].number:02} {results[0].name}: {speed:,.0f} tokens a second")
print(compare(runs[0][1], runs[0][0]))

# %%
fig = plots.ladder(upto=3)
show(fig, fig.alt_text)

# %% [markdown]
# The marks for keys and values have not moved: both stages have the same room, and fill most of it at their best
# moment. (On a CPU the peak is the whole process, here with `transformers` loaded.) On a CPU stage 03 **need not be
# faster**: what larger batches win, copying may lose. Paging saves memory, and speed comes from what then fits.
#
# It does **not** help if all requests have one length, known ahead: rows then fit exactly, with no gather. In lesson
# 06 a kernel reads blocks where they lie, and the gather is gone.
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
#    blocks themselves, which allocates no object; ours is an `OrderedDict`, which keeps such a list inside.
# 3. Nothing is gathered: FlashAttention takes cache and tables, and asks for a block size
#    [that 16 divides](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/v1/attention/backends/flash_attn.py#L85-L87).
#
# ## Exercises
#
# In `exercises/03_paged_blocks.ipynb`:
#
# 1. **Predict** (5 min): blocks, empty places and slots of three requests at block sizes 4 and 16.
# 2. **Implement** (20 min): the slot mapping of a batch of prompts, padding rows included, without a loop.
# 3. **Implement** (15 min): a block manager's taking and giving back. It serves requests in the engine.
# 4. **Break and fix** (15 min): a manager that is wrong by one token at a block's border.

# %% [markdown]
# ## Recap
#
# Memory in blocks of one size has no useless holes, and a request wastes less than one block. Its block table says
# in which slot, `block_id * block_size + offset`, each token lies. Attention that gathers through the table gives the
# numbers of contiguous keys: paging changes what fits, not what is answered.
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
# <details><summary>3. Why is the slot of a token that must not be stored −1 and not 0?</summary>
#
# Slot 0 is somebody's. A slot below 0 exists nowhere, so it can be told apart and skipped.
#
# </details>
# <details><summary>4. Half of a cache's blocks are free. Can a request be refused for fragmentation?</summary>
#
# No. Any free block will do; it is refused only if there are too few.
#
# </details>
#
# **The next question**: many requests begin with the same tokens. Must each compute and hold them again?
