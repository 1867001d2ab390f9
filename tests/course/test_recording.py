"""Capture and replay by hand, and what lesson 07 watches an engine do."""

import os

import pytest
import torch

from course.benchmarks import step_ladder
from course.drawings import step_drawings
from course.labs import two_loops
from course.labs.recording import Recording
from course.models.toy_decoder import padding
from course.serving import start_engine
from nanovllm.sampling_params import SamplingParams

CPU = torch.device("cpu")


def test_a_replay_reads_the_buffers_of_the_recording():
    x = torch.ones(2, 3)
    recording = Recording(lambda: (x @ torch.ones(3, 2)).relu() + x.view(3, 2)[:2], CPU)
    assert len(recording) > 3
    for value in (2.0, -1.0):
        x.fill_(value)
        recording.replay()
        expected = max(3 * value, 0.0) + value
        assert recording.result.tolist() == [[expected] * 2] * 2


def test_operations_in_place_happen_at_each_replay():
    counter = torch.zeros(3)
    recording = Recording(lambda: counter.add_(1), CPU)
    counter.zero_()
    for _ in range(4):
        recording.replay()
    assert counter.tolist() == [4.0] * 3
    assert recording.result.data_ptr() == counter.data_ptr()


@pytest.mark.parametrize(
    "asks", [lambda x: x.sum().item(), lambda x: int(x[0]), lambda x: x[0] > 0 and x]
)
def test_asking_for_a_value_is_refused(asks):
    x = torch.ones(2)
    with pytest.raises(RuntimeError, match="not permitted while capturing"):
        Recording(lambda: asks(x), CPU)


@pytest.mark.parametrize(
    "chooses",
    [
        lambda x: x[x > 0],
        lambda x: x[1:, x[0] > 0],
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: x.masked_select(x > 0),
        lambda x: x.__setitem__(x > 0, torch.ones(6)),
        lambda x: x.__setitem__(x[:, 0] > 0, x + 1),
    ],
)
def test_rows_chosen_by_their_values_are_refused(chooses):
    """A GPU would have to tell the host how many there are."""
    with pytest.raises(RuntimeError, match="capturing: how many are meant depends on values"):
        Recording(lambda: chooses(torch.ones(2, 3)), CPU)


def test_a_mask_that_takes_one_number_is_recorded():
    x, out = torch.tensor([1.0, -1.0, 2.0]), torch.empty(3)

    def step():
        out.copy_(x)
        out[out < 0] = 0.0

    recording = Recording(step, CPU)
    x.copy_(torch.tensor([-1.0, -2.0, 3.0]))
    recording.replay()
    assert out.tolist() == [0.0, 0.0, 3.0]


def test_a_batch_is_padded_to_the_next_size_or_to_none():
    assert [padding([1, 4, 8], n) for n in (1, 2, 4, 5, 9)] == [0, 2, 0, 3, None]


def test_loops_and_uploads_are_watched():
    engine = start_engine(block_size=4, max_model_len=32, async_scheduling=True)
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    engine.add([engine.make_request("a", [5, 6], params)])
    with two_loops.watching(engine) as log, two_loops.uploads() as sent:
        while engine.has_unfinished_requests():
            engine.advance()
    assert log == ["plan 1", "launch 1", "plan 2", "launch 2", "read 1", "plan 3", "read 2"]
    assert sent
    assert engine.core.runner.launch.__name__ == "launch", "as it was before"


def test_only_the_overlapped_loop_launches_before_it_reads():
    plain, overlapped = (two_loops.order(flag) for flag in (False, True))
    assert plain == [f"{what} {n}" for n in (1, 2, 3) for what in ("plan", "launch", "read")]
    assert overlapped.index("launch 2") < overlapped.index("read 1")
    assert overlapped.index("read 1") < overlapped.index("launch 3")


def test_a_story_that_stops_costs_one_row_more():
    (plain_ends, plain), (ends, overlapped) = map(two_loops.four_stories, (False, True))
    assert plain_ends == ends == ["stop"] * 4
    assert overlapped - plain == 4


def test_the_device_waits_where_no_step_runs():
    steps = {"plain": [(0, 3), (8, 11)], "overlapped": [(0, 3), (3, 8)]}
    picture, words = step_drawings.loops(steps, plan=3, run=5)
    assert "plain: 2 steps in 16 ms, of which the device waits 6" in words
    assert "overlapped: 2 steps in 13 ms, of which the device waits 3" in words
    assert picture.count(">waits<") == 3
    assert picture.count(">plan 2<") == picture.count(">run 2<") == 2


def test_the_recorded_run_is_drawn_and_said():
    report = step_drawings.recorded()
    _, words = step_drawings.timelines(report)
    assert "captured, plain loop: 210 of 210 kernels" in words, "until the faster has ended"
    assert "launched one by one, plain loop: 210 of" not in words
    _, words = step_drawings.ladder(report)
    for row in report["rows"]:
        assert f"{row['name']}: {row['tokens_per_second']['1'][0]:,.0f} tok/s" in words


def test_each_engine_is_measured_in_a_process_of_its_own():
    processes = {step_ladder.alone(os.getpid) for _ in range(2)}
    assert len(processes | {os.getpid()}) == 3


def test_a_moment_counts_as_busy_once():
    assert step_ladder.covered([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4
    for line in step_drawings.recorded()["timelines"].values():
        spans = [(start, start + duration) for _, start, duration in line["kernels"]]
        assert line["busy_us"] == pytest.approx(step_ladder.covered(spans), abs=0.1)
        assert line["busy_us"] <= line["span_us"]


def test_every_kernel_of_the_recorded_step_has_a_known_group():
    for line in step_drawings.recorded()["timelines"].values():
        assert {group for group, _, _ in line["kernels"]} <= set(step_drawings.GROUPS)
