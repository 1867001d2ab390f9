"""ModelConfig reads config.json as transformers' own config classes do, or refuses it by name."""

import json
import re
import tempfile
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from nanovllm.checkpoint.config_json import read_model_config
from nanovllm.models.model_config import ModelConfig

CLASSES = {"qwen3": Qwen3Config, "qwen2": Qwen2Config, "llama": LlamaConfig}
ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}
SIZES = {
    "vocab_size": 300,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 1024, "attention_factor": 1.25}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
SCALINGS = {"linear": {"factor": 2.0}, "yarn": YARN, "llama3": LLAMA3}


def plain(family: str = "qwen3", **changes) -> dict:
    """A config.json that is in order, with some fields changed; a field set to ... is left out."""
    config = {"architectures": [ARCHITECTURES[family]], "model_type": family, **SIZES, **changes}
    return {name: value for name, value in config.items() if value is not ...}


def check_rope(ours: ModelConfig, theirs) -> None:
    """Compare with the module that turns queries and keys inside transformers' models."""
    rotary = LlamaRotaryEmbedding(theirs)
    frequencies = torch.tensor(ours.rope_frequencies)
    torch.testing.assert_close(frequencies, rotary.inv_freq, rtol=1e-7, atol=0)
    assert ours.rope_scale == rotary.attention_scaling


