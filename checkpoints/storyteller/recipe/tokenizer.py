"""The small model's tokenizer: a byte-level BPE of 4,096 tokens, trained on its own stories.

It has Qwen3's chat tokens, first in the vocabulary, and splits text as GPT-2's does. A vocabulary
of this size spells most words of the stories in one token, and keeps the embedding at a seventh of
the model.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from checkpoints.storyteller.recipe.chats import CHAT_TEMPLATE, END, START, TEXT_END

VOCAB_SIZE = 4096
SPECIAL = (TEXT_END, START, END)  # ids 0, 1, 2


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Any:
    """A tokenizers.Tokenizer with at most `vocab_size` tokens, learned from the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path, max_length: int) -> None:
    """Write the files that transformers, vLLM and the engine load; the chat template is in them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END,
        "pad_token": TEXT_END,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
