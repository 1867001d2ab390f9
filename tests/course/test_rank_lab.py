"""Ranks as threads, recorded measurements, and their drawing."""

import json
import os
import subprocess
import sys

import pytest
import torch

from course.labs import rank_lab
from course.labs.rank_lab import (
    all_reduce_curves,
    curves_in_words,
    engines_in_words,
    gains_in_words,
    rank_curves,
    rank_gains,
    recorded,
)
from course.rank_threads import on_ranks

ROOT = rank_lab.SHIPPED.parents[1]


def test_threads_reduce_and_failures_are_raised():
    results = on_ranks(2, lambda ranks: ranks.all_reduce(torch.tensor([1.0 + ranks.rank])))
    assert [result.item() for result in results] == [3.0, 3.0]
    with pytest.raises(ZeroDivisionError):
        on_ranks(2, lambda ranks: 1 / 0)


def test_a_collective_that_a_rank_never_enters_is_an_error_and_not_a_wait():
    with pytest.raises(RuntimeError, match=r"rank 1 waits in all_reduce, which \[0\] never enters"):
        on_ranks(2, lambda ranks: ranks.rank and ranks.all_reduce(torch.ones(1)))


def test_two_different_collectives_at_once_are_an_error():
    def run(ranks):
        return ranks.broadcast(1) if ranks.rank else ranks.all_reduce_min(1)

    with pytest.raises(RuntimeError, match=r"ranks enter \['all_gather', 'broadcast'\] at once"):
        on_ranks(2, run)


THREADS = {
    "on_ranks": "import course.rank_threads as r\n"
    "r.on_ranks(2, lambda ranks: ranks.all_reduce_min(1))",
    "counting engine": "from counting_engine import engine_of\nwith engine_of(2):\n    pass",
}


@pytest.mark.parametrize("threads", THREADS.values(), ids=THREADS)
def test_collectives_of_threads_are_not_recorded(threads, monkeypatch):
    """torch 2.11's recorder, one a process, dies of two threads that write to it."""
    monkeypatch.delenv("TORCH_FR_BUFFER_SIZE", raising=False)  # this process has it, too
    dump = "import torch; print(torch._C._distributed_c10d._dump_fr_trace_json(True).decode())"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests/helpers")]))
    command = [sys.executable, "-c", f"{threads}\n{dump}"]
    printed = subprocess.run(command, capture_output=True, check=True).stdout
    assert "entries" not in json.loads(printed)


def test_only_reports_of_the_command_are_found(tmp_path):
    for name in ("all_reduce", "ranks", "kernel_ladder"):
        report = {"command": f"course bench {name} --x", "rows": []}
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    (tmp_path / "stages_x.json").write_text("[]")
    assert len(recorded("all_reduce", tmp_path)) == len(recorded("ranks", tmp_path)) == 1


def test_the_shipped_curve_is_drawn_and_told():
    reports = rank_lab.recorded("all_reduce")
    assert len(all_reduce_curves(reports, "here").axes[0].get_legend().texts) == len(reports)
    assert "2 ranks, nccl" in curves_in_words(reports)


def test_engines_on_several_gpus_are_told():
    def engine(ranks, weight_bytes, steps):
        speeds = {"short": {"tokens_per_second": 1234.4}}
        memory = {"weight_bytes": weight_bytes}
        return {"ranks": ranks, "memory": memory, "workloads": speeds, "decode_step": steps}

    engines = [
        engine(1, 16e9, [{"rows": 1}]),
        engine(2, 8e9, [{"rows": 1, "share": 0.25}, {"rows": 64, "share": 0.1}]),
    ]
    report = {"shape": "Qwen3-8B", "machine": "two GPUs", "engines": engines}
    assert engines_in_words(report).splitlines() == [
        "Qwen3-8B on two GPUs",
        "  1 rank: 16.0 GB of weights each; short 1,234 tok/s",
        "  2 ranks: 8.0 GB of weights each; short 1,234 tok/s",
        "     all-reduce takes 25% at batch 1 and 10% at batch 64",
    ]


def test_gains_are_told_against_one_rank():
    def engine(ranks, speed):
        return {"ranks": ranks, "workloads": {"W1": {"tokens_per_second": speed}}}

    report = {"shape": "tiny", "machine": "2 x GPU", "engines": [engine(1, 10.0), engine(2, 15.0)]}
    assert rank_gains([report]) == {"tiny, W1": {1: 1.0, 2: 1.5}}
    assert gains_in_words([report]) == (
        "What ranks gain over one rank: tiny, W1 1.50 times on 2 ranks."
    )
    [axes] = rank_curves([report]).axes
    assert [line.get_ydata()[-1] for line in axes.lines] == [2, 1.5]


def test_the_shipped_ranks_are_drawn():
    reports = rank_lab.recorded("ranks")
    assert len(reports) == 2
    assert len(rank_curves(reports).axes[0].lines) == 1 + 4  # two shapes, two workloads


def test_the_benchmarks_page_says_what_is_recorded():
    page = (rank_lab.SHIPPED.parents[1] / "docs/benchmarks.md").read_text(encoding="utf-8")
    for report in rank_lab.recorded("ranks"):
        for workload in ("W1", "W2"):
            speeds = (e["workloads"][workload]["tokens_per_second"] for e in report["engines"])
            assert " | ".join(f"{speed:,.0f}" for speed in speeds) in page
