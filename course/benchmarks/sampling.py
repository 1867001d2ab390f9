"""Compare kinds of sampling: measure how much each filter costs over temperature alone.

One engine answers the same number of requests with each setting in turn, round after round, so that
a machine that slows down slows every setting alike. Each round therefore gives one ratio to plain
temperature, and the report shows the median and the range of these ratios. The first round is a
warm-up and is not counted. Every run has prompts of its own, because a prompt that another setting
has already answered would come from the prefix cache.
"""

import argparse
import random
import statistics
import time
from typing import Any

from course.measure import engine_runs as workload_bench
from course.measure.workloads import PLAIN, QWEN3, Workload

# The fields of SamplingParams that a row of the table sets. To measure another parameter, add a
# row; every ratio is to the first one.
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "greedy": {"temperature": 0.0},
    "top-k-20": PLAIN | {"top_k": 20},
    "top-k-50": PLAIN | {"top_k": 50},
    "top-p": PLAIN | {"top_p": 0.95},
    "min-p": PLAIN | {"min_p": 0.05},
    "qwen3": QWEN3,
    "all-three": QWEN3 | {"min_p": 0.05},
    "logprobs-5": PLAIN | {"logprobs": 5},
    "penalties": PLAIN
    | {"repetition_penalty": 1.1, "frequency_penalty": 0.5, "presence_penalty": 0.5},
    "logit-bias": PLAIN | {"logit_bias": dict.fromkeys(range(100), 1.0)},
    "allowed-ids": PLAIN | {"allowed_token_ids": [*range(100)]},
}
BASE = next(iter(SETTINGS))
PROMPT_TOKENS, OUTPUT_TOKENS = 64, 128
SCALE_ON_CPU = 1 / 2  # of both lengths
BATCH_SIZES = {"cuda": [1, 16, 64, 256], "cpu": [1, 8]}


def measure(args: argparse.Namespace, start: float) -> dict[str, Any]:
    """All that is printed and recorded. start: when the command began, by time.perf_counter."""
    import torch

    cuda = torch.cuda.is_available()
    scale = args.scale or (1.0 if cuda else SCALE_ON_CPU)
    lengths = [max(2, round(scale * count)) for count in (PROMPT_TOKENS, OUTPUT_TOKENS)]
    batch_sizes = args.batch_sizes or BATCH_SIZES["cuda" if cuda else "cpu"]
    names = [name for name in SETTINGS if name in {BASE, *(args.settings or SETTINGS)}]
    model = workload_bench.model_for(args.model, cuda)
    longest = workload_bench.MAX_MODEL_LEN if cuda else sum(lengths)
    options = workload_bench.engine_options(args, longest, cuda)
    llm, _ = workload_bench.start_engine(model, options, start)
    with llm:
        rng = random.Random(0)
        seconds = {
            size: take_turns(llm, names, size, lengths, args.runs + 1, rng) for size in batch_sizes
        }
        return {
            **workload_bench.describe_engine(llm.llm_engine, model, options),
            "prompt_tokens": lengths[0],
            "output_tokens": lengths[1],
            "warm_up_rounds": 1,
            "settings": {name: SETTINGS[name] for name in names},
            "batch_sizes": {
                str(size): summarise(runs, size * lengths[1]) for size, runs in seconds.items()
            },
        }


def take_turns(
    llm: Any, names: list[str], size: int, lengths: list[int], rounds: int, rng: random.Random
) -> dict[str, list[float]]:
    """The seconds of every counted run of each setting, with `size` requests at once."""
    vocab_size = llm.llm_engine.model_config.vocab_size
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            prompts = [rng.choices(range(vocab_size), k=lengths[0]) for _ in range(size)]
            workload = Workload(prompts, [lengths[1]] * size)
            start = time.perf_counter()
            workload_bench.answer(llm, workload, SETTINGS[name])
            seconds[name].append(time.perf_counter() - start)
    return {name: runs[1:] for name, runs in seconds.items()}


def summarise(seconds: dict[str, list[float]], output_tokens: int) -> dict[str, Any]:
    """Compare each setting's speeds, in tokens per second, with the plain setting's speeds."""
    speeds = {name: [output_tokens / run for run in runs] for name, runs in seconds.items()}
    return {name: beside_plain(runs, speeds[BASE]) for name, runs in speeds.items()}


def beside_plain(runs: list[float], plain: list[float]) -> dict[str, Any]:
    """One setting's median speed, and its ratios to the plain speed of the same round."""
    ratios = [own / other for own, other in zip(runs, plain, strict=True)]
    return {
        "output_tokens_per_second": statistics.median(runs),
        "ratio": statistics.median(ratios),
        "lowest_ratio": min(ratios),
        "highest_ratio": max(ratios),
        "runs": runs,
    }


# -- printing ----------------------------------------------------------------------------------


def print_report(report: dict[str, Any]) -> None:
    """Two tables, of speeds and of ratios, with a row a setting and a column a batch size."""
    results = report["batch_sizes"]
    rounds = len(next(iter(results.values()))[BASE]["runs"])
    print(f"{report['model']}, {report['dtype']}, on {report['machine']}")
    print(
        f"{report['prompt_tokens']} tokens in and {report['output_tokens']} out a request; median "
        f"of {rounds} rounds after one to warm up (slowest to fastest)"
    )
    for title, cell in (
        ("output tokens/s", speed_cell),
        (f"as a ratio to {BASE} in the same round", ratio_cell),
    ):
        print(title)
        workload_bench.print_row("requests", list(results), 30)
        for name in report["settings"]:
            cells = [cell(result[name]) for result in results.values()]
            workload_bench.print_row(name, cells, 30)
    for name, fields in report["settings"].items():
        print(f"  {name}: " + ", ".join(f"{field} {shown(fields[field])}" for field in fields))


def shown(value: Any) -> str:
    """A parameter's value in the report: a number, or how many tokens the parameter names."""
    return f"{value:g}" if isinstance(value, int | float) else f"of {len(value)} tokens"


def speed_cell(result: dict[str, Any]) -> str:
    runs = result["runs"]
    return f"{result['output_tokens_per_second']:,.0f} ({min(runs):,.0f} to {max(runs):,.0f})"


def ratio_cell(result: dict[str, Any]) -> str:
    return f"{result['ratio']:.3f} ({result['lowest_ratio']:.3f} to {result['highest_ratio']:.3f})"
