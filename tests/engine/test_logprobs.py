"""Logprobs are those of transformers' log_softmax, in vLLM's classes, whatever the engine does."""

import math
import pickle
from contextlib import suppress

import pytest
from counting_engine import llm_of
from interrupts import Interrupter
from reference import reference_logits
from tiny_models import tiny_tokenizer

from nanovllm import LLM, SamplingParams
from nanovllm.engine.logprobs import TokenTexts
from nanovllm.logprobs import Logprob

PROMPTS = [[1, 2, 3], [*range(4, 44)], [9], [*range(4, 40), 7, 8]]
COMMON = {"max_tokens": 8, "ignore_eos": True}
SAMPLINGS = {
    "greedy": {"temperature": 0.0},
    "hot": {"temperature": 1.7, "seed": 3},
    "filtered": {"temperature": 0.8, "seed": 5, "top_k": 7, "top_p": 0.9, "min_p": 0.01},
}
SETTINGS = {
    "whole": {},
    "plain loop": {"async_scheduling": False},
    "chunks": {"max_num_batched_tokens": 7},
    "chunks of 1": {"max_num_batched_tokens": 1, "max_num_seqs": 1},
    "preemption": {"num_gpu_blocks_override": 14, "block_size": 4, "max_num_batched_tokens": 16},
    "three rows": {"max_num_seqs": 3, "max_num_batched_tokens": 17, "block_size": 4},
}


def make(folder, **options):
    defaults = {"device": "cpu", "dtype": "float32", "max_model_len": 56}
    return LLM(str(folder), use_tqdm_on_load=False, **defaults | options)


def reference(folder, token_ids):
    """Log probabilities [len(token_ids), vocab_size] of what follows each token."""
    return reference_logits(folder, token_ids).log_softmax(dim=1)


def check(found, expected, token_id, number, tokenizer):
    """One position: its dict, the whole distribution [vocab_size], the token that stands there."""
    best = expected.topk(number)
    assert next(iter(found)) == token_id, "the token that stands there comes first"
    for wanted_rank, value in enumerate(best.values, start=1):
        ranked = [one for one in found.values() if one.rank == wanted_rank]
        assert ranked, f"no token has rank {wanted_rank}"
        assert ranked[-1].logprob == pytest.approx(float(value), abs=1e-4)
    assert len(found) in (number, number + 1)
    for one_id, one in found.items():
        assert type(one) is Logprob
        assert one.logprob == pytest.approx(float(expected[one_id]), abs=1e-4)
        if not tokenizer.decode([one_id]).endswith("\ufffd"):
            assert one.decoded_token == tokenizer.decode([one_id])
    higher = int((expected > expected[token_id] + 1e-4).sum())
    at_least = int((expected >= expected[token_id] - 1e-4).sum())
    assert higher < found[token_id].rank <= at_least


def check_output(folder, output, logprobs, prompt_logprobs, tokenizer):
    answer, prompt = output.outputs[0], output.prompt_token_ids
    expected = reference(folder, [*prompt, *answer.token_ids])
    if logprobs is None:
        assert answer.logprobs is answer.cumulative_logprob is None
    else:
        assert len(answer.logprobs) == len(answer.token_ids)
        total = 0.0
        for place, (token_id, found) in enumerate(
            zip(answer.token_ids, answer.logprobs, strict=True)
        ):
            check(found, expected[len(prompt) - 1 + place], token_id, logprobs, tokenizer)
            total += found[token_id].logprob
        assert answer.cumulative_logprob == pytest.approx(total)
    if prompt_logprobs is None:
        assert output.prompt_logprobs is None
    else:
        assert len(output.prompt_logprobs) == len(prompt)
        assert output.prompt_logprobs[0] is None
        for place, token_id in enumerate(prompt[1:]):
            found = output.prompt_logprobs[place + 1]
            check(found, expected[place], token_id, prompt_logprobs, tokenizer)


def asked(sampling, n):
    """Parameters of the n-th prompt. Each asks for something else."""
    logprobs, prompt_logprobs = [(2, 1), (20, 0), (None, 3), (0, None)][n]
    return SamplingParams(
        logprobs=logprobs, prompt_logprobs=prompt_logprobs, **COMMON, **SAMPLINGS[sampling]
    )


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_logprobs_are_those_of_transformers(tiny_model, options, sampling):
    folder = tiny_model()
    params = [asked(sampling, n) for n in range(len(PROMPTS))]
    with make(folder, **options) as llm:
        for _ in range(2):  # the second time the cache holds all prompts
            outputs = llm.generate(PROMPTS, params, use_tqdm=False)
            for output, p in zip(outputs, params, strict=True):
                check_output(folder, output, p.logprobs, p.prompt_logprobs, llm.get_tokenizer())
        if "num_gpu_blocks_override" in options:
            assert any(output.metrics.num_preempted_tokens for output in outputs)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_asking_for_logprobs_changes_no_token(tiny_model, sampling):
    params = [asked(sampling, n) for n in range(len(PROMPTS))]
    plain = SamplingParams(**COMMON, **SAMPLINGS[sampling])
    with make(tiny_model()) as llm:
        found = llm.generate(PROMPTS, params, use_tqdm=False)
        wanted = llm.generate(PROMPTS, plain, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in found] == [o.outputs[0].token_ids for o in wanted]


