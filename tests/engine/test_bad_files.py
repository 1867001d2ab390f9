"""Broken, absurd and hostile checkpoints: each is one clear ValueError, soon, and runs nothing."""

import json
import random
import shutil
import struct
from collections import Counter
from contextlib import nullcontext
from copy import deepcopy as copy_of
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from nanovllm import LLM, EngineArgs, SamplingParams
from nanovllm.checkpoint.config_json import read_model_config
from nanovllm.checkpoint.generation_config import make_default_params, read_generation_config
from nanovllm.checkpoint.safetensors_files import find_weight_files
from nanovllm.checkpoint.tokenizer import load_tokenizer, tokenizer_errors
from nanovllm.checkpoint.weights import parameters_by_name
from nanovllm.frontend.detokenizer import Detokenizer
from nanovllm.frontend.input_processor import InputProcessor

INDEX = "model.safetensors.index.json"
FUZZED = 200  # examples each
ABSURD = [None, -1, 0, 2**40, 2**70, 1.5, "x", [], {}, float("nan"), float("inf"), "DEL"]
NUMBERS = [
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "head_dim",
]  # fmt: skip
HAVE_DEFAULTS = ("max_position_embeddings", "rms_norm_eps")


@pytest.fixture
def copy(tiny_model, tmp_path):
    """A model in a folder of its own, to spoil its files."""
    return Path(shutil.copytree(tiny_model(family="qwen3"), tmp_path / "model"))


def change(file, **fields):
    content = json.loads(file.read_text()) if file.exists() else {}
    content |= fields
    file.write_text(json.dumps({k: v for k, v in content.items() if v != "DEL"}))


def make(folder, **options):
    return LLM(str(folder), **{"max_model_len": 64, "use_tqdm_on_load": False} | options)


def refused(folder, match, **options):
    with pytest.raises(ValueError, match=match):
        make(folder, **options)


# -- weights -------------------------------------------------------------------------------------


def spoil_bytes(file, at, value):
    data = bytearray(file.read_bytes())
    data[at : at + len(value)] = value
    file.write_bytes(data)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda f: f.write_bytes(b""),
        lambda f: f.write_bytes(f.read_bytes()[:7]),
        lambda f: f.write_bytes(f.read_bytes()[:100]),
        lambda f: f.write_bytes(f.read_bytes()[:-1]),
        lambda f: f.write_bytes(f.read_bytes() + b"more"),
        lambda f: spoil_bytes(f, 0, struct.pack("<Q", 2**63)),  # a header of 9 exabytes
        lambda f: spoil_bytes(f, 0, struct.pack("<Q", 90_000_000)),
        lambda f: spoil_bytes(f, 8, b"\x80\x02"),  # where JSON should begin
        lambda f: f.write_bytes(b"\x80\x04\x95" + b"\0" * 64),  # a pickle
    ],
    ids=["empty", "7 bytes", "100 bytes", "a byte short", "4 too many", "huge header",
         "long header", "no JSON", "pickle"],
)  # fmt: skip
def test_a_broken_weights_file_is_named(copy, spoil):
    spoil(copy / "model.safetensors")
    refused(copy, r"model\.safetensors")


def test_every_flipped_bit_of_a_header_is_refused_or_harmless(copy):
    """A flip may spell another name, type, shape or place; no other model may come of it."""
    file = copy / "model.safetensors"
    good = file.read_bytes()
    length = struct.unpack("<Q", good[:8])[0]
    kept = load_file(file)
    same = 0
    for at in range(0, 8 + length, 41):
        spoil_bytes(file, at, bytes([good[at] ^ (1 << at % 8)]))
        try:
            with make(copy, max_num_seqs=1, skip_tokenizer_init=True) as llm:
                model = llm.llm_engine.core.runner.model
                for name, (weight, _) in parameters_by_name(model).items():
                    assert torch.equal(weight, kept[name]), (at, name)
            same += 1
        except ValueError:
            pass
        file.write_bytes(good)
    assert same < length / 41 / 4, "most flips must be refused"


def test_weights_of_another_type_are_refused(copy):
    file = copy / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int8)
    save_file(weights, file)
    refused(copy, r"wrong type: model\.norm\.weight is I8")


