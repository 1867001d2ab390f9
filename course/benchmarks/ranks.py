"""The reference workloads on 1, 2, ... ranks: tokens a second, memory a rank, all-reduce's share.

    course bench ranks --ranks 1,2 --shape qwen3-0.6b --json FILE

First of all two checks on the course's own small model in float32: each number of ranks gives one
rank's greedy tokens, and with a GPU a rank the captured steps hold the collectives. Then all-reduce
alone, then the workloads, an engine after the other. On a GPU a workload's first run warms up.

all-reduce's share of a decode step = calls a step x time of one call of that size alone / median
time between the ends of two decode steps of that many rows. A step has two calls a layer and one
for the embedding. What the ranks' samplers exchange is not in it.
"""

import argparse
import itertools
import os
import statistics
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

from course import machine
from course.benchmarks import all_reduce
from course.measure import engine_runs as measure

GREEDY = {"temperature": 0.0, "max_tokens": 64, "ignore_eos": True}
SMALL = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "use_tqdm_on_load": False}
OWN = "storyteller"  # a shape too: the course's own model


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """All that is recorded; each part is printed as soon as it is known."""
    import torch

    cuda = torch.cuda.is_available()
    report: dict[str, Any] = {
        "shape": args.shape,
        "machine": f"{torch.cuda.device_count()} x {machine.describe()}"
        if cuda
        else machine.describe(),
        "versions": machine.versions(),
        "scale": args.scale or (1.0 if cuda else measure.SCALE_ON_CPU / 2),
    }
    report["small_model"] = check_small_model([n for n in args.ranks if n > 1])
    several = [n for n in args.ranks if n > 1]
    curves = {n: all_reduce.measure(n) for n in several}
    for curve in curves.values():
        all_reduce.print_report(curve)
    report["all_reduce"] = list(curves.values())
    model = str(model_folder(args.shape))
    report["engines"] = []
    for n in args.ranks:
        report["engines"].append(run_engine(n, model, args, report["scale"], curves.get(n)))
        print_engine(report["engines"][-1])
    return report


def model_folder(shape: str) -> Path:
    from course.models.choice import own_model
    from course.models.random_model import random_model_dir

    return own_model() if shape == OWN else random_model_dir(shape)


# -- the checks --------------------------------------------------------------------------------


def check_small_model(sizes: list[int]) -> list[dict[str, Any]]:
    """Greedy tokens on n ranks against one. RuntimeError if more than one answer of 8 differs.

    Sums in another order part two tokens whose logits are almost equal; hence the one.
    """
    import torch

    from course.models.choice import own_model

    prompts = [[1 + (7 * i + j) % 1000 for j in range(3 + 2 * i)] for i in range(8)]
    expected, _ = greedy(str(own_model()), prompts, 1)
    found = []
    for n in sizes:
        tokens, num_graphs = greedy(str(own_model()), prompts, n)
        equal = sum(a == b for a, b in zip(tokens, expected, strict=True))
        if equal < len(prompts) - 1:
            raise RuntimeError(f"{n} ranks: {equal} of {len(prompts)} greedy answers are one's")
        if torch.cuda.device_count() >= n and not num_graphs:
            raise RuntimeError(f"{n} ranks on {n} GPUs captured no graph")
        found.append({"ranks": n, "answers": 8, "equal": equal, "graphs": num_graphs})
        print(f"small model, float32, {n} ranks: {equal} of 8 answers equal, {num_graphs} graphs")
    return found


def greedy(model: str, prompts: list[list[int]], n: int) -> tuple[list[list[int]], int]:
    """Token ids of each answer, and how many graphs were captured."""
    from nanovllm import LLM, SamplingParams

    share = {"gpu_memory_utilization": 0.2}
    with LLM(model, tensor_parallel_size=n, **SMALL, **share) as llm:
        outputs = llm.generate(prompts, SamplingParams(**GREEDY), use_tqdm=False)
        graphs = llm.llm_engine.core.runner.graph_runner.graphs
        return [o.outputs[0].token_ids for o in outputs], len(graphs)


# -- the workloads -----------------------------------------------------------------------------


