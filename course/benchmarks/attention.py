"""Decode attention alone: which part of the read bandwidth does a kernel reach?

One new token a request attends to the keys and values of its whole context, which lie in blocks of
16 tokens scattered over a cache. What must be read is the context's keys and values, once; that,
over the time of one call, is the bandwidth reached. Calls go round over several caches, together
far larger than any processor's cache, so that each finds its keys and values in memory only.

On a GPU the round is captured as a CUDA graph where the function can be, so that the time is the
device's and not Python's, and each replay is timed by events; the median counts. On a CPU each
shape has an eighth of its requests and of its tokens, and time is the clock's.

What is measured is a backend's `decode_attention`. Its plan is not, because a step makes it once
for all layers.

Three mixes of lengths follow, in full size on any machine: 255 short requests alone, then with one
of 1,000 tokens, then with one of 8,000. A longer request should add the time of its own tokens. It
adds much more where all rows are padded to the longest one.
"""

import argparse
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from course import machine
from course.measure.roofline import cpu_seconds, cuda_seconds, read_bandwidth

BLOCK_SIZE, HEADS, KV_HEADS, HEAD_DIM = 16, 16, 8, 128
ROUND_BYTES = {"cuda": 2**30, "cpu": 2**27}  # keys and values of all caches together, at least
REPEATS = {"cuda": 50, "cpu": 3}
SCALE_ON_CPU = 1 / 8


def shapes(scale: float = 1.0) -> dict[str, list[int]]:
    """The context lengths of each measured shape, by name."""
    rng = random.Random(0)
    full = {
        "256 x 900": [900] * 256,
        "130 ragged, 100 to 1,900": [rng.randint(100, 1900) for _ in range(130)],
        "16 x 1,500": [1500] * 16,
        "1 x 640": [640],
    }
    return {
        name: [max(1, round(scale * n)) for n in lens[: max(1, round(scale * len(lens)))]]
        for name, lens in full.items()
    }


def mixes() -> dict[str, list[int]]:
    """Context lengths of many short requests, and of one long one among them."""
    short = [10] * 255
    return {
        "255 x 10": short,
        "255 x 10, 1 x 1,000": [*short, 1000],
        "255 x 10, 1 x 8,000": [*short, 8000],
    }


# -- what they are given -----------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """One call's arguments, on the device."""

    query: Any  # [n, HEADS, HEAD_DIM]
    k_cache: Any  # [blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM]
    v_cache: Any  # as k_cache
    block_tables: Any  # [n, width] int32; blocks in random order, rows padded with 0
    seq_lens: Any  # [n] int32

    def prepare(self, backend: Any) -> Callable[[], Any]:
        """A call of the backend's attention, for which all has been planned."""
        positions, tables = self.seq_lens - 1, self.block_tables
        rows = backend.plan_decode(positions, tables, self.k_cache, HEADS)
        scale = HEAD_DIM**-0.5
        return lambda: backend.decode_attention(self.query, self.k_cache, self.v_cache, rows, scale)