def agrees(ours: ModelConfig, theirs) -> None:
    """Compare every field with transformers' reading of the same file."""
    for name in SIZES:
        assert getattr(ours, name) == getattr(theirs, name), name
    head_dim = getattr(theirs, "head_dim", None)
    assert ours.head_dim == (head_dim or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    check_rope(ours, theirs)
    attention_bias = getattr(theirs, "attention_bias", False)
    qwen2 = theirs.model_type == "qwen2"
    assert (ours.qkv_bias, ours.o_bias) == ((True, False) if qwen2 else (attention_bias,) * 2)
    assert ours.mlp_bias == getattr(theirs, "mlp_bias", False)
    assert ours.qk_norm == (theirs.model_type == "qwen3")
    assert ours.dtype == (theirs.dtype or torch.float32)


def read(config: dict) -> ModelConfig:
    """What ModelConfig makes of this config.json."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return read_model_config(Path(folder))


def check_against_transformers(config: dict) -> ModelConfig:
    ours = read(config)
    agrees(ours, CLASSES[config["model_type"]].from_dict(json.loads(json.dumps(config))))
    return ours


# -- what it reads ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"head_dim": 40},
        {"num_key_value_heads": None},
        {"num_key_value_heads": 4},
        {"rms_norm_eps": ...},
        {"eos_token_id": [7, 9]},
        {"dtype": "bfloat16"},
        {"torch_dtype": "float16"},
        {"rope_theta": 1000000.0},
        {"rope_theta": 500000, "rope_scaling": None},
        {"sliding_window": None},
        {"layer_types": ["full_attention"] * 3},
    ],
    ids=str,
)
def test_reads_what_transformers_reads(family, changes):
    check_against_transformers(plain(family, **changes))


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_attention_bias_is_for_all_four_projections(family):
    ours = check_against_transformers(plain(family, attention_bias=True))
    assert ours.qkv_bias
    assert ours.o_bias


def test_mlp_bias_is_llamas():
    assert check_against_transformers(plain("llama", mlp_bias=True)).mlp_bias
    assert not check_against_transformers(plain("llama")).mlp_bias
    assert not read(plain("qwen3", mlp_bias=True)).mlp_bias


def test_qwen2_has_its_own_biases():
    for given in (..., False, True):
        ours = read(plain("qwen2", attention_bias=given))
        assert (ours.qkv_bias, ours.o_bias) == (True, False)


@pytest.mark.parametrize("family", CLASSES)
def test_absent_kv_heads(family):
    changes = {"num_attention_heads": 32, "hidden_size": 1024, "num_key_value_heads": ...}
    assert check_against_transformers(plain(family, **changes)).num_key_value_heads == 32
    changes["num_attention_heads"] = 64  # the Qwens' default is a number, Llama's is the heads'
    ours = check_against_transformers(plain(family, **changes))
    assert ours.num_key_value_heads == (64 if family == "llama" else 32)


def test_absent_head_dim():
    assert read(plain("qwen3")).head_dim == 128
    assert read(plain("qwen2")).head_dim == 24
    assert read(plain("llama", head_dim=None)).head_dim == 24


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_both_generations_of_rope_give_the_same(family, kind, key):
    old = {"rope_theta": 2e6, "rope_scaling": {key: kind, **SCALINGS[kind]}}
    new = {"rope_parameters": {key: kind, "rope_theta": 2e6, **SCALINGS[kind]}}
    ours = read(plain(family, **old))
    assert ours == read(plain(family, **new))
    check_rope(ours, CLASSES[family].from_dict(plain(family, **new)))
    assert ours.rope_frequencies != read(plain(family, rope_theta=2e6)).rope_frequencies


@pytest.mark.parametrize("family", CLASSES)
def test_a_folder_that_transformers_wrote(family, tmp_path):
    theirs = CLASSES[family](
        **SIZES,
        head_dim=40,
        tie_word_embeddings=True,
        eos_token_id=[5, 6],
        dtype="bfloat16",
        architectures=[ARCHITECTURES[family]],
        rope_parameters={"rope_type": "yarn", "rope_theta": 3e5, **YARN, "beta_fast": 16},
    )
    theirs.save_pretrained(tmp_path)
    ours = read_model_config(tmp_path)
    agrees(ours, theirs)
    assert ours.eos_token_ids == (5, 6)
    assert ours == read_model_config(str(tmp_path))


@pytest.mark.parametrize(("given", "ids"), [(..., ()), (None, ()), (3, (3,)), ([0, 2], (0, 2))])
def test_end_of_sequence_ids(given, ids):
    assert read(plain(eos_token_id=given)).eos_token_ids == ids


def test_a_published_file_of_the_fourth_generation():
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    ours = check_against_transformers(config)
    assert ours.rope_frequencies[1] == pytest.approx(1e6 ** (-2 / 128))
    assert (ours.dtype, ours.eos_token_ids) == (torch.bfloat16, (151645,))


# -- what it refuses -------------------------------------------------------------------------------


def yarn(**changes) -> dict:
    return {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, **YARN, **changes}}


REFUSED = [  # (fields, what the message must hold)
    # not implemented
    ({"architectures": ["MistralForCausalLM"]}, "architectures.*Mistral.*Qwen3.*Qwen2.*Llama"),
    ({"architectures": ["Qwen3Model"]}, "architectures.*Qwen3Model"),
    ({"architectures": [*ARCHITECTURES.values()]}, "architectures"),
    ({"use_sliding_window": True}, "use_sliding_window=True.*False"),
    ({"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window=True"),
    (
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        "layer_types.*sliding_att",
    ),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'.*'silu'"),
    ({"is_causal": False}, "is_causal=False.*True"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5.*1.0"),
    (yarn(partial_rotary_factor=0.25), "partial_rotary_factor=0.25.*1.0"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config.*fp8"),
    ({"dtype": "float8_e4m3fn"}, "dtype=torch.float8_e4m3fn.*float32.*bfloat16.*float16"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'.*default.*yarn"),
    ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
    ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}, "rope_type='mrope'"),
    ({"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3]}}, "mrope_section"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_type=None"),
    # missing, contradictory, absurd, or of the wrong type
    ({"architectures": ...}, "architectures"),
    ({"model_type": ...}, "model_type"),
    ({"model_type": "mistral"}, "model_type='mistral'.*qwen3"),
    ({"hidden_size": None}, "hidden_size"),
    ({"rope_scaling": {"type": "linear"}}, "linear.*factor"),
    (yarn(factor=None), "factor"),
    ({"num_key_value_heads": 3}, "num_attention_heads=4.*num_key_value_heads=3"),
    ({"num_key_value_heads": 8}, "num_key_value_heads=8"),
    ({"num_key_value_heads": ...}, "num_attention_heads=4.*num_key_value_heads=32"),
    ({"hidden_size": -96}, "hidden_size.*-96"),
    ({"num_hidden_layers": 0}, "num_hidden_layers.*0"),
    ({"num_key_value_heads": 0}, "num_key_value_heads.*0"),
    ({"vocab_size": "300"}, "vocab_size.*300"),
    ({"intermediate_size": [160]}, "intermediate_size"),
    ({"head_dim": 25}, "even.*head_dim|head_dim.*even"),
    ({"rms_norm_eps": 0.0}, "rms_norm_eps.*0"),
    ({"architectures": "Qwen3ForCausalLM"}, "architectures"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=str)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=f"(?s)config.json: .*{message}"):
        read(plain("qwen3", **changes))


def test_refuses_a_window_that_a_llama_file_asks_for():
    with pytest.raises(ValueError, match="sliding_window=4096 is not supported"):
        read(plain("llama", sliding_window=4096))


def test_a_qwen_files_window_is_off_unless_switched_on():
    check_against_transformers(plain("qwen2", sliding_window=4096))
    check_against_transformers(plain("qwen3", sliding_window=4096))


def test_refuses_a_hidden_size_that_heads_do_not_divide():
    with pytest.raises(ValueError, match=r"98.*multiple.*4"):
        read(plain("llama", hidden_size=98))


@pytest.mark.parametrize("text", ["", "{", "\xff", "[" * 50, "{'a': 1}"])
def test_refuses_what_is_not_json(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "config.json"))):
        read_model_config(tmp_path)


@pytest.mark.parametrize("text", ["[]", "null", "3"])
def test_refuses_json_that_is_no_object(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="cannot use"):
        read_model_config(tmp_path)


def test_refuses_a_folder_without_config(tmp_path):
    with pytest.raises(ValueError, match=r"cannot use .*config\.json"):
        read_model_config(tmp_path)
    with pytest.raises(ValueError, match=r"cannot use .*nowhere.*config\.json"):
        read_model_config(tmp_path / "nowhere")


@pytest.mark.parametrize("stated", [64, 128, 256, 1000])
def test_yarn_gives_the_original_length_times_its_factor(stated):
    """As vLLM derives it: a model's card says to add YaRN, and max_position_embeddings stays."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    rope["original_max_position_embeddings"] = 64
    fields = plain("qwen3", rope_parameters=rope, max_position_embeddings=stated)
    theirs = CLASSES["qwen3"].from_dict(dict(fields))
    ours = read(fields)
    factor = theirs.rope_parameters["factor"]
    original = theirs.rope_parameters["original_max_position_embeddings"]
    assert ours.derived_max_model_len == original * factor == 256
    assert ours.max_position_embeddings == theirs.max_position_embeddings == stated
    check_rope(ours, theirs)


def test_other_recipes_give_the_length_that_vllm_derives():
    for kind, rope in SCALINGS.items():
        rope = {"rope_type": kind, "rope_theta": 1e4, **rope}
        ours = read(plain("llama", rope_parameters=rope, max_position_embeddings=512))
        original = rope.get("original_max_position_embeddings")
        lengths = {"linear": 1024, "llama3": 512, "yarn": original and original * rope["factor"]}
        assert ours.derived_max_model_len == lengths[kind]
    assert read(plain("llama", max_position_embeddings=512)).derived_max_model_len == 512


@pytest.mark.parametrize("factor", [1e30, float("inf"), 1e-9])
def test_a_factor_that_leads_to_no_length_is_refused(factor):
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": factor}
    with pytest.raises(ValueError, match=r"rope_parameters=.* lead to .* positions"):
        read(plain("llama", rope_parameters=rope))
