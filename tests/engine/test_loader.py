"""The loader fills every parameter once, with the right values, or says by name what is wrong."""

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import _greedy, assert_same_greedy, greedy_reference, reference_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanovllm import LLM, SamplingParams
from nanovllm.checkpoint import safetensors_files
from nanovllm.checkpoint.config_json import read_model_config
from nanovllm.checkpoint.hub import find_model
from nanovllm.checkpoint.tokenizer import load_tokenizer
from nanovllm.checkpoint.weights import load_model
from nanovllm.config import EngineArgs
from nanovllm.distributed.ranks import Ranks
from nanovllm.layers.backend import TORCH_BACKEND
from nanovllm.layers.linear import ColumnParallelLinear
from nanovllm.models.decoder import Decoder

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
DOWN_PROJ = "model.layers.1.mlp.down_proj.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
MEANT = r"config\.json says tie_word_embeddings=true, but lm_head\.weight differs"
INDEX = "model.safetensors.index.json"


def load(folder: Path, rank: int = 0, size: int = 1, dtype: torch.dtype = torch.float32) -> Decoder:
    config = replace(read_model_config(folder), dtype=dtype)
    args = EngineArgs(str(folder), device="cpu", max_model_len=64, use_tqdm_on_load=False)
    return load_model(folder, config, TORCH_BACKEND, Ranks(rank, size), args)


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


@contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


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
    heads = {"kv": read_model_config(folder).num_key_value_heads}
    assert len(list(folder.glob("*.safetensors"))) == 1 or "sharded" in name
    for rank in range(size):
        model = load(folder, rank, size)
        for parameter, value in model.named_parameters():
            name = checkpoint_name(parameter)
            wanted = share(name, weights[name], rank, size, heads)
            assert torch.equal(value, wanted), (rank, parameter)
            assert not value.requires_grad
        for module in model.modules():
            if isinstance(module, ColumnParallelLinear):  # what it multiplies by is what was filled
                assert torch.equal(module.weight, torch.cat([p.weight for p in module.children()]))


def test_a_tied_head_is_the_embedding(tiny_model):
    model = load(tiny_model(tied=True))
    assert model.lm_head.weight is model.embed_tokens.weight
    untied = load(tiny_model())
    assert not torch.equal(untied.lm_head.weight, untied.embed_tokens.weight)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("names", [(EMBEDDING, HEAD), (HEAD,)], ids=["both names", "head alone"])
def test_a_tied_checkpoint_may_carry_its_weight_as_the_head(copy, recwarn, names, size):
    folder = copy(tied=True)
    embedding = weights_of(folder)[EMBEDDING]
    rewrite(folder, **{EMBEDDING: None} | {name: embedding.clone() for name in names})
    for rank in range(size):
        model = load(folder, rank, size)
        assert model.lm_head.weight is model.embed_tokens.weight
        heads = {"kv": 2}
        assert torch.equal(model.lm_head.weight, share(EMBEDDING, embedding, rank, size, heads))
    assert not [str(warning.message) for warning in recwarn if "tie" in str(warning.message)]


def other_rows(embedding: Tensor) -> Tensor:
    return embedding.roll(1, 0)


def another_last_row(embedding: Tensor) -> Tensor:
    return torch.cat([embedding[:-1], embedding[-1:] + 3])


def another_dtype(embedding: Tensor) -> Tensor:
    return embedding.to(torch.bfloat16)  # rounded: another value in float32


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("make", [other_rows, another_last_row, another_dtype])
def test_a_head_that_differs_from_the_embedding_is_not_tied_to_it(copy, make, size):
    """On every rank, even if only another rank's rows differ; and rank 0 warns."""
    folder = copy(tied=True)
    embedding = weights_of(folder)[EMBEDDING]
    head = make(embedding)
    rewrite(folder, **{HEAD: head})
    for rank in range(size):
        with pytest.warns(UserWarning, match=MEANT) if rank == 0 else no_warning():
            model = load(folder, rank, size)
        assert model.lm_head.weight is not model.embed_tokens.weight
        for name, whole in (("lm_head", head.float()), ("embed_tokens", embedding)):
            weight = model.get_submodule(name).weight
            assert torch.equal(weight, share(f"{name}.weight", whole, rank, size, {"kv": 2}))


def test_values_are_compared_in_the_dtype_that_is_computed_in(copy):
    folder = copy(tied=True)
    rewrite(folder, **{HEAD: another_dtype(weights_of(folder)[EMBEDDING])})
    with no_warning():
        model = load(folder, dtype=torch.bfloat16)
    assert model.lm_head.weight is model.embed_tokens.weight


