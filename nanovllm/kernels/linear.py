"""Linear layers, fused with their neighbours: a norm before, or SwiGLU or a residual add after.

A linear layer over a single token is bound by memory, because it reads each weight once and uses it
once. One kernel of ours reads the weights with many loads in flight and does the neighbours' work
on the way. For more tokens, cuBLAS is faster, and the neighbours have kernels of their own.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from nanovllm.kernels.device_functions import pdl_wait
from nanovllm.kernels.gpu_limits import GpuLimits, power_of_2

MAX_MATVEC_INPUTS = 32_768  # numbers of a vector that one program can hold


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Do what `layers.functional.linear` does."""
    return matvec(x, weight, bias) if fits_matvec(x) else F.linear(x, weight, bias)


def norm_linear(x: Tensor, norm: nn.Module, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Do what `layers.functional.norm_linear` does, for an RMSNorm."""
    if fits_matvec(x):
        return matvec(x, weight, bias, norm)
    return F.linear(rms_norm(x, norm), weight, bias)


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """Do what `layers.functional.linear_add` does. It may overwrite the residual."""
    if fits_matvec(x):
        return matvec(x, weight, bias, residual=residual)
    y = residual.addmm_(x, weight.t())
    return y if bias is None else y.add_(bias)


def norm_swiglu(x: Tensor, norm: nn.Module, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Do what `layers.functional.norm_swiglu` does, for an RMSNorm."""
    if fits_matvec(x):
        return matvec(x, weight, bias, norm, swiglu=True)
    return silu_mul(norm_linear(x, norm, weight, bias))


# -- one token -----------------------------------------------------------------------------------


@triton.jit
def matvec_kernel(
    x, weight, bias, norm_weight, residual, y, eps, num_outputs, num_inputs,
    NORM: tl.constexpr, SWIGLU: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Multiply BLOCK_N rows of the weight with one vector x, which BLOCK_K covers as a whole.

    The program reads whole rows, with all loads in flight at once. It issues them before it waits
    for the previous kernel, because the weights depend on no kernel.
    """
    n, k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    is_output, is_input = n < num_outputs, k < num_inputs
    offsets = n.to(tl.int64)[:, None] * num_inputs + k[None, :]
    mask = is_output[:, None] & is_input[None, :]
    rows = tl.load(weight + offsets, mask, 0.0).to(tl.float32)
    if SWIGLU:  # gate's rows come first, then up's
        up = weight + num_outputs.to(tl.int64) * num_inputs
        up_rows = tl.load(up + offsets, mask, 0.0).to(tl.float32)
    pdl_wait(PDL)
    vector = tl.load(x + k, is_input, 0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(vector * vector, axis=0) / num_inputs + eps)
        vector *= scale * tl.load(norm_weight + k, is_input, 0.0).to(tl.float32)
    result = tl.sum(rows * vector[None, :], axis=1)
    if BIAS:
        result += tl.load(bias + n, is_output, 0.0).to(tl.float32)
    if SWIGLU:
        up_result = tl.sum(up_rows * vector[None, :], axis=1)
        if BIAS:
            up_result += tl.load(bias + num_outputs + n, is_output, 0.0).to(tl.float32)
        result = result * tl.sigmoid(result) * up_result
    if RESIDUAL:
        result += tl.load(residual + n, is_output, 0.0).to(tl.float32)
    tl.store(y + n, result, is_output)


def matvec(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: nn.Module | None = None,
    residual: Tensor | None = None,
    swiglu: bool = False,
) -> Tensor:
    """The linear layer of one token x [1, inputs], with the neighbours that are given.

    Returns [1, outputs]. With `swiglu`, weight is [2 * outputs, inputs].
    """
    limits, block_k = GpuLimits.of(x.device), power_of_2(x.shape[1])
    block_n, warps = (8, 4) if block_k <= 1024 else (max(1, min(4, 16_384 // block_k)), 8)
    num_outputs = len(weight) // 2 if swiglu else len(weight)
    y = x.new_empty(1, num_outputs)
    norm_weight, eps = (norm.weight, norm.eps) if norm else (None, 0.0)
    flags = (norm is not None, swiglu, bias is not None, residual is not None)
    matvec_kernel[(triton.cdiv(num_outputs, block_n),)](
        x, weight, bias, norm_weight, residual, y, eps, num_outputs, x.shape[1], *flags,
        block_n, block_k, limits.supports_pdl, num_warps=warps, **limits.launch_options,
    )  # fmt: skip
    return y


def fits_matvec(x: Tensor) -> bool:
    """Whether `matvec` is faster than cuBLAS for x [num_tokens, inputs], and can hold it."""
    return len(x) == 1 and x.shape[1] <= MAX_MATVEC_INPUTS


# -- several tokens ------------------------------------------------------------------------------


@triton.jit
def rms_norm_kernel(x, weight, y, eps, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Normalize one token."""
    offsets = tl.arange(0, BLOCK)
    mask = offsets < size
    scale = tl.load(weight + offsets, mask, 0.0).to(tl.float32)
    pdl_wait(PDL)
    row = tl.program_id(0).to(tl.int64) * size
    vector = tl.load(x + row + offsets, mask, 0.0).to(tl.float32)
    scale *= tl.rsqrt(tl.sum(vector * vector, axis=0) / size + eps)
    tl.store(y + row + offsets, vector * scale, mask)


def rms_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """Compute norm(x) for an RMSNorm and x [num_tokens, size]."""
    limits, size, y = GpuLimits.of(x.device), x.shape[1], torch.empty_like(x)
    args = (x, norm.weight, y, norm.eps, size, power_of_2(size), limits.supports_pdl)
    rms_norm_kernel[(len(x),)](*args, **limits.launch_options)
    return y


@triton.jit
def silu_mul_kernel(gate_up, y, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Compute BLOCK features of one token."""
    pdl_wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    gate = tl.load(gate_up + token * 2 * size + offsets, mask).to(tl.float32)
    up = tl.load(gate_up + token * 2 * size + size + offsets, mask).to(tl.float32)
    tl.store(y + token * size + offsets, gate * tl.sigmoid(gate) * up, mask)


def silu_mul(gate_up: Tensor) -> Tensor:
    """Compute silu(gate) * up [num_tokens, size] of gate_up [num_tokens, 2 * size]."""
    limits, size = GpuLimits.of(gate_up.device), gate_up.shape[1] // 2
    y = gate_up.new_empty(len(gate_up), size)
    block = min(1024, power_of_2(size))
    grid = (len(gate_up), triton.cdiv(size, block))
    silu_mul_kernel[grid](gate_up, y, size, block, limits.supports_pdl, **limits.launch_options)
    return y
