# %% [markdown]
# # 03 · Blocks instead of rows
#
# | This lesson | |
# |---|---|
# | Minutes | 45 |
# | Difficulty | medium |
# | Hardware | any laptop; a GPU is used in measurements if there is one |
# | Needs | lessons 00 to 02 |
# | Ends in | `nanovllm/layers/attention.py`, `nanovllm/metadata.py` |

# %% [markdown]
# ## What hurts now
#
# 16 requests, prompts of up to 64 tokens, answers of up to 128, have room for 1,536 **places**, each for one token's key and
# value; together they need 1,129. A row of stage 02 has $64 + 128 = 192$. A place is **live** if it holds a token of a
# request that runs. **Predict**: how many run at once, and what share of places is live on average?

# %% tags=["nbval-check-output"]
import torch

from course.labs.paging import rows_history, short_answers
from course.models.choice import measured_model
from course.show import plots
from course.stages import ContiguousCache

torch.set_num_threads(1)
torch.set_grad_enabled(False)
plots.use_style()
mix, stage_02 = short_answers(), ContiguousCache(measured_model().path)
rows_02 = rows_history(stage_02, mix)  # (places held, places live) at each step
live = sum(live for _, live in rows_02) / len(rows_02)
print(f"rows at once: {mix.kv_tokens // mix.max_len}; steps: {len(rows_02)}")
print(f"live on average: {live:.0f} of {mix.kv_tokens:,} places, {live / mix.kv_tokens:.0%}")
needed = sum(map(len, mix.prompts)) + mix.num_output_tokens - 16  # a last token is not computed
assert needed == 1129

# %% [markdown]
# All sixteen would fit, if each took memory as it grows.
#
# ## What you will be able to do
#
# 1. **Compute** a token's slot from a block table.
# 2. **Show** that attention over scattered blocks changes nothing.
# 3. **Choose** a block size.
#
# ## The picture, and the symbols
#
# ![Ten tokens lie in blocks 5, 2 and 7; token 9 in slot 29.](../figures/paged_blocks.svg)
#
# | symbol | meaning | toy |
# |:--|:--|--:|
# | block | `block_size` places together | 4 |
# | block table | a request's block ids, in order | `[5, 2, 7]` |
# | slot | a place's number: `block_id * block_size + offset` | 0–31 |
# | `H`, `H_kv`, `D` | query heads; KV heads; numbers each | 4, 2, 4 |
# | `k_cache` | keys: `[num_blocks, block_size, H_kv, D]`; `v_cache` alike | 8 blocks |
#
# ## Step 1: two kinds of waste
#
# Of 32 places, requests reserve all they may ever need in one piece: A 8, B 10, C 6, D 8. A and C finish, and E asks for 10.
# **Predict**: how many are free? Does E get its 10?

# %%
from course.drawings.block_pictures import block_strip, count, reserved_cells, strip
from course.show.display import show, steps

memory = [None] * 32  # who has reserved each place


def reserve(name, size):
    """Give `name` the first run of `size` free places; say whether there was one."""
    for start in range(len(memory) - size + 1):
        if not any(memory[start : start + size]):
            memory[start : start + size] = [name] * size
            return True
    return False


assert all([reserve("A", 8), reserve("B", 10), reserve("C", 6), reserve("D", 8)])
memory = [None if name in ("A", "C") else name for name in memory]  # A and C are done
fits = reserve("E", 10)
cells = reserved_cells(memory, {"B": 6, "D": 5}, refused=not fits)  # B holds 6 tokens, D 5
picture = strip(cells, "E asks for 10 places and is refused")
show(picture.svg(), picture.alt)
assert not fits
assert (count(cells, "live"), count(cells, "inside"), count(cells, "outside")) == (11, 7, 14)

# %% [markdown]
# <details>
# <summary>14 are free, and E waits</summary>
#
# The holes of 8 and 6 do not touch. 7 places are empty **inside** reservations, 14 **outside**: internal and external
# fragmentation.
#
# </details>
#
# With pieces of one size any free piece fits: PagedAttention ([Kwon et al.](https://arxiv.org/abs/2309.06180)).
#
# ## Step 2: table and slots, by hand
#
# Ten tokens need $\lceil 10 / 4 \rceil = 3$ blocks; say 5, 2, 7. **Predict** the slots of tokens 4 and 6.

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
# Step 1's story with a queue of free blocks. Who needs a block takes the queue's first; who is done gives all back, the
# last one first. A, B, C and D store 3, 4, 2 and 3 tokens, then each, in this order, two more; A and C end. **Predict** E's
# table at 10 tokens.

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


