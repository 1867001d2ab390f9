"""`course bench serving`: its arrivals, its loops on a clock of its own, and its definitions."""

import json
import math
import random
import statistics
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import pytest

from course.benchmarks import serving
from course.benchmarks.serving import Lengths, Request, Served
from course.cli import main

LENGTHS = Lengths(prompt=(8, 3000), output=(1, 800))


# -- requests ------------------------------------------------------------------------------------


def test_lengths_are_log_uniform_between_their_limits():
    lengths = sorted(serving.log_uniform((8, 3000), 1000, random.Random(0)))
    assert 8 <= lengths[0] <= 9
    assert 2990 <= lengths[-1] <= 3000
    assert lengths[500] == pytest.approx(math.sqrt(8 * 3000), rel=0.01)
    assert statistics.mean(lengths) == pytest.approx((3000 - 8) / math.log(3000 / 8), rel=0.01)


def test_a_seed_shuffles_the_lengths_and_does_not_change_them():
    one, same, other = (
        serving.log_uniform((1, 800), 50, random.Random(seed)) for seed in (0, 0, 1)
    )
    assert one == same
    assert one != other
    assert sorted(one) == sorted(other)


def test_arrivals_are_a_poisson_process():
    count, rate = 40_000, 5.0
    times = serving.poisson_arrivals(rate, count, random.Random(0))
    gaps = [later - earlier for earlier, later in pairwise([0.0, *times])]
    assert times[-1] == pytest.approx(count / rate)
    assert min(gaps) > 0
    assert statistics.stdev(gaps) == pytest.approx(1 / rate, rel=0.03)  # exponential: as its mean
    assert sum(gap > 1 / rate for gap in gaps) / count == pytest.approx(math.exp(-1), abs=0.01)
    counts = Counter(int(time) for time in times)
    in_a_second = [counts[second] for second in range(int(times[-1]))]
    assert statistics.variance(in_a_second) == pytest.approx(rate, rel=0.1)


def test_arrivals_follow_their_seed():
    one, same, other = (
        serving.poisson_arrivals(2.0, 20, random.Random(seed)) for seed in (3, 3, 4)
    )
    assert one == same
    assert one != other
    faster = serving.poisson_arrivals(4.0, 20, random.Random(3))
    assert faster == pytest.approx([time / 2 for time in one])


def test_runs_share_lengths_and_no_prefix():
    times = [0.5, 1.0, 2.0]
    one, same, other = (
        serving.make_requests(name, times, LENGTHS, 300, seed=0) for name in ("a", "a", "b")
    )
    assert one == same
    assert [request.arrival for request in one] == times
    assert [r.num_output for r in one] == [r.num_output for r in other]
    for mine, theirs in zip(one, other, strict=True):
        assert len(mine.prompt) == len(theirs.prompt)
        assert mine.prompt[:8] != theirs.prompt[:8]
    assert len({r.request_id for r in one + other}) == 6


def test_the_closed_loop_has_requests_without_end():
    requests = serving.endless_requests(LENGTHS, 300, seed=0)
    taken = [next(requests) for _ in range(2 * serving.LENGTHS_AT_ONCE + 1)]
    assert len({request.request_id for request in taken}) == len(taken)
    assert len({tuple(request.prompt[:8]) for request in taken}) == len(taken)


# -- the loops, on a clock of their own ----------------------------------------------------------


class Clock:
    """Time that passes only when somebody sleeps or the engine computes."""

    def __init__(self):
        self.now = 100.0
        self.slept = []

    def perf_counter(self):
        return self.now

    monotonic = perf_counter

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


