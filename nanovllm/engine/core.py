"""EngineCore: schedules, launches and completes steps on one rank, in one of two loops.

The plain loop completes a step before it schedules the next one. The overlapped loop schedules and
launches step N+1 while step N is still running, and only then reads N's tokens, so that the device
never waits for the host.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from nanovllm.engine.logprobs import LogprobsProcessor
from nanovllm.engine.model_runner import AsyncModelRunnerOutput, ModelRunner
from nanovllm.engine.scheduler import Batch, Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import StepRecord

TRACE_LENGTH = 20_000  # steps; their records take half a gigabyte if each has 256 rows


@dataclass
class StepInFlight:
    """A step that has been launched, and whose tokens have not been read."""

    batch: Batch
    record: StepRecord
    tokens: AsyncModelRunnerOutput


class EngineCore:
    """Runs the scheduler and the model runner, one step at a time.

    async_scheduling: choose the overlapped loop, not the plain one.
    """

    def __init__(self, scheduler: Scheduler, runner: ModelRunner, async_scheduling: bool = True):
        self.scheduler = scheduler
        self.runner = runner
        self.async_scheduling = async_scheduling
        self.in_flight: deque[StepInFlight] = deque()  # the oldest first
        self.logprobs = LogprobsProcessor()
        self.trace: deque[StepRecord] = deque(maxlen=TRACE_LENGTH)
        self._changing = False  # True from the beginning of a change until it is done or undone

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self.in_flight)

    @contextmanager
    def _change(self) -> Iterator[None]:
        """Undo every change that the caller's block makes to the sequences, if the block fails.

        An interrupt (Ctrl-C) can come between any two instructions, and a second one while the
        first is being handled. The next change therefore first undoes what is left of the last.
        """
        if self._changing:
            self.roll_back()
        self._changing = True
        try:
            yield
        except BaseException:
            self.roll_back()
            raise
        self._changing = False

    def roll_back(self) -> None:
        """Drop the steps in flight. Their sequences wait to be run again, or to be aborted."""
        self.scheduler.roll_back([step.batch for step in self.in_flight])
        self.in_flight.clear()
        self._changing = False

    def add(self, seqs: list[Sequence]) -> None:
        """Queue sequences: all of them or none."""
        with self._change():
            for seq in seqs:
                self.scheduler.add(seq)

    def step(self) -> list[Sequence]:
        """Advance by one step. Return the sequences that got a token or ended.

        A step that fails is undone before its error is raised. The same sequences then wait to be
        run again, or to be aborted.
        """
        if not self.has_work:
            return []
        with self._change():
            updated = self.overlapped_step() if self.async_scheduling else self.plain_step()
            return updated if self.scheduler.has_work else updated + self.drain()

    def plain_step(self) -> list[Sequence]:
        """Schedule, launch and complete one step."""
        self.launch(self.scheduler.schedule())
        return self.complete_step()

    def overlapped_step(self) -> list[Sequence]:
        """Launch the next step, and then complete the previous one, if there is one."""
        had_one = bool(self.in_flight)
        self.launch(self.scheduler.schedule())  # step N+1 is launched ...
        return self.complete_step() if had_one else []  # ... before step N's tokens are read

    def drain(self) -> list[Sequence]:
        """Complete every step in flight."""
        updated = []
        while self.in_flight:
            updated += self.complete_step()
        return updated

    def abort(self, seqs: list[Sequence]) -> None:
        """End sequences before their time, wherever they stand."""
        with self._change():
            for seq in seqs:
                self.scheduler.abort(seq)
            if not self.scheduler.has_work:
                self.drain()

    def launch(self, batch: Batch) -> None:
        """Launch a step, and record what the scheduler decided. An empty batch launches nothing.

        Raises RuntimeError for an empty batch if no step in flight could change that.
        """
        if batch:
            record = StepRecord(
                start_time=time.monotonic(),
                rows=tuple((r.seq.request_id, r.start, r.num_tokens) for r in batch),
                num_running=len(self.scheduler.running),
                num_waiting=len(self.scheduler.waiting),
                num_free_blocks=self.scheduler.block_manager.num_free_blocks,
            )
            self.in_flight.append(StepInFlight(batch, record, self.runner.launch(batch)))
        elif self.scheduler.has_work and not self.in_flight:
            raise RuntimeError(self._explain_stuck())

    def _explain_stuck(self) -> str:
        scheduler, manager = self.scheduler, self.scheduler.block_manager
        return (
            f"{len(scheduler.requests)} requests are unfinished, but nothing can run: "
            f"{len(scheduler.waiting)} wait, {len(scheduler.running)} run, no step is in flight, "
            f"and {manager.num_free_blocks} of {manager.num_blocks} blocks are free. A scheduler "
            f"must keep every unfinished sequence in `waiting` or `running`, and give back its "
            f"blocks when it ends"
        )

    def complete_step(self) -> list[Sequence]:
        """Read the tokens of the oldest step in flight, and hand them to the scheduler.

        Returns the sequences that got a token or ended.
        """
        if not self.in_flight:
            return []
        step = self.in_flight[0]
        token_ids = step.tokens.read()
        step.record.end_time = time.monotonic()
        self.logprobs.update(step.batch, step.tokens)  # before the ids that they belong to
        updated = self.scheduler.update(step.batch, token_ids)
        self.in_flight.popleft()  # not before: an update that fails is rolled back as well
        self.trace.append(step.record)
        return updated
