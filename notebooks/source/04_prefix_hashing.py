# %% [markdown]
# # 04 · The same beginning, computed once
#
# | This lesson | |
# |---|---|
# | Minutes | 45 |
# | Difficulty | medium |
# | Hardware | any laptop; a GPU is used in measurements if there is one |
# | Needs | lessons 01 to 03 |
# | Ends in | `nanovllm/engine/block_manager.py` |

# %% [markdown]
# ## What hurts now
#
# Eight children ask the storyteller under one long system prompt: of each prompt's 337 tokens the first 323
# are the same.
#
# **Predict**: how many prompt tokens does an engine without sharing compute? How many would do?

# %%
import torch

from course.labs.prefixes import num_common, questions
from course.serving import ask, start_engine
from course.show import plots

torch.set_num_threads(1)
torch.set_grad_enabled(False)
plots.use_style()
plain = start_engine(enable_prefix_caching=False)
prompts = questions(plain)
common = num_common(prompts)
ask(plain, prompts)  # runs the engine, on the CPU, until each has one greedy token
computed = sum(step.num_tokens for step in plain.trace)  # a record of every step
once = common + sum(len(prompt) - common for prompt in prompts)
print(f"{computed:,} tokens computed; {once} would do: {computed / once:.1f} times as many")
assert (len(prompts[0]), common) == (337, 323)

# %% [markdown]
# $8 \cdot 337 = 2{,}696$. The beginning once, and 14 tokens a question: $323 + 8 \cdot 14 = 435$. So when may two
# requests point at the **same** block?
#
# ## What you will be able to do
#
# 1. **Explain** why a block's key must cover all tokens before it.
# 2. **Trace** reference counts, eviction and revival.
# 3. **Measure** what sharing saves.
#
# ## The picture, and the symbols
#
# ![A and B share two blocks by equal keys; C has another first block, and shares none.](../figures/prefix_tree.svg)
#
# | symbol | meaning | toy |
# |:--|:--|--:|
# | $B$ | tokens in a block (engine: 16) | 4 |
# | $k_i$ | key of block $i$ | 4 hex digits |
#
# ## Step 1: what two requests can share
#
# A token's keys and values depend on the tokens up to it (lesson 02). So requests share as far as they agree
# **from the first token on**, in **whole** blocks: into a half-filled one its owner still writes.
# **Predict**: how many blocks of 4 can each pair below share?

# %% tags=["nbval-check-output"]
B = 4


def blocks_of(ids):
    return [tuple(ids[i : i + B]) for i in range(0, len(ids) - len(ids) % B, B)]


def shared_blocks(one, two):
    pairs = list(zip(blocks_of(one), blocks_of(two), strict=False))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


ten = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
print("seven tokens in common: ", shared_blocks(ten, [1, 2, 3, 4, 5, 6, 7, 0, 9, 10]))
print("another first token:    ", shared_blocks(ten, [0, 2, 3, 4, 5, 6, 7, 8, 9, 10]))
print("the same ten tokens:    ", shared_blocks(ten, ten))
assert shared_blocks(ten, ten) == 2

# %% [markdown]
# ## Step 2: a key that chains
#
# A dictionary finds a block by its **key**. A hash of the block's own tokens will not do: what is cached of them depends
# on what stands before, too. So a block's key takes in the key before it, and through it the whole history:
#
# $$k_i = \text{hash}(k_{i-1},\ \text{tokens of block } i), \qquad k_{-1} = \text{nothing}$$
#
# **Predict**: which of the six keys of A, B and C below are equal?

# %% tags=["nbval-check-output"]
import xxhash


def toy_hash(parent, tokens):
    return xxhash.xxh3_64_hexdigest(f"{parent} {tokens}".encode())[:4]


def chain(ids):
    keys, parent = [], ""
    for tokens in blocks_of(ids):
        parent = toy_hash(parent, tokens)
        keys.append(parent)
    return keys


toys = {"A": [7, 7, 7, 7, 1, 2, 3, 4, 5, 6], "B": [7, 7, 7, 7, 1, 2, 3, 4, 8]}
toys["C"] = [9, 9, 9, 9, 1, 2, 3, 4, 5]
for name, ids in toys.items():
    print(name, "chained:", chain(ids), " not chained:", [toy_hash("", t) for t in blocks_of(ids)])
assert chain(toys["A"])[1] == chain(toys["B"])[1] != chain(toys["C"])[1]

# %% [markdown]
# Not chained, C's second block has the key of A's. What would an engine say that shared them? `Unchained` leaves out what
# stands before. Three requests: the beginning of a question about a dragon, one about a fox, then the dragon's in full.
# **Predict** whose blocks the third finds with the chain, and without.

