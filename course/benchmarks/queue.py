"""What the host does for a step and for an add, however many requests are queued.

The engine is a real one, but its model computes nothing: each row gets a fixed token at once. What
is left is the host's own work: to check a request, to queue it, to plan a step, to take in its
tokens and to tell the caller. None of it may grow with the number of requests that wait.

The time is the thread's own CPU time, so that other programs on the machine disturb it little. An
add and a step are each given as the median and the mean over those that were measured. The mean
includes Python's garbage collector, whose rare full passes look at every object there is. The last
row is a step while the head of the queue, a prompt of the model's full length that the prefix cache
holds in part, waits for blocks.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from course import machine

COUNTS = (100, 10_000, 100_000)  # requests that are queued
ROWS, PROMPT, OUTPUT = 64, 32, 48  # of the running batch; tokens
STEPS = 40  # measured, after the prompts of the first batch
ADDS = 50  # measured, on top of those that are queued


class NoModel:
    """A runner whose every row samples token 1, at once."""

    graph_runner = SimpleNamespace(graphs={})

    def launch(self, batch: Any) -> "NoModel":
        tokens = NoModel()
        tokens.num_sampled = sum(row.samples for row in batch)
        return tokens

    num_sampled = 0
    logprobs = prompt_logprobs = None

    def read(self) -> list[int]:
        return [1] * self.num_sampled


def start(model: str | None, num_blocks: int = 2 * ROWS * (PROMPT + OUTPUT) // 16) -> Any:
    """An engine without a model, for ROWS requests at once."""
    from course.serving import start_engine

    options: dict[str, Any] = {"max_num_seqs": ROWS, "async_scheduling": True}
    engine = start_engine(model=model, num_gpu_blocks_override=num_blocks, **options)
    engine.core.runner = NoModel()
    return engine


def request(engine: Any, name: str, number: int) -> dict[str, Any]:
    from nanovllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True)
    vocab_size = engine.model_config.vocab_size
    prompt = [(number * 7919 + i * i) % vocab_size for i in range(PROMPT)]
    return engine.make_request(name, prompt, params)


def seconds(calls: list[Callable[[], Any]]) -> dict[str, float]:
    """Median and mean microseconds of CPU time of the calls, made one after the other."""
    times = []
    for call in calls:
        begin = time.thread_time()
        call()
        times.append(1e6 * (time.thread_time() - begin))
    return {"median_us": statistics.median(times), "mean_us": statistics.fmean(times)}


def measure_queue(model: str | None, count: int) -> dict[str, Any]:
    """Queue `count` requests, then time adds and steps."""
    from nanovllm.frontend.streaming import Call

    engine = start(model)
    call = Call(engine)
    call.add([request(engine, "", number) for number in range(count)])
    more = [request(engine, f"more{i}", count + i) for i in range(min(ADDS, count))]
    add = seconds([lambda one=one: engine.add([one]) for one in more])
    engine.abort_request([one["request_id"] for one in more])
    while len(engine.core.scheduler.running) < min(ROWS, count):
        call.advance()
    step = seconds([call.advance] * STEPS)
    call.close()
    engine.close()
    return {"queued": count, "add": add, "step": step}


def measure_blocked(model: str | None) -> dict[str, Any]:
    """Steps of a few short requests, while a long prompt is the head of the queue."""
    from nanovllm import SamplingParams

    probe = start(model)
    longest = probe.model_config.max_position_embeddings
    probe.close()
    engine = start(model, num_blocks=longest // 16)
    prompt = [i * i % engine.model_config.vocab_size for i in range(longest - 2)]
    once = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    engine.add_request("warm", prompt[: longest // 2], once)
    while engine.has_unfinished_requests():
        engine.advance()
    engine.add([request(engine, f"{i}", 10_000 + i) for i in range(8)])
    engine.add_request("head", prompt, once)
    for _ in range(4):
        engine.advance()
    if not engine.core.scheduler.waiting:
        raise RuntimeError("the long prompt has been admitted; nothing is blocked")
    step = seconds([engine.advance] * (OUTPUT // 2))
    engine.close()
    return {"prompt_tokens": len(prompt), "step": step}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every number of queued requests. Return the report that is printed and recorded."""
    return {
        "machine": machine.describe("cpu"),
        "versions": machine.versions(),
        "rows": ROWS,
        "queues": [measure_queue(args.model, count) for count in COUNTS],
        "blocked": measure_blocked(args.model),
    }


def print_report(report: dict[str, Any]) -> None:
    """The report as a table, a line for each number of queued requests."""
    print(f"the host's work with {report['rows']} rows and no model, on {report['machine']}")
    print(f"{'queued':>10}{'add (median, mean)':>26}{'step (median, mean)':>28}")
    for row in report["queues"]:
        add, step = row["add"], row["step"]
        print(
            f"{row['queued']:>10,}{add['median_us']:>13,.0f}{add['mean_us']:>10,.0f} us"
            f"{step['median_us']:>15,.0f}{step['mean_us']:>10,.0f} us"
        )
    blocked = report["blocked"]
    print(
        f"8 rows, while a prompt of {blocked['prompt_tokens']:,} tokens waits: "
        f"{blocked['step']['median_us']:,.0f} us a step"
    )
