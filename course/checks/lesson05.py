"""Checks of lesson 05's exercises: steps under a budget, the scheduler's loop, a counter too "
"early."""

import random
from typing import Any

from course.checks import attempt, check, compare, expect
from course.checks.engines import check_answers, check_base, check_endings, three_prompts
from course.checks.loads import Load, rows_of
from course.serving import ask, start_engine
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Batch, Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams

PAGE = Load([("A", 5, 6), ("B", 12, 6), ("C", 4, 6), ("D", 6, 6)], rows=3, budget=8, blocks=8)


@check
def check_four_requests(
    b_in_step_2: Any, c_answers: Any, step_3: Any, goes_back: Any, computed_again: Any
) -> None:
    steps = PAGE.run(Scheduler)
    counts = [{name: count for name, _, count in step} for step in steps]
    wrong = {
        3: "In step 2 A decodes: it takes one token, and B all the rest of the budget.",
        9: "B lacks 9 tokens, but the budget is 8, and A takes one first.",
        8: "A takes its token first: running requests are served oldest first.",
    }
    look = "A takes one, and B what is left of 8, if it lacks as many."
    compare("b_in_step_2", b_in_step_2, counts[1]["B"], wrong, look)
    first = next(i for i, count in enumerate(counts, start=1) if "C" in count)
    wrong = {
        2: "In steps 1 and 2 the budget is spent before C's turn comes.",
        4: "The step that computes the whole prompt samples the first answer token.",
    }
    look = "It is the step in which C's whole prompt is computed."
    compare("c_answers", c_answers, first, wrong, look)
    wrong = {8: "The budget is a limit. D could use what is left, but there are three rows."}
    look = "A takes 1, B the rest of its prompt, C its prompt."
    compare("step_3", step_3, sum(counts[2].values()), wrong, look)
    victim = next(name for name in counts[3] if name not in counts[4])
    wrong = {
        "A": "A is the oldest. It wants a block, and another has to give up its own.",
        "B": "B has the most blocks, but it is older than C: the youngest goes, so that the oldest "
        "always gets on.",
        "D": "D does not run yet: it has no blocks to give.",
    }
    compare("goes_back", goes_back, victim, wrong, "The youngest of those that run.")
    [again] = [step for step in steps[4:] if (victim, 0) in [row[:2] for row in step]]
    wrong = {
        4: "Its answer tokens stay known, too; their keys and values are as lost as the prompt's.",
        5: "The last token it got was never computed, but it is known: it is computed, too.",
        1: "Its blocks are gone, and without a prefix cache all it knew is computed again.",
    }
    truth = next(count for name, _, count in again if name == victim)
    compare("computed_again", computed_again, truth, wrong, "Its prompt, and the answer so far.")


# -- the scheduler's loop ------------------------------------------------------------------------


@check
def check_my_scheduler(MyScheduler: Any) -> None:
    check_base(MyScheduler, Scheduler, "MyScheduler")
    check_running(MyScheduler)
    check_admission(MyScheduler)
    check_in_flight(MyScheduler)
    check_cached(MyScheduler)
    check_at_random(MyScheduler)
    cramped = {"max_num_batched_tokens": 16, "max_num_seqs": 2, "num_gpu_blocks_override": 16}
    check_answers(scheduler_class=MyScheduler, **cramped)


def check_running(kind: type) -> None:
    left = attempt(Load([("A", 3, 3)]).make(kind).schedule_running, [], 5)
    expect(left == 5, f"Nobody runs, so of a budget of 5 all is left; yours returned {left!r}.")
    long = Load([("A", 3, 4), ("L", 20, 2)], budget=6)
    step = rows_of(attempt(long.make(kind).schedule))
    expect(
        step != [("A", 0, 3)],
        "A takes 3 of a budget of 6, and 3 tokens of L's prompt of 20 could go with it. A prompt "
        "may be cut at the budget's edge (enable_chunked_prefill).",
    )
    steps = long.run(kind)
    expect(
        all("A" in [row[0] for row in step] for step in steps[:4]),
        f"A decodes and misses a step while the long prompt of L is computed: {steps[:4]}.",
    )
    Load([("A", 8, 6), ("B", 13, 7), ("C", 7, 8)], budget=7, blocks=7).run(kind)
    tight = Load([("A", 4, 9), ("B", 4, 9), ("C", 4, 9)], blocks=6)
    wanted, steps = tight.run(Scheduler), tight.run(kind)
    at = next((i for i, (a, b) in enumerate(zip(wanted, steps, strict=False)) if a != b), None)
    expect(
        at is None,
        f"When blocks run out, step {(at or 0) + 1} should be {wanted[at or 0]}, yours is "
        f"{steps[at or 0]}. Room is made for all tokens up to the new ones, those before included.",
    )


