"""What lesson 00 brought: a hollow model, plots, the machine's numbers, and what a step needs."""

from types import SimpleNamespace

import matplotlib
import pytest
from transformers.utils import logging

from course.drawings import tour_plots
from course.labs import tour_lab
from course.measure import peaks
from course.measure.roofline import Peaks
from course.models import random_model
from course.models.choice import own_model
from nanovllm import LLM, SamplingParams
from nanovllm.checkpoint.config_json import read_model_config

matplotlib.use("agg")


def test_a_hollow_model_has_the_layers_asked_for_and_hardly_a_weight(tmp_path, capfd):
    logging.enable_progress_bar()
    name = random_model.hollow_model(tmp_path, layers=3)
    assert capfd.readouterr().err == ""  # nothing that a notebook would keep
    with LLM(name, device="cpu", use_tqdm_on_load=False) as llm:
        config = llm.llm_engine.model_config
        numbers = sum(p.numel() for p in llm.llm_engine.core.runner.model.parameters())
        params = SamplingParams(max_tokens=3, ignore_eos=True, temperature=0)
        (output,) = llm.generate([[5, 6, 7]], params, use_tqdm=False)
    assert config.num_hidden_layers == 3
    assert numbers < 200_000
    assert len(output.outputs[0].token_ids) == 3


def test_peaks_are_kept_by_machine(tmp_path):
    file = tmp_path / "new" / "peaks.json"
    assert peaks.known_peaks(file) == {}
    peaks.record_peaks(Peaks(1.0, 2.0), "a", file)
    peaks.record_peaks(Peaks(3.0, 4.0), "b", file)
    peaks.record_peaks(Peaks(5.0, 6.0), "a", file)
    assert peaks.known_peaks(file) == {"a": Peaks(5.0, 6.0), "b": Peaks(3.0, 4.0)}


def test_a_roofline_says_its_points_in_words():
    step = ("64", 1e6, 4e6, 0.002)  # 4 FLOP a byte, 2 GFLOP/s
    fig = tour_plots.roofline(Peaks(bandwidth=1e9, flops=8e9), {"decode": [step]}, "a machine")
    assert "The roof rises to 8 FLOP a byte, then is flat at 8 GFLOP/s" in fig.alt_text
    assert "decode, 64: 4 FLOP a byte, 2 GFLOP/s" in fig.alt_text
    (roof, points) = fig.axes[0].lines
    assert list(roof.get_ydata()) == pytest.approx([2.0, 8.0, 8.0])
    assert [list(points.get_xdata()), list(points.get_ydata())] == [[4.0], [2.0]]


def test_the_tours_other_figures_say_their_numbers():
    curve = tour_plots.bandwidth_curve([2**20, 2**22], [3e9, 2e9], 1e9, {"model": 2**21}, "here")
    assert "1 MiB 3, 4 MiB 2. Memory gives 1." in curve.alt_text
    times = tour_plots.step_times([1, 4], {"bound": [0.001, 0.002]}, "here")
    assert "bound: 1, 2." in times.alt_text


def test_a_models_matrices_are_all_its_weights_but_the_norms():
    config = read_model_config(own_model())
    layers, head, kept = tour_lab.count(config)
    with LLM(own_model(), device="cpu", use_tqdm_on_load=False) as llm:
        numbers = sum(p.numel() for p in llm.llm_engine.core.runner.model.parameters())
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    norms += 2 * config.num_hidden_layers * config.head_dim  # those of queries and keys
    assert numbers == layers + head + norms
    assert kept == 5 * 2 * 2 * 64


def test_a_step_needs_what_transformers_computes():
    config = read_model_config(own_model())
    layers, head, kept = tour_lab.count(config)
    matrices, attention = tour_lab.reference_flops(own_model(), 10)
    _, flops = tour_lab.work(config, requests=1, new=10, context=10)
    assert matrices == 2 * layers * 10 + 2 * head
    # transformers computes all 10 x 10 scores and hides those after a token; 55 are needed
    assert flops == pytest.approx(matrices + attention * 55 / 100, rel=1e-3)
    num_bytes, flops = tour_lab.work(config, requests=3, new=1, context=20)
    assert num_bytes == config.dtype.itemsize * (layers + head + 3 * 20 * kept)
    assert flops == 3 * (2 * (layers + head) + 4 * 5 * 4 * 64 * 20)


def test_steps_are_points_of_a_roofline():
    options = {"device": "cpu", "num_gpu_blocks_override": 64, "use_tqdm_on_load": False}
    with LLM(own_model(), **options) as llm:
        config = llm.llm_engine.model_config
        decode = tour_lab.decode_steps(llm, (1, 3))
        prefill = tour_lab.prefill_steps(llm, (2, 7))
        hollow = tour_lab.hollow_seconds(llm, (1, 2), **options)
    assert [point[:3] for point in decode] == [
        (R, *tour_lab.work(config, R, 1, 20)) for R in (1, 3)
    ]
    assert [point[:3] for point in prefill] == [
        (n, *tour_lab.work(config, 1, n, n)) for n in (2, 7)
    ]
    assert all(point[3] > 0 for point in decode + prefill)
    assert len(hollow) == 2
    assert min(hollow) > 0


def test_a_buffer_is_read_at_its_size_over_its_time(monkeypatch):
    monkeypatch.setattr(tour_lab, "measure", lambda function, repeats: SimpleNamespace(lowest=0.5))
    sizes, rates = tour_lab.read_rates("cpu")
    assert sizes[0] == 256 * 1024
    assert rates == [2 * size for size in sizes]


def test_an_answer_is_printed_field_by_field(capsys):
    with LLM(own_model(), device="cpu", use_tqdm_on_load=False) as llm:
        params = SamplingParams(max_tokens=2, ignore_eos=True)
        tour_lab.print_answer(llm.generate(["A fox"], params, use_tqdm=False)[0])
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines]
    assert {"request_id", "text", "finish_reason", "last_token_ts"} <= set(names)
    assert all(line.endswith("ms after arrival") for line in lines[-3:])
