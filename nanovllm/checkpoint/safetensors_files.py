"""Find and open the safetensors files of a checkpoint.

Only safetensors files are read, because a pickle can run any code while it is loaded.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from nanovllm.checkpoint.config_json import supported_files
from nanovllm.models.model_config import ModelConfig

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOAT_TYPES = ("F64", "F32", "BF16", "F16")  # other types need scales, which are not read here
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"  # one weight, if they are tied
ROWS_PER_COMPARISON = 1024  # so that neither the head nor the embedding is in memory as a whole


def find_weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint: those in its index, or its single file.

    Raises ValueError if a file is missing or outside of the folder, if the index is damaged, and
    if the folder holds both an index and a single file.
    """
    index = folder / INDEX_FILE
    names = {SINGLE_FILE}
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
            download = f"{INDEX_FILE} names it; download the model again."
            advice = download if index.exists() else supported_files(folder)
            raise ValueError(f"weights file {name!r} is not in {folder}. {advice}")
    if SINGLE_FILE not in names and (folder / SINGLE_FILE).is_file():
        raise ValueError(
            f"{folder} holds {SINGLE_FILE} and also a safetensors index of other files, "
            f"{INDEX_FILE}. Some tools read one and some the other; remove the one that is not "
            f"meant."
        )
    return [folder / name for name in sorted(names)]


@contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    """Open a safetensors file. Raises ValueError if it is damaged, also while it is read."""
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(f"{file.name} is not a readable safetensors file: {error}") from error


def iterate_tensors(files: list[Path], use_tqdm: bool) -> Iterator[tuple[Path, str, Any]]:
    """Yield the file, the name and a lazy slice of each tensor. A slice reads what is indexed."""
    for file in files:
        with open_safetensors(file) as opened:
            names = sorted(opened.keys())
            for name in tqdm(names, f"Loading {file.name}", disable=not use_tqdm):
                yield file, name, opened.get_slice(name)


def untie_different_head(config: ModelConfig, files: list[Path], warn: bool) -> ModelConfig:
    """Return the config, without its tie if the files hold a head unlike the embedding.

    Such a head was trained separately, so ignoring it would change the model's answers.
    transformers 5 makes the same decision. warn: whether to tell the user.
    """
    if not (config.tie_word_embeddings and is_head_different(files, config.dtype)):
        return config
    if warn:
        warnings.warn(
            f"{files[0].parent}/config.json says tie_word_embeddings=true, but {HEAD} differs from "
            f"{EMBEDDING}, so the head is not tied to the embedding. Write false there if this "
            f"head is right; remove it from the files if it is not.",
            stacklevel=3,
        )
    return replace(config, tie_word_embeddings=False)


def is_head_different(files: list[Path], dtype: torch.dtype) -> bool:
    """Return whether a checkpoint holds a head and an embedding that are not equal in `dtype`.

    Every rank compares all rows, not only those of its shard, so that all ranks get the same
    answer. The search ends at the first rows that differ.
    """
    with ExitStack() as stack:
        found: dict[str, Any] = {}
        for file in files:
            opened = stack.enter_context(open_safetensors(file))
            found |= {name: opened.get_slice(name) for name in {HEAD, EMBEDDING} & {*opened.keys()}}
        if len(found) < 2:
            return False
        head, embedding = found[HEAD], found[EMBEDDING]
        shape = head.get_shape()
        are_floats = {head.get_dtype(), embedding.get_dtype()} <= {*FLOAT_TYPES}
        if not are_floats or len(shape) != 2 or shape != embedding.get_shape():
            return True
        starts = range(0, shape[0], ROWS_PER_COMPARISON)
        parts = [slice(start, start + ROWS_PER_COMPARISON) for start in starts]
        return not all(
            torch.equal(head[part].to(dtype), embedding[part].to(dtype)) for part in parts
        )