# %%
from course.labs.prefixes import prompt_of, tell_of
from nanovllm.engine.block_manager import BlockManager, hash_block


class Unchained(BlockManager):
    def block_hash(self, seq, index):
        start = index * self.block_size
        return hash_block(b"", tuple(seq.token_ids[start : start + self.block_size]))


rules = "Use short sentences and simple words. A story has a beginning, a middle and an end."
dragon, fox = (prompt_of(plain, f"{tell_of(animal)} {rules}") for animal in ("dragon", "fox"))
beginning = dragon[: 4 * (shared_blocks(dragon, fox) + 1)]  # up to the animal
answers = []
for manager_class in (BlockManager, Unchained):
    engine = start_engine(manager_class, block_size=4)
    ask(engine, [beginning]), ask(engine, [fox])
    [seq] = ask(engine, [dragon], count=26)
    found = seq.metrics.num_cached_tokens
    print(f"{manager_class.__name__} finds {found} of {len(dragon)}\n    {seq.detokenizer.text}")
    answers.append(seq.output_ids)
assert answers[0] != answers[1]

# %% [markdown]
# With the chain its own. Without, the rest (but the last token: step 4) comes from the **fox**: fluent text, and not what the model says.
#
# ## Step 3: reference counts and the free queue
#
# A block counts the tables it stands in, its **refs**. At 0 it is free, but contents and key stay; it waits in a queue, the
# longest unused first. Whoever needs a fresh block takes the head: that one is **evicted**, its key forgotten. A
# **hit**, a block found by its key, may be free: **revived**, it leaves the queue from where it stands.


# %%
class Pool:
    def __init__(self, num_blocks):
        self.refs, self.free = [0] * num_blocks, dict.fromkeys(range(num_blocks))  # oldest first
        self.block_of, self.key_of = {}, {}  # key -> block, and back

    def acquire(self, block):
        if self.refs[block] == 0:
            del self.free[block]  # a dict keeps its order, and gives up any key at once
        self.refs[block] += 1
        return block

    def take_oldest(self):
        block = next(iter(self.free))
        self.block_of.pop(self.key_of.pop(block, None), None)  # evicted, if it was cached
        return self.acquire(block)


# %% [markdown]
# A request enters with its hits, the run of known keys from the first on, and fresh blocks for the rest. It
# leaves **last block first**: a tail is of no use without its beginning.


# %%
def enter(pool, ids):
    table, keys = [], chain(ids)
    for key in keys:
        if key not in pool.block_of:
            break
        table.append(pool.acquire(pool.block_of[key]))
    while len(table) * B < len(ids):
        table.append(pool.take_oldest())
    for key, block in zip(keys, table, strict=False):  # the full blocks
        if key not in pool.block_of:
            pool.block_of[key], pool.key_of[block] = block, key
    return table


def leave(pool, table):
    for block in reversed(table):
        pool.refs[block] -= 1
        if pool.refs[block] == 0:
            pool.free[block] = None  # to the end of the queue


# %% [markdown]
# Six blocks, A and B from above, and a D of 18 tokens. They enter (+) and leave (−): +A, +B, −A, −B, +D, −D, +A again.
# **Predict**: which blocks does D take? How many does A find the second time?

# %%
from course.drawings.prefix_pictures import STORY, play
from course.show.display import show, steps

toys |= {"D": [*range(20, 38)], "A again": toys["A"]}
frames, queues, tables = play(Pool(6), toys, enter, leave)
steps(frames, [*STORY.values()], "Six blocks, their tokens and refs, and the queue of free ones")
assert queues[3] == [4, 5, 2, 3, 1, 0]
assert tables["A again"] == [0, 1, 3]

# %% [markdown]
# D takes 4, 5, 2, 3 and 1. Block 0 went into the queue last, so it alone outlived D: A finds one block.
#
# ## Step 4: the token that is computed all the same
#
# A prompt of 32 tokens, two blocks of 16, is asked twice. **Predict**: how many are computed the second time?

# %%
engine = start_engine()
for _ in range(2):
    [seq] = ask(engine, [prompts[0][:32]])
    [(_, position, count)] = engine.trace[-1].rows  # id, first computed position, how many
    print(f"found {seq.metrics.num_cached_tokens}, computed {count}, from position {position}")
assert (position, count) == (31, 1)

