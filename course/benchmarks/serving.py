"""Measure the engine while requests come and go, at several request rates.

W1 to W5 hand over all requests at once, which tells the throughput and says little about how long a
user waits. Here requests arrive one by one, as a Poisson process, and each waits for its turn. One
thread drives `LLMEngine.add_request` and `step`: before each step it adds the requests whose
arrival time has come, and it sleeps only while the engine has nothing to do.

Prompts have 8 to 3,000 tokens and outputs 1 to 800, both log-uniform, sampled as Qwen3 asks
(temperature 0.6, top-p 0.95, top-k 20). A set of requests has exactly the quantiles of these
distributions, in an order that the seed shuffles, so that every rate has the same mean lengths.

First a closed loop keeps `max_num_seqs` requests in the engine. The tokens it gives in its second
half, divided by a request's mean output, are the capacity in requests a second. The loop warms up
the engine as well. The default rates are fractions of this capacity.

Names, and what they mean, follow vLLM's `vllm bench serve` (benchmark_serving). All times count
from a request's arrival time, so waiting in the queue is part of TTFT and of the latency (e2el).
Percentiles are nearest ranks. The duration, by which rates are divided, lasts until the last
request has finished; at a low load, throughput is therefore a little below the request rate.
"""

import argparse
import math
import random
import statistics
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from course.measure import engine_runs as workload_bench
from course.measure.workloads import QWEN3

PROMPT_TOKENS = (8, 3000)
OUTPUT_TOKENS = (1, 800)
FRACTIONS = (0.25, 0.5, 0.75, 0.9, 1.1)  # of the capacity: the default rates
SCALE_ON_CPU = 1 / 8  # of lengths
ON_CPU = {"max_num_seqs": 32}
SECONDS = {"cuda": 15.0, "cpu": 6.0}  # for which requests arrive, at each rate
GOODPUT = {  # the default service level, in milliseconds
    "cuda": {"ttft": 200.0, "tpot": 20.0},
    "cpu": {"ttft": 1000.0, "tpot": 100.0},
}
METRICS = ("ttft", "tpot", "e2el")
LENGTHS_AT_ONCE = 256  # requests of the closed loop that together have all quantiles


# -- requests ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """A prompt (token ids) that arrives at a time, in seconds, and gets num_output tokens."""

    request_id: str
    arrival: float
    prompt: list[int]
    num_output: int


@dataclass(frozen=True)
class Served:
    """One request's times in seconds from its arrival. tpot is None for a single token."""

    num_prompt: int
    num_output: int
    ttft: float
    tpot: float | None
    e2el: float

    def meets(self, slo: dict[str, float]) -> bool:
        """Whether no time is over its limit; slo: milliseconds by "ttft", "tpot" or "e2el"."""
        return all(1000 * (getattr(self, name) or 0.0) <= limit for name, limit in slo.items())


@dataclass(frozen=True)
class Lengths:
    """The shortest and the longest prompt and output, in tokens."""

    prompt: tuple[int, int]
    output: tuple[int, int]

    @classmethod
    def scaled(cls, scale: float) -> "Lengths":
        prompt, output = (
            (max(1, round(scale * low)), max(1, round(scale * high)))
            for low, high in (PROMPT_TOKENS, OUTPUT_TOKENS)
        )
        return cls(prompt, output)


def log_uniform(limits: tuple[int, int], count: int, rng: random.Random) -> list[int]:
    """`count` lengths from limits[0] to limits[1]: the quantiles of log-uniform, shuffled."""
    low, high = limits
    lengths = [round(low * (high / low) ** ((i + 0.5) / count)) for i in range(count)]
    rng.shuffle(lengths)
    return lengths


def poisson_arrivals(rate: float, count: int, rng: random.Random) -> list[float]:
    """The arrival times of `count` requests, in seconds; the last one arrives at count / rate.

    Gaps between arrivals are exponential, which makes a Poisson process. As in vLLM they are
    stretched to the wanted total, so that a short run has the rate it is said to have.
    """
    gaps = [rng.expovariate(1.0) for _ in range(count)]
    stretch, now, times = count / rate / sum(gaps), 0.0, []
    for gap in gaps:
        now += stretch * gap
        times.append(now)
    return times


def make_requests(
    name: str, times: list[float], lengths: Lengths, vocab_size: int, seed: int
) -> list[Request]:
    """One request for each arrival time; equal arguments make equal requests.

    name: of the run, which decides the token ids, so that no two runs share a prefix.
    """
    rng, ids = random.Random(seed), random.Random(f"{name} {seed}")
    prompts = log_uniform(lengths.prompt, len(times), rng)
    outputs = log_uniform(lengths.output, len(times), rng)
    return [
        Request(f"{name}-{i}", arrival, ids.choices(range(vocab_size), k=num_prompt), num_output)
        for i, (arrival, num_prompt, num_output) in enumerate(
            zip(times, prompts, outputs, strict=True)
        )
    ]


