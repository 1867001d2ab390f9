"""What a step of stage 01 costs: operations by formula, seconds by the clock.

step_flops(config, 256)              # operations of one forward pass over 256 tokens
cost_of(stage_01, (16, 64, 256, 512))  # a StepCost, drawn by course.drawings.generate_plots
"""

from collections.abc import Sequence
from functools import partial

from course.drawings.generate_plots import StepCost
from course.stages import Recompute
from course.timing import measure
from nanovllm.model.model_config import ModelConfig


def step_flops(c: ModelConfig, n: int) -> int:
    """F(n): operations of one forward pass over n tokens, with the logits after the last."""
    heads = c.num_attention_heads + c.num_key_value_heads
    layer = 2 * c.hidden_size * c.head_dim * heads + 3 * c.hidden_size * c.intermediate_size
    attention = 4 * n * n * c.num_attention_heads * c.head_dim
    return c.num_hidden_layers * (2 * n * layer + attention) + 2 * c.vocab_size * c.hidden_size


def cost_of(stage: Recompute, lengths: Sequence[int]) -> StepCost:
    """Steps at these lengths, of five runs the median; the line goes through two of them."""
    texts = [[1] * n for n in lengths]
    seconds = [measure(partial(stage.last_logits, text), repeats=5).median for text in texts]
    name = f"{stage.folder.name}, {stage.device.type}"
    return StepCost(name, lengths, seconds, fitted=(0, 4), flops=partial(step_flops, stage.config))
