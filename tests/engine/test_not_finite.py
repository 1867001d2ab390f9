"""A request whose numbers overflow ends alone, with an error; every other request is unaffected.

The model here is sound in float32. In float16, token 7's hidden state overflows in the first layer,
so that its keys and values in the second are NaN, and so are the logits of a text that holds it.
"""

import math

import pytest
import torch
from tiny_models import write_overflowing
from torch.utils._python_dispatch import TorchDispatchMode

from course.rank_threads import on_ranks
from nanovllm import LLM, SamplingParams
from nanovllm.distributed.ranks import Ranks
from nanovllm.layers.backend import TORCH_BACKEND
from nanovllm.layers.linear import VocabParallelEmbedding
from nanovllm.layers.sampler import log_of, sample
from nanovllm.metadata import SamplingMetadata

BAD = [7] * 40
GOOD = [20, 21, 22, 23, 24]
BEGINNING = [*range(30, 42)]  # three blocks
SAMPLINGS = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8, "seed": 5},
    "filtered": {"temperature": 0.8, "seed": 5, "top_k": 20, "top_p": 0.9},
}
BOTH_LOOPS = pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_overflowing(tmp_path_factory.mktemp("overflows"))


def make(folder, **options):
    defaults = {"dtype": "float16", "device": "cpu", "max_model_len": 128, "block_size": 4}
    defaults |= {"max_num_seqs": 8, "num_gpu_blocks_override": 80, "use_tqdm_on_load": False}
    return LLM(folder, **defaults | options)


def params(name="greedy"):
    return SamplingParams(max_tokens=12, ignore_eos=True, **SAMPLINGS[name])


def run(llm, prompts, name="greedy"):
    return [o.outputs[0] for o in llm.generate(prompts, params(name), use_tqdm=False)]


def assert_failed(output):
    assert output.token_ids == []
    assert output.finish_reason == "error"
    assert "not finite" in output.error
    assert "float16" in output.error


@pytest.fixture(scope="module")
def alone(folder):
    """The tokens of some good prompts, each from an engine that has never seen token 7."""

    def tokens(prompt, name="greedy"):
        with make(folder) as llm:
            return run(llm, [prompt], name)[0].token_ids

    assert len(set(tokens(GOOD))) > 4
    return tokens


# -- one engine, many requests -------------------------------------------------------------------


@BOTH_LOOPS
@pytest.mark.parametrize("name", SAMPLINGS)
def test_the_other_requests_of_a_batch_are_unaffected(folder, alone, name, overlap):
    """The bad request comes first, so that block 0, with which tables are padded, is its own."""
    with make(folder, async_scheduling=overlap) as llm:
        bad, first, begins_alike, last = run(llm, [BAD, GOOD, [*GOOD, *BAD], GOOD], name)
        assert first.token_ids == last.token_ids == alone(GOOD, name)
        assert (first.finish_reason, first.error) == ("length", None)
        assert_failed(bad)
        assert_failed(begins_alike)
        assert not llm.llm_engine.sequences
        blocks = llm.llm_engine.block_manager
        assert blocks.num_free_blocks == blocks.num_blocks


@BOTH_LOOPS
@pytest.mark.parametrize("name", SAMPLINGS)
def test_later_requests_in_the_same_blocks_are_unaffected(folder, alone, name, overlap):
    """Eleven blocks, ten of which the bad request fills with NaN; contexts end within a block."""
    options = {"num_gpu_blocks_override": 11, "max_model_len": 44, "async_scheduling": overlap}
    with make(folder, **options) as llm:
        assert_failed(run(llm, [BAD], name)[0])
        assert run(llm, [GOOD], name)[0].token_ids == alone(GOOD, name)
        later = [[i, 3] for i in range(20, 24)]
        found = run(llm, later, name)
    assert [output.token_ids for output in found] == [alone(prompt, name) for prompt in later]


@BOTH_LOOPS
def test_a_request_that_turns_bad_later_keeps_what_it_said(folder, alone, overlap, monkeypatch):
    """Its third token is made a 7 on the device; its next logits are not finite."""
    with make(folder, async_scheduling=overlap) as llm:
        rows, calls = llm.llm_engine.core.runner.input_batch, []
        update = rows.update

        def poisoned(batch, num_rows):
            update(batch, num_rows)
            calls.append(len(batch))
            if len(calls) == 4:
                rows.input_ids[0] = 7

        monkeypatch.setattr(rows, "update", poisoned)
        bad, good = run(llm, [[50, 51], GOOD])
    assert len(bad.token_ids) == 3
    assert bad.finish_reason == "error"
    assert "after 5 tokens" in bad.error
    assert good.token_ids == alone(GOOD)


@BOTH_LOOPS
def test_a_follower_that_shares_the_good_beginning_is_unaffected(folder, alone, overlap):
    """Both are computed in one step: the follower reads blocks that the bad request stored."""
    follower = [*BEGINNING, *GOOD]
    with make(folder, async_scheduling=overlap) as llm:
        bad, good = llm.generate([[*BEGINNING, *BAD], follower], params(), use_tqdm=False)
        assert good.num_cached_tokens == len(BEGINNING)
        assert_failed(bad.outputs[0])
        assert good.outputs[0].token_ids == alone(follower)


