"""LogprobsProcessor: turn the packed logprobs of a step into the Logprobs of its sequences.

This work of the host grows with the number of rows and with the number of tokens that they ask for.
It must be done while the GPU runs the next step. A step therefore only records where the packed row
of each output token is. We make the Logprob objects of output tokens when somebody reads them, and
those of prompt tokens at once. Each token is decoded once.
"""

from itertools import chain, islice, takewhile
from operator import eq
from typing import Any

import numpy as np
from torch import Tensor

from nanovllm.engine.prompt_logprobs import prompt_logprob_positions
from nanovllm.engine.scheduler import Batch
from nanovllm.engine.sequence import Sequence
from nanovllm.logprobs import (
    IDS,
    LOGPROBS,
    MAX_LOGPROBS,
    NO_ID,
    RANK,
    Logprob,
    LogprobsOnePosition,
)

RANKS = range(1, MAX_LOGPROBS + 1)
REPLACEMENT = "\ufffd"  # the text that a tokenizer writes for a part of a character
CONTEXT = 4  # tokens before that may hold the beginning of a character, as in vLLM
UnpackedRow = tuple[int, list[int], list[float]]  # rank, ids, log probabilities


class LogprobsProcessor:
    """Hands a finished step's logprobs to the sequences, and keeps the texts of decoded tokens.

    A sequence keeps its logprobs by position. A step that is repeated after a failure or after a
    preemption therefore brings the same logprobs again without harm.
    """

    def __init__(self) -> None:
        self._texts = TokenTexts(None)

    def update(self, batch: Batch, output: Any) -> None:
        """Hand over the logprobs of an AsyncModelRunnerOutput whose ids have been read."""
        if output.logprobs is not None:
            self._update_sample_logprobs([row for row in batch if row.samples], output.logprobs)
        if output.prompt_logprobs is not None:
            self._update_prompt_logprobs(batch, output.prompt_logprobs)

    def _update_sample_logprobs(self, rows: Batch, packed: Tensor) -> None:
        """Record where each row's numbers are, so that Logprobs can be made when they are read.

        Making six objects for each token would take longer than the GPU takes for a step. The
        record consists of no objects that Python's garbage collector tracks. Many of these would
        make it go through the whole heap, which takes a quarter of a second once torch is imported.
        """
        array = packed.numpy().copy()  # because the pinned memory that a GPU writes to is scarce
        values = array[:, LOGPROBS].view(np.float32).tolist()
        for index, (row, value) in enumerate(zip(rows, values, strict=True)):
            seq = row.seq
            if seq.output_logprobs is not None and not seq.is_finished:
                token_index = row.end - seq.num_prompt_tokens
                seq.output_logprobs.record(token_index, value, array, index, self)

    def make_sample_logprobs(
        self, seq: Sequence, position: int, packed: np.ndarray, index: int
    ) -> LogprobsOnePosition:
        """Make the logprobs of an output token from row `index` of its step's packed rows."""
        number = seq.params.logprobs or 0
        unpacked_row = unpack(packed[index : index + 1], number)[0]
        return self._make(seq, position, number, unpacked_row, seq.num_prompt_tokens)

    def _update_prompt_logprobs(self, batch: Batch, packed: Tensor) -> None:
        unpacked_rows = iter(unpack(packed.numpy(), MAX_LOGPROBS))
        for row in batch:
            seq, positions = row.seq, prompt_logprob_positions(row)
            own_rows = list(islice(unpacked_rows, len(positions)))
            if positions and not seq.is_finished:
                number = seq.params.prompt_logprobs or 0
                logprobs = [
                    self._make(seq, position, number, unpacked_row, first_known=1)
                    for position, unpacked_row in zip(positions, own_rows, strict=True)
                ]
                seq.set_prompt_logprobs(positions.start, logprobs)

    def _make(
        self, seq: Sequence, position: int, number: int, unpacked_row: UnpackedRow, first_known: int
    ) -> LogprobsOnePosition:
        """Make the logprobs at one position: the reported token's, then the `number` likeliest.

        If the reported token is one of the likeliest, it stays first and keeps its rank among them.
        If a token is only a part of a character, the tokens from `first_known` up to the position
        complete the character.
        """
        rank, ids, values = unpacked_row
        ids = ids[: number + 1]
        if ids[-1] == NO_ID:
            ids = [token_id for token_id in ids if token_id != NO_ID]
        texts: list[str | None] = [None] * len(ids)
        if seq.detokenizer is not None:
            if self._texts.tokenizer is not seq.detokenizer.tokenizer:
                self._texts = TokenTexts(seq.detokenizer.tokenizer)
            texts = [self._texts[token_id] for token_id in ids]
            if None in texts:
                before = seq.token_ids[max(first_known, position - CONTEXT) : position]
                texts = self._texts.complete(ids, before)
        ranks = chain((rank,), RANKS)
        return dict(zip(ids, map(Logprob, values, ranks, texts), strict=False))


def unpack(array: np.ndarray, number: int) -> list[UnpackedRow]:
    """Return each packed row's rank, and its token's and the `number` likeliest tokens' values."""
    ids = array[:, IDS : IDS + 1 + number].tolist()
    logprobs = array[:, LOGPROBS : LOGPROBS + 1 + number].view(np.float32).tolist()
    return list(zip(array[:, RANK].tolist(), ids, logprobs, strict=True))


class TokenTexts(dict):
    """Maps a token id to its text, or to None if the token ends in the middle of a character."""

    def __init__(self, tokenizer: Any):
        super().__init__()
        self.tokenizer = tokenizer

    def __missing__(self, token_id: int) -> str | None:
        text = self._decode([token_id])
        self[token_id] = None if text.endswith(REPLACEMENT) else text
        return self[token_id]

    def _decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids) or ""

    def complete(self, token_ids: list[int], before: list[int]) -> list[str | None]:
        """Return the texts of several tokens, each of which might follow the tokens `before`."""
        texts = [self[token_id] for token_id in token_ids]
        return [
            self._complete_one(token_id, before) if text is None else text
            for token_id, text in zip(token_ids, texts, strict=True)
        ]

    def _complete_one(self, token_id: int, before: list[int]) -> str:
        """Return what a part of a character adds to the text.

        This is nothing while the character is incomplete. The token that completes the character
        has the whole character as its text, as in vLLM, because the parts before had no text.
        """
        for count in range(1, len(before) + 1):
            context = before[-count:]
            text = self._decode([*context, token_id])
            if text.endswith(REPLACEMENT):
                continue
            while context and self[context[-1]] is None:
                context.pop()
            prefix = self._decode(context) if context else ""
            common = takewhile(bool, map(eq, prefix, text))  # usually all of the prefix
            return text[sum(common) :]
        return ""
