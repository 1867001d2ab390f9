"""Ctrl-C at any instruction of the engine: KeyboardInterrupt surfaces, and nothing is damaged.

Each test interrupts the same work hundreds of times, at instructions drawn from a fixed seed. The
counting model makes every answer exact, so a lost, doubled or stale block changes some later text.
"""

import gc
import random
import threading
from collections import Counter

import pytest
from counting_engine import counting_tokenizer, engine_of, llm_of
from counting_model import check_blocks, expected_output
from interrupts import Interrupter

from nanovllm import SamplingParams
from nanovllm.engine.block_manager import BlockManager

PROMPTS = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 9, 8, 7], [1, 2, 3, 4, 5]]  # with a common beginning
CRAMPED = {  # eight blocks of two: the third request waits, and the second is preempted
    "max_model_len": 16,
    "num_gpu_blocks_override": 8,
    "block_size": 2,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 8,
}
MAX_TOKENS = 4
ROLLING_BACK = (
    "Scheduler.roll_back",
    "BlockManager.evict_uncomputed",
    "BlockManager.rebuild",
    "Sequence.restart",
)
# Functions that change several things one after the other. They get interrupts of their own.
DELICATE = ("BlockManager.free", "Scheduler.update", "Scheduler.admit", "LLMEngine.add")


def greedy(max_tokens: int = MAX_TOKENS) -> SamplingParams:
    stop = ["never said"]  # so that every token is decoded when it comes
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, stop=stop)


def right_answers(max_tokens: int = MAX_TOKENS) -> list[tuple[list[int], str]]:
    ids = [expected_output(prompt, max_tokens) for prompt in PROMPTS]
    return [(i, counting_tokenizer().decode(i, skip_special_tokens=True)) for i in ids]


RIGHT = right_answers()


def generate(llm) -> list[tuple[list[int], str]]:
    outputs = llm.generate(PROMPTS, greedy(), use_tqdm=False)
    return [(output.outputs[0].token_ids, output.outputs[0].text) for output in outputs]


def count_instructions(work, within: str = "") -> int:
    with Interrupter(within=within) as interrupter:
        work()
    return interrupter.count


def check_consistent(engine, where="") -> None:
    """Every block is where it belongs, no lock is held, and the engine is not at work."""
    manager = engine.block_manager
    check_blocks(engine.core)
    assert set(manager.free_block_ids) == {b.block_id for b in manager.blocks if b.ref_count == 0}
    cached = {b.hash: b.block_id for b in manager.blocks if b.hash is not None}
    assert manager.hash_to_block_id == cached
    assert not engine.acting.locked(), where
    got = []
    other = threading.Thread(target=lambda: got.append(engine.turns.lock.acquire(timeout=5)))
    other.start()
    other.join()
    assert got == [True], "this thread has kept the lock"
    engine.turns.lock = threading.RLock()  # the thread that had it is gone


def check_idle(engine) -> None:
    check_consistent(engine)
    assert not engine.sequences
    assert not engine.has_unfinished_requests()
    scheduler = engine.core.scheduler
    assert not scheduler.waiting
    assert not scheduler.running
    assert not engine.core.in_flight
    assert engine.block_manager.num_free_blocks == engine.block_manager.num_blocks


def interrupted(seed: int, instructions: int, work, within: str = "") -> Interrupter:
    """Run `work`, and interrupt it somewhere."""
    at = random.Random(seed).randint(1, instructions)
    with Interrupter(at, within) as interrupter:
        try:
            work()
        except KeyboardInterrupt:
            assert interrupter.where
        else:
            assert not interrupter.where, f"{interrupter.where} hides an interrupt"
    return interrupter


@pytest.mark.parametrize("overlap", [False, True])
def test_generate_can_be_interrupted_anywhere(overlap):
    places = Counter()
    with llm_of(**CRAMPED, async_scheduling=overlap) as llm:
        engine = llm.llm_engine
        assert generate(llm) == RIGHT
        for name, times in {"": 320, **dict.fromkeys(DELICATE, 20)}.items():
            instructions = count_instructions(lambda: generate(llm), name)
            for seed in range(times):
                where = interrupted(seed, instructions, lambda: generate(llm), name).where
                check_idle(engine)
                assert generate(llm) == RIGHT, where
                places[where.partition(":")[0]] += 1
    for name in DELICATE:
        assert places[name], f"nothing was interrupted in {name}: this test says too little"
    assert len(places) > 50


@pytest.mark.parametrize("overlap", [False, True])
def test_streams_and_aborts_can_be_interrupted_anywhere(overlap):
    def work(llm):
        stream = llm.stream(PROMPTS, greedy())
        next(stream)
        dropped = llm.stream(PROMPTS[:1], greedy())
        next(dropped)
        del dropped
        next(stream)
        stream.close()

    with llm_of(**CRAMPED, async_scheduling=overlap) as llm:
        engine = llm.llm_engine
        instructions = count_instructions(lambda: work(llm))
        for seed in range(200):
            where = interrupted(seed, instructions, lambda: work(llm)).where
            engine.step()  # aborts what was dropped
            check_idle(engine)
            assert generate(llm) == RIGHT, where


