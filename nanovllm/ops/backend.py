"""Backend: the functions that a layer calls, as they are best done on this machine.

`torch` is plain and runs anywhere; it defines what is right. `triton` is our own kernels. `flash`
is `triton` with FlashAttention's attention. "auto" takes what was measured to be fastest.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nanovllm.model.model_config import ModelConfig
from nanovllm.ops import attention, sampler
from nanovllm.ops import linear as products
from nanovllm.ops.attention import AttentionMetadata, DecodeRows, PromptRows


@dataclass(frozen=True)
class Backend:
    """One function a field, each with the signature of its torch twin."""

    name: str
    linear: Callable[..., Tensor] = products.linear
    gated_linear: Callable[..., Tensor] = products.gated_linear
    rope_store: Callable[..., Tensor] = attention.rope_store
    plan_decodes: Callable[..., DecodeRows] = attention.plan_decodes
    attend_decodes: Callable[..., Tensor] = attention.attend_decodes
    attend_prompts: Callable[..., Tensor] = attention.attend_prompts
    candidates: Callable[..., tuple[Tensor, Tensor]] = sampler.candidates
    capturable: bool = False  # a decode step can be recorded in a CUDA graph

    def attend(
        self, query: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionMetadata, scale: float
    ) -> Tensor:
        """Attention of query [num_tokens, heads, head_dim]: decode rows first, then prompts."""
        if batch.prompts is None:
            return self.attend_decodes(query, k_cache, v_cache, batch.decodes, scale)
        if batch.decodes is None:
            return self.attend_prompts(query, k_cache, v_cache, batch.prompts, scale)
        n = len(batch.decodes.context_lens)
        decoded = self.attend_decodes(query[:n], k_cache, v_cache, batch.decodes, scale)
        rest = self.attend_prompts(query[n:], k_cache, v_cache, batch.prompts, scale)
        return torch.cat((decoded, rest))


TORCH = Backend("torch")
NAMES = ("torch", "triton", "flash")


def choose_backend(name: str, device: torch.device, config: ModelConfig, block_size: int) -> Backend:
    """The backend asked for, or for "auto" the best that is here. ValueError if there is none."""
    if name != "auto" and name not in NAMES:
        raise ValueError(f"attention_backend must be 'auto' or one of {list(NAMES)}, got {name!r}")
    cuda = device.type == "cuda"
    if name == "torch" or (name == "auto" and not (cuda and has_triton(device))):
        return TORCH
    if not cuda:
        raise ValueError(f"attention_backend={name!r} needs an NVIDIA GPU, not device={device}")
    if name == "flash":
        return flash(triton_backend(), block_size)
    return triton_backend()


def has_triton(device: torch.device) -> bool:
    """Whether our kernels run here: Triton is installed, and the GPU is of sm_80 or later."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return importlib.util.find_spec("triton") is not None


def triton_backend() -> Backend:
    from nanovllm.ops import kernels  # imports Triton, which not every machine has

    return Backend(
        "triton",
        linear=kernels.linear,
        gated_linear=kernels.gated_linear,
        rope_store=kernels.rope_store,
        plan_decodes=kernels.plan_decodes,
        attend_decodes=kernels.attend_decodes,
        attend_prompts=kernels.attend_prompts,
        candidates=kernels.candidates,
        capturable=True,
    )


def flash(base: Backend, block_size: int) -> Backend:
    """`base` with FlashAttention's attention: version 3 if it is installed, else version 2."""
    raise NotImplementedError
