"""Loader: from a folder of safetensors files to a model whose every parameter is filled, once.

A checkpoint tensor that is missing, left over, misshapen or there twice is an error that lists the
names: a weight that silently stays uninitialised costs days. Only safetensors are read, never
pickles; each rank reads only its own share of every tensor.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from nanovllm.config import EngineArgs
from nanovllm.model.decoder import CausalLM
from nanovllm.model.model_config import ModelConfig
from nanovllm.model.parallel import Ranks, Shard, ShardedLayer
from nanovllm.ops.attention import AttentionBackend

INDEX = "model.safetensors.index.json"
WANTED_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model"]
SAMPLING_DEFAULTS = ("temperature", "top_k", "top_p", "min_p")  # of generation_config.json
NOT_WEIGHTS = ("rotary_emb.inv_freq",)  # a buffer that old Llama checkpoints carry


def find_model(model: str, revision: str | None) -> Path:
    """The folder of a model: a local one, or a Hugging Face id's in the hub's cache.

    Raises ValueError with what can be done about it if it is neither here nor to be had.
    """
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=WANTED_FILES))
    except (OSError, ValueError) as error:  # offline, unknown, forbidden, or not an id at all
        raise ValueError(
            f"model={model!r} is not a local folder, and the Hugging Face hub did not give it "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Check the name, or download "
            f"it while online; HF_HUB_OFFLINE=1 uses the local cache alone."
        ) from error


def load_tokenizer(args: EngineArgs, folder: Path) -> Any:
    """The model's tokenizer, or the one the arguments name; code in its folder is never run."""
    from transformers import AutoTokenizer  # takes a second to import; not every use needs it

    where = folder if args.tokenizer is None else find_model(args.tokenizer, None)
    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        raise ValueError(
            f"no tokenizer could be read from {args.tokenizer or args.model!r} ({error}); "
            f"skip_tokenizer_init=True does without one"
        ) from error


def read_generation_config(folder: Path) -> dict[str, Any]:
    file = folder / "generation_config.json"
    return json.loads(file.read_text()) if file.exists() else {}


def stop_ids_of(
    folder: Path, config: ModelConfig, tokenizer: Any
) -> tuple[frozenset[int], dict[str, Any]]:
    """Every end-of-sequence id the model's files name, and the sampling defaults they give."""
    generation = read_generation_config(folder)
    named = generation.get("eos_token_id")
    eos = {*config.eos_token_ids, *([named] if isinstance(named, int) else named or ())}
    if getattr(tokenizer, "eos_token_id", None) is not None:
        eos.add(tokenizer.eos_token_id)
    defaults = {k: generation[k] for k in SAMPLING_DEFAULTS if generation.get(k) is not None}
    if generation.get("max_new_tokens") is not None:
        defaults["max_tokens"] = generation["max_new_tokens"]
    return frozenset(eos), defaults


def choose_dtype(dtype: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    """The dtype asked for; "auto": float32 on a CPU, float16 on a GPU before sm_80, else the
    checkpoint's."""
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    elif dtype == "auto":
        dtype = config.dtype if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    return getattr(torch, dtype)


def load_model(
    folder: Path,
    config: ModelConfig,
    backend: AttentionBackend,
    ranks: Ranks,
    max_len: int,
    dtype: torch.dtype,
    device: torch.device,
    use_tqdm: bool = True,
) -> CausalLM:
    """A model with this rank's weights from `folder`. ValueError if they do not fit exactly."""
    with device, default_dtype(dtype):
        model = CausalLM(config, ranks, backend, max_len)
    files = weight_files(folder)
    load_weights(model, files, use_tqdm and ranks.rank == 0)
    return model.eval()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make new tensors of `dtype`; put the caller's default back whatever happens."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names, or the one there is."""
    index = folder / INDEX
    names = {"model.safetensors"}
    if index.exists():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index.name} is not a safetensors index: {error!r}") from error
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"weights file {name!r} is not in {folder}")
    return [folder / name for name in sorted(names)]


def checkpoint_map(model: nn.Module) -> dict[str, tuple[Tensor, Shard]]:
    """Checkpoint tensor name -> the parameter it fills, and which part of it."""
    found = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            whole = Shard(tuple(parameter.shape), 0, 0, parameter.shape[0])
            shards = module.shards[name] if isinstance(module, ShardedLayer) else {"": whole}
            for layer, shard in shards.items():
                owner = f"{path.rpartition('.')[0]}.{layer}" if layer else path
                found[f"{owner}.{name}"] = (parameter, shard)
    return found


def load_weights(model: CausalLM, files: list[Path], use_tqdm: bool) -> None:
    """Copy every checkpoint tensor into its place, and account for all of them."""
    places = checkpoint_map(model)
    if model.lm_head.weight is model.model.embed_tokens.weight:
        del places["lm_head.weight"]  # tied: filled by the embedding
    filled: set[str] = set()
    problems: list[str] = []
    for file, name, tensor in _tensors(files, use_tqdm):
        if name.endswith(NOT_WEIGHTS) or (name == "lm_head.weight" and name not in places):
            continue
        if name not in places:
            problems.append(f"left over: {name} in {file.name}")
        elif name in filled:
            problems.append(f"there twice: {name}, again in {file.name}")
        elif tuple(tensor.get_shape()) != places[name][1].shape:
            wanted = places[name][1].shape
            problems.append(f"misshapen: {name} is {tensor.get_shape()}, not {list(wanted)}")
        else:
            _fill(*places[name], tensor)
        filled.add(name)
    problems += [f"missing: {name}" for name in places if name not in filled]
    if problems:
        more = [f"… and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise ValueError("\n  ".join(["the weights do not fit the model", *problems[:20], *more]))


def _tensors(files: list[Path], use_tqdm: bool) -> Iterator[tuple]:
    for file in tqdm(files, desc="Loading weights", disable=not use_tqdm):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in sorted(opened.keys()):
                    yield file, name, opened.get_slice(name)
        except SafetensorError as error:
            raise ValueError(f"{file.name} is not a readable safetensors file: {error}") from error


def _fill(parameter: Tensor, shard: Shard, tensor) -> None:
    """Copy a shard; `tensor` is a safetensors slice, so that only the shard is read."""
    window = slice(shard.start, shard.start + shard.count)
    part = tensor[window] if shard.dim == 0 else tensor[:, window]
    parameter.narrow(shard.dim, shard.offset, shard.count).copy_(part)
