"""Scheduler and block manager without a model: random plans checked step by step, then each edge.

The cache here is a list of prefixes: a slot holds the very tokens that its keys and values would
stand for, so a wrong table, a slot written twice or a block shared too early is seen at once.
"""

import random
from collections import Counter, deque
from hashlib import sha256

import pytest
from counting_model import make_sequence
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nanovllm.engine import block_manager as block_manager_module
from nanovllm.engine.block_manager import BlockManager, hash_block
from nanovllm.engine.scheduler import Batch, Scheduler
from nanovllm.engine.sequence import Sequence, SequenceStatus

STOP = 2


def chained_hash(token_ids: tuple[int, ...], block_size: int) -> bytes:
    """The hash of the last block of `token_ids`, which fill their blocks."""
    key = b""
    for start in range(0, len(token_ids), block_size):
        key = hash_block(key, token_ids[start : start + block_size])
    return key


class Simulator:
    """A scheduler with a device that computes nothing, but knows what every slot stands for."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        self.manager = scheduler.block_manager
        self.slots: dict[tuple[int, int], tuple[int, ...]] = {}  # (block, offset) -> prefix
        self.launched: deque[tuple[Batch, list[int]]] = deque()
        self.seqs: list[Sequence] = []
        self.num_prefill_tokens = 0

    def add(self, prompt, max_tokens=1, stop_ids=frozenset()) -> Sequence:
        seq = make_sequence(str(len(self.seqs)), list(prompt), max_tokens, stop_ids)
        self.seqs.append(seq)
        self.scheduler.add(seq)
        return seq

    def launch(self, token_ids: list[int]) -> Batch:
        """Plan a step and run it; row i samples token_ids[i]."""
        batch = self.scheduler.schedule()
        self.check_batch(batch)
        tokens = {row.seq.request_id: self.tokens_on_device(row.seq) for row in batch}
        for row in batch:
            for position in range(max(row.start, row.seq.num_cached_tokens), row.end):
                prefix = tuple(tokens[row.seq.request_id][: position + 1])
                slot = self.slot(row.seq, position)
                self.slots[slot] = prefix
        for row in batch:  # attention: every row reads all its tokens
            for position in range(row.end):
                prefix = tuple(tokens[row.seq.request_id][: position + 1])
                assert self.slots[self.slot(row.seq, position)] == prefix
        if batch:
            sampled = [t for row, t in zip(batch, token_ids, strict=False) if row.samples]
            self.launched.append((batch, sampled))
        return batch

    def check_batch(self, batch: Batch) -> None:
        scheduler = self.scheduler
        assert batch or self.launched or not scheduler.has_work, "nothing would ever run again"
        assert sum(row.num_tokens for row in batch) <= scheduler.max_num_batched_tokens
        assert len(batch) == len({row.seq.request_id for row in batch}) <= scheduler.max_num_seqs
        written = [
            self.slot(row.seq, position)
            for row in batch
            for position in range(max(row.start, row.seq.num_cached_tokens), row.end)
        ]
        assert len(written) == len(set(written)), "two rows would write one slot"
        for row in batch:
            assert row.num_tokens > 0
            known = len(row.seq.token_ids) + self.num_in_flight(row.seq)
            assert row.end <= known <= row.seq.max_length
            assert row.samples == (row.end == known), "only the newest token gives a next one"
            if row.start < row.seq.num_prompt_tokens and not row.seq.num_computed:
                self.num_prefill_tokens += row.num_tokens

    def num_in_flight(self, seq: Sequence) -> int:
        return sum(r.seq is seq and r.samples for batch, _ in self.launched for r in batch)

    def tokens_on_device(self, seq: Sequence) -> list[int]:
        tokens = list(seq.token_ids)
        for batch, token_ids in self.launched:
            sampling = [row.seq for row in batch if row.samples]
            tokens += [t for s, t in zip(sampling, token_ids, strict=True) if s is seq]
        return tokens

    def slot(self, seq: Sequence, position: int) -> tuple[int, int]:
        size = self.manager.block_size
        return seq.block_table[position // size], position % size

    def take_in(self) -> list[Sequence]:
        batch, token_ids = self.launched.popleft()
        return self.scheduler.update(batch, token_ids)

    def step(self) -> Batch:
        batch = self.launch([0] * self.scheduler.max_num_seqs)
        if batch:
            self.take_in()
        self.check_blocks()
        return batch

    def run(self) -> int:
        """Steps until nothing is left to do; how many."""
        count = 0
        while self.scheduler.has_work or self.launched:
            self.step()
            count += 1
        return count

    def fail(self) -> None:
        """Every launched step fails: what it wrote is garbage."""
        for batch, _ in self.launched:
            for row in batch:
                for position in range(max(row.start, row.seq.num_cached_tokens), row.end):
                    self.slots[self.slot(row.seq, position)] = ()
        self.scheduler.roll_back([batch for batch, _ in self.launched])
        self.launched.clear()

    def check_blocks(self) -> None:
        manager = self.manager
        held = Counter(block_id for seq in self.seqs for block_id in seq.block_table)
        assert [block.ref_count for block in manager.blocks] == [
            held[block.block_id] for block in manager.blocks
        ]
        assert set(manager.free_block_ids) == {
            b.block_id for b in manager.blocks if b.ref_count == 0
        }
        assert manager.num_free_blocks == manager.num_blocks - len(held)
        cached = {b.hash: b.block_id for b in manager.blocks if b.hash is not None}
        assert manager.hash_to_block_id == cached
        for key, block_id in cached.items():  # the block holds the tokens that its hash promises
            prefix = self.slots[block_id, manager.block_size - 1]
            assert chained_hash(prefix, manager.block_size) == key

    def check_sequences(self) -> None:
        scheduler = self.scheduler
        assert len(scheduler.running) <= scheduler.max_num_seqs
        for seq in self.seqs:
            assert seq.num_computed <= seq.num_scheduled <= max(0, seq.max_length - 1)
            if seq.status is SequenceStatus.RUNNING:
                assert len(seq.block_table) * self.manager.block_size >= seq.num_scheduled
                assert seq in scheduler.running
                assert seq not in scheduler.waiting
            elif seq.status is SequenceStatus.WAITING:
                assert seq in scheduler.waiting
                assert not seq.block_table
                assert not seq.in_flight
            elif not seq.in_flight:
                assert not seq.block_table
                assert seq not in scheduler.running
                assert seq not in scheduler.waiting

    def check_nothing_held(self) -> None:
        self.check_blocks()
        self.check_sequences()
        assert self.manager.num_free_blocks == self.manager.num_blocks
        for seq in self.seqs:
            assert seq.is_finished
            ends = {"length": seq.params.max_tokens, "stop": None, "abort": None}
            assert ends[seq.finish_reason] in (None, len(seq.output_ids))
            assert STOP not in seq.output_ids[:-1] or STOP not in seq.stop_ids


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of arrivals, steps with up to one more in flight, aborts and failures."""

    @initialize(
        block_size=st.integers(1, 5),
        num_blocks=st.integers(2, 14),
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(1, 24),
        prefix_caching=st.booleans(),
        chunked=st.booleans(),
    )
    def start(self, block_size, num_blocks, max_num_seqs, budget, prefix_caching, chunked):
        manager = BlockManager(num_blocks, block_size, prefix_caching)
        self.longest = num_blocks * block_size
        if not chunked:
            budget = max(budget, self.longest)  # the engine's own condition
        self.simulator = Simulator(Scheduler(manager, max_num_seqs, budget, chunked))

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=30),
        max_tokens=st.integers(1, 12),
        stops=st.booleans(),
    )
    def add(self, prompt, max_tokens, stops):
        prompt = prompt[: max(1, self.longest - 1)]
        max_tokens = min(max_tokens, self.longest - len(prompt))
        if max_tokens:
            self.simulator.add(prompt, max_tokens, frozenset({STOP} if stops else ()))

    @precondition(lambda self: len(self.simulator.launched) < 2)
    @rule(token_ids=st.lists(st.integers(0, STOP), min_size=5, max_size=5))
    def launch(self, token_ids):
        self.simulator.launch(token_ids)

    @precondition(lambda self: self.simulator.launched)
    @rule()
    def take_in(self):
        self.simulator.take_in()

    @rule(token_ids=st.lists(st.integers(0, 1), min_size=5, max_size=5), count=st.integers(1, 8))
    def overlapped_steps(self, token_ids, count):
        for _ in range(count):
            if len(self.simulator.launched) < 2:
                self.simulator.launch(token_ids)
            if len(self.simulator.launched) == 2:
                self.simulator.take_in()

    @precondition(lambda self: self.simulator.seqs)
    @rule(number=st.integers(0, 100))
    def abort(self, number):
        self.simulator.scheduler.abort(self.simulator.seqs[number % len(self.simulator.seqs)])

    @precondition(lambda self: self.simulator.launched)
    @rule()
    def fail(self):
        self.simulator.fail()

    @invariant()
    def all_is_accounted_for(self):
        if hasattr(self, "simulator"):
            self.simulator.check_blocks()
            self.simulator.check_sequences()

    def teardown(self):
        if hasattr(self, "simulator"):
            while self.simulator.launched:
                self.simulator.take_in()
            self.simulator.run()
            self.simulator.check_nothing_held()


