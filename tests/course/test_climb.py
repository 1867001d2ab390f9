"""The last lesson's counting and pictures; and that the shipped ladder is what its records draw."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from course.cli import main
from course.labs import climb
from course.measure.ladder_workload import LadderWorkload, ladder_workload
from course.measure.roofline import Peaks
from course.show import plots

FIGURES = Path(__file__).resolve().parents[2] / "figures"


def test_the_shipped_ladder_is_what_its_records_draw(tmp_path):
    fresh = tmp_path / "ladder.svg"
    assert main(["ladder", "--shipped", "--draw", str(fresh)]) == 0
    assert fresh.read_bytes() == (FIGURES / "ladder.svg").read_bytes()
    assert (FIGURES / "ladder.png").read_bytes().startswith(b"\x89PNG")


def test_the_schedules_of_the_first_two_stages():
    toy = LadderWorkload([[1] * 4] * 3, [2, 4, 6], 0, kv_tokens=20)  # room for two
    recompute = [row for step in climb.recompute_steps(toy) for row in step.rows]
    assert len(recompute) == 12
    assert recompute[:3] == [("0", 0, 4), ("0", 0, 5), ("1", 0, 4)]
    static = [step.rows for step in climb.static_steps(toy)]
    assert static[:2] == [[("0", 0, 4), ("1", 0, 4)], [("0", 4, 1), ("1", 4, 1)]]
    assert static[2] == [("1", 5, 1)], "request 0 is done"
    assert [len(rows) for rows in static] == [2, 2, 1, 1, 1, 1, 1, 1, 1, 1]


def test_each_stage_has_a_floor_of_its_own(tiny_model):
    workload = ladder_workload(290, "cpu").first(3)
    rungs = climb.climb(str(tiny_model()), workload, Peaks(1e12, 1e15), [1, 2, 4])
    needed = [sum(work.flops for work in rung.works) for rung in rungs]
    assert needed[0] > needed[1] > needed[2]
    assert all(0 < rung.share < 1 for rung in rungs)
    assert len(str(rungs[0])) == len(climb.HEADER)
    _, words = climb.shares(rungs)
    assert "02 contiguous cache" in words


def test_recorded_engines_stand_side_by_side():
    _, words = climb.rivals(climb.reference_workloads())
    for text in ("W2 vLLM 0.24 543 to 557", "W3 this engine", "W1 nano-vLLM 15,900 to 18,200"):
        assert text in words
    page = (FIGURES.parent / "docs/benchmarks.md").read_text()
    for runs in climb.OTHERS.values():
        for low, high in runs.values():
            assert f"{low:,} to {high:,}" in page


@pytest.mark.parametrize(
    ("device", "name", "stages"),
    [("cpu", "stages_cpu.json", [1, 2, 3, 4, 5, 8]), ("cuda", "stages_h200.json", [*range(1, 8)])],
)
def test_what_ships_was_measured_in_full(device, name, stages):
    rows = json.loads((FIGURES / "data" / name).read_text())
    assert [row["stage"] for row in rows] == stages
    room = str(ladder_workload(100, device)).rpartition("; ")[2]
    assert all(row["workload"].endswith(room) for row in rows)
    assert len({row["workload"] for row in rows if row["stage"] > 1}) == 1
    assert plots.ladder(records=[r for r in plots.load() if r.device == device]).alt_text


def test_vllm_is_timed_in_its_second_run(monkeypatch):
    asked, clock = [], iter([0.0, 10.0])  # one reading before each run ...

    class LLM:
        def __init__(self, path, **options):
            assert (path, options["skip_tokenizer_init"]) == ("some/model", True)

        def generate(self, prompt, params, use_tqdm):
            asked.append((len(prompt["prompt_token_ids"]), params.max_tokens, params.ignore_eos))

    vllm = SimpleNamespace(LLM=LLM, SamplingParams=lambda **fields: SimpleNamespace(**fields))
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock, 12.0))  # ... and one after both
    assert climb.run_vllm(Path("some/model")) == 512 / (12 - 10)
    assert asked == [(128, 512, True)] * 2