@BOTH_LOOPS
def test_what_a_failed_request_computed_leaves_the_prefix_cache(folder, overlap):
    """And nothing more: the beginning, which a good request computed, stays."""
    bad = [*BEGINNING, *BAD]
    with make(folder, async_scheduling=overlap) as llm:
        for cached in (0, len(BEGINNING)):
            for _ in range(2):
                (output,) = llm.generate([bad], params(), use_tqdm=False)
                assert_failed(output.outputs[0])
                assert output.num_cached_tokens == cached
            run(llm, [[*BEGINNING, *GOOD]])


@BOTH_LOOPS
def test_a_stream_ends(folder, alone, overlap):
    with make(folder, async_scheduling=overlap) as llm:
        stream = llm.stream([BAD, GOOD], params())
        assert {index for index, _ in stream} == {1}
        bad, good = (output.outputs[0] for output in stream.outputs)
        assert_failed(bad)
        assert good.token_ids == alone(GOOD)


def test_steps_show_the_error(folder):
    with make(folder) as llm:
        engine, seen = llm.llm_engine, []
        engine.add_request("bad", BAD, params())
        while engine.has_unfinished_requests():
            seen += engine.step()
    (output,) = seen
    assert output.finished
    assert_failed(output.outputs[0])


@pytest.mark.parametrize("name", SAMPLINGS)
def test_two_ranks_agree(folder, alone, name):
    with make(folder, tensor_parallel_size=2) as llm:
        bad, good = run(llm, [BAD, GOOD], name)
        assert_failed(bad)
        assert good.token_ids == alone(GOOD, name)
        assert run(llm, [GOOD], name)[0].token_ids == good.token_ids


# -- the embedding -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_row_of_the_embedding_reaches_its_own_token_alone(size, value):
    """An id that another rank holds is looked up at the border of this one's part: row 4 or 5."""
    table = torch.randn(10, 3)
    table[4] = table[5] = value

    def look_up(ranks):
        embedding = VocabParallelEmbedding(10, 3, torch.float32, ranks)
        shard = embedding.shard
        embedding.weight.copy_(table[shard.start : shard.start + shard.count])
        return embedding(torch.tensor([0, 4, 9, 5, 1]))

    for vectors in on_ranks(size, look_up) if size > 1 else [look_up(Ranks())]:
        assert torch.equal(vectors[[0, 2, 4]], table[[0, 9, 1]])
        assert not vectors[[1, 3]].isfinite().any()


# -- the sampler ---------------------------------------------------------------------------------

BAD_LOGITS = {
    "a NaN": {3: math.nan},
    "a NaN in the last part": {9: math.nan},
    "infinity": {2: math.inf},
    "infinity and a NaN": {2: math.inf, 8: math.nan},
    "both infinities": {2: math.inf, 8: -math.inf},
    "nothing but NaN": dict.fromkeys(range(10), math.nan),
    "nothing but -infinity": dict.fromkeys(range(10), -math.inf),
}
FILTERS = {"none": None, "top_k": (3, 1.0, 0.0), "top_p": (10, 0.8, 0.0), "min_p": (10, 1.0, 0.1)}


def logits_with(changes):
    """Three rows of logits, the second of them changed."""
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(1))
    for column, value in changes.items():
        logits[1, column] = value
    return logits


def draw(logits, temperature, limits, ranks):
    one = torch.ones(len(logits), 1)
    top_k, top_p, min_p = limits or (0, 1.0, 0.0)
    asked = SamplingMetadata(
        temperature=one * temperature,
        seeds=(one * 11).long(),
        positions=(one * 3).int(),
        top_k=(one * top_k).int(),
        top_p=one * top_p,
        log_min_p=one * log_of(min_p),
    )
    shard = ranks.shard(10)
    part = logits[:, shard.start : shard.start + shard.count]
    if limits is not None:
        part = ranks.all_gather_columns(part, 10)
    return sample(part, asked, ranks, 10, TORCH_BACKEND, limits is not None).tolist()


@pytest.mark.parametrize("limits", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("changes", BAD_LOGITS.values(), ids=BAD_LOGITS)
@pytest.mark.parametrize("size", [1, 2])
def test_a_row_whose_best_score_is_not_finite_gets_no_id(size, changes, limits):
    for temperature in (0.0, 0.7) if limits is None else (0.7,):
        good = draw(logits_with({}), temperature, limits, Ranks())
        assert min(good) >= 0
        logits = logits_with(changes)
        drawn = on_ranks(size, lambda ranks: draw(logits, temperature, limits, ranks))  # noqa: B023
        assert drawn == [[good[0], -1, good[2]]] * size


def test_logits_of_minus_infinity_are_never_drawn():
    """They say that a token must not come, which is no error."""
    logits = logits_with(dict.fromkeys(range(1, 10), -math.inf))
    for limits in FILTERS.values():
        assert draw(logits, 0.7, limits, Ranks())[1] == 0


class Waits(TorchDispatchMode):
    """Counts the times that the host reads a number from a tensor."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default
        self.count += func in waits
        return func(*args, **kwargs or {})


def test_a_bad_row_is_found_without_waiting_for_the_device():
    for limits in FILTERS.values():
        counts = []
        for changes in ({}, *BAD_LOGITS.values()):
            with Waits() as waits:
                draw(logits_with(changes), 0.7, limits, Ranks())
            counts.append(waits.count)
        assert len(set(counts)) == 1
