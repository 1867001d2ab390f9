"""Read a checkpoint's config.json into a ModelConfig, or refuse it.

transformers reads the file, because it knows each family's defaults and the formats of its own
versions 4 and 5. We refuse by name every field that would change the arithmetic in a way that this
engine does not have. A model that loads therefore computes what its authors meant.
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nanovllm.layers.rope import rope_frequencies
from nanovllm.models.model_config import ModelConfig
from nanovllm.validation import check_number

FAMILIES = {"Qwen3ForCausalLM": "qwen3", "Qwen2ForCausalLM": "qwen2", "LlamaForCausalLM": "llama"}
# Fields that change the arithmetic, and the only value that this engine supports. A field may also
# be None or absent.
SUPPORTED = {
    "hidden_act": "silu",
    "is_causal": True,
    "use_sliding_window": False,
    "sliding_window": None,
    "quantization_config": None,
}
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".npz")
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings")
# A value beyond these limits means that the file is damaged. Without the check, we would find out
# only after hours, or when the memory is used up.
LIMITS = {
    **dict.fromkeys(SIZES, (1, 2**24)),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), (1, 2**14)),
    "num_hidden_layers": (1, 2**10),
    "head_dim": (2, 2**14),
    "rms_norm_eps": (1e-30, 1.0),
}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # recipes that need only the config
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def read_model_config(folder: Path) -> ModelConfig:
    """Read `folder`/config.json.

    Raises ValueError if the file is missing or damaged, or if it asks for what is not supported.
    """
    raw = read_json(Path(folder))
    family = family_of(raw)
    try:
        for name in LIMITS.keys() & {k for k, v in raw.items() if v is not None}:
            check_number(name, raw[name], *LIMITS[name])
        found = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # json, transformers and huggingface_hub raise many kinds
        raise ValueError(f"cannot use {folder}/config.json: {error}") from error
    check_supported(found)
    if getattr(found, "head_dim", None) is None:
        found.head_dim = found.hidden_size // found.num_attention_heads
    check(found.head_dim % 2 == 0, f"head_dim={found.head_dim} must be even, for RoPE")
    derived = derived_fields(found, family)
    copied = {f.name: getattr(found, f.name) for f in fields(ModelConfig) if f.name not in derived}
    config = ModelConfig(**copied, **derived)
    check_consistent(config)
    return config


def derived_fields(found: Any, family: str) -> dict[str, Any]:
    """Return the fields of ModelConfig that transformers' config has in another form."""
    frequencies, rope_scale = frequencies_of(found)
    bias = getattr(found, "attention_bias", False)  # Qwen2 lacks it: q, k and v always have a bias
    return {
        "qk_norm": family == "qwen3",
        "qkv_bias": bias or family == "qwen2",
        "o_bias": bias and family != "qwen2",
        "mlp_bias": family == "llama" and found.mlp_bias,
        "dtype": found.dtype or torch.float32,
        "derived_max_model_len": derived_max_model_len(found),
        "rope_frequencies": tuple(frequencies.tolist()),
        "rope_scale": rope_scale,
        "eos_token_ids": as_tuple(found.eos_token_id),
    }


def check_consistent(config: ModelConfig) -> None:
    """Raise ValueError if fields contradict each other, or if an end-of-sequence id is no id."""
    ids = config.eos_token_ids
    check(all(type(i) is int for i in ids), f"eos_token_id must be ids, got {ids!r}")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    divides = heads % kv_heads == 0
    check(divides, f"num_attention_heads={heads} % num_key_value_heads={kv_heads} must be 0")


def as_tuple(ids: Any) -> tuple:
    """Return the ids that a config file gives as None, as one id, or as a list."""
    return tuple(ids) if isinstance(ids, list) else () if ids is None else (ids,)


def check(condition: bool, message: str) -> None:
    """Raise ValueError with `message` unless the condition holds."""
    if not condition:
        raise ValueError(f"config.json: {message}")


def check_one_of(name: str, value: Any, supported: tuple) -> None:
    """Raise ValueError that names the field unless its value is one of the supported ones."""
    check(value in supported, f"{name}={value!r} is not supported, only {supported}")