TestRandomPlans = SchedulerMachine.TestCase
TestRandomPlans.settings = settings(
    max_examples=300, stateful_step_count=40, deadline=None, derandomize=True
)


# -- one test for each edge ------------------------------------------------------------------------


def simulator(
    num_blocks=40, block_size=4, max_num_seqs=8, budget=64, scheduler=Scheduler, **options
):
    prefix_caching = options.pop("prefix_caching", True)
    manager = BlockManager(num_blocks, block_size, prefix_caching)
    return Simulator(scheduler(manager, max_num_seqs, budget, **options))


def rows(batch: Batch) -> list[tuple[str, int, int]]:
    return [(row.seq.request_id, row.start, row.num_tokens) for row in batch]


def test_max_num_seqs_bounds_the_running_set():
    """Not only a step's rows: a third sequence waits until one of the two has finished."""
    sim = simulator(max_num_seqs=2)
    for first in range(3):
        sim.add([first] * 4, max_tokens=3)
    for _ in range(2):
        sim.step()
        assert [s.request_id for s in sim.scheduler.running] == ["0", "1"]
    sim.step()
    assert rows(sim.step()) == [("2", 0, 4)]


class NoHeadroom(Scheduler):
    """Admits whatever fits at this moment, as nano-vLLM does."""

    def can_admit(self, seq, cached_block_ids):
        num_new = self.block_manager.num_new_blocks(seq, len(seq.token_ids)) - len(cached_block_ids)
        return num_new <= self.block_manager.num_free_after_touch(cached_block_ids)


