"""Several answers to one prompt (`n`): each of them is what a request of its own would get."""

import copy
import gc
import pickle
import random
import threading
from collections import Counter
from dataclasses import replace

import pytest
from counting_engine import counting_tokenizer, engine_of, llm_of
from counting_model import check_blocks, expected_output
from interrupts import Interrupter

from nanovllm import LLM, SamplingParams
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import RequestOutput, RequestStateStats, TextPiece

OPTIONS = {"max_model_len": 64, "num_gpu_blocks_override": 40, "block_size": 4, "max_num_seqs": 6}
CRAMPED = {  # eight blocks of two tokens: answers wait, and some are preempted
    "max_model_len": 16,
    "num_gpu_blocks_override": 8,
    "block_size": 2,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 8,
}
PROMPTS = [[1, 2, 3, 4, 5], [6, 7], [8]]


def sampled(n: int = 3, **options) -> SamplingParams:
    """Parameters of `n` answers. The counting model's next token is sure at a low temperature."""
    usual = {"temperature": 0.01, "max_tokens": 6, "ignore_eos": True}
    return SamplingParams(n=n, **usual | options)


def ids_of(output: RequestOutput) -> list[list[int]]:
    return [answer.token_ids for answer in output.outputs]


def check_idle(engine) -> None:
    engine.step()
    check_blocks(engine.core)
    assert not engine.sequences
    assert not engine.parents
    assert not engine.has_unfinished_requests()
    assert engine.block_manager.num_free_blocks == engine.block_manager.num_blocks


@pytest.fixture(scope="module")
def folder(tiny_model):
    return str(tiny_model(family="qwen3"))


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(folder, max_model_len=128) as llm:
        yield llm


# -- parameters ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "n must be between 1 and 16,384, got 0"),
        (-1, "n must be between 1 and 16,384, got -1"),
        (16_385, "n must be between 1 and 16,384, got 16385"),
        (2.0, "n must be of type int, got 2.0"),
        (True, "n must be of type int, got True"),
        (None, "n must be of type int, got None"),
        ("2", "n must be of type int, got '2'"),
    ],
)
def test_n_is_refused_by_name_value_and_limit(value, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}$"):
        SamplingParams(n=value)
    assert SamplingParams(n=16_384).n == 16_384


@pytest.mark.parametrize("temperature", [0, 0.0])
def test_several_greedy_answers_are_refused(temperature):
    message = "n must be 1 when using greedy sampling, got n=2 with temperature=0"
    with pytest.raises(ValueError, match=message):
        SamplingParams(n=2, temperature=temperature)
    assert SamplingParams(n=1, temperature=temperature).is_greedy


def test_an_attribute_that_was_set_later_is_refused_before_anything_is_queued():
    with llm_of(**OPTIONS) as llm:
        params = sampled(2)
        params.temperature = 0.0
        for call in (llm.generate, llm.stream):
            with pytest.raises(ValueError, match="n must be 1 when using greedy sampling"):
                call([[1], [2]], [sampled(2), params])
            assert not llm.llm_engine.sequences
        check_idle(llm.llm_engine)


# -- what is drawn ---------------------------------------------------------------------------------


def test_each_answer_is_what_its_own_seed_gives(llm):
    params = SamplingParams(n=4, seed=7, max_tokens=10, ignore_eos=True)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        alone = [replace(params, n=1, seed=7 + index) for index in range(4)]
        wanted = [ids_of(one)[0] for one in llm.generate([prompt] * 4, alone, use_tqdm=False)]
        assert ids_of(output) == wanted
        assert len({tuple(ids) for ids in wanted}) == 4


