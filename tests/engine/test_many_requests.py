"""What a step and an add cost does not depend on how many requests are queued.

The cost is counted, never timed: calls of functions (a generator's every item is one), and looks at
all that the queue or the table of requests holds.
"""

import sys
from collections import Counter
from itertools import pairwise

import pytest
from counting_engine import engine_of, llm_of
from counting_model import make_sequence
from small_requests import greedy

from nanovllm import SamplingParams
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.core import EngineCore
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.waiting_queue import WaitingQueue

OPTIONS = {"max_model_len": 32, "num_gpu_blocks_override": 24, "block_size": 4, "max_num_seqs": 3}
FEW, MANY = 20, 1000


class Calls:
    """Counts the calls of functions within a `with` block, by name."""

    def __enter__(self):
        self.counts = Counter()
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)

    def _note(self, frame, event, argument):
        if event == "call":
            self.counts[frame.f_code.co_qualname] += 1
        elif event == "c_call":
            self.counts[argument.__qualname__] += 1

    @property
    def total(self):
        return sum(self.counts.values())


class Walked(dict):
    """A table of requests that counts how often somebody goes through all of it."""

    walks = 0

    def __iter__(self):
        self.walks += 1
        return super().__iter__()

    def keys(self):
        self.walks += 1
        return super().keys()

    def values(self):
        self.walks += 1
        return super().values()

    def items(self):
        self.walks += 1
        return super().items()


def fill(engine, count):
    engine.core.scheduler.requests = Walked()
    engine.add([engine.make_request(f"q{i}", [i % 90, 1], greedy(20)) for i in range(count)])
    for _ in range(3):
        engine.step()
    return engine.core.scheduler.requests


