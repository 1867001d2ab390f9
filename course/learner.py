"""A learner's pieces inside the real thing.

stage_with(decode_step)     the stage of lesson 02, with a decode step of one's own in every layer
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from course.models import own_model
from course.stages import ContiguousCache, contiguous
from course.workload import LadderWorkload
from nanovllm.ops.attention import Rows, rope_store, store_kv
from nanovllm.ops.backend import TORCH


def stage_with(decode_step: Callable[..., Tensor] | None = None) -> ContiguousCache:
    """Stage 02 over the course's own model on the CPU, ready to prefill and decode.

    decode_step(query, key, value, k_cache, v_cache, lengths) takes the place of storing and
    attending wherever a pass has one new token a row. None: the stage as it is.
    """
    stage = ContiguousCache(own_model(), device="cpu")
    if decode_step is not None:
        stage.backend = backend_with(decode_step)
    stage.prepare(LadderWorkload([[0]], [1], 0))
    return stage


def backend_with(decode_step: Callable[..., Tensor]) -> Any:
    fresh: list[Tensor] = []  # keys and values of the layer that runs

    def keep(key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
        fresh[:] = [key, value]
        if len(slots) > len(k_cache):  # more than one token a row
            store_kv(key, value, k_cache, v_cache, slots)

    def project(*args: Any) -> Tensor:
        return rope_store(*args, store=keep)

    def attend(query: Tensor, k_cache: Tensor, v_cache: Tensor, rows: Rows, scale: float) -> Tensor:
        if rows.longest > 1:
            return contiguous.attend(query, k_cache, v_cache, rows, scale)
        return decode_step(query, *fresh, k_cache, v_cache, rows.context_lens - 1)

    return replace(TORCH, rope_store=project, attend_prompts=attend)