def run_engine(
    n: int, model: str, args: argparse.Namespace, scale: float, curve: dict[str, Any] | None
) -> dict[str, Any]:
    """One engine of n ranks, from its start to its end."""
    import torch

    from nanovllm import LLM

    cuda = torch.cuda.is_available()
    options: dict[str, Any] = {"max_model_len": round(scale * measure.MAX_MODEL_LEN)}
    options |= measure.ON_GPU if cuda else {}
    with LLM(model, tensor_parallel_size=n, use_tqdm_on_load=False, **options) as llm:
        measure.warm_up(llm, scale)
        runs = {
            name: every[int(cuda) :]
            for name, every in measure.run_workloads(
                llm, args.workloads, args.runs + cuda, scale
            ).items()
        }
        return {
            "ranks": n,
            "engine": options,
            "graphs": len(llm.llm_engine.core.runner.graph_runner.graphs),
            "memory": memory(llm),
            "workloads": {name: summarise(r) for name, r in runs.items()},
            "decode_step": decode_steps(llm, curve),
        }


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    speeds = [run["output_tokens"] / run["seconds"] for run in runs]
    return {
        "output_tokens": runs[0]["output_tokens"],
        "tokens_per_second": statistics.median(speeds),
        "slowest": min(speeds),
        "fastest": max(speeds),
        "seconds": [run["seconds"] for run in runs],
    }


def memory(llm: Any) -> dict[str, Any]:
    """Bytes of rank 0's weights and cache, and what each GPU, or each process, holds in all."""
    engine = llm.llm_engine
    runner = engine.core.runner
    tensors = [*runner.model.parameters(), *runner.model.buffers()]
    distinct = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return {
        "weight_bytes": sum(distinct.values()),
        "kv_cache_bytes": runner.kv_cache.nbytes,
        "kv_cache_tokens": engine.block_manager.num_blocks * engine.block_manager.block_size,
        "bytes_in_use": gpu_bytes() if engine.device.type == "cuda" else process_bytes(engine),
    }


def gpu_bytes() -> list[int]:
    """Of every GPU, in MiB steps. torch would have to open a context on each to say."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [int(line) * 2**20 for line in found.split()]


def process_bytes(engine: Any) -> list[int]:
    """Resident, of every rank's process; rank 0's alone where /proc does not tell."""
    found = [machine.resident_bytes()]
    for worker in engine.ranks.workers:
        statm = Path(f"/proc/{worker.pid}/statm")
        if statm.exists():
            found.append(int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    return found


def decode_steps(llm: Any, curve: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A decode step's time for one row and for the most common number, and all-reduce's share."""
    config, trace = llm.llm_engine.model_config, llm.llm_engine.trace
    gaps: dict[int, list[float]] = {}
    for before, step in itertools.pairwise(trace):
        rows = len(step.rows)
        if step.num_tokens == rows == before.num_tokens == len(before.rows):
            gaps.setdefault(rows, []).append(step.end_time - before.end_time)
    common = Counter({rows: len(g) for rows, g in gaps.items() if rows > 1}).most_common(1)
    found = []
    for rows in [1, *(rows for rows, _ in common)]:
        if rows not in gaps:
            continue
        seconds = statistics.median(gaps[rows])
        entry: dict[str, Any] = {"rows": rows, "steps": len(gaps[rows]), "seconds": seconds}
        if curve is not None:
            calls = 2 * config.num_hidden_layers + 1
            size = rows * config.hidden_size * config.dtype.itemsize
            each = all_reduce.seconds_for(curve, size)
            entry |= {"calls": calls, "bytes": size, "all_reduce_seconds": calls * each}
            entry["share"] = calls * each / seconds
        found.append(entry)
    return found


def print_engine(result: dict[str, Any]) -> None:
    held = result["memory"]
    in_use = ", ".join(f"{n / 2**30:.2f}" for n in held["bytes_in_use"])
    print(f"{result['ranks']} rank(s), {result['graphs']} graphs")
    print(f"  weights a rank {held['weight_bytes'] / 2**30:.3f} GiB; in use {in_use} GiB")
    print(f"  KV cache a rank {held['kv_cache_bytes'] / 2**30:.2f} GiB", end="")
    print(f", {held['kv_cache_tokens']:,} tokens")
    for name, row in result["workloads"].items():
        print(f"  {name}: {row['tokens_per_second']:,.1f} tok/s", end="")
        print(f" ({row['slowest']:,.1f} to {row['fastest']:,.1f})")
    for step in result["decode_step"]:
        share = f", all-reduce {step['share']:.0%}" if "share" in step else ""
        print(f"  a decode step of {step['rows']} rows: {1e3 * step['seconds']:.3f} ms{share}")
