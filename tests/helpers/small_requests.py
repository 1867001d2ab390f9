"""The short greedy requests that tests of the engine send, and how they read the answers."""

from collections.abc import Sequence

from nanovllm import RequestOutput, SamplingParams

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8] * 5, [9]]


def greedy(max_tokens: int | None = 12, **others) -> SamplingParams:
    """Return the parameters of a greedy request that only its length ends.

    others: more arguments of SamplingParams, which take the place of these.
    """
    params = {"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True}
    return SamplingParams(**params | others)


def ids(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    """Return the token ids of each request's first completion."""
    return [output.outputs[0].token_ids for output in outputs]