def frame(title, **tokens):
    for name, n in tokens.items():
        grow(name, n)
    return block_strip(title, table_of, free, tokens)


frames = [frame("Four prompts are stored", A=3, B=4, C=2, D=3)]
frames += [frame("Two tokens later", A=5, B=6, C=4, D=5)]
give_back("A"), give_back("C")
frames += [frame("A and C are done", B=6, D=5), frame("E has grown to 10 tokens", B=6, D=5, E=10)]
steps([f.svg() for f in frames], [f.title for f in frames], "The same memory as 8 blocks of 4")
assert table_of["E"] == [7, 4, 0]

# %% [markdown]
# E takes 7, then 4 and 0, which A gave back. Nothing is wasted outside; inside, at most `block_size` − 1 places of a
# request's **last** block.
#
# ## Step 3: attention over scattered blocks
#
# `k_cache[table]` copies the table's blocks, in its order: a **gather**. **Predict**: memory holds 99 before ten keys are
# stored. How many rows does the gather bring, and what is in the last ones?


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
paged = attention(q, gathered[:10], v_cache[table].flatten(0, 1)[:10])
assert torch.equal(paged, attention(q, K, V))

# %% [markdown]
# Twelve; the two of 99 are cut off. Equal **to the last bit**.
#
# ## Step 4: the engine's own
#
# `nanovllm/layers/attention.py` does this for a batch and all heads. A block id means the same block in every layer's cache,
# so one table serves all. A **row** is one request in one step. All rows' new tokens stand in one flat batch, decode rows
# first; `query_start_loc` says whose is which. (`max_query_len`, `plan`, `num_heads`: lesson 06.)

# %%
from course.show.reading import show_source
from nanovllm.layers import attention as ops
from nanovllm.metadata import AttentionMetadata, PhaseMetadata

show_source(PhaseMetadata, AttentionMetadata, ops.store_kv, ops.plan_decode)

# %% [markdown]
# Some rows have no request behind them (lesson 07): their slot is −1, and nothing is stored. Plain indexing would take −1
# for the **last** slot, somebody else's. **Predict**: positions are 9, 2 and −1 (no such row). Tables are padded:
# `[5, 2, 7]`, `[1, 0, 0]` and zeros. Which slots, and how many tokens does each row read?

# %% tags=["nbval-check-output"]
H, H_kv, D, lengths = 4, 2, 4, (10, 3)
keys, values = ([torch.randn(n, H_kv, D) for n in lengths] for _ in range(2))
k_cache, v_cache = torch.full((2, 8, block_size, H_kv, D), 99.0)
tables = torch.tensor([[5, 2, 7], [1, 0, 0], [0, 0, 0]], dtype=torch.int32)
rows = ops.plan_decode(torch.tensor([9, 2, -1]), tables, k_cache, H)
print("slots:", rows.slot_mapping.tolist(), " tokens to read:", rows.seq_lens.tolist())
where = torch.cat([slots, torch.tensor([4, 5, 6, -1])])  # of all tokens, and of the missing row
stored = (torch.cat([*x, torch.zeros(1, H_kv, D)]) for x in (keys, values))
ops.store_kv(*stored, k_cache, v_cache, where)
assert rows.slot_mapping.tolist() == [where[9], where[12], where[13]] == [29, 6, -1]
assert (k_cache[7, 3] == 99).all(), "slot 31, the last one, was written"

# %%
show_source(ops.compute_slots, ops.gather_kv, ops.group_by_length, ops.decode_attention)

# %% [markdown]
# `decode_attention` gathers the keys and values of a row from its slots, masks, and attends. Rows of unequal length must be
# padded, and padding all rows to the longest is expensive: one request of 1,000 tokens would make 255 requests of 10 tokens
# a hundred times as long. That is why `group_by_length` puts rows of similar length together. Where a row has ended, it
# gathers its own last token again. Another request's slot would not do, although the mask gives it the weight 0, because it
# may hold a NaN, and $0 \cdot \text{NaN}$ is NaN.

# %%
show_source(ops.prefill_attention, ops.prefill_chunk, ops.masked_attention)

# %% [markdown]
# `masked_attention` is PyTorch's, with query heads that share a key head placed where a prompt's tokens would stand (a
# prompt repeats the key heads, as in lesson 01). `diagonal`: of a row whose first tokens were stored earlier, the $i$-th of
# `num_new` sees those up to `length - num_new + i`. Check it against keys never scattered, last a row with only 4 of its 10 tokens new.


