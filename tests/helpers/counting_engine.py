"""A whole LLMEngine around the counting model: text, stop strings and ranks, and still exact.

The engine is built as for any checkpoint; only `load_model` is answered by the counting model, and
the tokenizer is one of 97 tokens, some of which are parts of a character.
"""

import json
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from counting_model import VOCAB, CountingModel, hash_next
from patience import HANGS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from course.rank_threads import record_nothing
from nanovllm import LLM, EngineArgs, LLMEngine
from nanovllm.checkpoint import weights
from nanovllm.distributed.ranks import Ranks
from nanovllm.engine.worker import run_command
from nanovllm.layers.attention import store_kv
from nanovllm.metadata import AttentionMetadata

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": VOCAB,
    "hidden_size": 4,
    "intermediate_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 3,
}


class CountingDecoder(CountingModel):
    """The counting model over a cache of float32, with its share of the logits on each rank.

    A hash is below 2**16 and so exact in float32; their sum is taken in float64.
    """

    def __init__(self, ranks: Ranks | None = None):
        self.ranks = ranks or Ranks()

    def __call__(self, input_ids: Tensor, kv_cache: Tensor, batch: AttentionMetadata) -> Tensor:
        k_cache, v_cache = kv_cache[0]
        shape = (1, *k_cache.shape[2:])
        hidden = torch.zeros(len(input_ids), 1, dtype=torch.double)
        for place, (position, table) in enumerate(self.tokens(batch)):
            read = k_cache[table][:, :, 0, 0].flatten()
            parent = int(read[position - 1]) if position else 0
            fresh = torch.full(shape, hash_next(parent, int(input_ids[place]), position)).float()
            slots = batch.slot_mapping[place : place + 1]
            store_kv(fresh, fresh, k_cache, v_cache, slots)
            hidden[place] = k_cache[table][:, :, 0, 0].flatten()[: position + 1].double().sum()
        return hidden

    def compute_logits(self, hidden: Tensor) -> Tensor:
        shard = self.ranks.shard(VOCAB)
        return super().compute_logits(hidden)[:, shard.start : shard.start + shard.count]


@cache
def model_folder() -> Path:
    """A folder with a config.json alone; it goes with the process."""
    held = tempfile.TemporaryDirectory(prefix="counting-")
    model_folder.held = held  # type: ignore[attr-defined]
    (Path(held.name) / "config.json").write_text(json.dumps(CONFIG))
    return Path(held.name)


@cache
def counting_tokenizer() -> PreTrainedTokenizerFast:
    """97 tokens: specials, pieces of one to three letters, and halves of longer characters."""
    specials = ["<a>", "<b>", "<c>", "<end>"]
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    letters = [spell(char)[0][0] for char in "abcdefghijklmnopqrstuvwxyz .\n"]
    halves = sorted({piece for char in "é€🙂ñ" for piece in spell(char)[0][0]})
    longer = [a + b for a in letters[:8] for b in letters[8:24]]
    pieces = [*specials, *letters, *halves, *longer][:VOCAB]
    core = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(specials)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


def counting_model(folder, config, backend, ranks, args) -> CountingDecoder:
    """In the place of `weights.load_model`."""
    return CountingDecoder(ranks)


def counting_engine(ranks: Ranks | None = None, **options: Any) -> LLMEngine:
    """One rank's engine; `load_model` must be patched."""
    args = EngineArgs(
        str(model_folder()),
        device="cpu",
        skip_tokenizer_init=True,
        tensor_parallel_size=ranks.world_size if ranks else 1,
        **options,
    )
    engine = LLMEngine(args, ranks=ranks)
    engine.input_processor.tokenizer = counting_tokenizer()
    return engine


@contextmanager
def engine_of(size: int, **options: Any) -> Iterator[LLMEngine]:
    """An engine of one rank; or rank 0 of several, the others in threads of this process."""
    record_nothing()
    store, failures = dist.HashStore(), []
    model_folder()  # made before two threads ask for it at once

    def follow(rank: int) -> None:
        try:
            engine = counting_engine(Ranks(rank, size, store), **options)
            while run_command(engine, *engine.ranks.broadcast(None)):
                pass
            assert engine.block_manager.num_free_blocks == engine.block_manager.num_blocks
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=follow, args=(rank,)) for rank in range(1, size)]
    with patch.object(weights, "load_model", counting_model):  # once: it is the process's
        for thread in threads:
            thread.start()
        engine = counting_engine(Ranks(0, size, store) if size > 1 else None, **options)
    try:
        yield engine
    finally:
        engine.close()
        for thread in threads:
            thread.join(timeout=HANGS)
    assert not failures, failures
    assert not any(thread.is_alive() for thread in threads)


@contextmanager
def llm_of(size: int = 1, **options: Any) -> Iterator[LLM]:
    """The front door over `engine_of(size)`."""
    with engine_of(size, **options) as engine:
        llm = LLM.__new__(LLM)
        llm.llm_engine = engine
        yield llm
