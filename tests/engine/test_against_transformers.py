"""The engine's greedy tokens and its logits equal transformers', in float32.

Tiny random models of every family; each way of running them switched on and off: prefix hits,
chunked prefill, preemption, overlap, company in the batch, two ranks. A switch that is on must be
seen to act, for otherwise equality would prove nothing.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import (
    TIE,
    Greedy,
    assert_same_greedy,
    greedy_reference,
    reference_logits,
)

from nanovllm import LLM, RequestOutput, SamplingParams
from nanovllm.outputs import StepRecord

MAX_TOKENS = 48
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen3, tied, head size 40": {"tied": True, "head_dim": 40, "kv_heads": 4},
    "qwen3, biases, 301 ids": {"attention_bias": True, "vocab": 301, "sharded": True},
    "qwen3, linear": {"rope": "linear", "kv_heads": 1, "seed": 1},
    "qwen3, llama3": {"rope": "llama3", "layers": 3, "seed": 2},
    "qwen3, yarn": {"rope": "yarn", "head_dim": 24, "seed": 3},
    "qwen2": {"family": "qwen2"},
    "qwen2, tied, head size 24": {"family": "qwen2", "tied": True, "head_dim": 24},
    "qwen2, llama3": {"family": "qwen2", "rope": "llama3", "kv_heads": 4},
    "qwen2, yarn": {"family": "qwen2", "rope": "yarn", "kv_heads": 1, "layers": 3},
    "llama": {"family": "llama"},
    "llama, tied, head size 40": {"family": "llama", "tied": True, "head_dim": 40},
    "llama, biases": {"family": "llama", "attention_bias": True, "mlp_bias": True, "vocab": 301},
    "llama, linear": {"family": "llama", "rope": "linear", "sharded": True, "kv_heads": 4},
    "llama, llama3": {"family": "llama", "rope": "llama3", "kv_heads": 1, "layers": 3},
    "llama, yarn": {"family": "llama", "rope": "yarn", "head_dim": 12, "tied": True},
}


def make_prompts() -> list[list[int]]:
    """Short, long, and three that begin with the same 40 tokens, two and a half blocks of 16."""
    rng = random.Random(0)

    def some(count: int) -> list[int]:
        return [rng.randrange(297) for _ in range(count)]

    shared = some(40)
    return [some(3), some(17), shared + some(1), shared + some(9), some(70), shared + some(26)]


PROMPTS = make_prompts()


@dataclass
class Run:
    """What one engine did with PROMPTS."""

    outputs: list[RequestOutput]
    trace: list[StepRecord]
    logits: list[tuple[Any, int, torch.Tensor]] = field(default_factory=list)
    ranks: int = 1

    @property
    def tokens(self) -> list[list[int]]:
        return [output.outputs[0].token_ids for output in self.outputs]

    @property
    def cached(self) -> list[int]:
        return [output.num_cached_tokens for output in self.outputs]

    @property
    def preempted(self) -> int:
        return sum(output.metrics.num_preempted_tokens for output in self.outputs)

    @property
    def widest(self) -> int:
        """The most rows of any step."""
        return max(len(step.rows) for step in self.trace)

    @property
    def chunks(self) -> int:
        """The most pieces that a prompt was computed in."""
        pieces = [row[0] for step in self.trace for row in step.rows if row[2] > 1]
        return max(pieces.count(request) for request in set(pieces))


def engine(path: Path, **options: Any) -> LLM:
    usual = {"max_model_len": 128, "skip_tokenizer_init": True, "dtype": "float32"}
    return LLM(str(path), use_tqdm_on_load=False, **usual | options)


def generate(llm: LLM, max_tokens: int = MAX_TOKENS) -> list[RequestOutput]:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    return llm.generate(prompts, params, use_tqdm=False)


def keep_logits(llm: LLM) -> list[tuple[Any, int, torch.Tensor]]:
    """From now on collect (sequence, number of tokens read, logits) of every sampled row."""
    kept: list[tuple[Any, int, torch.Tensor]] = []
    runner = llm.llm_engine.core.runner
    launch, logits_of, rows = runner.launch, runner.model.compute_logits, []

    def spy_on_launch(batch: Any) -> Any:
        rows[:] = [row for row in batch if row.samples]
        return launch(batch)

    def spy_on_logits(hidden: torch.Tensor) -> torch.Tensor:
        logits = logits_of(hidden)
        kept.extend((row.seq, row.end, x) for row, x in zip(rows, logits.clone(), strict=True))
        return logits

    runner.launch, runner.model.compute_logits = spy_on_launch, spy_on_logits
    return kept


def run(path: Path, **options: Any) -> Run:
    with engine(path, **options) as llm:
        kept = keep_logits(llm)
        outputs = generate(llm)
        return Run(outputs, llm.llm_engine.trace, kept, llm.llm_engine.ranks.world_size)


def check(path: Path, result: Run) -> None:
    """Tokens equal transformers', and every row of logits is within 1e-4 of its.

    With several ranks, of logits the first rank's share is compared.
    """
    assert_same_greedy(result.tokens, greedy_reference(path, PROMPTS, MAX_TOKENS))
    texts = {seq: reference_logits(path, seq.token_ids) for seq, _, _ in result.logits}
    assert len(texts) == len(PROMPTS)
    assert len(result.logits) >= MAX_TOKENS * len(PROMPTS)
    for seq, end, logits in result.logits:
        wanted = texts[seq][end - 1]
        assert len(logits) == len(wanted) // result.ranks
        torch.testing.assert_close(logits, wanted[: len(logits)], atol=1e-4, rtol=0)


# -- the stand-ins and the comparison itself -------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_model_does_not_repeat_itself(tiny_model, name):
    path = tiny_model(**MODELS[name])
    for text in greedy_reference(path, [PROMPTS[1], PROMPTS[4]], 64):
        assert len(set(text.tokens)) >= 20


def test_a_model_is_written_alike_twice(tiny_model, tmp_path):
    from tiny_models import TinyModel

    first, second = tiny_model(), TinyModel().write(tmp_path)
    assert first == tiny_model(family="qwen3")
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (first / file).read_bytes() == (second / file).read_bytes()


def test_the_comparison_sees_a_difference():
    sure = Greedy((1, 2, 3, 4), (1.0, 1.0, 1.0, 1.0))
    late = Greedy((1, 2, 3, 4), (1.0, 1.0, 1.0, TIE / 2))
    early = Greedy((1, 2, 3, 4), (1.0, TIE / 2, 1.0, 1.0))
    assert assert_same_greedy([[1, 2, 3, 4]], [sure]) == 0
    assert assert_same_greedy([[1, 2, 3, 9], [1, 2, 3, 4]], [late, sure]) == 1
    for wrong in ([1, 2, 3, 9], [1, 2, 3], [1, 2, 3, 4, 5], [0, 2, 3, 4]):
        with pytest.raises(AssertionError):
            assert_same_greedy([wrong], [sure])
    with pytest.raises(AssertionError, match="differs"):
        assert_same_greedy([[1, 2, 9, 9]], [late])
    with pytest.raises(AssertionError, match="near ties leave only 1 of 4"):
        assert_same_greedy([[1, 2, 3, 4]], [early])
    with pytest.raises(AssertionError):
        assert_same_greedy([], [sure])


# -- every model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_model(tiny_model, name):
    path = tiny_model(**MODELS[name])
    check(path, run(path))


@pytest.mark.parametrize("name", MODELS)
def test_every_model_with_everything_at_once(tiny_model, name):
    path = tiny_model(**MODELS[name])
    result = run(path, max_num_batched_tokens=13, block_size=4, num_gpu_blocks_override=40)
    assert result.chunks > 3
    assert result.preempted > 0
    assert result.widest > 1
    check(path, result)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_bfloat16_strays_no_further_than_transformers_own(tiny_model, family):
    """How far logits in bfloat16 are from those in float32, on average: ours and theirs."""
    path, bf16 = tiny_model(family=family), torch.bfloat16
    ours, theirs = [], []
    for seq, end, logits in run(path, dtype="bfloat16").logits:
        exact = reference_logits(path, seq.token_ids)[end - 1]
        ours.append((logits - exact).abs().mean())
        theirs.append((reference_logits(path, seq.token_ids, bf16)[end - 1] - exact).abs().mean())
    assert logits.dtype == bf16
    assert 0 < sum(ours) < 1.25 * sum(theirs)


# -- every switch ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Switch:
    """Options, and what must be seen in a run that has them."""

    options: dict[str, Any]
    acts: Callable[[Run], bool]


SHARED = [
    0,
    0,
    0,
    32,
    0,
    32,
]  # cached prompt tokens, when the later two find the first one's blocks
SWITCHES = {
    "one step prefills all": Switch({}, lambda run: run.widest == 6 and run.chunks == 1),
    "alone": Switch({"max_num_seqs": 1}, lambda run: run.widest == 1),
    "prefix cache": Switch({}, lambda run: run.cached == SHARED),
    "no prefix cache": Switch(
        {"enable_prefix_caching": False}, lambda run: run.cached == [0] * len(PROMPTS)
    ),
    "chunks": Switch({"max_num_batched_tokens": 16}, lambda run: run.chunks >= 5),
    "chunks of one block and one token": Switch(
        {"max_num_batched_tokens": 17, "max_num_seqs": 1}, lambda run: run.chunks == 5
    ),
    "no chunks": Switch(
        {"max_num_batched_tokens": 128, "enable_chunked_prefill": False},
        lambda run: run.chunks == 1 and len(run.trace[0].rows) < len(PROMPTS),
    ),
    "preemption": Switch({"num_gpu_blocks_override": 14}, lambda run: run.preempted > 0),
    "preemption, no prefix cache": Switch(
        {"num_gpu_blocks_override": 14, "enable_prefix_caching": False},
        lambda run: run.preempted > 0 and not any(run.cached),
    ),
    "barely enough blocks": Switch({"num_gpu_blocks_override": 8}, lambda run: run.preempted >= 0),
    "blocks of one token": Switch({"block_size": 1}, lambda run: run.cached[3] == 40),
    "blocks of 5 tokens": Switch({"block_size": 5}, lambda run: run.cached[3] == 40),
    "blocks of 256 tokens": Switch({"block_size": 256}, lambda run: not any(run.cached)),
}


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch(tiny_model, name, family, overlap):
    path, switch = tiny_model(family=family), SWITCHES[name]
    result = run(path, async_scheduling=overlap, **switch.options)
    assert switch.acts(result), (result.cached, result.preempted, result.widest, result.chunks)
    check(path, result)


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
def test_a_second_call_finds_the_first_ones_blocks(tiny_model, overlap):
    path = tiny_model()
    with engine(path, async_scheduling=overlap) as llm:
        first, second = generate(llm), generate(llm)
    assert [output.num_cached_tokens for output in second] == [0, 16, 32, 48, 64, 64]
    reference = greedy_reference(path, PROMPTS, MAX_TOKENS)
    for outputs in (first, second):
        assert_same_greedy([output.outputs[0].token_ids for output in outputs], reference)


# -- two ranks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen3, biases, 301 ids", {}),
        ("qwen2, yarn", {"max_num_batched_tokens": 16, "num_gpu_blocks_override": 14}),
        ("llama, tied, head size 40", {"async_scheduling": False}),
    ],
)
def test_two_ranks(tiny_model, name, options):
    path = tiny_model(**MODELS[name])
    result = run(path, tensor_parallel_size=2, **options)
    check(path, result)
    assert result.ranks == 2
    assert result.preempted > 0 or "num_gpu_blocks_override" not in options
