"""The engine on an NVIDIA GPU: what the CPU says, the GPU says too. `make test-gpu` runs this."""

import gc

import pytest
import torch
from reference import assert_same_greedy, greedy_reference

from nanovllm import LLM, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8] * 5, [9], [*range(40)], [*range(40), 1]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)


def make(folder, **options):
    defaults = {"max_model_len": 128, "use_tqdm_on_load": False, "dtype": "float32"}
    return LLM(str(folder), **defaults | options)


def answer(llm, params=GREEDY):
    return [o.outputs[0].token_ids for o in llm.generate(PROMPTS, params, use_tqdm=False)]


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"async_scheduling": False},
        {"max_num_batched_tokens": 13, "num_gpu_blocks_override": 12},
    ],
    ids=["overlap", "plain", "chunks and preemption"],
)
def test_greedy_tokens_are_transformers(tiny_model, family, options):
    folder = tiny_model(family=family)
    with make(folder, **options) as llm:
        assert llm.llm_engine.device.type == "cuda"
        assert_same_greedy(answer(llm), greedy_reference(folder, PROMPTS, 32))


def test_draws_are_the_cpus(tiny_model):
    """The noise is the same integers on both; rounding may part them where two scores are close."""
    params = SamplingParams(temperature=0.8, top_k=50, seed=7, max_tokens=32, ignore_eos=True)
    folder = tiny_model()
    with make(folder) as gpu, make(folder, device="cpu") as cpu:
        same = [a == b for a, b in zip(answer(gpu, params), answer(cpu, params), strict=True)]
    assert sum(same) >= len(PROMPTS) - 1


def test_memory_comes_back(tiny_model):
    folder = tiny_model()
    with make(folder) as llm:  # what a first engine leaves is CUDA's own
        answer(llm)
    del llm
    gc.collect()
    before = torch.cuda.memory_allocated()
    llm = make(folder)
    answer(llm)
    assert torch.cuda.memory_allocated() > before
    llm.close()
    gc.collect()
    assert torch.cuda.memory_allocated() == before


def test_memory_stays_within_its_share(tiny_model):
    with make(
        tiny_model(), gpu_memory_utilization=0.5, max_num_seqs=4096, max_model_len=512
    ) as llm:
        answer(llm)
        free, total = torch.cuda.mem_get_info()
        assert total - free <= 0.5 * total
