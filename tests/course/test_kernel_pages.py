"""What lesson 06 shows its kernels with: charts, the interpreter, code read without importing."""

import json
import os
import subprocess
import sys

import pytest
import torch

from course.drawings import kernel_plots
from course.show import reading


def row(microseconds: float, num_bytes: int) -> dict:
    rate = num_bytes / microseconds * 1e6
    return {"microseconds": microseconds, "bytes": num_bytes, "bytes_per_second": rate}


@pytest.fixture
def files(tmp_path):
    """A report of two versions, and one of FlashAttention."""
    report = {
        "machine": "a card",
        "dtype": "bfloat16",
        "read_bytes_per_second": 4e12,
        "copy_bytes_per_second": 2e12,
        "store": {"9 tokens": {"torch": row(2, 10**6)}},
        "decode": {"1 x 640": {"torch": row(10, 10**7), "split": row(5, 10**7)}},
    }
    ladder, flash = tmp_path / "ladder.json", tmp_path / "flash.json"
    ladder.write_text(json.dumps(report))
    flash.write_text(json.dumps({"shapes": {"1 x 640": row(4, 10**7)}}))
    return ladder, flash


def test_flash_attention_stands_beside_the_others(files):
    report = kernel_plots.recorded(*files)
    assert list(report["decode"]["1 x 640"]) == ["torch", "split", "FlashAttention"]


def test_bars_say_every_number(files):
    report = kernel_plots.recorded(*files)
    chart = kernel_plots.bars(report, "decode", "Decode")
    for text in ("split", "5.0 µs", "2,000 GB/s, 50%", "a card", "read bandwidth, 4,000 GB/s"):
        assert text in chart.svg()
    assert "split 5.0 µs, 2,000 GB/s" in chart.alt
    assert "copy bandwidth" in kernel_plots.bars(report, "store", "Store").svg()


def test_programs_go_where_they_can_begin_first():
    assert kernel_plots.deal([3, 1, 1, 1], 2) == [(0, 0, 3), (1, 0, 1), (1, 1, 1), (1, 2, 1)]
    assert kernel_plots.makespan([12, 4, 2, 2], 4) == 12
    chart = kernel_plots.timetable({"a": [12, 4, 2, 2], "b": [5] * 4}, 4)
    assert "a: 12, b: 5" in chart.alt


LAB = """
import os
import torch
from course.labs import kernel_lab

assert "TRITON_INTERPRET" not in os.environ, "importing the lab changes nothing"
kernel_lab.triton
if kernel_lab.has_triton and kernel_lab.device.type == "cpu":
    assert os.environ["TRITON_INTERPRET"] == "1"
one, two = torch.tensor([1.0]), torch.tensor([2])
assert kernel_lab.agree(None, one) is one  # prints that it was not run
assert kernel_lab.agree(two, two.clone(), ran=True) is two
for found, wanted in ((one, one + 0.5), (two, two + 1)):
    try:
        kernel_lab.agree(found, wanted, ran=True)
    except AssertionError as error:
        print(error)
"""


def run_apart(code: str, **variables: str) -> subprocess.CompletedProcess:
    """A process of its own: the interpreter is asked for once and for all."""
    settings = {"capture_output": True, "text": True, "cwd": reading.ROOT}
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables = {**inherited, "PYTHONPATH": str(reading.ROOT), **variables}
    return subprocess.run([sys.executable, "-c", code], env=variables, **settings)


def test_a_kernel_is_compared_with_its_twin():
    done = run_apart(LAB)
    assert done.returncode == 0, done.stderr
    for text in ("not run here", "agree exactly", "differ by 0.5", "torch gave"):
        assert text in done.stdout


def test_decode_attention_is_timed_on_this_machine():
    done = run_apart(
        "from course.labs import kernel_lab; print(*kernel_lab.decodes_here(), sep='\\n')"
    )
    assert done.returncode == 0, done.stderr
    machine, *lines = done.stdout.splitlines()
    assert "GB/s" in machine
    assert sum(line.startswith("1 x 640") and "torch" in line for line in lines) == 1
    assert all("µs" in line and line.endswith("% of it") for line in lines)
    assert len(lines) == 4 or torch.cuda.is_available()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU needs no interpreter")
def test_the_interpreter_must_come_before_triton():
    pytest.importorskip("triton")
    done = run_apart("import triton; from course.labs.kernel_lab import tl", TRITON_INTERPRET="0")
    assert "Triton was imported before its interpreter" in done.stderr


def test_code_is_shown_without_importing_it():
    text = reading.cut_out(
        reading.ROOT / "nanovllm/kernels/device_functions.py", "online_softmax_step"
    )
    assert text.startswith("@triton.jit\ndef online_softmax_step(")
    assert text.endswith("return new_max, running_sum, acc")
    with pytest.raises(ValueError, match="no function or class 'nothing'"):
        reading.cut_out(reading.ROOT / "nanovllm/kernels/store.py", "nothing")