def make_inputs(lens: list[int], device: Any, dtype: Any, seed: int) -> Inputs:
    """Random queries, keys and values for requests with these context lengths."""
    import torch

    counts = [-(-length // BLOCK_SIZE) for length in lens]
    order = list(range(sum(counts)))
    random.Random(seed).shuffle(order)
    blocks = iter(order)
    tables = [[next(blocks) for _ in range(c)] + [0] * (max(counts) - c) for c in counts]
    shape = (sum(counts), BLOCK_SIZE, KV_HEADS, HEAD_DIM)
    generator = torch.Generator(device).manual_seed(seed)
    make = {"device": device, "dtype": dtype, "generator": generator}
    return Inputs(
        query=torch.randn(len(lens), HEADS, HEAD_DIM, **make),
        k_cache=torch.randn(shape, **make),
        v_cache=torch.randn(shape, **make),
        block_tables=torch.tensor(tables, dtype=torch.int32, device=device),
        seq_lens=torch.tensor(lens, dtype=torch.int32, device=device),
    )


def kv_bytes(lens: list[int], itemsize: int) -> int:
    """Bytes of all contexts' keys and values in one layer."""
    return 2 * sum(lens) * KV_HEADS * HEAD_DIM * itemsize


# -- timing ------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every shape; what is printed and recorded."""
    import torch

    from nanovllm.layers.backend import choose_backend

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    usual = torch.bfloat16 if cuda else torch.float32
    dtype = usual if args.dtype == "auto" else getattr(torch, args.dtype)
    scale = args.scale or (1.0 if cuda else SCALE_ON_CPU)
    backend = choose_backend(args.attention_backend, device, HEAD_DIM, BLOCK_SIZE)
    peak = read_bandwidth(device)
    return {
        "machine": machine.describe(device.type),
        "versions": machine.versions(),
        "dtype": str(dtype).removeprefix("torch."),
        "backend": backend.name,
        "heads": {"query": HEADS, "kv": KV_HEADS, "dim": HEAD_DIM, "block_size": BLOCK_SIZE},
        "scale": scale,
        "read_bytes_per_second": peak,
        "shapes": {
            name: measure_shape(backend, lens, device, dtype, peak)
            for name, lens in shapes(scale).items()
        },
        "mixes": {
            name: measure_shape(backend, lens, device, dtype, peak)
            for name, lens in mixes().items()
        },
    }


def measure_shape(
    backend: Any, lens: list[int], device: Any, dtype: Any, peak: float, graph: bool = True
) -> dict[str, Any]:
    """Time one shape. peak: the device's read bandwidth in bytes a second. graph: try one."""
    num_bytes = kv_bytes(lens, dtype.itemsize)
    num_caches = max(2, -(-ROUND_BYTES[device.type] // num_bytes))
    inputs = [make_inputs(lens, device, dtype, seed) for seed in range(num_caches)]
    calls = [item.prepare(backend) for item in inputs]
    rounds, captured = round_seconds(calls, device, graph)
    seconds = [one / num_caches for one in rounds]
    reached = num_bytes / statistics.median(seconds)
    return {
        "requests": len(lens),
        "context_tokens": sum(lens),
        "bytes": num_bytes,
        "caches": num_caches,
        "graph": captured,
        "microseconds": 1e6 * statistics.median(seconds),
        "fastest_microseconds": 1e6 * min(seconds),
        "slowest_microseconds": 1e6 * max(seconds),
        "bytes_per_second": reached,
        "share_of_read_bandwidth": reached / peak,
    }


def round_seconds(
    calls: list[Callable], device: Any, graph: bool = True
) -> tuple[list[float], bool]:
    """Seconds of all the calls, several times; and whether a CUDA graph ran them."""
    import torch

    def one_round() -> None:
        for call in calls:
            call()

    with torch.inference_mode():
        one_round()
        one_round()
        if device.type == "cpu":
            return [cpu_seconds(one_round) for _ in range(REPEATS["cpu"])], False
        replay, captured = as_graph(one_round) if graph else (one_round, False)
        replay()
        return [cuda_seconds(replay) for _ in range(REPEATS["cuda"])], captured


def as_graph(function: Callable[[], None]) -> tuple[Callable[[], None], bool]:
    """The function as a CUDA graph; itself, and False, if it waits for the device."""
    import torch

    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            function()
    except RuntimeError:
        torch.cuda.synchronize()
        return function, False
    return graph.replay, True


def print_report(report: dict[str, Any]) -> None:
    """The report as a table, a line a shape."""
    peak = report["read_bytes_per_second"] / 1e9
    print(f"decode attention ({report['backend']}), {report['dtype']}, on {report['machine']}")
    if report["scale"] != 1:
        print(f"reduced: requests and lengths are {report['scale']:g} of the full shapes'")
    print(f"reads measured here: {peak:,.1f} GB/s")
    for name, row in {**report["shapes"], **report["mixes"]}.items():
        print(
            f"  {name:<26}{row['microseconds']:>12,.1f} us{row['bytes_per_second'] / 1e9:>12,.1f} "
            f"GB/s{row['share_of_read_bandwidth']:>10.1%} of it"
            + ("" if row["graph"] or report["machine"].endswith("threads") else "   (no graph)")
        )
