"""Loader: from a folder of safetensors files to a model whose every parameter is filled, once.

A checkpoint tensor that is missing, left over, misshapen or there twice is an error that lists the
names: a weight that silently stays uninitialised costs days. Only safetensors are read, never
pickles; each rank reads only its own share of every tensor.
"""

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm

from nanovllm.config import EngineArgs
from nanovllm.distributed.ranks import Ranks, Shard
from nanovllm.model.decoder import Decoder
from nanovllm.model.model_config import ModelConfig, as_tuple, files_read
from nanovllm.ops.backend import Backend
from nanovllm.sampling_params import SamplingParams
from nanovllm.validation import check_unicode, is_panic

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model"]
SAMPLING_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
WEIGHT_TYPES = ("F64", "F32", "BF16", "F16")  # others need scales that are not read here
NOT_WEIGHTS = ("rotary_emb.inv_freq",)  # a buffer that old Llama checkpoints carry
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"  # one weight, if they are tied
ROWS_COMPARED = 1024  # of the head and the embedding at a time, so that neither is held whole
FUSED = ("qkv_proj.", "gate_up_proj.")  # products of several layers, which checkpoints keep apart


def find_model(model: str, revision: str | None, role: str = "model") -> Path:
    """The folder of a model: a local one, or a Hugging Face id's in the hub's cache.

    A leading `~` stands for the user's home. Raises ValueError with what can be done about it if
    the model is neither here nor to be had.
    """
    local = os.path.expanduser(model)
    if os.path.isdir(local):
        return Path(local)
    if os.path.isfile(local):
        raise ValueError(
            f"{role}={model!r} is a file; give the folder that holds it. A model's folder has "
            f"config.json, *.safetensors and its tokenizer's files; no other format is read."
        )
    check_unicode(role, model)
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
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        if len(tokenizer) <= len(tokenizer.all_special_tokens):  # made up by transformers
            raise ValueError("it has special tokens alone; is tokenizer.json missing?")
    except BaseException as error:  # transformers raises many kinds
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        reason = str(error)
        if is_panic(error):
            reason = f"its tokenizer.json is damaged: {error}"
        elif "trust_remote_code" in reason:  # which this engine would refuse
            reason = "it needs Python code of its own, and a model's code is never run"
        raise ValueError(
            f"no tokenizer could be read from {args.tokenizer or args.model!r} ({reason}); name "
            f"another folder with tokenizer=, or use skip_tokenizer_init=True to do without one"
        ) from error
    return tokenizer


def stop_ids_of(
    folder: Path, config: ModelConfig, tokenizer: Any, args: EngineArgs | None = None
) -> tuple[frozenset, dict]:
    """Every end-of-sequence id the model's files name, and the sampling defaults they give.

    args.generation_config: "auto" reads the model's own generation_config.json. "vllm" takes its
    end-of-sequence ids alone, so that the defaults are those of SamplingParams. A folder's file
    takes the place of the model's. Without args, those of EngineArgs() hold.
    """
    args = args or EngineArgs()
    source = args.generation_config
    file = (folder if source in ("auto", "vllm") else Path(source)) / "generation_config.json"
    if source not in ("auto", "vllm") and not file.is_file():
        raise ValueError(
            f"generation_config={source!r} must be 'auto', 'vllm', or a folder that holds "
            f"generation_config.json"
        )
    try:
        generation = dict(json.loads(file.read_text()) if file.exists() else {})
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file.name} is not a JSON object: {error}") from error
    named = generation.get("eos_token_id"), getattr(tokenizer, "eos_token_id", None)
    eos = [*config.eos_token_ids, *as_tuple(named[0]), *as_tuple(named[1])]
    if not all(type(token_id) is int for token_id in eos):
        raise ValueError(f"{file.name}: eos_token_id must be ids, got {named[0]!r:.80}")
    given = {**({} if source == "vllm" else generation), **args.override_generation_config}
    names = {name: name for name in SAMPLING_DEFAULTS} | {"max_new_tokens": "max_tokens"}
    if unknown := args.override_generation_config.keys() - names.keys():
        raise ValueError(f"override_generation_config takes {', '.join(names)}, not {unknown}")
    defaults = {names[k]: v for k, v in given.items() if k in names and v is not None}
    return frozenset(eos), defaults


