"""Scheduler: decides which sequences run in the next step, and with how many tokens.

The scheduler is plain Python and knows no phases. A step has a budget of tokens. The running
sequences come first, and each of them gets one token, or the rest of a prompt that did not fit in
an earlier step. Waiting sequences are then admitted, the oldest first, while budget, rows and
blocks last. The last one of them may get only a part of its prompt, and later steps compute the
rest. Prefill and decode therefore meet in one batch, and decode never waits.

A sequence is admitted if there are blocks for all its tokens, and if one more block stays free for
each running sequence that can still grow. If a running sequence cannot grow all the same, the
youngest one is preempted: it gives up its blocks and returns to the head of the queue, to be
computed again. Its blocks stay in the prefix cache until they are needed, so often little is lost.

No step does work that grows with the number of waiting sequences. The scheduler does not even look
at the head of the queue again before something has changed that could let it in.
"""

import time
from dataclasses import dataclass

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.engine.waiting_queue import WaitingQueue


@dataclass(frozen=True)
class ScheduledSequence:
    """One row of a batch: the step computes the tokens [start, start + num_tokens) of `seq`."""

    seq: Sequence
    start: int
    num_tokens: int
    samples: bool  # the row computes the sequence's newest token, so the next one is sampled
    admitted: bool = False  # the first row of the sequence since it left the queue

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def decodes(self) -> bool:
        """True if the row computes only the newest token, and earlier steps computed the rest."""
        return self.num_tokens == 1 and self.samples and not self.admitted


Batch = list[ScheduledSequence]  # the rows of one step; the decode rows come first


@dataclass(frozen=True)
class FailedAdmission:
    """Why the head of the queue could not be admitted when the scheduler last looked at it."""

    seq: Sequence
    num_cached_blocks: int  # blocks of its prompt that the prefix cache held
    num_tokens: int = 0  # the budget that it needs (without chunked prefill)
    num_blocks: int = 0  # the spare blocks that it needs


