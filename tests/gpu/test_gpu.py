"""The engine on an NVIDIA GPU: what the CPU says, the GPU says too. `make test-gpu` runs this."""

import gc
import json
import subprocess
import sys
import threading
import time

import pytest
import torch
from reference import assert_same_greedy, greedy_reference
from tiny_models import write_overflowing

from course import machine
from nanovllm import LLM, SamplingParams

pytest.importorskip("triton", reason="Triton has no build for this system")

from triton.runtime.jit import JITFunction

from nanovllm.engine.memory import profile_run
from nanovllm.kernels import (
    decode_attention,
    decode_plan,
    filters,
    linear,
    prefill_attention,
    sampling,
    store,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8] * 5, [9], [*range(40)], [*range(40), 1]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)


def make(folder, **options):
    defaults = {"max_model_len": 128, "use_tqdm_on_load": False, "dtype": "float32"}
    defaults |= {"max_num_seqs": 16, "gpu_memory_utilization": 0.1}
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
        {"enforce_eager": True},
        {"attention_backend": "torch", "max_model_len": 101},
        {"max_num_seqs": 3, "max_model_len": 101},
        {"block_size": 1},
    ],
    ids=[
        "overlap",
        "plain",
        "chunks and preemption",
        "eager",
        "torch",
        "three rows",
        "blocks of 1",
    ],
)
def test_greedy_tokens_are_transformers(tiny_model, family, options):
    folder = tiny_model(family=family)
    with make(folder, **options) as llm:
        assert llm.llm_engine.device.type == "cuda"
        assert_same_greedy(answer(llm), greedy_reference(folder, PROMPTS, 32))


def test_two_ranks_share_one_gpu(tiny_model):
    """Without a GPU each, ranks compute eagerly and reduce over gloo; each has half the memory."""
    folder = tiny_model()
    with make(folder, tensor_parallel_size=2) as llm:
        assert llm.llm_engine.device == torch.device("cuda", 0)
        assert_same_greedy(answer(llm), greedy_reference(folder, PROMPTS, 32))
        params = SamplingParams(temperature=0.9, seed=3, max_tokens=20, ignore_eos=True)
        sampled = answer(llm, params)
    with make(folder) as llm:
        same = [a == b for a, b in zip(answer(llm, params), sampled, strict=True)]
    assert sum(same) >= len(PROMPTS) - 1


def test_torch_compile_changes_no_tokens(tiny_model):
    folder = tiny_model()
    with make(folder, enable_torch_compile=True) as llm:
        assert llm.llm_engine.core.runner.graph_runner.graphs
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
    with make(tiny_model(), gpu_memory_utilization=0.4):
        pass  # what it leaves in torch's allocator is not taken for another engine's
    with make(
        tiny_model(), gpu_memory_utilization=0.5, max_num_seqs=4096, max_model_len=512
    ) as llm:
        answer(llm)
        free, total = torch.cuda.mem_get_info()
        assert total - free <= 0.5 * total


@pytest.mark.parametrize("blocks", [None, 40])
def test_no_request_waits_for_a_kernel_to_be_compiled(tiny_model, blocks):
    """The start compiles all, also where the cache's size is given and need not be found out."""
    modules = (store, decode_plan, decode_attention, prefill_attention, linear)
    modules += (filters, sampling)
    members = [value for module in modules for value in vars(module).values()]
    jitted = [kernel for kernel in members if isinstance(kernel, JITFunction)]

    def compiled():
        return sum(len(cache[0]) for kernel in jitted for cache in kernel.device_caches.values())

    for kernel in jitted:
        kernel.device_caches.clear()  # what other tests have compiled
    with make(tiny_model(), num_gpu_blocks_override=blocks, dtype="bfloat16") as llm:
        at_start = compiled()
        answer(llm)
        answer(llm, SamplingParams(temperature=0.8, top_k=20, max_tokens=32, ignore_eos=True))
        answer(llm, adjusted_params(0.8))
        assert compiled() == at_start > 0


ADJUSTED = [
    {},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.7},
    {"logit_bias": {7: 3.5, 220: -100.0}, "top_k": 20},
    {"allowed_token_ids": [*range(0, 300, 7)], "min_tokens": 9, "stop_token_ids": [14, 21, 28]},
    {"bad_words": ["the", "ab", "the next"], "repetition_penalty": 0.9, "top_p": 0.9},
]


