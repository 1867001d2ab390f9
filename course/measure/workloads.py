"""The reference workloads: which prompts, and how many tokens each request is to get.

Prompts are random token ids, since only their number matters to speed. Every run of a workload has
the same lengths and other ids, so that no run finds the last one's prefixes in the cache. W5 has
the prompts and lengths of W1, and differs in how tokens are sampled.
"""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Workload:
    """prompts[i], token ids, is to be answered with num_outputs[i] tokens."""

    prompts: list[list[int]]
    num_outputs: list[int]
    shared_prefix: int = 0  # leading tokens that all prompts have in common


def throughput(run: int) -> Workload:
    """W1: 256 prompts of 100 to 1,024 tokens, 100 to 1,024 out each: 133,966 in all."""
    rng = random.Random(0)
    prompts = [[rng.randint(0, 10_000) for _ in range(rng.randint(100, 1024))] for _ in range(256)]
    num_outputs = [rng.randint(100, 1024) for _ in range(256)]
    return Workload([[token + 20_000 * run for token in p] for p in prompts], num_outputs)


def latency(run: int) -> Workload:
    """W2: one prompt of 128 tokens, 512 out."""
    rng = random.Random(100 + run)
    return Workload([[rng.randint(0, 10_000) for _ in range(128)]], [512])


def shared_prefix(run: int) -> Workload:
    """W3: 256 prompts that share 2,048 tokens and have 128 of their own, 64 out each."""
    rng = random.Random(200 + run)
    shared = [rng.randint(0, 10_000) for _ in range(2048)]
    prompts = [shared + [rng.randint(0, 10_000) for _ in range(128)] for _ in range(256)]
    return Workload(prompts, [64] * 256, shared_prefix=2048)


WORKLOADS: dict[str, Callable[[int], Workload]] = {
    "W1": throughput,
    "W2": latency,
    "W3": shared_prefix,
    "W5": throughput,
}
PLAIN = {"temperature": 0.6}
QWEN3 = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}  # what Qwen3's generation_config asks for
SAMPLING: dict[str, dict[str, float]] = {"W1": PLAIN, "W2": PLAIN, "W3": PLAIN, "W5": QWEN3}


def number_runs(names: list[str], runs: int) -> dict[str, range]:
    """The numbers of each workload's runs, when one engine runs all the workloads.

    Two workloads with the same prompts get different numbers, because the second one would
    otherwise find the prompts of the first one in the prefix cache.
    """
    taken: Counter[Callable[[int], Workload]] = Counter()
    numbers = {}
    for name in names:
        first = taken[WORKLOADS[name]]
        numbers[name] = range(first, first + runs)
        taken[WORKLOADS[name]] += runs
    return numbers


def make_workload(name: str, run: int, scale: float, vocab_size: int) -> Workload:
    """Workload `name` for its `run`-th time; at scale 1 and a large vocabulary, exactly as above.

    scale: of the number of requests and of every length alike, so 1/8 is 1/64 of the tokens.
    """
    workload = shrink(WORKLOADS[name](run), scale)
    if max(map(max, workload.prompts)) < vocab_size:
        return workload
    prompts = [[(token + run) % vocab_size for token in p] for p in workload.prompts]
    return replace(workload, prompts=prompts)


def shrink(workload: Workload, scale: float) -> Workload:
    """The first requests of a workload, all lengths shortened alike; at scale 1 all of it."""

    def scaled(length: int) -> int:
        return max(1, round(scale * length))

    common = round(scale * workload.shared_prefix)
    count = scaled(len(workload.prompts))
    prompts = []
    for prompt in workload.prompts[:count]:
        own = prompt[workload.shared_prefix :]
        prompts.append(prompt[:common] + own[: scaled(len(own))])
    return Workload(prompts, [scaled(n) for n in workload.num_outputs[:count]], common)
