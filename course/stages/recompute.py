"""Stage 01: no cache. For every token, the whole text so far goes through the model again.

One request at a time. After n tokens the model has computed 1 + 2 + ... + n of them.
"""

import torch
from torch import Tensor

from course.measure.ladder_workload import LadderWorkload
from course.stages.common import Recorder, Stage, greedy
from nanovllm.checkpoint.weights import load_model
from nanovllm.distributed.ranks import Ranks
from nanovllm.layers.backend import TORCH_BACKEND, Backend
from nanovllm.metadata import AttentionMetadata, PhaseMetadata
from nanovllm.models.decoder import Decoder


class DecoderStage(Stage):
    """A stage that drives the decoder itself, with attention in plain torch."""

    backend: Backend = TORCH_BACKEND
    model: Decoder

    def prepare(self, workload: LadderWorkload) -> None:
        self.model = load_model(self.folder, self.config, self.backend, Ranks(), self.args)

    def release(self) -> None:
        del self.model

    def new_cache(self, num_rows: int, length: int) -> Tensor:
        """Room for keys and values: [layers, 2, num_rows, length, kv_heads, head_dim].

        The decoder asks for blocks. Here a row's block is as long as the row, and row i has block
        i: that makes the paged cache an ordinary, contiguous one.
        """
        c = self.config
        shape = (c.num_hidden_layers, 2, num_rows, length, c.num_key_value_heads, c.head_dim)
        return torch.zeros(shape, dtype=c.dtype, device=self.device)


class Recompute(DecoderStage):
    """The loop everybody writes first."""

    number, name, lesson = 1, "recompute", "01_naive_generate"

    def part_of(self, workload: LadderWorkload) -> LadderWorkload:
        """On a GPU the first requests: all take minutes, and one at a time goes at one rate."""
        few = len(workload.prompts) // (16 if self.device.type == "cuda" else 1)
        return workload.first(max(1, few))

    @torch.inference_mode()
    def serve(self, workload: LadderWorkload, recorder: Recorder) -> None:
        for i, (prompt, count) in enumerate(
            zip(workload.prompts, workload.num_outputs, strict=True)
        ):
            token_ids = list(prompt)
            for _ in range(count):
                [next_id], [gap] = greedy(self.last_logits(token_ids))
                token_ids.append(next_id)
                recorder.token(i, next_id, gap)

    def last_logits(self, token_ids: list[int]) -> Tensor:
        """Logits [1, vocab_size] of the token after `token_ids`, all of them computed afresh.

        The decoder wants a place for keys and values. One layer's worth does for all layers: each
        writes its own there before it reads, and nothing is kept for the next token.
        """
        length = len(token_ids)
        positions = torch.arange(length, device=self.device)
        text = PhaseMetadata(
            slot_mapping=positions,
            seq_lens=torch.tensor([length], device=self.device),
            block_tables=torch.zeros(1, 1, dtype=torch.int64, device=self.device),
            query_start_loc=torch.tensor([0, length], device=self.device),
            max_query_len=length,
        )
        scratch = self.new_cache(1, length)[:1].expand(self.config.num_hidden_layers, *[-1] * 5)
        ids = torch.tensor(token_ids, device=self.device)
        hidden = self.model(ids, scratch, AttentionMetadata(positions, None, text))
        return self.model.compute_logits(hidden[-1:])