def check_admission(kind: type) -> None:
    steps = Load([("A", 3, 2), ("B", 3, 2), ("C", 3, 2)], rows=2).run(kind)
    expect(
        [len(step) for step in steps[:2]] == [2, 2],
        f"Three short requests, two rows: two run first, not {len(steps[0])}.",
    )
    steps = Load([("A", 9, 9), ("BIG", 30, 2), ("C", 2, 2)], blocks=9).run(kind)
    order = list(dict.fromkeys(row[0] for step in steps for row in step))
    expect(
        order == ["A", "BIG", "C"],
        f"They came as A, BIG, C and were admitted as {', '.join(order)}. The head of the queue "
        "does "
        "not fit yet, and nobody may overtake it: else it might wait for ever.",
    )
    whole = Load([("A", 6, 3), ("B", 6, 3)], budget=8, chunked=False)
    steps = whole.run(kind)
    expect(
        steps[0] == [("A", 0, 6)] and ("B", 0, 6) in steps[1],
        f"Without chunked prefill B's prompt of 6 waits until a step has 6 tokens left: "
        f"A alone, then both. Yours: {steps[:2]}.",
    )


def check_in_flight(kind: type) -> None:
    """As the overlapped loop plans: the next step, while the last one is in flight."""
    scheduler = Load([("A", 3, 1), ("B", 3, 5)]).make(kind)
    attempt(scheduler.schedule)
    step = rows_of(attempt(scheduler.schedule))
    expect(
        step == [("B", 3, 1)],
        f"A's last token is in flight: it has nothing to compute, and B has. Yours planned {step}. "
        "Skip the one, and go on with the next.",
    )
    scheduler = Load([("A", 4, 5), ("B", 5, 5), ("C", 5, 5)], blocks=7).make(kind)
    attempt(scheduler.schedule)
    scheduler.block_manager.allocate(Sequence("X", None, [1], SamplingParams(), 9), 8)
    step = rows_of(attempt(scheduler.schedule))  # no block is left
    expect(
        step == [],
        "A needs a block, none is free, and the youngest cannot go, as its token is in flight. "
        "Then "
        f"nobody younger than A gets anything, so that it can go next time. Yours planned {step}.",
    )


def check_cached(kind: type) -> None:
    twice = Load([("A", 8, 1), ("B", 8, 1), ("C", 11, 1)], rows=1, caching=True)
    steps = twice.run(kind)
    expect(
        steps[1] != [("B", 0, 8)],
        "B's prompt is A's, found in the cache, and was computed again all the same.",
    )
    expect(
        steps[1] == [("B", 7, 1)],
        "B's prompt of 8 is cached in full: its last token is computed, since its logits are "
        "needed, "
        f"and nothing else. Yours planned {steps[1]}.",
    )
    expect(steps[2] == [("C", 8, 3)], f"Of C's 11 tokens 8 are cached; yours planned {steps[2]}.")
    whole = Load([("A", 8, 3), ("B", 10, 3)], budget=10, caching=True, chunked=False)
    steps = whole.run(kind)
    expect(
        steps[0] == [("A", 0, 8), ("B", 8, 2)],
        "Without chunked prefill what is left to compute must fit in the budget. Of B's prompt of "
        f"10, 8 tokens are cached: 2 are left, and fit. Yours planned {steps[0]}.",
    )


def check_at_random(kind: type) -> None:
    rng = random.Random(5)
    for _ in range(100):
        requests = [(str(i), rng.randint(1, 30), rng.randint(1, 12)) for i in range(8)]
        budget, blocks = rng.randint(3, 40), rng.randint(12, 40)
        load = Load(requests, rng.randint(1, 8), budget, blocks, rng.random() < 0.5)
        wanted, steps = load.run(Scheduler), load.run(kind)
        at = next((i for i, (a, b) in enumerate(zip(wanted, steps, strict=False)) if a != b), 0)
        expect(
            steps == wanted,
            f"In a random workload step {at + 1} differs from the engine's: {wanted[at]} is "
            "planned "
            f"there, {steps[at]} by yours.",
        )


# -- a counter too early -------------------------------------------------------------------------


