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
# Lesson 03 cut the cache into blocks, so a request's keys and values may lie anywhere. Then two
# requests can also point at the **same** block. Here you find out when they may, how an engine notices,
# and what it saves.
#
# ## What hurts now
#
# A chat service puts the same system prompt before every question. Eight children ask the course's
# storyteller; its system prompt is 24 rules long. `ask` queues prompts, runs the engine until all are
# answered, and returns the requests. Stories come from the course's own model, on the CPU in float32.

# %%
import torch

from course import machine, plots
from course.checkpoint.chats import LONG_SYSTEM
from course.models import own_model
from nanovllm import SamplingParams
from nanovllm.config import EngineArgs
from nanovllm.engine.block_manager import BlockManager
from nanovllm.llm_engine import LLMEngine

torch.set_num_threads(1)
torch.set_grad_enabled(False)
plots.use_style()
STORYTELLER = own_model()


def start(block_manager_class=BlockManager, model=STORYTELLER, device="cpu", **options):
    usual = {"num_gpu_blocks_override": 512, "max_num_batched_tokens": 4096, "enforce_eager": True}
    args = EngineArgs(
        str(model), device=device, use_tqdm_on_load=False, async_scheduling=False, **usual | options
    )
    return LLMEngine(args, block_manager_class=block_manager_class)


def ask(engine, prompts, count=1):
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    first = engine.num_requests  # request ids are numbers, counted on
    requests = [engine.make_request(str(first + i), p, params) for i, p in enumerate(prompts)]
    seqs = engine.add(requests)
    while engine.has_unfinished_requests():
        engine.advance()
    return seqs


# %%
plain = start(enable_prefix_caching=False)
tokenizer = plain.get_tokenizer()
SYSTEM = " ".join(LONG_SYSTEM)


def chat(question, system=SYSTEM):
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


animals = ["fox", "frog", "robot", "rabbit", "king", "mouse", "dragon", "bear"]
questions = [chat(f"Tell me a story about a {animal} who finds a key.") for animal in animals]
common = next(i for i, ids in enumerate(zip(*questions, strict=False)) if len(set(ids)) > 1)
lengths = [len(prompt) for prompt in questions]
print("tokens of each prompt:", lengths)
print(f"the first {common} are the same in all")

# %% [markdown]
# **Predict** before you run: how many prompt tokens does an engine without sharing compute? How many
# are different, if the common beginning counts once? Write both down.

# %%
ask(plain, questions)
computed = sum(step.num_tokens for step in plain.trace)
different = common + sum(length - common for length in lengths)
print(
    f"{computed:,} tokens computed, {different} different: {computed / different:.1f} times as many"
)
assert computed == sum(lengths)

# %% [markdown]
# <details>
# <summary>Where the numbers come from</summary>
#
# Eight prompts of about 337 tokens are some 2,700. The common 320-odd tokens count once, and each prompt
# adds a dozen of its own. The factor is close to 8, the number of requests, as the common part is most
# of each.
#
# </details>
#
# ## What you will be able to do
#
# 1. **Explain** why a block's hash must cover all tokens before it, and show the wrong answer if not.
# 2. **Trace** reference counts, the free queue, eviction and revival of cached blocks by hand.
# 3. **Measure** what sharing saves in tokens and in time to first token, and name where it saves nothing.

# %% [markdown]
# ## The picture, and the symbols
#
# ![Prompts A and B share two blocks by equal keys; C has the same second block after another first one, and another key.](../figures/prefix_tree.svg)
#
# | symbol | meaning | in the toy | in the engine |
# |:--|:--|--:|--:|
# | $B$ | tokens in a block | 4 | 16 |
# | $P$ | tokens of a prompt | 10 | 337 |
# | $k_i$ | key of a prompt's block $i$: $k_i = \text{hash}(k_{i-1}, \text{its tokens})$ | 4 hex digits | 16 bytes |
# | block table | ids of a request's blocks, in order | `[0, 1, 2]` | |
# | refs | block tables a block stands in | | `ref_count` |
# | hit | a block found in the cache | | |

