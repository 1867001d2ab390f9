"""`course bench sampling`: settings take turns, and a ratio compares two runs of one round."""

import json
import random
from types import SimpleNamespace

import pytest

from course.benchmarks import sampling
from course.cli import main
from nanovllm import SamplingParams


class Recorder:
    """Stands in for LLM: it records what it was given, and its n-th answer takes n seconds."""

    def __init__(self):
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(vocab_size=300))
        self.calls, self.now = [], 0.0

    def perf_counter(self):
        return self.now

    def generate(self, prompts, params, use_tqdm):
        self.now += len(self.calls) + 1
        self.calls.append(([prompt["prompt_token_ids"] for prompt in prompts], params))
        return [
            SimpleNamespace(outputs=[SimpleNamespace(token_ids=[0] * p.max_tokens)]) for p in params
        ]


def test_the_settings_take_turns_and_the_first_round_is_not_counted(monkeypatch):
    llm, names = Recorder(), ["plain", "greedy", "qwen3"]
    monkeypatch.setattr(sampling, "time", llm)
    seconds = sampling.take_turns(llm, names, 4, [6, 5], 3, random.Random(0))
    assert seconds == {"plain": [4, 7], "greedy": [5, 8], "qwen3": [6, 9]}
    asked = [params[0] for _, params in llm.calls]
    assert [p.temperature for p in asked] == [0.6, 0.0, 0.6] * 3
    assert [(p.top_k, p.top_p) for p in asked] == [(0, 1.0), (0, 1.0), (20, 0.95)] * 3
    for prompts, params in llm.calls:
        assert [len(prompt) for prompt in prompts] == [6] * 4
        assert [(p.max_tokens, p.ignore_eos) for p in params] == [(5, True)] * 4
    every = [tuple(prompt) for prompts, _ in llm.calls for prompt in prompts]
    assert len(set(every)) == len(every)  # nothing comes from the prefix cache


def test_a_ratio_is_to_the_plain_run_of_the_same_round():
    seconds = {"plain": [1.0, 2.0, 4.0], "greedy": [2.0, 2.0, 5.0]}
    result = sampling.summarise(seconds, output_tokens=100)
    assert result["plain"]["runs"] == [100.0, 50.0, 25.0]
    assert result["plain"]["ratio"] == 1.0
    greedy = result["greedy"]
    assert greedy["output_tokens_per_second"] == 50.0
    assert (greedy["lowest_ratio"], greedy["ratio"], greedy["highest_ratio"]) == (0.5, 0.8, 1.0)


@pytest.mark.parametrize("name", sampling.SETTINGS)
def test_every_setting_is_one_that_the_engine_knows(name):
    params = SamplingParams(**sampling.SETTINGS[name])
    adjusts = name in ("penalties", "logit-bias", "allowed-ids")
    assert params.adjusts == adjusts
    assert params.filters == (name not in ("plain", "greedy", "logprobs-5") and not adjusts)


def test_the_table_on_a_tiny_model(tiny_model, tmp_path, capsys):
    file = tmp_path / "record.json"
    arguments = ["bench", "sampling", "--model", str(tiny_model()), "--runs", "2", "--scale", "1/8"]
    arguments += ["--batch-sizes", "1,3", "--settings", "qwen3,greedy", "--json", str(file)]
    assert main(arguments) == 0
    record, text = json.loads(file.read_text()), capsys.readouterr().out
    assert list(record["settings"]) == ["plain", "greedy", "qwen3"]  # plain is always measured
    assert record["settings"]["qwen3"] == {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    assert (record["prompt_tokens"], record["output_tokens"]) == (8, 16)
    assert list(record["batch_sizes"]) == ["1", "3"]
    for results in record["batch_sizes"].values():
        assert {name: len(result["runs"]) for name, result in results.items()} == {
            "plain": 2,
            "greedy": 2,
            "qwen3": 2,
        }
    assert {"machine", "versions", "command", "dtype", "engine"} <= set(record)
    assert "qwen3: temperature 0.6, top_p 0.95, top_k 20" in text
