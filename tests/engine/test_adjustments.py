"""Penalties, min_tokens, biases and forbidden tokens: vLLM's formulas, in every loop of the engine.

The formulas are written out once more here, with Python's lists and without any table.
"""

import json
import shutil
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from counting_engine import engine_of
from reference import reference_logits

from nanovllm import LLM, SamplingParams
from nanovllm.engine.adjustments import AdjustmentTables, ends_of_bad_words
from nanovllm.engine.sequence import Sequence
from nanovllm.frontend.input_processor import encode_bad_words
from nanovllm.layers import adjustments
from nanovllm.metadata import IN_PROMPT, STOP

VOCAB, EOS = 300, (297, 299)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8] * 5, [9], [*range(40)], [*range(40), 1]]
SETTINGS = {
    "repetition": {"repetition_penalty": 1.3},
    "repetition below 1": {"repetition_penalty": 0.8},
    "frequency": {"frequency_penalty": 1.2},
    "presence": {"presence_penalty": 1.7},
    "negative": {"frequency_penalty": -0.3, "presence_penalty": -1.0},
    "all penalties": {
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.5,
        "presence_penalty": 0.25,
    },
    "bias": {"logit_bias": {7: 3.5, 220: -100.0, 11: 2.0}},
    "allowed": {"allowed_token_ids": [*range(0, 300, 7)]},
    "minimum": {"min_tokens": 9, "stop_token_ids": [*range(0, 300, 2)]},
    "everything": {
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.5,
        "logit_bias": {7: 3.5, 14: -1.0},
        "allowed_token_ids": [*range(0, 300, 7)],
        "min_tokens": 6,
        "stop_token_ids": [*range(0, 300, 5)],
    },
}
FEW_BLOCKS = {"num_gpu_blocks_override": 12, "block_size": 8, "max_model_len": 96}
LOOPS = {
    "overlapped": {},
    "plain": {"async_scheduling": False},
    "chunked": {"max_num_batched_tokens": 13},
    "preempted": FEW_BLOCKS,
    "preempted, chunked and plain": FEW_BLOCKS
    | {"max_num_batched_tokens": 13, "async_scheduling": False},
    "two rows": {"max_num_seqs": 2},
}


def expected_logits(logits, prompt, output, params, bad_words=(), end_ids=EOS):
    """vLLM's order: allowed ids, bad words, min_tokens, bias, then the three penalties."""
    values = logits.tolist()
    stops = {*end_ids, *params.stop_token_ids}
    for i, value in enumerate(values):
        if params.allowed_token_ids is not None and i not in params.allowed_token_ids:
            value = float("-inf")
        for *first, last in bad_words:
            if last == i and (not first or output[-len(first) :] == first):
                value = float("-inf")
        if len(output) < params.min_tokens and i in stops:
            value = float("-inf")
        value += (params.logit_bias or {}).get(i, 0.0)
        if i in prompt or i in output:
            divides = value > 0
            value = (
                value / params.repetition_penalty if divides else value * params.repetition_penalty
            )
        value -= params.frequency_penalty * output.count(i)
        value -= params.presence_penalty * (i in output)
        values[i] = value
    return torch.tensor(values)


def adjusted_by_tables(logits, prompt, output, params, bad_words=()):
    """The same by the tables and the torch twin."""
    tables = AdjustmentTables(len(logits), logits.device)
    end_ids = frozenset(EOS).union(params.stop_token_ids)
    seq = Sequence("0", None, [*prompt], params, 99, end_ids=end_ids)
    seq.token_ids += output
    seq.bad_word_ids = [*bad_words]
    columns = tables.update([SimpleNamespace(seq=seq, end=len(seq.token_ids))])
    scores = logits[None].clone()
    position = torch.tensor([[len(seq.token_ids)]])
    adjustments.adjust(scores, tables.select(torch.from_numpy(columns)), position)
    return scores[0]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("bad_words", [(), ([7], [1, 2, 21], [2, 28], [5, 2, 35])], ids=len)