def test_answers_without_a_seed_differ_and_come_again(folder):
    params = SamplingParams(n=4, max_tokens=10, ignore_eos=True)
    drawn = []
    for n in (4, 4, 1):
        with LLM(folder, max_model_len=128, seed=5) as llm:
            two = llm.generate([[1, 2, 3]] * 2, replace(params, n=n), use_tqdm=False)
            drawn.append([ids_of(output) for output in two])
    assert drawn[0] == drawn[1]
    assert len({tuple(ids) for ids in drawn[0][0] + drawn[0][1]}) == 8
    assert [answers[:1] for answers in drawn[0]] == drawn[2], "asking for more changes no answer"


@pytest.mark.parametrize("seed", [2**63 - 1, -3, -(2**63)])
def test_seeds_at_the_end_of_their_range_go_on_at_its_beginning(seed):
    params = SamplingParams(n=3, seed=seed)
    seeds = [Sequence("a", None, [1], params, 9, index=index).seed for index in range(3)]
    assert seeds == [(seed + i + 2**63) % 2**64 - 2**63 for i in range(3)]
    assert all(-(2**63) <= one < 2**63 for one in seeds)


def test_the_distribution_of_the_answers_is_that_of_requests_of_their_own(llm):
    params = SamplingParams(n=400, seed=0, max_tokens=1, temperature=1.0, top_k=3)
    (output,) = llm.generate([[1, 2, 3]], params, use_tqdm=False)
    alone = [replace(params, n=1, seed=seed) for seed in range(400)]
    others = llm.generate([[1, 2, 3]] * 400, alone, use_tqdm=False)
    wanted = Counter(ids_of(other)[0][0] for other in others)
    assert Counter(ids[0] for ids in ids_of(output)) == wanted
    assert len(wanted) == 3


# -- outputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_generate_returns_the_answers_of_each_prompt_in_order(overlap):
    with llm_of(**OPTIONS, async_scheduling=overlap) as llm:
        params = [sampled(3), sampled(1), sampled(5, max_tokens=9)]
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        for prompt, asked, output in zip(PROMPTS, params, outputs, strict=True):
            assert output.prompt_token_ids == prompt
            assert output.finished
            assert [answer.index for answer in output.outputs] == [*range(asked.n)]
            assert ids_of(output) == [expected_output(prompt, asked.max_tokens)] * asked.n
            text = counting_tokenizer().decode(ids_of(output)[0], skip_special_tokens=True)
            assert [answer.text for answer in output.outputs] == [text] * asked.n
            assert {answer.finish_reason for answer in output.outputs} == {"length"}
        assert [output.request_id for output in outputs] == ["0", "1", "2"]
        check_idle(llm.llm_engine)


def test_chat_gives_several_answers(tiny_chat):
    params = SamplingParams(n=3, seed=1, max_tokens=5, ignore_eos=True)
    talk = [{"role": "user", "content": "Hello"}]
    one, other = tiny_chat.chat([talk, talk], params, use_tqdm=False)
    assert ids_of(one) == ids_of(other)
    assert len(one.outputs) == 3


@pytest.fixture(scope="module")
def tiny_chat(tiny_model):
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    folder = str(tiny_model(family="qwen3"))
    with LLM(folder, max_model_len=128, chat_template=template) as llm:
        yield llm


def test_the_progress_bar_counts_answers_as_in_vllm():
    class Bar:
        def __init__(self, total, **_):
            self.total, self.done = total, 0
            bars.append(self)

        def update(self, count):
            self.done += count

        def close(self):
            pass

    bars = []
    with llm_of(**OPTIONS) as llm:
        llm.generate(PROMPTS, [sampled(3), sampled(1), sampled(2)], use_tqdm=Bar)
    assert [(bar.total, bar.done) for bar in bars] == [(6, 6)]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_returns_one_output_for_all_answers(overlap):
    with engine_of(1, **OPTIONS, async_scheduling=overlap) as engine:
        engine.add_request("one", [1, 2], sampled(1))
        engine.add_request("many", [1, 2, 3], sampled(8, max_tokens=4))  # two have to wait
        seen, last = [], {}
        while engine.has_unfinished_requests():
            outputs = engine.step()
            assert len({output.request_id for output in outputs}) == len(outputs)
            last |= {output.request_id: output for output in outputs}
            seen += [output for output in outputs if output.request_id == "many"]
        assert [output.finished for output in seen] == [False] * (len(seen) - 1) + [True]
        assert all([a.index for a in output.outputs] == [*range(8)] for output in seen)
        partly = [out for out in seen if out.outputs[0].finished() and not out.finished]
        assert partly, "the first answers ended while others waited"
        assert ids_of(last["many"]) == [expected_output([1, 2, 3], 4)] * 8
        assert ids_of(last["one"]) == [expected_output([1, 2], 6)]
        check_idle(engine)


