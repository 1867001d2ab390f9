"""What a learner wrote, exercise by exercise, runs together inside the real engine."""

import pytest

from course.checks.engines import answers_of, right_answers
from course.exercises import load
from course.learner import joined


def pieces():
    manager = joined(
        load("04", "my_prefix_cache", "solutions").MyPrefixCache,
        load("03", "my_blocks", "solutions").MyBlocks,
    )
    scheduler = load("05", "my_scheduler", "solutions").MyScheduler
    return {"block_manager_class": manager, "scheduler_class": scheduler}


@pytest.mark.parametrize("overlapped", [False, True])
def test_the_pieces_answer_as_the_engine_does(overlapped):
    used = pieces()
    answers, engine = answers_of(used | {"async_scheduling": overlapped})
    assert answers == right_answers()
    assert type(engine.block_manager) is used["block_manager_class"]
    assert type(engine.core.scheduler) is used["scheduler_class"]
    manager = engine.block_manager
    assert manager.num_free_blocks == manager.num_blocks


def test_the_pieces_find_what_is_cached_and_survive_preemption():
    cramped = {"max_num_seqs": 3, "num_gpu_blocks_override": 20, "max_num_batched_tokens": 24}
    answers, engine = answers_of(pieces() | cramped)
    assert answers == right_answers()
    again = [record for record in engine.trace if any(row[1] == 0 for row in record.rows)]
    assert len(again) < 6, "three stories are asked for twice, and found the second time"


def test_joining_keeps_every_piece():
    manager = pieces()["block_manager_class"]
    owners = {name: getattr(manager, name).__qualname__.partition(".")[0] for name in METHODS}
    assert owners == METHODS


METHODS = {
    "match": "MyPrefixCache",
    "register": "MyPrefixCache",
    "allocate": "MyBlocks",
    "free": "MyBlocks",
    "share": "BlockManager",
}