def test_the_tables_give_vllms_formulas(name, bad_words):
    params = SamplingParams(**SETTINGS[name])
    for output in ([], [7], [7, 7, 1, 2], [14, 3, 7] * 4):
        logits = 4 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(len(output)))
        wanted = expected_logits(logits, [1, 7, 9, 9], output, params, bad_words)
        found = adjusted_by_tables(logits, [1, 7, 9, 9], output, params, bad_words)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_the_formulas_equal_the_processors_of_transformers():
    from transformers.generation.logits_process import (
        MinNewTokensLengthLogitsProcessor,
        NoBadWordsLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
        SequenceBiasLogitsProcessor,
    )

    prompt, output = [1, 7, 9, 9], [7, 3, 21, 3]
    ids, logits = torch.tensor([prompt + output]), 4 * torch.randn(1, VOCAB)
    bad_words = [[50], [3, 51], [21, 3, 52], [4, 53]]
    bias = {(7,): 2.0, (60,): -3.0}
    for processor, options, words in [
        (RepetitionPenaltyLogitsProcessor(1.3), {"repetition_penalty": 1.3}, ()),
        (MinNewTokensLengthLogitsProcessor(4, 5, [*EOS]), {"min_tokens": 5}, ()),
        (MinNewTokensLengthLogitsProcessor(4, 4, [*EOS]), {"min_tokens": 4}, ()),
        (NoBadWordsLogitsProcessor(bad_words), {}, bad_words),
        (SequenceBiasLogitsProcessor(bias), {"logit_bias": {7: 2.0, 60: -3.0}}, ()),
    ]:
        found = adjusted_by_tables(logits[0], prompt, output, SamplingParams(**options), words)
        torch.testing.assert_close(found, processor(ids, logits.clone())[0])


def test_bad_words_are_encoded_as_vllm_encodes_them():
    ids = {"fox": [5], " fox": [6], "a b": [7, 8], " a b": [9, 8], "x": [4], " x": [3, 4],
           "é": [2], " é": [2]}  # fmt: skip
    found = encode_bad_words([" fox", "a b", "x", "é"], ids.__getitem__, 10)
    assert found == [[5], [6], [7, 8], [9, 8], [4], [2]]
    with pytest.raises(ValueError, match=r"bad_words=\['fox'\] has the token id 6 in 'fox'"):
        encode_bad_words(["fox"], ids.__getitem__, 6)
    assert ends_of_bad_words([[5], [7, 8], [9, 7, 3]], [9, 7]) == {5, 8, 3}
    assert ends_of_bad_words([[5], [7, 8], [9, 7, 3]], [7]) == {5, 8}


# -- whole engines ---------------------------------------------------------------------------------


def make(folder, **options):
    return LLM(
        str(folder), **{"device": "cpu", "max_model_len": 128, "use_tqdm_on_load": False} | options
    )


def answers(llm, params, prompts=PROMPTS):
    return [list(o.outputs[0].token_ids) for o in llm.generate(prompts, params, use_tqdm=False)]


@pytest.mark.parametrize("loop", LOOPS)
def test_greedy_tokens_are_those_of_the_formulas(loop, tiny_model):
    """All settings in one batch. A token may differ where two scores are almost equal."""
    folder = tiny_model()
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(SETTINGS))]
    params = [SamplingParams(temperature=0, max_tokens=24, **s) for s in SETTINGS.values()]
    with make(folder, **LOOPS[loop]) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        preempted = sum(o.metrics.num_preempted_tokens for o in outputs)
        assert (preempted > 0) == ("preempted" in loop)
    for prompt, asked, output in zip(prompts, params, outputs, strict=True):
        ids = list(output.outputs[0].token_ids)
        logits = reference_logits(folder, [*prompt, *ids])
        for n, token_id in enumerate(ids):
            wanted = expected_logits(logits[len(prompt) + n - 1], prompt, ids[:n], asked)
            assert wanted[token_id] > wanted.max() - 1e-3, (asked, n)
        assert len(ids) >= asked.min_tokens
        assert len(ids) == 24 or ids[-1] in {*EOS, *asked.stop_token_ids}


def mixed_params(**options):
    """Rows of every kind, and plain ones between them."""
    settings = [s for setting in SETTINGS.values() for s in ({}, setting)]
    return [
        SamplingParams(temperature=0.8, seed=i, max_tokens=10 + i, **setting, **options)
        for i, setting in enumerate(settings)
    ]


@pytest.fixture(scope="module")
def alone(tiny_model):
    """Each request's tokens when it is alone in the plain loop, bad words included."""
    prompts, params = requests()
    with make(tiny_model(), async_scheduling=False) as llm:
        return [answers(llm, p, [prompt])[0] for prompt, p in zip(prompts, params, strict=True)]


