"""Ranks: collectives, engines on two ranks side by side, under torchrun, and after a failure."""

import json
import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from patience import HANGS
from small_requests import PROMPTS, greedy, ids

from course.rank_threads import on_ranks
from nanovllm import LLM, EngineArgs
from nanovllm.checkpoint.config_json import read_model_config
from nanovllm.distributed import monitor
from nanovllm.distributed.launch import start_workers
from nanovllm.distributed.ranks import Ranks
from nanovllm.engine.memory import determine_num_blocks, make_kv_cache

ROOT = Path(__file__).resolve().parents[2]
GREEDY = greedy()


@pytest.mark.parametrize("size", [2, 3])
def test_collectives(size):
    whole = torch.randn(4, 10)

    def run(ranks):
        shard = ranks.shard(10)
        part = whole[:, shard.start : shard.start + shard.count]
        values, place = part.max(dim=1, keepdim=True)
        return (
            ranks.all_reduce(torch.full((2,), float(ranks.rank))),
            ranks.all_reduce_min(7 - ranks.rank),
            ranks.all_gather_columns(part, 10),
            ranks.all_reduce_argmax(values, place + shard.start),
            ranks.broadcast({"from": 0} if ranks.rank == 0 else None),
        )

    for total, least, columns, best, message in on_ranks(size, run):
        assert total.tolist() == [sum(range(size))] * 2
        assert least == 7 - (size - 1)
        assert torch.equal(columns, whole)
        assert torch.equal(best, whole.argmax(dim=1, keepdim=True))
        assert message == {"from": 0}


def test_the_lowest_id_wins_a_tie_between_ranks():
    def run(ranks):
        return ranks.all_reduce_argmax(torch.ones(1, 1), torch.tensor([[5 + ranks.rank]]))

    assert [best.item() for best in on_ranks(2, run)] == [5, 5]


def test_fewer_kv_heads_than_ranks_are_held_twice():
    assert [Ranks(rank, 4).shard(2, 8).start for rank in range(4)] == [0, 0, 8, 8]
    assert all(Ranks(rank, 4).shard(2, 8).count == 8 for rank in range(4))


def test_shards_cover_everything_once():
    for size in (1, 2, 3, 5):
        shards = [Ranks(rank, size).shard(301) for rank in range(size)]
        assert [s for shard in shards for s in range(shard.start, shard.start + shard.count)] == [
            *range(301)
        ]


def test_a_split_linear_is_the_whole_one():
    x, weight = torch.randn(3, 8), torch.randn(6, 8)

    def run(ranks):
        shard = ranks.shard(8)
        part = slice(shard.start, shard.start + shard.count)
        return ranks.all_reduce(F.linear(x[:, part], weight[:, part]))

    for y in on_ranks(2, run):
        torch.testing.assert_close(y, F.linear(x, weight))


# -- engines ---------------------------------------------------------------------------------------


def make(folder, size=1):
    return LLM(folder, tensor_parallel_size=size, max_model_len=128, use_tqdm_on_load=False)


def answer(llm):
    return ids(llm.generate(PROMPTS, GREEDY, use_tqdm=False))


@pytest.fixture(scope="module")
def expected(folder):
    with make(folder) as llm:
        return answer(llm)


def test_only_kv_heads_may_be_fewer_than_ranks(tiny_model):
    """Query heads that two ranks held would count twice in the sum."""
    with pytest.raises(ValueError, match="tensor_parallel_size=2 does not divide num_attention"):
        make(str(tiny_model(family="llama", heads=1, kv_heads=1)), 2)


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's /proc")
def test_commands_are_heard_on_this_machine_alone():
    ranks = start_workers(1, {}, "")
    doors = [line.split()[1:4] for file in ("tcp", "tcp6")
             for line in Path(f"/proc/net/{file}").read_text().splitlines()[1:]]  # fmt: skip
    found = [at.partition(":")[0] for at, _, state in doors
             if state == "0A" and int(at.partition(":")[2], 16) == ranks.store.port]  # fmt: skip
    assert found == ["0100007F"], "127.0.0.1, as the kernel writes it"


def test_two_engines_of_two_ranks_at_once(folder, expected):
    with make(folder, 2) as first, make(folder, 2) as second:
        assert answer(first) == answer(second) == expected
        workers = first.llm_engine.ranks.workers + second.llm_engine.ranks.workers
    assert [worker.poll() for worker in workers] == [0, 0]


def test_aborts_and_late_requests_reach_every_rank(folder, expected):
    with make(folder, 2) as llm:
        for _ in llm.stream(PROMPTS, GREEDY):
            break
        stream = llm.stream(PROMPTS, GREEDY)
        next(stream)
        assert answer(llm) == expected
        list(stream)
        assert [o.outputs[0].token_ids for o in stream.outputs] == expected