class Scheduler:
    """Plans steps over one BlockManager.

    The same calls give the same plans on every rank, so no clock may steer the scheduler.
    """

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
        self.requests: dict[str, Sequence] = {}  # the unfinished ones, in order of arrival
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []  # in order of admission
        self.failed_admission: FailedAdmission | None = None

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence. No other unfinished sequence may have its request_id."""
        self.requests[seq.request_id] = seq
        self.waiting.append(seq)

    # -- planning a step -------------------------------------------------------------------------

    def schedule(self) -> Batch:
        """Plan the next step. An empty batch means that the step in flight must end first."""
        batch: Batch = []
        budget = self.schedule_running(batch, self.max_num_batched_tokens)
        self.schedule_waiting(batch, budget)
        return sorted(batch, key=lambda row: not row.decodes)

    def schedule_running(self, batch: Batch, budget: int) -> int:
        """Append rows of the running sequences, oldest first. Return the budget that is left."""
        for seq in list(self.running):
            num_tokens = min(seq.num_unscheduled, budget)
            if num_tokens == 0 or seq.status is not SequenceStatus.RUNNING:
                continue
            if not self.allocate_or_preempt(seq, seq.num_scheduled + num_tokens):
                break
            batch.append(self.schedule_tokens(seq, num_tokens))
            budget -= num_tokens
        return budget

    def schedule_waiting(self, batch: Batch, budget: int) -> None:
        """Admit waiting sequences while budget, rows and blocks last, and append their rows."""
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            seq = self.waiting[0]
            if self.would_fail_again(seq, budget):
                break
            cached_block_ids = self.block_manager.find_cached_blocks(seq)
            # The logits of the last token are needed, so at least this token is computed.
            num_cached = len(cached_block_ids) * self.block_manager.block_size
            num_computed = min(num_cached, len(seq.token_ids) - 1)
            num_missing = len(seq.token_ids) - num_computed
            if num_missing > budget and not self.enable_chunked_prefill:
                self.failed_admission = FailedAdmission(seq, len(cached_block_ids), num_missing)
                break
            if not self.can_admit(seq, cached_block_ids):
                break
            self.waiting.popleft()
            self.admit(seq, cached_block_ids, num_computed)
            num_tokens = min(num_missing, budget)
            batch.append(self.schedule_tokens(seq, num_tokens, admitted=True))
            budget -= num_tokens

    def schedule_tokens(
        self, seq: Sequence, num_tokens: int, admitted: bool = False
    ) -> ScheduledSequence:
        """Schedule the next `num_tokens` tokens of a sequence, and return their row."""
        start = seq.num_scheduled
        seq.num_scheduled += num_tokens
        self.block_manager.cache_full_blocks(seq)
        samples = seq.num_scheduled >= len(seq.token_ids)
        return ScheduledSequence(seq, start, num_tokens, samples, admitted)

    # -- growing and preempting ------------------------------------------------------------------

    def allocate_or_preempt(self, seq: Sequence, num_tokens: int) -> bool:
        """Let `seq` grow to `num_tokens` tokens, and preempt the youngest sequences until it can.

        Return False if `seq` itself was preempted, or if the youngest has a token in flight. The
        caller must then plan nothing for younger sequences, so that none of them has a token in
        flight when the next step is planned.
        """
        manager = self.block_manager
        while manager.num_new_blocks(seq, num_tokens) > manager.num_free_blocks:
            youngest = self.running[-1]
            if youngest.in_flight:
                return False
            self.preempt(youngest)
            if youngest is seq:
                return False
        manager.allocate(seq, num_tokens)
        return True

    def preempt(self, seq: Sequence) -> None:
        """Free a running sequence's blocks, and put it back at the head of the queue."""
        seq.metrics.num_preempted_tokens += seq.num_computed
        self.running.remove(seq)
        self.block_manager.free(seq)
        seq.num_computed = seq.num_scheduled = seq.num_cached_tokens = 0
        seq.status = SequenceStatus.WAITING
        self.waiting.appendleft(seq)

    # -- admitting -------------------------------------------------------------------------------

    def can_admit(self, seq: Sequence, cached_block_ids: list[int]) -> bool:
        """Return whether the blocks suffice for all tokens of `seq`, and for the running sequences.

        A block must stay free for each running sequence that can still grow.
        """
        manager = self.block_manager
        num_new = manager.num_new_blocks(seq, len(seq.token_ids)) - len(cached_block_ids)
        num_free = manager.num_free_blocks
        num_revived = num_free - manager.num_free_after_touch(cached_block_ids)
        num_blocks = num_new + num_revived
        # If a block is left for every running sequence, nobody needs to count which ones can grow.
        fits = num_blocks <= num_free - len(self.running) or num_blocks <= self.num_spare_blocks()
        if not fits:
            self.failed_admission = FailedAdmission(
                seq, len(cached_block_ids), num_blocks=num_blocks
            )
        return fits

    def num_spare_blocks(self) -> int:
        """Count the free blocks beyond one for each running sequence that can still grow.

        A sequence's last token is never computed, so its table grows to max_length - 1 tokens.
        """
        size = self.block_manager.block_size
        growing = sum(len(s.block_table) * size < s.max_length - 1 for s in self.running)
        return self.block_manager.num_free_blocks - growing

    def would_fail_again(self, seq: Sequence, budget: int) -> bool:
        """Return whether nothing has changed since the head of the queue could not be admitted.

        It may be admitted when there is more budget, when there are more spare blocks, or when the
        prefix cache has gained the block at which the last match ended. Matching it again takes
        time that grows with its prompt, and it may have to wait for thousands of steps.
        """
        failed = self.failed_admission
        if failed is None or failed.seq is not seq:
            return False
        if self.block_manager.is_block_cached(seq, failed.num_cached_blocks):
            return False
        return budget < failed.num_tokens or self.num_spare_blocks() < failed.num_blocks

    def admit(self, seq: Sequence, cached_block_ids: list[int], num_computed: int) -> None:
        """Let a sequence run: give it its blocks, of which the first ones are cached.

        num_computed: tokens at its beginning that need not be computed.
        """
        self.failed_admission = None
        if not seq.metrics.scheduled_ts:
            seq.metrics.scheduled_ts = time.monotonic()
            seq.metrics.num_cached_tokens = num_computed
        self.block_manager.touch(seq, cached_block_ids)
        self.block_manager.allocate(seq, len(seq.token_ids))
        seq.num_cached_tokens = len(cached_block_ids) * self.block_manager.block_size
        seq.num_computed = seq.num_scheduled = num_computed
        seq.num_admissions += 1
        seq.status = SequenceStatus.RUNNING
        self.running.append(seq)

    # -- after the step --------------------------------------------------------------------------

    def update(self, batch: Batch, token_ids: list[int | None]) -> list[Sequence]:
        """Give a finished step's tokens to its sequences, and remove the ones that have ended.

        token_ids: one id for each row that samples, in order. None means that no token could be
        chosen. The row's sequence then ends with an error, and the blocks that it computed are
        evicted.

        Returns the sequences that got a token or ended. If a sequence has ended while its next
        token was in flight, the extra token is dropped.
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
                    self.block_manager.evict_uncomputed(seq, seq.num_cached_tokens)
                updated.append(seq)
            if seq.is_finished:
                self.remove_finished(seq)
        return updated

    def remove_finished(self, seq: Sequence) -> None:
        """Remove a finished sequence, and free its blocks unless a step still writes to them.

        If a token is in flight, the update of that step calls this again and frees the blocks.
        """
        if self.requests.get(seq.request_id) is seq:
            del self.requests[seq.request_id]
        if seq in self.running:
            self.running.remove(seq)
        if not seq.in_flight:
            self.block_manager.free(seq)

    def abort(self, seq: Sequence) -> None:
        """End a sequence before its time, whether it waits or runs."""
        if seq.is_finished:
            return
        if seq.status is SequenceStatus.WAITING:
            self.waiting.remove(seq)
        seq.finish("abort")
        self.remove_finished(seq)

    def roll_back(self, batches: list[Batch]) -> None:
        """Undo the steps of `batches`, which failed, and every other change that was interrupted.

        An interrupt can come between any two lines of this class, when a sequence is in no queue
        or a block in no table. We therefore repair nothing. We build the queues and the blocks anew
        from the unfinished sequences, in order of arrival, and from the sequences that finished
        while a step was in flight. Blocks whose keys and values were never written are evicted
        first. It is harmless to call this again.
        """
        in_flight = [row.seq for batch in batches for row in batch]
        seqs = list(dict.fromkeys([*self.requests.values(), *in_flight]))
        for seq in seqs:
            self.block_manager.evict_uncomputed(seq, seq.num_computed)
        self.block_manager.rebuild(seqs)
        self.running, self.waiting, self.failed_admission = [], WaitingQueue(), None
        for seq in seqs:
            seq.restart()
            if not seq.is_finished:
                self.waiting.append(seq)
            elif self.requests.get(seq.request_id) is seq:
                del self.requests[seq.request_id]