def requests():
    params = mixed_params()
    options = {"temperature": 0.8, "max_tokens": 20, "top_k": 30, "repetition_penalty": 1.1}
    params += [SamplingParams(seed=i, bad_words=w, **options) for i, w in enumerate(BAD_WORDS)]
    return [PROMPTS[i % len(PROMPTS)] for i in range(len(params))], params


BAD_WORDS = [["the"], ["ab", "cd", "the next"], [*"abcdefghijklm"]]


@pytest.mark.parametrize("loop", LOOPS)
def test_no_loop_and_no_neighbour_changes_a_token(loop, alone, tiny_model):
    prompts, params = requests()
    with make(tiny_model(), **LOOPS[loop]) as llm:
        assert answers(llm, params, prompts) == alone
        again = answers(llm, params[::-1], prompts[::-1])  # other rows of the tables
        assert again[::-1] == alone
        tables = llm.llm_engine.core.runner.input_batch.adjustment_tables
        assert len(tables.tokens.row_of) <= llm.llm_engine.args.max_num_seqs


@pytest.mark.parametrize("options", [{}, {"async_scheduling": False}], ids=["overlapped", "plain"])
def test_two_ranks_draw_the_same(options, alone, tiny_model):
    prompts, params = requests()
    with make(tiny_model(), tensor_parallel_size=2, **options) as llm:
        assert answers(llm, params, prompts) == alone


def test_a_step_without_such_rows_does_not_touch_the_tables(tiny_model, monkeypatch):
    with make(tiny_model()) as llm:
        tables = llm.llm_engine.core.runner.input_batch.adjustment_tables

        def fail(*args):
            raise AssertionError("a table was touched")

        with monkeypatch.context() as patch:
            for name in ("allocate", "write"):
                patch.setattr(type(tables.tokens), name, fail)
            patch.setattr("nanovllm.layers.sampler.adjust", fail)
            patch.setattr("nanovllm.layers.sampler.count_tokens", fail)
            answers(llm, SamplingParams(temperature=0.8, max_tokens=5))
            with pytest.raises(AssertionError, match="touched"):
                answers(llm, SamplingParams(presence_penalty=1.0, max_tokens=5))
        assert len(tables.tokens.values) == 1
        answers(llm, SamplingParams(presence_penalty=1.0, max_tokens=5))
        assert len(tables.tokens.values) == 16
        assert len(tables.biases.values) == 1


def test_the_tables_grow_with_their_content(tiny_model):
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True,
                            repetition_penalty=1.2, logit_bias={5: 1.0})  # fmt: skip
    with make(tiny_model(), max_num_seqs=40) as llm:
        wanted = answers(llm, params, [[1, 2, 3]])[0]
        engine = llm.llm_engine
        engine.add_request("first", [1, 2, 3], params)
        first = engine.sequences["first"]
        for i in range(39):
            engine.step()
            engine.add_request(str(i), [i, 4], params)
        while engine.has_unfinished_requests():
            engine.step()
        assert first.output_ids == wanted
        tables = engine.core.runner.input_batch.adjustment_tables
        assert len(tables.tokens.values) == len(tables.biases.values) == 64
        assert tables.tokens.row_of == {} or len(tables.tokens.row_of) == 1


def test_a_failed_step_is_counted_once(tiny_model, monkeypatch):
    """What a step that failed had counted on the device is written anew from the host's ids."""
    params = SamplingParams(temperature=0.8, seed=1, max_tokens=30, ignore_eos=True,
                            frequency_penalty=1.5, repetition_penalty=1.3)  # fmt: skip
    with make(tiny_model()) as llm:
        wanted = answers(llm, params)
        engine, failures = llm.llm_engine, iter([7, 4, 9, 1])
        for i, prompt in enumerate(PROMPTS):
            engine.add_request(str(i), prompt, params)
        seqs = list(engine.sequences.values())
        steps_left = next(failures)
        while engine.has_unfinished_requests():
            engine.step()
            steps_left -= 1
            if steps_left == 0:
                with monkeypatch.context() as patch:
                    patch.setattr(engine.core.runner.input_batch, "set_next_ids", lambda *_: 1 / 0)
                    with pytest.raises(ZeroDivisionError):
                        engine.step()
                steps_left = next(failures, 0)
        assert [seq.output_ids for seq in seqs] == wanted


