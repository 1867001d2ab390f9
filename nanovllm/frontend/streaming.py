"""Calls and streams: which requests belong to which caller, and what happens if the caller leaves.

Several threads may call `LLM.generate` and `LLM.stream` at the same time. Each step of the engine
runs the requests of all of them, whichever thread runs the step. A Call therefore collects the
sequences of its own requests that have news, and looks at them when its thread has the turn.
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from nanovllm.outputs import RequestOutput, TextPiece

Sequence = Any  # nanovllm.engine.sequence.Sequence, which is above this folder


@dataclass(eq=False)
class RequestGroup:
    """Sequences that were queued together.

    news: where the engine notes the sequences that have a new token, or have ended. None if nobody
    looks there.
    """

    seqs: list[Sequence] = field(default_factory=list)
    news: dict[Sequence, None] | None = None


class CallReference(weakref.ref):
    """A weak reference to a call that outlives the call and still knows its sequences."""

    __slots__ = ("seqs",)
    seqs: list[Sequence]


class AbandonedRequests:
    """The sequences that nobody waits for any more. The engine's next command aborts them.

    Python's collector may drop a call at any moment, also in the middle of a step. It then only
    appends a reference to a deque, and runs no other code.
    """

    def __init__(self) -> None:
        self.groups: deque[RequestGroup | CallReference] = deque()
        self._watched: set[Any] = set()  # keeps the references alive, but not the calls

    def watch(self, call: "Call") -> None:
        """Abandon the sequences of a call once the call has no references left."""
        reference = CallReference(call, self.groups.append)
        reference.seqs = call.seqs
        self._watched.add(reference)

    def add(self, seqs: list[Sequence]) -> None:
        self.groups.append(RequestGroup(seqs))

    @property
    def seqs(self) -> list[Sequence]:
        return [seq for group in list(self.groups) for seq in group.seqs]

    def remove_first(self, num_groups: int) -> None:
        """Forget groups whose sequences have been aborted."""
        for _ in range(num_groups):
            self._watched.discard(self.groups[0])
            self.groups.popleft()


class Call:
    """The requests of one call. Any thread's step may run them, and they end with the call.

    Closing a call aborts its unfinished requests. If a call is dropped, they are aborted at the
    start of the engine's next step. engine: an LLMEngine.
    """

    def __init__(self, engine: Any):
        self.engine = engine
        self.seqs: list[Sequence] = []  # in the order of the prompts, `n` for each of them
        self.news: dict[Sequence, None] = {}  # those that `advance` must look at
        self.unfinished: set[Sequence] = set()  # those that `advance` has not yet seen to end
        engine.abandoned.watch(self)

    def add(self, requests: list[dict[str, Any]]) -> None:
        """Queue checked requests. Each gets as its id the number that it has among all requests."""
        with self.engine.turns.take():
            numbers = count(self.engine.num_requests)
            for request in requests:
                request["request_id"] = str(next(numbers))
                while not self.engine.is_free(request):
                    request["request_id"] = str(next(numbers))
            self.unfinished.update(self.engine.add(requests, self))

    def advance(self) -> list[Sequence]:
        """Return the sequences with news. Run a step first, unless other threads' steps left some.

        Raises RuntimeError if the engine is closed, or if its scheduler has lost the requests.
        """
        with self.engine.turns.take():
            if not self.news:
                self.engine.advance()
            if not self.news:
                self._check_more_can_come()
            news = list(self.news)
            self.news.clear()
            self.read(news)
            self.unfinished.difference_update(seq for seq in news if seq.is_finished)
        return news

    def _check_more_can_come(self) -> None:
        self.engine.check_open()
        if not self.engine.core.has_work:
            raise RuntimeError(
                f"{len(self.unfinished)} requests of this call are unfinished, but the engine has "
                f"nothing left to run: its scheduler has lost them"
            )

    def read(self, seqs: list[Sequence]) -> None:
        """Look at sequences with news before another thread can run the next step."""

    def make_outputs(self) -> list[RequestOutput]:
        """Return one output for each prompt, in order, with all its answers."""
        return [RequestOutput.of(seq) for seq in self.seqs if seq.index == 0]

    def close(self) -> None:
        self.engine.abort(self.seqs)


class TextStream(Call, Iterator[TextPiece]):
    """What `LLM.stream` returns: yields TextPieces, which unpack as (prompt's index, new text).

    Where a prompt has several answers, a piece's `output_index` says which of them it continues.
    The texts of one step come in the order of the prompts, and those of one prompt in the order of
    its answers. Closing the stream aborts what has not finished. Dropping the last reference to
    the stream does the same at the start of the next step.

    llm: the LLM. The stream keeps a reference, because an LLM that is dropped closes its engine.
    """

    def __init__(self, llm: Any):
        super().__init__(llm.llm_engine)
        self._llm = llm
        self._pieces: deque[TextPiece] = deque()
        self._num_sent: dict[Sequence, int] = {}  # characters of its text that are in pieces
        self._prompt_index: dict[Sequence, int] = {}

    def add(self, requests: list[dict[str, Any]]) -> None:
        super().add(requests)
        firsts = [seq for seq in self.seqs if seq.index == 0]
        self._prompt_index = {seq: i for i, first in enumerate(firsts) for seq in first.siblings}

    def read(self, seqs: list[Sequence]) -> None:
        seqs = sorted(seqs, key=lambda seq: (self._prompt_index[seq], seq.index))
        for seq, text in zip(seqs, read_texts(seqs, certain_text), strict=True):
            if new := text[self._num_sent.get(seq, 0) :]:
                self._pieces.append(TextPiece(self._prompt_index[seq], new, seq.index))
                self._num_sent[seq] = len(text)

    def __next__(self) -> TextPiece:
        try:
            while self.unfinished and not self._pieces:
                self.advance()
        except BaseException:
            self.close()
            raise
        if not self._pieces:
            raise StopIteration
        return self._pieces.popleft()

    @property
    def outputs(self) -> list[RequestOutput] | None:
        """One output for each prompt, in order, once all have ended. Until then it is None."""
        return self.make_outputs() if all(seq.is_finished for seq in self.seqs) else None

    def close(self) -> None:
        self.unfinished.clear()
        self._pieces.clear()
        super().close()


def certain_text(seq: Sequence) -> str:
    """Return the text that later tokens cannot change."""
    return seq.detokenizer.text if seq.detokenizer else ""


def read_texts(seqs: list[Sequence], read: Callable[[Sequence], Any]) -> list[Any]:
    """Return read(seq) of each sequence.

    If reading is interrupted, the texts of all answers to these prompts are made anew, because an
    interrupt may have left a half-written text.
    """
    try:
        return [read(seq) for seq in seqs]
    except BaseException:
        for seq in seqs:
            for sibling in seq.siblings:
                sibling.rebuild_text()
        raise
