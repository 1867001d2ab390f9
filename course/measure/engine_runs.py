"""Run the reference workloads on the engine, count every token, and set the times beside a floor.

The order: start the engine and time its first token; warm up; run each workload several times;
close the engine; measure the device's read bandwidth and matrix rate in the memory that is free
again. On a GPU each workload's first run is one more warm-up, and is not in the summary.
"""

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import Any

from course import machine
from course.measure.roofline import Peaks, Work, count_work, measure_peaks
from course.measure.workloads import PLAIN, SAMPLING, Workload, make_workload, number_runs

MAX_MODEL_LEN = 4096
ON_GPU = {"max_num_seqs": 512, "max_num_batched_tokens": 16_384}
SCALE_ON_CPU = 1 / 8
WARM_UP = {"cuda": 16, "cpu": 2}  # requests, of very different lengths
EVERY_REQUEST = {"ignore_eos": True, "detokenize": False}


def measure(args: argparse.Namespace, names: list[str], start: float) -> dict[str, Any]:
    """All that is printed and recorded. start: when the command began, by time.perf_counter."""
    import torch

    cuda = torch.cuda.is_available()
    scale = args.scale or (1.0 if cuda else SCALE_ON_CPU)
    before = time.perf_counter()
    model = model_for(args.model, cuda)
    start += time.perf_counter() - before  # making the model is not part of the engine's start
    options = engine_options(args, round(scale * MAX_MODEL_LEN), cuda)
    llm, first_token = start_engine(model, options, start)
    with llm:
        engine = llm.llm_engine
        config, device = engine.model_config, engine.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        warm_up(llm, scale)
        all_runs = run_workloads(llm, names, args.runs, scale)
        memory = peak_memory(device)
    peaks = measure_peaks(device, config.dtype)
    return {
        **describe_engine(engine, model, options),
        "scale": scale,
        "start_to_first_token_seconds": first_token,
        "peak_memory_bytes": memory,
        "peaks": {"read_bytes_per_second": peaks.bandwidth, "flops_per_second": peaks.flops},
        "workloads": {
            name: {
                "sampling": SAMPLING[name],
                **summarise([describe_run(run, peaks) for run in runs], device.type == "cuda"),
            }
            for name, runs in all_runs.items()
        },
    }


def describe_engine(engine: Any, model: str, options: dict[str, Any]) -> dict[str, Any]:
    """What every record says of the engine and the machine it ran on."""
    return {
        "model": without_folder(model),
        "machine": machine.describe(str(engine.device)),
        "dtype": str(engine.model_config.dtype).removeprefix("torch."),
        "versions": machine.versions(),
        "engine": {name: without_folder(value) for name, value in options.items()},
    }


def without_folder(value: Any) -> Any:
    """Of a path on this machine its last part; anything else as it is."""
    return Path(value).name if isinstance(value, str) and Path(value).exists() else value


def model_for(named: str | None, cuda: bool) -> str:
    """The model named; else on a GPU the random one, on a CPU the course's own."""
    from course.models.choice import pick_model
    from course.models.random_model import random_model_dir

    return str(random_model_dir()) if cuda and not named else pick_model(named)


def engine_options(args: argparse.Namespace, max_model_len: int, cuda: bool) -> dict[str, Any]:
    """The arguments of LLM: the workloads' limits, then what the command line asks for."""
    options: dict[str, Any] = {"dtype": args.dtype, "max_model_len": max_model_len}
    if cuda:
        options |= ON_GPU
    if args.max_num_seqs:
        options["max_num_seqs"] = args.max_num_seqs
    options["attention_backend"] = args.attention_backend
    options["enforce_eager"] = args.enforce_eager
    return options | dict(args.engine)


def start_engine(model: str, options: dict[str, Any], start: float) -> tuple[Any, float]:
    """The engine, and the seconds from `start` to its first token: imports, loading, capturing."""
    from nanovllm import LLM, SamplingParams

    llm = LLM(model, use_tqdm_on_load=False, **options)
    llm.generate(
        [[1, 2, 3]], SamplingParams(max_tokens=1, **PLAIN, **EVERY_REQUEST), use_tqdm=False
    )
    return llm, time.perf_counter() - start


