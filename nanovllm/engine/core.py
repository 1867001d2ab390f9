"""The loop that plans, runs and takes in steps, on one rank, twice.

The plain loop runs a step to its end before it plans the next. The overlapped loop plans and
launches step N+1 while N is still running, so that the device never waits for the host; only then
does it read N's tokens.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from nanovllm.engine.logprobs import LogprobsProcessor
from nanovllm.engine.model_runner import ModelRunner, PendingTokens
from nanovllm.engine.scheduler import Batch, Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import StepRecord

TRACE_LENGTH = 20_000  # steps remembered: half a gigabyte, at 256 rows each


@dataclass
class LaunchedStep:
    batch: Batch
    record: StepRecord
    tokens: PendingTokens | None = None  # None: the launch has not succeeded


class EngineCore:
    """The loop: scheduler and model runner, a step at a time."""

    def __init__(self, scheduler: Scheduler, runner: ModelRunner, async_scheduling: bool = True):
        self.scheduler = scheduler
        self.runner = runner
        self.async_scheduling = async_scheduling
        self.launched: deque[LaunchedStep] = deque()  # planned, tokens not yet read
        self.logprobs = LogprobsProcessor()
        self.trace: deque[StepRecord] = deque(maxlen=TRACE_LENGTH)
        self._changing = False  # True from the beginning of a change until it is done or undone

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self.launched)

    @contextmanager
    def _change(self) -> Iterator[None]:
        """Undo every change to the sequences within this context if the context fails.

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
        """Drop the launched steps. All sequences that ran wait to be run again, or aborted."""
        self.scheduler.roll_back([step.batch for step in self.launched])
        self.launched.clear()
        self._changing = False

    def add(self, seqs: list[Sequence]) -> None:
        with self._change():
            for seq in seqs:
                self.scheduler.add(seq)

    def step(self) -> list[Sequence]:
        """Advance by one step; the sequences that got a token. A failed step is undone, and raises.

        After a failure nothing is lost: the same sequences wait to be run again, or aborted.
        """
        with self._change():
            updated = self.overlapped_step() if self.async_scheduling else self.plain_step()
            return updated if self.scheduler.has_work else updated + self.drain()

    def plain_step(self) -> list[Sequence]:
        self._launch(self.scheduler.schedule())
        return self._take_in()

    def overlapped_step(self) -> list[Sequence]:
        had_one = bool(self.launched)
        self._launch(self.scheduler.schedule())  # step N+1 is launched ...
        return self._take_in() if had_one else []  # ... before step N's tokens are read

    def drain(self) -> list[Sequence]:
        """Take in every launched step."""
        updated = []
        while self.launched:
            updated += self._take_in()
        return updated

    def abort(self, seqs: list[Sequence]) -> None:
        with self._change():
            for seq in seqs:
                self.scheduler.abort(seq)
            if not self.scheduler.has_work:
                self.drain()

    def _launch(self, batch: Batch) -> None:
        if batch:
            record = StepRecord(
                start_time=time.monotonic(),
                rows=tuple((r.seq.request_id, r.start, r.num_tokens) for r in batch),
                num_running=len(self.scheduler.running),
                num_waiting=len(self.scheduler.waiting),
                num_free_blocks=self.scheduler.block_manager.num_free_blocks,
            )
            self.launched.append(LaunchedStep(batch, record))
            self.launched[-1].tokens = self.runner.launch(batch)
        elif self.scheduler.has_work and not self.launched:
            raise RuntimeError(self._why_stuck())

    def _why_stuck(self) -> str:
        scheduler, manager = self.scheduler, self.scheduler.block_manager
        return (
            f"{len(scheduler.requests)} requests are unfinished, but nothing can run: "
            f"{len(scheduler.waiting)} wait, {len(scheduler.running)} run, no step is in flight, "
            f"and {manager.num_free_blocks} of {manager.num_blocks} blocks are free. A scheduler "
            f"must keep every unfinished sequence in `waiting` or `running`, and give back its "
            f"blocks when it ends"
        )

    def _take_in(self) -> list[Sequence]:
        """Read the oldest launched step's tokens and hand them to the scheduler."""
        if not self.launched:
            return []
        step = self.launched[0]
        token_ids = step.tokens.read()
        step.record.end_time = time.monotonic()
        self.logprobs.update(step.batch, step.tokens)  # before the ids that they belong to
        updated = self.scheduler.update(step.batch, token_ids)
        self.launched.popleft()  # not before: an update that fails is rolled back as well
        self.trace.append(step.record)
        return updated
