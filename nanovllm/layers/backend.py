"""Backend: the functions that the layers call, chosen for the machine they run on.

There are three backends. `torch` runs on any machine and defines the correct result. `triton` is
our own kernels. `flash` is `triton` with FlashAttention in place of our attention. "auto" chooses
what we measured to be fastest.
"""

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nanovllm.kernels import flash_attention
from nanovllm.layers import attention, functional, logprobs, sampler
from nanovllm.metadata import AttentionMetadata, PhaseMetadata


@dataclass(frozen=True)
class Backend:
    """One function per field. Each has the signature and the result of the default, torch's."""

    name: str
    linear: Callable[..., Tensor] = functional.linear
    norm_linear: Callable[..., Tensor] = functional.norm_linear
    linear_add: Callable[..., Tensor] = functional.linear_add
    norm_swiglu: Callable[..., Tensor] = functional.norm_swiglu
    rope_store: Callable[..., Tensor] = attention.rope_store
    plan_decode: Callable[..., PhaseMetadata] = attention.plan_decode
    decode_attention: Callable[..., Tensor] = attention.decode_attention
    prefill_attention: Callable[..., Tensor] = attention.prefill_attention
    local_argmax: Callable[..., tuple[Tensor, Tensor]] = sampler.local_argmax
    draw: Callable[..., Tensor] = sampler.draw
    gather_logprobs: Callable[..., Tensor] = logprobs.gather_logprobs
    capturable: bool = False  # a CUDA graph can record a decode step

    def paged_attention(
        self,
        query: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        metadata: AttentionMetadata,
        scale: float,
    ) -> Tensor:
        """Attend with query [num_tokens, heads, head_dim]: first the decode rows, then prefill."""
        decode, prefill = metadata.decode, metadata.prefill
        n = 0 if decode is None else len(decode.seq_lens)
        parts = []
        if decode is not None:
            parts += [self.decode_attention(query[:n], k_cache, v_cache, decode, scale)]
        if prefill is not None:
            parts += [self.prefill_attention(query[n:], k_cache, v_cache, prefill, scale)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


TORCH_BACKEND = Backend("torch")
BACKENDS = ("torch", "triton", "flash")
MAX_HEAD_DIM = 256
# What "auto" takes for decode and for prefill, by the GPU's compute capability, as far as it is
# installed. We measured this with FlashAttention-3 (figures/data/NOTES.md).
AUTO = {(9, 0): ("triton", "flash")}


def choose_backend(name: str, device: torch.device, head_dim: int, block_size: int) -> Backend:
    """Return the backend `name`, or for "auto" the fastest one that this machine has.

    Raises ValueError if the backend is unknown, is not installed, or cannot serve the arguments.
    """
    if name != "auto" and name not in BACKENDS:
        allowed = list(BACKENDS)
        raise ValueError(f"attention_backend must be 'auto' or one of {allowed}, got {name!r}")
    problem = why_no_triton(device, head_dim)
    if name == "torch" or (name == "auto" and problem):
        if name == "auto" and device.type == "cuda":
            warnings.warn(f"attention is done in plain torch: {problem}", stacklevel=2)
        return TORCH_BACKEND
    if problem:
        raise ValueError(f"attention_backend={name!r} cannot be used: {problem}")
    found = {"triton": triton_backend()}
    if name == "flash" or (name == "auto" and has_flash_attention(block_size)):
        found["flash"] = flash_backend(block_size)
    if name != "auto":
        return found[name]
    phases = AUTO.get(torch.cuda.get_device_capability(device), ("triton", "triton"))
    decode, prefill = (found.get(phase, found["triton"]) for phase in phases)
    return replace(decode, prefill_attention=prefill.prefill_attention)


def compile_linears(backend: Backend) -> Backend:
    """Return `backend` with torch's linear layers, which torch.compile fuses with norm and gate."""
    return replace(
        backend,
        linear=torch.compile(functional.linear),
        norm_linear=torch.compile(functional.norm_linear),
        linear_add=torch.compile(functional.linear_add),
        norm_swiglu=torch.compile(functional.norm_swiglu),
    )


def why_no_triton(device: torch.device, head_dim: int) -> str | None:
    """Return what keeps our kernels from running on this device, or None."""
    if device.type != "cuda":
        return f"device={str(device)!r} is not an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"the GPU has compute capability {capability}, the kernels need (8, 0)"
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim={head_dim} is over the kernels' limit of {MAX_HEAD_DIM}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


def triton_backend() -> Backend:
    # These modules import Triton, which not every machine has.
    from nanovllm.kernels import (
        decode_attention,
        decode_plan,
        linear,
        logprobs,  # not every machine has Triton
        prefill_attention,
        sampling,
        store,
    )

    return Backend(
        "triton",
        linear=linear.linear,
        norm_linear=linear.norm_linear,
        linear_add=linear.linear_add,
        norm_swiglu=linear.norm_swiglu,
        rope_store=store.rope_store,
        plan_decode=decode_plan.plan_decode,
        decode_attention=decode_attention.decode_attention,
        prefill_attention=prefill_attention.prefill_attention,
        local_argmax=sampling.local_argmax,
        draw=sampling.draw,
        gather_logprobs=logprobs.gather_logprobs,
        capturable=True,
    )


# -- FlashAttention ------------------------------------------------------------------------------


def has_flash_attention(block_size: int) -> bool:
    """Return whether a version of FlashAttention is installed that takes blocks of this size."""
    if flash_attention.has_version_3():
        return True
    fits = block_size % flash_attention.BLOCK_SIZE_MULTIPLE == 0
    return fits and flash_attention.has_version_2()


def flash_backend(block_size: int) -> Backend:
    """Return `triton` with the attention of FlashAttention-3 if it is installed, else version 2.

    Raises ValueError if neither is installed, or if version 2 does not take `block_size`.
    """
    multiple = flash_attention.BLOCK_SIZE_MULTIPLE
    if flash_attention.has_version_3():
        attend = flash_attention.flash_attention_3
    elif not flash_attention.has_version_2():
        raise ValueError(
            "attention_backend='flash' needs FlashAttention: install version 3 (package "
            "flash_attn_interface, for Hopper GPUs) or 2 (pip install flash-attn)"
        )
    elif block_size % multiple:
        raise ValueError(
            f"attention_backend='flash' with flash-attn 2 needs a block_size that is a "
            f"multiple of {multiple}, got block_size={block_size}"
        )
    else:
        attend = flash_attention.flash_attention_2
    return replace(
        triton_backend(), name="flash", decode_attention=attend, prefill_attention=attend
    )
