"""A random model of Qwen3-0.6B's shape: as fast as the real one, and there for nobody to download.

Speed depends on shapes, not on what the weights know. The model is made once, from a fixed seed,
with a small byte-level tokenizer, in the user's cache (1.2 GB):

    python -m course.random_model     # prints the folder; makes it if need be, in under a minute
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from course.smollm2 import cache_dir

FOLDER = "qwen3-0.6b-random-1"  # another recipe, another number
SEED = 0
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
HOLLOW = {  # next to no weights: a step's time is what a step costs whatever the model's size
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
}


def random_model_dir() -> Path:
    """The model's folder, complete; it is made on the first call, in a process of its own.

    So whoever measures memory or imports afterwards finds nothing of the making.
    """
    folder = cache_dir() / FOLDER
    if not folder.exists():
        subprocess.run([sys.executable, "-m", "course.random_model"], check=True, stdout=sys.stderr)
    return folder


def make(folder: Path, shape: dict[str, Any] = SHAPE) -> None:
    """Write the model beside `folder` and rename it: nobody ever sees half of one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        fresh = Path(scratch) / "fresh"
        write(fresh, shape)
        try:
            fresh.rename(folder)
        except OSError:  # another process was quicker
            if not folder.exists():
                raise


def hollow_model(folder: Path, layers: int) -> str:
    """A model of so many layers with next to no weights, written into `folder`; its name."""
    write(folder, {**SHAPE, **HOLLOW, "num_hidden_layers": layers})
    return str(folder)


def write(folder: Path, shape: dict[str, Any]) -> None:
    """Weights ~ N(0, 0.02) in bfloat16 as transformers initialises them, and a tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config
    from transformers.utils import logging

    logging.disable_progress_bar()  # a notebook keeps what is written to stderr
    torch.manual_seed(SEED)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = AutoModelForCausalLM.from_config(Qwen3Config(**shape, **ends), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


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
    target = cache_dir() / FOLDER
    if not target.exists():
        print(f"Making a random model of Qwen3-0.6B's shape in {target} (once) ...")
        make(target)
    print(target)
