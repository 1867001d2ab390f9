"""What lessons 03 to 05 count with: histories, traffic, prompts, and the reference."""

from dataclasses import replace

import pytest
import torch

from course import machine
from course.drawings.schedule_pictures import num_again
from course.labs import paging
from course.labs.cramped import Cramped, cramped_workload
from course.labs.prefixes import admit, converse, num_common, second_requests, services, share_found
from course.labs.reference import (
    ask_and_compare,
    compare_with_transformers,
    keep_logits,
    logits_along,
    num_certain,
)
from course.models.choice import own_model
from course.serving import ask, start_engine
from course.stages import ContiguousCache, PagedStatic, records
from nanovllm.engine.block_manager import BlockManager


def their_logits(model, seq):
    """transformers' logits [answer tokens, vocab_size] before each token of a request's answer."""
    return logits_along(model, seq.token_ids)[seq.num_prompt_tokens - 1 : -1]


def test_both_histories_hold_what_is_live(tiny_model):
    mix = replace(paging.short_answers().first(4), kv_tokens=2 * 192)
    rows = paging.rows_history(ContiguousCache(tiny_model(), device="cpu"), mix)
    blocks, most = paging.blocks_history(PagedStatic(tiny_model(), device="cpu"), mix)
    assert all(0 <= live <= held <= mix.kv_tokens for held, live in [*rows, *blocks])
    assert {held for held, _ in rows} == {2 * mix.max_len}
    assert max(held for held, _ in blocks) < 2 * mix.max_len
    assert 1 <= most <= 4


def test_traffic_never_holds_more_than_there_is():
    manager = BlockManager(64, 4, enable_prefix_caching=False)
    counts = set()
    for running in paging.traffic(manager, 200):
        counts.add(len(running))
        assert all(len(s.block_table) * 4 >= len(s.token_ids) for s in running)
        assert manager.num_free_blocks + sum(len(s.block_table) for s in running) == 64
    assert len(counts) > 3


def test_attention_over_contiguous_keys_is_causal():
    key, value = torch.randn(2, 5, 2, 4).unbind()
    query = torch.randn(3, 4, 4)
    out = paging.contiguous_attention(query, key, value, scale=0.5)
    shorter = paging.contiguous_attention(query[:1], key[:3], value[:3], scale=0.5)
    torch.testing.assert_close(out[:1], shorter)


def test_a_manager_finds_the_whole_blocks_of_a_beginning():
    manager = BlockManager(8, 4)
    assert admit(manager, range(10))[1] == 0
    assert admit(manager, [*range(8), 99])[1] == 8
    assert num_common([[1, 2, 3], [1, 2, 4, 5]]) == 2
    assert num_common([[1, 2], [1, 2, 4]]) == 2


def test_a_cache_that_holds_all_chats_finds_all_but_the_first_round():
    assert share_found(40, chats=2, rounds=4) == 0.75
    assert share_found(39, chats=2, rounds=4) < 0.75


def test_services_differ_in_where_their_prompts_do():
    begins = [num_common([make(), make()]) for make in services().values()]
    assert begins == [640, 630, 0, 0]


def test_a_second_request_computes_what_its_service_changed():
    engines = start_engine(), start_engine(enable_prefix_caching=False)
    second = second_requests(*engines)
    assert [request.computed for request in second] == [32, 48, 672, 672]
    assert {request.computed_without for request in second} == {672}
    assert all(request.ttft > 0 < request.ttft_without for request in second)
    assert "one system prompt     32 computed" in str(second[0])


def test_an_engines_logits_are_the_references_and_a_tie_is_not_certain():
    engine = start_engine()
    kept = keep_logits(engine)
    [seq] = ask(engine, [[5, 6, 7, 8, 9]], count=3)
    theirs = their_logits(own_model(), seq)
    torch.testing.assert_close(torch.cat(kept), theirs, atol=1e-3, rtol=1e-3)
    assert len(logits_along(own_model(), seq.token_ids)) == len(seq.token_ids)
    assert num_certain(torch.tensor([[0.0, 1.0], [0.5, 0.5], [0.0, 1.0]])) == 1
    assert num_certain(torch.tensor([[0.0, 1.0], [3.0, 0.5]])) == 2