def test_a_stop_ends_one_answer_alone(llm):
    """With the first answer's second token as a stop token, that answer ends there."""
    free = SamplingParams(n=3, seed=3, max_tokens=8, ignore_eos=True)
    (before,) = llm.generate([[4, 5]], free, use_tqdm=False)
    stop = ids_of(before)[0][1]
    cut = replace(free, stop_token_ids=[stop])
    (after,) = llm.generate([[4, 5]], cut, use_tqdm=False)
    for ids, answer in zip(ids_of(before), after.outputs, strict=True):
        end = ids.index(stop) + 1 if stop in ids else 8
        assert answer.token_ids == ids[:end]
        assert answer.finish_reason == ("stop" if stop in ids else "length")
    assert {len(ids) for ids in ids_of(after)} == {2, 8}


# -- metrics ---------------------------------------------------------------------------------------


def test_metrics_of_several_answers_are_joined():
    a = RequestStateStats(3, 10.0, 1.0, 2.0, 3.0, 5.0, 2.0, False, 4, 7)
    b = RequestStateStats(2, 10.1, 1.1, 2.5, 2.9, 6.0, 1.8, True, 8, 1)
    waits = RequestStateStats(0, 10.2, 1.2)
    joined = RequestStateStats.merge([a, b, waits])
    assert joined == RequestStateStats(5, 10.0, 1.0, 2.0, 2.9, 6.0, 1.8, True, 4, 8)
    assert RequestStateStats.merge([waits, waits]).ttft is None
    assert RequestStateStats.merge([a]) is a


def test_a_request_measures_what_its_caller_waits_for(llm):
    params = [SamplingParams(n=4, max_tokens=5, ignore_eos=True), SamplingParams(max_tokens=3)]
    many, one = llm.generate([[1, 2, 3], [4]], params, use_tqdm=False)
    metrics = many.metrics
    assert metrics.num_generation_tokens == 20
    assert 0 < metrics.queued_ts <= metrics.scheduled_ts < metrics.first_token_ts
    assert metrics.ttft == pytest.approx(metrics.first_token_ts - metrics.queued_ts, abs=1e-3)
    gaps = (metrics.last_token_ts - metrics.first_token_ts) / 4
    assert many.tpot == pytest.approx(gaps), "the answers are written at the same time"
    assert one.metrics.num_generation_tokens == len(ids_of(one)[0])


# -- the prompt's blocks ---------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [64, 16])
def test_the_prompt_is_computed_once(budget):
    """The first answer computes the prompt; the others compute its last token alone."""
    options = OPTIONS | {"max_num_batched_tokens": budget}
    with llm_of(**options) as llm:
        prompt = [*range(1, 41)]
        (output,) = llm.generate([prompt], sampled(4, max_tokens=3), use_tqdm=False)
        trace = llm.llm_engine.trace
        counts = Counter()
        for step in trace:
            for name, start, count in step.rows:
                counts[name] += count if start < 40 else 0
        assert counts == {"0_0": 40, "1_0": 1, "2_0": 1, "3_0": 1}
        if budget == 64:
            assert len(trace[0].rows) == 4, "within one step"
        assert output.num_cached_tokens == 0, "the cache held nothing before the request came"
        assert ids_of(output) == [expected_output(prompt, 3)] * 4