def test_after_a_failed_step_ranks_are_closed_and_say_so(folder):
    llm = make(folder, 2)
    workers = list(llm.llm_engine.ranks.workers)

    def fail(*_):
        raise RuntimeError("planted failure")

    llm.llm_engine.core.runner.model.forward = fail
    with pytest.raises(RuntimeError, match="planted"):
        answer(llm)
    assert all(worker.poll() is not None for worker in workers)
    with pytest.raises(RuntimeError, match="closed"):
        answer(llm)
    llm.close()


def test_a_rank_that_dies_within_a_step_is_named(folder):
    llm = make(folder, 2)
    worker = llm.llm_engine.ranks.workers[0]
    model = llm.llm_engine.core.runner.model
    forward = model.forward

    def forward_alone(*args):
        worker.kill()
        worker.wait()
        return forward(*args)

    model.forward = forward_alone
    stream = llm.stream(PROMPTS, GREEDY)
    with pytest.raises(RuntimeError, match="rank 1 has ended with exit code -9"):
        next(stream)
    assert [o.outputs[0].finish_reason for o in stream.outputs] == ["abort"] * 3
    llm.close()


SLOW_WORKER = """
import time
import torch
from nanovllm.distributed.launch import join_as_worker
ranks, _ = join_as_worker()
ranks.messages.set("ready1", True)
time.sleep(1)
ranks.init_process_group(torch.device("cpu"))
ranks.close()
"""


def test_starting_is_not_held_to_the_time_that_a_step_may_take(monkeypatch):
    monkeypatch.setattr(monitor, "STEP_TIMEOUT", timedelta(milliseconds=100))
    started = start_workers(2, {}, SLOW_WORKER)
    # This raises an error if the other rank may be at most 0.1 s late.
    started.init_process_group(torch.device("cpu"))
    started.close()


def test_a_worker_that_dies_before_the_group_is_open_is_noticed():
    worker = (
        "from nanovllm.distributed.launch import join_as_worker; "
        "join_as_worker()[0].messages.set('ready1', True)"
    )
    ranks = start_workers(2, {}, worker)
    with pytest.raises(RuntimeError, match="rank 1 has ended with exit code 0"):
        ranks.init_process_group(torch.device("cpu"))
    ranks.close(kill=True)


def test_what_a_worker_fails_of_is_said_before_its_process_has_ended(folder, monkeypatch):
    llm = make(folder, 2)
    monkeypatch.setattr(llm.llm_engine.ranks.workers[0], "poll", lambda: None)
    llm.llm_engine.ranks.broadcast(["nonsense", None, []])
    with pytest.raises(
        RuntimeError, match="rank 1 has failed: ValueError: rank 0 has sent 'nonsense'"
    ):
        answer(llm)
    llm.close()


def test_a_rank_that_hangs_within_a_step_ends_in_an_error(folder):
    llm = make(folder, 2)
    assert llm.llm_engine.ranks.monitor.timeout == monitor.STEP_TIMEOUT
    llm.llm_engine.ranks.monitor.step_timeout = timedelta(seconds=2)
    llm.llm_engine.ranks.use_step_timeout()  # again, with another limit
    worker = llm.llm_engine.ranks.workers[0]
    worker.send_signal(signal.SIGSTOP)
    with pytest.raises(RuntimeError, match="Timed out"):
        answer(llm)
    assert worker.poll() is not None
    llm.close()


def test_workers_end_when_rank_0_is_killed(folder):
    code = f"""
from nanovllm import LLM
llm = LLM({folder!r}, tensor_parallel_size=2, max_model_len=128, use_tqdm_on_load=False)
print("ready", flush=True)
llm.llm_engine.ranks.workers[0].wait()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    rank0 = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment)
    assert rank0.stdout.readline() == b"ready\n"
    rank0.kill()
    rank0.communicate(timeout=HANGS)  # the worker holds the pipe too: this waits for its end


def test_all_ranks_take_the_smallest_number_of_blocks(folder):
    config = read_model_config(Path(folder))

    def run(ranks):
        fits = 7 if ranks.rank else 5  # as if the ranks had room for different numbers
        args = EngineArgs(folder, device="cpu", max_model_len=16, max_num_seqs=fits)
        block = make_kv_cache(config, args, ranks, 1)
        runner = SimpleNamespace(kv_cache=block, ranks=ranks, device=block.device)
        return determine_num_blocks(runner, args, 0)

    assert on_ranks(2, run) == [5, 5]


SCRIPT = """
import json, os, sys
from nanovllm import LLM, SamplingParams
params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
rows = []
for _ in range(2):  # a second engine in the same processes
    with LLM(sys.argv[1], tensor_parallel_size=2, max_model_len=128, use_tqdm_on_load=False) as llm:
        outputs = llm.generate(json.loads(sys.argv[2]), params, use_tqdm=False)
        rows.append([output.outputs[0].token_ids for output in outputs])
with open(f"{sys.argv[3]}/{os.environ['RANK']}.json", "w") as file:
    json.dump(rows, file)
"""


def test_the_same_script_under_torchrun(folder, expected, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, script, folder, json.dumps(PROMPTS), tmp_path],
        capture_output=True,
        text=True,
        timeout=HANGS,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [expected, expected]
