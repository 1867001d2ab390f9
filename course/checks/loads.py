"""Requests for a scheduler to plan, without a model: every step is looked at as it is planned."""

from dataclasses import dataclass, field

from course.checks import CheckFailed, attempt, expect
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Batch, Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams

MOST_STEPS = 500
Row = tuple[str, int, int]  # request, first position, number of tokens


class Scarce(BlockManager):
    """Says whose blocks are missing, where the engine's relies on having been asked."""

    def allocate(self, seq: Sequence, num_tokens: int) -> None:
        if self.num_new_blocks(seq, num_tokens) > self.num_free_blocks:
            raise CheckFailed(
                f"{seq.request_id} was admitted, and there are no blocks for its {num_tokens} "
                "tokens: ask self.can_admit(seq, cached_block_ids) before you admit somebody."
            )
        super().allocate(seq, num_tokens)


@dataclass
class Load:
    """Requests (name, prompt's tokens, answer's tokens), and what a scheduler has for them."""

    requests: list[tuple[str, int, int]]
    rows: int = 8
    budget: int = 100
    blocks: int = 100
    caching: bool = False
    chunked: bool = True
    steps: list[list[Row]] = field(default_factory=list)  # what was planned

    def make(self, kind: type) -> Scheduler:
        manager = Scarce(self.blocks, 4, self.caching)
        scheduler = attempt(kind, manager, self.rows, self.budget, self.chunked)
        for name, prompt, answer in self.requests:
            params = SamplingParams(max_tokens=answer)
            scheduler.add(Sequence(name, None, [7] * prompt, params, prompt + answer))
        return scheduler

    def run(self, kind: type) -> list[list[Row]]:
        """The rows of every step until all are answered; a token is made up for each that
        samples."""
        scheduler = self.make(kind)
        self.steps = []
        while scheduler.has_work:
            before = {seq: seq.num_admissions for seq in (*scheduler.waiting, *scheduler.running)}
            batch = attempt(scheduler.schedule)
            self.steps.append(rows_of(batch))
            self.check_step(scheduler, batch)
            self.check_admitted(batch, before)
            scheduler.update(batch, [9] * sum(row.samples for row in batch))
        return self.steps

    def check_step(self, scheduler: Scheduler, batch: Batch) -> None:
        step, number = self.steps[-1], len(self.steps)
        names = [name for name, _, _ in step]
        total = sum(count for _, _, count in step)
        expect(
            step and number < MOST_STEPS,
            f"Step {number} has no row, but requests wait or run: they would never be answered.",
        )
        expect(all(count > 0 for _, _, count in step), f"Step {number} has an empty row: {step}.")
        expect(
            total <= self.budget,
            f"Step {number} computes {total} tokens under a budget of {self.budget}. Each row's "
            "tokens "
            "come off the budget, and a row gets no more than is left.",
        )
        waiting = [row.seq.request_id for row in batch if row.seq in scheduler.waiting]
        expect(
            len(names) == len(set(names)),
            f"Step {number} has a request twice: {step}. Was it taken out of the queue?",
        )
        expect(
            not waiting,
            f"Step {number} plans {waiting}, which waits: it was sent back while you walked over "
            "the running ones. Look at its status before you plan it.",
        )
        expect(
            len(scheduler.running) <= self.rows,
            f"{len(scheduler.running)} requests run in {self.rows} rows (max_num_seqs).",
        )

    def check_admitted(self, batch: Batch, before: dict[Sequence, int]) -> None:
        """`before`: how often each was admitted before this step."""
        number = len(self.steps)
        for row in batch:
            new, name = row.seq.num_admissions > before[row.seq], row.seq.request_id
            expect(
                row.admitted or not new,
                f"Step {number} takes {name} from the queue, and its row does not say so: tell "
                "self.schedule_tokens that it is admitted. One token of a prompt would pass for a "
                "decode.",
            )
            expect(
                new or not row.admitted,
                f"{name}'s row in step {number} says that it was just admitted, but it runs "
                "already.",
            )


def rows_of(batch: Batch) -> list[Row]:
    return [(row.seq.request_id, row.start, row.num_tokens) for row in batch]
