"""A failure in any stage of a step: a clear error, nothing leaked, and the engine usable after."""

import os
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from patience import HANGS
from small_requests import PROMPTS, greedy

from course.models import smollm2
from nanovllm import LLM, SamplingParams
from nanovllm.checkpoint import hub
from nanovllm.engine.model_runner import AsyncModelRunnerOutput
from nanovllm.engine.sequence import Sequence
from nanovllm.frontend.detokenizer import Detokenizer

ROOT = Path(__file__).resolve().parents[2]
GREEDY = greedy(stop=["never said"])
ERRORS = [RuntimeError, torch.OutOfMemoryError, MemoryError, KeyboardInterrupt]
STAGES = {
    "schedule": lambda e: (e.core.scheduler, "schedule"),
    "plan": lambda e: (e.core.scheduler, "schedule_tokens"),
    "cache": lambda e: (e.block_manager, "cache_full_blocks"),
    "prepare": lambda e: (e.core.runner.input_batch, "update"),
    "forward": lambda e: (e.core.runner.model, "forward"),
    "head": lambda e: (e.core.runner.model, "compute_logits"),
    "sampler": lambda e: (e.core.runner, "sample_tokens"),
    "read": lambda e: (AsyncModelRunnerOutput, "read"),
    "update": lambda e: (e.core.scheduler, "update"),
    "append": lambda e: (Sequence, "append"),
    "detokenize": lambda e: (Detokenizer, "append"),
}


def ids(llm):
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    return [(output.outputs[0].token_ids, output.outputs[0].text) for output in outputs]


def make(folder, **options):
    return LLM(folder, max_model_len=64, use_tqdm_on_load=False, **options)


@pytest.fixture(scope="module")
def expected(folder):
    with make(folder) as llm:
        return ids(llm)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("error", ERRORS)
def test_a_failure_in_any_stage_leaves_nothing(
    folder, expected, stage, overlap, error, monkeypatch
):
    with make(folder, async_scheduling=overlap) as llm:
        for fail_at in (1, 4):
            engine = llm.llm_engine
            owner, name = STAGES[stage](engine)
            plain, calls = getattr(owner, name), []

            def fail(*args, _plain=plain, _calls=calls, _at=fail_at, **options):
                _calls.append(1)
                if len(_calls) == _at:
                    raise error("planted")
                return _plain(*args, **options)

            with monkeypatch.context() as patch:
                patch.setattr(owner, name, fail)
                with pytest.raises(error, match="planted"):
                    ids(llm)
            assert not engine.sequences
            assert not engine.has_unfinished_requests()
            assert engine.block_manager.num_free_blocks == engine.block_manager.num_blocks
            assert ids(llm) == expected


def test_an_interrupt_while_requests_are_added_queues_none(folder, expected, monkeypatch):
    with make(folder) as llm:
        plain, made = Sequence.__post_init__, []

        def interrupted(seq):
            made.append(seq)
            if len(made) == 3:
                raise KeyboardInterrupt
            plain(seq)

        with monkeypatch.context() as patch:
            patch.setattr(Sequence, "__post_init__", interrupted)
            with pytest.raises(KeyboardInterrupt):
                ids(llm)
        assert not llm.llm_engine.sequences
        assert not llm.llm_engine.has_unfinished_requests()
        assert ids(llm) == expected


@pytest.mark.parametrize("overlap", [False, True])
def test_a_request_that_ends_in_a_step_that_fails_is_forgotten(folder, overlap, monkeypatch):
    with make(folder, async_scheduling=overlap) as llm:
        plain, calls = Detokenizer.append, []

        def fail(detokenizer, token_id):
            calls.append(detokenizer)
            if detokenizer.params.seed == 1 and calls.count(detokenizer) == 4:
                raise MemoryError("planted")  # the other has just got its last token
            return plain(detokenizer, token_id)

        params = [SamplingParams(max_tokens=n, seed=n % 2, ignore_eos=True) for n in (4, 9)]
        with monkeypatch.context() as patch:
            patch.setattr(Detokenizer, "append", fail)
            with pytest.raises(MemoryError):
                llm.generate([[1], [2]], params, use_tqdm=False)
        assert not llm.llm_engine.sequences


def test_an_interrupt_while_blocks_are_freed_frees_none_twice(folder, expected):
    with make(folder) as llm:
        manager, armed = llm.llm_engine.block_manager, []

        class Interrupting(OrderedDict):
            def __setitem__(self, *item):
                if armed:
                    armed.clear()
                    raise KeyboardInterrupt
                super().__setitem__(*item)

        manager.free_block_ids = Interrupting(manager.free_block_ids)
        armed.append(True)
        with pytest.raises(KeyboardInterrupt):
            ids(llm)
        assert all(block.ref_count == 0 for block in manager.blocks)
        assert ids(llm) == expected


def test_an_interrupt_between_calls_leaves_the_other_ranks_alone(folder, expected):
    """A terminal's Ctrl-C, and a notebook's button, reach every process of the group."""
    with make(folder, tensor_parallel_size=2) as llm:
        (worker,) = llm.llm_engine.ranks.workers
        worker.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            worker.wait(timeout=2)
        assert ids(llm) == expected


def test_a_read_only_cache_folder_is_named(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("a file where a folder must be made: refused to root as well")
    monkeypatch.setenv("NANOVLLM_CACHE", str(blocked / "cache"))
    monkeypatch.setattr(smollm2, "find_gguf", lambda: Path("model.gguf"))
    with pytest.raises(OSError, match=str(blocked)):
        smollm2.smollm2_dir()


def test_a_full_disk_while_converting_leaves_no_half_model(tmp_path, monkeypatch):
    def full(source, folder):
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "find_gguf", lambda: Path("model.gguf"))
    monkeypatch.setattr(smollm2, "convert", full)
    with pytest.raises(OSError, match="No space left"):
        smollm2.smollm2_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_while_fetching_is_one_clear_error(monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub, "snapshot_download", full)
    with pytest.raises(ValueError, match=r"model='some/model'.*No space left"):
        LLM("some/model")


def test_ctrl_c_while_generating_on_two_ranks_leaves_no_process_and_no_memory(folder):
    code = """
import sys
from nanovllm import LLM, SamplingParams
llm = LLM(sys.argv[1], tensor_parallel_size=2, use_tqdm_on_load=False)
print(llm.llm_engine.ranks.workers[0].pid, flush=True)
params = SamplingParams(max_tokens=500, ignore_eos=True)
while True:
    llm.generate([[1]] * 8, params, use_tqdm=False)
"""
    before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    process = subprocess.Popen(
        [sys.executable, "-c", code, folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
        # a shell has its background jobs ignore Ctrl-C, and what they start would inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    worker = int(process.stdout.readline())
    threading.Event().wait(1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=HANGS)  # the worker holds the pipes too
    assert process.returncode != 0
    assert b"KeyboardInterrupt" in errors
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)
    after = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    assert not {name for name in after - before if name.startswith(("torch_", "gloo"))}