def test_without_the_prefix_cache_each_answer_computes_the_prompt():
    with llm_of(**OPTIONS, enable_prefix_caching=False) as llm:
        (output,) = llm.generate([[1] * 12], sampled(3, max_tokens=2), use_tqdm=False)
        first = [
            count for step in llm.llm_engine.trace for _, start, count in step.rows if not start
        ]
        assert first == [12, 12, 12]
        assert ids_of(output) == [expected_output([1] * 12, 2)] * 3


@pytest.mark.parametrize("overlap", [False, True])
def test_answers_that_are_preempted_lose_nothing(overlap):
    with llm_of(**CRAMPED, async_scheduling=overlap) as llm:
        prompts = [[1, 2, 3], [4, 5, 6]]
        outputs = llm.generate(prompts, sampled(5, max_tokens=9), use_tqdm=False)
        for prompt, output in zip(prompts, outputs, strict=True):
            assert ids_of(output) == [expected_output(prompt, 9)] * 5
        assert sum(output.metrics.num_preempted_tokens for output in outputs) > 0
        check_idle(llm.llm_engine)


# -- streams ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_a_stream_says_which_prompt_and_which_answer(overlap):
    with llm_of(**OPTIONS, async_scheduling=overlap) as llm:
        params = [sampled(3), sampled(1), sampled(2)]
        stream, texts = llm.stream(PROMPTS, params), Counter()
        joined: dict[tuple[int, int], str] = {}
        order = []
        for piece in stream:
            index, text = piece
            assert (index, text) == piece == (piece.prompt_index, piece.text)
            key = (index, piece.output_index)
            joined[key] = joined.get(key, "") + text
            order.append(key)
            texts[index] += 1
        outputs = stream.outputs
        wanted = {
            (i, answer.index): answer.text
            for i, output in enumerate(outputs)
            for answer in output.outputs
        }
        assert joined == {key: text for key, text in wanted.items() if text}
        assert [len(output.outputs) for output in outputs] == [3, 1, 2]
        assert order[: len(set(order[:6]))] == sorted(set(order[:6])), "in order within a step"
        check_idle(llm.llm_engine)


def test_the_pieces_of_a_step_come_in_the_order_of_prompts_and_answers():
    """Whatever the order in which the step's sequences are looked at."""
    with llm_of(**OPTIONS) as llm:
        stream = llm.stream([[1, 2, 3, 4, 5]] * 2, sampled(3))
        while not all(seq.output_ids for seq in stream.seqs):
            llm.llm_engine.step()
        stream.read(stream.seqs[::-1])
        keys = [(piece.prompt_index, piece.output_index) for piece in stream._pieces]
        assert keys == [(i, j) for i in range(2) for j in range(3)]
        stream.close()


def test_a_stream_has_no_outputs_before_every_answer_has_ended():
    with llm_of(**OPTIONS) as llm:
        stream = llm.stream([[1, 2]], sampled(8, max_tokens=4))
        for _ in stream:
            ended = sum(seq.is_finished for seq in stream.seqs)
            assert (stream.outputs is not None) == (ended == 8)
        assert len(stream.outputs) == 1


def test_a_stream_that_is_closed_ends_every_answer():
    with llm_of(**OPTIONS) as llm:
        stream = llm.stream(PROMPTS, sampled(4, max_tokens=20))
        next(stream)
        stream.close()
        reasons = [[a.finish_reason for a in output.outputs] for output in stream.outputs]
        assert reasons == [["abort"] * 4] * 3
        check_idle(llm.llm_engine)


def test_a_stream_that_is_dropped_ends_every_answer():
    with llm_of(**OPTIONS) as llm:
        engine = llm.llm_engine
        stream = llm.stream(PROMPTS, sampled(4, max_tokens=20))
        next(stream)
        del stream
        gc.collect()
        assert engine.get_num_unfinished_requests() == 0
        check_idle(engine)


