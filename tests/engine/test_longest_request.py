"""What is sized by the longest request follows the cache, and not the config's positions."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanovllm import LLM, SamplingParams
from nanovllm.engine import memory
from nanovllm.layers import attention

MILLION = 1_000_000
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


def make(folder, **options):
    return LLM(str(folder), device="cpu", use_tqdm_on_load=False, **options)


class Largest(TorchDispatchMode):
    """The most bytes of a tensor that was made meanwhile."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if isinstance(out, torch.Tensor):
            self.bytes = max(self.bytes, out.untyped_storage().nbytes())
        return out


def sizes(llm):
    runner = llm.llm_engine.core.runner
    return len(runner.model.rope), runner.input_batch.block_tables.shape[1]


@pytest.mark.parametrize("chunked", [True, False])
def test_with_a_given_number_of_blocks(tiny_model, chunked):
    """All that starting makes is as large for a million positions as for 512."""
    options = {"num_gpu_blocks_override": 12, "enable_chunked_prefill": chunked}
    largest = []
    for positions in (512, MILLION):
        folder = tiny_model(max_positions=positions)
        with Largest() as seen, make(folder, **options) as llm:
            assert llm.llm_engine.max_model_len == 12 * 16
            assert sizes(llm) == (12 * 16, 12)
        largest.append(seen.bytes)
    assert largest[0] == largest[1]


def test_with_the_cache_that_memory_allows(tiny_model, monkeypatch):
    monkeypatch.setattr(memory, "CPU_CACHE_BYTES", 2**20)
    with make(tiny_model(max_positions=MILLION)) as llm:
        tokens = 2**20 // (2 * 2 * 2 * 16 * 4)  # layers, K and V, KV heads, head size, bytes
        assert llm.llm_engine.max_model_len == tokens == 2048
        assert llm.llm_engine.block_manager.num_blocks == tokens // 16
        assert sizes(llm) == (tokens, tokens // 16)


def test_where_the_config_has_fewer_positions_it_decides(tiny_model):
    with make(tiny_model(max_positions=100)) as llm:
        assert llm.llm_engine.max_model_len == 100
        assert sizes(llm)[0] == 100


def test_the_longest_request_has_the_tokens_of_a_larger_engine(tiny_model):
    folder = tiny_model(max_positions=MILLION)
    prompt = [i % 250 for i in range(180)]
    with make(folder, num_gpu_blocks_override=12) as llm:
        (output,) = llm.generate([prompt], GREEDY, use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 12 * 16 - 180
    with make(folder, max_model_len=400) as llm:
        count = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=12)
        (larger,) = llm.generate([prompt], count, use_tqdm=False)
    assert output.outputs[0].token_ids == larger.outputs[0].token_ids


def test_a_length_that_does_not_fit_is_refused_by_name(tiny_model):
    with pytest.raises(ValueError, match=r"max_model_len=500 does not fit in the KV cache of 192"):
        make(tiny_model(max_positions=MILLION), num_gpu_blocks_override=12, max_model_len=500)


def test_a_gpu_counts_what_it_may_take_for_everything(tiny_model, monkeypatch):
    from dataclasses import replace

    from nanovllm import EngineArgs
    from nanovllm.checkpoint.config_json import read_model_config
    from nanovllm.distributed.ranks import Ranks

    config = read_model_config(tiny_model())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 512 * 16 * 1000))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    args = EngineArgs("-", device="cuda", gpu_memory_utilization=0.5)
    assert memory.max_num_blocks(config, args, Ranks()) == 500
    assert (
        memory.max_num_blocks(config, args, Ranks(1, 2)) == 500
    )  # half the GPU, half the KV heads
    assert memory.max_num_blocks(replace(config, num_hidden_layers=2000), args, Ranks()) == 1


@pytest.mark.parametrize(("num_seqs", "length"), [(3, 128), (40, 128), (3, 3000), (1, 3000)])
def test_a_profile_run_copies_as_many_keys_as_any_step_will(tiny_model, num_seqs, length):
    """In torch, decode gathers MAX_GATHERED_SLOTS or the longest row, prefill the longest row."""
    folder = tiny_model(max_positions=4096)
    options = {"max_num_seqs": num_seqs, "max_model_len": length, "max_num_batched_tokens": 64}
    with make(folder, **options) as llm, pytest.MonkeyPatch.context() as patch:
        runner, gathered, read = llm.llm_engine.core.runner, [], []
        plain, part = attention.gather_kv, attention.prefill_chunk
        patch.setattr(
            attention, "gather_kv", lambda *args: gathered.append(args[2].numel()) or plain(*args)
        )
        patch.setattr(attention, "prefill_chunk", lambda *a: read.append(a[4]) or part(*a))
        memory.profile_run(runner, 64)
    most = attention.MAX_GATHERED_SLOTS["cpu"]
    worst = max(length, min(most, num_seqs * length))
    assert 0.95 * worst <= max(gathered) <= worst
    assert max(read) == length, "a chunk at the end of the longest prompt"