def with_a_failed_step(failing: int | None, **options: Any) -> tuple[list[Sequence], BlockManager]:
    """Three stories, of which one step fails at first, then the same three again.

    failing: number of the step that fails (the first is 1), None for none. options: of start_engine
    """
    engine = start_engine(**{"block_size": 4, "max_num_batched_tokens": 16} | options)
    launch, launched = engine.core.runner.launch, []

    def fails_once(batch: Batch) -> Any:
        launched.append(batch)
        if len(launched) == failing:
            raise MemoryError("no memory for this step")
        return launch(batch)

    engine.core.runner.launch = fails_once
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    prompts = three_prompts()
    seqs = engine.add([engine.make_request(f"{i}", p, params) for i, p in enumerate(prompts)])
    while engine.has_unfinished_requests():
        try:
            engine.advance()
        except MemoryError:
            continue  # the step was rolled back; its requests wait to be run again
    return seqs + ask(engine, prompts, count=20), engine.block_manager


def tell_with_a_failed_step(kind: type) -> None:
    (right, _), (told, _) = with_a_failed_step(None), with_a_failed_step(3, scheduler_class=kind)
    for good, seq in zip(right, told, strict=True):
        mark = "right" if good.output_ids == seq.output_ids else "WRONG"
        print(f"{mark}: {seq.detokenizer.text!r}")


@check
def check_early(Early: Any) -> None:
    check_base(Early, Scheduler, "Early")
    scheduler = Load([("A", 10, 3)], budget=4).make(Early)
    seq = scheduler.waiting[0]
    batch = attempt(scheduler.schedule)
    expect(seq.num_scheduled == 4, f"4 tokens were planned, num_scheduled is {seq.num_scheduled}.")
    expect(
        seq.num_computed == 0,
        f"A step is planned and nothing has run, but num_computed is {seq.num_computed} already. "
        "If "
        "the step fails, nobody knows any more what is in the cache.",
    )
    later = attempt(scheduler.schedule)
    attempt(scheduler.update, batch, [])
    expect(
        seq.num_computed != 0,
        "The step has succeeded, and num_computed has not moved: it belongs in update.",
    )
    expect(
        seq.num_computed != seq.num_scheduled,
        f"Two steps are planned and the first has come back with 4 tokens, but num_computed is "
        f"{seq.num_computed}. It moves by the row's number of tokens: another step is in flight.",
    )
    expect(
        seq.num_computed == 4,
        f"The step computed 4 tokens of A, num_computed says {seq.num_computed}. It moves by the "
        "row's number of tokens.",
    )
    scheduler.roll_back([later])
    expect(not seq.in_flight, "After a step was rolled back nothing is in flight.")
    check_ended_in_flight(Early)
    attempt_stories(Early)
    check_endings(scheduler_class=Early)


def check_ended_in_flight(kind: type) -> None:
    """As in the overlapped loop: A ends by a stop id while its next token is in flight."""
    scheduler = Load([("A", 3, 9), ("B", 3, 9)]).make(kind)
    first, second = scheduler.waiting
    first.stop_ids = frozenset([5])
    batches = [attempt(scheduler.schedule), attempt(scheduler.schedule)]
    for batch, ids in zip(batches, ([5, 6], [7, 8]), strict=True):
        attempt(scheduler.update, batch, ids)
    expect(
        second.output_ids != [6, 7],
        "A has ended by a stop id while a step with its next token was in flight. That step "
        "sampled 7 for A and 8 for B, and B got its neighbour's 7. token_ids holds an id for each "
        "row that samples, whether or not its request has ended: draw the id first, and then drop "
        "it if the request is finished.",
    )
    expect(
        second.output_ids == [6, 8],
        f"Two steps sampled 6 and 8 for B, and its answer is {second.output_ids}.",
    )
    expect(
        first.output_ids == [5],
        f"A ended by the stop id 5, and its answer is {first.output_ids}. What a step in flight "
        "sampled for a finished request is dropped.",
    )


def attempt_stories(kind: type) -> None:
    right = [seq.output_ids for seq in with_a_failed_step(None)[0]]
    for failing in (1, 2, 3, 7):
        seqs, manager = attempt(with_a_failed_step, failing, scheduler_class=kind)
        expect(
            [seq.output_ids for seq in seqs] == right,
            f"Step {failing} failed and was rolled back, and a story is another. A block is in the "
            "prefix cache whose keys and values were never written.",
        )
        expect(
            manager.num_free_blocks == manager.num_blocks,
            f"All stories are told, and {manager.num_blocks - manager.num_free_blocks} blocks are "
            "not free. A finished request still counts as in flight, and keeps its blocks: the "
            "counter moves before `remove_finished`.",
        )