def adjusted_params(temperature):
    options = {"temperature": temperature, "max_tokens": 32}
    return [SamplingParams(seed=i, **options, **extra) for i, extra in enumerate(ADJUSTED)]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"async_scheduling": False},
        {"max_num_batched_tokens": 13, "num_gpu_blocks_override": 12},
        {"attention_backend": "torch"},
        {"enforce_eager": True},
    ],
    ids=["captured", "plain", "chunks and preemption", "torch", "eager"],
)
def test_adjusted_draws_are_the_cpus(tiny_model, options, temperature):
    """Penalties, biases and forbidden tokens; rounding may part them where scores are close."""
    folder, params = tiny_model(), adjusted_params(temperature)
    with make(folder, **options) as gpu, make(folder, device="cpu") as cpu:
        found = [answer(llm, params) for llm in (gpu, cpu)]
        again = answer(gpu, params)
    assert again == found[0] or "num_gpu_blocks_override" in options
    assert sum(a == b for a, b in zip(*found, strict=True)) >= len(PROMPTS) - 1


def test_captured_graphs_survive_the_growth_of_the_tables(tiny_model):
    """The tables are made after the capture, and move when they grow, while requests run."""
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True,
                            repetition_penalty=1.2, logit_bias={5: 1.0})  # fmt: skip
    with make(tiny_model(), max_num_seqs=40) as llm:
        engine = llm.llm_engine
        runner = engine.core.runner
        tables, graphs = runner.input_batch.adjustment_tables, dict(runner.graph_runner.graphs)
        assert graphs
        wanted = llm.generate([[1, 2, 3]], params, use_tqdm=False)[0].outputs[0].token_ids
        sizes = {len(tables.tokens.values)}
        engine.add_request("first", [1, 2, 3], params)
        first = engine.sequences["first"]
        for i in range(39):
            engine.step()
            engine.add_request(str(i), [i, 4], params)
            sizes.add(len(tables.tokens.values))
        while engine.has_unfinished_requests():
            engine.step()
        assert sizes == {16, 32, 64}
        assert len(tables.biases.values) == 64
        assert runner.graph_runner.graphs == graphs
        same = [a == b for a, b in zip(first.output_ids, wanted, strict=True)]
        assert all(same[:16]), (
            "rounding may part them later, as batches of other sizes round otherwise"
        )


@pytest.mark.parametrize("num_rows", [1, 3, 9, 13])
def test_every_batch_size_has_a_graph(tiny_model, num_rows):
    """Captured sizes are 1, 2, 4, 8 and 13: the rows beyond the batch change nothing."""
    folder, prompts = tiny_model(), [[7, i, 2] for i in range(num_rows)]
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    with make(folder, max_num_seqs=13) as llm:
        sizes = sorted(size for size, _ in llm.llm_engine.core.runner.graph_runner.graphs)
        assert sizes == [1, 2, 4, 8, 13]
        found = [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]
    assert_same_greedy(found, greedy_reference(folder, prompts, 24))


def test_filters_stay_in_the_captured_step(tiny_model):
    """Once the engine has started, no decode step runs outside a graph, whatever the mix."""
    filters = [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.8}]
    params = [SamplingParams(max_tokens=9, ignore_eos=True, seed=1, **f) for f in filters]
    prompts = [[i, 3, 5] for i in range(len(params))]
    folder = tiny_model()
    with make(folder, device="cpu") as llm:
        wanted = [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]
    with make(folder, dtype="float32", max_num_seqs=8) as llm:
        llm.llm_engine.core.runner.decode_step = lambda *_: pytest.fail("a step was not captured")
        found = [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]
    agree = sum(a == b for a, b in zip(found, wanted, strict=True))
    assert agree >= len(params) - 1, "at most one near tie is decided by rounding"


def test_nothing_is_captured_when_eager(tiny_model):
    with make(tiny_model(), enforce_eager=True) as llm:
        assert not llm.llm_engine.core.runner.graph_runner.graphs


