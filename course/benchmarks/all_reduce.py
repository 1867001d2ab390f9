"""How long does an all-reduce take, by size? One process a rank, through the engine's own `Ranks`.

    course bench all_reduce --ranks 2 --json FILE

With a GPU a rank: NCCL, bfloat16, up to 64 MiB, captured in a CUDA graph as decode steps are, timed
by events. Otherwise gloo on the CPU, float32, up to 16 MiB, timed by the clock, one thread a rank.
Sums are checked first. `bus bandwidth` is 2 (n - 1) / n times bytes over seconds: what each rank
must send, and receive, at least.
"""

import statistics
import time
from typing import Any

from course import machine

SMALLEST = 2**10
LARGEST = {"nccl": 2**26, "gloo": 2**24}
WORKER = "from course.benchmarks.all_reduce import worker; worker()"
REPEATS = 20
CAPTURED = 20  # all-reduces in a graph


# -- processes ---------------------------------------------------------------------------------


def measure(num_ranks: int, largest: int | None = None) -> dict[str, Any]:
    """Start the other ranks, be rank 0, and report."""
    from nanovllm.distributed.launch import start_workers

    ranks = start_workers(num_ranks, {"largest": largest}, WORKER)
    try:
        return run(ranks, largest)
    finally:
        ranks.close()


def worker() -> None:
    from nanovllm.distributed.launch import join_as_worker

    ranks, settings = join_as_worker()
    try:
        run(ranks, settings["largest"])
    except Exception as error:
        ranks.monitor.report_error(error)
        raise
    finally:
        ranks.close()


def run(ranks: Any, largest: int | None) -> dict[str, Any]:
    """What every rank does alike; rank 0's report counts."""
    import torch

    device = torch.device("cuda" if torch.cuda.device_count() >= ranks.world_size else "cpu")
    device = ranks.local_device(device)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ranks.init_process_group(device)
        check_sum(ranks, device)
        backend, dtype = ("nccl", torch.bfloat16) if cuda else ("gloo", torch.float32)
        rows, size = [], SMALLEST
        while size <= (largest or LARGEST[backend]):
            x = torch.zeros(size // dtype.itemsize, dtype=dtype, device=device)
            seconds = captured_seconds(ranks, x) if cuda else clock_seconds(ranks, x)
            rows.append(summarise(size, seconds))
            size *= 2
        return describe(ranks.world_size, backend, dtype, str(device)) | {"rows": rows}
    finally:
        torch.set_num_threads(threads)


def check_sum(ranks: Any, device: Any) -> None:
    """RuntimeError unless every element is the sum over the ranks."""
    import torch

    x = torch.arange(1000, dtype=torch.float32, device=device) + ranks.rank
    wanted = ranks.world_size * torch.arange(1000.0) + sum(range(ranks.world_size))
    found = ranks.all_reduce(x).cpu()
    if not torch.equal(found, wanted):
        raise RuntimeError(f"wrong sums on rank {ranks.rank}: {found[:4]} for {wanted[:4]}")


# -- timing ------------------------------------------------------------------------------------


def clock_seconds(ranks: Any, x: Any) -> list[float]:
    """Of single calls; the last call has brought the ranks together."""
    seconds = []
    for i in range(REPEATS + 3):
        start = time.perf_counter()
        ranks.all_reduce(x)
        if i >= 3:
            seconds.append(time.perf_counter() - start)
    return seconds


def captured_seconds(ranks: Any, x: Any) -> list[float]:
    """Of one call of many in a graph, once a replay."""
    import torch

    ranks.all_reduce(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(CAPTURED):
            ranks.all_reduce(x)
    seconds = []
    for i in range(REPEATS + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            seconds.append(begin.elapsed_time(end) / 1e3 / CAPTURED)
    return seconds


# -- reporting ---------------------------------------------------------------------------------


def summarise(size: int, seconds: list[float]) -> dict[str, Any]:
    return {
        "bytes": size,
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
    }


def describe(num_ranks: int, backend: str, dtype: Any, device: str) -> dict[str, Any]:
    return {
        "command": f"course bench all_reduce --ranks {num_ranks}",
        "ranks": num_ranks,
        "backend": backend,
        "dtype": str(dtype).removeprefix("torch."),
        "machine": machine.describe(device),
        "versions": machine.versions(),
        "repeats": REPEATS,
    }


def seconds_for(report: dict[str, Any], num_bytes: float) -> float:
    """An all-reduce's time by straight lines between the measured sizes; outside, the nearest."""
    import numpy as np

    rows = report["rows"]
    sizes, times = [row["bytes"] for row in rows], [row["seconds"] for row in rows]
    return float(np.interp(num_bytes, sizes, times))


def print_report(report: dict[str, Any]) -> None:
    n = report["ranks"]
    print(f"{n} ranks, {report['backend']}, {report['dtype']}, on {report['machine']}")
    print(f"{'KiB':>8}{'median µs':>12}{'fastest':>10}{'slowest':>10}{'bus GB/s':>10}")
    for row in report["rows"]:
        micros = (f"{1e6 * row[name]:,.1f}" for name in ("seconds", "fastest", "slowest"))
        cells = "{:>12}{:>10}{:>10}".format(*micros)
        bus = 2 * (n - 1) / n * row["bytes"] / row["seconds"] / 1e9
        print(f"{row['bytes'] // 1024:>8,}{cells}{bus:>10.2f}")