@pytest.mark.parametrize("make", [lambda w: w.clone(), other_rows, another_last_row])
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_a_head_in_the_file_gives_transformers_tokens(copy, make):
    """transformers 5 unties a head that differs, and says so; older ones took the embedding."""
    folder = copy(tied=True)
    tied = greedy_reference(folder, [[5, 6, 7]], 12)[0]
    rewrite(folder, **{HEAD: make(weights_of(folder)[EMBEDDING])})
    reference_model.cache_clear()
    _greedy.cache_clear()
    expected = greedy_reference(folder, [[5, 6, 7]], 12)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    with LLM(str(folder), max_model_len=64, use_tqdm_on_load=False) as llm:
        output = llm.generate([[5, 6, 7]], params, use_tqdm=False)[0].outputs[0]
    assert_same_greedy([output.token_ids], expected)
    changed = make in (other_rows, another_last_row)
    assert (expected[0].tokens != tied.tokens) == changed, "the head must matter"


def test_comparing_a_head_holds_a_few_rows_and_ends_at_the_first_that_differ(copy, monkeypatch):
    folder = copy(tied=True)
    rewrite(folder, **{HEAD: another_last_row(weights_of(folder)[EMBEDDING])})
    compared, equal = [], torch.equal
    monkeypatch.setattr(safetensors_files, "ROWS_PER_COMPARISON", 7)
    monkeypatch.setattr(torch, "equal", lambda a, b: compared.append(len(a)) or equal(a, b))
    assert safetensors_files.is_head_different([folder / "model.safetensors"], torch.float32)
    assert compared == [7] * 42 + [300 - 42 * 7]
    compared.clear()
    rewrite(folder, **{HEAD: other_rows(weights_of(folder)[EMBEDDING])})
    assert safetensors_files.is_head_different([folder / "model.safetensors"], torch.float32)
    assert compared == [7]


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


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (torch.ones(299, 64), "wrong shape: lm_head.weight is [299, 64], not [300, 64]"),
        (torch.ones(300), "wrong shape: lm_head.weight is [300], not [300, 64]"),
        (torch.ones(()), "wrong shape: lm_head.weight is [], not [300, 64]"),
        (torch.ones(0, 64), "wrong shape: lm_head.weight is [0, 64], not [300, 64]"),
        (torch.ones(300, 64, dtype=torch.int8), "wrong type: lm_head.weight is I8"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_a_head_that_cannot_be_one_is_refused_where_the_config_ties_it(copy, head, message):
    folder = copy(tied=True)
    rewrite(folder, **{HEAD: head})
    refuses(folder, message)


@pytest.mark.parametrize("again", [HEAD, EMBEDDING])
def test_a_tied_weight_that_is_there_twice(copy, again):
    folder = copy(tied=True, sharded=True)
    weights = weights_of(folder)
    for number, name in enumerate([HEAD, again]):
        file = f"model-{99990 + number}-of-99999.safetensors"
        save_file({name: weights[EMBEDDING].clone()}, folder / file)
        edit_index(folder, lambda files, file=file: files.update({file: file}))
    refuses(folder, f"stored twice: {again}")


def test_a_tied_weight_under_neither_name(copy):
    folder = copy(tied=True)
    rewrite(folder, **{EMBEDDING: None})
    refuses(folder, f"missing: {EMBEDDING}")


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
    refuses(folder, *[f"unknown: {name} in model.safetensors" for name in names])


@pytest.mark.parametrize("bias", ["q_proj", "o_proj"])
def test_biases_must_be_where_the_config_says(copy, bias):
    folder = copy(attention_bias=True)
    name = f"model.layers.0.self_attn.{bias}.bias"
    set_config(folder, attention_bias=False)
    refuses(folder, f"unknown: {name}")
    set_config(folder, attention_bias=True)
    rewrite(folder, **{name: None})
    refuses(folder, f"missing: {name}")


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_norms_of_query_and_key_must_be_where_the_family_has_them(copy, family):
    folder = copy(family=family)
    name = "model.layers.0.self_attn.q_norm.weight"
    rewrite(folder, **{name: None if family == "qwen3" else torch.ones(16)})
    refuses(folder, f"{'missing' if family == 'qwen3' else 'unknown'}: {name}")


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
def test_wrong_shapes(copy, name, shape):
    folder = copy()
    right = list(weights_of(folder)[name].shape)
    rewrite(folder, **{name: torch.ones(shape)})
    refuses(folder, f"wrong shape: {name} is {list(shape)}, not {right}")


def test_all_problems_are_told_at_once(copy):
    folder = copy()
    changes = {Q_PROJ: None, DOWN_PROJ: torch.ones(2, 2), "extra.weight": torch.ones(1)}
    rewrite(folder, **changes)
    refuses(folder, f"missing: {Q_PROJ}", f"wrong shape: {DOWN_PROJ}", "unknown: extra.weight")


def test_a_long_list_is_cut(copy):
    folder = copy()
    rewrite(folder, **{f"extra.{i}.weight": torch.ones(1) for i in range(50)})
    refuses(folder, "unknown: extra.0.weight", "30 more")


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
    refuses(folder, f"stored twice: {Q_PROJ}", "model-99999-of-99999.safetensors")


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


def test_an_index_into_another_folder_is_told_so(copy):
    folder = copy(sharded=True)
    (folder / "part").mkdir()
    for file in folder.glob("*.safetensors"):
        shutil.move(file, folder / "part")
    edit_index(folder, lambda files: files.update({k: f"part/{v}" for k, v in files.items()}))
    refuses(folder, f"{INDEX} names the weights file 'part/", "only name files beside it")


def test_a_whole_file_beside_an_index_of_others(copy):
    """transformers would read the whole one, other tools the others; the weights may differ."""
    folder = copy(sharded=True)
    save_file(weights_of(folder), folder / "model.safetensors")
    refuses(folder, "model.safetensors", INDEX, "remove the one that is not meant")
    edit_index(folder, lambda files: files.update(dict.fromkeys(files, "model.safetensors")))
    load(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "q4.gguf", "x.txt"])
