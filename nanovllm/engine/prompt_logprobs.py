"""Prompt logprobs: how likely the model finds the tokens of a prompt.

Sampling needs the logits of a row's last token alone. A request with `prompt_logprobs` also needs
the logits of every token of its prompt, which is why they have a function of their own. No other
request comes here.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nanovllm.engine.input_batch import upload
from nanovllm.engine.scheduler import Batch, ScheduledSequence

if TYPE_CHECKING:
    from nanovllm.engine.model_runner import ModelRunner


def prompt_logprob_positions(row: ScheduledSequence) -> range:
    """Return the positions of the prompt tokens whose logprobs a row computes; often none.

    The hidden state of one token gives the probabilities of the next one, so these are the
    positions of the row's own tokens, each plus one.
    """
    if row.seq.params.prompt_logprobs is None:
        return range(0)
    return range(row.start + 1, min(row.end + 1, row.seq.num_prompt_tokens))


def gather_prompt_logprobs(runner: "ModelRunner", batch: Batch, hidden: Tensor) -> Tensor | None:
    """Pack the logprobs of all rows' `prompt_logprob_positions`, in order, from hidden states.

    Returns [num_positions, WIDTH] int32, or None if no row has such positions. At most max_num_seqs
    tokens have logits at one time, because sampling may need as many.
    """
    first_token = 0  # of the row, in `hidden`
    tokens: list[int] = []
    ids: list[int] = []
    num_logprobs: list[list[int | None]] = []
    for row in batch:
        positions = prompt_logprob_positions(row)
        tokens += range(first_token, first_token + len(positions))
        ids += row.seq.token_ids[positions.start : positions.stop]
        num_logprobs += [[row.seq.params.prompt_logprobs]] * len(positions)
        first_token += row.num_tokens
    device, max_rows = runner.device, len(runner.input_batch.input_ids)
    parts = []
    for start in range(0, len(ids), max_rows):
        part = slice(start, start + max_rows)
        logits = runner.gather_logits(hidden[upload(tokens[part], device)])
        numbers = upload(np.array(num_logprobs[part], np.int32), device)
        part_ids = upload(ids[part], device)
        parts.append(runner.backend.gather_logprobs(logits, part_ids, numbers))
    return torch.cat(parts) if parts else None