def test_a_piece_is_a_pair_that_can_be_copied_and_pickled():
    piece = TextPiece(4, "abc", 2)
    for one in (piece, copy.copy(piece), copy.deepcopy(piece), pickle.loads(pickle.dumps(piece))):
        assert one == (4, "abc")
        assert (one.prompt_index, one.text, one.output_index) == (4, "abc", 2)
    assert repr(piece) == "TextPiece(prompt_index=4, text='abc', output_index=2)"
    assert TextPiece(4, "abc").output_index == 0


# -- names, aborts and counts ----------------------------------------------------------------------


def test_every_answer_counts_as_unfinished_as_in_vllm():
    with engine_of(1, **OPTIONS) as engine:
        engine.add_request("a", [1, 2], sampled(3))
        engine.add_request("b", [1, 2], sampled(1))
        assert engine.get_num_unfinished_requests() == 4
        assert list(engine.sequences) == ["0_a", "1_a", "2_a", "b"]
        assert engine.num_requests == 2


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_request_s_id_ends_all_its_answers(steps):
    with engine_of(1, **OPTIONS) as engine:
        seqs = engine.add([engine.make_request("a", [1, 2], sampled(8, max_tokens=20))])
        engine.add_request("b", [3], sampled(2))
        for _ in range(steps):
            engine.step()
        engine.abort_request("a")
        assert [seq.finish_reason for seq in seqs] == ["abort"] * 8
        assert list(engine.sequences) == ["0_b", "1_b"]
        assert list(engine.parents) == ["b"]
        last = {}
        while engine.has_unfinished_requests():
            last |= {output.request_id: output for output in engine.step()}
        assert set(last) == {"b"}
        assert ids_of(last["b"]) == [expected_output([3], 6)] * 2
        check_idle(engine)


def test_one_answer_cannot_be_named():
    with engine_of(1, **OPTIONS) as engine:
        engine.add_request("a", [1, 2], sampled(3))
        engine.step()
        engine.abort_request(["0_a", "1_a", "3_a"])
        assert list(engine.sequences) == ["0_a", "1_a", "2_a"]
        engine.abort_request("a")
        check_idle(engine)


TAKEN = [("a", 1), ("a", 2), ("0_a", 1), ("2_a", 1), ("2_a", 2), ("c", 2), ("c", 9)]


@pytest.mark.parametrize(("name", "n"), TAKEN)
def test_names_that_collide_are_refused(name, n):
    with engine_of(1, **OPTIONS) as engine:
        engine.add_request("a", [1, 2], sampled(3))
        engine.add_request("1_c", [1], sampled(1))
        engine.step()
        before = list(engine.sequences)
        with pytest.raises(ValueError, match=f"request_id='{name}'.* in use"):
            engine.add_request(name, [1], sampled(n))
        assert list(engine.sequences) == before
        engine.add_request("3_a", [1], sampled(1))
        engine.add_request("c", [1], sampled(1))
        engine.abort_request(["a", "1_c", "3_a", "c"])
        engine.add_request(name, [1], sampled(n))
        engine.abort_request(name)
        check_idle(engine)


@pytest.mark.parametrize("names", [("a", "0_a"), ("0_a", "a"), ("a", "a")])
def test_names_that_collide_in_one_call_are_refused(names):
    with engine_of(1, **OPTIONS) as engine:
        requests = [engine.make_request(name, [1], sampled(2)) for name in names]
        if "0_a" in names:
            requests[names.index("0_a")] = engine.make_request("0_a", [1], sampled(1))
        with pytest.raises(ValueError, match="in use"):
            engine.add(requests)
        check_idle(engine)


