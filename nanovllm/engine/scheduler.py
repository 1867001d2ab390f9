"""Scheduler: who runs in the next step, and with how many tokens. Pure Python.

One loop, no phases. A step has a budget of tokens. Sequences already running come first, one token
each (or the rest of a prompt that did not fit before); then waiting ones are admitted, oldest
first, while budget, rows and blocks last. The last of them may get only a part of its prompt: the
rest follows in later steps. Prefill and decode meet in one batch, and decode never waits.

A sequence is admitted with blocks for all tokens it has, and one more block left free for each
running sequence that can still grow. A sequence whose table already holds all tokens that it may
ever have sets nothing aside. If one cannot grow all the same, the youngest is preempted: it gives
up its blocks and returns to the head of the queue, to be computed again. (Its blocks stay in the
prefix cache until somebody needs them, so often little is lost.)

Nothing in a step grows with the number of sequences that wait. The head of the queue is not even
looked at again while nothing has changed that could let it in.
"""

import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence, Status


@dataclass(frozen=True)
class ScheduledSequence:
    """One row of a batch: tokens [start, start + num_tokens) of `seq`."""

    seq: Sequence
    start: int
    num_tokens: int
    samples: bool  # the row computes its newest token, so a next one is sampled
    admitted: bool = False  # its first row since it was taken from the queue

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def decodes(self) -> bool:
        """A single token, its newest, after others were computed since its admission."""
        return self.num_tokens == 1 and self.samples and not self.admitted


Batch = list[ScheduledSequence]  # one step's rows; those that decode stand first


