"""Stage 02: keys and values are kept, in one contiguous cache, for a batch that starts together.

Prefill computes all prompts at once, decode one token a row. Every row has a place as long as the
longest request may become, whatever it needs; prompts are padded to the longest; and the batch runs
until its last row is done, with rows that are done already computing tokens that nobody wants.
"""

from dataclasses import replace

import torch
from torch import Tensor

from course.measure.ladder_workload import LadderWorkload
from course.stages.common import Recorder, greedy
from course.stages.recompute import DecoderStage
from nanovllm.layers.attention import masked_attention
from nanovllm.layers.backend import TORCH_BACKEND
from nanovllm.metadata import AttentionMetadata, PhaseMetadata


def attend(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, metadata: PhaseMetadata, scale: float
) -> Tensor:
    """Attention of query [rows * new, heads, head_dim] over caches [rows, max_len, kv_heads, dim].

    All rows have as many new tokens; row i reads the first seq_lens[i] tokens of its place.
    No table is looked up, and nothing is copied: that is what being contiguous is good for.
    """
    num_rows, new = len(metadata.seq_lens), metadata.max_query_len
    length = int(metadata.seq_lens.max())
    readable = torch.arange(length, device=query.device)
    last = metadata.seq_lens[:, None] - new + torch.arange(new, device=query.device)  # [rows, new]
    out = masked_attention(
        query.unflatten(0, (num_rows, new)).transpose(1, 2),  # [rows, heads, new, head_dim]
        k_cache[:, :length].transpose(1, 2),  # [rows, kv_heads, length, head_dim]
        v_cache[:, :length].transpose(1, 2),
        readable <= last[..., None],  # [rows, new, length]
        scale,
    )
    return out.transpose(1, 2).flatten(0, 1)


class ContiguousCache(DecoderStage):
    """Prefill and decode over [batch, max_len], a batch at a time."""

    number, name, lesson = 2, "contiguous cache", "02_kv_cache"
    backend = replace(TORCH_BACKEND, decode_attention=attend, prefill_attention=attend)

    def serve(self, workload: LadderWorkload, recorder: Recorder) -> None:
        size = max(1, workload.kv_tokens // workload.max_len)  # rows that fit in the room
        for first in range(0, len(workload.prompts), size):
            requests = range(first, min(first + size, len(workload.prompts)))
            self.serve_batch(requests, workload, recorder)

    @torch.inference_mode()
    def serve_batch(self, requests: range, workload: LadderWorkload, recorder: Recorder) -> None:
        prompts = [workload.prompts[i] for i in requests]
        wanted = [workload.num_outputs[i] for i in requests]
        reserved = len(prompts) * workload.max_len
        cache = self.new_cache(len(prompts), workload.max_len)
        logits = self.prefill(prompts, cache)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        steps = max(wanted)
        for step in range(steps):
            next_ids, gaps = greedy(logits)
            for row, request in enumerate(requests):
                if step < wanted[row]:  # the others run on for nothing
                    recorder.token(request, next_ids[row], gaps[row])
            unfinished = (len(p) for p, n in zip(prompts, wanted, strict=True) if step < n)
            recorder.cache(reserved, sum(length + step for length in unfinished))
            if step + 1 < steps:  # the last token is never computed
                logits = self.decode(next_ids, lengths + step, cache)

    def prefill(self, prompts: list[list[int]], cache: Tensor) -> Tensor:
        """Compute all prompts, padded to the longest; logits [rows, vocab_size] after each.

        Padding stands to the right, so no real token sees it. What it leaves in the cache is
        overwritten by the row's output before it can be read. It repeats the row's own last token:
        a mask gives padding the weight 0, but 0 * NaN is NaN, and another token might give NaN.
        """
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        longest = int(lengths.max())
        padded = [p + p[-1:] * (longest - len(p)) for p in prompts]
        ids = torch.tensor(padded, device=self.device)
        hidden = self.forward(ids, torch.zeros_like(lengths), cache)
        last = torch.arange(len(prompts), device=self.device) * longest + lengths - 1
        return self.model.compute_logits(hidden[last])

    def decode(self, next_ids: list[int], lengths: Tensor, cache: Tensor) -> Tensor:
        """Compute one token a row, at position lengths[row]; logits [rows, vocab_size] after it."""
        ids = torch.tensor(next_ids, device=self.device)[:, None]
        return self.model.compute_logits(self.forward(ids, lengths, cache))

    def forward(self, ids: Tensor, begin: Tensor, cache: Tensor) -> Tensor:
        """Hidden states [rows * new, hidden_size] of ids [rows, new], row i's from begin[i] on."""
        num_rows, new = ids.shape
        max_len = cache.shape[3]
        positions = begin[:, None] + torch.arange(new, device=self.device)  # [rows, new]
        row = torch.arange(num_rows, device=self.device)
        batch = PhaseMetadata(
            slot_mapping=(row[:, None] * max_len + positions).flatten(),
            seq_lens=begin + new,
            block_tables=row[:, None],  # row i's only block is block i
            query_start_loc=torch.arange(num_rows + 1, device=self.device) * new,
            max_query_len=new,
        )
        metadata = AttentionMetadata(positions.flatten(), None, batch)
        return self.model(ids.flatten(), cache, metadata)
