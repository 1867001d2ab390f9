"""The front door: vLLM's interface, streaming, what is refused, and that nothing stays behind."""

import traceback
from dataclasses import fields

import pytest
from small_requests import PROMPTS, greedy, ids

from nanovllm import LLM, EngineArgs, LLMEngine, SamplingParams

GREEDY = greedy()


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(folder, max_model_len=128, max_num_seqs=4, use_tqdm_on_load=False) as llm:
        yield llm


@pytest.fixture(autouse=True)
def nothing_left_behind(llm):
    yield
    engine = llm.llm_engine
    assert not engine.has_unfinished_requests()
    engine.step()  # aborts the requests of streams that were dropped
    assert not engine.sequences
    assert engine.block_manager.num_free_blocks == engine.block_manager.num_blocks


def test_every_form_of_prompt(llm):
    text = "hello"
    tokens = llm.get_tokenizer().encode(text)
    forms = [text, tokens, {"prompt": text}, {"prompt_token_ids": tokens}]
    outputs = llm.generate(forms, GREEDY, use_tqdm=False)
    assert len({tuple(x) for x in ids(outputs)}) == 1
    assert len(llm.generate(text, GREEDY, use_tqdm=False)) == 1
    assert len(llm.generate(tokens, GREEDY, use_tqdm=False)) == 1
    assert outputs[0].prompt == text
    assert outputs[1].prompt is None


def test_streamed_pieces_equal_the_text(llm):
    whole = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    stream = llm.stream(PROMPTS, GREEDY)
    pieces = [""] * len(PROMPTS)
    for index, text in stream:
        pieces[index] += text
    assert pieces == [output.outputs[0].text for output in whole]
    assert ids(stream.outputs) == ids(whole)


def test_leaving_a_stream_aborts_its_requests(llm):
    for _ in llm.stream(PROMPTS, GREEDY):
        break


@pytest.mark.parametrize("begun", [False, True])
def test_closing_a_stream_aborts_its_requests(llm, begun):
    stream = llm.stream(PROMPTS, GREEDY)
    if begun:
        next(stream)
    assert stream.outputs is None
    stream.close()
    stream.close()
    assert list(stream) == []
    assert [output.outputs[0].finish_reason for output in stream.outputs] == ["abort"] * 3
    assert not llm.llm_engine.sequences


def test_a_stream_that_nobody_reads_leaves_nothing(llm):
    llm.stream(PROMPTS, GREEDY)
    assert not llm.llm_engine.has_unfinished_requests(), "nobody waits for them"
    llm.llm_engine.step()
    assert not llm.llm_engine.sequences


def test_closing_the_engine_ends_its_streams(folder):
    with LLM(folder, max_model_len=128, use_tqdm_on_load=False) as llm:
        stream = llm.stream(PROMPTS, GREEDY)
        next(stream)
    with pytest.raises(RuntimeError, match="closed"):
        list(stream)
    assert [output.outputs[0].finish_reason for output in stream.outputs] == ["abort"] * 3


def test_generate_while_a_stream_is_open(llm):
    expected = ids(llm.generate(PROMPTS, GREEDY, use_tqdm=False))
    stream = llm.stream(PROMPTS, GREEDY)
    next(stream)
    assert ids(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected
    list(stream)
    assert ids(stream.outputs) == expected


def test_a_stop_string_ends_and_cuts_the_text(llm):
    text = llm.generate(PROMPTS[1], GREEDY, use_tqdm=False)[0].outputs[0].text
    stop = text[4:6]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop=stop)
    output = llm.generate(PROMPTS[1], params, use_tqdm=False)[0].outputs[0]
    assert output.finish_reason == "stop"
    assert output.text == text[: text.index(stop)]
    assert "".join(t for _, t in llm.stream(PROMPTS[1], params)) == output.text


def test_steps_and_requests_are_recorded(folder):
    with LLM(folder, max_model_len=128, block_size=4, use_tqdm_on_load=False) as llm:
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        trace, blocks = llm.llm_engine.trace, llm.llm_engine.block_manager.num_blocks
    assert trace[0].rows == (("0", 0, 3), ("1", 0, 25), ("2", 0, 1))
    assert trace[0].num_tokens == 29
    assert (trace[0].num_running, trace[0].num_waiting) == (3, 0)
    assert trace[0].num_free_blocks == blocks - (1 + 7 + 1)
    assert [step.rows for step in trace[1:3]] == [
        (("0", 3, 1), ("1", 25, 1), ("2", 1, 1)),
        (("0", 4, 1), ("1", 26, 1), ("2", 2, 1)),
    ]
    assert len(trace) == 12
    assert all(step.start_time < step.end_time for step in trace)
    for metrics in (output.metrics for output in outputs):
        assert metrics.queued_ts < metrics.scheduled_ts < metrics.first_token_ts
        assert metrics.first_token_ts < metrics.last_token_ts


