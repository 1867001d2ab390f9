"""Adapters that call FlashAttention, if it is installed, with this engine's metadata.

Both functions compute decode and prefill attention alike. Each has the signature of
`layers.attention.prefill_attention`.
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.metadata import PhaseMetadata

BLOCK_SIZE_MULTIPLE = 256  # of version 2, for the blocks of a paged cache


def has_version_3() -> bool:
    return importlib.util.find_spec("flash_attn_interface") is not None


def has_version_2() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def flash_attention_3(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, metadata: PhaseMetadata, scale: float
) -> Tensor:
    """Compute attention by FlashAttention-3 (Shah et al., arXiv:2407.08608)."""
    from flash_attn_interface import flash_attn_with_kvcache

    return flash_attn_with_kvcache(
        query, k_cache, v_cache, page_table=metadata.block_tables, cache_seqlens=metadata.seq_lens,
        cu_seqlens_q=metadata.query_start_loc, max_seqlen_q=metadata.max_query_len,
        softmax_scale=scale, causal=True,
    )  # fmt: skip


def flash_attention_2(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, metadata: PhaseMetadata, scale: float
) -> Tensor:
    """Compute attention by FlashAttention-2 (Dao, arXiv:2307.08691)."""
    from flash_attn import flash_attn_varlen_func

    seq_ends = F.pad(metadata.seq_lens.cumsum(0, dtype=torch.int32), (1, 0))
    max_seq_len = metadata.block_tables.shape[1] * k_cache.shape[1]
    return flash_attn_varlen_func(
        query, k_cache, v_cache, cu_seqlens_q=metadata.query_start_loc,
        max_seqlen_q=metadata.max_query_len, cu_seqlens_k=seq_ends, max_seqlen_k=max_seq_len,
        block_table=metadata.block_tables, softmax_scale=scale, causal=True,
    )  # fmt: skip
