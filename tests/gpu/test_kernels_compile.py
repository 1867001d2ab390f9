"""Every kernel compiles for every kind of GPU, without one, and fits its shared memory.

The launching functions are called on a CPU, for a card that is not there; what they would launch is
recorded, with all its arguments, and compiled ahead of time for that card.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

triton = pytest.importorskip("triton", reason="Triton has no build for this system")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402

from nanovllm import EngineArgs, LLMEngine, SamplingParams  # noqa: E402
from nanovllm.engine import llm_engine, memory, model_runner  # noqa: E402
from nanovllm.kernels import (  # noqa: E402
    decode_attention,
    decode_plan,
    filters,
    linear,
    logprobs,
    prefill_attention,
    sampling,
    store,
)
from nanovllm.kernels.gpu_limits import GpuLimits  # noqa: E402
from nanovllm.layers import attention, functional, sampler  # noqa: E402
from nanovllm.layers import logprobs as torch_logprobs  # noqa: E402
from nanovllm.layers.backend import Backend  # noqa: E402
from nanovllm.metadata import (  # noqa: E402
    NUM_COLUMNS,
    Adjustments,
    AttentionMetadata,
    PhaseMetadata,
    SamplingMetadata,
)

# Shared memory that one block may take, by compute capability (NVIDIA's CUDA C++ Programming Guide,
# "Technical Specifications per Compute Capability").
MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64"}
MODULES = (
    store,
    decode_plan,
    decode_attention,
    prefill_attention,
    linear,
    filters,
    sampling,
    logprobs,
)


class Recorder:
    """Stands for a kernel; notes what it is launched with."""

    def __init__(self, kernel: JITFunction, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


@pytest.fixture
def launches(monkeypatch):
    found: list = []
    for module in MODULES:
        for name, kernel in vars(module).copy().items():
            if isinstance(kernel, JITFunction) and name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Recorder(kernel, found))
    if not hasattr(linear.matvec_kernel, "launches"):
        pytest.skip("Triton's interpreter is on: nothing is compiled")
    return found


class Norm(nn.Module):
    def __init__(self, size, dtype):
        super().__init__()
        self.weight, self.eps = torch.ones(size, dtype=dtype), 1e-6


def launch_everything(heads, kv_heads, head_dim, block_size, dtype):
    """One decode step's kernels and one prefill step's, of a small model with these heads."""
    hidden, rows = 1024, 3
    k_cache = torch.zeros(4, block_size, kv_heads, head_dim, dtype=dtype)
    tables = torch.zeros(rows, 64, dtype=torch.int32)
    positions = torch.zeros(rows, dtype=torch.int32)
    decode = decode_plan.plan_decode(positions, tables, k_cache, heads)
    metadata = AttentionMetadata(positions, decode, None)
    qkv = torch.zeros(rows, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    rope = torch.zeros(64, 2, head_dim // 2)
    for norms in ((Norm(head_dim, dtype), Norm(head_dim, dtype)), None):
        query = store.rope_store(qkv, norms, rope, metadata, k_cache, k_cache)
    store.store_kv(k_cache[0, :3], k_cache[0, :3], k_cache, k_cache, decode.slot_mapping)
    decode_attention.decode_attention(query, k_cache, k_cache, decode, 1.0)
    query_start_loc = torch.zeros(4, dtype=torch.int32)
    prefill = PhaseMetadata(None, positions, tables, query_start_loc, max_query_len=9)
    prefill_attention.prefill_attention(query, k_cache, k_cache, prefill, 1.0)
    for tokens in (1, 2):
        for inputs in (hidden, 4 * hidden):
            x, residual = (
                torch.zeros(tokens, inputs, dtype=dtype),
                torch.zeros(tokens, 8, dtype=dtype),
            )
            weight, bias = torch.zeros(8, inputs, dtype=dtype), torch.zeros(8, dtype=dtype)
            linear.norm_linear(x, Norm(inputs, dtype), weight, bias)
            linear.linear_add(x, weight, None, residual)
            linear.norm_swiglu(x, Norm(inputs, dtype), weight, bias)
    one = torch.zeros(rows, 1)
    asked = SamplingMetadata(one, one.long(), one.int(), one.int(), one, one)
    sampling.local_argmax(torch.zeros(rows, 999, dtype=dtype), asked, 0)
    logits = torch.zeros(rows, 151_936, dtype=dtype)
    logprobs.gather_logprobs(logits, sampling.draw(logits, asked), one.int())
    columns = torch.zeros(rows, NUM_COLUMNS, dtype=torch.int32)
    given = Adjustments(columns, columns, one, torch.zeros(2, dtype=torch.int64))
    sampling.draw(logits, replace(asked, adjustments=given))


def compile_for(kernel, args, options, capability):
    """The kernel for that launch, compiled as it would be on such a card."""
    signature, constants, attributes = {}, {}, {}

    def type_of(value, path):
        if isinstance(value, tuple):
            return tuple(type_of(item, (*path, j)) for j, item in enumerate(value))
        if isinstance(value, torch.Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return "*" + TYPES[value.dtype]
        return "fp32" if isinstance(value, float) else "i32"

    for i, (parameter, value) in enumerate(zip(kernel.params, args, strict=True)):
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        else:
            signature[parameter.name] = type_of(value, (i,))
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("capability", MEMORY)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((16, 8, 128, 16), torch.bfloat16),  # Qwen3-0.6B
        ((9, 3, 64, 16), torch.bfloat16),  # SmolLM2-135M
        ((14, 2, 80, 32), torch.bfloat16),
        ((8, 1, 256, 256), torch.bfloat16),
        ((4, 2, 128, 16), torch.float32),
        ((4, 2, 256, 16), torch.float32),
    ],
    ids=str,
)
def test_kernels_compile_and_fit(shape, dtype, capability, launches, monkeypatch):
    limits = GpuLimits(8, MEMORY[capability], capability // 10)
    monkeypatch.setattr(GpuLimits, "of", staticmethod(lambda device: limits))
    launch_everything(*shape, dtype)
    assert {kernel.fn.__name__ for kernel, _, _ in launches} == {
        name for module in MODULES for name in vars(module) if name.endswith("_kernel")
    }
    for kernel, args, options in launches:
        compiled = compile_for(kernel, args, options, capability)
        name = kernel.fn.__name__
        assert compiled.metadata.shared <= limits.shared_memory, (
            f"{name} takes {compiled.metadata.shared}"
        )


def variant(kernel, args, options):
    """What Triton compiles a kernel anew for: types, constants, alignment, strides of 1 or 16n."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    return f"{kernel.fn.__name__} {bind(*args, **options)[1]}"


