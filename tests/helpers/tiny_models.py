"""Tiny random models in Hugging Face format, written by transformers: the tests' stand-ins.

Random weights as transformers initialises them make a model that soon repeats one token, and with
such a one "the tokens are equal" proves little. Here embeddings are small beside what the layers
add, and attention is sharp: 64 greedy tokens hold at least 20 distinct ids, and depend on the
whole text before them. Norm weights and biases are random too, so that a forgotten one shows.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = "the quick brown fox jumps over the lazy dog, and then it writes the next token of the text"


@dataclass(frozen=True)
class TinyModel:
    """Options of one model; `write` makes the same files for the same options."""

    family: str = "qwen3"
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    hidden: int = 64
    intermediate: int = 96
    vocab: int = 300  # the tokenizer has 300; a larger one leaves rows that stand for no token
    tied: bool = False
    attention_bias: bool = False  # qwen3 and llama; qwen2 always has its own
    mlp_bias: bool = False  # llama
    rope: str = "default"  # one of ROPES
    max_positions: int = 512
    sharded: bool = False  # several safetensors files with an index
    adds_bos: bool = False  # the tokenizer puts <|endoftext|> in front, as Llama's does
    seed: int = 0

    def write(self, folder: Path) -> Path:
        """Write config, generation config, weights and tokenizer into `folder`."""
        shard_size = "40KB" if self.sharded else "1GB"
        self.build().save_pretrained(folder, max_shard_size=shard_size)
        tiny_tokenizer(self.adds_bos).save_pretrained(folder)
        return folder

    def build(self) -> PreTrainedModel:
        """The model itself, in float32 and in evaluation mode."""
        config_class, model_class = FAMILIES[self.family]
        model = model_class(config_class(**self.settings())).eval()
        fill(model, torch.Generator().manual_seed(self.seed))
        model.generation_config.eos_token_id = [299, 297]  # config.json: 299 alone
        return model

    def settings(self) -> dict[str, Any]:
        """What transformers' config class is given."""
        return {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "tie_word_embeddings": self.tied,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "rope_parameters": dict(ROPES[self.rope]),
            "max_position_embeddings": self.max_positions,
            "bos_token_id": 297 if self.adds_bos else None,
            "eos_token_id": 299,
            "dtype": "float32",
        }


@torch.no_grad()
def fill(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Random weights from which greedy decoding wanders about instead of repeating itself."""
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if name.endswith("norm.weight"):
            weight.copy_(1 + 0.2 * noise)
        elif name.endswith("bias"):
            weight.copy_(0.1 * noise)
        elif "embed_tokens" in name or "lm_head" in name:
            weight.copy_(0.25 * noise)
        elif "q_proj" in name or "k_proj" in name:
            weight.copy_(1.5 * noise / weight.shape[1] ** 0.5)
        else:
            weight.copy_(2.0 * noise / weight.shape[1] ** 0.5)


LARGEST_FLOAT16 = 65_504.0


@torch.no_grad()
def write_overflowing(folder: Path) -> str:
    """A model whose weights are finite, and whose hidden state overflows in float16 for token 7.

    Its first layer adds to 65,504. The second layer's keys and values of token 7 are then NaN, and
    so are the logits of every text that holds it. In float32 the model is sound.
    """
    model = TinyModel().build()
    model.model.embed_tokens.weight[7] = LARGEST_FLOAT16
    model.model.layers[0].mlp.down_proj.weight *= 8
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def tiny_tokenizer(adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE: 256 bytes, 41 merges, then the special tokens; 300 in all."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=297, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL_TOKENS])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 297)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>" if adds_bos else None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