def endless_requests(lengths: Lengths, vocab_size: int, seed: int) -> Iterator[Request]:
    """Requests for the closed loop, which takes one whenever another has finished."""
    at_once = [0.0] * LENGTHS_AT_ONCE
    number = 0
    while True:
        yield from make_requests(f"closed-{number}", at_once, lengths, vocab_size, seed + number)
        number += 1


# -- driving the engine ------------------------------------------------------------------------


def add(engine: Any, request: Request) -> None:
    from nanovllm import SamplingParams

    fields = {**QWEN3, **workload_bench.EVERY_REQUEST}
    params = SamplingParams(max_tokens=request.num_output, **fields)
    engine.add_request(request.request_id, {"prompt_token_ids": request.prompt}, params)


def closed_loop(
    engine: Any, requests: Iterator[Request], concurrency: int, seconds: float
) -> float:
    """Keep `concurrency` requests in the engine; the output tokens/s of the second half."""
    for _ in range(concurrency):
        add(engine, next(requests))
    start = time.perf_counter()
    half, tokens, now = 0.0, 0, 0.0  # half: when the counting began
    while now < seconds or not tokens:  # one step may take longer than the whole loop was to
        outputs = engine.step()
        now = time.perf_counter() - start
        for _ in filter(lambda output: output.finished, outputs):
            add(engine, next(requests))
        if half:
            tokens += len(outputs)  # a step gives each of its requests one token
        elif now >= seconds / 2:
            half = now
    engine.abort_request(list(engine.sequences))
    return tokens / (now - half)


def open_loop(engine: Any, requests: list[Request]) -> tuple[list[Served], float]:
    """Serve requests as they arrive. Their times, in order, and the seconds until the last end."""
    waiting, outputs = deque(requests), {}
    start = time.monotonic()
    while waiting or engine.has_unfinished_requests():
        now = time.monotonic() - start
        while waiting and waiting[0].arrival <= now:
            add(engine, waiting.popleft())
        if engine.has_unfinished_requests():
            outputs |= {out.request_id: out for out in engine.step() if out.finished}
        else:
            time.sleep(max(0.0, waiting[0].arrival - (time.monotonic() - start)))
    duration = time.monotonic() - start
    return [served(request, outputs, start) for request in requests], duration


def served(request: Request, outputs: dict[str, Any], start: float) -> Served:
    """What became of a request. Its times count from its planned arrival, not from add_request."""
    output, arrival = outputs[request.request_id], start + request.arrival
    count = len(output.outputs[0].token_ids)
    workload_bench.check_counts([request.num_output], [count])
    first, last = output.metrics.first_token_ts, output.metrics.last_token_ts
    return Served(len(request.prompt), count, first - arrival, output.tpot, last - arrival)


# -- measuring ---------------------------------------------------------------------------------


def measure(args: argparse.Namespace, start: float) -> dict[str, Any]:
    """All that is printed and recorded. start: when the command began, by time.perf_counter."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    scale = args.scale or (1.0 if device == "cuda" else SCALE_ON_CPU)
    lengths = Lengths.scaled(scale)
    longest = lengths.prompt[1] + lengths.output[1]
    model = workload_bench.model_for(args.model, device == "cuda")
    options = workload_bench.engine_options(args, longest, device == "cuda")
    options = (ON_CPU if device == "cpu" else {}) | options
    seconds, slo = args.seconds or SECONDS[device], dict(args.goodput) or GOODPUT[device]
    llm, _ = workload_bench.start_engine(model, options, start)
    with llm:
        engine = llm.llm_engine
        workload_bench.warm_up(llm, scale, QWEN3)
        capacity = measure_capacity(engine, lengths, seconds, args.seed)
        rates = args.rates or [fraction * capacity for fraction in FRACTIONS]
        return {
            **workload_bench.describe_engine(engine, model, options),
            "sampling": QWEN3,
            "prompt_tokens": lengths.prompt,
            "output_tokens": lengths.output,
            "seed": args.seed,
            "seconds": seconds,
            "goodput": slo,
            "capacity_requests_per_second": capacity,
            "rates": [
                serve_at(engine, f"rate{number}", rate, lengths, seconds, args.seed, slo)
                | {"share_of_capacity": rate / capacity}
                for number, rate in enumerate(rates)
            ],
        }


def measure_capacity(engine: Any, lengths: Lengths, seconds: float, seed: int) -> float:
    """Requests a second that the engine can finish, however long they wait."""
    requests = endless_requests(lengths, engine.model_config.vocab_size, seed)
    speed = closed_loop(engine, requests, engine.args.max_num_seqs, seconds)
    quantiles = log_uniform(lengths.output, LENGTHS_AT_ONCE, random.Random(seed))
    return speed / statistics.mean(quantiles)


def serve_at(
    engine: Any,
    name: str,
    rate: float,
    lengths: Lengths,
    seconds: float,
    seed: int,
    slo: dict[str, float],
) -> dict[str, Any]:
    """One rate's record: requests arrive for `seconds`, and all of them are answered."""
    times = poisson_arrivals(rate, max(1, round(rate * seconds)), random.Random(seed))
    requests = make_requests(name, times, lengths, engine.model_config.vocab_size, seed)
    return summarise(rate, *open_loop(engine, requests), slo)


