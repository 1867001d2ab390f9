"""Wrong and right answers to lesson 08's exercises."""

import torch.nn.functional as F

from exercise_cases import Case


def column_linear(x, weight, bias, ranks, units):
    """Head by head."""
    heads = weight.view(units, -1, weight.shape[1])
    shard = ranks.shard(units)
    mine = range(shard.start, shard.start + shard.count)
    weight = heads[mine.start : mine.stop].flatten(0, 1)
    out = x @ weight.T
    return out if bias is None else out + bias.view(units, -1)[mine.start : mine.stop].flatten()


def row_linear(x, weight, bias, residual, ranks, units):
    """Bias and residual after the sum, on every rank; in place, but in its own tensor."""
    shard = ranks.shard(units, weight.shape[1] // units, dim=1)
    total = F.linear(x, weight.narrow(1, shard.start, shard.count))
    ranks.all_reduce(total)
    if bias is not None:
        total += bias
    return total.add_(residual)


def shared_out(x, weight, bias, residual, ranks, units):
    """Each rank brings its part of the product, and a share of all else."""
    shard = ranks.shard(units, weight.shape[1] // units)
    part = F.linear(x, weight[:, shard.start : shard.start + shard.count])
    part = part + residual / ranks.world_size
    if bias is not None:
        part = part + bias / ranks.world_size
    return ranks.all_reduce(part)


def cache_blocks(ranks, free_bytes, block_bytes, needed):
    """Bytes are agreed on, not blocks."""
    num_blocks = ranks.all_reduce_min(free_bytes) // block_bytes
    if needed > num_blocks:
        raise ValueError("too small")
    return num_blocks


AGREES = "num_blocks = ranks.all_reduce_min(free_bytes // block_bytes)"
OWN = "num_blocks = free_bytes // block_bytes"
CASES = {
    "a_rank": Case(
        mutants=[
            ("12288 * 2 // 4", "12288 * 2", "the whole MLP"),
            ("3 * 4096", "2 * 4096", "three matrices"),
            ("(8 // 4)", "8", "its own KV heads"),
            ("2 * 36 * (8", "36 * (8", "a key and a value"),
            ("32 * 4096 * 2", "32 * 4096 * 2 // 4", "is not cut"),
            ("(2 * 36 + 1)", "(2 * 36)", "The embedding"),
            ("(2 * 36 + 1)", "(36 + 1)", "two halves"),
            ("36 * 1 * 128", "36 * 128 // 2", "A head is never cut"),
        ],
        other={
            "mlp_bytes": 75_497_472,
            "token_bytes": 36_864,
            "reduced": 19_136_512.0,
            "token_bytes_16": 18_432,
        },
    ),
    "two_linears": Case(
        mutants=[
            ("bias[mine])", "None)", "Each output is on one rank"),
            (
                "slice(shard.start, shard.start + shard.count)",
                "slice(shard.start, shard.count)",
                "not where they end",
            ),
            (
                "shard = ranks.shard(units, width)\n    mine",
                "shard = ranks.shard(len(weight))\n    mine",
                "heads stay whole",
            ),
            ("return ranks.all_reduce(part)", "return part", "they must be added"),
            (
                "return ranks.all_reduce(part)",
                "return ranks.all_reduce(part) if ranks.rank == 0 else part",
                "wait for ever",
            ),
            ("ranks.rank == 0", "ranks.rank >= 0", "the residual comes in 2 times"),
            (
                "        if bias is not None:\n            part = part + bias\n",
                "    if bias is not None:\n        part = part + bias\n",
                "the bias comes in 2 times",
            ),
            ("part = part + residual", "part = residual.add_(part)", "its caller's"),
            ("part = part + residual", "pass", "the residual is missing"),
            ("part = part + bias", "pass", "the bias is missing"),
        ],
        other={"column_linear": column_linear, "row_linear": row_linear},
        more=({"row_linear": shared_out},),
    ),
    "cache_blocks": Case(
        mutants=[
            (AGREES, OWN, "plans differ"),
            (AGREES, "num_blocks = ranks.broadcast(free_bytes // block_bytes)", "has no memory"),
            ("return num_blocks", "return needed", "could have"),
            (
                AGREES,
                f"{OWN}\n    if ranks.rank == 0:\n"
                "        num_blocks = ranks.all_reduce_min(num_blocks)",
                "entered by all ranks or none",
            ),
            (AGREES, f"{OWN}\n    agreed = ranks.all_reduce_min(num_blocks)", "plans differ"),
        ],
        other=cache_blocks,
    ),
}
LATE = [
    (
        f"    {AGREES}\n",
        f"    {OWN}\n    if num_blocks >= needed:\n"
        "        num_blocks = ranks.all_reduce_min(num_blocks)\n",
        "Agree first",
    ),
    ("num_blocks < needed", "free_bytes // block_bytes < needed", "another goes on alone"),
]
CASES["cache_blocks"].mutants.extend(LATE)