# %% [markdown]
# ## Step 1: what two requests can share
#
# From lesson 02: a token's keys and values depend on the tokens up to it, on no later one. So requests
# share as far as they agree **from the first token on**. And only **whole** blocks: a half-filled
# block's owner writes its next token into it, and the other request's would be another.
#
# **Predict**: $B = 4$. How many blocks can each pair share?


# %% tags=["nbval-check-output"]
B = 4


def blocks_of(ids):
    return [tuple(ids[i : i + B]) for i in range(0, len(ids) - len(ids) % B, B)]


def shared_blocks(one, two):
    pairs = list(zip(blocks_of(one), blocks_of(two), strict=False))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


pairs = {
    "ten tokens, seven in common": (
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10],
        [1, 2, 3, 4, 5, 6, 7, 0, 9, 10],
    ),
    "other first token": ([1, 2, 3, 4, 5, 6, 7, 8], [0, 2, 3, 4, 5, 6, 7, 8]),
    "one token inserted in front": ([1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 5, 6, 7, 8]),
    "the same ten tokens": ([*range(10)], [*range(10)]),
}
for name, (one, two) in pairs.items():
    print(f"{name}: {shared_blocks(one, two)}")
assert [shared_blocks(*pair) for pair in pairs.values()] == [1, 0, 0, 2]

# %% [markdown]
# <details>
# <summary>1, 0, 0, 2</summary>
#
# Seven tokens in common fill one block; three of its neighbour are lost. Another first token is another
# history for all that follows. The same ten tokens fill two blocks; tokens 8 and 9 are computed again.
#
# </details>
#
# ## Step 2: a key that chains
#
# Comparing a new prompt with all old ones is slow. A dictionary from a block's **key** to its id is fast,
# if equal keys mean equal keys *and values*. Is a hash of the block's own tokens enough? Take two
# histories with the same second block, and the simplest attention there is: every token gives equal
# weight to all up to it, so the output is the mean so far. A second layer makes its values from that
# output.

# %% tags=["nbval-check-output"]
X, W, Y = [1, 1, 1, 1], [9, 9, 9, 9], [5, 6, 7, 8]


def second_layer_values(ids):
    x = torch.tensor(ids, dtype=torch.float64)
    return x.cumsum(0) / torch.arange(1, len(ids) + 1)  # the mean of the tokens so far


after_x = second_layer_values(X + Y)[4:]
after_w = second_layer_values(W + Y)[4:]
print("values of 5 6 7 8 after 1 1 1 1:", [round(v, 2) for v in after_x.tolist()])
print("values of 5 6 7 8 after 9 9 9 9:", [round(v, 2) for v in after_w.tolist()])
assert not torch.isclose(after_x, after_w).any()

# %% [markdown]
# The first is $(4 \cdot 1 + 5) / 5 = 1.8$, the other $(4 \cdot 9 + 5) / 5 = 8.2$. Equal tokens, other
# values. So the key takes in the key before it, its **parent**, and through it the whole history:
#
# $$k_i = \text{hash}(k_{i-1},\ \text{tokens of block } i), \qquad k_{-1} = \text{empty}$$

# %% tags=["nbval-check-output"]
import xxhash


def toy_hash(parent, tokens):
    return xxhash.xxh3_64_hexdigest(f"{parent} {tokens}".encode())[:4]


def chain(ids, hash_function=toy_hash):
    keys, parent = [], ""
    for tokens in blocks_of(ids):
        parent = hash_function(parent, tokens)
        keys.append(parent)
    return keys


A = [7, 7, 7, 7, 1, 2, 3, 4, 5, 6]
others = {"A": A, "B": [*A[:8], 8], "C": [9, 9, 9, 9, *A[4:8], 5]}
for name, ids in others.items():
    print(f"{name} {ids}: keys {chain(ids)}, unchained {[toy_hash('', t) for t in blocks_of(ids)]}")
assert chain(others["B"]) == chain(A)
assert chain(others["C"])[1] != chain(A)[1]

