"""What lesson 01 asks stage 01 and the sampler: an answer with its clock, what filters keep, costs.

tokenizer, prompt = question(folder)       # text of a chat as ids
timed_answer(stage, prompt, 256).times[0]  # seconds until each token had come
step_flops(config, 256)                    # operations of one forward pass, by formula
counted_flops(stage, 256)                  # and counted by PyTorch
step_costs(stage, on_gpu)                  # StepCosts, drawn by course.drawings.generate_plots
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import FlopCounterMode

from course import machine
from course.drawings.generate_plots import OverlappedCost, StepCost
from course.measure.ladder_workload import LadderWorkload
from course.measure.timing import measure
from course.stages import Recompute, Recorder
from nanovllm.checkpoint.tokenizer import load_tokenizer
from nanovllm.config import EngineArgs
from nanovllm.layers import attention
from nanovllm.layers.sampler import filter_scores, log_of
from nanovllm.models.model_config import ModelConfig

QUESTION = "Tell me a story about a fox who finds a key."
CPU_LENGTHS = (16, 32, 64, 128, 256, 512)  # tokens
GPU_LENGTHS = (64, 512, 1024, 2048, 4096, 8192)


def question(folder: Path) -> tuple[Any, list[int]]:
    """A model's tokenizer, and QUESTION's ids in its chat format, where the answer begins."""
    tokenizer = load_tokenizer(EngineArgs(str(folder)), folder)
    chat = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    return tokenizer, ids


def timed_answer(stage: Recompute, prompt: list[int], count: int) -> Recorder:
    """Load a stage's weights and let it write `count` greedy tokens.

    Of the recorder, token_ids[0], gaps[0] (logits between the best and the second) and times[0]
    (seconds since the start) have `count` entries each.
    """
    request = LadderWorkload(prompts=[prompt], num_outputs=[count], shared_prefix=0)
    stage.prepare(request)
    stage.last_logits(prompt)  # a first call is slower than all others
    recorder = Recorder(num_requests=1)
    stage.serve(request, recorder)
    return recorder


def kept_by(
    logits: Tensor, top_k: int | None = None, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Which tokens of logits [vocab_size] the engine's filters keep: bools [vocab_size]."""
    limits = top_k or 0, top_p, log_of(min_p)
    return filter_scores(logits[None], *(torch.tensor([[x]]) for x in limits))[0] > -torch.inf


def step_flops(c: ModelConfig, n: int) -> int:
    """F(n): operations of one forward pass over n tokens, with the logits after the last."""
    heads = c.num_attention_heads + c.num_key_value_heads
    layer = 2 * c.hidden_size * c.head_dim * heads + 3 * c.hidden_size * c.intermediate_size
    attention = 4 * n * n * c.num_attention_heads * c.head_dim
    return c.num_hidden_layers * (2 * n * layer + attention) + 2 * c.vocab_size * c.hidden_size


def counted_flops(stage: Recompute, n: int) -> int:
    """The same, counted by PyTorch while the stage computes n tokens."""
    products = patch.object(attention, "SDPA_BACKENDS", [SDPBackend.MATH])
    with FlopCounterMode(display=False) as counted, products:
        stage.last_logits([1] * n)  # attention as products, which are counted; fused it is not
    return counted.get_total_flops()


def cost_of(stage: Recompute, lengths: Sequence[int]) -> StepCost:
    """Steps at these lengths, of five runs the fastest; the formula is fitted to two of them."""
    texts = [[1] * n for n in lengths]
    seconds = [measure(partial(stage.last_logits, text), repeats=5).lowest for text in texts]
    name, flops = f"{stage.folder.name}, {stage.device.type}", partial(step_flops, stage.config)
    if stage.device.type == "cuda":
        return OverlappedCost(name, lengths, seconds, fitted=(0, len(lengths) - 1), flops=flops)
    return StepCost(name, lengths, seconds, fitted=(0, 4), flops=flops)


def step_costs(stage: Recompute, measured: Recompute) -> tuple[list[StepCost], str]:
    """What steps of the loaded `stage` cost, and those of `measured` where it is on a GPU.

    The string names the machine, or the CPU and the GPU.
    """
    costs = [cost_of(stage, CPU_LENGTHS)]
    if measured.device.type == "cuda":
        measured.prepare(LadderWorkload(prompts=[[1]], num_outputs=[1], shared_prefix=0))
        costs.append(cost_of(measured, GPU_LENGTHS))
    return costs, " and ".join(dict.fromkeys([machine.describe("cpu"), machine.describe()]))