COMMANDS = {
    "step": lambda e: e.step(),
    "add": lambda e: e.add_request("new", [1, 2, 3], greedy(9)),
    "abort": lambda e: e.abort_request("q15"),
    "has_unfinished_requests": lambda e: e.has_unfinished_requests(),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_call_costs_the_same_whatever_is_queued(name):
    costs = []
    for count in (FEW, FEW, MANY):  # the first run fills what a tokenizer remembers of its ids
        with engine_of(1, **OPTIONS) as engine:
            requests = fill(engine, count)
            before = requests.walks
            with Calls() as calls:
                COMMANDS[name](engine)
            assert requests.walks == before
            costs.append(calls.counts)
    assert costs[1] == costs[2]


@pytest.mark.parametrize("name", ["generate", "stream"])
def test_between_two_steps_of_a_call_nothing_looks_at_all_its_requests(name, monkeypatch):
    """From the begin of one step to the begin of the next: the step, and what the caller does."""
    ask = {
        "generate": lambda llm, prompts: llm.generate(prompts, greedy(20), use_tqdm=False),
        "stream": lambda llm, prompts: list(llm.stream(prompts, greedy(20))),
    }
    costs = []
    for count in (FEW, MANY):
        with llm_of(**OPTIONS) as llm:
            profile, totals, plain = Calls(), [], EngineCore.step

            def step(core, profile=profile, totals=totals, plain=plain):
                totals.append(profile.total if totals else profile.__enter__().total)
                if len(totals) == 6:
                    raise StopAsyncIteration
                return plain(core)

            prompts = [[i % 90, 1] for i in range(count)]
            with monkeypatch.context() as patch:
                patch.setattr(EngineCore, "step", step)
                with pytest.raises(StopAsyncIteration):
                    ask[name](llm, prompts)
            sys.setprofile(None)
            costs.append([end - begin for begin, end in pairwise(totals)])
    assert costs[0] == costs[1]


@pytest.mark.parametrize("order", ["first", "last"])
def test_aborting_all_that_wait_goes_through_them_once(order):
    with engine_of(1, **OPTIONS) as engine:
        requests = fill(engine, MANY)
        before = requests.walks
        names = list(dict.keys(requests))
        with Calls() as calls:
            engine.abort_request(names if order == "first" else names[::-1])
        assert requests.walks == before
        assert not engine.sequences
        assert calls.total < 40 * MANY


def test_a_queue_is_a_deque_whose_middle_can_leave():
    queue = WaitingQueue()
    a, b, c = (make_sequence(name, [1], 1) for name in "abc")
    for seq in (b, c):
        queue.append(seq)
    queue.appendleft(a)
    assert [*queue] == [a, b, c] == [queue[0], queue[1], queue[2]]
    queue.remove(b)
    queue.remove(b)
    assert b not in queue
    assert (len(queue), bool(queue), queue.popleft(), queue.popleft()) == (2, True, a, c)
    assert not queue
    assert WaitingQueue([a, b]).pop() is b
    with pytest.raises(IndexError, match="0 sequences wait, so there is none at 0"):
        queue[0]


# -- the head of the queue -----------------------------------------------------------------------


class CountedBlocks(BlockManager):
    """Counts the blocks that matches look at."""

    looked_at = 0

    def _content(self, seq, index, table):
        type(self).looked_at += 1
        return super()._content(seq, index, table)


def run_step(scheduler):
    batch = scheduler.schedule()
    scheduler.update(batch, [9] * sum(row.samples for row in batch))
    return batch


def blocked(chunked=True):
    """A scheduler that runs one sequence, and whose next has 30 cached blocks but no room."""
    manager = CountedBlocks(40, block_size=2)
    scheduler = Scheduler(manager, 8, 100, chunked)
    warm = make_sequence("warm", range(60), 1)
    scheduler.add(warm)
    while scheduler.has_work:
        run_step(scheduler)
    runs = make_sequence("runs", [90] * 3, 30)
    head = make_sequence("head", [*range(60), *range(70, 86)], 4)  # it needs 38 blocks
    scheduler.add(runs)
    scheduler.add(head)
    return scheduler, runs, head


def test_a_blocked_head_is_not_matched_again_while_nothing_changes():
    scheduler, runs, head = blocked()
    run_step(scheduler)
    assert scheduler.waiting[0] is head
    CountedBlocks.looked_at = 0
    steps = 0
    while not runs.is_finished:
        run_step(scheduler)
        steps += 1
    assert steps > 20
    assert CountedBlocks.looked_at < 30 + 2 * 16, "what runs registers its own 16 blocks"
    run_step(scheduler)
    assert head in scheduler.running, "it comes in at the first step that can hold it"


def test_a_blocked_head_is_looked_at_when_its_next_block_is_cached():
    """It waits for budget. Then another sequence writes what stands next in its prompt."""
    scheduler = Scheduler(BlockManager(40, block_size=2), 8, 8, enable_chunked_prefill=False)
    scheduler.add(make_sequence("writer", range(4), 20))
    run_step(scheduler)
    scheduler.add(make_sequence("head", [*range(4), *[9] * 8], 1))
    admitted = [len(run_step(scheduler)) == 2 for _ in range(3)]
    assert admitted == [False, True, False], "8 of its tokens are not cached, and then only 6"


def test_a_head_that_waits_for_budget_is_not_matched_again():
    """Without chunked prefill a long prompt waits until hardly anything runs beside it."""
    manager = CountedBlocks(200, block_size=2)
    scheduler = Scheduler(manager, 8, 64, enable_chunked_prefill=False)
    scheduler.add(make_sequence("warm", range(50), 1))
    while scheduler.has_work:
        run_step(scheduler)
    for number in range(3):
        scheduler.add(make_sequence(str(number), [80 + number] * 2, 20))
    scheduler.add(make_sequence("head", [*range(50), *range(100, 163)], 1))
    run_step(scheduler)
    CountedBlocks.looked_at = 0
    for _ in range(10):
        run_step(scheduler)
    assert scheduler.waiting[0].request_id == "head"
    assert CountedBlocks.looked_at <= 3 * 6
    while scheduler.has_work:
        run_step(scheduler)


def test_params_are_checked_where_they_come_in_and_where_they_arrive(monkeypatch):
    """Once in make_request, and once where a sequence is made of what rank 0 has told."""
    checks = []
    plain = SamplingParams.__post_init__
    params = greedy(9)
    monkeypatch.setattr(SamplingParams, "__post_init__", lambda p: checks.append(p) or plain(p))
    with engine_of(1, **OPTIONS) as engine:
        assert isinstance(engine, LLMEngine)
        engine.add([engine.make_request("a", [1], params)])
    assert len(checks) == 2