def launching_too(kernel_function, torch_function, keep=()):
    """A backend's function that launches kernels, and computes what is right without them.

    keep: positions of arguments that the kernels' function writes to.
    """

    def run(*args, **kwargs):
        spared = [x.clone() if i in keep and x is not None else x for i, x in enumerate(args)]
        kernel_function(*spared, **kwargs)
        return torch_function(*args, **kwargs)

    return run


def plan_both(*args):
    return replace(attention.plan_decode(*args), plan=decode_plan.plan_decode(*args).plan)


@pytest.mark.parametrize("max_model_len", [96, 104, 112, 120])  # tables of so many widths
def test_an_engine_that_has_started_compiles_nothing_more(
    max_model_len, launches, monkeypatch, tiny_model
):
    limits = GpuLimits(132, MEMORY[90], 9)
    monkeypatch.setattr(GpuLimits, "of", staticmethod(lambda device: limits))
    backend = Backend(
        "both",
        linear=launching_too(linear.linear, functional.linear),
        norm_linear=launching_too(linear.norm_linear, functional.norm_linear),
        linear_add=launching_too(linear.linear_add, functional.linear_add, keep=[3]),
        norm_swiglu=launching_too(linear.norm_swiglu, functional.norm_swiglu),
        rope_store=launching_too(store.rope_store, attention.rope_store),
        plan_decode=plan_both,
        decode_attention=launching_too(
            decode_attention.decode_attention, attention.decode_attention
        ),
        prefill_attention=launching_too(
            prefill_attention.prefill_attention, attention.prefill_attention
        ),
        local_argmax=launching_too(sampling.local_argmax, sampler.local_argmax),
        draw=launching_too(sampling.draw, sampler.draw),
        gather_logprobs=launching_too(logprobs.gather_logprobs, torch_logprobs.gather_logprobs),
    )
    monkeypatch.setattr(llm_engine, "choose_backend", lambda *args: backend)
    options = {"num_gpu_blocks_override": 64, "block_size": 8, "max_num_seqs": 6}
    args = EngineArgs(str(tiny_model()), device="cpu", max_model_len=max_model_len,
                      max_num_batched_tokens=128, use_tqdm_on_load=False, **options)  # fmt: skip
    engine = LLMEngine(args)
    runner = engine.core.runner
    for size in (6, 4, 2, 1):  # as `capture_graphs` does on a GPU
        runner.decode_step(size, whole_rows=True)
    memory.profile_run(runner, args.max_num_batched_tokens)
    runner.kv_cache.zero_()
    started = {variant(*launch) for launch in launches}
    launches.clear()
    for n in range(1, 13):  # lengths differ, so that prompts stand behind decode rows
        filters = {"top_k": 5} if n % 3 == 0 else {}
        filters |= {"logprobs": 3} if n % 4 == 0 else {}
        filters |= {"prompt_logprobs": 2} if n % 5 == 0 else {}
        params = SamplingParams(max_tokens=2 * n, temperature=n % 2, ignore_eos=True, **filters)
        engine.add([engine.make_request(str(n), [*range(4 * n)], params)])
    while engine.has_unfinished_requests():
        engine.advance()
    mixed = [step for step in engine.trace if 1 < len(step.rows) < step.num_tokens]
    assert len(mixed) > 3
    assert {variant(*launch) for launch in launches} <= started