def test_seeds(llm):
    free = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)
    seeded = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True, seed=5)
    first, second = ids(llm.generate([PROMPTS[0]] * 2, free, use_tqdm=False))
    assert first != second
    alone = ids(llm.generate(PROMPTS[0], seeded, use_tqdm=False))
    mates = ids(llm.generate(PROMPTS, [seeded, free, GREEDY], use_tqdm=False))
    assert mates[0] == alone[0]


def test_seed_minus_one_is_none_as_in_vllm():
    assert SamplingParams(seed=-1).seed is None


def test_names_that_are_taken_are_left_alone(llm):
    engine = llm.llm_engine
    taken = str(engine.num_requests + 2)
    engine.add_request(taken, [1, 2], GREEDY)
    assert len(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == 3
    engine.abort_request(taken)


def test_a_stream_that_has_ended_aborts_no_namesake(llm):
    stream = llm.stream([[1, 2, 3]], GREEDY)
    list(stream)
    llm.llm_engine.add_request(stream.outputs[0].request_id, [1, 2], GREEDY)
    stream.close()
    assert llm.llm_engine.has_unfinished_requests()
    llm.llm_engine.abort_request(stream.outputs[0].request_id)


def test_the_engine_by_hand(folder):
    engine = LLMEngine.from_engine_args(EngineArgs(folder, use_tqdm_on_load=False))
    engine.add_request("a", [1, 2, 3], GREEDY)
    engine.add_request("b", [4, 5], GREEDY)
    with pytest.raises(ValueError, match="request_id='a'"):
        engine.add_request("a", [1], GREEDY)
    engine.abort_request("b")
    finished = [o for _ in iter(engine.has_unfinished_requests, False) for o in engine.step()]
    assert finished[-1].request_id == "a"
    assert len(finished[-1].outputs[0].token_ids) == 12
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.step()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "got 0"),
        ("", "got 0"),
        ([[]], "got 0"),
        ([1] * 128, "got 128"),
        ([10**6], "token id"),
        ([[1], [-1]], "token id"),
        ({"text": "a"}, "prompt"),
    ],
)
def test_bad_prompts(llm, prompt, message):
    if prompt == []:
        assert llm.generate(prompt, GREEDY, use_tqdm=False) == []
        return
    with pytest.raises(ValueError, match=message):
        llm.generate(prompt, GREEDY, use_tqdm=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_k", -2),
        ("min_p", 1.5),
        ("max_tokens", 0),
        ("n", 0),
        ("stop", ""),
        ("stop", 5),
        ("stop", [5]),
        ("stop_token_ids", 5),
        ("stop_token_ids", [-1]),
        ("temperature", "hot"),
        ("seed", 1.5),
    ],
)
def test_bad_sampling_params_are_named(name, value):
    with pytest.raises((ValueError, TypeError), match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, f.name) for kind in (SamplingParams, EngineArgs) for f in fields(kind) if f.metadata],
)
def test_every_checked_field_refuses_what_it_cannot_be(kind, name):
    """Numbers and flags want another type; vLLM's parameters that are not here, their default."""
    model = {"model": "m"} if kind is EngineArgs else {}
    with pytest.raises((ValueError, TypeError), match=f"^{name}[ =]"):
        kind(**model, **{name: object()})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_num_seqs", 0),
        ("max_num_batched_tokens", 0),
        ("num_gpu_blocks_override", 0),
        ("gpu_memory_utilization", 1.5),
        ("tokenizer", "/no/such/folder"),
        ("max_model_len", 10**9),
        ("dtype", "int8"),
        ("quantization", "awq"),
        ("trust_remote_code", True),
        ("tensor_parallel_size", 3),
        ("block_size", 0),
        ("attention_backend", "magic"),
        ("device", "tpu"),
    ],
)
def test_bad_engine_arguments_are_named(folder, name, value):
    with pytest.raises(ValueError, match=name):
        LLM(folder, **{name: value})


def test_two_ranks_equal_one(llm, folder):
    sampled = SamplingParams(temperature=0.8, top_k=20, seed=3, max_tokens=12, ignore_eos=True)
    params = [GREEDY, sampled, SamplingParams(seed=1, max_tokens=12, ignore_eos=True)]
    with LLM(folder, tensor_parallel_size=2, max_model_len=128) as two:
        assert ids(two.generate(PROMPTS, params, use_tqdm=False)) == ids(
            llm.generate(PROMPTS, params, use_tqdm=False)
        )
        worker = two.llm_engine.ranks.workers[0]
        worker.kill()
        with pytest.raises(RuntimeError):
            two.generate(PROMPTS, params, use_tqdm=False)
    assert worker.poll() is not None


def test_five_calls_lead_from_generate_to_schedule(llm, monkeypatch):
    scheduler, chains = llm.llm_engine.core.scheduler, []
    plain = scheduler.schedule

    def schedule():
        names = [frame.name for frame in traceback.extract_stack()]
        chains.append(names[names.index("generate") + 1 :])
        return plain()

    monkeypatch.setattr(scheduler, "schedule", schedule)
    llm.generate(PROMPTS, greedy(), use_tqdm=False)
    assert set(map(tuple, chains)) == {
        ("advance", "advance", "step", "overlapped_step", "schedule")
    }