# %% [markdown]
# Unchained, the second block of C has the key of A's. Chained, it does not, and each key costs one hash of
# $B$ tokens, not of the whole history.
#
# Now the real model. Two questions differ in one word, then 28 tokens are equal. $B = 4$ here too, so
# that a short prompt has many blocks. `match` lists the cached blocks that hold a request's beginning.


# %%
def question(animal):
    rules = "Use short sentences and simple words. A story has a beginning, a middle and an end."
    text = f"Tell me a story about a {animal} who finds a key. {rules}"
    ids = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(ids, add_generation_prompt=True, return_dict=False)


dragon, fox = question("dragon"), question("fox")
right = start(block_size=4)
seqs = ask(right, [dragon, fox])
same = [a == b for a, b in zip(blocks_of(dragon), blocks_of(fox), strict=True)]
print("blocks with equal tokens:", "".join("=x"[not equal] for equal in same))
last = len(same) - 1
cache = right.core.runner.kv_cache  # [layers, 2 (keys, values), blocks, block size, kv heads, dim]
one, two = (cache[:, :, right.block_manager.match(seq)[last]] for seq in seqs)
difference = (one - two).abs().amax((1, 2, 3, 4)) / one.abs().amax((1, 2, 3, 4))
print(f"block {last}, largest difference by layer:", [f"{d:.1%}" for d in difference.tolist()])
assert same[last]
assert difference[0] < 1e-5 < 0.01 < difference[-1]

# %% [markdown]
# Layer 0 sees tokens and positions only, so its keys and values are equal. Every later layer has mixed in
# the animal. What if an engine shared them all the same? `BlockManager` makes its keys in `_hash`, and an
# engine takes another class. Three requests: the dragon's first 12 tokens, then the fox in full, then the
# dragon in full. The engine without a chain finds block after block for the third: the beginning from
# the first request, the rest from the **fox**.

# %%
from nanovllm.engine.block_manager import hash_block


class Unchained(BlockManager):
    def _hash(self, seq, index):
        return hash_block(b"", self._tokens(seq, index))


answers = {}
for manager_class in (BlockManager, Unchained):
    engine = start(manager_class, block_size=4)
    for ids in (dragon[: same.index(False) * 4 + 4], fox):
        ask(engine, [ids])
    [seq] = ask(engine, [dragon], count=26)
    answers[manager_class] = seq.output_ids
    print(
        f"{manager_class.__name__}: {seq.metrics.num_cached_tokens} of {len(dragon)} tokens found"
    )
    print("   ", seq.detokenizer.text)
assert answers[BlockManager] != answers[Unchained]

# %% [markdown]
# Nothing crashes. The second text is fluent, and wrong: it is not what the model says. This is the worst
# kind of bug in an engine, since nobody sees it in one answer.
#
# ## Step 3: reference counts and the free queue
#
# Who owns a shared block? Everybody who has it in a table, so it counts its **refs**. At 0 it is free, but
# *its contents still stand*: it stays in the dictionary and waits in a queue. A new request takes the block
# at the head of the queue, the least recently used; if that one was cached, it is **evicted**, which means
# that its key is forgotten. A hit on a free block takes it out of the middle of the queue: it is **revived**.


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
# A request enters with its **hits**, the longest run of known keys from the first block on, then takes fresh
# blocks, and enters its full ones in the dictionary. It leaves with its **last block first**, so that the
# tail of a text stands nearer the head of the queue than its beginning. Why? A tail without its beginning
# can never be a hit; a beginning without its tail can.


# %%
from itertools import takewhile