class WaitingQueue:
    """The sequences that wait, the next one first.

    It is used like a deque. Unlike in a deque, any sequence can leave in O(1), because a user may
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
        """The sequence at `index` (0 or more). Only the head is found in O(1)."""
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
        """Take a sequence out, if it is there."""
        self._seqs.pop(seq, None)


@dataclass(frozen=True)
class Blocked:
    """Why the head of the queue could not be admitted when it was last looked at."""

    seq: Sequence
    num_hits: int  # blocks that the prefix cache held
    num_tokens: int = 0  # budget that it needs (without chunked prefill)
    num_blocks: int = 0  # free blocks that it needs, beyond those that are set aside


class Scheduler:
    """Plans steps over one BlockManager. The same calls give the same plans: no clock steers it."""

    def __init__(
        self,
        block_manager: BlockManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_chunked_prefill: bool = True,
    ):
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.enable_chunked_prefill = enable_chunked_prefill
        self.requests: dict[str, Sequence] = {}  # unfinished, in order of arrival
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []  # in order of admission
        self._blocked: Blocked | None = None

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence. No other unfinished sequence may have its request_id."""
        self.requests[seq.request_id] = seq
        self.waiting.append(seq)

    # -- planning --------------------------------------------------------------------------------

    def schedule(self) -> Batch:
        """Plan the next step. An empty batch means: wait for the step in flight."""
        batch: Batch = []
        budget = self._schedule_running(batch, self.max_num_batched_tokens)
        self._admit_waiting(batch, budget)
        return sorted(batch, key=lambda row: not row.decodes)

    def _schedule_running(self, batch: Batch, budget: int) -> int:
        """Plan the running sequences, oldest first; returns the budget that is left."""
        for seq in list(self.running):
            num_tokens = min(seq.num_unscheduled, budget)
            if num_tokens == 0 or seq.status is not Status.RUNNING:
                continue
            if not self._make_room(seq, seq.num_scheduled + num_tokens):
                break
            batch.append(self._plan(seq, num_tokens))
            budget -= num_tokens
        return budget

    def _make_room(self, seq: Sequence, num_tokens: int) -> bool:
        """Let `seq` grow to `num_tokens` tokens, preempting the youngest until it can.

        False if it had to go itself, or if the one to go has a token in flight: younger sequences
        then get nothing either, so nothing of theirs is in flight when the next step is planned.
        """
        while (
            self.block_manager.num_new_blocks(seq, num_tokens) > self.block_manager.num_free_blocks
        ):
            youngest = self.running[-1]
            if youngest.in_flight:
                return False
            self._preempt(youngest)
            if youngest is seq:
                return False
        self.block_manager.allocate(seq, num_tokens)
        return True

    def _admit_waiting(self, batch: Batch, budget: int) -> None:
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            seq = self.waiting[0]
            if self._is_still_blocked(seq, budget):
                break
            hits = self.block_manager.find_cached_blocks(seq)
            # A token is always computed, since its logits are needed: at least the last one.
            num_cached = min(len(hits) * self.block_manager.block_size, len(seq.token_ids) - 1)
            num_tokens = min(len(seq.token_ids) - num_cached, budget)
            whole = num_cached + num_tokens == len(seq.token_ids)
            if not whole and not self.enable_chunked_prefill:
                self._blocked = Blocked(seq, len(hits), len(seq.token_ids) - num_cached)
                break
            if not self._fits(seq, hits):
                break
            self.waiting.popleft()
            self._admit(seq, hits, num_cached)
            batch.append(self._plan(seq, num_tokens, admitted=True))
            budget -= num_tokens

    def _fits(self, seq: Sequence, hits: list[int]) -> bool:
        """Whether all the sequence's tokens fit, with a block left for each one that can grow."""
        num_new = self.block_manager.num_new_blocks(seq, len(seq.token_ids)) - len(hits)
        num_free = self.block_manager.num_free_blocks
        num_revived = num_free - self.block_manager.num_free_after_touch(hits)
        num_blocks = num_new + num_revived
        fits = num_blocks <= num_free - len(self.running) or num_blocks <= self._num_spare_blocks()
        if not fits:
            self._blocked = Blocked(seq, len(hits), num_blocks=num_blocks)
        return fits

    def _num_spare_blocks(self) -> int:
        """Free blocks beyond one for each running sequence that can still grow.

        A sequence's last token is never computed, so its table grows to max_length - 1 tokens.
        """
        size = self.block_manager.block_size
        growing = sum(len(s.block_table) * size < s.max_length - 1 for s in self.running)
        return self.block_manager.num_free_blocks - growing

    def _is_still_blocked(self, seq: Sequence, budget: int) -> bool:
        """Whether nothing has changed that could let the head of the queue in.

        It may come in when there is more budget, when there are more spare blocks, or when the
        prefix cache has gained the block at which the last match ended. To match it again takes
        time that grows with its prompt, and it may have to wait for thousands of steps.
        """
        last = self._blocked
        if last is None or last.seq is not seq:
            return False
        if self.block_manager.is_block_cached(seq, last.num_hits):
            return False
        return budget < last.num_tokens or self._num_spare_blocks() < last.num_blocks

    def _admit(self, seq: Sequence, hits: list[int], num_cached: int) -> None:
        self._blocked = None
        if not seq.metrics.scheduled_ts:
            seq.metrics.scheduled_ts = time.monotonic()
            seq.metrics.num_cached_tokens = num_cached
        self.block_manager.touch(seq, hits)
        self.block_manager.allocate(seq, len(seq.token_ids))
        seq.num_cached = len(hits) * self.block_manager.block_size
        seq.num_computed = seq.num_scheduled = num_cached
        seq.num_admissions += 1
        seq.status = Status.RUNNING
        self.running.append(seq)

    def _plan(self, seq: Sequence, num_tokens: int, admitted: bool = False) -> ScheduledSequence:
        start = seq.num_scheduled
        seq.num_scheduled += num_tokens
        self.block_manager.cache_full_blocks(seq)
        samples = seq.num_scheduled >= len(seq.token_ids)
        return ScheduledSequence(seq, start, num_tokens, samples, admitted)

    def _preempt(self, seq: Sequence) -> None:
        seq.metrics.num_preempted_tokens += seq.num_computed
        self._return_to_queue(seq)

    def _return_to_queue(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.block_manager.free(seq)
        seq.num_computed = seq.num_scheduled = seq.num_cached = 0
        seq.status = Status.WAITING
        self.waiting.appendleft(seq)

    # -- after the step --------------------------------------------------------------------------

    def update(self, batch: Batch, token_ids: list[int | None]) -> list[Sequence]:
        """Take in a finished step; `token_ids` holds one id for each row that samples, in order.

        None in place of an id: the row's logits were not finite. Its sequence ends with an error,
        and the blocks that it computed leave the prefix cache.

        Returns the sequences that got a token or ended. One that finished while its next token was
        in flight keeps its blocks until that step, too, is taken in; the extra token is dropped.
        """
        sampled = iter(token_ids)
        updated = []
        for row in batch:
            seq = row.seq
            seq.num_computed += row.num_tokens
            token_id = next(sampled) if row.samples else None
            if row.samples and not seq.is_finished:
                seq.append(token_id)
                if seq.error is None:
                    self.block_manager.cache_full_blocks(seq)
                else:
                    self.block_manager.evict_uncomputed(seq, seq.num_cached)
                updated.append(seq)
            if seq.is_finished:
                self._retire(seq)
        return updated

    def _retire(self, seq: Sequence) -> None:
        if self.requests.get(seq.request_id) is seq:
            del self.requests[seq.request_id]
        if seq in self.running:
            self.running.remove(seq)
        if not seq.in_flight:
            self.block_manager.free(seq)

    def abort(self, seq: Sequence) -> None:
        """End a sequence before its time, wherever it stands."""
        if seq.is_finished:
            return
        if seq.status is Status.WAITING:
            self.waiting.remove(seq)
        seq.finish("abort")
        self._retire(seq)

    def roll_back(self, batches: list[Batch]) -> None:
        """Undo the steps of `batches`, which failed, and whatever else was begun and not finished.

        An interrupt may have come at any point, also between two lines of this class, when a
        sequence was in no queue or a block in no table. Therefore nothing is repaired. The queues
        and the blocks are built anew from the unfinished sequences, in order of arrival, and from
        those that finished while a step was in flight. What the prefix cache promises for keys
        and values that were never written is taken out first. Calling this again is harmless.
        """
        in_flight = [row.seq for batch in batches for row in batch]
        seqs = list(dict.fromkeys([*self.requests.values(), *in_flight]))
        for seq in seqs:
            self.block_manager.evict_uncomputed(seq, seq.num_computed)
        self.block_manager.rebuild(seqs)
        self.running, self.waiting, self._blocked = [], WaitingQueue(), None
        for seq in seqs:
            seq.restart()
            if not seq.is_finished:
                self.waiting.append(seq)
            elif self.requests.get(seq.request_id) is seq:
                del self.requests[seq.request_id]