def warm_up(llm: Any, scale: float, sampling: dict[str, Any] = PLAIN) -> None:
    """Prompts and outputs of mixed lengths, twice: what is compiled on first use is compiled."""
    rng, vocab_size = random.Random(1), llm.llm_engine.model_config.vocab_size
    count = WARM_UP[llm.llm_engine.device.type]
    for _ in range(2):
        lengths = [max(1, round(scale * rng.randint(1, 1024))) for _ in range(count)]
        prompts = [rng.choices(range(vocab_size), k=length) for length in lengths]
        answer(llm, Workload(prompts, [max(2, length // 8) for length in lengths]), sampling)


def run_workloads(
    llm: Any, names: list[str], runs: int, scale: float
) -> dict[str, list[dict[str, Any]]]:
    """Run each workload several times. Return each run's facts, without the machine's peaks."""
    vocab_size = llm.llm_engine.model_config.vocab_size
    return {
        name: [
            run_once(llm, make_workload(name, run, scale, vocab_size), SAMPLING[name])
            for run in numbers
        ]
        for name, numbers in number_runs(names, runs).items()
    }


def run_once(llm: Any, workload: Workload, sampling: dict[str, float]) -> dict[str, Any]:
    start = time.perf_counter()
    outputs = answer(llm, workload, sampling)
    seconds = time.perf_counter() - start
    engine = llm.llm_engine
    trace = [step for step in engine.trace if step.start_time >= start]
    lengths = {output.request_id: len(output.prompt_token_ids) for output in outputs}
    return {
        "requests": len(outputs),
        "prompt_tokens": sum(lengths.values()),
        "output_tokens": sum(workload.num_outputs),
        "seconds": seconds,
        "steps": len(trace),
        "tokens_computed": sum(step.num_tokens for step in trace),
        "cached_prompt_tokens": sum(output.metrics.num_cached_tokens for output in outputs),
        "preempted_tokens": sum(output.metrics.num_preempted_tokens for output in outputs),
        "ttft": [output.metrics.ttft for output in outputs],
        "tpot": [output.tpot for output in outputs if output.tpot is not None],
        "work": count_work(engine.model_config, trace, lengths, workload.shared_prefix),
    }


def answer(llm: Any, workload: Workload, sampling: dict[str, Any] = PLAIN) -> list[Any]:
    """Answer every prompt; RuntimeError unless each got exactly the tokens it was to get."""
    from nanovllm import SamplingParams

    fields = {**sampling, **EVERY_REQUEST}
    params = [SamplingParams(max_tokens=count, **fields) for count in workload.num_outputs]
    prompts = [{"prompt_token_ids": prompt} for prompt in workload.prompts]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    check_counts(workload.num_outputs, [len(output.outputs[0].token_ids) for output in outputs])
    return outputs


def check_counts(wanted: list[int], got: list[int]) -> None:
    """RuntimeError if a request is missing or has another number of tokens than it was to get."""
    if len(got) != len(wanted):
        raise RuntimeError(f"{len(wanted)} requests were made, {len(got)} were answered")
    wrong = [(i, w, g) for i, (w, g) in enumerate(zip(wanted, got, strict=True)) if w != g]
    if wrong:
        index, want, count = wrong[0]
        raise RuntimeError(
            f"{len(wrong)} of {len(wanted)} requests got a wrong number of tokens; the first, "
            f"request {index}, was to get {want} and got {count}"
        )


def peak_memory(device: Any) -> dict[str, int]:
    """On a GPU what torch held and what the whole device held; on a CPU what the process held."""
    import torch

    if device.type == "cpu":
        return {"process": machine.peak_resident_bytes()}
    free, total = torch.cuda.mem_get_info(device)
    return {"allocated": torch.cuda.max_memory_allocated(device), "device": total - free}


# -- numbers out of runs -----------------------------------------------------------------------


def describe_run(run: dict[str, Any], peaks: Peaks) -> dict[str, Any]:
    """A run's record: its lists and works become rates, quantiles and shares of the floor."""
    works: list[Work] = run["work"]
    kept = {name: value for name, value in run.items() if name not in ("work", "ttft", "tpot")}
    seconds = run["seconds"]
    numbers = {"output_tokens_per_second": run["output_tokens"] / seconds}
    for suffix, shared in (("", False), ("_prefix_read_once", True)):
        num_bytes, floor = sum(w.num_bytes(shared) for w in works), peaks.seconds(works, shared)
        numbers |= {
            f"bytes{suffix}": num_bytes,
            f"bytes_per_second{suffix}": num_bytes / seconds,
            f"memory_seconds{suffix}": num_bytes / peaks.bandwidth,
            f"roofline_seconds{suffix}": floor,
            f"share_of_roofline{suffix}": floor / seconds,
        }
    numbers["flops"] = sum(work.flops for work in works)
    numbers["compute_seconds"] = numbers["flops"] / peaks.flops
    for name in ("ttft", "tpot"):
        if run[name]:
            numbers[f"{name}_median_seconds"] = statistics.median(run[name])
            numbers[f"{name}_p99_seconds"] = percentile(run[name], 99)
    return kept | numbers


def percentile(values: list[float], percent: int) -> float:
    """The smallest value that at least `percent` in a hundred do not exceed (nearest rank)."""
    rank = -(-len(values) * percent // 100)
    return sorted(values)[max(rank, 1) - 1]


def summarise(runs: list[dict[str, Any]], first_is_warm_up: bool) -> dict[str, Any]:
    """Each number's median over the runs that count, fastest and slowest, and the runs."""
    counted = runs[1:] if first_is_warm_up and len(runs) > 1 else runs
    speeds = [run["output_tokens_per_second"] for run in counted]
    return {
        "median": {name: statistics.median(run[name] for run in counted) for name in counted[0]},
        "slowest_tokens_per_second": min(speeds),
        "fastest_tokens_per_second": max(speeds),
        "warm_up_runs": len(runs) - len(counted),
        "runs": runs,
    }


# -- printing ----------------------------------------------------------------------------------

ROWS = (  # label, name in the summary's median, unit, format
    ("requests", "requests", 1, ",.0f"),
    ("prompt tokens", "prompt_tokens", 1, ",.0f"),
    ("  found in the cache", "cached_prompt_tokens", 1, ",.0f"),
    ("output tokens", "output_tokens", 1, ",.0f"),
    ("tokens computed", "tokens_computed", 1, ",.0f"),
    ("steps", "steps", 1, ",.0f"),
    ("seconds", "seconds", 1, ".3f"),
    ("roofline seconds", "roofline_seconds", 1, ".3f"),
    ("  if memory alone", "memory_seconds", 1, ".3f"),
    ("  if compute alone", "compute_seconds", 1, ".3f"),
    ("share of the roofline", "share_of_roofline", 0.01, ".1f"),
    ("read, GB/s at least", "bytes_per_second", 1e9, ",.1f"),
    ("TTFT, median ms", "ttft_median_seconds", 1e-3, ",.1f"),
    ("TTFT, p99 ms", "ttft_p99_seconds", 1e-3, ",.1f"),
    ("TPOT, median ms", "tpot_median_seconds", 1e-3, ",.2f"),
    ("TPOT, p99 ms", "tpot_p99_seconds", 1e-3, ",.2f"),
)


def print_report(report: dict[str, Any]) -> None:
    """The report as a table, a column a workload."""
    peaks, results = report["peaks"], report["workloads"]
    print(f"{report['model']}, {report['dtype']}, on {report['machine']}")
    if report["scale"] != 1:
        print(f"reduced: requests and lengths are {report['scale']:g} of the full workload's")
    print(
        f"measured here: reads {peaks['read_bytes_per_second'] / 1e9:,.1f} GB/s, "
        f"matrix product {peaks['flops_per_second'] / 1e12:,.2f} TFLOP/s"
    )
    memory = ", ".join(f"{n / 2**30:.2f} GiB ({k})" for k, n in report["peak_memory_bytes"].items())
    print(f"first token after {report['start_to_first_token_seconds']:.1f} s; peak memory {memory}")
    first = next(iter(results.values()))
    skipped = first["warm_up_runs"]
    print(f"median of {len(first['runs']) - skipped} runs, after {skipped} to warm up")
    print_row("", list(results))
    for label, name in (("temperature", "temperature"), ("  top-p", "top_p"), ("  top-k", "top_k")):
        print_row(label, [str(result["sampling"].get(name, "-")) for result in results.values()])
    medians = [result["median"] for result in results.values()]
    print_row("output tokens/s", [f"{m['output_tokens_per_second']:,.1f}" for m in medians])
    print_row("  slowest to fastest", [spread(result) for result in results.values()])
    for label, name, unit, style in ROWS:
        print_row(label, [format(m[name] / unit, style) if name in m else "-" for m in medians])
    if any(m["bytes"] != m["bytes_prefix_read_once"] for m in medians):
        print("if what all prompts share were read once a step for all of them:")
        for label, name, unit, style in ROWS:
            if (name := f"{name}_prefix_read_once") in medians[0]:
                print_row(label, [format(m[name] / unit, style) for m in medians])
    print("Shares are in percent; course/measure/roofline.py says what is counted.")


def spread(result: dict[str, Any]) -> str:
    slowest, fastest = result["slowest_tokens_per_second"], result["fastest_tokens_per_second"]
    return f"{slowest:,.1f} to {fastest:,.1f}"


def print_row(label: str, cells: list[str], width: int = 22) -> None:
    print(f"  {label:<24}" + "".join(f"{cell:>{width}}" for cell in cells))