def enter(pool, ids):
    keys = chain(ids)
    hits = [pool.block_of[key] for key in takewhile(pool.block_of.__contains__, keys)]
    table = [pool.acquire(block) for block in hits]
    table += [pool.take_oldest() for _ in range(-(-len(ids) // B) - len(hits))]
    for key, block in zip(keys, table, strict=False):  # full blocks only: keys are fewer
        if key not in pool.block_of:
            pool.block_of[key], pool.key_of[block] = block, key
    return table


def leave(pool, table):
    for block in reversed(table):
        pool.refs[block] -= 1
        if pool.refs[block] == 0:
            pool.free[block] = None  # to the end of the queue, contents and key as they are


# %% [markdown]
# Six blocks, and A and B from above. C is 18 tokens of its own. **Predict** before you open a step: which
# blocks does C take, and what does it evict? When A comes again at the end, how many blocks does it find?

# %%
from course.display import show, steps
from course.prefix_pictures import pool_frame

requests = {"A": A, "B": others["B"], "C": [*range(20, 38)], "A again": A}
pool, tables, contents, frames, queues = Pool(6), {}, {}, [], []
story = ["+A", "+B", "-A", "-B", "+C", "-C", "+A again"]
for event in story:
    name = event[1:]
    if event[0] == "+":
        tables[name] = enter(pool, requests[name])
        for i, block in enumerate(tables[name]):
            contents[block] = requests[name][i * B : (i + 1) * B]
    else:
        leave(pool, tables.pop(name))
    frames.append(pool_frame(pool, tables, contents))
    queues.append(list(pool.free))
captions = [
    "A enters and takes 0, 1, 2; two blocks are full and cached",
    "B enters: two hits, their refs are 2; it takes block 3 for its own token",
    "A leaves: block 2 is free and empty, as it was never full; 0 and 1 are still B's",
    "B leaves, last block first: 3, then 1, then 0; 0 and 1 are free, and still cached",
    "C takes the five oldest, 4, 5, 2, 3 and 1: block 1, the tail of A's beginning, is evicted",
    "C leaves, last block first; its four full blocks stay cached",
    "A again: block 0 is revived; it takes 1 and 3, which evicts the last full block of C",
]
steps(
    frames,
    captions,
    "Six blocks with their tokens and reference counts, and the queue of free ones",
)
assert tables["A again"] == [0, 1, 3]
assert queues[3] == [4, 5, 2, 3, 1, 0]
assert queues[-1] == [2, 5, 4]

# %% [markdown]
# <details>
# <summary>One block found, though A's two were cached</summary>
#
# C needs five of the six blocks. It takes those that hold nothing first, not by design but because they
# were freed first or never used; then block 1. Block 0 outlives it, as the beginning went into the queue
# last. So A finds one block of two and computes six of its ten tokens.
#
# </details>
#
# ## Step 4: the one token that is computed all the same
#
# A prompt of 32 tokens fills two blocks of 16. Ask it twice: the second time both are found. **Predict**:
# how many tokens does the engine compute before it can answer? (`step.rows` holds, for each request of a
# step, its id, its first computed position, and how many.)

# %%
engine = start()
prompt = questions[0][:32]
for _ in range(2):
    [seq] = ask(engine, [prompt])
    [(_, position, count)] = engine.trace[-1].rows
    print(f"found {seq.metrics.num_cached_tokens}, computed {count}, from position {position}")
assert (position, count) == (31, 1)

# %% [markdown]
# Not 0. The cache holds keys and values; the next token comes from the last token's **query**, carried through
# all layers to the logits, and queries are not kept. So the last token goes through the model again. Its
# key and value are in the shared block already, which others may be reading, so they are not stored
# again: the scheduler (lesson 05) cuts the hit, and the runner gives that token the slot −1.

# %% [markdown]
# ## What if two keys collide?
#
# A key of 16 bytes stands for any text. Two different texts may have the same key: by chance once in about
# $2^{64}$ blocks, or because somebody crafted them. Then a request would read another one's keys and
# values, perhaps a stranger's. So a dictionary hit is only a hint: `match` also compares the block's
# **tokens**. Try the worst hash there is, a constant.


# %%
class Constant(BlockManager):
    def _hash(self, seq, index):
        return b"the same for all"


worst, good = start(Constant), start()
for round_ in range(2):
    told = [ask(engine, questions, count=12) for engine in (worst, good)]
    found = [sum(seq.metrics.num_cached_tokens for seq in seqs) for seqs in told]
    print(
        f"round {round_ + 1}: tokens found with a constant {found[0]}, with the real hash {found[1]}"
    )
    assert [seq.output_ids for seq in told[0]] == [seq.output_ids for seq in told[1]]

# %% [markdown]
# All answers stay right; a collision costs a hit and no more. The guard has a limit: it compares **one**
# block's tokens, and trusts the parent's key for all before. Two colliding keys with the same tokens in
# their last block would pass, and only a good hash makes that improbable. xxhash is fast, and no
# protection against somebody who crafts collisions.
#
# ## Assemble: `engine/block_manager.py`
#
# The finished file. First taking and giving back: your `Pool`, with a `Block` for each list entry.

# %%
from course.reading import show_source
from nanovllm.engine import block_manager as module

show_source(module.hash_block, module.Block, BlockManager._take_oldest_free)
show_source(BlockManager._acquire, BlockManager.free)

# %% [markdown]
# Then the prefix cache: your `enter`, in three parts. `match` looks and takes nothing, since the scheduler
# may find that the rest does not fit. `share` takes the hits. `register` enters what is full.

# %%
show_source(BlockManager.match, BlockManager.num_free_after_sharing, BlockManager.share)
show_source(BlockManager.register, BlockManager.unregister, BlockManager._hash)

# %% [markdown]
# What the toy left out, and why it is there:
#
# - A request keeps its keys in `block_hashes`, so a long prompt that waits is hashed once, not at every step.
# - Answers are cached, too: `register` runs again as tokens come. A chat's next turn finds them.
# - `num_free_after_sharing`: a hit on a *free* block uses up a free block, one on a used block does not.
# - `unregister`: a step that failed never wrote what was entered for it.
# - `enable_prefix_caching=False` makes `match` find nothing, and `register` enter nothing.
#
# `register` runs when a step is **planned**, before anything is computed. So requests of the *same* step share:
# the first computes, the others, its **followers**, point at its blocks. Is that safe? Every layer stores the
# keys and values of all rows before any row attends (lesson 03), so a follower reads what was written a
# moment ago.
#
# **Predict**: the eight questions arrive at once, at an empty cache. How many tokens does each find?

# %%
engine = start()
seqs = ask(engine, questions)
print("tokens found:", [seq.metrics.num_cached_tokens for seq in seqs])
print(
    f"computed in {len(engine.trace)} step: {engine.trace[0].num_tokens} tokens of {sum(lengths):,}"
)
assert [seq.metrics.num_cached_tokens for seq in seqs] == [0] + [common // 16 * 16] * 7

# %% [markdown]
# ## Check: invariants, logits, tokens
#
# First integers that must hold at every moment. `run_story` puts the toy's story through the finished
# manager: tables and queues must be the toy's own.


# %%
from collections import Counter

from nanovllm.engine.sequence import Sequence


def check_invariants(manager, seqs):
    held = Counter(block for seq in seqs for block in seq.block_table)
    assert all(block.ref_count == held[block.block_id] for block in manager.blocks)
    assert set(manager._free) == {block.block_id for block in manager.blocks if not block.ref_count}
    assert manager.num_free_blocks + len(held) == manager.num_blocks
    assert all(manager.blocks[block].hash == key for key, block in manager._cached.items())


def run_story():
    manager, seqs = BlockManager(6, B), {}
    for event, queue in zip(story, queues, strict=True):
        name = event[1:]
        if event[0] == "+":
            ids = requests[name]
            seq = seqs[name] = Sequence(name, None, list(ids), SamplingParams(), max_length=99)
            manager.share(seq, manager.match(seq))
            manager.allocate(seq, len(ids))
            seq.num_scheduled = len(ids)
            manager.register(seq)
        else:
            manager.free(seqs.pop(name))
        check_invariants(manager, seqs.values())
        assert list(manager._free) == queue
    return seqs


assert run_story()["A again"].block_table == tables["A again"]
print(f"{len(story)} events: tables and queues as in the toy, all invariants hold")

# %% [markdown]
# Then the engine, busy: 24 requests in an order drawn by chance, with room for few, so that blocks are
# evicted and revived all the time. The invariants are checked after every step.

# %%
import random

rng = random.Random(4)
busy = start(num_gpu_blocks_override=40, max_model_len=512)
prompts = [questions[rng.randrange(8)][: rng.randrange(100, 338)] for _ in range(24)]
params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
seqs = busy.add([busy.make_request(str(i), ids, params) for i, ids in enumerate(prompts)])
while busy.has_unfinished_requests():
    busy.advance()
    check_invariants(busy.block_manager, seqs)
cold = ask(plain, prompts, count=8)
assert [seq.output_ids for seq in seqs] == [seq.output_ids for seq in cold]
found = sum(seq.metrics.num_cached_tokens for seq in seqs)
print(f"{len(busy.trace)} steps, {found:,} of {sum(map(len, prompts)):,} prompt tokens found")

# %% [markdown]
# The tokens are those of an engine without a cache. Now logits in float32, against `transformers`, for a
# question whose beginning comes from the cache. A spy keeps the logits that the engine computes.

# %%
from transformers import AutoModelForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
reference = AutoModelForCausalLM.from_pretrained(own_model(), dtype=torch.float32)
model, kept = engine.core.runner.model, []
compute = model.logits
model.logits = lambda hidden: kept.append(compute(hidden)) or kept[-1]
[seq] = ask(engine, [questions[3]], count=16)
theirs = reference(torch.tensor([seq.token_ids])).logits[0, len(questions[3]) - 1 : -1]
ours = torch.cat(kept)
print(
    f"{seq.metrics.num_cached_tokens} of {len(questions[3])} prompt tokens from the cache;", end=" "
)
print(f"logits differ by {(ours - theirs).abs().max():.0e} at most")
torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)

best, second = theirs.topk(2).values.T
certain = ([*(best - second < 1e-4).tolist(), True]).index(True)  # before the first near tie
assert seq.output_ids[:certain] == theirs.argmax(-1).tolist()[:certain]
print(f"{certain} of 16 tokens compared with transformers: all equal")

# %% [markdown]
# ## Measure: time to first token
#
# TTFT is the time from a request's arrival to its first token. Now a system prompt of 640 tokens, 32 for
# each question, one request after another, so that nobody waits. On a GPU the model is a random one of
# Qwen3-0.6B's shape; a prompt is then random numbers. Four services:
#
# - *one system prompt*, the same for all;
# - *clock behind it*: the same, with the time of day at its end, in tokens 630 to 640;
# - *clock in front*: the same, with the time of day in its first 10 tokens;
# - *no system prompt*: every prompt is another.
#
# **Predict** for each: how many of the 672 tokens does a second request compute?

# %%
import statistics

from course.models import measured_model

device = "cuda" if torch.cuda.is_available() else "cpu"
shared_ids = [rng.randrange(4000) for _ in range(640)]


def random_ids(count):
    return [rng.randrange(4000) for _ in range(count)]


services = {
    "one system prompt": lambda: shared_ids + random_ids(32),
    "clock behind it": lambda: shared_ids[:630] + random_ids(10) + random_ids(32),
    "clock in front": lambda: random_ids(10) + shared_ids[10:] + random_ids(32),
    "no system prompt": lambda: random_ids(672),
}


def one_by_one(make_prompt, enable):
    engine = start(model=measured_model().path, device=device, enable_prefix_caching=enable)
    ask(engine, [random_ids(672)])  # warm up
    seqs = [ask(engine, [make_prompt()])[0] for _ in range(5)][1:]  # the first finds nothing
    counts = [len(seq.token_ids) - 1 - seq.metrics.num_cached_tokens for seq in seqs]
    return counts[0], 1e3 * statistics.median(seq.metrics.ttft for seq in seqs)


print(measured_model())
print(f"{machine.describe()}; median TTFT of 4 requests")
rows = {}
for name, make_prompt in services.items():
    (with_cache, fast), (without, slow) = (one_by_one(make_prompt, on) for on in (True, False))
    rows[name] = with_cache
    print(
        f"{name:20}{with_cache:4} of {without} computed; {fast:6.1f} ms, without cache {slow:6.1f} ms"
    )
assert rows == dict(zip(services, (32, 48, 672, 672), strict=True))

# %% [markdown]
# <details>
# <summary>32, 48, 672, 672</summary>
#
# $640 = 40 \cdot 16$: all whole blocks. A clock at tokens 630 to 639 spoils block 39 alone, so 16 more are
# computed. A clock in front spoils everything: the same 630 tokens follow, and none is found. Whoever
# writes prompts for a service puts what changes last.
#
# </details>
#
# TTFT falls by less than the tokens do: starting a step costs some milliseconds, whatever its size, and
# the new tokens still attend to all 672. Answers come no faster after the first token.
#
# ## Measure: a chat of several turns
#
# Each turn sends the whole conversation again: the earlier questions, the earlier answers, and a new
# question. **Predict**: how does the number of *computed* prompt tokens grow from turn to turn?

# %%
from course.prefix_pictures import hit_rates, turns

talk, prompt_tokens, cached_tokens = [], [], []
for animal in animals[:5]:
    talk.append({"role": "user", "content": f"Tell me a story about a {animal} who finds a key."})
    prompt = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    params = SamplingParams(temperature=0, max_tokens=120)
    good.add([good.make_request(f"turn {len(talk)}", prompt, params)])
    [seq] = good.sequences.values()
    while good.has_unfinished_requests():
        good.advance()
    talk.append({"role": "assistant", "content": seq.detokenizer.text})
    prompt_tokens.append(len(prompt))
    cached_tokens.append(seq.metrics.num_cached_tokens)
fig = turns(prompt_tokens, cached_tokens, "tokens of the course's model, on any machine")
show(fig, f"Prompt tokens by turn: {prompt_tokens}; found in the cache: {cached_tokens}")
print(talk[-1]["content"][:90], "...")
assert max(p - c for p, c in zip(prompt_tokens, cached_tokens, strict=True)) < 60

# %% [markdown]
# It does not grow. The prompt gets longer by a question and an answer each turn; the answer was cached as it
# was made, so only the question, and what was left of a block, is new. Without a cache a chat of $n$ turns
# computes a number of prompt tokens that grows as $n^2$.
#
# ## Where it saves little
#
# **Blocks too small or too large.** `share_of` sends eight prompts of 672 tokens, 640 in common, through the
# manager alone, and times its work. **Predict** the share found for $B = 256$.

# %%
import time


def visit(manager, ids):
    """What one request of a single step asks of the manager; tokens found."""
    seq = Sequence("", None, ids, SamplingParams(), max_length=len(ids) + 1)
    hits = manager.match(seq)
    manager.share(seq, hits)
    manager.allocate(seq, len(ids))
    seq.num_scheduled = len(ids)
    manager.register(seq)
    manager.free(seq)
    return len(hits) * manager.block_size


eight = [shared_ids + random_ids(32) for _ in range(8)]
for size in (1, 4, 16, 64, 256):
    manager = BlockManager(8192 // size, size)
    begin = time.perf_counter()
    found = [visit(manager, prompt) for prompt in eight]
    micro = 1e6 * (time.perf_counter() - begin) / 8
    print(f"B = {size:3}: {found[-1]} of 672 tokens found, {micro:5.0f} µs a request")
assert found[-1] == 512

# %% [markdown]
# At 256 only two whole blocks fit into 640 tokens. At 1 nothing is lost, but each token is a hash, a
# dictionary entry and a `Block` of its own, and bookkeeping takes as long as many a step. 16 is the usual
# middle.
#
# **A cache too small.** Ten chats of 320 tokens, 20 blocks each, take turns, five rounds. All ten need 200
# blocks. **Predict** what share is found with 100 blocks: half?

# %% tags=["nbval-check-output"]
chats = [[rng.randrange(4000) for _ in range(320)] for _ in range(10)]
sizes = [20, 60, 100, 140, 180, 190, 200, 220]
rates = []
for num_blocks in sizes:
    manager = BlockManager(num_blocks, 16)
    found = sum(visit(manager, list(ids)) for _ in range(5) for ids in chats)
    rates.append(found / (5 * 10 * 320))
print({size: f"{rate:.0%}" for size, rate in zip(sizes, rates, strict=True)})
assert rates[2] == 0
assert rates[-1] == 0.8

# %%
fig = hit_rates(sizes, rates, needed=200)
show(fig, f"Share found by blocks in the cache: {dict(zip(sizes, rates, strict=True))}")

# %% [markdown]
# <details>
# <summary>Not half: nothing</summary>
#
# Who comes in turn is always the one who was away longest, and the least recently used blocks are evicted
# first: just those that will be wanted next. From 200 blocks on all four rounds after the first are found,
# 80%. Real chats do not take turns so strictly, so the edge is softer, but it is there.
#
# </details>
#
# ## The stage, and the ladder
#
# Stage 04 is stage 03 with `enable_prefix_caching=True`. The ladder's prompts have most of their tokens in
# common. `compare` asserts that its tokens are stage 02's.

# %%
from course.records import record
from course.stages import STAGES, compare
from course.workload import ladder_workload

results = {}
for number in (2, 3, 4):
    stage = STAGES[number](measured_model().path)
    workload = ladder_workload(stage.vocab_size)
    runs = [stage.run(workload) for _ in range(2)]
    record(runs)
    results[number] = runs[0]
    print(runs[0])
print(workload)
print(compare(results[4], results[2]))

# %%
fig = plots.ladder(upto=4)
show(fig, fig.alt_text)

# %% [markdown]
# Fewer live keys and values, since a shared block counts once, and an earlier first token. Tokens a second
# gain less: prompts are computed once, and the rest of the time is decoding, one token a row. The batch is
# still static, and rows that are done still wait for the slowest: lesson 05.
#
# ## In real vLLM
#
# Release v0.11.0 chains in
# [`hash_block_tokens`](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/v1/core/kv_cache_utils.py#L547-L573)
# and keeps its queue in
# [`vllm/v1/core/block_pool.py`](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/v1/core/block_pool.py#L322-L353).
# Three differences:
#
# 1. A key also covers what changes keys and values beside tokens, such as a LoRA adapter or an image, and a
#    `cache_salt`, with which a service keeps its customers' caches apart. A hit's tokens are not compared:
#    the first parent is a random number, and the hash is to be collision-free.
# 2. A prompt found in full has its **last block** computed again, not the last token
#    ([`get_computed_blocks`](https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/v1/core/kv_cache_manager.py#L174-L180)):
#    computed tokens are a multiple of the block size there.
# 3. Two blocks with the same contents may both be cached, under one key. Here the first one stays alone.
#
# ## Exercises
#
# In `exercises/04_prefix_hashing.ipynb`:
#
# 1. **Predict** (5 min): tokens computed for ten requests of a chat, from its prompt's layout and $B$.
# 2. **Implement** (25 min): `match` and `register` of a block manager with another dictionary.
# 3. **Break and fix** (15 min): a cache that shares blocks between two LoRA adapters.

# %% [markdown]
# ## Recap
#
# Requests share whole blocks from the first token on, found by a key that covers the whole history. A block
# counts its tables; at 0 it waits in a queue, still cached, to be revived by a hit or evicted by need. It
# saves prompt tokens and so time to first token, where prompts begin alike and the cache holds them.
#
# **Check yourself.**
#
# <details><summary>1. Why does a key take in its parent?</summary>
#
# From layer 1 on, keys and values depend on all tokens before. Equal tokens after another history have others.
#
# </details>
# <details><summary>2. B = 16, a prompt of 100 tokens, asked twice. How many are computed the second time?</summary>
#
# Six blocks are full, 96 tokens; 4 are computed. (With 96 tokens it would be 1.)
#
# </details>
# <details><summary>3. A free, cached block is hit. What happens to its refs, the queue and its key?</summary>
#
# Refs go from 0 to 1, it leaves the queue from wherever it stands, and the key stays.
#
# </details>
# <details><summary>4. Why are a request's blocks freed last first?</summary>
#
# The head of the queue is evicted first. A beginning is of use without its tail, a tail without its beginning
# is not.
#
# </details>
# <details><summary>5. Does the cache make the tenth token of an answer come sooner after the ninth?</summary>
#
# No. Decoding reads the same keys and values, shared or not.
#
# </details>
#
# **The next question**: requests come and go at any time. Who gets to run in the next step, and with how many
# tokens?