def summarise(
    rate: float, results: list[Served], duration: float, slo: dict[str, float]
) -> dict[str, Any]:
    """The numbers of one run, with vLLM's names. slo: milliseconds, as for Served.meets."""
    num_input = sum(result.num_prompt for result in results)
    num_output = sum(result.num_output for result in results)
    good = sum(result.meets(slo) for result in results)
    numbers: dict[str, Any] = {
        "request_rate": rate,
        "duration": duration,
        "completed": len(results),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(results) / duration,
        "request_goodput": good / duration,
        "share_that_meets_slo": good / len(results),
        "output_throughput": num_output / duration,
        "total_token_throughput": (num_input + num_output) / duration,
    }
    for metric in METRICS:
        values = [getattr(result, metric) for result in results]
        numbers |= quantiles(metric, [1000 * value for value in values if value is not None])
    return numbers


def quantiles(metric: str, values: list[float]) -> dict[str, float]:
    """mean_ttft_ms, median_ttft_ms and others, of values in milliseconds; none of no values."""
    if not values:
        return {}
    return {
        f"mean_{metric}_ms": statistics.mean(values),
        f"median_{metric}_ms": statistics.median(values),
        f"p90_{metric}_ms": workload_bench.percentile(values, 90),
        f"p99_{metric}_ms": workload_bench.percentile(values, 99),
    }


# -- arguments ---------------------------------------------------------------------------------


def service_level(text: str) -> tuple[str, float]:
    """`ttft:200` -> ("ttft", 200.0), a limit in milliseconds, as vLLM's --goodput has it."""
    name, _, written = text.partition(":")
    try:
        limit = float(written)
    except ValueError:
        limit = math.nan  # which the next line refuses
    if name not in METRICS or not 0 < limit < math.inf:
        raise argparse.ArgumentTypeError(
            f"must be ttft:MS, tpot:MS or e2el:MS with a limit above 0, got {text!r}"
        )
    return name, limit


# -- printing ----------------------------------------------------------------------------------

ROWS = (  # label, name in a rate's record, format
    ("offered requests/s", "request_rate", ",.2f"),
    ("  of the capacity", "share_of_capacity", ".2f"),
    ("served requests/s", "request_throughput", ",.2f"),
    ("goodput, requests/s", "request_goodput", ",.2f"),
    ("  share that meets it", "share_that_meets_slo", ".3f"),
    ("output tokens/s", "output_throughput", ",.0f"),
    ("requests", "completed", ",.0f"),
    ("seconds", "duration", ",.1f"),
    *(
        (f"{label}, {quantile} ms", f"{quantile}_{metric}_ms", ",.1f")
        for label, metric in zip(("TTFT", "TPOT", "latency"), METRICS, strict=True)
        for quantile in ("median", "p90", "p99")
    ),
)


def print_report(report: dict[str, Any]) -> None:
    """The report as a table, with a column for each rate."""
    (least, most), (fewest, longest) = report["prompt_tokens"], report["output_tokens"]
    sampling = ", ".join(f"{name} {value:g}" for name, value in report["sampling"].items())
    limits = ", ".join(f"{name} {limit:g} ms" for name, limit in report["goodput"].items())
    print(f"{report['model']}, {report['dtype']}, on {report['machine']}")
    print(f"Poisson arrivals for {report['seconds']:g} s a rate, seed {report['seed']}; {sampling}")
    print(f"prompts of {least} to {most:,} tokens, outputs of {fewest} to {longest}, log-uniform")
    print(f"capacity {report['capacity_requests_per_second']:,.2f} requests/s; goodput: {limits}")
    for label, name, style in ROWS:
        cells = [format(row[name], style) if name in row else "-" for row in report["rates"]]
        workload_bench.print_row(label, cells, 12)
