"""Wrong and right answers to lesson 05's exercises."""

from exercise_cases import Case
from nanovllm.engine.scheduler import ScheduledSequence, Scheduler
from nanovllm.engine.sequence import SequenceStatus


class MyScheduler(Scheduler):
    """By indices and early returns, and with the budget as what was planned so far."""

    def schedule_running(self, batch, budget):
        queue = self.running.copy()
        while queue and budget:
            seq = queue.pop(0)
            if seq.status != SequenceStatus.RUNNING or not seq.num_unscheduled:
                continue
            count = min(budget, seq.num_unscheduled)
            if not self.allocate_or_preempt(seq, seq.num_scheduled + count):
                return budget
            batch += [self.schedule_tokens(seq, count)]
            budget -= count
        return budget

    def schedule_waiting(self, batch, budget):
        block_size = self.block_manager.block_size
        for _ in range(self.max_num_seqs - len(self.running)):
            if not self.waiting or budget <= 0:
                return
            seq = self.waiting[0]
            cached_block_ids = self.block_manager.find_cached_blocks(seq)
            cached = len(cached_block_ids) * block_size
            cached -= cached == len(seq.token_ids)
            count = len(seq.token_ids) - cached
            if count > budget:
                if not self.enable_chunked_prefill:
                    return
                count = budget
            if not self.can_admit(seq, cached_block_ids):
                return
            self.admit(self.waiting.popleft(), cached_block_ids, cached)
            batch += [self.schedule_tokens(seq, count, True)]
            budget -= count


class Early(Scheduler):
    def schedule_tokens(self, seq, num_tokens, admitted=False):
        first, seq.num_scheduled = seq.num_scheduled, seq.num_scheduled + num_tokens
        self.block_manager.cache_full_blocks(seq)
        samples = seq.num_scheduled >= len(seq.token_ids)
        return ScheduledSequence(seq, first, num_tokens, samples, admitted)

    def update(self, batch, token_ids):
        for row in batch:
            row.seq.num_computed = max(row.seq.num_computed, row.end)
            row.seq.num_computed -= row.num_tokens
        return super().update(batch, token_ids)


SHORTEST_FIRST = """        by_length = sorted(self.waiting, key=lambda seq: len(seq.token_ids))
        self.waiting = type(self.waiting)(by_length)
"""
LOOP = """            seq.num_computed += row.num_tokens
            token_id = next(sampled) if row.samples else None
            if token_id is not None and not seq.is_finished:  # else the extra token is dropped
                seq.append(token_id)
                self.block_manager.cache_full_blocks(seq)
                updated.append(seq)
            if seq.is_finished:
                self.remove_finished(seq)
"""
DRAWN_FIRST, DRAWN_LATE = (
    """            token_id = next(sampled) if row.samples else None
            if token_id is not None and not seq.is_finished:  # else the extra token is dropped
                seq.append(token_id)
""",
    """            if row.samples and not seq.is_finished:
                seq.append(next(sampled))
""",
)
LATE = LOOP.split("\n", 1)[1] + "            seq.num_computed += row.num_tokens\n"
CASES = {
    "four_requests": Case(
        mutants=[
            ("8 - 1", "8", "A takes its token first"),
            ("8 - 1", "9", "the budget is 8"),
            ("c_answers = 3", "c_answers = 4", "samples the first answer token"),
            ("1 + 2 + 4", "8", "three rows"),
            ('"C"', '"B"', "older than C"),
            ('"C"', '"D"', "no blocks to give"),
            ("4 + 2", "4", "Its answer tokens stay known"),
            ("4 + 2", "5", "it is computed, too"),
        ],
        other={
            "b_in_step_2": 7,
            "c_answers": 3.0,
            "step_3": 7,
            "goes_back": "C",
            "computed_again": 6,
        },
    ),
    "my_scheduler": Case(
        mutants=[
            ("class MyScheduler(Scheduler)", "class MyScheduler", "no longer inherits"),
            ("            budget -= num_tokens\n", "", "come off the budget"),
            ("min(seq.num_unscheduled, budget)", "seq.num_unscheduled", "under a budget"),
            ("            budget -= min(missing, budget)", "", "come off the budget"),
            (" or seq.status is not SequenceStatus.RUNNING", "", "sent back while you walked"),
            (
                "                continue\n            if not self.allocate_or_preempt",
                "                break\n            if not self.allocate_or_preempt",
                "go on with the next",
            ),
            (
                "num_tokens):\n                break",
                "num_tokens):\n                continue",
                "nobody younger than A gets anything",
            ),
            ("seq.num_scheduled + num_tokens)", "num_tokens)", "blocks run out"),
            (" and len(self.running) < self.max_num_seqs", "", "max_num_seqs"),
            ("min(missing, budget), admitted", "missing, admitted", "no more than is left"),
            (" and not self.enable_chunked_prefill", "", "may be cut at the budget's edge"),
            (
                "            if missing > budget and not self.enable_chunked_prefill:\n"
                "                break\n",
                "",
                "Without chunked prefill",
            ),
            (", len(seq.token_ids) - 1)", ", len(seq.token_ids))", "an empty row"),
            (
                "cached_block_ids = self.block_manager.find_cached_blocks(seq)",
                "cached_block_ids = []",
                "computed again all the same",
            ),
            ("self.waiting.popleft()", "self.waiting.pop()", "Was it taken out of the queue?"),
            (
                "        while self.waiting and budget",
                SHORTEST_FIRST + "        while self.waiting and budget",
                "nobody may overtake it",
            ),
            ("return budget", "return 0", "Nobody runs, so of a budget of 5"),
            (
                "missing > budget and not",
                "len(seq.token_ids) > budget and not",
                "what is left to compute must fit",
            ),
            (
                "            if not self.can_admit(seq, cached_block_ids):\n"
                "                break\n",
                "",
                "ask self.can_admit(seq, cached_block_ids) before you admit",
            ),
            (", admitted=True", "", "its row does not say so"),
            (
                "batch.append(self.schedule_tokens(seq, num_tokens))",
                "batch.append(self.schedule_tokens(seq, num_tokens, True))",
                "says that it was just admitted",
            ),
        ],
        other=MyScheduler,
    ),
    "early": Case(
        mutants=[
            ("class Early(Scheduler)", "class Early", "no longer inherits"),
            (
                "self.block_manager.cache_full_blocks(seq)\n        samples",
                "seq.num_computed += num_tokens\n        samples",
                "nothing has run",
            ),
            ("seq.num_computed += row.num_tokens", "pass", "it belongs in update"),
            (
                "seq.num_computed += row.num_tokens",
                "seq.num_computed += 1",
                "row's number of tokens",
            ),
            (
                "seq.num_computed += row.num_tokens",
                "seq.num_computed = len(seq.token_ids)",
                "says 10",
            ),
            (
                "seq.num_computed += row.num_tokens",
                "seq.num_computed = seq.num_scheduled",
                "another step is in flight",
            ),
            (LOOP, LATE, "the counter moves before `remove_finished`"),
            (DRAWN_FIRST, DRAWN_LATE, "draw the id first"),
            (" and not seq.is_finished", "", "sampled for a finished request is dropped"),
        ],
        other=Early,
    ),
}
