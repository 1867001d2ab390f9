"""Two ranks wait longer than any step may take, and then still answer. In a file of its own: it
sleeps, and meanwhile the other tests run."""

import time
from datetime import timedelta

from nanovllm import LLM, SamplingParams
from nanovllm.distributed import monitor

STEP_TIMEOUT, IDLE = 20, 30  # seconds


def test_two_ranks_idle_then_answer(tiny_model, monkeypatch):
    monkeypatch.setattr(monitor, "STEP_TIMEOUT", timedelta(seconds=STEP_TIMEOUT))
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    folder = str(tiny_model(family="qwen3"))
    with LLM(folder, tensor_parallel_size=2, max_model_len=128, use_tqdm_on_load=False) as llm:
        first = llm.generate([1, 2, 3], params, use_tqdm=False)
        time.sleep(IDLE)
        second = llm.generate([1, 2, 3], params, use_tqdm=False)
    assert first[0].outputs[0].token_ids == second[0].outputs[0].token_ids
