"""What graphs, the overlapped loop and torch.compile buy: tokens a second at batch 1 and 256.

    course bench step_ladder --json figures/data/h100_step_ladder.json

Lesson 07's ladder, from a step that is launched kernel by kernel to one that is captured, planned
ahead, or compiled. Each engine first gives the greedy tokens of the first one, in float32, on the
course's own model. Then it runs the model that lessons measure, in a process of its own: what ran
before in one, a compiler or a profiler most of all, slows its launches. Its start there is timed
too, with kernels that an earlier process left on disk. On a GPU the kernels of one decode step of
one row are recorded, launched one by one and replayed.

A CPU captures nothing: there only the two loops are compared.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from course import machine
from course.measure.timing import measure
from course.models.choice import measured_model, own_model
from course.processes import spawned_safely
from nanovllm import LLM, SamplingParams

PROMPT = 64  # tokens
VARIANTS: dict[str, dict[str, Any]] = {
    "launched one by one, plain loop": {"enforce_eager": True, "async_scheduling": False},
    "launched one by one, overlapped": {"enforce_eager": True},
    "captured, plain loop": {"async_scheduling": False},
    "captured, overlapped": {},
    "captured, overlapped, torch.compile": {"enable_torch_compile": True},
}
GROUPS = {  # part of a kernel's name -> what it does; the first that fits
    "decode_attention": "attention",
    "merge_partials": "attention",
    "shared_prefix": "attention",
    "plan_kernel": "attention",
    "rope": "RoPE and store",
    "norm": "norm, gate",
    "silu": "norm, gate",
    "sample": "sampling",
    "argmax": "sampling",
    "matvec": "product",
    "gemm": "product",
    "gemv": "product",
    "cutlass": "product",
    "nvjet": "product",
    "splitk": "product",
}


def ladder(args: argparse.Namespace) -> dict[str, Any]:
    """All that is recorded; each part is printed as soon as it is known."""
    cuda = torch.cuda.is_available()
    names = [name for name in VARIANTS if cuda or "captured" not in name]
    model = args.model or str(measured_model().path)
    report: dict[str, Any] = {
        "machine": machine.describe("cuda" if cuda else "cpu"),
        "versions": machine.versions(),
        "model": Path(model).name,
        "prompt_tokens": PROMPT,
        "output_tokens": args.tokens,
        "rows": [],
        "timelines": {},
    }
    alone(prepare, model, names, max(args.batches))
    for name in names:
        row = {"name": name, "options": VARIANTS[name]} | alone(measured, model, name, args)
        report["rows"].append(row)
        print(json.dumps(row), flush=True)
        if cuda and "plain" in name:
            report["timelines"][name] = alone(timeline, model, name)
    return report


def alone(function: Callable, *args: Any) -> Any:
    """What the function returns in a process of its own."""
    with spawned_safely(), ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def prepare(model: str, names: list[str], batch: int) -> None:
    """Check every variant's tokens, and start each once: its kernels are on disk from then on."""
    check_tokens(names)
    for name in names:
        engine(model, name, batch).close()


def check_tokens(names: list[str]) -> None:
    """Every variant's greedy tokens are the first one's, in float32 on the course's own model."""
    params = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True)
    answers = {}
    for name in names:
        options = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 2, **VARIANTS[name]}
        with LLM(str(own_model()), use_tqdm_on_load=False, **options) as llm:
            outputs = llm.generate(["Once upon a time", "The fox"], params, use_tqdm=False)
        answers[name] = [output.outputs[0].token_ids for output in outputs]
        if answers[name] != answers[names[0]]:
            raise RuntimeError(f"{name}: its greedy tokens are not those of {names[0]}")


def measured(model: str, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds to start, and tokens a second by batch: the median run, the slowest, the fastest."""
    start = time.perf_counter()
    rates = {}
    with engine(model, name, max(args.batches)) as llm:
        seconds_to_start = time.perf_counter() - start
        for batch in args.batches:
            prompts, params = requests(llm, batch, args.tokens)
            timing = measure(
                lambda p=prompts, s=params: llm.generate(p, s, use_tqdm=False), args.runs
            )
            total = batch * args.tokens
            rates[str(batch)] = [total / t for t in (timing.median, timing.highest, timing.lowest)]
    return {"seconds_to_start": seconds_to_start, "tokens_per_second": rates}


def engine(model: str, name: str, batch: int) -> LLM:
    options = {"max_model_len": 1024, "max_num_seqs": batch, **VARIANTS[name]}
    return LLM(model, enable_prefix_caching=False, use_tqdm_on_load=False, **options)


def requests(llm: LLM, batch: int, tokens: int) -> tuple[list[list[int]], SamplingParams]:
    rng = random.Random(0)
    vocab_size = llm.llm_engine.model_config.vocab_size
    prompts = [[rng.randrange(vocab_size) for _ in range(PROMPT)] for _ in range(batch)]
    return prompts, SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True)


# -- one step, kernel by kernel --------------------------------------------------------------------


def timeline(model: str, name: str) -> dict[str, Any]:
    """The kernels of one decode step of one row: group, start and duration in µs."""
    from torch.profiler import ProfilerActivity, profile

    with engine(model, name, batch=1) as llm:
        llm.llm_engine.add([llm.llm_engine.make_request("0", *both(requests(llm, 1, 32)))])
        for _ in range(12):
            llm.llm_engine.advance()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            for _ in range(3):
                llm.llm_engine.advance()
            torch.cuda.synchronize()
        steps = [record.end_time - record.start_time for record in llm.llm_engine.trace[-3:]]
    kernels = sorted(kernels_of(profiler))
    third = kernels[len(kernels) // 3 : 2 * len(kernels) // 3]  # the middle one of three steps
    first = third[0][0]
    rows = [[group_of(label), round(t - first, 2), round(d, 2)] for t, d, label in third]
    span = third[-1][0] + third[-1][1] - first
    busy = covered((start, start + duration) for start, duration, _ in third)
    print(f"{name}: {len(rows)} kernels, busy {busy:.0f} of {span:.0f} µs", flush=True)
    return {"kernels": rows, "span_us": span, "busy_us": busy, "profiled_step_seconds": steps}


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Time in which something ran: kernels that begin before the last one has ended count once."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def both(pair: tuple[list[list[int]], SamplingParams]) -> tuple[list[int], SamplingParams]:
    prompts, params = pair
    return prompts[0], params


def kernels_of(profiler: Any) -> Iterator[tuple[float, float, str]]:
    """Start and duration [µs], and name, of everything that ran on the GPU."""
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            yield event.time_range.start, event.time_range.elapsed_us(), event.name


def group_of(kernel: str) -> str:
    """What a kernel does, by its name."""
    name = kernel.lower()
    return next((group for part, group in GROUPS.items() if part in name), "other")