def test_weights_that_are_not_numbers_are_not_executed(copy):
    """A pickle beside them, or in their place, is never opened."""
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")
    refused(copy, r"model\.safetensors' is not in .* holds pytorch_model\.bin")
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "absent.safetensors", "", ".", 7, None, ["a"]]
)
def test_an_index_that_names_no_file_of_the_folder(copy, name):
    (copy / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    refused(copy, r"safetensors index|weights file")


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"weight_map": 7}', '{"weight_map": {}}',
                                  "[" * 10_000, "\x00", '{"weight_map": []}'])  # fmt: skip
def test_an_index_that_is_none(copy, text):
    (copy / INDEX).write_text(text)
    refused(copy, r"safetensors index|weights do not fit")


# -- config.json ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ABSURD, ids=str)
def test_absurd_numbers_in_config(copy, name, value):
    """Refused, but for a field left out that has a default in transformers."""
    change(copy / "config.json", **{name: value}, layer_types="DEL")
    accepted = value == "DEL" and name in HAVE_DEFAULTS
    with nullcontext() if accepted else pytest.raises(ValueError, match=r"config\.json|weights"):
        make(copy).close()


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"num_attention_heads": 3}, "num_key_value_heads"),
        ({"num_key_value_heads": 8}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"hidden_size": 128}, "wrong shape"),
        ({"vocab_size": 301}, "wrong shape"),
        ({"num_hidden_layers": 3, "layer_types": "DEL"}, "missing"),
        ({"num_hidden_layers": 1, "layer_types": "DEL"}, "unknown"),
        ({"architectures": ["LlamaForCausalLM"]}, "model_type"),
        ({"model_type": "nothing"}, "config.json"),
        ({"eos_token_id": "x"}, "eos_token_id"),
        ({"eos_token_id": [1, "x"]}, "eos_token_id"),
        ({"eos_token_id": 1.5}, "eos_token_id"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0.0}}, "factor"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "factor"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "rope"),
        ({"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}, "config.json"),
    ],
    ids=str,
)
def test_contradictions_in_config(copy, fields, match):
    (copy / "evil.py").write_text("open('executed', 'w')")
    change(copy / "config.json", **fields)
    refused(copy, match)
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"architectures": ["NewForCausalLM"], "model_type": "new"}, "architectures=.*'New"),
        ({"architectures": ["NewForCausalLM"]}, "architectures=.*'NewForCausalLM'.*'Qwen3"),
        ({"architectures": "DEL", "model_type": "new"}, "architectures=None"),
        ({"model_type": "new"}, "model_type='new' is not supported.*qwen3"),
    ],
    ids=str,
)
@pytest.mark.parametrize("auto_map", [{"AutoConfig": "new.Config"}, "DEL"])
def test_a_model_with_code_of_its_own_is_not_advised_to_run_it(copy, fields, match, auto_map):
    (copy / "new.py").write_text("open('executed', 'w')")
    change(copy / "config.json", **fields, auto_map=auto_map)
    with pytest.raises(ValueError, match=match) as caught:
        make(copy)
    assert "trust_remote_code" not in str(caught.value)
    assert not Path("executed").exists()