def read_json(folder: Path) -> dict[str, Any]:
    """Return the object in `folder`/config.json."""
    file = folder / "config.json"
    try:
        raw = json.loads(file.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"cannot use {file}: there is no such file. {supported_files(folder)}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot use {file}: it cannot be read as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"cannot use {file}: it must hold a JSON object, got {raw!r:.80}")
    return raw


def supported_files(folder: Path) -> str:
    """Return the end of a message about a missing file: which files we read, and what is there."""
    found = sorted(file.name for file in folder.glob("*") if file.suffix in WEIGHT_SUFFIXES)
    more = [f"{len(found) - 3} more"] if len(found) > 3 else []
    return (
        f"Only folders in Hugging Face format are read, with config.json and weights as "
        f"safetensors: model.safetensors, or several files and model.safetensors.index.json. "
        f"This folder holds {', '.join([*found[:3], *more]) or 'no weights'}. To convert a model "
        f"of another format, load it with transformers and call its save_pretrained."
    )


def family_of(raw: dict[str, Any]) -> str:
    """Return the model_type of a supported architecture.

    We check it before transformers reads the file. For an architecture that transformers does not
    know, its message advises the user to run the Python code that comes with the model.
    """
    check_one_of("architectures", raw.get("architectures"), tuple([name] for name in FAMILIES))
    family = FAMILIES[raw["architectures"][0]]
    check_one_of("model_type", raw.get("model_type"), (family,))
    return family


def check_supported(found: Any) -> None:
    """Raise ValueError for a field that asks for arithmetic that this engine does not have."""
    for name, value in SUPPORTED.items():
        check_one_of(name, getattr(found, name, None), (value, None))
    for kind in getattr(found, "layer_types", None) or ():
        check_one_of("layer_types", kind, ("full_attention",))
    check_one_of("dtype", found.dtype, (None, *DTYPES))
    rope = dict(found.rope_parameters)
    check_one_of("rope_type", rope.get("rope_type"), ROPE_TYPES)
    numbers = [value for name, value in rope.items() if name not in ("rope_type", "type")]
    valid = all(isinstance(value, (int, float)) for value in numbers)
    valid = valid and all(rope.get(name, 1.0) > 0 for name in ("rope_theta", "factor"))
    check(valid, f"rope_parameters={rope}: only positive numbers are supported")
    check_one_of("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), (1.0,))


def derived_max_model_len(found: Any) -> int:
    """Return the length of the longest request that the model is made for, by vLLM's rule.

    YaRN stretches the original length by its factor, whether or not max_position_embeddings has
    been raised as well. "linear" stretches max_position_embeddings. Llama 3's recipe stretches
    nothing, because its max_position_embeddings already holds the length that it leads to.
    """
    rope, length = found.rope_parameters, found.max_position_embeddings
    if rope["rope_type"] == "yarn":
        length = rope.get("original_max_position_embeddings") or length
    if rope["rope_type"] in ("linear", "yarn"):
        length *= rope["factor"]
    low, high = LIMITS["max_position_embeddings"]
    check(low <= length <= high, f"rope_parameters={rope} lead to {length:g} positions")
    return int(length)


def frequencies_of(found: Any) -> tuple[Tensor, float]:
    """Return `scaled_frequencies`; raise ValueError if a recipe cannot use its parameters."""
    try:
        return scaled_frequencies(found)
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"config.json: rope_parameters={found.rope_parameters}: {error!r}"
        ) from error


def scaled_frequencies(config: Any) -> tuple[Tensor, float]:
    """Return RoPE's frequencies [head_dim // 2], and the factor by which to scale cos and sin.

    Models for long texts come with a recipe that changes the frequencies. transformers has these
    recipes, so we call its functions.
    """
    rope_type = config.rope_parameters["rope_type"]
    if rope_type == "default":
        return rope_frequencies(config.head_dim, config.rope_parameters["rope_theta"]), 1.0
    return ROPE_INIT_FUNCTIONS[rope_type](config)
