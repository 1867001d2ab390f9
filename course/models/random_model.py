"""Random models of Qwen3's shapes: as fast as the real ones, and there for nobody to download.

Speed depends on shapes, not on what the weights know. A model is made once, from a fixed seed,
with a small byte-level tokenizer, in the user's cache (0.6B: 1.2 GB; 8B: 16.4 GB):

    python -m course.models.random_model    # prints the folder; makes it if missing, in a minute
    python -m course.models.random_model qwen3-8b
    python -m course.models.random_model hollow    # next to no weights: to try the rest
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from course import machine
from course.models.smollm2 import cache_dir
from course.processes import module_command

FOLDER = "qwen3-0.6b-random-1"  # another recipe, another number
SEED = 0
LAST_WORDS = 20  # lines of a failed attempt that its error repeats
SHAPE: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
}
QWEN3_8B: dict[str, Any] = {
    **SHAPE,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "tie_word_embeddings": False,
}
HOLLOW = {  # next to no weights: a step's time is what a step costs whatever the model's size
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
}

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-0.6b": (FOLDER, SHAPE),
    "qwen3-8b": ("qwen3-8b-random-1", QWEN3_8B),
    "hollow": ("hollow-random-1", {**SHAPE, **HOLLOW, "num_hidden_layers": 2}),
}


def random_model_dir(name: str = "qwen3-0.6b") -> Path:
    """Return the folder of a complete model, which the first call makes in a process of its own.

    Code that measures memory or imports afterwards then finds nothing of the making. The process
    reports its progress, and each line appears on sys.stderr as soon as it is written. The
    lines come through a pipe, because sys.stderr need not be a file: in a notebook's kernel under
    pytest it has no file number. A RuntimeError says why a model could not be made.
    """
    folder = cache_dir() / SHAPES[name][0]
    if folder.exists():
        return folder
    command = module_command("course.models.random_model", name)
    options: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    lines = []
    env = machine.environment() | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, env=env, **options) as process:
        for line in process.stdout or ():
            lines.append(line)
            print(line, end="", file=sys.stderr, flush=True)
    if process.returncode:
        raise RuntimeError(
            f"the random model {name} could not be made in {folder}: {' '.join(command)} ended "
            f"with exit code {process.returncode} and these words:\n{''.join(lines[-LAST_WORDS:])}"
        )
    return folder


Progress = Callable[[str], None]  # takes one line about how far the work is


def quiet(line: str) -> None:
    """Report nothing, because a lesson's page keeps every line that is printed."""


def make(folder: Path, shape: dict[str, Any] = SHAPE) -> None:
    """Write the model beside `folder` and rename it: nobody ever sees half of one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        fresh = Path(scratch) / "fresh"
        (write_quickly if shape is QWEN3_8B else write)(fresh, shape, print)
        try:
            fresh.rename(folder)
        except OSError:  # another process was quicker
            if not folder.exists():
                raise


def hollow_model(folder: Path, layers: int) -> str:
    """A model of so many layers with next to no weights, written into `folder`; its name."""
    write(folder, {**SHAPE, **HOLLOW, "num_hidden_layers": layers})
    return str(folder)


def write(folder: Path, shape: dict[str, Any], progress: Progress = quiet) -> None:
    """Weights ~ N(0, 0.02) in bfloat16 as transformers initialises them, and a tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config
    from transformers.utils import logging

    logging.disable_progress_bar()  # a notebook keeps what is written to stderr
    torch.manual_seed(SEED)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    progress("Drawing the weights ...")
    model = AutoModelForCausalLM.from_config(Qwen3Config(**shape, **ends), dtype=torch.bfloat16)
    progress(f"Writing {model.num_parameters():,} weights, 2 bytes each ...")
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def write_quickly(folder: Path, shape: dict[str, Any], progress: Progress = quiet) -> None:
    """As `write`, but all weights are stretches of one random block, in one file of plain bytes.

    A 16 GB file then takes as long as the disk needs, and never stands in memory. Norms are 1.
    """
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(**shape, bos_token_id=0, eos_token_id=0, dtype="bfloat16")
    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(config).state_dict()
    torch.manual_seed(SEED)
    noise = as_bytes(0.02 * torch.randn(2**25 + 1))  # an odd length: rows do not repeat soon
    folder.mkdir(parents=True)
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    num_weights = sum(weight.numel() for weight in weights.values())
    progress(f"Writing {num_weights:,} weights, 2 bytes each ...")
    with (folder / "model.safetensors").open("wb") as file:
        header = safetensors_header({name: list(w.shape) for name, w in weights.items()})
        file.write(header)
        for name, weight in weights.items():
            left = 2 * weight.numel()
            block = as_bytes(torch.ones(weight.numel())) if "norm" in name else noise
            while left:
                left -= file.write(block[:left])


def as_bytes(x: Any) -> memoryview:
    """A float32 tensor's values in bfloat16."""
    import torch

    return memoryview(x.to(torch.bfloat16).view(torch.uint8).numpy())


def safetensors_header(shapes: dict[str, list[int]]) -> bytes:
    """What stands before the bfloat16 tensors, which follow end to end: 8 bytes of length, JSON."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def byte_tokenizer() -> Any:
    """An id for each byte, 1 to 256, and 0 for the end of a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0, **{symbol: i for i, symbol in enumerate(symbols, start=1)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", nargs="?", default="qwen3-0.6b", choices=SHAPES)
    chosen = parser.parse_args().shape
    name, model_shape = SHAPES[chosen]
    target = cache_dir() / name
    if not target.exists():
        print(f"Making a random model of {chosen}'s shape in {target} (once) ...")
        start = time.monotonic()
        make(target, model_shape)
        print(f"Done in {time.monotonic() - start:.0f} s.")
    print(target)
