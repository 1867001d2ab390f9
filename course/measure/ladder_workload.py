"""The ladder's workload: what every stage, from the first to the last, is given to do.

64 requests that share a system prompt of 256 tokens, each with 16 to 64 tokens of its own, and 16
to 256 tokens to be answered. Prompts are random token ids from a fixed seed: only their number
matters to speed. No end-of-sequence id ends an answer, so each request gets exactly its tokens.

Every stage has the same room for keys and values: that of a quarter of the requests, if each were
as long as any may be. How many it can fit in there is much of the difference between stages.

On a CPU: a quarter of the requests, and a quarter of every length. Stage 01 decides this: for every
token it computes all those before it again. With a model of the course's shape, on one thread, that
took 8 ms at 25 tokens, 15 ms at 100 and 59 ms at 400. So an eighth of the requests in full length
(8 x 136 tokens) would take over a minute. 16 requests of 34 tokens on average, at about 100 tokens
of context, took 8 to 10 seconds, and each later stage 1 to 2; twice that when other work shares the
cores.
"""

import random
from dataclasses import dataclass, replace

from course.measure.workloads import Workload

SHARED = 256  # tokens of the system prompt
OWN = (16, 64)  # tokens of a request's own prompt
OUTPUT = (16, 256)  # tokens it is to be answered with
REQUESTS = 64
ROOM = 4  # the room is for the requests divided by this, each of the greatest length
ON_CPU = 4  # requests and lengths are divided by this


@dataclass(frozen=True)
class LadderWorkload(Workload):
    """prompts[i], token ids, is to be answered with exactly num_outputs[i] tokens."""

    kv_tokens: int = 0  # tokens whose keys and values there is room for, all requests together

    @property
    def max_len(self) -> int:
        """The longest a request may become: the longest prompt and the longest output."""
        return max(map(len, self.prompts)) + max(self.num_outputs)

    @property
    def num_output_tokens(self) -> int:
        return sum(self.num_outputs)

    def first(self, count: int) -> "LadderWorkload":
        """The first `count` requests, with the same room."""
        prompts, outputs = self.prompts[:count], self.num_outputs[:count]
        return replace(self, prompts=prompts, num_outputs=outputs)

    def warm_up(self, vocab_size: int) -> "LadderWorkload":
        """Two short requests with other ids, so that no prefix cache knows the real ones."""
        prompts = [[(token + 1) % vocab_size for token in p] for p in self.prompts[:2]]
        return replace(self, prompts=prompts, num_outputs=[3, 2][: len(prompts)])

    def __str__(self) -> str:
        lengths = [len(prompt) for prompt in self.prompts]
        return (
            f"{len(self.prompts)} requests: prompts of {min(lengths)} to {max(lengths)} tokens, "
            f"{self.shared_prefix} of them shared; {min(self.num_outputs)} to "
            f"{max(self.num_outputs)} tokens out, {self.num_output_tokens:,} in all; "
            f"room for the keys and values of {self.kv_tokens:,} tokens"
        )


def ladder_workload(vocab_size: int, device: str = "auto", seed: int = 0) -> LadderWorkload:
    """The workload for a device ("cpu", "cuda"; "auto": the GPU if there is one)."""
    if device == "auto":
        from course.models.choice import has_gpu

        device = "cuda" if has_gpu() else "cpu"
    device = "cpu" if device == "cpu" else "cuda"
    part = ON_CPU if device == "cpu" else 1
    rng = random.Random(seed)

    def some_ids(count: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(count)]

    def a_length(limits: tuple[int, int]) -> int:
        return rng.randint(limits[0] // part, limits[1] // part)

    shared = some_ids(SHARED // part)
    count = REQUESTS // part
    prompts = [shared + some_ids(a_length(OWN)) for _ in range(count)]
    outputs = [a_length(OUTPUT) for _ in range(count)]
    longest = (SHARED + OWN[1] + OUTPUT[1]) // part
    return LadderWorkload(prompts, outputs, len(shared), count // ROOM * longest)