# %% [markdown]
# Not 0: the next token comes from the last token's **query**, and queries are not kept. Its key and value are, so its slot
# is −1 (lesson 03).
#
# ## What if two keys collide?
#
# The cache believes a key: whoever has it is handed the block. Two texts with one key would therefore be mixed up, and a
# user who can construct such texts could read along in another user's cache. **Predict** what happens with the worst hash
# there is, a constant:


# %%
class Constant(BlockManager):
    def block_hash(self, seq, index):
        return b"the same for all"


worst, good = start_engine(Constant), start_engine()
wrong, right = (ask(engine, prompts, count=10) for engine in (worst, good))
ruined = sum(a.output_ids != b.output_ids for a, b in zip(wrong, right, strict=True))
print(f"with a constant, {ruined} of {len(prompts)} answers differ from the right ones")
assert ruined > 0

# %% [markdown]
# That is why the engine's key is a SHA-256 digest. Nobody has ever found two texts with the same one. A fast hash such as
# xxHash saves 0.3 µs for each block, but it was not built to resist somebody who looks for collisions.
#
# ## Assemble: `engine/block_manager.py`
#
# Your `Pool`, then your `enter` in parts: `find_cached_blocks` only looks, because the rest may
# not fit. `touch` takes the blocks that were found, `allocate` (lesson 03) takes fresh ones, and `cache_full_blocks` enters
# the blocks that are full.

# %%
from course.show.reading import show_source
from nanovllm.engine import block_manager as module

m = BlockManager
show_source(module.hash_block, module.Block, m.allocate_block, m.add_reference, m.free)
show_source(m.find_cached_blocks, m.num_free_after_touch, m.touch, m.cache_full_blocks)
show_source(m.evict, m.evict_uncomputed, m.is_block_cached, m.rebuild, m.block_hash)

# %% [markdown]
# The toy left out four things. A hit on a *free* block uses it up (`num_free_after_touch`). `evict_uncomputed` and `rebuild`
# are for a step that failed, and `is_block_cached` helps the scheduler of lesson 05.
#
# `cache_full_blocks` runs when a step is **planned**, so its requests share, too: each layer stores all rows' keys and values
# before any row reads. **Predict**: eight questions arrive at once, at an empty cache. How many tokens does each find?