def test_rows_that_come_and_go_keep_their_own_tokens(tiny_model):
    """Requests of many lengths, filters among them, each as it is when alone."""
    folder = tiny_model()
    prompts = [[i % 50, 3, i % 7, *range(i % 30)] for i in range(40)]
    params = [
        SamplingParams(
            temperature=(i % 3) * 0.5,
            top_k=20 if i % 4 == 0 else 0,
            seed=i,
            max_tokens=1 + i % 37,
            ignore_eos=True,
        )
        for i in range(40)
    ]
    with make(folder, max_num_seqs=12, num_gpu_blocks_override=40) as llm:
        together = llm.generate(prompts, params, use_tqdm=False)
        alone = [
            llm.generate(p, q, use_tqdm=False)[0] for p, q in zip(prompts, params, strict=True)
        ]
    same = [
        a.outputs[0].token_ids == b.outputs[0].token_ids
        for a, b in zip(together, alone, strict=True)
    ]
    assert sum(same) >= 38, "rounding may part two of them, where scores are close"


def test_a_shared_prefix_changes_nothing(tiny_model):
    """Rows that begin alike are read together, from the cache's blocks."""
    folder, common = tiny_model(), [*range(50), *range(30)]
    prompts = [[*common, i, *range(i)] for i in range(11)]
    with make(folder) as llm:
        llm.generate([common], GREEDY, use_tqdm=False)
        found = [o.outputs[0].token_ids for o in llm.generate(prompts, GREEDY, use_tqdm=False)]
    assert_same_greedy(found, greedy_reference(folder, prompts, 32))


def test_bfloat16_strays_no_further_than_torch(tiny_model):
    """Logits of the fast path and of plain torch, both in bfloat16, beside float32's."""
    folder, logits = tiny_model(), {}
    for name, options in {
        "exact": {"attention_backend": "torch"},
        "torch": {"attention_backend": "torch", "dtype": "bfloat16"},
        "triton": {"attention_backend": "triton", "dtype": "bfloat16"},
    }.items():
        with make(folder, enforce_eager=True, **options) as llm:
            model, rows = llm.llm_engine.core.runner.model, []
            plain = model.compute_logits
            model.compute_logits = lambda hidden, plain=plain, rows=rows: (
                rows.append(plain(hidden)) or rows[-1]
            )
            llm.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=1), use_tqdm=False)
            logits[name] = rows[0].float()
    torch_error, our_error = ((logits[n] - logits["exact"]).norm() for n in ("torch", "triton"))
    assert our_error <= 1.25 * torch_error


def test_bfloat16_tokens_agree_as_often_as_two_eager_backends(tiny_model):
    """Rounding parts greedy tokens; captured graphs part them no more than a change of backend."""
    folder, tokens = tiny_model(), {}
    prompts = [[i, 3 * i % 97, i % 5, *range(i)] for i in range(1, 33)]
    params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
    for name, options in {
        "torch": {"attention_backend": "torch", "enforce_eager": True},
        "eager": {"attention_backend": "triton", "enforce_eager": True},
        "captured": {"attention_backend": "triton"},
    }.items():
        with make(folder, dtype="bfloat16", max_num_seqs=32, **options) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        tokens[name] = [output.outputs[0].token_ids for output in outputs]

    def agreement(a, b):
        return sum(x == y for x, y in zip(tokens[a], tokens[b], strict=True)) / len(prompts)

    assert agreement("captured", "torch") >= agreement("eager", "torch") - 0.1
    assert agreement("captured", "eager") >= agreement("eager", "torch")


def test_a_failed_step_is_survived(tiny_model):
    folder = tiny_model()
    with make(folder) as llm:
        graph_runner = llm.llm_engine.core.runner.graph_runner
        plain, graph_runner.replay = graph_runner.replay, lambda *_: 1 / 0
        with pytest.raises(ZeroDivisionError):
            answer(llm)
        graph_runner.replay = plain
        assert_same_greedy(answer(llm), greedy_reference(folder, PROMPTS, 32))


# -- numbers that are not finite, and lengths ------------------------------------------------------

BAD, GOOD = [7] * 40, [20, 21, 22, 23, 24]
ALIKE = [*range(30, 62)]  # two blocks, which the bad request stores and a good one shares
SAMPLINGS = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8, "seed": 5},
    "filtered": {"temperature": 0.8, "seed": 5, "top_k": 20, "top_p": 0.9},
}


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory):
    return write_overflowing(tmp_path_factory.mktemp("overflows"))


