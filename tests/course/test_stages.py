"""The ladder's stages: each gives the same tokens, its exact count of them, and honest numbers."""

from dataclasses import replace

import pytest
import torch
from reference import assert_same_greedy, greedy_reference

from course.lessons import FILES_OF_LESSON
from course.measure.ladder_workload import LadderWorkload, ladder_workload
from course.stages import STAGES, ContiguousCache, PagedStatic, Recompute, compare
from course.stages.common import Stage
from nanovllm.layers.backend import TORCH_BACKEND

VOCAB = 290  # of the tiny model's 300, without those that end a text
TOKEN_BYTES = 2 * 2 * 2 * 16 * 4  # layers, keys and values, KV heads, head_dim, float32


@pytest.fixture(scope="module")
def workload():
    return ladder_workload(VOCAB, "cpu").first(6)


@pytest.fixture(scope="module")
def recomputed(tiny_model, workload):
    return Recompute(tiny_model(), "cpu").run(workload)


def few(workload, kv_tokens, num_outputs=(20, 20, 20, 20)):
    return replace(workload.first(4), num_outputs=list(num_outputs), kv_tokens=kv_tokens)


def test_recompute_is_what_transformers_says(tiny_model, workload, recomputed):
    references = [
        greedy_reference(tiny_model(), [prompt], count)[0]
        for prompt, count in zip(workload.prompts, workload.num_outputs, strict=True)
    ]
    assert_same_greedy(recomputed.token_ids, references)
    assert len({token for ids in recomputed.token_ids for token in ids}) > 20


@pytest.mark.parametrize("number", [n for n, stage in STAGES.items() if n > 1 and not stage.needs])
def test_every_stage_says_the_same(tiny_model, workload, recomputed, number):
    result = STAGES[number](tiny_model(), "cpu").run(workload)
    assert list(map(len, result.token_ids)) == workload.num_outputs
    assert compare(result, recomputed).compared > 0.75 * workload.num_output_tokens


def test_a_wrong_token_is_found_and_a_near_tie_is_not_blamed(recomputed):
    wrong = [[*ids] for ids in recomputed.token_ids]
    wrong[2][3] += 1
    with pytest.raises(AssertionError, match="request 2, token 3: stage 01 says"):
        compare(replace(recomputed, token_ids=wrong), recomputed)
    gaps = [[*gaps] for gaps in recomputed.gaps]
    gaps[2][3] = 1e-6
    tied = replace(recomputed, gaps=gaps)
    agreement = compare(replace(recomputed, token_ids=wrong), tied)
    assert agreement.ties == compare(recomputed, recomputed).ties + 1
    with pytest.raises(ValueError, match="kept no gaps"):
        compare(recomputed, replace(recomputed, gaps=[]))


def test_a_reference_may_have_served_only_the_first_requests(tiny_model, workload, recomputed):
    stage = Recompute(tiny_model(), "cpu")
    assert stage.part_of(workload) == workload
    stage.device = torch.device("cuda")  # where all requests, one at a time, take minutes
    full = ladder_workload(VOCAB, "cuda")
    assert stage.part_of(full) == full.first(4)
    two = replace(recomputed, workload=workload.first(2), token_ids=recomputed.token_ids[:2])
    wrong = [[*ids] for ids in recomputed.token_ids]
    assert compare(recomputed, two).total == two.num_tokens
    wrong[1][3] += 1
    with pytest.raises(AssertionError, match="request 1, token 3"):
        compare(replace(recomputed, token_ids=wrong), two)
    other = replace(workload, prompts=workload.prompts[::-1])
    with pytest.raises(ValueError, match="the same prompts"):
        compare(replace(recomputed, workload=other), two)


def test_a_contiguous_cache_reserves_the_longest_place_for_each(tiny_model, workload):
    two_at_once = few(workload, kv_tokens=2 * 100 + 50, num_outputs=(5, 20, 5, 20))
    assert two_at_once.max_len <= 100
    result = ContiguousCache(tiny_model(), "cpu").run(two_at_once)
    assert result.kv_reserved_bytes == 2 * two_at_once.max_len * TOKEN_BYTES
    pairs = [two_at_once.prompts[:2], two_at_once.prompts[2:]]
    live = max(sum(len(prompt) + 4 for prompt in pair) for pair in pairs)  # then one is done
    assert result.kv_live_bytes == live * TOKEN_BYTES