# %%
engine = start_engine()
seqs = ask(engine, prompts)
print("found:", [seq.metrics.num_cached_tokens for seq in seqs])
print(f"computed: {engine.trace[0].num_tokens} of {computed:,} tokens, in {len(engine.trace)} step")
assert [seq.metrics.num_cached_tokens for seq in seqs] == [0] + [common // 16 * 16] * 7

# %% [markdown]
# ## Check
#
# First **invariants**. The finished manager must give the toy's tables and queues.

# %%
from collections import Counter

from course.labs.prefixes import admit  # find, touch, allocate, cache


def check_invariants(manager, seqs):
    held = Counter(block for seq in seqs for block in seq.block_table)
    assert all(block.ref_count == held[block.block_id] for block in manager.blocks)
    assert not held.keys() & manager.free_block_ids.keys()
    assert len(held) + manager.num_free_blocks == manager.num_blocks
    assert all(manager.blocks[block].hash == key for key, block in manager.hash_to_block_id.items())


manager, held = BlockManager(6, B), {}
for event, queue in zip(STORY, queues, strict=True):
    if event[0] == "+":
        held[event[1:]], _ = admit(manager, toys[event[1:]])
    else:
        manager.free(held.pop(event[1:]))
    check_invariants(manager, held.values())
    assert list(manager.free_block_ids) == queue
assert held["A again"].block_table == tables["A again"]
print(f"{len(STORY)} events: tables and queues are the toy's, and the invariants hold")

# %% [markdown]
# Then **logits** of a question found in the cache against `transformers`, up to 0.001; then greedy **tokens**, up to the
# first near tie.

# %%
from course.labs.reference import ask_and_compare

seq, comparison = ask_and_compare(engine, prompts[3], count=16)
found = seq.metrics.num_cached_tokens
print(f"{found} of {seq.num_prompt_tokens} prompt tokens were cached", comparison, sep="\n")
assert found == 336  # its own 21 blocks, from the run before

# %% [markdown]
# ## Measure: time to first token (TTFT)
#
# Four services send prompts of 672 random ids. Three have a system prompt of 640; in two of them a clock changes 10 tokens,
# at positions 630 to 639 or in front. **Predict** for each: how many does its *second* request compute?

# %%
from course import machine
from course.labs.prefixes import second_requests
from course.models.choice import has_gpu, measured_model

where = {"model": measured_model().path, "device": "cuda" if has_gpu() else "cpu"}
cached, uncached = start_engine(**where), start_engine(enable_prefix_caching=False, **where)
second = second_requests(cached, uncached)
print(f"{measured_model()} {machine.describe()}.", *second, sep="\n")
assert [request.computed for request in second] == [32, 48, 672, 672]
for used in (cached, uncached):
    used.close()  # their memory is not the stage's, below

# %% [markdown]
# <details>
# <summary>32, 48, 672, 672</summary>
#
# $640 = 40 \cdot 16$: all whole blocks. A clock at the end spoils one, one in front all. Put last what changes.
#
# </details>
#
# TTFT falls by less than the tokens, on a large GPU not at all: a step costs some time whatever its size.
#
# ## Measure: a chat of several turns
#
# Each turn sends all that was said and a new question. **Predict**: how does the number of *computed* prompt tokens grow?

# %%
from course.drawings.prefix_pictures import hit_rates, turns
from course.labs.prefixes import ANIMALS, converse, share_found

talk = list(converse(good, ANIMALS[:5]))
totals, found = [turn.tokens for turn in talk], [turn.found for turn in talk]
show(turns(totals, found), f"Prompt tokens by turn: {totals}; found in the cache: {found}")
assert max(turn.tokens - turn.found for turn in talk) < 60

# %% [markdown]
# It does not: answers were cached, too; only a question and a part of a block are new.
#
# ## Where it saves nothing: a cache too small
#
# Ten chats of 20 blocks come in turn, five rounds. 200 blocks hold them all; **predict** the share found with 100.

# %%
blocks = [20, 60, 100, 140, 180, 190, 200, 220]
share_of = {count: share_found(count) for count in blocks}  # with a BlockManager alone
fig = hit_rates(blocks, [*share_of.values()], needed=200)
show(fig, f"Share found by blocks in the cache: {share_of}")
assert (share_of[100], share_of[220]) == (0, 0.8)

# %% [markdown]
# <details>
# <summary>Not half: nothing</summary>
#
# The next chat is the one unused for longest: just its blocks were evicted.
#
# </details>
#
# ## The stage, and the ladder so far
#
# Stage 04 is stage 03 with `enable_prefix_caching=True`. **Predict**: what does that do to live memory, and to TTFT?

# %%
from course.measure.ladder_workload import ladder_workload
from course.stages import PagedStatic, PrefixCache
from course.stages.records import measured, record

stage_03, stage_04 = PagedStatic(where["model"]), PrefixCache(where["model"])
workload = ladder_workload(stage_04.vocab_size)
print(measured(stage_03, workload))  # this machine's record; without one, a run

# %%
print(record(stage_04.run(workload)))
fig = plots.ladder(upto=4)
show(fig, fig.alt_text)

# %% [markdown]
# Live memory falls, since the prefix is held once. More requests fit into a batch, and first tokens come sooner. A step of
# more rows takes longer, so TPOT rises. It does **not** help where prompts begin differently, or are short.
#
# ## In real vLLM
#
# Release v0.24.0 chains keys in
# [`vllm/v1/core/kv_cache_utils.py`](https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/v1/core/kv_cache_utils.py#L577-L604).
# Three differences:
#
# 1. Its keys also cover LoRA adapters, images, and a `cache_salt` that keeps customers apart; it does not compare a hit's
#    tokens.
# 2. Of a prompt found in full it computes the **last block**, not the last token
#    ([here](https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/v1/core/kv_cache_manager.py#L221-L227)).
# 3. Two blocks with the same tokens may both be cached, under one key, so that one may be evicted without the other.
#
# ## Exercises
#
# In `exercises/04_prefix_hashing.ipynb`:
#
# 1. **Predict** (5 min): the tokens that ten requests compute, from their prompts' layout and $B$.
# 2. **Implement** (25 min): `find_cached_blocks` and `cache_full_blocks` of a manager.
# 3. **Break and fix** (10 min): keys that forget what stands before their block.
# 4. **Break and fix** (10 min): a prompt found in full, with nothing left to run.
#
# ## Recap
#
# Requests share whole blocks from the first token on, by keys that cover the whole history. A free one waits to be revived
# or evicted.
#
# **Check yourself.**
#
# <details><summary>1. B = 16; a prompt of 100 tokens is asked twice. Computed the second time?</summary>
#
# Six full blocks are 96 tokens; 4 are computed.
#
# </details>
# <details><summary>2. A free, cached block is hit. Its refs, queue, key?</summary>
#
# Refs become 1, it leaves the queue, its key stays.
#
# </details>
#
# **The next question**: requests come and go at any time. Who runs in the next step, with how many tokens?