# %%
from course.labs.paging import contiguous_attention


def agrees(out, query, new):
    """Both requests' part of `out` [tokens, H, D] is attention over their own keys."""
    for i, (ours, q) in enumerate(zip(out.split(new), query.split(new), strict=True)):
        expected = contiguous_attention(q, keys[i], values[i], scale=0.5)
        torch.testing.assert_close(ours, expected)


query = torch.randn(3, H, D)
out = ops.decode_attention(query, k_cache, v_cache, rows, scale=0.5)
agrees(out[:2], query[:2], new=(1, 1))
for new in ((10, 3), (4, 3)):
    query, query_start_loc = torch.randn(sum(new), H, D), torch.tensor([0, new[0], sum(new)])
    some = PhaseMetadata(torch.empty(0), torch.tensor(lengths), tables[:2], query_start_loc)
    agrees(ops.prefill_attention(query, k_cache, v_cache, some, scale=0.5), query, new)
print("decode rows, prompts and the rest of a prompt: equal to contiguous attention")

# %% [markdown]
# ## Assemble: the BlockManager
#
# Your `grow` and `give_back`, in the engine. A `Sequence`, its request, carries its `block_table` as a list.

# %%
from nanovllm.engine.block_manager import Block, BlockManager

m = BlockManager
show_source(
    Block, m.__init__, m.num_new_blocks, m.allocate, m.allocate_block, m.add_reference, m.free
)

# %% [markdown]
# The rest is for lesson 04, where requests share blocks: `ref_count`, in how many tables a block stands (here 0 or 1), and
# what finds a block again.
#
# Tell it step 2's story.

# %% tags=["nbval-check-output"]
from course.labs.paging import sequence

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
# First **invariants**, after each of 2,000 random arrivals and growths:

# %% tags=["nbval-check-output"]
from course.labs.paging import traffic