def completions(llm, prompts, name):
    params = SamplingParams(max_tokens=12, ignore_eos=True, **SAMPLINGS[name])
    return [o.outputs[0] for o in llm.generate(prompts, params, use_tqdm=False)]


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize(
    "options",
    [
        {"attention_backend": "triton"},
        {"attention_backend": "triton", "async_scheduling": False},
        {"attention_backend": "triton", "enforce_eager": True},
        {"attention_backend": "torch"},
        {"attention_backend": "triton", "tensor_parallel_size": 2},
    ],
    ids=["captured", "plain", "eager", "torch", "two ranks"],
)
def test_a_request_whose_numbers_overflow_ends_alone(overflowing, options, name):
    """Others are in its batch, share its beginning, or get its blocks later.

    What NaN reached would end with an error. Rounding may part a row's tokens from those it has
    alone, since batches of other sizes round otherwise.
    """
    options = {"dtype": "float16", "num_gpu_blocks_override": 20, **options}
    prompts = [BAD, GOOD, [*ALIKE, *BAD], [*ALIKE, *GOOD], GOOD]
    with make(overflowing, **options) as llm:
        good, alike = (completions(llm, [p], name)[0].token_ids for p in (GOOD, [*ALIKE, *GOOD]))
    with make(overflowing, **options) as llm:
        for _ in range(2):  # all at once, then in blocks that hold NaN
            found = completions(llm, prompts, name)
            reasons = [output.finish_reason for output in found]
            assert reasons == ["error", "length", "error", "length", "length"]
            assert found[0].token_ids == found[2].token_ids == []
            assert "not finite" in found[0].error
            expected = zip(
                (found[i].token_ids for i in (1, 3, 4)), (good, alike, good), strict=True
            )
            assert sum(a == b for a, b in expected) >= 2
        blocks = llm.llm_engine.block_manager
        assert blocks.num_free_blocks == blocks.num_blocks


def test_tables_follow_the_cache_and_not_the_configs_positions(tiny_model):
    folder = tiny_model(max_positions=1_000_000)
    options = {"max_model_len": None, "num_gpu_blocks_override": 40}
    with make(folder, **options) as llm:
        runner = llm.llm_engine.core.runner
        assert runner.graph_runner.graphs
        assert len(runner.model.rope) == llm.llm_engine.max_model_len == 40 * 16
        assert runner.input_batch.block_tables.shape[1] == 40
        assert_same_greedy(answer(llm), greedy_reference(folder, PROMPTS, 32))


def test_attention_in_torch_takes_no_more_than_the_profile_run(tiny_model):
    """Long rows beside many short ones, chunks at the end of long prompts, and all rows long."""
    options = {"attention_backend": "torch", "max_model_len": 8192, "max_num_seqs": 64}
    folder = tiny_model(max_positions=8192)
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    with make(folder, max_num_batched_tokens=2048, **options) as llm:

        def peak(function, *args, **kwargs):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            function(*args, **kwargs)
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before

        profiled = peak(profile_run, llm.llm_engine.core.runner, 2048)
        long = [[i, *range(250)] * 32 for i in range(32)]
        short = [[i, 1, 2] for i in range(32)]
        for prompts in (long[:1] + short, long + short, [prompt[:1024] for prompt in long]):
            assert peak(llm.generate, prompts, params, use_tqdm=False) <= 1.05 * profiled


# -- a GPU a rank, through NCCL --------------------------------------------------------------------

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")


@two_gpus
def test_two_gpus_give_one_gpus_tokens(tiny_model):
    folder = tiny_model()
    for _ in range(2):  # an engine, and a second one after it has closed
        with make(folder, tensor_parallel_size=2) as llm:
            workers = list(llm.llm_engine.ranks.workers)
            assert llm.llm_engine.core.runner.graph_runner.graphs, "the collectives are captured"
            assert_same_greedy(answer(llm), greedy_reference(folder, PROMPTS, 32))
        assert [worker.poll() for worker in workers] == [0]