def test_generate_finds_names_whose_answers_are_free():
    with llm_of(**OPTIONS) as llm:
        engine = llm.llm_engine
        engine.add_request("1_3", [5], sampled(1))  # what the fourth request would need
        engine.add_request("0_4", [5], sampled(2))  # what the fifth one would need
        outputs = llm.generate(PROMPTS, [sampled(1), sampled(2), sampled(2)], use_tqdm=False)
        assert [output.request_id for output in outputs] == ["2", "5", "6"]
        while engine.has_unfinished_requests():
            engine.step()
        check_idle(engine)


def test_a_name_is_free_again_once_the_last_answer_has_ended(llm):
    engine = llm.llm_engine
    for _ in range(2):
        engine.add_request("again", [1, 2], SamplingParams(n=2, max_tokens=2, ignore_eos=True))
        while engine.has_unfinished_requests():
            engine.step()
    check_idle(engine)


# -- ranks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_every_rank_makes_the_same_answers(overlap):
    with llm_of(2, **CRAMPED, async_scheduling=overlap) as llm:
        outputs = llm.generate(PROMPTS[1:], sampled(5, max_tokens=9), use_tqdm=False)
        for prompt, output in zip(PROMPTS[1:], outputs, strict=True):
            assert ids_of(output) == [expected_output(prompt, 9)] * 5
        stream = llm.stream([[1, 2]], sampled(5, max_tokens=9))
        next(stream)
        del stream
        engine = llm.llm_engine
        engine.add_request("a", [1, 2], sampled(3))
        engine.step()
        engine.abort_request("a")
        check_idle(engine)


def test_two_ranks_draw_what_one_draws(folder, llm):
    params = SamplingParams(n=4, seed=2, temperature=0.9, top_k=30, max_tokens=8, ignore_eos=True)
    wanted = llm.generate(PROMPTS, params, use_tqdm=False)
    with LLM(folder, tensor_parallel_size=2, max_model_len=128) as two:
        got = two.generate(PROMPTS, params, use_tqdm=False)
        stream = two.stream(PROMPTS, params)
        assert {piece.output_index for piece in stream} == {0, 1, 2, 3}
        streamed = stream.outputs
    for outputs in (got, streamed):
        assert [ids_of(output) for output in outputs] == [ids_of(output) for output in wanted]


# -- what goes wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_that_fails_is_rolled_back_and_run_again(overlap):
    with engine_of(1, **OPTIONS, async_scheduling=overlap) as engine:
        engine.add_request("a", [1, 2, 3, 4, 5], sampled(4, max_tokens=8))
        model, calls = engine.core.runner.model, Counter()
        plain = type(model).compute_logits

        class Failing(type(model)):
            def compute_logits(self, hidden):
                calls["all"] += 1
                if calls["all"] in (1, 3, 6):
                    raise MemoryError("planted")
                return plain(self, hidden)

        model.__class__ = Failing
        last, failures = None, 0
        while engine.has_unfinished_requests():
            try:
                for output in engine.step():
                    last = output
            except MemoryError:
                failures += 1
                check_blocks(engine.core)
        assert failures == 3
        assert last.finished
        assert ids_of(last) == [expected_output([1, 2, 3, 4, 5], 8)] * 4
        check_idle(engine)


@pytest.mark.parametrize("overlap", [False, True])
def test_every_call_can_be_interrupted_anywhere(overlap):
    """An interrupt leaves no answer behind, and no name that stays in use."""
    prompts = [[1, 2, 3], [1, 2, 4]]
    right = [[expected_output(prompt, 4)] * 3 for prompt in prompts]

    def work():
        outputs = llm.generate(prompts, sampled(3, max_tokens=4), use_tqdm=False)
        stream = llm.stream(prompts, sampled(3, max_tokens=4))
        next(stream)
        del stream
        return [ids_of(output) for output in outputs]

    places = Counter()
    with llm_of(**CRAMPED, async_scheduling=overlap) as llm:
        with Interrupter() as counter:
            assert work() == right
        for seed in range(150):
            at = random.Random(seed).randint(1, counter.count)
            with Interrupter(at) as interrupter:
                try:
                    work()
                except KeyboardInterrupt:
                    places[interrupter.where.partition(":")[0]] += 1
            check_idle(llm.llm_engine)
        assert work() == right
    assert len(places) > 40