@pytest.mark.parametrize("with_config", [True, False])
def test_a_folder_without_safetensors_is_told_what_is_read(copy, name, with_config):
    folder = copy()
    torch.save(weights_of(folder), folder / name)
    (folder / "model.safetensors").unlink()
    if not with_config:
        (folder / "config.json").unlink()
    missing = "'model.safetensors'" if with_config else f"{folder}/config.json"
    held = "no weights" if name == "x.txt" else name
    refuses(folder, missing, str(folder), "safetensors", f"This folder holds {held}.")


def test_shards_without_their_index(copy):
    folder = copy(sharded=True)
    (folder / INDEX).unlink()
    refuses(folder, INDEX, "This folder holds model-00001-of-")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_file_cut_short(copy, keep):
    file = copy() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refuses(file.parent, "model.safetensors is not a readable safetensors file")


# -- where models come from ------------------------------------------------------------------------


def test_a_local_folder_is_taken_as_it_is(tmp_path):
    assert find_model(str(tmp_path), None) == tmp_path


def test_a_tilde_is_the_users_home(tiny_model, monkeypatch, tmp_path):
    (tmp_path / "models").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_model("~/models", None) == tmp_path / "models"
    shutil.copytree(tiny_model(), tmp_path / "tiny")
    args = EngineArgs(str(tiny_model()), tokenizer="~/tiny")
    assert load_tokenizer(args, Path("elsewhere")).name_or_path == str(tmp_path / "tiny")
    with LLM("~/tiny", max_model_len=64, use_tqdm_on_load=False, skip_tokenizer_init=True):
        pass


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("role", ["model", "tokenizer"])
def test_a_file_in_place_of_its_folder(tiny_model, name, role):
    with pytest.raises(ValueError, match=rf"^{role}='.*{name}' is a file; give the folder"):
        find_model(str(tiny_model() / name), None, role)


def test_a_folder_without_a_tokenizer(copy):
    """transformers would make an empty one, which encodes every text as nothing."""
    folder = copy()
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"is tokenizer\.json missing.*skip_tokenizer_init"):
        load_tokenizer(EngineArgs(str(folder)), folder)


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

    monkeypatch.setattr("nanovllm.checkpoint.hub.snapshot_download", offline)
    with pytest.raises(ValueError, match=r"model='a/b'.*no connection.*HF_HUB_OFFLINE"):
        find_model("a/b", None)


def test_a_tokenizer_is_fetched_without_weights(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        "nanovllm.checkpoint.hub.snapshot_download",
        lambda name, revision, allow_patterns: asked.append(allow_patterns) or tmp_path,
    )
    find_model("some/model", None)
    find_model("some/tokenizer", None, "tokenizer")
    assert ["*.safetensors" in patterns for patterns in asked] == [True, False]
