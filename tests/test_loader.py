"""The loader fills every parameter once, with the right values, or says by name what is wrong."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanovllm.config import EngineArgs
from nanovllm.model.decoder import Decoder
from nanovllm.model.loader import find_model, load_model, load_tokenizer
from nanovllm.model.model_config import ModelConfig
from nanovllm.model.parallel import ColumnLinear
from nanovllm.model.ranks import Ranks
from nanovllm.ops.backend import TORCH

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
DOWN_PROJ = "model.layers.1.mlp.down_proj.weight"
INDEX = "model.safetensors.index.json"


def load(folder: Path, rank: int = 0, size: int = 1, dtype: torch.dtype = torch.float32) -> Decoder:
    config = replace(ModelConfig.from_folder(folder), dtype=dtype)
    args = EngineArgs(str(folder), device="cpu", max_model_len=64, use_tqdm_on_load=False)
    return load_model(folder, config, TORCH, Ranks(rank, size), args)


def weights_of(folder: Path) -> dict[str, Tensor]:
    """All the checkpoint's tensors, read without the loader."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.fixture
def copy(tiny_model, tmp_path) -> Callable[..., Path]:
    """copy(family=..., ...) -> a tiny model's folder that the test may spoil."""
    return lambda **options: Path(shutil.copytree(tiny_model(**options), tmp_path / "model"))


