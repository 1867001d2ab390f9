"""Loader: from a folder of safetensors files to a model whose every parameter is filled, once.

A checkpoint tensor that is missing, left over, misshapen or there twice is an error that lists the
names: a weight that silently stays uninitialised costs days. Only safetensors are read, never
pickles; each rank reads only its own share of every tensor.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm

from nanovllm.config import EngineArgs
from nanovllm.model.decoder import Decoder
from nanovllm.model.model_config import ModelConfig, as_tuple
from nanovllm.model.ranks import Ranks, Shard
from nanovllm.ops.backend import Backend
from nanovllm.sampling_params import SamplingParams

INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model"]
SAMPLING_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
WEIGHT_TYPES = ("F64", "F32", "BF16", "F16")  # others need scales that are not read here
NOT_WEIGHTS = ("rotary_emb.inv_freq",)  # a buffer that old Llama checkpoints carry
FUSED = ("qkv_proj.", "gate_up_proj.")  # products of several layers, which checkpoints keep apart


def find_model(model: str, revision: str | None, role: str = "model") -> Path:
    """The folder of a model: a local one, or a Hugging Face id's in the hub's cache.

    Raises ValueError with what can be done about it if it is neither here nor to be had.
    """
    if model and Path(model).is_dir():
        return Path(model)
    wanted = [*TOKENIZER_FILES, "*.safetensors"] if role == "model" else TOKENIZER_FILES
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=wanted))
    except (OSError, ValueError) as error:  # offline, unknown, forbidden, or not an id at all
        raise ValueError(
            f"{role}={model!r} is not a local folder, and the Hugging Face hub did not give it "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Check the name, or download "
            f"it while online; HF_HUB_OFFLINE=1 uses the local cache alone."
        ) from error


def load_tokenizer(args: EngineArgs, folder: Path) -> Any:
    """The model's tokenizer, or the one the arguments name; code in its folder is never run."""
    from transformers import AutoTokenizer  # takes a second to import; not every use needs it

    where = folder if args.tokenizer is None else find_model(args.tokenizer, None, "tokenizer")
    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        raise ValueError(
            f"no tokenizer could be read from {args.tokenizer or args.model!r} ({error}); "
            f"skip_tokenizer_init=True does without one"
        ) from error


def stop_ids_of(folder: Path, config: ModelConfig, tokenizer: Any) -> tuple[frozenset, dict]:
    """Every end-of-sequence id the model's files name, and the sampling defaults they give."""
    file = folder / "generation_config.json"
    try:
        generation = dict(json.loads(file.read_text()) if file.exists() else {})
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file.name} is not a JSON object: {error}") from error
    named = generation.get("eos_token_id"), getattr(tokenizer, "eos_token_id", None)
    eos = [*config.eos_token_ids, *as_tuple(named[0]), *as_tuple(named[1])]
    if not all(type(token_id) is int for token_id in eos):
        raise ValueError(f"{file.name}: eos_token_id must be ids, got {named[0]!r:.80}")
    defaults = {k: generation[k] for k in SAMPLING_DEFAULTS if generation.get(k) is not None}
    if generation.get("max_new_tokens") is not None:
        defaults["max_tokens"] = generation["max_new_tokens"]
    return frozenset(eos), defaults


def usual_params(defaults: dict[str, Any]) -> SamplingParams:
    """The model's own sampling parameters. ValueError for one that this engine does not have."""
    try:
        return SamplingParams(**defaults)
    except (TypeError, ValueError) as error:
        raise ValueError(f"generation_config.json: {error}; pass sampling_params") from error


def choose_dtype(dtype: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    """The dtype asked for; "auto": float32 on a CPU, float16 on a GPU before sm_80, else the
    checkpoint's."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cpu":
        return torch.float32
    return config.dtype if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def load_model(
    folder: Path, config: ModelConfig, backend: Backend, ranks: Ranks, args: EngineArgs
) -> Decoder:
    """A model with this rank's weights from `folder`. ValueError if they do not fit exactly."""
    try:
        with torch.device(args.device):
            model = Decoder(config, ranks, backend, args.max_model_len)
    except RuntimeError as error:  # torch's own OutOfMemoryError is one
        raise ValueError(f"no memory for a model of this config.json: {error}") from error
    load_weights(model, weight_files(folder), args.use_tqdm_on_load and ranks.rank == 0)
    return model


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names, or the one there is."""
    index = folder / INDEX
    names = {"model.safetensors"}
    if index.exists():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
            raise ValueError(f"{index.name} is not a safetensors index: {error!r}") from error
    for name in names:
        local = isinstance(name, str) and "\0" not in name and Path(name).name == name
        if not (local and (folder / name).is_file()):
            raise ValueError(f"weights file {name!r} is not in {folder}")
    return [folder / name for name in sorted(names)]


def load_weights(model: Decoder, files: list[Path], use_tqdm: bool) -> None:
    """Copy every checkpoint tensor into its place, and account for all of them."""
    places = parameters_by_name(model)
    filled: set[str] = set()
    problems: list[str] = []
    for file, name, tensor in _tensors(files, use_tqdm):
        if name.endswith(NOT_WEIGHTS) or (name == "lm_head.weight" and name not in places):
            continue  # a head that is tied was filled with the embedding
        shape = tensor.get_shape()
        if name not in places:
            problems.append(f"left over: {name} in {file.name}")
        elif name in filled:
            problems.append(f"there twice: {name}, again in {file.name}")
        elif tensor.get_dtype() not in WEIGHT_TYPES:
            problems.append(f"of another type: {name} is {tensor.get_dtype()}")
        elif shape != (wanted := whole_shape(*places[name])):
            problems.append(f"misshapen: {name} is {shape}, not {wanted}")
        else:
            parameter, shard = places[name]
            part = slice(shard.start, shard.start + shard.count)
            parameter.copy_(tensor[part] if shard.dim == 0 else tensor[:, part])
        filled.add(name)
    problems += [f"missing: {name}" for name in places if name not in filled]
    if problems:
        more = [f"… and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise ValueError("\n  ".join(["the weights do not fit the model", *problems[:20], *more]))


def parameters_by_name(model: Decoder) -> dict[str, tuple[Tensor, Shard]]:
    """Checkpoint tensor name -> the parameter it fills, and which part of the tensor that is."""
    found: dict[str, tuple[Tensor, Shard]] = {}
    for name, parameter in model.named_parameters():
        layer, _, kind = name.rpartition(".")
        shards = getattr(model.get_submodule(layer), "shards", {})
        for fused in FUSED:
            name = name.replace(fused, "")
        name = name if layer == "lm_head" else f"model.{name}"
        found[name] = (parameter, shards.get(kind, Ranks().shard(len(parameter))))
    return found


def whole_shape(parameter: Tensor, shard: Shard) -> list[int]:
    """The shape of the tensor that `parameter` is a shard of."""
    shape = list(parameter.shape)
    shape[shard.dim] = shard.size
    return shape


def _tensors(files: list[Path], use_tqdm: bool) -> Iterator[tuple]:
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                names = sorted(opened.keys())
                for name in tqdm(names, f"Loading {file.name}", disable=not use_tqdm):
                    yield file, name, opened.get_slice(name)
        except SafetensorError as error:
            raise ValueError(f"{file.name} is not a readable safetensors file: {error}") from error