class OneSecondEngine:
    """Gives `width` requests a token each in a step of one second, first come first served."""

    def __init__(self, clock, width):
        self.clock, self.width = clock, width
        self.sequences, self.added, self.most = {}, [], 0

    def add_request(self, request_id, prompt, params):
        metrics = SimpleNamespace(first_token_ts=0.0, last_token_ts=0.0)
        self.sequences[request_id] = SimpleNamespace(
            request_id=request_id,
            metrics=metrics,
            params=params,
            outputs=[SimpleNamespace(token_ids=[])],
            finished=False,
            tpot=None,
        )
        self.added.append((request_id, self.clock.now))
        self.most = max(self.most, len(self.sequences))

    def has_unfinished_requests(self):
        return bool(self.sequences)

    def step(self):
        assert self.sequences, "a step without requests"
        self.clock.now += 1.0
        running = list(self.sequences.values())[: self.width]
        for seq in running:
            ids = seq.outputs[0].token_ids
            ids.append(7)
            seq.metrics.first_token_ts = seq.metrics.first_token_ts or self.clock.now
            seq.finished = len(ids) == seq.params.max_tokens
            if seq.finished:
                seq.metrics.last_token_ts = self.clock.now
                if len(ids) > 1:
                    seq.tpot = (self.clock.now - seq.metrics.first_token_ts) / (len(ids) - 1)
                del self.sequences[seq.request_id]
        return running

    def abort_request(self, request_ids):
        for request_id in request_ids:
            del self.sequences[request_id]


@pytest.fixture
def clock(monkeypatch):
    fake = Clock()
    monkeypatch.setattr(serving, "time", fake)
    return fake


def test_times_count_from_the_arrival_and_so_include_the_queue(clock):
    """One request at a time: the second waits in the queue, the third finds an idle engine."""
    requests = [
        Request("a", 0.0, [1, 2, 3], 2),
        Request("b", 0.25, [4], 2),
        Request("c", 6.0, [5, 6], 1),
    ]
    results, duration = serving.open_loop(OneSecondEngine(clock, width=1), requests)
    assert results == [
        Served(num_prompt=3, num_output=2, ttft=1.0, tpot=1.0, e2el=2.0),
        Served(num_prompt=1, num_output=2, ttft=2.75, tpot=1.0, e2el=3.75),
        Served(num_prompt=2, num_output=1, ttft=1.0, tpot=None, e2el=1.0),
    ]
    assert duration == 7.0


def test_requests_are_added_before_the_step_and_the_loop_sleeps_only_when_idle(clock):
    engine = OneSecondEngine(clock, width=8)
    requests = [
        Request("a", 0.5, [1], 3),
        Request("b", 1.0, [1], 1),
        Request("c", 2.5, [1], 1),
        Request("d", 9.0, [1], 1),
    ]
    serving.open_loop(engine, requests)
    assert engine.added == [("a", 100.5), ("b", 101.5), ("c", 102.5), ("d", 109.0)]
    assert clock.slept == [0.5, 5.5]


def test_the_closed_loop_keeps_its_concurrency_and_counts_its_second_half(clock):
    engine = OneSecondEngine(clock, width=3)
    source = serving.endless_requests(Lengths((1, 4), (1, 5)), 300, seed=0)
    assert serving.closed_loop(engine, source, concurrency=5, seconds=20.0) == 3.0
    assert engine.most == 5
    assert not engine.sequences


def test_a_step_longer_than_the_closed_loop_is_no_division_by_zero(clock):
    source = serving.endless_requests(Lengths((1, 4), (1, 5)), 300, seed=0)
    assert serving.closed_loop(OneSecondEngine(clock, 2), source, 2, seconds=0.1) == 2.0


def test_every_request_is_sampled_as_qwen3_asks(clock):
    engine = OneSecondEngine(clock, 1)
    serving.add(engine, Request("a", 0.0, [1], 5))
    params = engine.sequences["a"].params
    assert (params.temperature, params.top_p, params.top_k) == (0.6, 0.95, 20)
    assert (params.max_tokens, params.ignore_eos) == (5, True)


def test_a_request_that_got_too_few_tokens_is_found_out(clock):
    output = SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1, 2])])
    with pytest.raises(RuntimeError, match="was to get 3 and got 2"):
        serving.served(Request("a", 0.0, [1], 3), {"a": output}, 0.0)


# -- definitions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        ({"ttft": 200.0, "tpot": 20.0}, True),
        ({"ttft": 199.0, "tpot": 20.0}, False),
        ({"ttft": 200.0, "tpot": 19.0}, False),
        ({"e2el": 999.0}, False),
        ({"e2el": 1000.0}, True),
        ({}, True),
    ],
)
def test_a_request_meets_a_service_level_if_no_time_is_over_its_limit(slo, good):
    assert Served(10, 41, ttft=0.2, tpot=0.02, e2el=1.0).meets(slo) is good


