"""What lesson 00 measures of a machine, counts of a model, and times of an engine's steps.

sizes, rates = read_rates("cpu")          # bytes, bytes/s: a curve of caches and memory
layers, head, kept = count(config)        # numbers in matrices, and kept for each token
decode_steps(llm, (1, 4, 16))             # [(requests, bytes, FLOPs, seconds)], for a roofline
"""

import random
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from course import machine
from course.drawings.tour_plots import Point
from course.measure.timing import measure
from course.models.random_model import hollow_model
from nanovllm import LLM, SamplingParams
from nanovllm.outputs import RequestOutput

CONTEXT = 20  # tokens that a request has, on average, while decode_seconds decodes: 8 to 32


def print_answer(answer: RequestOutput) -> None:
    """Every field of an answer and of its completion, then its points in time."""
    for part in (answer, answer.outputs[0]):
        for field in fields(part):
            print(f"{field.name:<21}{repr(getattr(part, field.name))[:66]}")
    times = answer.metrics
    for name in ("scheduled_ts", "first_token_ts", "last_token_ts"):
        later = getattr(times, name) - times.queued_ts
        print(f"{name:<21}{1000 * later:.1f} ms after arrival")


# -- the machine ---------------------------------------------------------------------------------


def read_rates(device: str) -> tuple[list[int], list[float]]:
    """Sizes of buffers in bytes, from 256 KiB up, and bytes/s at which each is read repeatedly."""
    sizes = [2**n for n in range(18, 32 if device == "cuda" else 30)]
    buffer = torch.zeros(sizes[-1] // 4, device=device)
    return sizes, [size / measure(buffer[: size // 4].sum, repeats=9).lowest for size in sizes]


def memory_bytes(device: str) -> int:
    """Memory of the GPU, or of the machine."""
    return torch.cuda.mem_get_info()[1] if device == "cuda" else machine.total_memory_bytes()


# -- the model -----------------------------------------------------------------------------------


def count(config: Any) -> tuple[int, int, int]:
    """Parameters of all layers' matrices, of the head, and numbers (K and V) that a token keeps."""
    d, dim, kv_heads = config.hidden_size, config.head_dim, config.num_key_value_heads
    attention = (2 * config.num_attention_heads + 2 * kv_heads) * dim * d
    layers = config.num_hidden_layers * (attention + 3 * d * config.intermediate_size)
    return layers, d * config.vocab_size, 2 * config.num_hidden_layers * kv_heads * dim


def work(config: Any, requests: int, new: int, context: int) -> tuple[float, float]:
    """Bytes and FLOPs of a step that computes `new` tokens of each request, up to `context`."""
    layers, head, kept = count(config)
    size = config.dtype.itemsize
    pairs = new * (context - new) + new * (new + 1) / 2  # a token sees itself and those before
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs
    num_bytes = (layers + head) * size + requests * context * kept * size
    return num_bytes, requests * (2 * layers * new + 2 * head + attention)


def reference_flops(model: str | Path, tokens: int) -> tuple[int, int]:
    """FLOPs that PyTorch counts in transformers' forward pass: of the matrices, of all the rest.

    The head computes the last token alone. The rest is attention; some versions of transformers
    also have RoPE's angles counted.
    """
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    reference = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        reference(torch.arange(tokens)[None], logits_to_keep=1)
    by_name = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    matrices = by_name.pop("aten.mm")
    return matrices, sum(by_name.values())


# -- the engine ----------------------------------------------------------------------------------


def decode_seconds(llm: LLM, requests: int, runs: int = 6) -> float:
    """Seconds of a decode step with so many requests: the fastest run's TPOT."""
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    tpots = []
    for _ in range(runs):
        prompts = [random.choices(range(5, 500), k=8) for _ in range(requests)]
        tpots.append(llm.generate(prompts, params, use_tqdm=False)[-1].tpot)
    return min(tpots)  # a machine's two numbers are those of the fastest run, too


def prefill_seconds(llm: LLM, tokens: int, runs: int = 4) -> float:
    """Seconds to the first token of a new prompt: the fastest TTFT."""
    params = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    prompts = [random.choices(range(5, 500), k=tokens) for _ in range(runs)]
    outputs = [llm.generate([prompt], params, use_tqdm=False)[0] for prompt in prompts]
    return min(output.metrics.ttft for output in outputs)


def decode_steps(llm: LLM, batches: Sequence[int]) -> list[Point]:
    """(requests, bytes, FLOPs, seconds) of decode steps with CONTEXT tokens a request."""
    config = llm.llm_engine.model_config
    return [(R, *work(config, R, 1, CONTEXT), decode_seconds(llm, R)) for R in batches]


def prefill_steps(llm: LLM, lengths: Sequence[int]) -> list[Point]:
    """(tokens, bytes, FLOPs, seconds) of the prefill of one prompt."""
    config = llm.llm_engine.model_config
    return [(T, *work(config, 1, T, T), prefill_seconds(llm, T)) for T in lengths]


def hollow_seconds(llm: LLM, batches: Sequence[int], **options: Any) -> list[float]:
    """Seconds of decode steps of a model with as many layers as that of `llm`, and no weights."""
    config = llm.llm_engine.model_config
    with tempfile.TemporaryDirectory() as scratch:
        name = hollow_model(Path(scratch), config.num_hidden_layers)
        with LLM(name, dtype=config.dtype, **options) as hollow:
            return [decode_seconds(hollow, R) for R in batches]
