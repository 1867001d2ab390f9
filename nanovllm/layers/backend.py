"""Backend: the functions that a layer calls, as they are best done on this machine.

`torch` is plain and runs anywhere; it defines what is right. `triton` is our own kernels. `flash`
is `triton` with FlashAttention's attention. "auto" takes what was measured to be fastest.
"""

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.layers import attention, functional
from nanovllm.layers.attention import AttentionMetadata, Rows
from nanovllm.ops import sampler
from nanovllm.ops import attention, logprobs, sampler
from nanovllm.ops import linear as products
from nanovllm.ops.attention import AttentionMetadata, Rows


@dataclass(frozen=True)
class Backend:
    """One function a field, each with the signature of its torch twin."""

    name: str
    linear: Callable[..., Tensor] = functional.linear
    gated_linear: Callable[..., Tensor] = functional.gated_linear
    rope_store: Callable[..., Tensor] = attention.rope_store
    plan_decodes: Callable[..., Rows] = attention.plan_decodes
    attend_decodes: Callable[..., Tensor] = attention.attend_decodes
    attend_prompts: Callable[..., Tensor] = attention.attend_prompts
    candidates: Callable[..., tuple[Tensor, Tensor]] = sampler.candidates
    draw: Callable[..., Tensor] = sampler.draw
    gather_logprobs: Callable[..., Tensor] = logprobs.gather_logprobs
    capturable: bool = False  # a decode step can be recorded in a CUDA graph

    def attend(
        self,
        query: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        batch: AttentionMetadata,
        scale: float,
    ) -> Tensor:
        """Attention of query [num_tokens, heads, head_dim]: decode rows first, then prompts."""
        n = 0 if batch.decodes is None else len(batch.decodes.context_lens)
        parts = []
        if batch.decodes is not None:
            parts += [self.attend_decodes(query[:n], k_cache, v_cache, batch.decodes, scale)]
        if batch.prompts is not None:
            parts += [self.attend_prompts(query[n:], k_cache, v_cache, batch.prompts, scale)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


TORCH = Backend("torch")
NAMES = ("torch", "triton", "flash")
LARGEST_HEAD = 256
# What "auto" takes for decode rows and for prompts, by the GPU's capability, as far as it is
# installed; measured with FlashAttention-3 (figures/data/NOTES.md).
AUTO = {(9, 0): ("triton", "flash")}


def choose_backend(name: str, device: torch.device, head_dim: int, block_size: int) -> Backend:
    """The backend asked for, or for "auto" the best that is here.

    Raises ValueError for one that is not known, not installed, or cannot do what is asked.
    """
    if name != "auto" and name not in NAMES:
        raise ValueError(f"attention_backend must be 'auto' or one of {list(NAMES)}, got {name!r}")
    problem = why_not_triton(device, head_dim)
    if name == "torch" or (name == "auto" and problem):
        if name == "auto" and device.type == "cuda":
            warnings.warn(f"attention is done in plain torch: {problem}", stacklevel=2)
        return TORCH
    if problem:
        raise ValueError(f"attention_backend={name!r} cannot be used: {problem}")
    found = {"triton": triton_backend()}
    if name == "flash" or (name == "auto" and has_flash(block_size)):
        found["flash"] = flash_backend(block_size)
    if name != "auto":
        return found[name]
    wanted = AUTO.get(torch.cuda.get_device_capability(device), ("triton", "triton"))
    decodes, prompts = (found.get(name, found["triton"]) for name in wanted)
    return replace(decodes, attend_prompts=prompts.attend_prompts)


def compiled(backend: Backend) -> Backend:
    """`backend`, with what stands beside a product (norm, sum, gate) fused by torch.compile."""
    linear, gated_linear = map(torch.compile, (functional.linear, functional.gated_linear))
    return replace(backend, linear=linear, gated_linear=gated_linear)


def why_not_triton(device: torch.device, head_dim: int) -> str | None:
    """What keeps our kernels from running on this device, if anything does."""
    if device.type != "cuda":
        return f"device={str(device)!r} is not an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"the GPU has compute capability {capability}, the kernels need (8, 0)"
    if head_dim > LARGEST_HEAD:
        return f"head_dim={head_dim} is over the kernels' limit of {LARGEST_HEAD}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


def triton_backend() -> Backend:
    from nanovllm.kernels import logprobs, sampling  # not every machine has Triton
    from nanovllm.ops import kernels

    return Backend(
        "triton",
        linear=kernels.linear,
        gated_linear=kernels.gated_linear,
        rope_store=kernels.rope_store,
        plan_decodes=kernels.plan_decodes,
        attend_decodes=kernels.attend_decodes,
        attend_prompts=kernels.attend_prompts,
        candidates=sampling.candidates,
        draw=sampling.draw,
        gather_logprobs=logprobs.gather_logprobs,
        capturable=True,
    )


# -- FlashAttention ------------------------------------------------------------------------------


def has_flash(block_size: int) -> bool:
    """Whether a version of FlashAttention is installed that takes blocks of this size."""
    if importlib.util.find_spec("flash_attn_interface"):
        return True
    return block_size % 256 == 0 and importlib.util.find_spec("flash_attn") is not None


def flash_backend(block_size: int) -> Backend:
    """`triton` with the attention of FlashAttention-3 if it is installed, else of version 2."""
    if importlib.util.find_spec("flash_attn_interface"):
        attend = flash3
    elif importlib.util.find_spec("flash_attn") is None:
        raise ValueError(
            "attention_backend='flash' needs FlashAttention: install version 3 (package "
            "flash_attn_interface, for Hopper GPUs) or 2 (pip install flash-attn)"
        )
    elif block_size % 256:
        raise ValueError(
            f"attention_backend='flash' with flash-attn 2 needs a block_size that is a "
            f"multiple of 256, got block_size={block_size}"
        )
    else:
        attend = flash2
    return replace(triton_backend(), name="flash", attend_decodes=attend, attend_prompts=attend)


def flash3(query: Tensor, k_cache: Tensor, v_cache: Tensor, rows: Rows, scale: float) -> Tensor:
    """Attention by FlashAttention-3 (Shah et al., arXiv:2407.08608), of any rows."""
    from flash_attn_interface import flash_attn_with_kvcache

    return flash_attn_with_kvcache(
        query, k_cache, v_cache, page_table=rows.block_tables, cache_seqlens=rows.context_lens,
        cu_seqlens_q=rows.starts, max_seqlen_q=rows.longest, softmax_scale=scale, causal=True,
    )  # fmt: skip


def flash2(query: Tensor, k_cache: Tensor, v_cache: Tensor, rows: Rows, scale: float) -> Tensor:
    """Attention by FlashAttention-2 (Dao, arXiv:2307.08691), of any rows."""
    from flash_attn import flash_attn_varlen_func

    ends = F.pad(rows.context_lens.cumsum(0, dtype=torch.int32), (1, 0))
    most = rows.block_tables.shape[1] * k_cache.shape[1]
    return flash_attn_varlen_func(
        query, k_cache, v_cache, cu_seqlens_q=rows.starts, max_seqlen_q=rows.longest,
        cu_seqlens_k=ends, max_seqlen_k=most, block_table=rows.block_tables,
        softmax_scale=scale, causal=True,
    )  # fmt: skip
