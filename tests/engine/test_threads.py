"""One engine asked by several threads at once: each caller gets its own answers, and gets them."""

import _thread
import random
import signal
import sys
import threading
import time

import pytest
from counting_engine import counting_tokenizer, llm_of
from counting_model import VOCAB, expected_output
from small_requests import greedy

from nanovllm.frontend.turns import MAX_YIELDS, YIELD_SECONDS, Turns

THREADS, CALLS = 4, 40
OPTIONS = {"max_model_len": 64, "num_gpu_blocks_override": 24, "block_size": 4, "max_num_seqs": 6}


@pytest.fixture(autouse=True)
def switch_often():
    """Let Python change threads a thousand times as often as it does by default."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


def on_threads(count, work, limit=120):
    """work(i) in each of `count` threads; its results. Whatever it raises is raised here."""
    results, failures = [None] * count, []

    def run(number):
        try:
            results[number] = work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(limit)
    assert not any(thread.is_alive() for thread in threads), "a thread waits for ever"
    if failures:
        raise failures[0]
    return results


def check_idle(engine):
    engine.step()  # carries out what dropped streams have asked for
    assert not engine.has_unfinished_requests()
    assert not engine.sequences
    assert engine.block_manager.num_free_blocks == engine.block_manager.num_blocks


class Caller:
    """One thread's calls: each draws its prompts and how it asks, and checks what it gets."""

    def __init__(self, llm, seed):
        self.llm, self.rng = llm, random.Random(seed)

    def draw(self):
        rng = self.rng
        prompts = [
            [rng.randrange(VOCAB) for _ in range(rng.randint(1, 20))]
            for _ in range(rng.randint(1, 3))
        ]
        counts = [rng.randint(1, 12) for _ in prompts]
        answers = [expected_output(p, n) for p, n in zip(prompts, counts, strict=True)]
        return prompts, [greedy(n) for n in counts], answers

    def ask(self):
        prompts, params, answers = self.draw()
        kind = self.rng.choice(["generate", "generate", "text", "stream", "drop", "abort"])
        getattr(self, kind)(prompts, params, answers)

    def check(self, outputs, answers):
        got = [output.outputs[0] for output in outputs]
        assert [o.token_ids for o in got] == answers
        assert [o.finish_reason for o in got] == ["length"] * len(answers)

    def generate(self, prompts, params, answers):
        self.check(self.llm.generate(prompts, params, use_tqdm=False), answers)

    def text(self, prompts, params, _):
        """Prompts that must be tokenized, while other threads' answers are detokenized."""
        texts = ["".join(self.rng.choices("abcdefgh xyz", k=9)) for _ in prompts]
        ids = [counting_tokenizer().encode(text) for text in texts]
        answers = [expected_output(i, p.max_tokens) for i, p in zip(ids, params, strict=True)]
        outputs = self.llm.generate(texts, params, use_tqdm=False)
        self.check(outputs, answers)
        for output, answer in zip(outputs, answers, strict=True):
            assert output.outputs[0].text == self.decode(answer)

    def decode(self, ids):
        return counting_tokenizer().decode(ids, skip_special_tokens=True)

    def stream(self, prompts, params, answers):
        stream = self.llm.stream(prompts, params)
        pieces = [""] * len(prompts)
        for index, text in stream:
            pieces[index] += text
        self.check(stream.outputs, answers)
        assert pieces == [self.decode(answer) for answer in answers]

    def drop(self, prompts, params, _):
        next(self.llm.stream(prompts, params), None)

    def abort(self, prompts, params, answers):
        stream = self.llm.stream(prompts, params)
        next(stream, None)
        stream.close()
        for output, answer in zip(stream.outputs, answers, strict=True):
            got = output.outputs[0]
            assert got.token_ids == answer[: len(got.token_ids)]
            assert got.finish_reason == ("length" if got.token_ids == answer else "abort")


@pytest.mark.parametrize("overlap", [False, True])
def test_four_threads_get_what_one_would(overlap):
    with llm_of(**OPTIONS, async_scheduling=overlap) as llm:
        on_threads(THREADS, lambda i: [Caller(llm, f"{i} {n}").ask() for n in range(CALLS)])
        check_idle(llm.llm_engine)