@two_gpus
@pytest.mark.parametrize("name", SAMPLINGS)
def test_two_gpus_agree_on_a_request_whose_numbers_overflow(overflowing, name):
    options = {"dtype": "float16", "attention_backend": "triton", "tensor_parallel_size": 2}
    with make(overflowing, **options) as llm:
        good = completions(llm, [GOOD], name)[0].token_ids
        found = completions(llm, [BAD, GOOD], name)
        assert [output.finish_reason for output in found] == ["error", "length"]
        assert [len(output.token_ids) for output in found] == [0, 12]
        assert completions(llm, [GOOD], name)[0].token_ids == good


def answer_for_ever(llm):
    while True:
        answer(llm)


@two_gpus
def test_a_killed_rank_ends_in_an_error(tiny_model):
    """Killed between two steps, and while a step may run. No notebook waits for it for ever."""
    for delay in (0.0, 0.05):
        llm = make(tiny_model(), tensor_parallel_size=2)
        answer(llm)
        worker = llm.llm_engine.ranks.workers[0]
        threading.Timer(delay, worker.kill).start()
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="rank 1 has ended"):
            answer_for_ever(llm)
        assert time.monotonic() - start < 30  # seconds, as promised: a limit, not a speed
        llm.close()
    with make(tiny_model(), tensor_parallel_size=2) as llm:  # both GPUs are free again
        answer(llm)


@two_gpus
def test_two_gpus_under_torchrun(tiny_model, tmp_path):
    folder = tiny_model()
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, sys\n"
        "from nanovllm import LLM, SamplingParams\n"
        "params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)\n"
        "options = dict(max_model_len=128, max_num_seqs=16, gpu_memory_utilization=0.1)\n"
        "with LLM(sys.argv[1], tensor_parallel_size=2, dtype='float32', **options) as llm:\n"
        "    outputs = llm.generate(json.loads(sys.argv[2]), params, use_tqdm=False)\n"
        "tokens = [output.outputs[0].token_ids for output in outputs]\n"
        "open(f\"{sys.argv[3]}/{os.environ['RANK']}.json\", 'w').write(json.dumps(tokens))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*command, script, folder, json.dumps(PROMPTS), tmp_path],
        timeout=900,
        env=machine.environment(),
        check=True,
    )
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert_same_greedy(found, greedy_reference(folder, PROMPTS, 32))


# -- logprobs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"enforce_eager": True}, {"max_num_batched_tokens": 13}, {"attention_backend": "torch"}],
    ids=["captured", "eager", "chunks", "torch"],
)
def test_logprobs_are_the_cpus(tiny_model, options):
    """Beside rows that ask for nothing. Greedy tokens part at most where two are close."""
    folder = tiny_model()
    params = [
        SamplingParams(
            temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=n, prompt_logprobs=m
        )
        for n, m in ((5, 2), (None, None), (0, 20), (20, None), (None, 0))
    ]
    with make(folder, **options) as gpu, make(folder, device="cpu") as cpu:
        found, wanted = (llm.generate(PROMPTS, params, use_tqdm=False) for llm in (gpu, cpu))
    same = 0
    for a, b in zip(found, wanted, strict=True):
        pairs = [(a.prompt_logprobs, b.prompt_logprobs)]
        if a.outputs[0].token_ids == b.outputs[0].token_ids:
            same += 1
            pairs.append((a.outputs[0].logprobs, b.outputs[0].logprobs))
        for ours, theirs in pairs:
            assert (ours is None) == (theirs is None)
            for x, y in zip(ours or [], theirs or [], strict=True):
                for token_id in (x or {}).keys() & (y or {}).keys():
                    assert x[token_id].logprob == pytest.approx(y[token_id].logprob, abs=1e-3)
                assert len((x or {}).keys() ^ (y or {}).keys()) <= 2, "one near tie at the end"
    assert same >= len(PROMPTS) - 1


def test_logprobs_stay_in_the_captured_step(tiny_model):
    params = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True, logprobs=5)
    with make(tiny_model(), max_num_seqs=8) as llm:
        llm.llm_engine.core.runner.decode_step = lambda *_: pytest.fail("a step was not captured")
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    for output in outputs:
        answer = output.outputs[0]
        assert [next(iter(found)) for found in answer.logprobs] == answer.token_ids
        assert all(
            found[i].rank == 1 for i, found in zip(answer.token_ids, answer.logprobs, strict=True)
        )