def test_a_single_token_has_no_tpot_and_meets_any():
    assert Served(10, 1, ttft=0.2, tpot=None, e2el=0.2).meets({"ttft": 200.0, "tpot": 1e-9})


def test_the_summary_has_the_numbers_of_vllm():
    """Ten requests of 100 tokens in; TTFT 10 to 100 ms; the first has one token, so no TPOT."""
    results = [Served(100, 1, 0.01, None, 0.01)]
    results += [Served(100, 11, i / 100, i / 1000, i / 100 + i / 100) for i in range(2, 11)]
    slo = {"ttft": 80.0, "tpot": 7.0}
    numbers = serving.summarise(4.0, results, 2.0, slo)
    assert numbers["request_rate"] == 4.0
    assert numbers["completed"] == 10
    assert numbers["request_throughput"] == 5.0
    assert numbers["request_goodput"] == 3.5  # the first seven, in two seconds
    assert numbers["share_that_meets_slo"] == 0.7
    assert (numbers["total_input_tokens"], numbers["total_output_tokens"]) == (1000, 100)
    assert numbers["output_throughput"] == 50.0
    assert numbers["total_token_throughput"] == 550.0
    expected = {"mean_ttft_ms": 55, "median_ttft_ms": 55, "p90_ttft_ms": 90, "p99_ttft_ms": 100}
    expected |= {"mean_tpot_ms": 6, "median_tpot_ms": 6, "p90_tpot_ms": 10, "p99_tpot_ms": 10}
    expected |= {"median_e2el_ms": 110, "p90_e2el_ms": 180, "p99_e2el_ms": 200}
    for name, value in expected.items():
        assert numbers[name] == pytest.approx(value), name


def test_without_a_second_token_there_is_no_tpot_to_report():
    numbers = serving.summarise(1.0, [Served(5, 1, 0.1, None, 0.1)], 1.0, {"ttft": 1.0})
    assert not [name for name in numbers if "tpot" in name]


# -- a whole run ---------------------------------------------------------------------------------


def bench(model, file, *more):
    arguments = ["bench", "serving", "--model", str(model), "--scale", "1/32", *more]
    assert main([*arguments, "--max-num-seqs", "4", "--json", str(file)]) == 0
    return json.loads(file.read_text())


def test_given_rates_on_a_tiny_model(tiny_model, tmp_path, capsys):
    more = ("--rates", "20,40", "--seconds", "0.5", "--goodput", "ttft:60000", "e2el:60000")
    record = bench(tiny_model(), tmp_path / "record.json", *more)
    assert {"machine", "versions", "command", "dtype", "engine"} <= set(record)
    assert (record["prompt_tokens"], record["output_tokens"]) == ([1, 94], [1, 25])
    assert record["goodput"] == {"ttft": 60000.0, "e2el": 60000.0}
    for row, rate, count in zip(record["rates"], (20, 40), (10, 20), strict=True):
        assert (row["request_rate"], row["completed"]) == (rate, count)
        outputs = serving.log_uniform((1, 25), count, random.Random(0))
        assert row["total_output_tokens"] == sum(outputs)
        assert row["request_goodput"] == row["request_throughput"]
        assert 0 < row["median_ttft_ms"] <= row["p90_ttft_ms"] <= row["p99_ttft_ms"]
        assert row["share_of_capacity"] == rate / record["capacity_requests_per_second"]
    text = capsys.readouterr().out
    assert "temperature 0.6, top_p 0.95, top_k 20" in text
    assert "goodput: ttft 60000 ms, e2el 60000 ms" in text


def test_the_default_rates_are_fractions_of_the_capacity(tiny_model, tmp_path):
    record = bench(tiny_model(), tmp_path / "record.json", "--seconds", "0.2")
    assert [row["share_of_capacity"] for row in record["rates"]] == pytest.approx(serving.FRACTIONS)
    assert record["goodput"] == serving.GOODPUT["cpu"]
