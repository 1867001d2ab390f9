"""ModelConfig: what the decoder needs to know of a checkpoint, from its config.json, checked.

transformers reads the file: it knows each family's defaults, and the files of its own versions 4
and 5. A field that would change the arithmetic in a way this engine does not have is refused by
name, so that a model which loads is the model that was meant.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from nanovllm.layers.rope import ROPE_TYPES, scaled_frequencies
from nanovllm.validation import check_number

FAMILIES = {"Qwen3ForCausalLM": "qwen3", "Qwen2ForCausalLM": "qwen2", "LlamaForCausalLM": "llama"}
ONLY = {  # fields that change the arithmetic, and what this engine does; None and absent do too
    "hidden_act": "silu",
    "is_causal": True,
    "use_sliding_window": False,
    "sliding_window": None,
    "quantization_config": None,
}
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".npz")
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings")
LIMITS = {  # beyond these a file is damaged, and would cost hours or all the memory to find out
    **dict.fromkeys(SIZES, (1, 2**24)),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), (1, 2**14)),
    "num_hidden_layers": (1, 2**10),
    "head_dim": (2, 2**14),
    "rms_norm_eps": (1e-30, 1.0),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer. Fields have transformers' names, or are its by another name."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    derived_max_model_len: int  # positions that a request may have, as vLLM derives them
    rms_norm_eps: float
    tie_word_embeddings: bool  # the head's weight is the embedding's
    head_dim: int
    rope_frequencies: tuple[float, ...]  # [head_dim // 2], see rope.py
    rope_scale: float  # what cos and sin are multiplied by
    qk_norm: bool  # RMSNorm of each head's query and key, before RoPE
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    dtype: torch.dtype  # to compute in; as read, the weights' own
    eos_token_ids: tuple[int, ...]  # may be empty: generation_config.json can have them instead

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """Read `folder`/config.json. ValueError for what is missing, wrong or not supported."""
        raw = _read_config(Path(folder))
        family = _family_of(raw)
        try:
            for name in LIMITS.keys() & {k for k, v in raw.items() if v is not None}:
                check_number(name, raw[name], *LIMITS[name])
            found = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # json, transformers and huggingface_hub raise many kinds
            raise ValueError(f"cannot use {folder}/config.json: {error}") from error
        _refuse_what_is_not_here(found)
        heads = found.num_attention_heads
        if getattr(found, "head_dim", None) is None:
            found.head_dim = found.hidden_size // heads
        _need(found.head_dim % 2 == 0, f"head_dim={found.head_dim} must be even, for RoPE")
        frequencies, rope_scale = _frequencies_of(found)
        bias = getattr(found, "attention_bias", False)  # Qwen2 has no such field: q, k, v always do
        derived: dict[str, Any] = {
            "qk_norm": family == "qwen3",
            "qkv_bias": bias or family == "qwen2",
            "o_bias": bias and family != "qwen2",
            "mlp_bias": family == "llama" and found.mlp_bias,
            "dtype": found.dtype or torch.float32,
            "derived_max_model_len": _derived_max_model_len(found),
            "rope_frequencies": tuple(frequencies.tolist()),
            "rope_scale": rope_scale,
            "eos_token_ids": as_tuple(found.eos_token_id),
        }
        same = {f.name: getattr(found, f.name) for f in fields(cls) if f.name not in derived}
        config = cls(**same, **derived)
        ids = config.eos_token_ids
        _need(all(type(i) is int for i in ids), f"eos_token_id must be ids, got {ids!r}")
        kv_heads = config.num_key_value_heads
        whole = heads % kv_heads == 0
        _need(whole, f"num_attention_heads={heads} % num_key_value_heads={kv_heads} must be 0")
        return config


def as_tuple(ids: Any) -> tuple:
    """None, an id or a list of ids, as config files have them."""
    return tuple(ids) if isinstance(ids, list) else () if ids is None else (ids,)


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"config.json: {message}")


def _one_of(name: str, value: Any, supported: tuple) -> None:
    _need(value in supported, f"{name}={value!r} is not supported, only {supported}")


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        raw = json.loads(file.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"cannot use {file}: there is no such file. {files_read(folder)}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot use {file}: it cannot be read as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"cannot use {file}: it must hold a JSON object, got {raw!r:.80}")
    return raw


def files_read(folder: Path) -> str:
    """The end of a message about a missing file: formats that are read, and what `folder` holds."""
    held = sorted(file.name for file in folder.glob("*") if file.suffix in WEIGHT_SUFFIXES)
    more = [f"{len(held) - 3} more"] if len(held) > 3 else []
    return (
        f"Only folders in Hugging Face format are read, with config.json and weights as "
        f"safetensors: model.safetensors, or several files and model.safetensors.index.json. "
        f"This folder holds {', '.join([*held[:3], *more]) or 'no weights'}. To convert a model "
        f"of another format, load it with transformers and call its save_pretrained."
    )


def _family_of(raw: dict[str, Any]) -> str:
    """The model_type of a supported architecture.

    This is asked before transformers reads the file, because transformers would advise to run the
    Python code that comes with a model of an architecture that it does not know.
    """
    _one_of("architectures", raw.get("architectures"), tuple([name] for name in FAMILIES))
    family = FAMILIES[raw["architectures"][0]]
    _one_of("model_type", raw.get("model_type"), (family,))
    return family


def _refuse_what_is_not_here(found: Any) -> None:
    for name, value in ONLY.items():
        _one_of(name, getattr(found, name, None), (value, None))
    for kind in getattr(found, "layer_types", None) or ():
        _one_of("layer_types", kind, ("full_attention",))
    _one_of("dtype", found.dtype, (None, *DTYPES))
    rope = dict(found.rope_parameters)
    _one_of("rope_type", rope.get("rope_type"), ROPE_TYPES)
    numbers = [value for name, value in rope.items() if name not in ("rope_type", "type")]
    plain = all(isinstance(value, (int, float)) for value in numbers)
    plain = plain and all(rope.get(name, 1.0) > 0 for name in ("rope_theta", "factor"))
    _need(plain, f"rope_parameters={rope}: only positive numbers are supported")
    _one_of("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), (1.0,))


def _derived_max_model_len(found: Any) -> int:
    """The longest request that the model is made for, by vLLM's rule.

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
    _need(low <= length <= high, f"rope_parameters={rope} lead to {length:g} positions")
    return int(length)


def _frequencies_of(found: Any) -> tuple[Tensor, float]:
    try:
        return scaled_frequencies(found)
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"config.json: rope_parameters={found.rope_parameters}: {error!r}"
        ) from error
