"""Lesson 06's kernels, version by version: how many bytes a second does each move?

    course bench kernel_ladder --json figures/data/h200_kernel_ladder.json

Three ladders, each from plain torch to the engine's own kernel: storing keys and values; norm, RoPE
and store; decode attention. Every version is first checked against torch, then timed as
`course.benchmarks.attention` does: a CUDA graph over several sets of data, larger together than the
GPU's cache, and the median of many replays. Without a GPU only torch's versions are timed, on small
shapes; under TRITON_INTERPRET=1 all are checked.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from course import machine
from course.benchmarks.attention import (
    BLOCK_SIZE,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    ROUND_BYTES,
    make_inputs,
    measure_shape,
    round_seconds,
    shapes,
)
from course.measure.roofline import BUFFER_BYTES, read_bandwidth, seconds_of
from course.measure.timing import Timing
from nanovllm.layers import attention
from nanovllm.layers.backend import (
    TORCH_BACKEND,
    Backend,
    flash_backend,
    has_flash_attention,
    triton_backend,
)
from nanovllm.layers.rope import rope_frequencies, rope_table
from nanovllm.metadata import AttentionMetadata, PhaseMetadata

TOKENS = {"cuda": (16_384, 256), "cpu": (256, 16)}  # a prefill step, a decode step
DECODE_SCALE = {"cuda": 1.0, "cpu": 1 / 16}
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # relative error
PARTS_PER_PROCESSOR = 8  # programs that splitting aims at, for each multiprocessor
SHORTEST_PART = 64  # tokens


def can_run_triton() -> bool:
    """Whether Triton is here, and a GPU or its interpreter to run it."""
    try:
        from triton import knobs
    except ImportError:
        return False
    return torch.cuda.is_available() or bool(knobs.runtime.interpret)


# -- the versions --------------------------------------------------------------------------------


def store_versions() -> dict[str, Callable]:
    """Functions as `attention.store_kv`."""
    found = {"torch": attention.store_kv}
    if can_run_triton():
        from course.benchmarks import toy_kernels as toy
        from nanovllm.kernels import store

        found |= {
            "a program a head": toy.store_heads,
            "a program a token": store.store_kv,  # the engine's
        }
    return found


def rope_versions() -> dict[str, Callable]:
    """Functions as `attention.rope_store`."""
    found = {"torch": attention.rope_store}
    if can_run_triton():
        from course.benchmarks import toy_kernels as toy
        from nanovllm.kernels import store

        found |= {"three kernels": toy.norm_rope_store, "the engine's, fused": store.rope_store}
    return found


def decode_versions() -> dict[str, Backend]:
    """Backends that differ in their decode attention."""
    found = {"torch": TORCH_BACKEND}
    if can_run_triton():
        from course.benchmarks import toy_kernels as toy

        found["a program a head"] = replace(TORCH_BACKEND, decode_attention=toy.attend_whole)
        found["split"] = replace(TORCH_BACKEND, decode_attention=attend_split)
        found["the engine's"] = triton_backend()
    if torch.cuda.is_available() and has_flash_attention(BLOCK_SIZE):
        found["FlashAttention"] = flash_backend(BLOCK_SIZE)
    return found


def attend_split(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, metadata: PhaseMetadata, scale: float
) -> Tensor:
    """The lesson's split attention, with as many parts as keep this GPU busy."""
    from course.benchmarks import toy_kernels as toy

    longest = metadata.block_tables.shape[1] * k_cache.shape[1]
    parts = choose_splits(query.shape[0] * query.shape[1], longest, processors(query.device))
    return toy.attend_split(query, k_cache, v_cache, metadata, scale, parts)


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; for the interpreter a few."""
    if device.type == "cpu":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def choose_splits(num_programs: int, longest: int, num_processors: int) -> int:
    """Parts a context: so many programs that the GPU is busy, none shorter than is worth it."""
    wanted = -(-PARTS_PER_PROCESSOR * num_processors // num_programs)
    return max(1, min(wanted, longest // SHORTEST_PART))


# -- what they are given -------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """New tokens of one layer and the cache they go to."""

    qkv: Tensor  # [num_tokens, (HEADS + 2 KV_HEADS) * HEAD_DIM]
    batch: AttentionMetadata
    k_cache: Tensor  # [blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM]
    v_cache: Tensor
    norms: tuple[Any, Any]
    rope: Tensor

    def store(self, version: Callable) -> tuple[Tensor, ...]:
        """The caches after it."""
        heads = self.qkv.unflatten(-1, (-1, HEAD_DIM))
        key, value = heads[:, HEADS : HEADS + KV_HEADS], heads[:, HEADS + KV_HEADS :]
        version(key, value, self.k_cache, self.v_cache, self.batch.slot_mapping)
        return self.k_cache, self.v_cache

    def rope_store(self, version: Callable) -> tuple[Tensor, ...]:
        """The queries, and the caches after it."""
        caches = (self.k_cache, self.v_cache)
        return version(self.qkv, self.norms, self.rope, self.batch, *caches), *caches

    def clone(self) -> "Tokens":
        copies = (x.clone() for x in (self.qkv, self.k_cache, self.v_cache))
        return replace(self, **dict(zip(("qkv", "k_cache", "v_cache"), copies, strict=True)))


def make_tokens(num_tokens: int, device: torch.device, dtype: torch.dtype, seed: int) -> Tokens:
    """Random tokens, whose slots lie in random order."""
    generator = torch.Generator(device).manual_seed(seed)
    make = {"device": device, "dtype": dtype, "generator": generator}
    cache = (-(-num_tokens // BLOCK_SIZE), BLOCK_SIZE, KV_HEADS, HEAD_DIM)
    order = torch.randperm(num_tokens, generator=generator, device=device)
    positions = torch.arange(num_tokens, dtype=torch.int32, device=device)
    rows = PhaseMetadata(order, positions, positions, positions)
    rope = rope_table(rope_frequencies(HEAD_DIM, 1e6), num_tokens)
    return Tokens(
        qkv=torch.randn(num_tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM, **make),
        batch=AttentionMetadata(positions, rows, None),
        k_cache=torch.zeros(cache, device=device, dtype=dtype),
        v_cache=torch.zeros(cache, device=device, dtype=dtype),
        norms=(make_norm(**make), make_norm(**make)),
        rope=rope.to(device),
    )


def make_norm(**make: Any) -> nn.Module:
    """An RMSNorm over a head, with random weights near 1."""
    from nanovllm.layers.norm import RMSNorm

    norm = RMSNorm(HEAD_DIM, 1e-6, make["dtype"])
    norm.weight.copy_(1 + 0.1 * torch.randn(HEAD_DIM, **make))
    return norm.to(make["device"])


# -- checking ------------------------------------------------------------------------------------


def check_all(device: torch.device, dtype: torch.dtype, num_tokens: int = 19) -> dict[str, float]:
    """Each version's relative error against torch's, by name. AssertionError if one is wrong."""
    tokens = make_tokens(num_tokens, device, dtype, seed=0)
    tokens.batch.slot_mapping[3] = -1
    inputs = make_inputs([1, 17, 80, 133], device, dtype, seed=0)
    asked: dict[str, tuple[dict, Callable]] = {
        "store": (store_versions(), lambda one: tokens.clone().store(one)),
        "rope and store": (rope_versions(), lambda one: tokens.clone().rope_store(one)),
        "decode": (decode_versions(), lambda one: (inputs.prepare(one)(),)),
    }
    errors = {}
    for ladder, (versions, run) in asked.items():
        wanted = run(versions["torch"])
        for name, version in versions.items():
            error = max(relative_error(a, b) for a, b in zip(run(version), wanted, strict=True))
            assert error < LIMITS[dtype], f"{ladder}, {name}: relative error {error:.1e}"
            errors[f"{ladder}, {name}"] = error
    return errors


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """The distance of two tensors, as a part of the second's length."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