def usual_params(defaults: dict[str, Any]) -> SamplingParams:
    """The model's own sampling parameters. ValueError for one that this engine does not have."""
    try:
        return SamplingParams(**defaults)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"generation_config.json: {error}; pass sampling_params, or generation_config='vllm'"
        ) from error


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
    files = weight_files(folder)
    config = untie_if_different(config, files, warn=ranks.rank == 0)
    try:
        with torch.device(args.device):
            model = Decoder(config, ranks, backend, args.max_model_len)
    except RuntimeError as error:  # torch's own OutOfMemoryError is one
        raise ValueError(f"no memory for a model of this config.json: {error}") from error
    load_weights(model, files, args.use_tqdm_on_load and ranks.rank == 0)
    return model


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names, or the one there is."""
    index = folder / INDEX
    names = {WHOLE}
    if index.exists():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
            raise ValueError(f"{index.name} is not a safetensors index: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or "\0" in name or Path(name).name != name:
            raise ValueError(
                f"{index} names the weights file {name!r}; it may only name files beside it"
            )
        if not (folder / name).is_file():
            named = f"{INDEX} names it; download the model again."
            advice = named if index.exists() else files_read(folder)
            raise ValueError(f"weights file {name!r} is not in {folder}. {advice}")
    if WHOLE not in names and (folder / WHOLE).is_file():
        raise ValueError(
            f"{folder} holds {WHOLE} and a safetensors index of other files, {INDEX}. Not "
            f"all tools read the same one; remove the one that is not meant."
        )
    return [folder / name for name in sorted(names)]


def untie_if_different(config: ModelConfig, files: list[Path], warn: bool) -> ModelConfig:
    """The config, without its tie if the files hold a head that differs from the embedding.

    transformers 5 does the same: a head that somebody trained apart is not thrown away.
    """
    if not (config.tie_word_embeddings and head_differs(files, config.dtype)):
        return config
    if warn:
        warnings.warn(
            f"{files[0].parent}/config.json says tie_word_embeddings=true, but {HEAD} differs from "
            f"{EMBEDDING}, so the head is not tied to the embedding. Write false there if the head "
            f"is meant; take it out of the files if it is not.",
            stacklevel=3,
        )
    return replace(config, tie_word_embeddings=False)


def head_differs(files: list[Path], dtype: torch.dtype) -> bool:
    """Whether a checkpoint holds a head and an embedding that are not equal in `dtype`.

    Every rank compares all rows, not only its own share, so that all come to the same answer. The
    first rows that differ end the search.
    """
    with ExitStack() as stack:
        found: dict[str, Any] = {}
        for file in files:
            opened = stack.enter_context(_opened(file))
            found |= {name: opened.get_slice(name) for name in {HEAD, EMBEDDING} & {*opened.keys()}}
        if len(found) < 2:
            return False
        head, embedding = found[HEAD], found[EMBEDDING]
        shape = head.get_shape()
        known = {head.get_dtype(), embedding.get_dtype()} <= {*WEIGHT_TYPES}
        if not known or len(shape) != 2 or shape != embedding.get_shape():
            return True
        parts = [slice(i, i + ROWS_COMPARED) for i in range(0, shape[0], ROWS_COMPARED)]
        return not all(
            torch.equal(head[part].to(dtype), embedding[part].to(dtype)) for part in parts
        )


def load_weights(model: Decoder, files: list[Path], use_tqdm: bool) -> None:
    """Copy every checkpoint tensor into its place, and account for all of them."""
    parameters = parameters_by_name(model)
    places = {HEAD: parameters[EMBEDDING], **parameters}  # a tied weight has either name, or both
    filled: set[str] = set()
    problems: list[str] = []
    for file, name, tensor in _tensors(files, use_tqdm):
        if name.endswith(NOT_WEIGHTS):
            continue
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
    if HEAD not in parameters and HEAD in filled:
        filled.add(EMBEDDING)
    problems += [f"missing: {name}" for name in parameters if name not in filled]
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
        with _opened(file) as opened:
            names = sorted(opened.keys())
            for name in tqdm(names, f"Loading {file.name}", disable=not use_tqdm):
                yield file, name, opened.get_slice(name)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(f"{file.name} is not a readable safetensors file: {error}") from error