@pytest.mark.parametrize("name", ["add", "abort", "step"])
def test_names_come_free_after_an_interrupt(name):
    with engine_of(1, **CRAMPED) as engine:

        def prepare():
            if name != "add":
                engine.add_request("a", [1, 2, 3], sampled(3, max_tokens=2))
                engine.add_request("1_b", [3], sampled(1, max_tokens=2))

        def work():
            if name == "add":
                engine.add_request("a", [1, 2, 3], sampled(3, max_tokens=2))
            elif name == "abort":
                engine.abort_request("a")
            else:
                while engine.has_unfinished_requests():
                    engine.step()

        prepare()
        with Interrupter() as counter:
            work()
        engine.abort_request(["a", "1_b"])
        for seed in range(100):
            prepare()
            with Interrupter(random.Random(seed).randint(1, counter.count)) as interrupter:
                try:
                    work()
                except KeyboardInterrupt:
                    assert interrupter.where
            engine.abort_request(["a", "1_b"])
            assert not engine.sequences, interrupter.where
            check_idle(engine)


def test_an_ended_request_that_an_interrupt_left_behind_takes_no_name():
    """Neither while another request keeps the engine busy, nor when it is forgotten late."""
    with engine_of(1, **OPTIONS) as engine:
        engine.add_request("b", [3], sampled(1))
        old = engine.add([engine.make_request("a", [1], sampled(2))])
        engine.abort_request("a")
        engine.parents["a"] = old[0].parent
        engine.add_request("a", [1], sampled(2))
        new = engine.parents["a"]
        assert new is not old[0].parent
        engine.parents.forget_ended(old)
        assert engine.parents == {"a": new}
        engine.abort_request(["a", "b"])
        check_idle(engine)


def test_an_error_in_reading_one_text_hides_no_other(monkeypatch):
    """A text that an error has torn is made anew, also that of an answer without a new token."""
    with engine_of(1, **OPTIONS) as engine:
        engine.add_request("a", [1, 2, 3], sampled(3, max_tokens=5))
        torn, plain = [], Sequence.rebuild_text

        def notes(seq):
            torn.append(seq.request_id)
            plain(seq)

        monkeypatch.setattr(Sequence, "rebuild_text", notes)
        while not engine.core.trace:
            engine.step()
        with monkeypatch.context() as patch:
            patch.setattr(RequestOutput, "of", lambda seq: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                engine.step()
        assert set(torn) == {"0_a", "1_a", "2_a"}
        while engine.has_unfinished_requests():
            last = engine.step()[0]
        text = counting_tokenizer().decode(ids_of(last)[0], skip_special_tokens=True)
        assert [answer.text for answer in last.outputs] == [text] * 3


def test_close_ends_every_answer():
    with llm_of(**OPTIONS) as llm:
        stream = llm.stream(PROMPTS, sampled(3, max_tokens=20))
        next(stream)
        llm.close()
        reasons = [a.finish_reason for output in stream.outputs for a in output.outputs]
        assert reasons == ["abort"] * 9
        assert not llm.llm_engine.parents


def test_several_threads_get_all_their_answers():
    def work(number):
        prompt = [number + 1, 2, 3]
        for round_ in range(6):
            n = 1 + (number + round_) % 4
            (output,) = llm.generate([prompt], sampled(n, max_tokens=5), use_tqdm=False)
            got.append(ids_of(output) == [expected_output(prompt, 5)] * n)

    got: list[bool] = []
    with llm_of(**OPTIONS) as llm:
        threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert got == [True] * 24
        check_idle(llm.llm_engine)