manager, live = BlockManager(64, 4, enable_prefix_caching=False), []
for running in traffic(manager, 2000):
    held = [block for seq in running for block in seq.block_table]
    assert len(held) == len(set(held)), "a block has two owners"
    assert len(held) + manager.num_free_blocks == manager.num_blocks, "a block is lost"
    used = [s.block_table[i // 4] * 4 + i % 4 for s in running for i in range(len(s.token_ids))]
    assert len(used) == len(set(used)), "two tokens share a slot"
    live.append(len(used))
print(f"up to {max(live)} of 256 places live; every invariant held, 2,000 times")

# %% [markdown]
# Then **logits**, in float32, with blocks of 4 in random order, against `transformers` and the whole text at once, up to
# 0.001. Then greedy **tokens**, up to the first near tie (a lead below 0.0001).

# %%
import random
import textwrap
from collections import OrderedDict

from course.labs.prefixes import prompt_of
from course.labs.reference import ask_and_compare
from course.serving import start_engine

engine = start_engine(block_size=4, enable_prefix_caching=False)
engine.block_manager.free_block_ids = OrderedDict.fromkeys(random.sample(range(512), 512))
prompt = prompt_of(engine, "Tell me a story about a fox who finds a key.")
seq, comparison = ask_and_compare(engine, prompt, count=64)
print(textwrap.fill(seq.detokenizer.text, 90), comparison, sep="\n\n")
assert comparison.tokens > 32

# %% [markdown]
# ## Measure: waste against block size
#
# If 0 to `block_size` − 1 empty places are equally likely, they are $(\text{block\_size} - 1) / 2$ on average. **Predict**
# for block sizes of 16 and 256: how many places of a request are empty, and which share of what it holds, if requests have
# some 350 tokens? If 65?

# %%
from course.drawings.block_pictures import held_plot, waste_plot
from course.labs.paging import lengths_in_life

sizes, wasted, shares = (1, 4, 16, 64, 256), {}, {}
for name, prompt_median, output_mean in (("long", 150, 150), ("short", 30, 25)):
    n = lengths_in_life(prompt_median, output_mean)  # at every step of 1,000 requests' lives
    name += f": {n.mean():.0f} tokens on average"
    wasted[name] = [(-n % size).mean().item() for size in sizes]
    shares[name] = [empty / (empty + n.mean().item()) for empty in wasted[name]]
    print(name, [f"{w:.1f} ({s:.1%})" for w, s in zip(wasted[name], shares[name], strict=True)])
show(waste_plot(sizes, wasted, shares), f"Empty places a request at block sizes {sizes}: {wasted}")
assert abs(wasted[name][2] - 7.5) < 0.5

# %% [markdown]
# <details>
# <summary>At 16 both waste 7.5</summary>
#
# 2% of what long ones hold, 10% of short ones'. At 256 few short ones fill even their first block: three quarters are waste.
#
# </details>
#
# Why not blocks of 1, which waste nothing? Each is 4 bytes in a table, an index at every read, and a step for the manager.
# **Predict** the tables' bytes for 8 requests of 1,024 tokens at block size 1.

# %%
from course import machine
from course.labs.paging import HEADING, costs_of

print(f"{machine.describe()}\n{HEADING}")
costs = [costs_of(size, stage_02.config, stage_02.device) for size in sizes]
print(*costs, sep="\n")
assert [c.table_bytes for c in costs[:2]] == [32768, 8192]

# %% [markdown]
# $4 \cdot 8{,}192$ bytes, little beside keys and values. (*Empty, expected*: of eight requests of any length.) Small blocks cost work, above all in the manager; large blocks
# cost memory. At 16, the engine's default, both are low.
#
# ## Measure: the same room, more requests
#
# Stage 03 is the engine with blocks of 16; batches still start together. A request is admitted if its own prompt and answer would fit, and takes
# blocks as it grows.
# **Predict** for the first cell's mix: how many run at once, and in how many steps? (Stage 02: 196.)

# %% tags=["nbval-check-output"]
from course.labs.paging import blocks_history
from course.stages import PagedStatic

stage_03 = PagedStatic(measured_model().path)
blocks_03, at_once = blocks_history(stage_03, mix)
held, live = map(sum, zip(*blocks_03, strict=True))
print(f"{at_once} requests at once, {len(blocks_03)} steps; {live / held:.0%} of held places live")
assert at_once == 16

# %%
fig = held_plot({"02: rows": rows_02, "03: blocks of 16": blocks_03}, mix.kv_tokens)
show(fig, "Stage 02 holds all places and fills an eighth; stage 03 holds little more than is live")

# %% [markdown]
# One batch, as long as its longest answer (128 tokens).
#
# Now the ladder's workload, whose lengths differ less: stage 02 has 4 rows (on a GPU 16), stage 03 few more, and at every
# step it gathers, that is copies, all keys and values. **Predict**: which is faster?

# %%
from course.measure.ladder_workload import ladder_workload
from course.stages.records import measured, record

workload = ladder_workload(stage_03.vocab_size)
print(workload, measured_model(), sep="\n")
print(measured(stage_02, workload))  # this machine's record; without one, a run

# %%
print(record(stage_03.run(workload)))
fig = plots.ladder(upto=3)
show(fig, fig.alt_text)

# %% [markdown]
# Stage 03 **need not be faster**: what larger batches win, copying may lose. Paging saves memory; speed comes from
# what then fits. It does **not** help if all requests have one length, known ahead: rows then fit exactly.
#
# ## In real vLLM
#
# Release v0.24.0 hands out blocks in
# [`vllm/v1/core/block_pool.py`](https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/v1/core/block_pool.py#L542-L573).
# Three differences:
#
# 1. Block 0, the [`null_block`](https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/v1/core/block_pool.py#L188-L192),
#    fills tables where nothing is to be read.
# 2. The free queue is a [linked list](https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/v1/core/kv_cache_utils.py#L179-L194)
#    through the blocks themselves.
# 3. Nothing is gathered: FlashAttention takes the tables, if
#    [16 divides](https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/v1/attention/backends/flash_attn.py#L76-L94) the block size.
#
# ## Exercises
#
# In `exercises/03_paged_blocks.ipynb`:
#
# 1. **Predict** (5 min): blocks, empty places and slots of three requests at block sizes 4 and 16.
# 2. **Implement** (20 min): the slot mapping of a batch of prompts, padding rows included, without a loop.
# 3. **Implement** (15 min): a block manager's taking and giving back.
# 4. **Break and fix** (15 min): a manager that is wrong by one token at a block's border.
#
# ## Recap
#
# Blocks of one size leave no useless holes. A table says in which slot each token lies. Gathering through it changes what
# fits, not what is answered.
#
# **Check yourself.**
#
# <details><summary>1. Block size 16, table [3, 9]. Which slot has token 20?</summary>
#
# $20 = 16 + 4$: second block, offset 4. $9 \cdot 16 + 4 = 148$.
#
# </details>
# <details><summary>2. Half of the blocks are free. Can fragmentation stop a request?</summary>
#
# No: any free block will do.
#
# </details>
#
# **The next question**: many requests begin with the same tokens. Must each compute and hold them again?