def test_headroom_keeps_a_small_cache_from_thrashing():
    """40 blocks, 24 requests that grow: without headroom prompts are computed again and again."""
    recomputed = {}
    for scheduler in (Scheduler, NoHeadroom):
        sim = simulator(scheduler=scheduler, max_num_seqs=24, budget=256, prefix_caching=False)
        for number in range(24):
            sim.add([number] * (12 + number % 5), max_tokens=24)
        sim.run()
        sim.check_nothing_held()
        recomputed[scheduler] = sum(seq.metrics.num_preempted_tokens for seq in sim.seqs)
    assert recomputed[Scheduler] < recomputed[NoHeadroom] / 1.5


class HeadroomForAll(Scheduler):
    """Sets a block aside for each running sequence, also for one that will never need it."""

    def num_spare_blocks(self):
        return self.block_manager.num_free_blocks - len(self.running)


@pytest.mark.parametrize(("scheduler", "rows", "steps"), [(Scheduler, 64, 400),
                                                          (HeadroomForAll, 32, 800)])  # fmt: skip
def test_a_sequence_that_never_needs_another_block_sets_none_aside(scheduler, rows, steps):
    """256 requests of 110 tokens in 64 blocks of 256: each needs one block from first to last."""
    manager = BlockManager(64, block_size=256)
    plans = scheduler(manager, max_num_seqs=256, max_num_batched_tokens=16_384)
    seqs = [make_sequence(str(i), [i] * 10, 100) for i in range(256)]
    for seq in seqs:
        plans.add(seq)
    counts = []
    while plans.has_work:
        batch = plans.schedule()
        counts.append(len(batch))
        plans.update(batch, [0] * len(batch))
    assert (max(counts), len(counts)) == (rows, steps)
    assert not any(seq.metrics.num_preempted_tokens for seq in seqs)
    assert manager.num_free_blocks == 64


