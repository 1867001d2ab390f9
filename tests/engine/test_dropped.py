"""Requests that nobody waits for any more, and bad arguments: no step and no other rank is hurt."""

import gc
import weakref

import pytest
from counting_engine import engine_of, llm_of
from counting_model import check_blocks, expected_output
from small_requests import greedy

from nanovllm.engine.block_manager import BlockManager

OPTIONS = {"max_model_len": 64, "num_gpu_blocks_override": 24, "block_size": 4, "max_num_seqs": 3}
PROMPTS = [[1, 2, 3, 4, 5], [6, 7], [1, 2, 3, 4, 8]]


def check_generate(llm):
    outputs = llm.generate(PROMPTS, greedy(6), use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [expected_output(p, 6) for p in PROMPTS]


def check_idle(engine):
    engine.step()
    check_blocks(engine.core)
    assert not engine.sequences
    assert not engine.has_unfinished_requests()
    assert engine.block_manager.num_free_blocks == engine.block_manager.num_blocks


@pytest.fixture
def no_collector():
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    "method", ["find_cached_blocks", "touch", "allocate", "cache_full_blocks", "free"]
)
@pytest.mark.parametrize("begun", [False, True])
def test_a_stream_that_is_collected_within_a_step_hurts_nothing(
    size, method, begun, no_collector, monkeypatch
):
    """An unfinished stream in a reference cycle goes when the collector runs: here, in a step."""
    with llm_of(size, **OPTIONS) as llm:
        stream = llm.stream([[9, 9, 9, 9, 9]] * 2, greedy(20))
        if begun:
            next(stream)
        stream.itself, alive = stream, weakref.ref(stream)
        del stream
        plain = getattr(BlockManager, method)

        def collects(*args):
            if alive():
                gc.collect()
            return plain(*args)

        with monkeypatch.context() as patch:
            patch.setattr(BlockManager, method, collects)
            check_generate(llm)
        assert not alive()
        check_idle(llm.llm_engine)
        check_generate(llm)


def test_a_dropped_stream_is_unfinished_work_for_nobody():
    with llm_of(**OPTIONS) as llm:
        engine = llm.llm_engine
        kept, dropped = llm.stream([1], greedy(6)), llm.stream([2], greedy(6))
        next(dropped)
        assert engine.has_unfinished_requests()
        del dropped
        assert engine.has_unfinished_requests()
        kept.close()
        assert not engine.has_unfinished_requests()
        assert len(engine.trace) == 2
        check_idle(engine)
        assert len(engine.trace) == 2, "it was not run any further"


def test_generate_says_so_when_its_requests_are_lost():
    with llm_of(**OPTIONS) as llm:
        scheduler = llm.llm_engine.core.scheduler
        scheduler.schedule_waiting = lambda batch, budget: scheduler.waiting.popleft()
        with pytest.raises(RuntimeError, match="3 requests are unfinished, but nothing can run"):
            llm.generate(PROMPTS, greedy(6), use_tqdm=False)
        del scheduler.schedule_waiting
        check_idle(llm.llm_engine)
        check_generate(llm)


def test_generate_says_so_when_its_requests_were_forgotten():
    with llm_of(**OPTIONS) as llm:
        engine = llm.llm_engine
        plain = engine.core.scheduler.schedule

        def forgets():
            batch = plain()
            for seq in list(engine.sequences.values()):
                engine.core.scheduler.remove_finished(seq)
            return batch

        engine.core.scheduler.schedule = forgets
        with pytest.raises(RuntimeError, match="3 requests of this call are unfinished"):
            llm.generate(PROMPTS, greedy(6), use_tqdm=False)


GOOD = {
    "request_id": "x",
    "prompt": None,
    "token_ids": [1],
    "params": {"max_tokens": 3},
    "max_length": 4,
}
BAD_CALLS = {
    "abort 5": lambda e: e.abort_request(5),
    "abort None": lambda e: e.abort_request(None),
    "abort a set": lambda e: e.abort_request({"a"}),
    "abort bytes": lambda e: e.abort_request(b"a"),
    "abort a list of others": lambda e: e.abort_request(["a", 5]),
    "add_request: id": lambda e: e.add_request(5, [1], greedy(6)),
    "add_request: prompt": lambda e: e.add_request("a", object(), greedy(6)),
    "add_request: ids": lambda e: e.add_request("a", [1, "b"], greedy(6)),
    "add_request: half a surrogate": lambda e: e.add_request("a", "\ud800", greedy(6)),
    "add_request: params": lambda e: e.add_request("a", [1], "greedy"),
    "add: no list": lambda e: e.add(5),
    "add: no request": lambda e: e.add([5]),
    "add: empty": lambda e: e.add([{}]),
    "add: only a name": lambda e: e.add([{"request_id": "x"}]),
    "add: bad params": lambda e: e.add([GOOD | {"params": {"temperature": -1.0}}]),
    "add: unknown params": lambda e: e.add([GOOD | {"params": {"heat": 1}}]),
    "add: unknown field": lambda e: e.add([GOOD | {"more": 1}]),
    "add: twice": lambda e: e.add([GOOD, GOOD]),
}
UNSENDABLE = {"JSON cannot hold it": lambda e: e.add([GOOD | {"token_ids": [1, {2}]}])}


@pytest.mark.parametrize("size", [1, 2])
def test_bad_arguments_are_refused_before_other_ranks_are_told(size):
    with llm_of(size, **OPTIONS) as llm:
        engine = llm.llm_engine
        calls = BAD_CALLS if size == 1 else BAD_CALLS | UNSENDABLE
        for name, call in calls.items():
            with pytest.raises((TypeError, ValueError, KeyError)):
                call(engine)
            assert not engine.closed, name
            assert not engine.sequences, name
        check_generate(llm)
        check_idle(engine)


def test_a_bad_id_to_abort_is_named():
    with engine_of(1, **OPTIONS) as engine:
        for bad in (5, None, {"a"}, ["a", 5]):
            with pytest.raises(TypeError, match="request_ids must be a str or a list of them, got"):
                engine.abort_request(bad)
        engine.abort_request(("no such", "ids"))


CALLS = {
    "step": lambda e: e.step(),
    "advance": lambda e: e.advance(),
    "add_request": lambda e: e.add_request("a", [1], greedy(6)),
    "abort_request": lambda e: e.abort_request("a"),
}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", CALLS)
def test_a_closed_engine_refuses_every_call(size, name):
    with engine_of(size, **OPTIONS) as engine:
        engine.close()
        with pytest.raises(RuntimeError, match="this engine is closed"):
            CALLS[name](engine)
        assert not engine.has_unfinished_requests()
