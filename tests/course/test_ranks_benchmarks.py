"""The benchmarks of several ranks: their sums, their numbers, and the large random model's file."""

import pytest
import torch
from safetensors.torch import load_file

from course.benchmarks import all_reduce, ranks
from course.models.random_model import QWEN3_8B, write_quickly


def test_all_reduce_on_two_processes():
    report = all_reduce.measure(2, largest=4096)
    assert [row["bytes"] for row in report["rows"]] == [1024, 2048, 4096]
    assert all(row["fastest"] <= row["seconds"] <= row["slowest"] for row in report["rows"])


def test_wrong_sums_are_refused():
    class Broken:
        rank, world_size = 0, 2

        def all_reduce(self, x):
            return x

    with pytest.raises(RuntimeError, match="wrong sums"):
        all_reduce.check_sum(Broken(), torch.device("cpu"))


def test_times_between_two_sizes():
    report = {"rows": [{"bytes": 100, "seconds": 1.0}, {"bytes": 300, "seconds": 3.0}]}
    assert all_reduce.seconds_for(report, 200) == 2.0
    assert all_reduce.seconds_for(report, 10) == 1.0


def test_two_ranks_are_checked_against_one():
    assert ranks.check_small_model([2]) == [{"ranks": 2, "answers": 8, "equal": 8, "graphs": 0}]


def test_a_model_written_quickly_is_read_back(tmp_path):
    small = {"num_hidden_layers": 1, "vocab_size": 512, "hidden_size": 64, "head_dim": 16}
    small |= {"intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    write_quickly(tmp_path / "model", {**QWEN3_8B, **small})
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert weights["lm_head.weight"].shape == (512, 64)
    assert weights["lm_head.weight"].dtype == torch.bfloat16
    assert torch.equal(weights["model.norm.weight"], torch.ones(64, dtype=torch.bfloat16))
    assert 0.015 < weights["lm_head.weight"].float().std() < 0.025
