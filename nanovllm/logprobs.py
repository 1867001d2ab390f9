"""Logprob: how likely the model found one token, with vLLM's names."""

from dataclasses import dataclass

MAX_LOGPROBS = 20  # tokens that a request may ask for at each position; vLLM's limit

# The device packs the logprobs of one position into a row of int32 (see layers/logprobs.py).
NONE = -1  # in place of a number of logprobs: the row asks for nothing
NO_ID = -1  # in place of an id: the vocabulary has fewer tokens than the row asks for
RANK, IDS, LOGPROBS = 0, 1, 2 + MAX_LOGPROBS  # the first column of each part of a packed row
WIDTH = LOGPROBS + 1 + MAX_LOGPROBS


@dataclass
class Logprob:
    """A token's log probability among all tokens that could have stood at its place.

    logprob: the natural logarithm of the probability that the raw logits give the token, before
        temperature, penalties and filters.
    rank: 1 for the likeliest token. Of the sampled token, and of a prompt's token, this is the
        number of tokens that are at least as likely.
    decoded_token: the token's text; None without a tokenizer.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


LogprobsOnePosition = dict[int, Logprob]  # by token id
SampleLogprobs = list[LogprobsOnePosition]  # of each output token
PromptLogprobs = list[LogprobsOnePosition | None]  # of each prompt token; None for the first
