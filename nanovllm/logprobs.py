"""Logprob: how likely the model found one token, and how the device packs this. vLLM's names."""

from dataclasses import dataclass

MAX_LOGPROBS = 20  # tokens that a request may ask for at each position; vLLM's limit

# The device packs the logprobs of one position into a row of int32 (see layers/logprobs.py).
NONE = -1  # in place of a number of logprobs, if a row wants none
NO_ID = -1  # in place of an id, if the vocabulary has fewer tokens than a row wants
RANK, IDS, LOGPROBS = 0, 1, 2 + MAX_LOGPROBS  # the first column of each part of a packed row
WIDTH = LOGPROBS + 1 + MAX_LOGPROBS


@dataclass
class Logprob:
    """A token's log probability among all tokens that could have come at its position.

    logprob: the natural logarithm of the probability that the raw logits give the token, before
        temperature, penalties and filters.
    rank: 1 for the likeliest token. The rank of the sampled token, and of a prompt's token, is the
        number of tokens that are at least as likely.
    decoded_token: the token's text, or None without a tokenizer.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


LogprobsOnePosition = dict[int, Logprob]  # by token id
SampleLogprobs = list[LogprobsOnePosition]  # one for each output token
PromptLogprobs = list[LogprobsOnePosition | None]  # one for each prompt token; None for the first
