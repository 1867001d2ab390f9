"""Requests that arrive over time: what a load does to throughput and to each user's wait.

point = offer(engine, workload, rate=20)     # 20 requests a second, at random moments
print(point.throughput, point.ttft, point.tpot)

The clock is the engine's steps, measured, laid end to end; while no request is there, it jumps to
the next arrival instead of waiting for it.
"""

import random
import statistics
import time
from dataclasses import dataclass

from course.workload import LadderWorkload
from nanovllm.engine.sequence import Sequence
from nanovllm.llm_engine import LLMEngine
from nanovllm.sampling_params import SamplingParams


@dataclass(frozen=True)
class LoadPoint:
    """What one arrival rate gave."""

    rate: float  # requests a second that arrived
    throughput: float  # output tokens a second
    ttft: float  # seconds from arrival to first token, the mean of all requests
    tpot: float  # seconds a token after the first, the mean of all requests
    latency: float  # seconds from arrival to last token, the mean of all requests

    @property
    def power(self) -> float:
        """Throughput for each second a request takes: greatest at the knee (Kleinrock)."""
        return self.throughput / self.latency


def arrivals(rate: float, count: int, seed: int = 0) -> list[float]:
    """The seconds at which requests arrive: gaps are independent, `1 / rate` on average."""
    rng = random.Random(seed)
    times = [0.0]
    while len(times) < count:
        times.append(times[-1] + rng.expovariate(rate))
    return times


def offer(engine: LLMEngine, workload: LadderWorkload, rate: float) -> LoadPoint:
    """Serve a workload whose requests arrive at `rate` a second."""
    times: list[list[float]] = [[] for _ in workload.prompts]  # of each token of each request
    arrive = arrivals(rate, len(times))
    request_of, clock, added = {}, 0.0, 0
    while added < len(times) or engine.has_unfinished_requests():
        if not engine.has_unfinished_requests():
            clock = max(clock, arrive[added])
        while added < len(times) and arrive[added] <= clock:
            prompt, count = workload.prompts[added], workload.num_outputs[added]
            request_of[ask(engine, str(engine.num_requests), prompt, count)] = added
            added += 1
        begin = time.perf_counter()
        updated = engine.advance()
        clock += time.perf_counter() - begin
        for seq in updated:
            times[request_of[seq]].append(clock)
    return LoadPoint(
        rate=rate,
        throughput=sum(map(len, times)) / clock,
        ttft=statistics.mean(t[0] - a for t, a in zip(times, arrive, strict=True)),
        tpot=statistics.mean((t[-1] - t[0]) / (len(t) - 1) for t in times if len(t) > 1),
        latency=statistics.mean(t[-1] - a for t, a in zip(times, arrive, strict=True)),
    )


def ask(engine: LLMEngine, name: str, prompt: list[int], count: int) -> Sequence:
    """Queue one request: greedy, to exactly `count` tokens."""
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    [seq] = engine.add([engine.make_request(name, prompt, params)])
    return seq