def test_an_engine_is_held_to_the_reference_in_one_call_and_left_as_it_was():
    engine = start_engine()
    compute = engine.core.runner.model.compute_logits
    seq, comparison = ask_and_compare(engine, [5, 6, 7, 8, 9], count=3)
    assert (len(seq.output_ids), comparison.rows) == (3, 3)
    assert 0 <= comparison.difference < 1e-3
    assert "3 of 3 greedy tokens" in str(comparison)
    assert engine.core.runner.model.compute_logits == compute


def test_other_logits_and_other_tokens_are_no_agreement():
    prompt, model = [5, 6, 7, 8, 9], own_model()
    engine = start_engine()
    [seq] = ask(engine, [prompt], count=3)
    answer, theirs = seq.output_ids, their_logits(model, seq)
    assert compare_with_transformers(model, prompt, answer, theirs).difference == 0
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        compare_with_transformers(model, prompt, answer, theirs + 0.1)
    last = [*answer[:-1], answer[-1] + 1]  # what comes before it is the same: so are the logits
    with pytest.raises(AssertionError, match="answer token 2 is"):
        compare_with_transformers(model, prompt, last, theirs)


def test_a_ranks_part_of_the_vocabulary_is_held_to_the_same_part():
    engine = start_engine()
    [seq] = ask(engine, [[5, 6, 7, 8, 9]], count=3)
    theirs = their_logits(own_model(), seq)
    half = theirs.shape[1] // 2
    given = own_model(), [5, 6, 7, 8, 9], seq.output_ids
    assert compare_with_transformers(*given, theirs[:, :half]).difference == 0
    with pytest.raises(AssertionError, match="not close"):
        compare_with_transformers(*given, theirs[:, half:])


def test_a_chat_finds_what_was_said():
    first, second = converse(start_engine(), ["fox", "frog"])
    assert first.found == 0
    assert first.tokens < second.found <= second.tokens


def test_small_blocks_have_large_tables_and_large_ones_empty_places():
    config, device = ContiguousCache(own_model(), device="cpu").config, torch.device("cpu")
    small, large = (paging.costs_of(size, config, device) for size in (1, 256))
    assert (small.table_bytes, large.table_bytes) == (4 * 8192, 4 * 32)
    assert small.empty_bytes == 0 < large.empty_bytes
    assert len(str(large)) == len(paging.HEADING)


def test_the_cramped_run_cuts_preempts_and_gives_all_back(tiny_model):
    stage, mix = Cramped(tiny_model(), device="cpu"), cramped_workload()
    mix = replace(mix, prompts=[[t % 64 for t in p] for p in mix.prompts])
    stage.run(mix)
    steps = [record.rows for record in stage.trace]
    assert num_again(steps) > 0
    assert stage.leaked == 0
    assert any(start > 0 and count > 1 for step in steps for _, start, count in step)


def test_a_stage_with_a_record_is_not_run_again(tiny_model, tmp_path, monkeypatch):
    stage, own = PagedStatic(tiny_model(), device="cpu"), tmp_path / "stages.json"
    mix = paging.short_answers().first(2)
    first = records.measured(stage, mix, own, shipped=tmp_path)
    assert str(first).startswith("03 paged, static batch: ")
    monkeypatch.setattr(PagedStatic, "run", None)
    assert records.measured(stage, mix, own, shipped=tmp_path) == first
    monkeypatch.setattr(machine, "describe", lambda device: "another")
    with pytest.raises(TypeError):
        records.measured(stage, mix, own, shipped=tmp_path)
