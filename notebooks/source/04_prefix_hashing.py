# %% [markdown]
# # 04 · The same beginning, computed once
#
# | This lesson | |
# |---|---|
# | Minutes | 55 |
# | Difficulty | medium |
# | Hardware | any laptop; a GPU is used in measurements if there is one |
# | Needs | lessons 01 to 03 |
# | Ends in | `nanovllm/engine/block_manager.py` |

# %% [markdown]
# Since lesson 03 two requests can point at the **same** block. Here you find out when they may, how an engine
# notices, and what it saves.
#
# ## What hurts now
#
# Eight children ask the course's storyteller, whose system prompt has 24 rules. Stories are made on the CPU
# in float32, with one thread. `ask` runs the engine until each prompt has `count` greedy tokens (here one);
# the engine's `trace` has a record of every step.

# %%
import torch

from course import machine, plots
from course.checkpoint.chats import LONG_SYSTEM
from course.serving import ask, start_engine

torch.set_num_threads(1)
torch.set_grad_enabled(False)
plots.use_style()
plain = start_engine(enable_prefix_caching=False)
tokenizer = plain.get_tokenizer()
SYSTEM = {"role": "system", "content": " ".join(LONG_SYSTEM)}


def prompt_of(text, *before):
    messages = [*before, {"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


animals = ["fox", "frog", "robot", "rabbit", "king", "mouse", "dragon", "bear"]
questions = [prompt_of(f"Tell me a story about a {a} who finds a key.", SYSTEM) for a in animals]
common = next(i for i, ids in enumerate(zip(*questions, strict=True)) if len(set(ids)) > 1)
print(f"eight prompts of {len(questions[0])} tokens; the first {common} are the same in all")

# %% [markdown]
# **Predict** before you run: how many prompt tokens does an engine without sharing compute? How many
# would it be if the common beginning were computed once? Write both down.

# %%
ask(plain, questions)
computed = sum(step.num_tokens for step in plain.trace)
once = common + sum(len(prompt) - common for prompt in questions)
print(f"{computed:,} tokens computed; {once} would do: {computed / once:.1f} times as many")
assert computed == sum(map(len, questions))

# %% [markdown]
# <details>
# <summary>Where the numbers come from</summary>
#
# $8 \cdot 337 = 2{,}696$. The common beginning once, and 14 tokens for each question: $323 + 8 \cdot 14 = 435$.
#
# </details>
#
# ## What you will be able to do
#
# 1. **Explain** why a block's key must cover all tokens before it, and show the wrong answer if not.
# 2. **Trace** reference counts, the free queue, eviction and revival by hand.
# 3. **Measure** what sharing saves in tokens and time to first token, and name where it saves nothing.

# %% [markdown]
# ## The picture, and the symbols
#
# ![Prompts A and B share two blocks by equal keys; C has the same second block after another first one, and another key.](../figures/prefix_tree.svg)
#
# | symbol | meaning | toy | engine |
# |:--|:--|--:|--:|
# | $B$ | tokens in a block | 4 | 16 |
# | $k_i$ | key of a prompt's block $i$ | 4 hex digits | 16 bytes |
# | table | a request's block ids, in order | `[0, 1, 2]` | `block_table` |
# | refs | tables a block stands in | 0 to 2 | `ref_count` |

# %% [markdown]
# ## Step 1: what two requests can share
#
# A token's keys and values depend on the tokens up to it (lesson 02). So requests share as far as they agree
# **from the first token on**. And only **whole** blocks: into a half-filled one its owner still writes.
#
# **Predict**: how many blocks of 4 can each pair share?

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
print("one inserted in front:  ", shared_blocks(ten, [0, *ten]))
print("the same ten tokens:    ", shared_blocks(ten, ten))
assert shared_blocks(ten, ten) == 2

# %% [markdown]
# <details>
# <summary>1, 0, 0, 2</summary>
#
# Seven common tokens fill one block; three are lost. Another first token is another history for all that
# follow. Ten tokens fill two blocks.
#
# </details>
#
# ## Step 2: a key that chains
#
# A dictionary finds a block by its **key**, if one key means one set of keys and values. Would a hash of the
# block's own tokens do? Take two histories with the same second block, and the simplest attention: equal
# weight for all tokens so far, so the output is their mean. A second layer makes its values from that.


# %% tags=["nbval-check-output"]
def second_layer_values(ids):
    x = torch.tensor(ids, dtype=torch.float64)
    return x.cumsum(0) / torch.arange(1, len(ids) + 1)  # the mean of the tokens so far


after_ones = second_layer_values([1, 1, 1, 1, 5, 6, 7, 8])[4:]
after_nines = second_layer_values([9, 9, 9, 9, 5, 6, 7, 8])[4:]
print("values of 5 6 7 8 after 1 1 1 1:", [round(v, 2) for v in after_ones.tolist()])
print("values of 5 6 7 8 after 9 9 9 9:", [round(v, 2) for v in after_nines.tolist()])
assert not torch.isclose(after_ones, after_nines).any()

# %% [markdown]
# $(4 \cdot 1 + 5) / 5 = 1.8$, but $(4 \cdot 9 + 5) / 5 = 8.2$. So a key takes in the key before it, its
# **parent**, and through it the whole history:
#
# $$k_i = \text{hash}(k_{i-1},\ \text{tokens of block } i), \qquad k_{-1} = \text{nothing}$$

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


prompts = {"A": [7, 7, 7, 7, 1, 2, 3, 4, 5, 6], "B": [7, 7, 7, 7, 1, 2, 3, 4, 8]}
prompts["C"] = [9, 9, 9, 9, 1, 2, 3, 4, 5]
for name, ids in prompts.items():
    print(name, "chained:", chain(ids), " not chained:", [toy_hash("", t) for t in blocks_of(ids)])
assert chain(prompts["A"]) == chain(prompts["B"])
assert chain(prompts["A"])[1] != chain(prompts["C"])[1]

# %% [markdown]
# Not chained, the second block of C has the key of A's. The chain costs one hash of $B$ tokens a block.
#
# Now the real model, also with blocks of 4. Two questions differ in the animal; after it all tokens are equal.
# The manager's `match` lists the cached blocks of a request's beginning.

# %%
RULES = "Use short sentences and simple words. A story has a beginning, a middle and an end."
dragon, fox = (
    prompt_of(f"Tell me a story about a {animal} who finds a key. {RULES}")
    for animal in ("dragon", "fox")
)
same = [a == b for a, b in zip(blocks_of(dragon), blocks_of(fox), strict=True)]
print("blocks with equal tokens (=) or not (x):", "".join("x="[equal] for equal in same))

engine = start_engine(block_size=4)
seqs = ask(engine, [dragon, fox])
cache = engine.core.runner.kv_cache  # [layers, 2 (keys, values), blocks, 4, kv heads, head_dim]
one, two = (cache[:, :, engine.block_manager.match(seq)[-1]] for seq in seqs)
difference = (one - two).abs().amax((1, 2, 3, 4)) / one.abs().amax((1, 2, 3, 4))
print("last block, largest difference by layer:", [f"{d:.0%}" for d in difference.tolist()])
assert same[-1]
assert difference[0] < 1e-5 < 0.01 < difference[1:].min()

# %% [markdown]
# Layer 0 sees tokens and positions only: equal. Every later layer has mixed in the animal.
#
# What if an engine shared them all the same? Its manager makes keys in `_hash`, and in `_content` what a found
# block is compared with; leave what stands before out of both. Three requests: the dragon's beginning, the fox, then the dragon in full. **Predict** whose blocks the third one
# finds with the chain, and without.

# %%
from nanovllm.engine.block_manager import BlockManager, hash_block


class Unchained(BlockManager):
    def _hash(self, seq, index):
        return hash_block(b"", self._tokens(seq, index))

    def _content(self, seq, index, table):
        return self._tokens(seq, index)


beginning = dragon[: 4 * (same.index(False) + 1)]  # up to the animal
answers = []
for manager_class in (BlockManager, Unchained):
    engine = start_engine(manager_class, block_size=4)
    ask(engine, [beginning])
    ask(engine, [fox])
    [seq] = ask(engine, [dragon], count=26)
    print(f"{manager_class.__name__} finds {seq.metrics.num_cached_tokens} of {len(dragon)} tokens")
    print("   ", seq.detokenizer.text)
    answers.append(seq.output_ids)
assert answers[0] != answers[1]

# %% [markdown]
# With the chain it finds its own beginning, 12 tokens. Without, the rest comes from the **fox**. Nothing
# crashes: the text is fluent, and not what the model says.
#
# ## Step 3: reference counts and the free queue
#
# A shared block belongs to every table it stands in, so it counts them: its **refs**. At 0 it is free, but
# its contents and its key stay. It waits in a queue, the longest unused first. Whoever needs a fresh block
# takes the head of the queue; if that was cached, it is **evicted**: its key is forgotten. A **hit**, a block
# found by its key, may be free: then it leaves the queue, wherever it stands. It is **revived**.


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
# leaves **last block first**, so that its tail is evicted before its beginning. A beginning is of use without
# its tail, a tail without its beginning can never be hit.


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
# Six blocks, A and B from above, and a long D of 18 tokens. What happens: +A, +B, −A, −B, +D, −D, +A again
# (+ enters, − leaves). **Predict**, on paper: which blocks does D take? How many does A find the second time?

# %%
from course.display import show, steps
from course.prefix_pictures import STORY, pool_frame

prompts |= {"D": [*range(20, 38)], "A again": prompts["A"]}
pool, tables, contents, frames, queues = Pool(6), {}, {}, [], []
for event in STORY:  # what happens, and a caption
    name = event[1:]
    if event[0] == "+":
        table = tables[name] = enter(pool, prompts[name])
        contents |= {block: prompts[name][i * B : (i + 1) * B] for i, block in enumerate(table)}
    else:
        leave(pool, tables.pop(name))
    frames.append(pool_frame(pool, tables, contents))
    queues.append([*pool.free])
steps(frames, [*STORY.values()], "Six blocks, their tokens and refs, and the queue of free ones")
assert queues[3] == [4, 5, 2, 3, 1, 0]
assert tables["A again"] == [0, 1, 3]

# %% [markdown]
# Block 0, the beginning of A, went into the queue last, so it alone outlived D: A finds one block of two.
#
# ## Step 4: the token that is computed all the same
#
# A prompt of 32 tokens fills two blocks of 16. Ask it twice: the second time both are cached. **Predict**:
# how many tokens must the engine compute before it can answer? (A step's `rows` hold a request's id, its
# first computed position, and how many.)

# %%
engine = start_engine()
for _ in range(2):
    [seq] = ask(engine, [questions[0][:32]])
    [(_, position, count)] = engine.trace[-1].rows
    print(f"found {seq.metrics.num_cached_tokens}, computed {count}, from position {position}")
assert (position, count) == (31, 1)

# %% [markdown]
# Not 0. The next token comes from the last token's **query**, carried through all layers to the logits, and
# queries are not kept. Its key and value are in the cache, where others may be reading them, so they are not
# stored again: its slot is −1 (lesson 03).
#
# ## What if two keys collide?
#
# A key of 16 bytes stands for any text, so two texts may share one: by chance among some $2^{64}$ blocks, or
# because somebody crafted them. A request would then read a stranger's keys and values. So a key is only a
# hint: `match` also compares the block's **content**, which is its tokens and a number that stands for all
# tokens before them. Each entered block gets a number of its own; equal content gets an equal number. Try the
# worst hash there is:


# %%
class Constant(BlockManager):
    def _hash(self, seq, index):
        return b"the same for all"


worst, good = start_engine(Constant), start_engine()
wrong, right = (ask(engine, questions, count=10) for engine in (worst, good))
found = [sum(seq.metrics.num_cached_tokens for seq in seqs) for seqs in (wrong, right)]
print(f"tokens found with a constant: {found[0]}; with the real hash: {found[1]:,}")
assert [seq.output_ids for seq in wrong] == [seq.output_ids for seq in right]

# %% [markdown]
# A collision costs hits and no answer.
#
# ## Assemble: `engine/block_manager.py`
#
# Taking and giving back, your `Pool`:

# %%
from course.reading import show_source
from nanovllm.engine import block_manager as module

take_and_give = BlockManager._take_oldest_free, BlockManager._acquire, BlockManager.free
show_source(module.hash_block, module.Block, *take_and_give)

# %% [markdown]
# Your `enter`, in parts: `match` looks and takes nothing, as the rest may not fit; `share` takes the hits,
# `allocate` (lesson 03) the fresh blocks, and `register` enters what is full.

# %%
show_source(BlockManager.match, BlockManager.num_free_after_sharing, BlockManager.share)
show_source(BlockManager.register, BlockManager.unregister, BlockManager._uncache)
show_source(BlockManager._content, BlockManager._tokens, BlockManager._hash)

# %% [markdown]
# What the toy left out, and why it is there:
#
# - A request keeps its keys in `block_hashes`: one that waits is not hashed again at every step.
# - `register` runs again as an answer grows, so answers are cached, too.
# - `num_free_after_sharing`: a hit on a *free* block uses up a free block.
# - `unregister`: a step that failed never wrote what was entered for it.
#
# `register` runs when a step is **planned**. So requests of one step share: the first computes, its
# **followers** point at its blocks. That is safe since each layer stores the keys and values of all rows
# before any row reads (lesson 03).
#
# **Predict**: eight questions arrive at once, at an empty cache. How many tokens does each find?

# %%
engine = start_engine()
seqs = ask(engine, questions)
print("found:", [seq.metrics.num_cached_tokens for seq in seqs])
print(f"computed: {engine.trace[0].num_tokens} of {computed:,} tokens, in {len(engine.trace)} step")
assert [seq.metrics.num_cached_tokens for seq in seqs] == [0] + [common // 16 * 16] * 7

# %% [markdown]
# The first none, the others 20 whole blocks of the 323 common tokens; 456 computed, near the 435 that would do.
#
# ## Check: invariants, logits, tokens
#
# Refs are counts of tables, and a block is either free or used. The toy's story, told to the finished
# manager, must give the toy's tables and queues.

# %%
from collections import Counter

from nanovllm import SamplingParams
from nanovllm.engine.sequence import Sequence


def check_invariants(manager, seqs):
    held = Counter(block for seq in seqs for block in seq.block_table)
    assert all(block.ref_count == held[block.block_id] for block in manager.blocks)
    assert not held.keys() & manager._free.keys()
    assert len(held) + manager.num_free_blocks == manager.num_blocks
    assert all(manager.blocks[block].hash == key for key, block in manager._cached.items())


def admit(manager, ids):
    seq = Sequence("", None, list(ids), SamplingParams(), max_length=len(ids) + 1)
    hits = manager.match(seq)
    manager.share(seq, hits)
    manager.allocate(seq, len(ids))
    seq.num_scheduled = len(ids)  # what the scheduler notes when it plans a step
    manager.register(seq)
    return seq, len(hits) * manager.block_size


# %%
manager, held = BlockManager(6, B), {}
for event, queue in zip(STORY, queues, strict=True):
    if event[0] == "+":
        held[event[1:]], _ = admit(manager, prompts[event[1:]])
    else:
        manager.free(held.pop(event[1:]))
    check_invariants(manager, held.values())
    assert list(manager._free) == queue
assert held["A again"].block_table == tables["A again"]
print(f"{len(STORY)} events: tables and queues are the toy's, and the invariants hold")

# %% [markdown]
# Then a busy engine, with few blocks and prompts of many lengths: invariants after every step, tokens against
# the engine without a cache.

# %%
import random

rng = random.Random(4)
busy = start_engine(num_gpu_blocks_override=24, max_model_len=384)
cut = [rng.choice(questions)[: rng.randrange(60, 338)] for _ in range(12)]
params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
seqs = busy.add([busy.make_request(str(i), ids, params) for i, ids in enumerate(cut)])
while busy.has_unfinished_requests():
    busy.advance()
    check_invariants(busy.block_manager, seqs)
assert [seq.output_ids for seq in seqs] == [seq.output_ids for seq in ask(plain, cut, count=8)]
found = sum(seq.metrics.num_cached_tokens for seq in seqs)
print(
    f"{len(busy.trace)} steps, {found:,} of {sum(map(len, cut)):,} prompt tokens found, same tokens"
)

# %% [markdown]
# Then logits in float32 against `transformers`, for a question found in the cache (a spy keeps the engine's),
# and greedy tokens, up to the first whose lead is below 0.0001.

# %%
from transformers import AutoModelForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
reference = AutoModelForCausalLM.from_pretrained(plain.args.model, dtype=torch.float32)
decoder, kept = engine.core.runner.model, []
compute = decoder.logits
decoder.logits = lambda hidden: kept.append(compute(hidden)) or kept[-1]
[seq] = ask(engine, [questions[3]], count=16)
theirs = reference(torch.tensor([seq.token_ids])).logits[0, seq.num_prompt_tokens - 1 : -1]
ours = torch.cat(kept)
print(f"{seq.metrics.num_cached_tokens} of {seq.num_prompt_tokens} prompt tokens were cached")
print(f"logits differ by {(ours - theirs).abs().max():.0e} at most")
torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)

best, second = theirs.topk(2).values.T
certain = ([*(best - second < 1e-4).tolist(), True]).index(True)
assert seq.output_ids[:certain] == theirs.argmax(-1).tolist()[:certain]
print(f"{certain} of 16 tokens compared with transformers: all equal")

# %% [markdown]
# ## Measure: time to first token
#
# TTFT is the time from a request's arrival to its first token. Four services send prompts of 672 tokens
# (random ids; only their number matters), one after another, so that nobody waits. On a GPU the model is a
# random one of Qwen3-0.6B's shape.

# %%
from course.models import has_gpu, measured_model


def some(count):
    return [rng.randrange(4000) for _ in range(count)]


shared = some(640)  # the system prompt; 32 tokens of the user's follow
services = {
    "one system prompt": lambda: shared + some(32),
    "a clock at its end": lambda: shared[:630] + some(10) + some(32),
    "a clock in front": lambda: some(10) + shared[10:] + some(32),
    "no system prompt": lambda: some(672),
}
where = {"model": measured_model().path, "device": "cuda" if has_gpu() else "cpu"}
cached, uncached = start_engine(**where), start_engine(enable_prefix_caching=False, **where)


def second_requests(engine, make_prompt):
    """Tokens computed, and the median TTFT in ms, of three requests after a first."""
    seqs = [ask(engine, [make_prompt()])[0] for _ in range(4)][1:]
    ttft = sorted(1e3 * seq.metrics.ttft for seq in seqs)
    return 672 - seqs[0].metrics.num_cached_tokens, ttft[1]


# %% [markdown]
# **Predict** for each service: how many of 672 tokens does its *second* request compute?

# %%
print(f"{measured_model()} {machine.describe()}.")
print(f"{'':20}{'computed':>9}{'TTFT':>10}{'without a cache':>20}")
counts = []
for name, make_prompt in services.items():
    (count, ttft), (total, slow) = (second_requests(e, make_prompt) for e in (cached, uncached))
    print(f"{name:20}{count:9}{ttft:7.0f} ms{total:9}{slow:8.0f} ms")
    counts.append(count)
assert counts == [32, 48, 672, 672]

# %% [markdown]
# <details>
# <summary>32, 48, 672, 672</summary>
#
# $640 = 40 \cdot 16$: all whole blocks. A clock in tokens 630 to 639 spoils the block of 624 to 639, 16 more. A
# clock in front spoils everything behind it. Whoever writes prompts puts last what changes.
#
# </details>
#
# TTFT falls by less than the tokens do: a step costs some time whatever its size, and the 32 tokens still
# attend to all 672. Nothing after the first token gets faster.
#
# ## Measure: a chat of several turns
#
# Each turn sends the whole conversation: earlier questions, earlier answers, a new question. **Predict**: how
# does the number of *computed* prompt tokens grow from turn to turn?

# %%
from course.prefix_pictures import hit_rates, turns

talk, totals, found = [], [], []
for animal in animals[:5]:
    text = f"Tell me a story about a {animal} who finds a key."
    prompt = prompt_of(text, *talk)
    [seq], [cold] = ask(good, [prompt], count=120, ignore_eos=False), ask(plain, [prompt])
    fast, slow = (1e3 * request.metrics.ttft for request in (seq, cold))
    print(f"turn {len(found) + 1}: TTFT {fast:4.0f} ms, without a cache {slow:4.0f} ms")
    answer = {"role": "assistant", "content": seq.detokenizer.text}
    talk += [{"role": "user", "content": text}, answer]
    totals.append(seq.num_prompt_tokens)
    found.append(seq.metrics.num_cached_tokens)
fig = turns(totals, found, "the course's own model, on any machine")
show(fig, f"Prompt tokens by turn: {totals}; found in the cache: {found}")
assert max(total - hit for total, hit in zip(totals, found, strict=True)) < 60

# %% [markdown]
# It does not grow: answers were cached as they were made, so only a question and a part of a block are new.
# Without a cache TTFT grows with the conversation.
#
# ## Where it saves little
#
# **Tiny blocks, huge blocks.** Eight prompts like those of the first service go through the manager alone, on
# the clock. **Predict** how many of 672 tokens are found with $B = 256$.

# %%
import statistics
import time

eight = [shared + some(32) for _ in range(8)]
for size in (1, 4, 16, 64, 256):
    manager, micro = BlockManager(8192 // size, size), []
    for ids in eight:
        begin = time.perf_counter()
        seq, hit = admit(manager, ids)
        manager.free(seq)
        micro.append(1e6 * (time.perf_counter() - begin))
    cost = statistics.median(micro)
    print(f"B = {size:3}: {hit} of 672 tokens found, {cost:5.0f} µs of bookkeeping a request")
assert hit == 512

# %% [markdown]
# Two whole blocks of 256 fit into 640 tokens. Blocks of one token find nothing more, and each pays for a hash,
# a dictionary entry and a count.
#
# **A cache too small.** Ten chats of 20 blocks each come in turn, five rounds; all of them fit into 200
# blocks. **Predict** the share of prompt tokens found with 100 blocks.

# %% tags=["nbval-check-output"]
chats = [some(320) for _ in range(10)]
sizes, rates = [20, 60, 100, 140, 180, 190, 200, 220], []
for num_blocks in sizes:
    manager, total = BlockManager(num_blocks, 16), 0
    for ids in chats * 5:
        seq, hit = admit(manager, ids)
        manager.free(seq)
        total += hit
    rates.append(total / (5 * 10 * 320))
print({size: f"{rate:.0%}" for size, rate in zip(sizes, rates, strict=True)})
assert rates[sizes.index(100)] == 0
assert rates[-1] == 0.8

# %%
fig = hit_rates(sizes, rates, needed=200)
show(fig, f"Share found by blocks in the cache: {dict(zip(sizes, rates, strict=True))}")

# %% [markdown]
# <details>
# <summary>Not half: nothing</summary>
#
# The chat that comes next is the one unused for longest, and just its blocks were evicted. From 200 blocks on,
# four rounds of five are found. Real chats do not take turns so strictly; the edge is softer.
#
# </details>
#
# ## The stage, and the ladder so far
#
# Stage 04 is stage 03 with `enable_prefix_caching=True`; a batch is still static. `compare` asserts that its
# tokens are stage 02's. Stages that have no record on this machine get one.

# %%
import textwrap

from course.records import load, record
from course.stages import STAGES, compare
from course.stages.common import mean, mib
from course.workload import ladder_workload

known = {(r.stage, r.machine, r.model) for r in load()}
results = {}
for number in (2, 3, 4):
    stage = STAGES[number](where["model"])
    workload = ladder_workload(stage.vocab_size)
    runs = [stage.run(workload) for _ in range(2 if number == 4 else 1)]
    results[number] = first = runs[0]
    if number == 4 or (number, first.machine, first.model) not in known:
        record(runs)
print(textwrap.fill(str(workload), 95))
for r in results.values():
    ttft, tpot = 1e3 * mean(r.ttft), 1e3 * mean([t for t in r.tpot if t is not None])
    speed = f"{r.tokens_per_second:6,.0f} tok/s   TTFT {ttft:6,.0f} ms   TPOT {tpot:5.1f} ms"
    print(f"{r.number:02} {r.name:22}{speed}   live KV {mib(r.kv_live_bytes)}")
print(compare(results[4], results[2]))

# %%
fig = plots.ladder(upto=4)
show(fig, fig.alt_text)

# %% [markdown]
# A shared block counts once, so fewer keys and values are live and more requests fit into a batch. First tokens
# come sooner; a step of more rows takes longer, so TPOT rises. It does **not** help where prompts begin
# differently, or where answers are long and prompts short.
#
# ## In real vLLM
#
# Release v0.11.0 chains keys in
# [`hash_block_tokens`](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/v1/core/kv_cache_utils.py#L547-L573)
# and keeps its free queue in
# [`vllm/v1/core/block_pool.py`](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/v1/core/block_pool.py#L322-L353).
# Three differences:
#
# 1. Its keys also cover what changes keys and values beside tokens (a LoRA adapter, an image), and a
#    `cache_salt` that keeps customers apart: else a fast first token tells that somebody asked the same. It
#    does not compare a hit's tokens; it trusts its hash.
# 2. Of a prompt found in full it computes the **last block** again, not the last token
#    ([here](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/v1/core/kv_cache_manager.py#L174-L180)).
# 3. Two blocks with the same tokens may both be cached, under one key. Here the first one stays alone.
#
# ## Exercises
#
# In `exercises/04_prefix_hashing.ipynb`:
#
# 1. **Predict** (5 min): the tokens that ten requests compute, from their prompts' layout and $B$.
# 2. **Implement** (25 min): `match` and `register` of a manager.
# 3. **Break and fix** (10 min): keys that forget what stands before their block.
# 4. **Break and fix** (10 min): a prompt found in full, with nothing left to run.

# %% [markdown]
# ## Recap
#
# Requests share whole blocks from the first token on, found by keys that cover the whole history. A block
# counts its tables; at 0 it waits in a queue, still cached, to be revived or evicted. That saves prompt
# tokens, and so time to first token, where prompts begin alike and the cache holds them.
#
# **Check yourself.**
#
# <details><summary>1. B = 16; a prompt of 100 tokens is asked twice. How many are computed the second time?</summary>
#
# Six full blocks are 96 tokens; 4 are computed. (Of a prompt of 96 it would be 1.)
#
# </details>
# <details><summary>2. A free, cached block is hit. What happens to its refs, the queue and its key?</summary>
#
# Its refs become 1, it leaves the queue from where it stands, and its key stays.
#
# </details>
# <details><summary>3. Why does a request give back its last block first?</summary>
#
# What is given back first is evicted first, and a tail is worth nothing without its beginning.
#
# </details>
# <details><summary>4. Does an answer's tenth token come sooner after the ninth?</summary>
#
# No. Decoding reads the same keys and values, shared or not.
#
# </details>
#
# **The next question**: requests come and go at any time. Who runs in the next step, with how many tokens?