@pytest.mark.parametrize("overlap", [False, True])
def test_an_interrupted_step_can_be_run_again(overlap):
    """Whoever catches the interrupt may go on: every request still gets all its tokens and text."""
    answers = right_answers(9)
    with engine_of(1, **CRAMPED, async_scheduling=overlap) as engine:
        for seed in range(80):
            rng, places = random.Random(seed), []
            requests = [engine.make_request(str(i), p, greedy(9)) for i, p in enumerate(PROMPTS)]
            seqs = engine.add(requests)
            while engine.has_unfinished_requests():
                with Interrupter(at=rng.randint(1, 12_000)) as interrupter:
                    try:
                        engine.step()
                    except KeyboardInterrupt:
                        places.append(interrupter.where)
                check_consistent(engine, places)
            check_idle(engine)
            got = [(seq.output_ids, seq.detokenizer.text) for seq in seqs]
            assert got == answers, places


@pytest.mark.parametrize("name", ["add", "abort"])
def test_adding_and_aborting_can_be_interrupted_anywhere(name):
    """All of the requests are added or none. An interrupt may also come when all are, on the way
    back to the caller. An abort may have ended some of them."""
    counts = Counter()
    with engine_of(1, **CRAMPED) as engine:
        requests = [engine.make_request(f"{i}", PROMPTS[i], greedy()) for i in range(3)]

        def work():
            if name == "add":
                engine.add(requests)
            else:
                engine.abort_request(["0", "1", "2"])

        def prepare():
            if name == "abort":
                engine.add(requests)
                engine.step()

        prepare()
        instructions = count_instructions(work)
        engine.abort_request(["0", "1", "2"])
        for seed in range(300):
            prepare()
            interrupted(seed, instructions, work)
            check_consistent(engine)
            counts[len(engine.sequences)] += 1
            engine.abort_request(["0", "1", "2"])
            check_idle(engine)
    if name == "add":
        assert set(counts) <= {0, 3}
        assert counts[0] > 20 * counts[3], "only when all was done may they be left"


def test_an_interrupt_while_a_failure_is_handled_is_made_good_by_the_next_call():
    """Both can leave requests behind, which go when nobody refers to them any more."""
    with llm_of(**CRAMPED) as llm:
        engine, model = llm.llm_engine, llm.llm_engine.core.runner.model
        plain, calls = type(model).compute_logits, []

        class Failing(type(model)):
            def compute_logits(self, hidden):
                calls.append(hidden)
                if calls and len(calls) == self.fail_at:
                    raise MemoryError("planted")
                return plain(self, hidden)

        model.__class__ = Failing
        seen = Counter()
        for seed in range(120):
            rng = random.Random(seed)
            model.fail_at = rng.randint(2, 6)
            calls.clear()
            with Interrupter() as counter, pytest.raises(MemoryError):
                generate(llm)
            calls.clear()
            with Interrupter(at=rng.randint(counter.count * 3 // 4, counter.count)) as interrupter:
                try:
                    generate(llm)
                except (MemoryError, KeyboardInterrupt) as error:
                    seen[type(error), interrupter.where.partition(":")[0]] += 1
            model.fail_at = None
            engine.step()
            check_idle(engine)
            assert generate(llm) == RIGHT
    assert any(where.startswith(ROLLING_BACK) for _, where in seen), "no roll-back was interrupted"
    gc.collect()


def test_close_can_be_interrupted_anywhere_and_called_again():
    for seed in range(30):
        with llm_of(**CRAMPED) as llm:
            stream = llm.stream(PROMPTS, greedy())
            next(stream)
            interrupted(seed, 1200, llm.close)
            llm.close()
            assert llm.llm_engine.released
            assert llm.llm_engine.core.runner is None
            assert [o.outputs[0].finish_reason for o in stream.outputs] == ["abort"] * 3


def test_what_is_cached_survives_an_interrupt(monkeypatch):
    """A request whose blocks were being given back: the next one with its prefix finds them."""
    with llm_of(**CRAMPED) as llm:

        def interrupt(manager, seq):
            while len(seq.block_table) > 1:
                manager.blocks[seq.block_table.pop()].ref_count -= 1
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(BlockManager, "free", interrupt)
            with pytest.raises(KeyboardInterrupt):
                llm.generate(PROMPTS[0], greedy(), use_tqdm=False)
        check_idle(llm.llm_engine)
        (output,) = llm.generate(PROMPTS[0], greedy(), use_tqdm=False)
        assert output.num_cached_tokens == 4
        assert output.outputs[0].token_ids == RIGHT[0][0]