def test_only_a_request_that_needs_its_ids_sits_out_a_step(tiny_model):
    with make(tiny_model()) as llm:
        engine = llm.llm_engine
        options = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
        engine.add_request("waits", [1, 2, 3], SamplingParams(bad_words=["the next"], **options))
        engine.add_request("counts", [1, 2, 3], SamplingParams(presence_penalty=1.0, **options))
        engine.add_request("one token", [1, 2, 3], SamplingParams(bad_words=["a"], **options))
        while engine.has_unfinished_requests():
            engine.step()
        steps = [{name for name, _, _ in record.rows} for record in engine.trace]
        for name in ("waits", "counts", "one token"):
            assert sum(name in rows for rows in steps) == 12
        assert all({"counts", "one token"} <= rows for rows in steps[:12])
        assert not any("waits" in a and "waits" in b for a, b in pairwise(steps[:12]))


@pytest.mark.parametrize("overlapped", [True, False])
def test_no_bad_word_is_generated(overlapped, tiny_model):
    """With two tokens to choose from, the model would say the word all the time."""
    with make(tiny_model(), async_scheduling=overlapped) as llm:
        first, last = llm.get_tokenizer().encode("qv")
        for said, bad_words, is_said in [
            ([first, last], [], True),
            ([first, last], ["qv"], False),
            ([first, first, last], [], True),
            ([first, first, last], ["qqv"], False),
        ]:
            options = {"max_tokens": 40, "seed": 3, "ignore_eos": True, "frequency_penalty": 2.0}
            options["allowed_token_ids"] = [first, last]
            found = answers(llm, SamplingParams(bad_words=bad_words, **options))
            assert all({first, last} >= set(out) for out in found)
            assert any(contains(out, said) for out in found) == is_said


def contains(ids, part):
    return any(ids[i : i + len(part)] == part for i in range(len(ids)))


# -- min_tokens ------------------------------------------------------------------------------------


def test_min_tokens_holds_back_ends_and_stop_ids(tiny_model):
    ends = {"logit_bias": {299: 200.0, 297: 150.0, 5: 100.0}}
    stops = {"logit_bias": {6: 200.0, 5: 100.0}, "stop_token_ids": [6], "ignore_eos": True}
    with make(tiny_model()) as llm:
        for end, options in ((299, ends), (6, stops)):
            for least in (0, 1, 7):
                params = SamplingParams(temperature=0, max_tokens=40, min_tokens=least, **options)
                assert answers(llm, params, [[1, 2]]) == [[5] * least + [end]]


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_within_the_first_min_tokens_ends_nothing(include, tiny_model):
    """As in vLLM, one that a later token completes does, even if it began before."""
    options = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
    options |= {"include_stop_str_in_output": include}
    with make(tiny_model()) as llm:
        (a,) = llm.get_tokenizer().encode("a")
        options["logit_bias"] = {a: 1000.0}
        for stop, least, count in [
            (["a"], 0, 1), (["a"], 1, 2), (["a"], 5, 6), (["aaa"], 5, 6), (["a" * 9], 5, 9),
            (["aaa"], 1, 3), (["a", "aaaa"], 5, 6), (["b"], 5, 12), (["a"], 12, 12),
        ]:  # fmt: skip
            params = SamplingParams(stop=stop, min_tokens=least, **options)
            output = llm.generate([[1, 2]], params, use_tqdm=False)[0].outputs[0]
            assert len(output.token_ids) == count, (stop, least)
            cut = 0 if include or output.finish_reason == "length" else len(max(
                (s for s in stop if len(s) <= count), key=len))  # fmt: skip
            assert output.text == "a" * (count - cut)


