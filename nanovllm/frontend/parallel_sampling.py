"""Parallel sampling: several answers to one prompt (`SamplingParams.n`).

The scheduler and the model runner know only sequences. A request for n answers therefore becomes
n sequences with the same prompt. The first one computes the prompt, and the prefix cache lets the
later ones share its blocks, even within one step. A ParentRequest joins the n sequences, so that
the caller sees one request.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from nanovllm.sampling_params import SamplingParams


@dataclass(eq=False)
class ParentRequest:
    """A request for several answers, under the id that the caller knows."""

    request_id: str
    children: list[Any] = field(default_factory=list)  # in the order of `Sequence.index`


class ParentRequests(dict[str, ParentRequest]):
    """The unfinished requests for several answers, by request id.

    It also knows which ids are in use, because an id must be free both as a parent's and as a
    sequence's. scheduler: the scheduler, whose `requests` are the unfinished sequences.
    """

    def __init__(self, scheduler: Any):
        super().__init__()
        self.scheduler = scheduler

    def add_parents_of(self, seqs: list[Any]) -> None:
        self.update({seq.parent.request_id: seq.parent for seq in seqs if seq.parent})

    def sequences_of(self, request_id: str) -> list[Any]:
        """Return the sequences of the request that its caller named so. Some may have ended."""
        parent, seq = self.get(request_id), self.scheduler.requests.get(request_id)
        alone = [seq] if seq is not None and seq.parent is None else []
        return [*parent.children, *alone] if parent else alone

    def is_in_use(self, request_id: str) -> bool:
        """Return whether an unfinished request or sequence has this id."""
        parent = self.get(request_id)
        return request_id in self.scheduler.requests or (
            parent is not None and self.is_unfinished(parent)
        )

    def is_unfinished(self, parent: ParentRequest) -> bool:
        found = self.scheduler.requests
        return any(found.get(seq.request_id) is seq for seq in parent.children)

    def check_ids(self, requests: list[dict[str, Any]]) -> None:
        """Raise ValueError for an id that two requests share, or that is in use already."""
        counts = Counter(name for request in requests for name in ids_of(request))
        for request in requests:
            for name in ids_of(request):
                if counts[name] > 1 or self.is_in_use(name):
                    own = request["request_id"]
                    why = "" if name == own else f": one of its answers would be {name!r}, which"
                    raise ValueError(f"request_id={own!r}{why} is already in use")

    def forget_ended(self, seqs: Iterable[Any]) -> None:
        """Forget the parents of sequences that have ended, if all their answers have ended.

        An interrupt may leave an ended parent behind. That is harmless, because an id is in use
        only while a sequence is, and it lasts only until the engine has nothing to do.
        """
        for ended in {seq.parent for seq in seqs if seq.parent and seq.is_finished}:
            parent = self.get(ended.request_id)
            if parent is not None and parent is ended and not self.is_unfinished(parent):
                del self[parent.request_id]
        if not self.scheduler.requests:
            self.clear()


def child_ids(request_id: str, n: int) -> list[str]:
    """Return the ids of a request's sequences. They are vLLM's: "0_a" is the first of "a"."""
    return [request_id] if n == 1 else [f"{index}_{request_id}" for index in range(n)]


def ids_of(request: dict[str, Any]) -> Iterator[str]:
    """Yield every id that a request takes, which are the caller's and those of its sequences."""
    request_id, n = request["request_id"], request["params"].get("n", 1)
    yield request_id
    if n != 1:
        yield from child_ids(request_id, n)


def fan_out(
    make_sequence: Callable[..., Any],
    request_id: str,
    token_ids: list[int],
    params: SamplingParams,
    make_detokenizer: Callable[[SamplingParams, list[int]], Any],
    **common: Any,
) -> list[Any]:
    """Return the sequences of one request, in order. Each has its own list of the prompt's ids.

    make_sequence: makes a Sequence of its arguments. This folder lies below the engine, so it does
    not import that class.
    make_detokenizer: called with the parameters and the prompt's ids, once for each sequence.
    common: the other arguments of Sequence, which are the same for all of them.
    """
    parent = ParentRequest(request_id) if params.n > 1 else None
    seqs = [
        make_sequence(
            name,
            token_ids=list(token_ids),
            params=params,
            index=i,
            parent=parent,
            detokenizer=make_detokenizer(params, token_ids),
            **common,
        )
        for i, name in enumerate(child_ids(request_id, params.n))
    ]
    if parent:
        parent.children = seqs
    return seqs
