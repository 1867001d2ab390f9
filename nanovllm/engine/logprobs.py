"""LogprobsProcessor: from the packed numbers of a step to the Logprobs of its sequences.

This is work of the host that grows with the rows and with the tokens they ask for, and a step's
part of it must fit behind the next step on the GPU. A step therefore only notes an output token's
packed row. The objects are made when somebody reads them, and each token is decoded once.
"""

from itertools import chain, takewhile
from operator import eq
from typing import Any

import numpy as np
from torch import Tensor

from nanovllm.engine.scheduler import Batch, ScheduledSequence
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
REPLACEMENT = "\ufffd"  # what a tokenizer writes for a part of a character
CONTEXT = 4  # tokens in front that may hold the beginning of a character, as in vLLM
Found = tuple[int, list[int], list[float]]  # a packed row: rank, ids, log probabilities


def prompt_targets(row: ScheduledSequence) -> range:
    """The positions of the prompt's tokens whose logprobs a row computes; empty if none are wanted.

    The hidden state of one token gives the probabilities of the next one, so these are the
    positions of the row's own tokens, each plus one.
    """
    if row.seq.params.prompt_logprobs is None:
        return range(0)
    return range(row.start + 1, min(row.end + 1, row.seq.num_prompt_tokens))


class LogprobsProcessor:
    """Hands a finished step's logprobs to the sequences. It keeps the texts of decoded tokens.

    A sequence keeps them by position, so it does no harm that a step which failed, or a sequence
    that was preempted, brings the same ones again.
    """

    def __init__(self) -> None:
        self._texts = TokenTexts(None)

    def update(self, batch: Batch, tokens: Any) -> None:
        """Take in the logprobs of a step's PendingTokens, whose ids have been read."""
        if tokens.logprobs is not None:
            self._update_outputs([row for row in batch if row.samples], tokens.logprobs)
        if tokens.prompt_logprobs is not None:
            self._update_prompts(batch, tokens.prompt_logprobs)

    def _update_outputs(self, rows: Batch, packed: Tensor) -> None:
        """Note where each row's numbers are. Logprobs are made of them once somebody reads them.

        Six objects a token take longer to make than the GPU takes for a step. A note makes no
        object that Python's collector looks at, because many of these would make it go through
        the whole heap, which takes a quarter of a second once torch is imported.
        """
        array = packed.numpy().copy()  # the memory that a GPU writes to is scarce
        values = array[:, LOGPROBS].view(np.float32).tolist()
        for place, (row, value) in enumerate(zip(rows, values, strict=True)):
            seq = row.seq
            if seq.output_logprobs is not None and not seq.is_finished:
                index = row.end - seq.num_prompt_tokens
                seq.output_logprobs.note(index, value, array, place, self)

    def make_output(
        self, seq: Sequence, position: int, packed: np.ndarray, place: int
    ) -> LogprobsOnePosition:
        """The logprobs of an output token, from row `place` of its step's packed rows."""
        number = seq.params.logprobs or 0
        found = unpacked(packed[place : place + 1], number)[0]
        return self._make(seq, position, number, found, seq.num_prompt_tokens)

    def _update_prompts(self, batch: Batch, packed: Tensor) -> None:
        everything = unpacked(packed.numpy(), MAX_LOGPROBS)
        first = 0
        for row in batch:
            seq, targets = row.seq, prompt_targets(row)
            found = everything[first : first + len(targets)]
            first += len(targets)
            if targets and not seq.is_finished:
                number = seq.params.prompt_logprobs or 0
                logprobs = [
                    self._make(seq, position, number, one, first_known=1)
                    for position, one in zip(targets, found, strict=True)
                ]
                seq.set_prompt_logprobs(targets.start, logprobs)

    def _make(
        self, seq: Sequence, position: int, number: int, found: Found, first_known: int
    ) -> LogprobsOnePosition:
        """The logprobs at one position: the reported token first, then the `number` likeliest.

        If the reported token is one of these, it stays first and has its rank among them. Tokens
        from `first_known` up to the position complete a character, if a token is a part of one.
        """
        rank, ids, values = found
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
                texts = self._texts.completed(ids, before)
        ranks = chain((rank,), RANKS)
        return dict(zip(ids, map(Logprob, values, ranks, texts), strict=False))


def unpacked(array: np.ndarray, most: int) -> list[Found]:
    """Each packed row's rank, and the ids and log probabilities of its token and `most` others."""
    ids = array[:, IDS : IDS + 1 + most].tolist()
    logprobs = array[:, LOGPROBS : LOGPROBS + 1 + most].view(np.float32).tolist()
    return list(zip(array[:, RANK].tolist(), ids, logprobs, strict=True))


class TokenTexts(dict):
    """By token id, the token's text; None for a token that ends in the middle of a character."""

    def __init__(self, tokenizer: Any):
        super().__init__()
        self.tokenizer = tokenizer

    def __missing__(self, token_id: int) -> str | None:
        text = self._decode([token_id])
        self[token_id] = None if text.endswith(REPLACEMENT) else text
        return self[token_id]

    def _decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids) or ""

    def completed(self, token_ids: list[int], before: list[int]) -> list[str | None]:
        """The texts of several tokens, each of which might follow the tokens `before`."""
        texts = [self[token_id] for token_id in token_ids]
        return [
            self._complete(token_id, before) if text is None else text
            for token_id, text in zip(token_ids, texts, strict=True)
        ]

    def _complete(self, token_id: int, before: list[int]) -> str:
        """What a part of a character adds to the text; nothing while the character is incomplete.

        The character that the token completes is its text as a whole, as in vLLM, because the
        parts before it had none.
        """
        for count in range(1, len(before) + 1):
            context = before[-count:]
            text = self._decode([*context, token_id])
            if text.endswith(REPLACEMENT):
                continue
            while context and self[context[-1]] is None:
                context.pop()
            prefix = self._decode(context) if context else ""
            shared = takewhile(bool, map(eq, prefix, text))  # all of the prefix, as a rule
            return text[sum(shared) :]
        return ""
