"""Random workloads through the real scheduler, block manager and runner: every output exact."""

import random

import pytest
from counting_model import (
    VOCAB,
    CountingModel,
    check_blocks,
    expected_output,
    make_core,
    make_sequence,
)

WORKLOADS = 2000
PARTS = 8


def run_workload(seed: int) -> int:
    """One random workload on a small cache, with sharing, aborts and stop ids; its preemptions."""
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 3, 4, 8])
    longest = rng.randint(4, 40)
    num_blocks = -(-longest // block_size) + rng.randint(0, 12)
    core = make_core(rng, num_blocks, block_size)
    shared = [rng.randrange(VOCAB) for _ in range(longest)]
    seqs, waiting = [], []
    for number in range(rng.randint(1, 10)):
        length = rng.randint(1, longest - 1)
        same = rng.randint(0, length)
        prompt = shared[:same] + [rng.randrange(VOCAB) for _ in range(length - same)]
        if rng.random() < 0.3:  # alike but for its head: only a chained hash tells them apart
            prompt[0] = rng.randrange(VOCAB)
        stops = frozenset(rng.sample(range(VOCAB), 2)) if rng.random() < 0.3 else frozenset()
        waiting.append(make_sequence(str(number), prompt, rng.randint(1, longest - length), stops))
    while waiting or core.has_work:
        if waiting and rng.random() < 0.5:
            seqs.append(waiting.pop())
            core.scheduler.add(seqs[-1])
        if seqs and rng.random() < 0.03:
            core.abort([rng.choice(seqs)])
        core.step()
        check_blocks(core)
    for seq in seqs:
        check_output(seq)
    assert core.scheduler.block_manager.num_free_blocks == num_blocks
    return sum(seq.metrics.num_preempted_tokens > 0 for seq in seqs)


def check_output(seq) -> None:
    output = seq.output_ids
    prompt = seq.token_ids[: seq.num_prompt_tokens]
    assert output == expected_output(prompt, len(output))
    if seq.finish_reason == "length":
        assert len(output) == seq.params.max_tokens
    elif seq.finish_reason == "stop":
        assert output[-1] in seq.stop_ids
    assert not set(output[:-1]) & seq.stop_ids


@pytest.mark.parametrize("part", range(PARTS))
def test_random_workloads_are_exact(part):
    preempted = sum(run_workload(seed) for seed in range(part, WORKLOADS, PARTS))
    assert preempted > 0, "no workload preempted anything: it proves less than it says"


class FailingModel(CountingModel):
    """Fails at one call, before anything of that step is written to the cache."""

    def __init__(self, fail_at: int):
        self.calls_left = fail_at

    def __call__(self, *args):
        self.calls_left -= 1
        if self.calls_left == 0:
            raise RuntimeError("planted failure")
        return super().__call__(*args)


def run_to_the_end(core) -> None:
    while core.has_work:
        core.step()


@pytest.mark.parametrize("fail_at", range(1, 8))
@pytest.mark.parametrize("async_scheduling", [False, True])
def test_a_failed_step_is_undone(fail_at, async_scheduling):
    """Three prompts share a prefix within a step: none may keep blocks that were never written."""
    core = make_core(random.Random(0), 40, 4)
    core.async_scheduling = async_scheduling
    core.scheduler.max_num_batched_tokens, core.scheduler.max_num_seqs = 16, 4
    core.scheduler.block_manager.enable_prefix_caching = True
    core.runner.model = FailingModel(fail_at)
    seqs = [make_sequence(str(i), [*range(20), i], 6) for i in range(3)]
    for seq in seqs:
        core.scheduler.add(seq)
    with pytest.raises(RuntimeError, match="planted"):
        run_to_the_end(core)
    check_blocks(core)
    run_to_the_end(core)
    for seq in seqs:
        check_output(seq)
        assert len(seq.output_ids) == 6
    assert core.scheduler.block_manager.num_free_blocks == 40