def test_headroom_ends_with_the_last_block():
    """Five tokens out of blocks of four: room is left until the second block has been taken."""
    sim = simulator(num_blocks=3, block_size=4, prefix_caching=False)
    first, second = sim.add([1] * 4, max_tokens=3), sim.add([2] * 5, max_tokens=1)
    sim.step()
    assert second.status is SequenceStatus.WAITING, (
        "two blocks are free, and one of them is set aside"
    )
    sim.step()
    assert len(first.block_table) == 2
    sim.run()
    exact = simulator(num_blocks=3, block_size=4, prefix_caching=False)
    exact.add([1] * 4, max_tokens=1)  # its last token is never computed: one block is enough
    second = exact.add([2] * 5, max_tokens=1)
    exact.step()
    assert second.is_finished
    exact.check_nothing_held()


def test_decode_goes_on_beside_a_long_prefill():
    sim = simulator(budget=8)
    sim.add([7] * 3, max_tokens=20)
    sim.step()
    sim.add(range(100), max_tokens=1)
    for step in range(5):
        assert rows(sim.step()) == [("0", 3 + step, 1), ("1", 7 * step, 7)]


def test_without_chunked_prefill_a_prompt_waits_for_a_whole_step():
    sim = simulator(budget=20, enable_chunked_prefill=False)
    sim.add([7] * 12, max_tokens=3)
    sim.add(range(12), max_tokens=1)
    assert rows(sim.step()) == [("0", 0, 12)]
    assert rows(sim.step()) == [("0", 12, 1), ("1", 0, 12)]


def test_an_unfinished_chunk_samples_nothing():
    sim = simulator(budget=8)
    sim.add(range(20), max_tokens=2)
    samples = [[row.samples for row in sim.step()] for _ in range(4)]
    assert samples == [[False], [False], [True], [True]]


def test_identical_prompts_share_within_one_step():
    sim = simulator()
    for _ in range(3):
        sim.add(range(18), max_tokens=2)
    assert rows(sim.step()) == [("0", 0, 18), ("1", 16, 2), ("2", 16, 2)]
    tables = [seq.block_table for seq in sim.seqs]
    assert tables[0][:4] == tables[1][:4] == tables[2][:4]
    assert len({table[4] for table in tables}) == 3


def test_a_follower_shares_what_its_owner_has_just_planned():
    """The owner's prompt took two steps; the follower comes with the second, and shares both."""
    sim = simulator(budget=12)
    sim.add(range(18), max_tokens=2)
    sim.step()
    sim.add(range(18), max_tokens=2)
    assert rows(sim.step()) == [("0", 12, 6), ("1", 16, 2)]


