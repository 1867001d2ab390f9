"""What a learner wrote, exercise by exercise, runs together inside the real engine."""

import re
from types import SimpleNamespace

import pytest

from course.checks import CheckFailed, lesson09
from course.checks.engines import ENDINGS, answers_of, check_endings, endings_of, right_answers
from course.checks.exercises import load
from course.checks.learner import PIECES, joined, manager_with, own_piece, scheduler_with
from course.checks.lesson05 import with_a_failed_step
from course.stages.paged import StaticScheduler
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler


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


def solution(number, exercise, name):
    return getattr(load(number, exercise, "solutions"), name)


IN_THE_ENGINE = {  # every published solution, and every class of the course, that the engine runs
    "MyBlocks": lambda: {"block_manager_class": solution("03", "my_blocks", "MyBlocks")},
    "Border": lambda: {"block_manager_class": solution("03", "border", "Border")},
    "MyPrefixCache": lambda: {
        "block_manager_class": solution("04", "my_prefix_cache", "MyPrefixCache")
    },
    "block_keys": lambda: {
        "block_manager_class": manager_with(solution("04", "block_keys", "block_keys"))
    },
    "first_to_compute": lambda: {
        "scheduler_class": scheduler_with(solution("04", "first_to_compute", "first_to_compute"))
    },
    "MyScheduler": lambda: {"scheduler_class": solution("05", "my_scheduler", "MyScheduler")},
    "Early": lambda: {"scheduler_class": solution("05", "early", "Early")},
    "StaticScheduler": lambda: {"scheduler_class": StaticScheduler},
    "all pieces": pieces,
}


@pytest.mark.parametrize("name", IN_THE_ENGINE)
def test_requests_that_end_at_different_times_get_the_engines_own_tokens(name):
    check_endings(**IN_THE_ENGINE[name]())


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("name", IN_THE_ENGINE)
def test_a_failed_step_changes_no_answer(name, overlapped):
    options = {"block_size": 4, "max_num_batched_tokens": 16, "async_scheduling": overlapped}
    for failing in (2, 7):
        seqs, manager = with_a_failed_step(failing, **IN_THE_ENGINE[name]() | options)
        assert [seq.output_ids for seq in seqs] == right_answers()
        assert manager.num_free_blocks == manager.num_blocks


class CountsDropped(Scheduler):
    """Counts the tokens that a step sampled for a request which had ended meanwhile."""

    dropped = 0

    def update(self, batch, token_ids):
        self.dropped += sum(row.samples and row.seq.is_finished for row in batch)
        return super().update(batch, token_ids)


def test_requests_of_the_check_end_in_every_way_and_some_while_a_token_is_in_flight():
    options = {"scheduler_class": CountsDropped, "async_scheduling": True}
    answers, engine = endings_of(options)
    assert answers == [end.right_answer() for end in ENDINGS]
    assert engine.core.scheduler.dropped == sum(end.count == 20 for end in ENDINGS) - 1
    ways = {(end.stop_at is None, end.abort_at is None) for end in ENDINGS}
    assert ways == {(False, True), (True, False), (True, True)}


def test_joining_keeps_every_piece():
    manager = pieces()["block_manager_class"]
    owners = {name: getattr(manager, name).__qualname__.partition(".")[0] for name in METHODS}
    assert owners == METHODS


def test_joining_takes_the_engines_own_beside_a_piece():
    class Mine(BlockManager):
        pass

    for classes in ((BlockManager, Mine), (Mine, BlockManager), (Mine, Mine)):
        assert joined(*classes).__mro__[1:3] == (Mine, BlockManager)
    assert joined(BlockManager, BlockManager).__mro__[1] is BlockManager
    with pytest.raises(TypeError, match="leave out what is None"):
        joined(Mine, None)


METHODS = {
    "find_cached_blocks": "MyPrefixCache",
    "cache_full_blocks": "MyPrefixCache",
    "allocate": "MyBlocks",
    "free": "MyBlocks",
    "touch": "BlockManager",
}


def test_a_piece_that_passes_its_check_is_the_learners(monkeypatch, capsys):
    monkeypatch.setattr("course.checks.exercises.here", lambda: "solutions")
    scheduler = own_piece("05", "my_scheduler")
    assert scheduler.__name__ == "MyScheduler"
    assert capsys.readouterr().out == "05 my_scheduler: yours\n"


def test_a_piece_that_does_not_pass_is_left_to_the_engine(monkeypatch, capsys):
    def fails(place):
        def check(MyScheduler):
            raise CheckFailed("no loop ends")

        return check

    monkeypatch.setattr("course.checks.exercises.here", lambda: "solutions")
    monkeypatch.setattr("course.checks.notes.check_of", fails)
    assert own_piece("05", "my_scheduler") is None
    assert "the engine's own, as yours does not pass: no loop ends" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["class MyScheduler(:", "class MyScheduler(Schedule): ..."])
def test_a_page_half_written_is_left_to_the_engine(source, monkeypatch, capsys):
    monkeypatch.setattr("course.checks.exercises.here", lambda: "solutions")
    monkeypatch.setattr("course.checks.exercises.code_of", lambda *_: source)
    assert own_piece("05", "my_scheduler") is None
    said = capsys.readouterr().out
    assert re.search("the engine's own, as yours does not run: (Syntax|Name)Error: ", said)


def test_without_a_piece_of_ones_own_the_last_exercise_is_open(monkeypatch):
    nothing = dict.fromkeys(PIECES)
    monkeypatch.setattr(lesson09, "own_pieces", lambda: nothing)
    my_engine = load("09", "my_engine", "solutions").my_engine
    with pytest.raises(CheckFailed, match="the engine against itself"):
        lesson09.check_my_engine(my_engine)


def test_a_race_told_otherwise_is_no_race(monkeypatch, capsys):
    monkeypatch.setattr(lesson09, "start_engine", lambda: "finished")
    answers = {"finished": [1, 2], "yours": [1, 3]}
    monkeypatch.setattr(
        lesson09, "ask", lambda engine, *_, **__: [SimpleNamespace(output_ids=answers[engine])]
    )
    with pytest.raises(CheckFailed, match="other stories"):
        lesson09.race(lambda pieces: "yours", {"my_blocks": None})
    assert "races itself" in capsys.readouterr().out
