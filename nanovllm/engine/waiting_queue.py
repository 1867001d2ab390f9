"""WaitingQueue: the sequences that wait to be admitted."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import islice

from nanovllm.engine.sequence import Sequence


class WaitingQueue:
    """A queue of sequences, of which the first one is admitted next.

    It has a deque's methods. Unlike a deque it removes any sequence in O(1), because a user may
    abort a request in the middle of a queue of 100,000.
    """

    def __init__(self, seqs: Iterable[Sequence] = ()):
        self._seqs: OrderedDict[Sequence, None] = OrderedDict.fromkeys(seqs)

    def __len__(self) -> int:
        return len(self._seqs)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._seqs)

    def __contains__(self, seq: object) -> bool:
        return seq in self._seqs

    def __getitem__(self, index: int) -> Sequence:
        """Return the sequence at `index` (0 or more). Only the head is found in O(1).

        Raises IndexError if fewer sequences wait.
        """
        for seq in islice(self._seqs, index, None):
            return seq
        raise IndexError(f"{len(self)} sequences wait, so there is none at {index}")

    def append(self, seq: Sequence) -> None:
        self._seqs[seq] = None

    def appendleft(self, seq: Sequence) -> None:
        self._seqs[seq] = None
        self._seqs.move_to_end(seq, last=False)

    def popleft(self) -> Sequence:
        return self._seqs.popitem(last=False)[0]

    def pop(self) -> Sequence:
        return self._seqs.popitem()[0]

    def remove(self, seq: Sequence) -> None:
        """Remove a sequence, if it is in the queue."""
        self._seqs.pop(seq, None)