def test_a_fully_cached_prompt_recomputes_one_token():
    sim = simulator()
    sim.add(range(16), max_tokens=1)
    sim.run()
    sim.add(range(16), max_tokens=1)
    assert rows(sim.step()) == [("1", 15, 1)]
    assert sim.seqs[1].metrics.num_cached_tokens == 15


def test_a_blocked_prompt_is_hashed_once(monkeypatch):
    calls = []
    original = block_manager_module.hash_block
    monkeypatch.setattr(
        block_manager_module, "hash_block", lambda *a: calls.append(a) or original(*a)
    )
    sim = simulator(num_blocks=12, budget=256)
    sim.add([1] * 24, max_tokens=9)
    sim.add(range(40), max_tokens=1)  # ten blocks: it waits for the first to end
    sim.step()
    before = len(calls)
    for _ in range(6):
        sim.step()
    assert sim.seqs[1].status is SequenceStatus.WAITING
    assert len(calls) - before == 1, "the one block that the first has filled since"


def test_a_lone_sequence_may_fill_the_cache():
    sim = simulator(num_blocks=5, block_size=4)
    seq = sim.add(range(10), max_tokens=10)
    sim.run()
    assert len(seq.output_ids) == 10
    assert not seq.metrics.num_preempted_tokens


def test_the_least_recently_used_block_is_evicted_first():
    sim = simulator(num_blocks=4, block_size=4)
    for first in (10, 20, 10, 30):  # 10 is used again before 30 comes
        sim.add(range(first, first + 4), max_tokens=1)
        sim.run()
    assert sim.seqs[2].metrics.num_cached_tokens == 3
    sim.add([*range(40, 44), 1, 1, 1, 1], max_tokens=1)  # two blocks: one was empty, one is 20's
    sim.run()
    hits = {
        first: len(sim.manager.find_cached_blocks(make_sequence("", [*range(first, first + 4)], 1)))
        for first in (10, 20, 30)
    }
    assert hits == {10: 1, 20: 0, 30: 1}


def test_of_one_sequence_the_tail_is_evicted_before_the_head():
    sim = simulator(num_blocks=3, block_size=4)
    sim.add(range(12), max_tokens=1)
    sim.run()
    sim.add([9] * 4, max_tokens=1)
    sim.run()
    sim.add(range(12), max_tokens=1)
    sim.run()
    assert sim.seqs[2].metrics.num_cached_tokens == 8


def test_a_block_that_no_one_finds_gives_up_its_key():
    """A and B write the same: B's third block continues a text whose cached blocks were A's."""
    manager = BlockManager(8, block_size=4)

    def enter(token_ids, hits=()):
        seq = make_sequence("", [*token_ids], 1)
        manager.touch(seq, list(hits))
        manager.allocate(seq, len(seq.token_ids))
        seq.num_scheduled = len(seq.token_ids)
        manager.cache_full_blocks(seq)
        return seq

    first, second = enter(range(8)), enter(range(12))  # side by side: neither finds the other
    manager.free(first)
    manager.free(enter(range(50, 70)))  # evicts the first one's
    manager.free(second)
    manager.free(enter(range(12)))
    assert len(manager.find_cached_blocks(make_sequence("", [*range(12)], 1))) == 3


def test_a_hash_is_the_sha256_of_the_parent_and_the_tokens():
    """The value is hashlib's for the bytes written out by hand."""
    first = hash_block(b"", (1, 2))
    assert first == sha256(bytes([1, 0, 0, 0, 2, 0, 0, 0])).digest()
    assert hash_block(first, (258,)) == sha256(first + bytes([2, 1, 0, 0])).digest()