def test_requests_that_another_threads_steps_have_finished_need_no_step():
    with llm_of(**OPTIONS) as llm:
        prompt = [5, 6, 7]
        stream = llm.stream(prompt, greedy(3))
        on_threads(1, lambda _: llm.generate([[8]], greedy(12), use_tqdm=False))
        steps = len(llm.llm_engine.trace)
        assert "".join(text for _, text in stream) == Caller(llm, 0).decode(
            expected_output(prompt, 3)
        )
        assert len(llm.llm_engine.trace) == steps
        assert stream.outputs[0].outputs[0].finish_reason == "length"


def test_closing_the_engine_ends_every_waiting_call():
    """Each of three threads gets its answers or one clear error, and none waits for ever."""
    with llm_of(**OPTIONS | {"max_model_len": 96, "max_num_seqs": 2}) as llm:

        def work(number):
            if number == 3:
                while len(llm.llm_engine.trace) < 10:
                    time.sleep(0.001)
                return llm.close()
            with pytest.raises(RuntimeError, match="this engine is closed"):
                ask_for_ever(number)
            return "told"

        def ask_for_ever(number):
            while True:
                llm.generate([[number]] * 2, greedy(40), use_tqdm=False)

        assert on_threads(4, work) == ["told"] * 3 + [None]


def in_a_step(llm, act):
    """Do something in the middle of a step, as a signal handler or a destructor would."""
    model = llm.llm_engine.core.runner.model
    kind, done = type(model), []

    class Acting(kind):
        def compute_logits(self, hidden):
            if not done:
                done.append(act)
                act()
            return super().compute_logits(hidden)

    model.__class__ = Acting


def test_what_is_aborted_within_a_step_ends_before_the_next():
    with llm_of(**OPTIONS) as llm:
        engine = llm.llm_engine
        stream = llm.stream([[1], [2]], greedy(12))
        engine.add_request("by hand", [3], greedy(12))
        in_a_step(llm, lambda: (stream.close(), engine.abort_request("by hand")))
        assert llm.generate([4], greedy(3), use_tqdm=False)[0].outputs[0].token_ids == (
            expected_output([4], 3)
        )
        assert [o.outputs[0].finish_reason for o in stream.outputs] == ["abort"] * 2
        check_idle(engine)


def test_an_engine_that_is_closed_within_a_step_closes_after_it():
    with llm_of(**OPTIONS) as llm:
        in_a_step(llm, llm.close)
        with pytest.raises(RuntimeError, match="this engine is closed"):
            llm.generate([4], greedy(3), use_tqdm=False)
        assert llm.llm_engine.core.runner is None


def test_a_call_within_a_step_is_refused_and_the_step_undone():
    with llm_of(**OPTIONS) as llm:
        in_a_step(llm, lambda: llm.generate([5], greedy(3), use_tqdm=False))
        with pytest.raises(RuntimeError, match="from within another call of the same thread"):
            llm.generate([4], greedy(3), use_tqdm=False)
        check_idle(llm.llm_engine)
        assert llm.generate([4], greedy(3), use_tqdm=False)[0].outputs[0].token_ids == (
            expected_output([4], 3)
        )


def test_ctrl_c_reaches_a_thread_that_waits_for_its_turn():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    with llm_of(**OPTIONS) as llm:
        engine, held = llm.llm_engine, threading.Event()

        def hold():
            with engine.turns.lock:
                held.set()
                while not engine.turns.waiting:
                    time.sleep(0.001)
                time.sleep(0.05)  # from the line to the lock
                _thread.interrupt_main()
                time.sleep(0.05)

        other = threading.Thread(target=hold)
        other.start()
        held.wait()
        with pytest.raises(KeyboardInterrupt):
            llm.generate([4], greedy(3), use_tqdm=False)
        other.join()
        check_idle(engine)


@pytest.fixture
def naps(monkeypatch):
    """How long this thread has let others go first, a number for each time, without waiting."""
    naps = []
    monkeypatch.setattr(time, "sleep", naps.append)
    return naps


def test_a_thread_lets_a_waiting_one_go_first_but_not_for_ever(naps):
    turns = Turns()
    turns.waiting.add(-1)  # a thread that was interrupted and never takes its turn
    with turns.take():
        assert naps == [YIELD_SECONDS] * MAX_YIELDS
        assert turns.waiting == {-1}


def test_a_thread_that_has_the_turn_takes_it_again_at_once(naps):
    """It must not let others go first while it holds the lock that they wait for."""
    turns = Turns()
    with turns.take():
        turns.waiting.add(-1)
        with turns.take():
            assert not naps
