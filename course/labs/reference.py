"""An engine's answer against that of `transformers`, which computes the whole text at once.

kept = keep_logits(engine)                    # from here on, what the engine samples from
[seq] = ask(engine, [prompt], count=16)
theirs = reference_logits(model, seq)         # [16, vocab_size]
torch.testing.assert_close(torch.cat(kept), theirs, atol=1e-3, rtol=1e-3)
assert seq.output_ids[:num_certain(theirs)] == theirs.argmax(-1).tolist()[:num_certain(theirs)]
"""

from pathlib import Path

import torch
from torch import Tensor

from nanovllm.engine.sequence import Sequence
from nanovllm.llm_engine import LLMEngine

TIE = 1e-4  # logits in float32 differ by less, however they are computed


def keep_logits(engine: LLMEngine) -> list[Tensor]:
    """A list to which every later step of the engine adds its logits [rows, vocab_size]."""
    kept: list[Tensor] = []
    decoder = engine.core.runner.model
    compute = decoder.logits

    def compute_and_keep(hidden: Tensor) -> Tensor:
        kept.append(compute(hidden))
        return kept[-1]

    decoder.logits = compute_and_keep  # type: ignore[method-assign]
    return kept


@torch.inference_mode()
def reference_logits(model: str | Path, seq: Sequence) -> Tensor:
    """The logits [answer tokens, vocab_size] before each answer token, float32 on the CPU."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    logits: Tensor = reference(torch.tensor([seq.token_ids])).logits
    return logits[0, seq.num_prompt_tokens - 1 : -1]


def num_certain(logits: Tensor) -> int:
    """Rows of logits [rows, vocab_size] before the first whose best leads by less than TIE."""
    best, second = logits.topk(2).values.T
    return [*(best - second < TIE).tolist(), True].index(True)


@torch.inference_mode()
def logits_along(model: str | Path, token_ids: list[int]) -> Tensor:
    """transformers' logits [len(token_ids), vocab_size] after each token, float32 on the CPU.

    Row i is of the token after token_ids[: i + 1]; no engine and no sequence is needed.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    logits: Tensor = reference(torch.tensor([token_ids])).logits
    return logits[0]