@settings(max_examples=300, deadline=None)
@given(*[st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=9)] * 2, st.integers(1, 4))
def test_different_prefixes_have_different_hashes(one, other, block_size):
    manager = BlockManager(1, block_size)
    ends = ((ids, (len(ids) - 1) // block_size) for ids in (one, other))
    hashes = [manager.block_hash(make_sequence("", ids, 1), index) for ids, index in ends]
    assert (hashes[0] == hashes[1]) == (one == other)
    assert all(len(key) >= 16 for key in hashes)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_found_is_the_prompts_own_prefix(seed):
    """Two token ids and few blocks, so that prompts share prefixes and blocks are evicted often."""
    rng = random.Random(seed)
    sim = simulator(num_blocks=12, block_size=2)
    for _ in range(30):
        prompt = rng.choices([1, 2], k=rng.randint(1, 10))
        seq = sim.add(prompt, max_tokens=rng.randint(1, 4))
        hits = sim.manager.find_cached_blocks(seq)
        stored = [sim.slots[block_id, 1] for block_id in hits]
        assert stored == [tuple(prompt[: 2 * (i + 1)]) for i in range(len(hits))]
        if rng.random() < 0.7:
            sim.run()
    sim.run()


def test_equal_blocks_behind_other_prefixes_are_not_shared():
    sim = simulator()
    sim.add([1, 1, 1, 1, 5, 5, 5, 5, 6], max_tokens=1)
    sim.add([2, 2, 2, 2, 5, 5, 5, 5, 6], max_tokens=1)
    assert rows(sim.step()) == [("0", 0, 9), ("1", 0, 9)]


def test_a_preempted_sequence_resumes_with_its_tokens():
    """Both grow until the cache is full; the younger goes, and comes back with its output."""
    sim = simulator(num_blocks=8, block_size=2, prefix_caching=False)
    first, second = sim.add([1] * 4, max_tokens=8), sim.add([3] * 4, max_tokens=8)
    sim.run()
    assert not first.metrics.num_preempted_tokens
    assert second.metrics.num_preempted_tokens
    assert len(first.output_ids) == len(second.output_ids) == 8
    sim.check_nothing_held()


def test_a_sequence_in_flight_is_never_preempted():
    sim = simulator(num_blocks=8, block_size=2, prefix_caching=False)
    first, second = sim.add([1] * 4, max_tokens=8), sim.add([3] * 4, max_tokens=8)
    sim.launch([0, 0])
    while second.status is not SequenceStatus.WAITING:
        held = list(second.block_table)
        in_flight = second.in_flight
        sim.launch([0, 0])
        assert second.block_table[: len(held)] == held or not in_flight
        sim.take_in()
        sim.check_blocks()
    assert second.metrics.num_preempted_tokens
    assert first.status is SequenceStatus.RUNNING


def test_blocks_of_16_waste_less_than_blocks_of_256():
    """Held but unused slots over held slots, averaged over the steps of one workload."""
    waste = {}
    for block_size in (16, 256):
        sim = simulator(24_576 // block_size, block_size, max_num_seqs=16, budget=2048)
        for number in range(16):
            sim.add([number] * (100 + 57 * number), max_tokens=60)
        held = used = 0
        while sim.scheduler.has_work:
            sim.step()
            held += block_size * sum(len(seq.block_table) for seq in sim.scheduler.running)
            used += sum(seq.num_computed for seq in sim.scheduler.running)
        waste[block_size] = 1 - used / held
    assert waste[16] < 0.03 < 0.1 < waste[256]


@pytest.mark.parametrize("overlapped", [False, True])
def test_an_abort_gives_back_the_blocks(overlapped):
    sim = simulator()
    running, waiting = sim.add(range(9), max_tokens=5), sim.add(range(20, 29), max_tokens=5)
    sim.scheduler.max_num_seqs = 1
    sim.launch([0])
    if not overlapped:
        sim.take_in()
    for seq in (waiting, running, running):
        sim.scheduler.abort(seq)
    assert bool(running.block_table) == overlapped, "blocks stay while a step may still write them"
    if overlapped:
        sim.take_in()
    sim.check_nothing_held()
    assert [seq.finish_reason for seq in sim.seqs] == ["abort", "abort"]
