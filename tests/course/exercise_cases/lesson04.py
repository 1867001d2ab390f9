"""Wrong and right answers to lesson 04's exercises."""

from itertools import accumulate, takewhile

from exercise_cases import Case
from nanovllm.engine.block_manager import BlockManager, hash_block


def chained(token_ids, size):
    blocks = [tuple(token_ids[i * size : (i + 1) * size]) for i in range(len(token_ids) // size)]
    return list(accumulate(blocks, hash_block, initial=b""))[1:]


class MyPrefixCache(BlockManager):
    """With all keys made at once, and the keys in `blocks` as the last word."""

    def find_cached_blocks(self, seq):
        keys = takewhile(
            self.hash_to_block_id.__contains__, chained(seq.token_ids, self.block_size)
        )
        return [self.hash_to_block_id[key] for key in keys]

    def cache_full_blocks(self, seq):
        keys = chained(seq.token_ids[: seq.num_scheduled], self.block_size)
        for key, block_id in zip(keys, seq.block_table, strict=False):
            if self.hash_to_block_id.setdefault(key, block_id) == block_id:
                self.blocks[block_id].hash = key


def first_to_compute(num_tokens, num_hits, block_size):
    cached = num_hits * block_size
    return cached if cached < num_tokens else cached - 1


ENTERED = """                self.hash_to_block_id[key] = block_id
                self.blocks[block_id].hash = key"""
CASES = {
    "ten_requests": Case(
        mutants=[
            ("130 + 9 * (130 - 96)", "1300", "without sharing"),
            ("130 + 9 * (130 - 96)", "100 + 300", "Whole blocks are shared"),
            ("130 + 9 * (130 - 96)", "340", "The first request finds an empty cache"),
            ("(130 - 96)", "(130 - 112)", "each request's own"),
            ("10 * 140", "436 + 100", "The clock is the first thing"),
            ("96 + 9 * 1", "96", "queries are not kept"),
            ("96 + 9 * 1", "96 + 9 * 16", "vLLM's way"),
        ],
        other={"system": 436, "clock": 1400, "same": 105},
    ),
    "my_prefix_cache": Case(
        mutants=[
            ("key = hash_block(key,", "key = hash_block(b'',", "cover what stands before"),
            ("                break\n", "                continue\n", "A table has no hole"),
            ("min(seq.num_scheduled, len(seq.token_ids))", "len(seq.token_ids)", "6 of 10 tokens"),
            ("min(seq.num_scheduled, len(seq.token_ids))", "seq.num_scheduled", "not known yet"),
            ("\n                self.blocks[block_id].hash = key", "", "reused by another text"),
            (
                "            if key not in self.hash_to_block_id:\n" + ENTERED,
                ENTERED.replace("                ", "            "),
                "The first stays",
            ),
            (ENTERED, "                pass", "Does cache_full_blocks enter a key?"),
            (
                "        return hits\n",
                "        self.touch(seq, hits); return hits\n",
                "It only looks",
            ),
            ("len(seq.token_ids)) // size", "len(seq.token_ids)) // size + 1", "only full blocks"),
            (
                "hits.append(self.hash_to_block_id[key])",
                "hits.insert(0, self.hash_to_block_id[key])",
                "in the order",
            ),
            (
                "if key not in self.hash_to_block_id:\n                break",
                "if not self.hash_to_block_id.get(key):\n                break",
                "block 0 is a block",
            ),
            (
                "len(seq.token_ids) - self.block_size + 1,",
                "(len(seq.token_ids) - 1) // self.block_size * self.block_size,",
                "the scheduler's matter",
            ),
            (
                "min(seq.num_scheduled, len(seq.token_ids))",
                "min(seq.num_prompt_tokens, seq.num_scheduled)",
                "an answer is found",
            ),
            ("class MyPrefixCache(BlockManager)", "class MyPrefixCache", "no longer inherits"),
        ],
        other=MyPrefixCache,
    ),
    "block_keys": Case(
        mutants=[
            ("parent = key", "pass", "the key forgets what stands before"),
            (
                "parent = key",
                "parent = repr(token_ids[start : start + block_size]).encode()",
                "knows the second block and not the first",
            ),
            ("parent = key", "parent = key + bytes(len(token_ids))", "nothing would ever be found"),
            ("- block_size + 1", "", "two full blocks"),
            ("keys.append(key)", "keys.append(key[:8])", "made by hash_block"),
        ],
        other={"block_keys": chained},
    ),
    "first_to_compute": Case(
        mutants=[
            ("min(num_hits * block_size, num_tokens - 1)", "num_hits * block_size", "no logits"),
            ("min(num_hits * block_size, num_tokens - 1)", "0", "saved nothing"),
            ("num_tokens - 1)", "(num_tokens - 1) // block_size * block_size)", "whole block"),
            (
                "num_hits * block_size, num_tokens - 1",
                "num_hits * block_size - 1, num_tokens",
                "special",
            ),
            ("num_tokens - 1)", "num_tokens - 2)", "position 31"),
        ],
        other=first_to_compute,
    ),
}
