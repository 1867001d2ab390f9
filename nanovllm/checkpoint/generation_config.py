"""Read a model's end-of-sequence ids and its sampling defaults."""

import json
from pathlib import Path
from typing import Any

from nanovllm.checkpoint.config_json import as_tuple
from nanovllm.config import EngineArgs
from nanovllm.models.model_config import ModelConfig
from nanovllm.sampling_params import SamplingParams

# The fields of generation_config.json that this engine uses, and the names of SamplingParams.
SAMPLING_DEFAULTS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def read_generation_config(
    folder: Path, config: ModelConfig, tokenizer: Any, args: EngineArgs | None = None
) -> tuple[frozenset[int], dict[str, Any]]:
    """Return all end-of-sequence ids in the model's files, and its sampling defaults.

    args.generation_config: "auto" reads the model's generation_config.json. "vllm" reads only its
    end-of-sequence ids, so that the defaults are those of SamplingParams. A folder's
    generation_config.json replaces the model's. Without `args`, the defaults of EngineArgs hold.

    Raises ValueError for a damaged file, for ids that are not numbers, and for a name in
    args.override_generation_config that is unknown here.
    """
    args = args or EngineArgs()
    overrides = args.override_generation_config
    if unknown := overrides.keys() - SAMPLING_DEFAULTS.keys():
        raise ValueError(
            f"override_generation_config takes {', '.join(SAMPLING_DEFAULTS)}, not {unknown}"
        )
    file = _find_file(folder, args.generation_config)
    generation = _read_json(file)
    eos_ids = generation.get("eos_token_id")
    eos = [
        *config.eos_token_ids,
        *as_tuple(eos_ids),
        *as_tuple(getattr(tokenizer, "eos_token_id", None)),
    ]
    if not all(type(token_id) is int for token_id in eos):
        raise ValueError(f"{file.name}: eos_token_id must be ids, got {eos_ids!r:.80}")
    fields = overrides if args.generation_config == "vllm" else {**generation, **overrides}
    defaults = {
        SAMPLING_DEFAULTS[name]: value
        for name, value in fields.items()
        if name in SAMPLING_DEFAULTS and value is not None
    }
    return frozenset(eos), defaults


def _find_file(folder: Path, source: str) -> Path:
    """Return the generation_config.json that `source` names, for a model in `folder`.

    The model's own file may be missing, and a file that the user named may not.
    """
    if source in ("auto", "vllm"):
        return folder / "generation_config.json"
    file = Path(source) / "generation_config.json"
    if not file.is_file():
        raise ValueError(
            f"generation_config={source!r} must be 'auto', 'vllm', or a folder that holds "
            f"generation_config.json"
        )
    return file


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text()) if file.exists() else {})
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file.name} is not a JSON object: {error}") from error


def make_default_params(defaults: dict[str, Any]) -> SamplingParams:
    """Return SamplingParams with a model's defaults.

    Raises ValueError for a default that this engine does not support.
    """
    try:
        return SamplingParams(**defaults)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"generation_config.json: {error}; pass sampling_params, or generation_config='vllm'"
        ) from error
