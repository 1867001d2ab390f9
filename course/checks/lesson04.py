"""Checks of lesson 04's exercises: what requests compute, a prefix cache, its keys, its edge."""

from typing import Any

from course.checks import CheckFailed, attempt, check, compare, expect
from course.checks.engines import check_answers, check_base, sequence
from course.checks.prefixes import ask_about_the_dragon, ask_twice, dragons, second_time
from course.serving import ask, start_engine
from nanovllm.engine.block_manager import BlockManager, hash_block
from nanovllm.engine.sequence import Sequence

__all__ = [
    "ask_about_the_dragon",
    "ask_twice",
    "check_block_keys",
    "check_first_to_compute",
    "check_my_prefix_cache",
    "check_ten_requests",
]


@check
def check_ten_requests(system: Any, clock: Any, same: Any) -> None:
    B, common, own, time = 16, 100, 30, 10
    wrong = {
        10 * (common + own): "That is without sharing. What does the second request find?",
        common + 10 * own: "Whole blocks are shared: the common beginning ends inside of one.",
        10 * (common + own - common // B * B): "The first request finds an empty cache.",
        common + own + 9 * (common + own - (common // B + 1) * B): "The block in which the common "
        "beginning ends holds tokens that are each request's own: it is not shared.",
    }
    truth = common + own + 9 * (common + own - common // B * B)
    look = "The first computes all. From the others take the whole blocks of the common beginning."
    compare("system", system, truth, wrong, look)
    wrong = {
        truth + 10 * time: "The clock is the first thing in the prompt: every block behind it has "
        "another history, and another key.",
        truth: "A block is found only if all tokens before it are equal, too.",
    }
    compare("clock", clock, 10 * (time + common + own), wrong, "What stands before each block?")
    wrong = {
        96: "The first answer token comes from the last prompt token's query, and queries are not "
        "kept: it is computed all the same, nine times.",
        96 + 9 * B: "That is vLLM's way, which computes the last block again. This engine computes "
        "the last token.",
        960: "That is without sharing.",
        10: "The first request finds an empty cache.",
    }
    compare("same", same, 96 + 9, wrong, "96 tokens are six whole blocks. What is still needed?")


# -- a prefix cache ------------------------------------------------------------------------------


def enter(manager: BlockManager, ids: list[int], scheduled: int | None = None) -> Sequence:
    """A request that found nothing, with its blocks taken and entered."""
    seq = sequence(ids)
    manager.allocate(seq, len(ids))
    seq.num_scheduled = len(ids) if scheduled is None else scheduled
    attempt(manager.cache_full_blocks, seq)
    return seq


def hits_of(manager: BlockManager, ids: list[int]) -> list[int]:
    hits = attempt(manager.find_cached_blocks, sequence(ids))
    expect(isinstance(hits, list), f"find_cached_blocks returns a list of block ids, got {hits!r}.")
    return hits


ONE, TWO = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [9, 9, 9, 9, 5, 6, 7, 8, 9, 10]


@check
def check_my_prefix_cache(MyPrefixCache: Any) -> None:
    check_base(MyPrefixCache, BlockManager, "MyPrefixCache")
    check_found(attempt(MyPrefixCache, 16, 4))
    check_eviction(attempt(MyPrefixCache, 4, 4))
    check_history(attempt(MyPrefixCache, 16, 4))
    check_what_is_entered(attempt(MyPrefixCache, 16, 4))
    check_twins(attempt(MyPrefixCache, 16, 4))
    check_in_the_engine(MyPrefixCache)


def check_found(manager: BlockManager) -> None:
    expect(hits_of(manager, ONE) == [], "An empty cache has no hits.")
    seq = enter(manager, ONE)
    free = manager.num_free_blocks
    hits = hits_of(manager, ONE)
    expect(
        manager.num_free_blocks == free and manager.blocks[seq.block_table[0]].ref_count == 1,
        "find_cached_blocks took what it found. It only looks, because the rest of the request may "
        "not fit.",
    )
    expect(
        len(hits) < 3 and manager.blocks[seq.block_table[2]].hash is None,
        "The third block holds 2 of 4 tokens, and has a key. Its owner still writes into it: only "
        "full blocks are shared.",
    )
    expect(
        hits or not manager.hash_to_block_id,
        "cache_full_blocks entered keys, and find_cached_blocks finds none of them. Are both "
        "methods' keys the same? And block 0 is a block, not nothing: ask `is None`.",
    )
    expect(
        hits,
        "Ten tokens were entered, and nothing of them is found. "
        "Does cache_full_blocks enter a key?",
    )
    expect(
        hits == seq.block_table[:2],
        f"The same ten tokens: the two full blocks are found, {seq.block_table[:2]}, in the order "
        "of "
        f"the text; yours found {hits}.",
    )
    part = hits_of(manager, [*ONE[:7], 0, 9, 10])
    expect(part == hits[:1], f"Seven common tokens fill one block of 4; yours found {len(part)}.")
    exact = hits_of(manager, ONE[:8])
    expect(
        exact == hits,
        f"A text of 8 tokens has two full blocks; yours found {len(exact)}. The last token is the "
        "scheduler's matter, not the block manager's.",
    )


def check_history(manager: BlockManager) -> None:
    enter(manager, TWO)
    seq = enter(manager, ONE)
    hits = hits_of(manager, ONE)
    expect(
        hits == seq.block_table[:2],
        "Block 5 6 7 8 was found that stands after other tokens: its keys and values are those of "
        "another text. A key must cover what stands before: hash_block(parent's key, tokens).",
    )
    manager.evict(manager.blocks[seq.block_table[0]])
    expect(
        hits_of(manager, ONE) == [],
        "The first block was evicted, and the second was found all the same. A table has no hole: "
        "stop at the first key that is not known.",
    )


def check_what_is_entered(manager: BlockManager) -> None:
    seq = enter(manager, ONE, scheduled=6)
    expect(
        hits_of(manager, ONE) == seq.block_table[:1],
        "6 of 10 tokens were scheduled, which fills one block; yours entered another number. The "
        "second is not computed yet: whoever found it would read what was never written.",
    )
    seq.num_scheduled = 10
    attempt(manager.cache_full_blocks, seq)
    expect(
        hits_of(manager, ONE) == seq.block_table[:2],
        "cache_full_blocks was called again when more was scheduled, and the second block is not "
        "found.",
    )
    seq = enter(manager, [3, 3, 3, 3, 3, 3, 3], scheduled=8)
    expect(
        manager.blocks[seq.block_table[1]].hash is None,
        "The eighth token is scheduled and its id not known yet (it is on the device): a block "
        "with such a token has no key. Count the tokens that are known, too.",
    )


def check_eviction(manager: BlockManager) -> None:
    seq = enter(manager, ONE[:8])
    table = list(seq.block_table)
    manager.free(seq)
    expect(
        hits_of(manager, ONE[:8]) == table,
        "The request is done and nobody needed its blocks: they still hold its keys and values, "
        "and should be found.",
    )
    enter(manager, [20] * 16)  # takes all blocks
    expect(
        hits_of(manager, ONE[:8]) == [],
        "Its blocks were reused by another text, and are still found. Who evicts a block looks for "
        "its key in self.blocks[i].hash: note it there when you enter it.",
    )


def check_twins(manager: BlockManager) -> None:
    first = enter(manager, ONE)
    second = enter(manager, ONE)  # came while the first was not known, as in one step
    expect(
        hits_of(manager, ONE) == first.block_table[:2],
        "A second request computed the same tokens, and its blocks took the first one's place. The "
        "first stays: else a key leads to one block while another believes it has it.",
    )
    manager.free(second)
    manager.free(first)
    cached = dict(manager.hash_to_block_id)
    expect(
        all(manager.blocks[block_id].hash == key for key, block_id in cached.items()),
        "A block's hash is not the key that leads to it.",
    )
    hashes = [block.block_id for block in manager.blocks if block.hash is not None]
    expect(
        sorted(hashes) == sorted(cached.values()),
        "A block has a hash, and no key leads to it: when it is evicted, another's key is deleted.",
    )


def check_in_the_engine(manager_class: type) -> None:
    check_answers(block_manager_class=manager_class)
    found, turns = [], []
    for kind in (BlockManager, manager_class):
        engine = start_engine(kind, block_size=4)
        seqs = [ask(engine, [ids], count=4)[0] for ids in (ONE * 2, ONE * 2, ONE + TWO, ONE * 3)]
        found.append([seq.metrics.num_cached_tokens for seq in seqs])
        [first] = ask(engine, [ONE * 2], count=12)
        [second] = ask(engine, [ONE * 2 + first.output_ids], count=4)
        turns.append(second.metrics.num_cached_tokens)
    expect(
        found[0] == found[1],
        f"In the engine four requests find {found[0]} tokens; with yours {found[1]}. Is "
        "each full block entered, and found from the first on?",
    )
    expect(
        turns[0] == turns[1],
        f"A chat's second turn begins with the first one's 20 tokens and its answer of 12. In the "
        f"engine it finds {turns[0]} tokens, with yours {turns[1]}: an answer is found as a prompt "
        "is. Its blocks are entered as they grow full.",
    )


# -- keys ----------------------------------------------------------------------------------------


@check
def check_block_keys(block_keys: Any) -> None:
    one, two = (attempt(block_keys, ids, 4) for ids in (ONE, TWO))
    expect(
        isinstance(one, list) and len(one) == 2,
        f"Ten tokens are two full blocks of 4, so two keys; yours: {one!r}.",
    )
    expect(
        one[1] != two[1],
        "Block 5 6 7 8 has the same key after 1 2 3 4 and after 9 9 9 9: the key forgets what "
        "stands before. What should `parent` be for the second block?",
    )
    long = [*ONE[:4], 0, 0, 0, 0, *ONE[4:8]], [*TWO[:4], 0, 0, 0, 0, *TWO[4:8]]
    one, two = (attempt(block_keys, ids, 4) for ids in long)
    expect(
        one[2] != two[2],
        "The third block's key knows the second block and not the first. Its parent is a key, and "
        "not the block's tokens: so that it stands for all before.",
    )
    again = attempt(block_keys, ONE[:8], 4)
    expect(
        again == attempt(block_keys, ONE, 4),
        "Two texts with the same first 8 tokens have other keys: nothing would ever be found. "
        "A key depends on the tokens up to its block's end, and on nothing else.",
    )
    first = hash_block(b"", tuple(ONE[:4]))
    expect(again == [first, hash_block(first, tuple(ONE[4:8]))], "Keys are made by hash_block.")
    after, alone = attempt(dragons, block_keys)
    expect(
        after.output_ids == alone.output_ids,
        "The keys are right on small texts, but the dragon's story is still another.",
    )


# -- nothing left to run -------------------------------------------------------------------------


@check
def check_first_to_compute(first_to_compute: Any) -> None:
    start = attempt(first_to_compute, 32, 2, 16)
    expect(
        start != 32,
        "32 tokens, all cached: yours begins at 32, behind the last one. Nothing is computed, so "
        "there are no logits to take the first answer token from.",
    )
    expect(
        start != 0,
        "All 32 tokens are computed again: the cache has saved nothing. What is the least that "
        "must "
        "be computed?",
    )
    expect(
        start != 16,
        "A whole block is computed again. (vLLM does that.) The last token would do, since this "
        "engine does not store it again.",
    )
    expect(start == 31, f"32 tokens, all cached: the last one is at position 31, not {start}.")
    for num_tokens, num_hits, wanted in ((40, 2, 32), (33, 2, 32), (32, 1, 16), (20, 0, 0)):
        start = attempt(first_to_compute, num_tokens, num_hits, 16)
        expect(
            start == wanted,
            f"Of {num_tokens} tokens {num_hits} blocks of 16 are cached: the first to compute is "
            "at "
            f"{wanted}, yours begins at {start}. Only a prompt found in full is a special case.",
        )
    try:
        seq, computed = second_time(first_to_compute)
    except Exception as error:
        raise CheckFailed(f"In the engine: {type(error).__name__}: {error}") from error
    expect(computed == (31, 1), f"In the engine the second request computed {computed}.")
    expect(len(seq.output_ids) == 4, "The second request got no answer.")
