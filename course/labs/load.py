"""Requests that arrive over time: what a load does to throughput and to each user's wait.

engine = start(model, max_num_seqs=8)        # the engine as the stages have it, and a setting
point = offer(engine, workload, rate=20)     # 20 requests a second, at random moments
print(point.throughput, point.ttft, point.tpot)

`offer`'s clock is the engine's steps, measured, laid end to end; while no request is there, it
jumps to the next arrival instead of waiting for it. On a CPU a step's time is what its thread
computed, so that other programs do not lengthen the queue.
"""

import random
import statistics
import time
from collections.abc import Sequence as Many
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from course.measure.ladder_workload import LadderWorkload
from course.serving import queue, run, start_engine
from course.stages.paged import PLAIN
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.scheduler import Scheduler

# -- an engine to watch --------------------------------------------------------------------------


def start(
    model: str | Path, scheduler_class: type = Scheduler, device: str = "cpu", **options: Any
) -> LLMEngine:
    """The engine without prefix cache, graphs and overlap; options are those of `EngineArgs`."""
    return start_engine(
        model=str(model), scheduler_class=scheduler_class, device=device, **PLAIN | options
    )


def interrupted(engine: LLMEngine, prompt: list[int]) -> tuple[list[float], float]:
    """Two requests decode; after ten steps a third arrives, with this prompt.

    The seconds at which the first one's tokens came, and at which the newcomer's first one did,
    all counted from the arrival.
    """
    watched = queue(engine, "watched", [1] * 16, 40)
    queue(engine, "other", [2] * 16, 40)
    for _ in range(10):
        engine.advance()
    arrival = engine.trace[-1].end_time
    newcomer = queue(engine, "newcomer", prompt, 4)
    run(engine)
    moments = [r.end_time for r in engine.trace if watched.request_id in {row[0] for row in r.rows}]
    first = newcomer.metrics.first_token_ts
    return [moment - arrival for moment in moments], first - arrival


# -- load ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoadPoint:
    """What one arrival rate gave."""

    rate: float  # requests a second that arrived
    throughput: float  # output tokens a second
    ttft: float  # seconds from arrival to first token, the mean of all requests
    tpot: float  # seconds a token after the first, the mean of all requests

    @property
    def power(self) -> float:
        """Throughput for each second of waiting for a first token: greatest at the knee."""
        return self.throughput / self.ttft


def arrivals(rate: float, count: int, seed: int = 0) -> list[float]:
    """The seconds at which requests arrive: gaps are independent, `1 / rate` on average."""
    rng = random.Random(seed)
    times = [0.0]
    while len(times) < count:
        times.append(times[-1] + rng.expovariate(rate))
    return times


def users(count: int = 24, seed: int = 5) -> LadderWorkload:
    """Requests of as many users: prompts of 16 to 64 random ids, answers of 8 to 16 tokens."""
    rng = random.Random(seed)
    texts = [rng.choices(range(1, 4000), k=rng.randint(16, 64)) for _ in range(count)]
    return LadderWorkload(texts, [rng.randint(8, 16) for _ in texts], 0)


def offer(engine: LLMEngine, workload: LadderWorkload, rate: float) -> LoadPoint:
    """Serve a workload whose requests arrive at `rate` a second."""
    times: list[list[float]] = [[] for _ in workload.prompts]  # of each token of each request
    arrive = arrivals(rate, len(times))
    now = time.thread_time if engine.device.type == "cpu" else time.perf_counter
    request_of, clock, added = {}, 0.0, 0
    while added < len(times) or engine.has_unfinished_requests():
        if not engine.has_unfinished_requests():
            clock = max(clock, arrive[added])
        while added < len(times) and arrive[added] <= clock:
            prompt, count = workload.prompts[added], workload.num_outputs[added]
            request_of[queue(engine, str(engine.num_requests), prompt, count)] = added
            added += 1
        begin = now()
        updated = engine.advance()
        clock += now() - begin
        for seq in updated:
            times[request_of[seq]].append(clock)
    return LoadPoint(
        rate=rate,
        throughput=sum(map(len, times)) / clock,
        ttft=statistics.mean(t[0] - a for t, a in zip(times, arrive, strict=True)),
        tpot=statistics.mean((t[-1] - t[0]) / (len(t) - 1) for t in times if len(t) > 1),
    )


def sweep(
    engine: LLMEngine, workload: LadderWorkload, shares: Many[float]
) -> tuple[float, list[LoadPoint]]:
    """The capacity in requests a second, all at once, and a point for each share of it."""
    everything = 1e9  # a second: all arrive together
    offer(engine, workload.first(8), everything)  # warms up
    full = offer(engine, workload, everything)
    capacity = len(workload.prompts) * full.throughput / workload.num_output_tokens
    return capacity, [offer(engine, workload, share * capacity) for share in shares]
