"""Stage 05 with so little room that prompts are cut and requests preempted, to check that it holds.

stage, mix = Cramped(own_model(), device="cpu"), cramped_workload()
result = stage.run(mix)       # raises unless every request got exactly its tokens
stage.leaked                  # blocks that nobody gave back
"""

import random

from course.measure.ladder_workload import LadderWorkload
from course.stages import ContinuousBatching

ROWS, TOKENS = 5, 24  # requests that may run at once; tokens a step may compute


class Cramped(ContinuousBatching):
    """Five rows, and 24 tokens a step."""

    leaked: int

    def budget(self, workload: LadderWorkload) -> dict[str, int]:
        return {"max_num_seqs": ROWS, "max_num_batched_tokens": TOKENS}

    def release(self) -> None:
        manager = self.engine.block_manager
        self.leaked = manager.num_blocks - manager.num_free_blocks
        super().release()


def cramped_workload(seed: int = 5) -> LadderWorkload:
    """20 requests, prompts of up to 60 tokens and answers of up to 40, in 8 blocks of 16."""
    rng = random.Random(seed)
    texts = [[rng.randrange(1, 4000) for _ in range(rng.randint(1, 60))] for _ in range(20)]
    return LadderWorkload(texts, [rng.randint(1, 40) for _ in texts], 0, kv_tokens=128)