def rewrite(folder: Path, **changes: Tensor | None) -> None:
    """Put tensors into model.safetensors, by name; None takes one out."""
    weights = {**weights_of(folder), **changes}
    kept = {name: tensor for name, tensor in weights.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")


def set_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refuses(folder: Path, *messages: str) -> None:
    """Loading raises a ValueError that holds each of `messages`, and leaves the default dtype."""
    with pytest.raises(ValueError) as caught:
        load(folder)
    for message in messages:
        assert message in str(caught.value)
    assert torch.get_default_dtype() == torch.float32


# -- what fits -------------------------------------------------------------------------------------

OPTIONS = {
    "qwen3": {},
    "qwen3, tied, sharded": {"tied": True, "sharded": True},
    "qwen2, sharded, 301 ids": {"family": "qwen2", "sharded": True, "vocab": 301},
    "llama, biases": {"family": "llama", "attention_bias": True, "mlp_bias": True},
    "llama, one KV head": {"family": "llama", "kv_heads": 1, "layers": 3, "tied": True},
}


def checkpoint_name(name: str) -> str:
    """A parameter's name in the checkpoint."""
    name = name.replace("qkv_proj.", "").replace("gate_up_proj.", "")
    return name if name.startswith("lm_head") else f"model.{name}"


def share(name: str, whole: Tensor, rank: int, size: int, heads: dict[str, int]) -> Tensor:
    """This rank's part of one checkpoint tensor."""
    layer, kind = name.split(".")[-2:]
    if layer in ("o_proj", "down_proj") and kind == "weight":
        return whole.chunk(size, dim=1)[rank]
    if layer in ("q_proj", "gate_proj", "up_proj"):
        return whole.chunk(size)[rank]
    if layer in ("k_proj", "v_proj"):
        copies = max(1, size // heads["kv"])  # fewer KV heads than ranks: some hold the same one
        return whole.chunk(size // copies)[rank // copies]
    if layer in ("embed_tokens", "lm_head"):
        return whole[rank * len(whole) // size : (rank + 1) * len(whole) // size]
    return whole


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_parameter_is_filled(tiny_model, name, size):
    folder = tiny_model(**OPTIONS[name])
    weights = weights_of(folder)
    heads = {"kv": ModelConfig.from_folder(folder).num_key_value_heads}
    assert len(list(folder.glob("*.safetensors"))) == 1 or "sharded" in name
    for rank in range(size):
        model = load(folder, rank, size)
        for parameter, value in model.named_parameters():
            name = checkpoint_name(parameter)
            wanted = share(name, weights[name], rank, size, heads)
            assert torch.equal(value, wanted), (rank, parameter)
            assert not value.requires_grad
        for module in model.modules():
            if isinstance(module, ColumnLinear):  # what it multiplies by is what was filled
                assert torch.equal(module.weight, torch.cat([p.weight for p in module.children()]))


def test_a_tied_head_is_the_embedding(tiny_model):
    model = load(tiny_model(tied=True))
    assert model.lm_head.weight is model.embed_tokens.weight
    untied = load(tiny_model())
    assert not torch.equal(untied.lm_head.weight, untied.embed_tokens.weight)


def test_a_tied_checkpoint_may_carry_its_head(copy):
    folder = copy(tied=True)
    weights = weights_of(folder)
    rewrite(folder, **{"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    assert torch.equal(load(folder).lm_head.weight, weights["model.embed_tokens.weight"])


def test_rotary_buffers_of_old_checkpoints_are_no_weights(copy):
    folder = copy(family="llama")
    rewrite(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    load(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_are_converted(copy, dtype):
    folder = copy()
    saved = {name: tensor.to(torch.bfloat16) for name, tensor in weights_of(folder).items()}
    save_file(saved, folder / "model.safetensors")
    model = load(folder, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.equal(model.lm_head.weight, saved["lm_head.weight"].to(dtype))
    assert model.rope.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


# -- what does not ---------------------------------------------------------------------------------


def test_missing(copy):
    folder = copy()
    rewrite(folder, **{Q_PROJ: None, DOWN_PROJ: None, "model.norm.weight": None})
    refuses(folder, f"missing: {Q_PROJ}", f"missing: {DOWN_PROJ}", "missing: model.norm.weight")


def test_a_missing_head_is_no_tied_one(copy):
    folder = copy()
    rewrite(folder, **{"lm_head.weight": None})
    refuses(folder, "missing: lm_head.weight")


def test_left_over(copy):
    folder = copy()
    names = ("model.layers.2.self_attn.q_proj.weight", "model.vision.weight", "lm_head.bias")
    rewrite(folder, **{name: torch.ones(3) for name in names})
    refuses(folder, *[f"left over: {name} in model.safetensors" for name in names])


@pytest.mark.parametrize("bias", ["q_proj", "o_proj"])
def test_biases_must_be_where_the_config_says(copy, bias):
    folder = copy(attention_bias=True)
    name = f"model.layers.0.self_attn.{bias}.bias"
    set_config(folder, attention_bias=False)
    refuses(folder, f"left over: {name}")
    set_config(folder, attention_bias=True)
    rewrite(folder, **{name: None})
    refuses(folder, f"missing: {name}")


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_norms_of_query_and_key_must_be_where_the_family_has_them(copy, family):
    folder = copy(family=family)
    name = "model.layers.0.self_attn.q_norm.weight"
    rewrite(folder, **{name: None if family == "qwen3" else torch.ones(16)})
    refuses(folder, f"{'missing' if family == 'qwen3' else 'left over'}: {name}")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (Q_PROJ, (64, 32)),
        (Q_PROJ, (32, 64)),
        (Q_PROJ, (65, 64)),
        (Q_PROJ, (64 * 64,)),
        (Q_PROJ, (64, 64, 1)),
        (Q_PROJ, ()),
        (DOWN_PROJ, (96, 64)),
        ("model.embed_tokens.weight", (301, 64)),
        ("model.embed_tokens.weight", (299, 64)),
        ("model.norm.weight", (63,)),
        ("model.norm.weight", (1,)),
    ],
)
def test_misshapen(copy, name, shape):
    folder = copy()
    right = list(weights_of(folder)[name].shape)
    rewrite(folder, **{name: torch.ones(shape)})
    refuses(folder, f"misshapen: {name} is {list(shape)}, not {right}")


def test_all_problems_are_told_at_once(copy):
    folder = copy()
    changes = {Q_PROJ: None, DOWN_PROJ: torch.ones(2, 2), "extra.weight": torch.ones(1)}
    rewrite(folder, **changes)
    refuses(folder, f"missing: {Q_PROJ}", f"misshapen: {DOWN_PROJ}", "left over: extra.weight")


def test_a_long_list_is_cut(copy):
    folder = copy()
    rewrite(folder, **{f"extra.{i}.weight": torch.ones(1) for i in range(50)})
    refuses(folder, "left over: extra.0.weight", "30 more")


# -- sharded checkpoints ---------------------------------------------------------------------------


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> dict[str, str]:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))
    return index["weight_map"]


def test_there_twice(copy):
    folder = copy(sharded=True)
    weights = weights_of(folder)
    save_file({Q_PROJ: weights[Q_PROJ]}, folder / "model-99999-of-99999.safetensors")
    edit_index(folder, lambda files: files.update(other="model-99999-of-99999.safetensors"))
    refuses(folder, f"there twice: {Q_PROJ}", "model-99999-of-99999.safetensors")


def test_an_index_that_names_an_absent_file(copy):
    folder = copy(sharded=True)
    file = edit_index(folder, lambda files: None)[Q_PROJ]
    (folder / file).unlink()
    refuses(folder, file, str(folder))


def test_an_index_that_leaves_a_file_out(copy):
    folder = copy(sharded=True)
    left_out = json.loads((folder / INDEX).read_text())["weight_map"][Q_PROJ]

    def leave_out(files: dict[str, str]) -> None:
        for name in [name for name, file in files.items() if file == left_out]:
            del files[name]

    edit_index(folder, leave_out)
    refuses(folder, f"missing: {Q_PROJ}")


@pytest.mark.parametrize("name", ["../model/model.safetensors", "/etc/passwd", "..", ""])
def test_an_index_that_points_outside(copy, name):
    folder = copy(sharded=True)
    edit_index(folder, lambda files: files.update({Q_PROJ: name}))
    refuses(folder, repr(name))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"weight_map": 3}'])
def test_an_index_that_is_none(copy, text):
    folder = copy(sharded=True)
    (folder / INDEX).write_text(text)
    refuses(folder, INDEX)


def test_no_weights(copy):
    folder = copy()
    (folder / "model.safetensors").unlink()
    refuses(folder, "'model.safetensors'", str(folder))


def test_pickles_are_never_read(copy):
    folder = copy()
    torch.save(weights_of(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refuses(folder, "'model.safetensors'")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_file_cut_short(copy, keep):
    file = copy() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refuses(file.parent, "model.safetensors is not a readable safetensors file")


# -- where models come from ------------------------------------------------------------------------


def test_a_local_folder_is_taken_as_it_is(tmp_path):
    assert find_model(str(tmp_path), None) == tmp_path


def test_a_folder_of_the_tokenizer_that_is_not_there(tiny_model):
    args = EngineArgs(str(tiny_model()), tokenizer="/no/such/folder")
    with pytest.raises(ValueError, match=r"^tokenizer='/no/such/folder' is not a local folder"):
        load_tokenizer(args, tiny_model())


@pytest.mark.parametrize("model", ["/no/such/folder", "a b", "./nowhere/at/all"])
def test_neither_folder_nor_id(model):
    with pytest.raises(ValueError, match=re.escape(f"model={model!r} is not a local folder")):
        find_model(model, None)


def test_the_hub_out_of_reach(monkeypatch):
    def offline(*_: object, **__: object) -> None:
        raise OSError("no connection")

    monkeypatch.setattr("nanovllm.model.loader.snapshot_download", offline)
    with pytest.raises(ValueError, match=r"model='a/b'.*no connection.*HF_HUB_OFFLINE"):
        find_model("a/b", None)


def test_a_tokenizer_is_fetched_without_weights(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        "nanovllm.model.loader.snapshot_download",
        lambda name, revision, allow_patterns: asked.append(allow_patterns) or tmp_path,
    )
    find_model("some/model", None)
    find_model("some/tokenizer", None, "tokenizer")
    assert ["*.safetensors" in patterns for patterns in asked] == [True, False]