def test_an_ignored_end_is_held_back_too_as_in_vllm(tiny_model):
    params = SamplingParams(temperature=0.0, max_tokens=9, min_tokens=4, ignore_eos=True,
                            logit_bias={299: 100.0})  # fmt: skip
    with make(tiny_model()) as llm:
        out = answers(llm, params, [[1, 2]])[0]
    assert 299 not in out[:4]
    assert out[4:] == [299] * 5


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"logit_bias": {300: 1.0}},
            "every token id of logit_bias must be between 0 and 299, got 300",
        ),
        ({"allowed_token_ids": [1, 300]}, "allowed_token_ids must be between 0 and 299, got 300"),
        (
            {"allowed_token_ids": [299], "min_tokens": 1},
            r"allowed_token_ids=\[299\] must have a token",
        ),
        ({"allowed_token_ids": [65], "bad_words": ["b"]}, "must have a token that bad_words"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_anything_is_queued(options, message, tiny_model):
    with make(tiny_model()) as llm:
        if "bad_words" in options:
            options = {**options, "allowed_token_ids": llm.get_tokenizer().encode("b")}
        with pytest.raises(ValueError, match=message):
            llm.generate([[1], [2]], [SamplingParams(), SamplingParams(**options)])
        assert not llm.llm_engine.has_unfinished_requests()
        assert len(llm.llm_engine.core.runner.input_batch.adjustment_tables.tokens.values) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"allowed_token_ids": []},
            r"allowed_token_ids must have a token id, or be None; got \[\]",
        ),
        ({"bad_words": [" "]}, "every item of bad_words must have text, got ' '"),
        ({"logit_bias": {-1: 1.0}}, "every token id of logit_bias must be between .* got -1"),
        ({"logit_bias": {5: float("nan")}}, r"logit_bias\[5\] must be between .* got nan"),
        ({"logit_bias": {5: 1e10}}, r"logit_bias\[5\] must be between .* got 1"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens must be at most max_tokens=4, got 5"),
    ],
    ids=str,
)
def test_bad_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)


def test_bad_words_need_a_tokenizer(tiny_model):
    with (
        make(tiny_model(), skip_tokenizer_init=True) as llm,
        pytest.raises(ValueError, match=r"bad_words=\['a'\] needs a tokenizer"),
    ):
        llm.generate([[1]], SamplingParams(bad_words=["a"]), use_tqdm=False)


def test_a_request_to_which_no_token_is_left_ends_with_an_error(tiny_model):
    bias = dict.fromkeys(range(VOCAB), float("-inf"))
    with make(tiny_model()) as llm:
        params = [SamplingParams(logit_bias=bias), SamplingParams(max_tokens=3, ignore_eos=True)]
        bad, good = llm.generate([[1], [2]], params, use_tqdm=False)
    assert bad.outputs[0].finish_reason == "error"
    assert "logit_bias" in bad.outputs[0].error
    assert len(good.outputs[0].token_ids) == 3


# -- generation_config -----------------------------------------------------------------------------


def test_a_models_own_repetition_penalty_is_followed(tiny_model, tmp_path):
    """Qwen2.5-Instruct's generation_config.json sets one."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model(family="qwen2"), folder)
    config = {"do_sample": True, "repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8,
              "top_k": 20, "eos_token_id": [297, 299], "bos_token_id": 297}  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(config))
    with make(folder) as llm:
        usual = llm.get_default_sampling_params()
        assert (usual.repetition_penalty, usual.top_k, usual.top_p) == (1.1, 20, 0.8)
        found = answers(llm, None)
        written_out = SamplingParams(repetition_penalty=1.1, temperature=0.7, top_p=0.8, top_k=20)
        assert [len(ids) for ids in found] == [
            len(ids) for ids in answers(llm, written_out)
        ] or found


@pytest.mark.parametrize("size", [1, 2])
def test_biases_reach_every_rank_under_their_token_ids(size):
    """What ranks tell each other is JSON, whose keys are texts."""
    with engine_of(size) as engine:
        params = SamplingParams(temperature=0.0, max_tokens=3, logit_bias={7: 1e8}, ignore_eos=True)
        engine.add_request("a", [1, 2], params)
        seq = engine.sequences["a"]
        while engine.has_unfinished_requests():
            engine.step()
        assert seq.output_ids == [7, 7, 7]


def test_flags_and_counts_share_an_entry():
    params = SamplingParams(repetition_penalty=1.1, min_tokens=2)
    tables = AdjustmentTables(VOCAB, torch.device("cpu"))
    seq = Sequence("0", None, [1, 299], params, 99, end_ids=frozenset(EOS))
    seq.token_ids += [299, 299, 1]
    tables.update([SimpleNamespace(seq=seq, end=5)])
    row = tables.tokens.values[tables.tokens.row_of[seq]]
    assert row[299] == IN_PROMPT | STOP | 2
    assert row[1] == IN_PROMPT | 1
    assert row[297] == STOP
    assert (row != 0).sum() == 3
