"""An answer against that of `transformers`, which computes the whole text at once, in float32.

seq, comparison = ask_and_compare(engine, prompt, count=16)     # an engine, in one call
comparison = compare_with_transformers(model, prompt, answer, logits)     # whoever computed them
print(comparison)                             # how near the logits are, how many tokens are equal
"""

from collections.abc import Sequence as Several
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from course.serving import ask
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.sequence import Sequence

TIE = 1e-4  # logits in float32 differ by less, however they are computed
CLOSE = 1e-3  # what logits may differ by: absolute, and as a share


@dataclass(frozen=True)
class Comparison:
    """What was compared with transformers, and found equal."""

    rows: int  # of logits, one an answer token
    difference: float  # of the two logits that are furthest apart
    tokens: int  # greedy tokens that were to be equal, and were: those before the first near tie

    def __str__(self) -> str:
        return (
            f"{self.rows} rows of logits differ by {self.difference:.0e} at most; "
            f"{self.tokens} of {self.rows} greedy tokens compared with transformers: all equal"
        )


def compare_with_transformers(
    model: str | Path, prompt: Several[int], answer: Several[int], logits: Tensor
) -> Comparison:
    """Hold a greedy answer's logits [answer tokens, vocab_size] and its tokens to the reference.

    The reference reads prompt and answer as they are (teacher-forced), so each row of it follows
    the same text as ours. Logits may be of the vocabulary's first part alone, as rank 0 of several
    has them. Raises AssertionError if logits are further apart than CLOSE, or if a token differs
    before the first near tie: a best logit that leads by less than TIE.
    """
    theirs, ours = _logits_after(model, prompt, answer), logits.float().cpu()
    same_part = theirs[:, : ours.shape[1]]
    torch.testing.assert_close(ours, same_part, atol=CLOSE, rtol=CLOSE)
    certain = num_certain(theirs)
    for i, (token, best) in enumerate(zip(answer, theirs[:certain].argmax(-1), strict=False)):
        assert token == best, f"answer token {i} is {token}, the reference says {int(best)}"
    return Comparison(len(theirs), (ours - same_part).abs().max().item(), certain)


def ask_and_compare(
    engine: LLMEngine, prompt: list[int], count: int
) -> tuple[Sequence, Comparison]:
    """Ask an engine for `count` greedy tokens, and hold them to the reference; the request, too."""
    decoder = engine.core.runner.model
    compute, kept = decoder.compute_logits, keep_logits(engine)
    try:
        [seq] = ask(engine, [prompt], count)
    finally:
        decoder.compute_logits = compute  # type: ignore[method-assign]
    logits = torch.cat(kept)
    return seq, compare_with_transformers(engine.args.model, prompt, seq.output_ids, logits)


def keep_logits(engine: LLMEngine) -> list[Tensor]:
    """A list to which every later step of the engine adds its logits [rows, vocab_size]."""
    kept: list[Tensor] = []
    decoder = engine.core.runner.model
    compute = decoder.compute_logits

    def compute_and_keep(hidden: Tensor) -> Tensor:
        kept.append(compute(hidden))
        return kept[-1]

    decoder.compute_logits = compute_and_keep  # type: ignore[method-assign]
    return kept


def _logits_after(model: str | Path, prompt: Several[int], answer: Several[int]) -> Tensor:
    """The reference's logits [answer tokens, vocab_size] before each token of a given answer."""
    return logits_along(model, [*prompt, *answer])[len(prompt) - 1 : -1]


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
