"""ModelConfig: what a checkpoint's config.json says, read once and checked.

The file is read as plain JSON: nothing in it is executed. Files written by transformers 4 and 5
are read alike, null means absent, and defaults are transformers'. A field that would change the
arithmetic in a way this engine does not have is refused by name, so that a model which loads is
the model that was meant.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAMILIES = {"Qwen3ForCausalLM": "qwen3", "Qwen2ForCausalLM": "qwen2", "LlamaForCausalLM": "llama"}
ROPE_NEEDS = {  # the RoPE types of rope.py, and what each cannot do without
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of one decoder-only transformer. Read it with `from_folder` or `from_dict`."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool  # the head's weight is the embedding's
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMSNorm of each head's query and key, before RoPE
    max_position_embeddings: int
    rope_parameters: dict[str, Any]  # rope_type, rope_theta, and what the type needs (see rope.py)
    dtype: str  # the weights' own, "bfloat16" say; "float32" if the file does not tell
    eos_token_ids: tuple[int, ...]  # may be empty: generation_config.json can have them instead

    @classmethod
    def from_folder(cls, path: str | Path) -> "ModelConfig":
        """Read `path`/config.json. ValueError for what is missing, wrong or not supported."""
        file = Path(path) / "config.json"
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read {file} as JSON: {error}") from None
        return cls.from_dict(config)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "ModelConfig":
        """The same, from the JSON object itself."""
        family = _family(config)
        _refuse_what_is_not_here(config, family)
        kv_heads, head_dim = _head_shape(config, family)
        bias = _read(config, "attention_bias", bool, False)  # of q, k, v and o, but for Qwen2
        dtype = _agreed("dtype", config.get("dtype"), config.get("torch_dtype"))
        return cls(
            architecture=config["architectures"][0],
            vocab_size=_read(config, "vocab_size", int),
            hidden_size=_read(config, "hidden_size", int),
            intermediate_size=_read(config, "intermediate_size", int),
            num_hidden_layers=_read(config, "num_hidden_layers", int),
            num_attention_heads=_read(config, "num_attention_heads", int),
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=_read(config, "rms_norm_eps", float, 1e-6),
            tie_word_embeddings=_read(config, "tie_word_embeddings", bool, False),
            qkv_bias=bias or family == "qwen2",
            o_bias=bias and family != "qwen2",
            mlp_bias=_read(config, "mlp_bias", bool, False) and family == "llama",
            qk_norm=family == "qwen3",
            max_position_embeddings=_read(config, "max_position_embeddings", int),
            rope_parameters=_rope_parameters(config),
            dtype=_one_of("dtype", dtype or "float32", "float32", "bfloat16", "float16"),
            eos_token_ids=_eos_token_ids(config),
        )


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"config.json: {message}")


def _one_of(name: str, value: Any, *supported: Any) -> Any:
    listed = " or ".join(repr(each) for each in supported)
    _need(value in supported, f"{name}={value!r} is not supported, only {listed}")
    return value


def _read(config: dict[str, Any], name: str, kind: type, default: Any = None) -> Any:
    """The field called `name`, of type int, float or bool; numbers must be positive and finite."""
    value = default if config.get(name) is None else config[name]
    right = type(value) is kind or (kind is float and type(value) is int)
    positive = "" if kind is bool else "positive "
    _need(
        right and (not positive or 0 < value < 2**31),
        f"{name} must be a {positive}{kind.__name__}, got {value!r}",
    )
    return value


def _agreed(name: str, *values: Any) -> Any:
    """What the places where `name` may stand agree on, or None if none of them has it."""
    values = tuple(value for value in values if value is not None)
    _need(values[1:] in ((), values[:1]), f"contradictory values of {name}: {values!r}")
    return values[0] if values else None


def _family(config: Any) -> str:
    _need(isinstance(config, dict), f"a JSON object was expected, got {config!r}")
    supported = [[architecture] for architecture in FAMILIES]
    (architecture,) = _one_of("architectures", config.get("architectures"), *supported)
    family = FAMILIES[architecture]
    _one_of("model_type", config.get("model_type"), family, None)
    return family


def _refuse_what_is_not_here(config: dict[str, Any], family: str) -> None:
    """Every field that would change the arithmetic: null and absent mean the usual."""
    _one_of("hidden_act", config.get("hidden_act"), "silu", None)
    _one_of("is_causal", config.get("is_causal"), True, None)
    _one_of("quantization_config", config.get("quantization_config"), None)
    _one_of("use_sliding_window", config.get("use_sliding_window"), False, None)
    if family == "llama" and "use_sliding_window" not in config:  # the Qwens name one, unused
        _one_of("sliding_window", config.get("sliding_window"), None)
    kinds = config.get("layer_types")
    full = ["full_attention"] * len(kinds) if isinstance(kinds, list) else None
    _one_of("layer_types", kinds, full)


def _head_shape(config: dict[str, Any], family: str) -> tuple[int, int]:
    """(KV heads, size of a head), with the family's defaults."""
    heads = _read(config, "num_attention_heads", int)
    hidden = _read(config, "hidden_size", int)
    absent = "num_key_value_heads" not in config
    default = 32 if absent and family != "llama" else heads
    kv_heads = _read(config, "num_key_value_heads", int, default)
    _need(
        heads % kv_heads == 0,
        f"num_attention_heads={heads} must divide by num_key_value_heads={kv_heads}",
    )
    derived = family != "qwen3" and config.get("head_dim") is None
    whole = hidden % heads == 0 or not derived
    _need(whole, f"hidden_size={hidden} must divide by num_attention_heads={heads}")
    head_dim = _read(config, "head_dim", int, 128 if family == "qwen3" else hidden // heads)
    _need(head_dim % 2 == 0, f"head_dim must be even, for RoPE turns pairs; got {head_dim}")
    return kv_heads, head_dim


def _rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """One dict: transformers 5's rope_parameters, or 4's rope_scaling and rope_theta."""
    rope = _agreed("rope_parameters", config.get("rope_parameters"), config.get("rope_scaling"))
    _need(isinstance(rope or {}, dict), f"rope_parameters must be a JSON object, got {rope!r}")
    rope = {name: value for name, value in (rope or {}).items() if value is not None}
    kind = _agreed("rope_type", rope.pop("rope_type", None), rope.pop("type", None)) or "default"
    _one_of("rope_type", kind, *ROPE_NEEDS)
    for name in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if (value := _agreed(name, rope.get(name), config.get(name))) is not None:
            rope[name] = value
    rope.setdefault("rope_theta", 10000.0)
    _check_rope(kind, rope)
    return {"rope_type": kind, **rope}


def _check_rope(kind: str, rope: dict[str, Any]) -> None:
    for name in rope:
        _read(rope, name, bool if name == "truncate" else float)
    _one_of("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), 1.0)
    _need(rope["rope_theta"] > 1, f"rope_theta must be above 1, got {rope['rope_theta']}")
    missing = [name for name in ROPE_NEEDS[kind] if name not in rope]
    _need(not missing, f"rope_type={kind!r} needs {', '.join(missing)}, got {rope!r}")
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        _need(low < high, f"low_freq_factor={low} must be below high_freq_factor={high}")


def _eos_token_ids(config: dict[str, Any]) -> tuple[int, ...]:
    ids = config.get("eos_token_id")
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    right = all(type(token_id) is int and token_id >= 0 for token_id in ids)
    _need(right, f"eos_token_id must be a token id or a list of them, got {ids!r}")
    return tuple(ids)
