"""What lesson 05 draws and measures: counts of rows and tokens, charts, and loads."""

import itertools
import statistics

import pytest

from course.drawings import schedule_pictures as pictures
from course.labs.load import LoadPoint, arrivals, interrupted, offer, start, sweep
from course.measure.ladder_workload import LadderWorkload, ladder_workload
from course.serving import queue, run
from course.stages import ContinuousBatching

STATIC = [[("A", 0, 3), ("B", 0, 2)], [("A", 3, 1)], [("A", 4, 1)], [("C", 0, 2)], [("C", 2, 1)]]
PREEMPTED = [[("A", 0, 2), ("B", 0, 2)], [("A", 2, 1)], [("B", 0, 3)], [("B", 3, 1)]]
SMALL = {"num_gpu_blocks_override": 16, "max_model_len": 128}


def test_idle_rows_are_those_of_a_step_that_compute_nothing() -> None:
    assert pictures.num_idle(STATIC, rows=2) == 10 - 6


def test_tokens_computed_again_are_counted_once_each() -> None:
    assert pictures.num_again(STATIC) == 0
    assert pictures.num_again(PREEMPTED) == 2  # B's third token is new


def test_what_a_request_does_in_each_step() -> None:
    table = pictures.kinds(PREEMPTED, {"A": 2, "B": 2})
    assert [cells.get("A") for cells in table] == [("prompt", 2), ("answer", 1), None, None]
    assert [cells["B"][0] for cells in table] == ["prompt", "waits", "again", "answer"]


def test_a_request_keeps_its_row_and_the_next_one_takes_a_free_row() -> None:
    steps = [[("A", 0, 1), ("B", 0, 1)], [("B", 1, 1), ("C", 0, 1)], [("C", 1, 1)]]
    assert pictures.places(steps, rows=2) == [["A", "B"], ["C", "B"], ["C", None]]


def test_charts_say_in_words_what_they_show() -> None:
    chart = pictures.rows_chart(STATIC, 2, "Static")
    assert "40% of row-steps idle" in chart.alt
    assert "row 1: B idle idle idle idle" in chart.alt
    alt = pictures.requests_chart(PREEMPTED, {"A": 2, "B": 2}, "Small").alt
    assert "B: prompt 2, waits, again 3, answer 1" in alt


def test_frames_grow_by_a_step_and_are_as_large() -> None:
    frames = pictures.frames_of(PREEMPTED, {"A": 2, "B": 2}, "Small")
    assert len(frames) == 4
    assert all(a.count("<rect") < b.count("<rect") for a, b in itertools.pairwise(frames))
    assert len({frame.split("viewBox")[1][:20] for frame in frames}) == 1


def test_arrivals_have_the_rate_on_average_and_no_rhythm() -> None:
    times = arrivals(rate=20, count=4000)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(1 / 20, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(1 / 20, rel=0.1)  # as of independent gaps


def workload(count: int) -> LadderWorkload:
    return LadderWorkload([[i + 1] * 6 for i in range(count)], [4] * count, 0)


def test_who_comes_rarely_finds_an_empty_engine(tiny_model) -> None:
    """At one request an hour nobody meets anybody; the clock jumps instead of waiting."""
    engine = start(tiny_model(), **SMALL)
    point = offer(engine, workload(3), rate=1 / 3600)
    assert all(len(record.rows) == 1 for record in engine.trace)
    assert point.throughput < 1
    assert point.ttft < 60


def test_who_comes_at_once_is_served_together(tiny_model) -> None:
    engine = start(tiny_model(), **SMALL)
    capacity, points = sweep(engine, workload(8), shares=[0.5])
    assert max(len(record.rows) for record in engine.trace) == 8
    assert points[0].rate == capacity / 2
    assert points[0].ttft > 0


def test_power_falls_when_only_waiting_grows() -> None:
    quick = LoadPoint(rate=1, throughput=100, ttft=0.1, tpot=0.1)
    assert LoadPoint(1, 100, ttft=0.2, tpot=0.1).power < quick.power


def test_a_long_prompt_arrives_after_ten_tokens(tiny_model) -> None:
    engine = start(tiny_model(), max_num_batched_tokens=16, **SMALL)
    moments, first = interrupted(engine, [5] * 60)
    assert len(moments) == 40
    assert sum(moment <= 0 for moment in moments) == 10
    assert 0 < first < moments[-1]


def test_run_gives_every_step(tiny_model) -> None:
    engine = start(tiny_model(), **SMALL)
    queue(engine, "A", [1, 2, 3], 3)
    assert run(engine) == [(("A", 0, 3),), (("A", 3, 1),), (("A", 4, 1),)]


def test_a_stage_keeps_its_steps_without_those_that_warmed_up(tiny_model) -> None:
    few = ladder_workload(290, "cpu").first(3)
    stage = ContinuousBatching(tiny_model(), "cpu")
    stage.run(few)
    names = {name for record in stage.trace for name, _, _ in record.rows}
    assert names == {"2", "3", "4"}  # 0 and 1 warmed up


def test_the_gap_that_is_marked_is_one_in_which_the_long_prompt_runs():
    moments = [-0.5, 0.1, 0.2, 0.35, 0.9]  # the last gap comes after the long prompt's token
    figure = pictures.token_times({"in chunks": (moments, 0.3)}, "a machine")
    assert [text.get_text() for text in figure.axes[0].texts] == ["longest gap 600 ms"]
    figure = pictures.token_times({"in chunks": (moments[1:], 0.3)}, "a machine")
    assert [text.get_text() for text in figure.axes[0].texts] == ["longest gap 150 ms"]
