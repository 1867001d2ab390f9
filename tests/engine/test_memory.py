"""What an engine does on a GPU before its first step, in order: size the cache, then capture.

There is no GPU here. The engine runs on a CPU whose device says that it is a GPU, and `torch.cuda`
records what it is called for.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from nanovllm import EngineArgs, LLMEngine
from nanovllm.engine import (
    adjustments,
    input_batch,
    llm_engine,
    memory,
    model_runner,
    prompt_logprobs,
)
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.layers.backend import TORCH_BACKEND

TOTAL, FREE, RESERVED = 500 * 2**20, 400 * 2**20, 2**20
BLOCK_BYTES = 2 * 2 * 8 * 2 * 16 * 4  # layers, K and V, tokens, KV heads, head size, bytes


class FakeGraph:
    def replay(self) -> None:
        raise AssertionError("a graph is replayed before the first step")


def fake_cuda(log, monkeypatch):
    """Let the functions of torch.cuda that a start calls log their names, and answer."""
    answers = {
        "memory_reserved": iter(range(RESERVED, 100 * RESERVED, RESERVED)).__next__,
        "mem_get_info": lambda: (FREE, TOTAL),
        "empty_cache": lambda: None,
        "synchronize": lambda: None,
        "graph_pool_handle": lambda: "pool",
    }

    def logged(name, answer):
        return lambda *args: log.append(name) or answer()

    @contextmanager
    def capture(graph, **options) -> Iterator[None]:
        assert options == {"pool": "pool", "capture_error_mode": "thread_local"}
        log.append("capture {")
        yield
        log.append("}")

    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, logged(name, answer))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(memory, "gc", SimpleNamespace(collect=logged("collect", gc.collect)))


def fake_gpu_runner(log):
    """Return a ModelRunner class that logs its steps, and says that its device is a GPU."""

    class FakeGpuRunner(ModelRunner):
        def __init__(self, *args):
            super().__init__(*args)
            self.device = self.graph_runner.device = SimpleNamespace(type="cuda", index=None)

        def decode_step(self, size, whole_rows):
            log.append(f"decode {size}")
            return super().decode_step(size, whole_rows)

        def mixed_step(self, batch, *args):
            log.append(f"mixed {sum(row.num_tokens for row in batch)}")
            return super().mixed_step(batch, *args)

    return FakeGpuRunner


@pytest.fixture
def start(monkeypatch, tiny_model):
    """start(**options) makes an engine on the fake GPU. Returns it, and the log of its start."""
    log: list[str] = []
    make_kv_cache = memory.make_kv_cache

    def logged_cache(config, args, ranks, num_blocks):
        log.append(f"cache of {num_blocks}")
        return make_kv_cache(config, args, ranks, num_blocks)

    fake_cuda(log, monkeypatch)
    monkeypatch.setattr(memory, "make_kv_cache", logged_cache)
    monkeypatch.setattr(memory, "ModelRunner", fake_gpu_runner(log))
    for module in (adjustments, input_batch, model_runner, prompt_logprobs):
        monkeypatch.setattr(module, "upload", lambda values, device: torch.as_tensor(values))
    backend = replace(TORCH_BACKEND, capturable=True)
    monkeypatch.setattr(llm_engine, "choose_backend", lambda *args: backend)

    def make(**options):
        sizes = {"block_size": 8, "max_num_seqs": 6, "max_model_len": 96}
        sizes |= {"max_num_batched_tokens": 128, "use_tqdm_on_load": False}
        return LLMEngine(EngineArgs(str(tiny_model()), device="cpu", **sizes | options)), log

    return make


CAPTURES = [
    entry
    for size in (6, 4, 2, 1)
    for entry in (f"decode {size}", "synchronize", "capture {", f"decode {size}", "}")
]


def test_the_cache_takes_what_the_largest_graph_and_step_leave(start):
    engine, log = start()
    reserved = 3 * RESERVED  # the third answer
    context = TOTAL - FREE - reserved
    graphs = RESERVED + memory.GRAPH_OVERHEAD_BYTES  # the second answer less the first
    num_blocks = (int(0.9 * TOTAL) - context - reserved - graphs) // BLOCK_BYTES
    assert log == [
        "cache of 1",
        # the largest graph, which is dropped
        "memory_reserved", "graph_pool_handle", *CAPTURES[:5], "memory_reserved",
        "collect", "empty_cache",
        # the largest steps, whose memory torch keeps
        "decode 6", "mixed 129",
        "mem_get_info", "memory_reserved", "mem_get_info",
        # the cache, and all graphs in one pool
        f"cache of {num_blocks}", "graph_pool_handle", *CAPTURES,
    ]  # fmt: skip
    runner = engine.core.runner
    assert runner.num_blocks == engine.block_manager.num_blocks == num_blocks
    assert list(runner.graph_runner.graphs) == [(6, True), (4, True), (2, True), (1, True)]


def test_a_given_number_of_blocks_is_not_measured(start):
    """The steps run all the same, with the 96 tokens that fit, so that kernels are compiled."""
    _, log = start(num_gpu_blocks_override=12, max_num_batched_tokens=200)
    assert log == [
        "cache of 1", "decode 6", "mixed 97",
        "cache of 12", "graph_pool_handle", *CAPTURES,
    ]  # fmt: skip


def test_an_eager_engine_captures_nothing(start):
    engine, log = start(enforce_eager=True)
    assert not [entry for entry in log if "capture" in entry or "graph" in entry]
    assert log.index("mixed 129") < log.index(f"cache of {engine.core.runner.num_blocks}")
    assert not engine.core.runner.graph_runner.graphs