# -- timing --------------------------------------------------------------------------------------


def time_tokens(
    run: Callable[[Tokens, Callable], Any],
    versions: dict[str, Callable],
    bytes_per_token: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, dict[str, dict]]:
    """Each version's row for each number of tokens."""
    report = {}
    for num_tokens in TOKENS[device.type]:
        num_bytes = num_tokens * bytes_per_token
        num_sets = min(256, max(2, ROUND_BYTES[device.type] // num_bytes))
        sets = [make_tokens(num_tokens, device, dtype, seed) for seed in range(num_sets)]
        report[f"{num_tokens:,} tokens"] = {
            name: time_calls(
                [partial(run, one, version) for one in sets], num_bytes, device, name != "torch"
            )
            for name, version in versions.items()
        }
    return report


def time_calls(
    calls: list[Callable], num_bytes: int, device: torch.device, graph: bool
) -> dict[str, Any]:
    """A row of the report: one call's time, of a round of calls that move `num_bytes` each.

    graph: whether a CUDA graph may run it; torch's versions wait for the GPU, so they cannot.
    """
    rounds, captured = round_seconds(calls, device, graph)
    timing = Timing(tuple(seconds / len(calls) for seconds in rounds))
    return {
        "microseconds": 1e6 * timing.median,
        "fastest_microseconds": 1e6 * timing.lowest,
        "slowest_microseconds": 1e6 * timing.highest,
        "bytes": num_bytes,
        "bytes_per_second": num_bytes / timing.median,
        "graph": captured,
    }


def time_decodes(device: torch.device, dtype: torch.dtype, peak: float) -> dict[str, dict]:
    """Each version's row for each of `course.benchmarks.attention`'s shapes."""
    report: dict[str, dict] = {}
    for shape, lens in shapes(DECODE_SCALE[device.type]).items():
        report[shape] = {}
        for name, backend in decode_versions().items():
            graph = name != "torch"
            report[shape][name] = measure_shape(backend, lens, device, dtype, peak, graph)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return report


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by a copy much larger than any cache."""
    half = torch.zeros(BUFFER_BYTES[device.type] // 8, dtype=torch.float32, device=device)
    other = torch.empty_like(half)
    return 2 * half.nbytes / seconds_of(lambda: other.copy_(half), device)


@torch.inference_mode()
def measure_all() -> dict[str, Any]:
    """Check, then time; what is printed and recorded."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    peak, copied = read_bandwidth(device), copy_bandwidth(device)
    errors = check_all(device, dtype)
    kv_bytes = 2 * KV_HEADS * HEAD_DIM * dtype.itemsize  # of a token
    all_bytes = kv_bytes + HEADS * HEAD_DIM * dtype.itemsize
    head = SimpleNamespace(device=device, dtype=dtype)
    return {
        "machine": machine.describe(device.type),
        "versions": machine.versions(),
        "dtype": str(dtype).removeprefix("torch."),
        "heads": {"query": HEADS, "kv": KV_HEADS, "dim": HEAD_DIM, "block_size": BLOCK_SIZE},
        "read_bytes_per_second": peak,
        "copy_bytes_per_second": copied,
        "errors": errors,
        "store": time_tokens(Tokens.store, store_versions(), 2 * kv_bytes, **vars(head)),
        "rope": time_tokens(Tokens.rope_store, rope_versions(), 2 * all_bytes, **vars(head)),
        "decode": time_decodes(device, dtype, peak),
    }


def print_report(report: dict[str, Any]) -> None:
    print(f"{report['machine']}, {report['dtype']}; all versions agree with torch")
    for what in ("read", "copy"):
        print(f"{what} bandwidth: {report[f'{what}_bytes_per_second'] / 1e9:,.0f} GB/s")
    for ladder in ("store", "rope", "decode"):
        for shape, rows in report[ladder].items():
            print(f"{ladder}, {shape}")
            for name, row in rows.items():
                note = "" if row["graph"] else "   (no graph)"
                print(
                    f"  {name:<22}{row['microseconds']:>12,.1f} us"
                    f"{row['bytes_per_second'] / 1e9:>10,.0f} GB/s{note}"
                )