def test_a_vocabulary_of_fewer_tokens_than_are_asked_for_is_reported_whole():
    with llm_of() as llm:
        small = SamplingParams(logprobs=20, prompt_logprobs=20, max_tokens=2, ignore_eos=True)
        model = llm.llm_engine.core.runner.model
        plain, model.vocab_size = model.compute_logits, 6
        model.compute_logits = lambda hidden: plain(hidden)[:, :6].clamp(-9, 9)
        output = llm.generate([[1, 2, 3]], small, use_tqdm=False)[0]
    for found in [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]:
        assert sorted(found) == [0, 1, 2, 3, 4, 5]
        assert sum(math.exp(one.logprob) for one in found.values()) == pytest.approx(1)


# -- the prefix cache ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "reads"),
    [
        ({}, True),
        ({"logprobs": 1}, True),
        ({"skip_reading_prefix_cache": False}, True),
        ({"skip_reading_prefix_cache": True}, False),
        ({"prompt_logprobs": 0}, False),
    ],
    ids=str,
)
def test_a_request_with_prompt_logprobs_does_not_read_the_prefix_cache(tiny_model, fields, reads):
    """Neither what earlier requests have left, nor what another one computes in the same step."""
    params = SamplingParams(**COMMON, **fields)
    assert params.skip_reading_prefix_cache is not reads
    prompt = [*range(40)]
    with make(tiny_model()) as llm:
        first = llm.generate([prompt, prompt], params, use_tqdm=False)
        assert [o.num_cached_tokens for o in first] == [0, 32 if reads else 0]
        again = llm.generate([prompt], params, use_tqdm=False)[0]
        assert again.num_cached_tokens == (32 if reads else 0)
        plain = llm.generate([prompt], SamplingParams(**COMMON), use_tqdm=False)[0]
        assert plain.num_cached_tokens == 32, "what it computed may be read by others"


def test_prompt_logprobs_may_be_asked_for_beside_the_prefix_cache(tiny_model):
    """As in vLLM, a script that says so reads the cache, and gets nothing for what was in it."""
    prompt = [*range(40)]
    params = SamplingParams(prompt_logprobs=0, skip_reading_prefix_cache=False, **COMMON)
    with make(tiny_model()) as llm:
        whole = llm.generate([prompt], params, use_tqdm=False)[0].prompt_logprobs
        rest = llm.generate([prompt], params, use_tqdm=False)[0].prompt_logprobs
    assert rest[:33] == [None] * 33
    assert [list(found) for found in rest[33:]] == [list(found) for found in whole[33:]]


# -- several ranks, failures, interrupts -----------------------------------------------------------


def test_two_ranks_report_what_one_does(tiny_model):
    """With a request beside them that asks for nothing, and steps that gather no whole rows."""
    folder = tiny_model()
    with make(folder, tensor_parallel_size=2, max_num_batched_tokens=13) as llm:
        for sampling in SAMPLINGS:
            params = [asked(sampling, n) for n in range(len(PROMPTS))]
            plain = SamplingParams(**COMMON, **SAMPLINGS[sampling])
            outputs = llm.generate([*PROMPTS, [5, 6]], [*params, plain], use_tqdm=False)
            for output, p in zip(outputs, [*params, plain], strict=True):
                check_output(folder, output, p.logprobs, p.prompt_logprobs, llm.get_tokenizer())