def test_several_ranks_profile_steps_with_and_without_filters(tiny_model, monkeypatch):
    """They sample with other kernels. The parameters' stride differs in decode and mixed steps."""
    args = EngineArgs(str(tiny_model()), device="cpu", max_model_len=96, use_tqdm_on_load=False)
    runner = LLMEngine(args).core.runner
    profiled = set()

    def noted(logits, metadata, ranks, vocab_size, backend, whole_rows):
        profiled.add((metadata.temperature.stride(0), whole_rows))
        return torch.zeros(len(logits), dtype=torch.int64)

    def noted_logprobs(logits, token_ids, num_logprobs):
        profiled.add((num_logprobs.stride(0), "logprobs"))
        return torch.zeros(len(logits), 1, dtype=torch.int32)

    monkeypatch.setattr(model_runner, "sample", noted)
    runner.backend = replace(runner.backend, gather_logprobs=noted_logprobs)
    runner.ranks = SimpleNamespace(
        world_size=2, all_reduce_min=int, all_gather_columns=lambda logits, num_columns: logits
    )
    memory.profile_run(runner, 200)
    strides = (1, runner.input_batch.temperature.stride(0))
    kinds = (False, True, "logprobs")
    assert profiled == {(stride, kind) for stride in strides for kind in kinds}


def test_a_block_count_that_is_given_is_profiled_too(monkeypatch):
    """The run has at most the tokens that fit in the cache, because no step can have more."""
    profiled: list[int] = []
    monkeypatch.setattr(memory, "profile_run", lambda runner, tokens: profiled.append(tokens))
    runner = SimpleNamespace(device=torch.device("cuda"))
    for blocks in (4, 1000):
        args = EngineArgs("-", num_gpu_blocks_override=blocks, max_num_batched_tokens=100)
        assert memory.determine_num_blocks(runner, args, 0) == blocks
    assert profiled == [4 * args.block_size, 100]
