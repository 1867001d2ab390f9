"""What lesson 00 brought: a model without weights, its plots, and the machine's numbers kept."""

import matplotlib
import pytest
from transformers.utils import logging

from course import peaks, random_model, shapes
from course.benchmarks.roofline import Peaks, layer_weights
from course.drawings import tour_plots
from nanovllm import LLM, SamplingParams

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
    sizes = tour_plots.lesson_sizes({"00_tour": {"llm.py": 100, "config.py": 20}, "02_kv": {}})
    assert "00_tour: 120, 02_kv: 0" in sizes.alt_text
    curve = tour_plots.bandwidth_curve([2**20, 2**22], [3e9, 2e9], 1e9, {"model": 2**21}, "here")
    assert "1 MiB 3, 4 MiB 2. Memory gives 1." in curve.alt_text
    times = tour_plots.step_times([1, 4], {"bound": [0.001, 0.002]}, "here")
    assert "bound: 1, 2." in times.alt_text


def test_a_published_shape_counts_as_many_weights_as_the_random_model_has():
    shape = shapes.PUBLISHED["Qwen3-0.6B"]
    assert all(getattr(shape, name) == random_model.SHAPE[name] for name in vars(shape))
    billions = {
        name: (s.num_hidden_layers * layer_weights(s) + s.vocab_size * s.hidden_size) / 1e9
        for name, s in shapes.PUBLISHED.items()
    }
    # without the second matrix of Qwen3-8B and Llama, the embedding, which is only looked up
    assert billions == pytest.approx(
        {"Qwen3-0.6B": 0.596, "Qwen3-8B": 8.19 - 0.622, "Llama-3.1-70B": 70.55 - 1.05}, rel=2e-3
    )
