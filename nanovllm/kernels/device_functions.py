"""Functions that several kernels call. Triton inlines them, so that a call costs nothing."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOG2_E = 1.4426950408889634  # exp(x) = exp2(x * LOG2_E), and a GPU computes exp2 in hardware


@triton.jit
def pdl_wait(PDL: tl.constexpr):
    """Let the next kernel start, then wait until the previous kernel has written its results.

    Before this call, a kernel may read only what the previous kernel does not write, for example
    weights. Without programmatic dependent launch (PDL=False), the previous kernel has ended.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def online_softmax_step(running_max, running_sum, acc, scores, value):
    """Add one tile of tokens to attention by online softmax (arXiv:1805.02867).

    scores [queries, tokens] are in base 2, and value is [tokens, dim]. The attention so far is
    acc [queries, dim] / running_sum [queries], and running_max [queries] is the largest score so
    far. Returns the new (running_max, running_sum, acc).
    """
    new_max = tl.maximum(running_max, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new_max[:, None])
    rescale = tl.exp2(running_max - new_max)
    running_sum = running_sum * rescale + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(value.dtype), value, acc * rescale[:, None], input_precision="ieee")
    return new_max, running_sum, acc
