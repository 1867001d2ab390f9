"""Parallel sampling: several answers to one prompt (`SamplingParams.n`).

The scheduler and the model runner know sequences alone. A request for n answers therefore becomes
n sequences with the same prompt. The first one computes the prompt, and the prefix cache lets the
later ones share its blocks, even within one step. A ParentRequest joins the n sequences, so that
the caller sees one request.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams


@dataclass(eq=False)
class ParentRequest:
    """A request for several answers, under the id that the caller knows."""

    request_id: str
    children: list[Sequence] = field(default_factory=list)  # in the order of `Sequence.index`


def sequence_ids(request_id: str, n: int) -> list[str]:
    """The request ids of a request's sequences. They are vLLM's: "0_a" is the first of "a"."""
    return [request_id] if n == 1 else [f"{index}_{request_id}" for index in range(n)]


def ids_in_use(request: dict[str, Any]) -> Iterator[str]:
    """Every id that a request takes: the caller's, and those of its sequences."""
    request_id, n = request["request_id"], request["params"].get("n", 1)
    yield request_id
    if n != 1:
        yield from sequence_ids(request_id, n)


def fan_out(
    request_id: str,
    token_ids: list[int],
    params: SamplingParams,
    make_detokenizer: Callable[[SamplingParams, list[int]], Any],
    **common: Any,
) -> list[Sequence]:
    """Make the sequences of one request, in order. Each has its own list of the prompt's ids.

    make_detokenizer: called with the parameters and the prompt's ids, once for each sequence.
    common: the other arguments of a Sequence, the same for all of them.
    """
    parent = ParentRequest(request_id) if params.n > 1 else None
    seqs = [
        Sequence(
            name,
            token_ids=list(token_ids),
            params=params,
            index=i,
            parent=parent,
            detokenizer=make_detokenizer(params, token_ids),
            **common,
        )
        for i, name in enumerate(sequence_ids(request_id, params.n))
    ]
    if parent:
        parent.children = seqs
    return seqs