@pytest.mark.parametrize("overlap", [False, True])
def test_a_failed_step_loses_and_doubles_nothing(tiny_model, overlap):
    folder = tiny_model()
    params = [asked("hot", n) for n in range(len(PROMPTS))]
    with make(folder, async_scheduling=overlap, max_num_batched_tokens=13) as llm:
        engine = llm.llm_engine
        for n, prompt in enumerate(PROMPTS):
            engine.add_request(str(n), prompt, params[n])
        runner, outputs, steps = engine.core.runner, {}, 0
        plain = runner.launch
        while engine.has_unfinished_requests():
            steps += 1
            fails = steps in (2, 7, 15, 20)
            runner.launch = (lambda batch: 1 / 0) if fails else plain
            with suppress(ZeroDivisionError):
                outputs |= {output.request_id: output for output in engine.step()}
        assert steps > 12
        for n, p in enumerate(params):
            output = outputs[str(n)]
            check_output(folder, output, p.logprobs, p.prompt_logprobs, llm.get_tokenizer())


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    "within", ["", "Sequence.note_logprobs", "LogprobsProcessor._update_prompts", "Sequence.append"]
)
def test_an_interrupted_call_leaves_the_others_logprobs_whole(overlap, within):
    """Another request of the engine is unfinished when Ctrl-C comes, and goes on afterwards."""
    params = SamplingParams(
        temperature=0.9, seed=3, max_tokens=6, ignore_eos=True, logprobs=2, prompt_logprobs=1
    )
    prompt, options = [1, 2, 3, 4, 5], {"max_num_batched_tokens": 4, "block_size": 2}
    with llm_of(async_scheduling=overlap, max_model_len=16, **options) as llm:
        engine = llm.llm_engine
        whole = llm.generate([prompt], params, use_tqdm=False)[0]

        def run(at):
            engine.add_request("other", prompt, params)
            with Interrupter(at, within) as interrupter:
                try:
                    llm.generate([prompt], params, use_tqdm=False)
                except KeyboardInterrupt:
                    assert interrupter.where
            outputs = []
            while engine.has_unfinished_requests():
                outputs += [o for o in engine.step() if o.request_id == "other"]
            return outputs, interrupter

        count = run(None)[1].count
        for at in range(1, count, max(1, count // 25)):
            outputs, interrupter = run(at)
            if not outputs:
                continue  # it ended within the interrupted call
            output = outputs[-1]
            assert output.finished, interrupter.where
            assert output.prompt_logprobs == whole.prompt_logprobs, interrupter.where
            assert output.outputs[0].logprobs == whole.outputs[0].logprobs, interrupter.where
            assert output.outputs[0].cumulative_logprob == whole.outputs[0].cumulative_logprob


def test_every_step_shows_the_logprobs_so_far(tiny_model):
    params = SamplingParams(logprobs=1, prompt_logprobs=0, stop_token_ids=[], **COMMON)
    with make(tiny_model(), max_num_batched_tokens=16) as llm:
        engine = llm.llm_engine
        engine.add_request("a", [*range(40)], params)
        lengths, earlier = [], []
        while engine.has_unfinished_requests():
            for output in engine.step():
                answer = output.outputs[0]
                assert len(answer.logprobs) == len(answer.token_ids)
                assert answer.logprobs[: len(earlier)] == earlier
                earlier = answer.logprobs
                lengths.append(len(answer.logprobs))
        assert lengths == [*range(1, 9)]
    copy = pickle.loads(pickle.dumps(output))
    assert copy.outputs[0].logprobs == earlier
    assert type(earlier) is list


def test_a_request_that_is_aborted_keeps_what_it_has(tiny_model):
    with make(tiny_model(), max_num_batched_tokens=16) as llm:
        stream = llm.stream([[*range(40)]], SamplingParams(logprobs=1, prompt_logprobs=1))
        next(stream)
        stream.close()
        answer = stream.outputs[0].outputs[0]
        assert answer.finish_reason == "abort"
        assert len(answer.logprobs) == len(answer.token_ids) > 0
        stream = llm.stream([[*range(40)]], SamplingParams(logprobs=1, prompt_logprobs=1))
        stream.close()
        output = stream.outputs[0]
        assert (output.prompt_logprobs, output.outputs[0].logprobs) == ([None], [])
        assert output.outputs[0].cumulative_logprob == 0.0


def test_a_request_whose_logits_are_not_finite_ends_with_the_logprobs_of_its_tokens(tiny_model):
    with make(tiny_model()) as llm:
        model, calls = llm.llm_engine.core.runner.model, []
        plain = model.compute_logits
        model.compute_logits = lambda hidden: (
            calls.append(1) or plain(hidden) * (math.nan if len(calls) > 3 else 1)
        )
        answer = llm.generate([[1, 2]], SamplingParams(logprobs=2, **COMMON), use_tqdm=False)[0]
    assert answer.outputs[0].finish_reason == "error"
    assert len(answer.outputs[0].logprobs) == len(answer.outputs[0].token_ids) == 3
    assert math.isfinite(answer.outputs[0].cumulative_logprob)


# -- texts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"skip_tokenizer_init": True}, {"detokenize": False}], ids=str)
def test_without_a_text_no_token_has_one(tiny_model, options):
    options = dict(options)
    asked = {"detokenize": options.pop("detokenize")} if "detokenize" in options else {}
    with make(tiny_model(), **options) as llm:
        params = SamplingParams(logprobs=2, prompt_logprobs=2, **COMMON, **asked)
        output = llm.generate([[1, 2, 3]], params, use_tqdm=False)[0]
    found = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    assert {one.decoded_token for each in found for one in each.values()} == {None}


def test_parts_of_a_character_have_no_text_until_it_is_whole():
    """The last part has the whole character, whatever stands in front of the first part."""
    tokenizer = tiny_tokenizer()
    texts = TokenTexts(tokenizer)
    letter, *smile = tokenizer.encode("a🙂", add_special_tokens=False)
    assert len(smile) == 4
    for before in ([], [letter]):
        for count, part in enumerate(smile):
            found = texts.complete([part, letter], [*before, *smile[:count]][-4:])
            assert found == ["🙂" if count == 3 else "", "a"]
    assert texts.complete(smile[3:], [letter]) == [""], "it is no character alone"