def test_a_tokenizer_with_code_of_its_own_is_not_advised_to_run_it(copy, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "new.py").write_text("open('executed', 'w')")
    change(other / "config.json", model_type="new", auto_map={"AutoConfig": "new.Config"})
    change(
        other / "tokenizer_config.json",
        tokenizer_class="NewTokenizer",
        auto_map={"AutoTokenizer": ["new.Tokenizer", None]},
    )
    words = r"no tokenizer .* its own Python code.*tokenizer="
    with pytest.raises(ValueError, match=words) as caught:
        make(copy, tokenizer=str(other))
    assert "trust_remote_code" not in str(caught.value)
    assert not Path("executed").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null", "[" * 100_000, "\x00", '"x"'])
def test_a_config_that_is_none(copy, text):
    (copy / "config.json").write_text(text)
    refused(copy, r"config\.json")


@pytest.mark.parametrize(
    "fields",
    [{"eos_token_id": "x"}, {"eos_token_id": [1, "x"]}, {"eos_token_id": {}},
     {"eos_token_id": 1.5}],
    ids=str,
)  # fmt: skip
def test_ends_that_are_no_ids_in_generation_config(copy, fields):
    change(copy / "generation_config.json", **fields)
    refused(copy, "eos_token_id")


# -- tokenizer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00"])
def test_a_broken_tokenizer_is_named(copy, text):
    (copy / "tokenizer.json").write_text(text)
    refused(copy, "no tokenizer could be read")


PROMPTS = ["the a<|im_end|>", [0, 64, 64, 6]]  # token 64 is "a"
STRIP = {"type": "Strip", "content": "a", "start": 1, "stop": 5}
DAMAGES = {  # the library panicked at each of these in version 0.23, found by 16,000 mutations
    "load": ("model", {"continuing_subword_prefix": "Strip"}),
    "encode": ("normalizer", {"type": "Replace", "pattern": {"String": ""}, "content": "x"}),
    "decode": ("decoder", STRIP),
}


def panics(copy, damage):
    """Whether the library itself still panics: later versions may refuse or read such a file."""
    try:
        tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
        tokenizer.encode(PROMPTS[0])
        tokenizer.decode(PROMPTS[1])
    except BaseException as error:
        return not isinstance(error, Exception)
    return False


@pytest.mark.parametrize("stops", [None, ["never said"]])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_tokenizer_that_panics_is_a_value_error_and_leaves_no_request(copy, damage, stops):
    name, fields = DAMAGES[damage]
    content = json.loads((copy / "tokenizer.json").read_text())
    change(copy / "tokenizer.json", **{name: (content[name] if name == "model" else {}) | fields})
    params = SamplingParams(max_tokens=4, ignore_eos=True, stop=stops)
    calls = [lambda llm, prompt=prompt: llm.generate(prompt, params, use_tqdm=False)
             for prompt in PROMPTS]  # fmt: skip
    calls += [
        lambda llm: list(llm.stream(PROMPTS, params)),
        lambda llm: llm.chat([{"role": "user", "content": "a"}], params, use_tqdm=False),
    ]
    refusals = []
    try:
        with make(copy) as llm:
            for call in calls:
                try:
                    call(llm)
                except ValueError as error:
                    refusals.append(str(error))
                assert not llm.llm_engine.has_unfinished_requests()
                assert not llm.llm_engine.sequences
    except ValueError as error:
        refusals.append(str(error))
    assert all("tokenizer" in refusal and str(copy) in refusal for refusal in refusals)
    assert refusals or not panics(copy, damage)


class PanicException(BaseException):
    """As pyo3 makes one: in a module that cannot be imported, and no Exception."""


def fails_with(monkeypatch, copy, error):
    def fail(*_, **__):
        raise error("why")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(BaseException, match="why") as caught:
        load_tokenizer(EngineArgs(str(copy)), copy)
    with pytest.raises(BaseException, match="why") as later, tokenizer_errors("/a/folder"):
        fail()
    return caught.type, later.type


def test_panics_and_nothing_else_that_is_no_exception_are_turned_into_errors(copy, monkeypatch):
    for error in (PanicException, Exception):
        assert fails_with(monkeypatch, copy, error) == (ValueError, ValueError)
    for error in (KeyboardInterrupt, SystemExit, GeneratorExit):
        assert fails_with(monkeypatch, copy, error) == (error, error)
    assert fails_with(monkeypatch, copy, MemoryError)[1] is MemoryError


def damaged(rng, good):
    """tokenizer.json with some of its values, or of its bytes, replaced."""
    if rng.random() < 0.3:
        data = bytearray(json.dumps(good).encode())
        for _ in range(rng.choice([1, 2, 8])):
            data[rng.randrange(len(data))] = rng.randrange(32, 127)
        return bytes(data)
    content = copy_of(good)
    for _ in range(rng.choice([1, 1, 2])):
        holder, names = content, []
        while isinstance(holder, dict) and holder and len(names) < 3:
            names.append(rng.choice([*holder]))
            holder, parent = holder[names[-1]], holder
            if rng.random() < 0.4:
                break
        value = rng.choice([None, True, -1, 2**32, "", "a", "Strip", [], {}, STRIP,
                            DAMAGES["encode"][1], DAMAGES["load"][1]])  # fmt: skip
        parent[names[-1]] = copy_of(value)
    return json.dumps(content).encode()


def use_tokenizer(folder):
    """Load it as the engine does, encode a text and decode some ids."""
    tokenizer = load_tokenizer(EngineArgs(str(folder)), folder)
    InputProcessor(tokenizer, {}, frozenset(), 0, 0).encode(PROMPTS[0])
    detokenizer = Detokenizer(tokenizer, SamplingParams())
    for token_id in PROMPTS[1]:
        detokenizer.append(token_id)
    return detokenizer.text


def test_no_damage_to_a_tokenizer_escapes_except_exception(copy):
    """Whatever the library makes of the file, using it gives a text or a ValueError."""
    rng, good = random.Random(0), json.loads((copy / "tokenizer.json").read_text())
    ends = Counter()
    for _ in range(300):
        (copy / "tokenizer.json").write_bytes(damaged(rng, good))
        try:
            ends[type(use_tokenizer(copy))] += 1
        except ValueError:
            ends[ValueError] += 1
    assert set(ends) == {str, ValueError}
    assert min(ends.values()) > 10, ends


def test_a_tokenizer_larger_than_the_embedding(copy, tiny_model):
    """It loads, as real ones do; a prompt with an id beyond the embedding names the id."""
    small = tiny_model(family="qwen3", vocab=290)
    with make(small) as llm:
        llm.generate("the", SamplingParams(max_tokens=2), use_tqdm=False)
        with pytest.raises(ValueError, match=r"token id .* 289, got 29\d"):
            llm.generate("the<|im_end|>", SamplingParams(max_tokens=2), use_tqdm=False)
        with pytest.raises(ValueError, match=r"token id"):
            llm.chat([{"role": "user", "content": "a"}], use_tqdm=False)


# -- fuzzing -------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
FUZZ = settings(
    max_examples=FUZZED,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@FUZZ
@given(data=st.data())
def test_fuzzed_config_is_read_or_refused(tiny_model, tmp_path_factory, data):
    """Some fields of a good config replaced by anything: a ModelConfig or a ValueError."""
    good = json.loads((tiny_model(family="qwen3") / "config.json").read_text())
    names = st.sampled_from([*sorted(good), "quantization_config", "rope_scaling", "rope_theta"])
    fields = data.draw(st.dictionaries(names, JSON, min_size=1, max_size=3))
    folder = tmp_path_factory.getbasetemp() / "fuzzed_config"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(good | fields))
    try:
        config = read_model_config(folder)
    except ValueError:
        return
    assert 0 < config.vocab_size < 2**31
    assert all(isinstance(i, int) for i in config.eos_token_ids)


@FUZZ
@given(content=JSON, cut=st.integers(0, 200))
def test_fuzzed_index_is_read_or_refused(tmp_path_factory, content, cut):
    folder = tmp_path_factory.getbasetemp() / "fuzzed_index"
    folder.mkdir(exist_ok=True)
    text = json.dumps({"weight_map": content})
    (folder / INDEX).write_text(text[: len(text) - cut] if cut < 20 else text)
    try:
        files = find_weight_files(folder)
    except ValueError:
        return
    assert all(file.parent == folder and file.is_file() for file in files)


@FUZZ
@given(content=JSON)
def test_fuzzed_generation_config_is_read_or_refused(tiny_model, tmp_path_factory, content):
    config = read_model_config(tiny_model(family="qwen3"))
    folder = tmp_path_factory.getbasetemp() / "fuzzed_generation"
    folder.mkdir(exist_ok=True)
    fields = content if isinstance(content, dict) else {"eos_token_id": content, "top_k": content}
    (folder / "generation_config.json").write_text(json.dumps(fields))
    try:
        eos, defaults = read_generation_config(folder, config, None, EngineArgs())
        assert all(isinstance(i, int) for i in eos)
        make_default_params(defaults)
    except ValueError:
        return
