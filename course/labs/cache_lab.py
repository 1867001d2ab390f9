"""What lesson 02 times: a pass of some tokens, and the next token with and without a cache.

pass_ms(stage_02, 32)                  # 32 tokens at once, in milliseconds
next_token_ms(stage_01, stage_02, 900)  # of a text of 900 tokens: all again, or one
"""

import torch

from course.measure.timing import measure
from course.stages import ContiguousCache, Recompute


def pass_ms(stage: ContiguousCache, n: int) -> float:
    """Milliseconds of a pass of n tokens from position 0 on, with their logits; best of five."""
    some = torch.randint(stage.vocab_size, (1, n)).to(stage.device)
    begin, cache = torch.zeros(1, dtype=torch.int64, device=stage.device), stage.new_cache(1, n)
    logits_of = stage.model.compute_logits
    return 1e3 * measure(lambda: logits_of(stage.forward(some, begin, cache))).lowest


def next_token_ms(again: Recompute, cached: ContiguousCache, n: int) -> tuple[float, float]:
    """Milliseconds for the token after n: all of them computed again, and one over a cache.

    By turns, so that what else the machine does slows both; the fastest of three turns.
    """
    some = torch.randint(cached.vocab_size, (n,)).tolist()
    at, cache = torch.tensor([n]).to(cached.device), cached.new_cache(1, n + 1)
    turns = [
        (
            measure(lambda: again.last_logits(some), repeats=1).lowest,
            measure(lambda: cached.decode([5], at, cache), repeats=3).lowest,
        )
        for _ in range(3)
    ]
    all_again, only_one = map(min, zip(*turns, strict=True))
    return 1e3 * all_again, 1e3 * only_one