def test_recompute_keeps_nothing(recomputed):
    assert recomputed.kv_reserved_bytes == recomputed.kv_live_bytes == 0
    assert recomputed.peak_memory_bytes > 2**20


def test_a_shared_prefix_is_held_once(tiny_model, workload):
    roomy = few(workload, kv_tokens=1024)
    apart, together = (STAGES[n](tiny_model(), "cpu").run(roomy) for n in (3, 4))
    assert apart.kv_reserved_bytes == together.kv_reserved_bytes == 1024 * TOKEN_BYTES
    saved = 3 * 64 * TOKEN_BYTES  # four requests, 64 shared tokens in whole blocks
    assert apart.kv_live_bytes - together.kv_live_bytes == saved


@pytest.mark.parametrize("stage", [ContiguousCache, PagedStatic])
def test_a_static_batch_lets_nobody_in_until_its_last_row_is_done(tiny_model, workload, stage):
    outputs = (5, 20, 5, 5)
    result = stage(tiny_model(), "cpu").run(few(workload, 2 * 112, outputs))
    ends = [
        first + each * (count - 1)
        for first, each, count in zip(result.ttft, result.tpot, outputs, strict=True)
    ]
    assert result.ttft[1] < ends[0], "the first two run together"
    assert min(result.ttft[2:]) >= ends[1] - 1e-6


def test_continuous_batching_lets_the_next_one_in_at_once(tiny_model, workload):
    result = STAGES[5](tiny_model(), "cpu").run(few(workload, 128, (5, 40, 5, 5)))
    assert result.ttft[2] > result.ttft[1], "two fill the room"
    assert max(result.ttft[2:]) < result.ttft[1] + 39 * result.tpot[1]


def test_a_stage_that_loses_a_token_is_found_out(tiny_model, workload):
    class Forgetful(Recompute):
        def serve(self, workload, recorder):
            super().serve(workload, recorder)
            recorder.token_ids[1].pop()

    with pytest.raises(RuntimeError, match="request 1, was to get 20 and got 19"):
        Forgetful(tiny_model(), "cpu").run(few(workload, 1024))


def test_a_stage_for_a_gpu_says_so(tiny_model):
    with pytest.raises(ValueError, match=r"stage 06 .* needs an NVIDIA GPU"):
        STAGES[6](tiny_model(), "cpu")


def test_the_table_is_in_the_order_of_the_lessons():
    assert list(STAGES) == list(range(1, 9))
    for number, stage in STAGES.items():
        assert issubclass(stage, Stage)
        assert stage.lesson in FILES_OF_LESSON
        assert int(stage.lesson[:2]) == number


def test_stage_02_reads_its_cache_without_a_table():
    assert ContiguousCache.backend.decode_attention is not TORCH_BACKEND.decode_attention


def test_the_full_workload_is_that_of_the_course():
    full = ladder_workload(151_936, "cuda")
    assert len(full.prompts) == len(full.num_outputs) == 64
    shared = full.prompts[0][:256]
    assert all(prompt[:256] == shared for prompt in full.prompts)
    assert len({tuple(prompt[256:]) for prompt in full.prompts}) == 64
    assert all(16 <= n <= 256 for n in full.num_outputs)
    assert full.kv_tokens == 16 * (256 + 64 + 256) >= 16 * full.max_len  # a quarter of the requests
    assert full == ladder_workload(151_936, "cuda")
    assert full != ladder_workload(151_936, "cuda", seed=1)


def test_the_cpu_workload_is_smaller_and_warm_up_shares_nothing_with_it():
    small = ladder_workload(VOCAB, "cpu")
    assert len(small.prompts) == 16
    assert small.shared_prefix == 64
    warm = small.warm_up(VOCAB)
    assert isinstance(warm, LadderWorkload)
    assert all(a != b for a, b in zip(warm.prompts[0], small.prompts[0], strict=True))
    assert max(map(max, warm.prompts)) < VOCAB
