"""Load a checkpoint's weights into a model, so that every parameter is filled exactly once.

A tensor that is missing, unknown, of the wrong shape or stored twice is an error that lists the
names, because a weight that silently stays uninitialised costs days to find. Each rank reads only
its own shard of every tensor.
"""

from pathlib import Path

import torch
from torch import Tensor

from nanovllm.checkpoint.safetensors_files import (
    EMBEDDING,
    FLOAT_TYPES,
    HEAD,
    find_weight_files,
    iterate_tensors,
    untie_different_head,
)
from nanovllm.config import EngineArgs
from nanovllm.distributed.ranks import Ranks, Shard
from nanovllm.layers.backend import Backend
from nanovllm.models.decoder import Decoder
from nanovllm.models.model_config import ModelConfig

IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)  # a buffer in old Llama checkpoints, not a weight
FUSED_PREFIXES = ("qkv_proj.", "gate_up_proj.")  # checkpoints store these layers' parts separately
MAX_PROBLEMS = 20  # in one error message


def resolve_dtype(dtype: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    """Return the dtype to compute in.

    "auto" means float32 on a CPU, float16 on a GPU older than compute capability 8.0 (which has no
    bfloat16), and the checkpoint's dtype otherwise.
    """
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cpu":
        return torch.float32
    return config.dtype if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def load_model(
    folder: Path, config: ModelConfig, backend: Backend, ranks: Ranks, args: EngineArgs
) -> Decoder:
    """Return a model with this rank's weights from `folder`, on args.device.

    Raises ValueError if the weights do not fit the config exactly, or if there is no memory.
    """
    files = find_weight_files(folder)
    config = untie_different_head(config, files, warn=ranks.rank == 0)
    max_model_len = args.max_model_len or config.derived_max_model_len
    try:
        with torch.device(args.device):
            model = Decoder(config, ranks, backend, max_model_len)
    except RuntimeError as error:  # torch's OutOfMemoryError is a RuntimeError
        raise ValueError(f"no memory for a model of this config.json: {error}") from error
    load_weights(model, files, args.use_tqdm_on_load and ranks.rank == 0)
    return model


def load_weights(model: Decoder, files: list[Path], use_tqdm: bool) -> None:
    """Copy every checkpoint tensor into its parameter, in place.

    Raises ValueError with the names of the tensors that do not fit and of those that are missing.
    """
    parameters = parameters_by_name(model)
    # A tied weight may be stored under either of its two names, or under both.
    targets = {HEAD: parameters[EMBEDDING], **parameters}
    loaded: set[str] = set()
    problems: list[str] = []
    for file, name, tensor in iterate_tensors(files, use_tqdm):
        if name.endswith(IGNORED_SUFFIXES):
            continue
        shape = tensor.get_shape()
        if name not in targets:
            problems.append(f"unknown: {name} in {file.name}")
        elif name in loaded:
            problems.append(f"stored twice: {name}, again in {file.name}")
        elif tensor.get_dtype() not in FLOAT_TYPES:
            problems.append(f"wrong type: {name} is {tensor.get_dtype()}")
        elif shape != (expected := unsharded_shape(*targets[name])):
            problems.append(f"wrong shape: {name} is {shape}, not {expected}")
        else:
            parameter, shard = targets[name]
            part = slice(shard.start, shard.start + shard.count)
            parameter.copy_(tensor[part] if shard.dim == 0 else tensor[:, part])
        loaded.add(name)
    if HEAD not in parameters and HEAD in loaded:
        loaded.add(EMBEDDING)
    problems += [f"missing: {name}" for name in parameters if name not in loaded]
    if problems:
        rest = len(problems) - MAX_PROBLEMS
        lines = problems[:MAX_PROBLEMS] + ([f"… and {rest} more"] if rest > 0 else [])
        raise ValueError("\n  ".join(["the weights do not fit the model", *lines]))


def parameters_by_name(model: Decoder) -> dict[str, tuple[Tensor, Shard]]:
    """Map each checkpoint tensor's name to the parameter it fills and its shard for this rank."""
    found: dict[str, tuple[Tensor, Shard]] = {}
    for name, parameter in model.named_parameters():
        layer, _, kind = name.rpartition(".")
        shards = getattr(model.get_submodule(layer), "shards", {})
        for prefix in FUSED_PREFIXES:
            name = name.replace(prefix, "")
        name = name if layer == "lm_head" else f"model.{name}"
        found[name] = (parameter, shards.get(kind, Ranks().shard(len(parameter))))
    return found


def unsharded_shape(parameter: Tensor, shard: Shard) -> list[int]:
    """Return the shape of the whole tensor that `parameter` is a shard of."""
    shape = list(parameter.shape)
    shape[shard.dim] = shard.size
    return shape
