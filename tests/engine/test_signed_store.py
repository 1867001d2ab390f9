"""Other processes of this machine can write to the ranks' store, and are not obeyed."""

import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nanovllm import LLM, SamplingParams
from nanovllm.distributed.launch import start_workers
from nanovllm.distributed.signed_store import SignedStore

GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
REFUSED = "does not carry this engine's token"
INTRUDER = """
import sys
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False)
store.set(sys.argv[2], sys.argv[3])
"""


def intrude(engine, key, text):
    """Another process, which knows no token, writes to the engine's store."""
    command = [sys.executable, "-c", INTRUDER, str(engine.ranks.store.port), key, text]
    subprocess.run(command, check=True)


@pytest.fixture
def engine(tiny_model):
    folder = str(tiny_model(family="qwen3"))
    with LLM(folder, tensor_parallel_size=2, max_model_len=64, use_tqdm_on_load=False) as llm:
        yield llm.llm_engine


def add(engine, name):
    engine.add_request(name, {"prompt_token_ids": [1, 2, 3]}, GREEDY)


def refused(engine, request="a"):
    """The worker ends of the message, and rank 0's next call says why."""
    [worker] = engine.ranks.workers
    assert worker.wait(timeout=120) == 1
    with pytest.raises(RuntimeError, match=f"rank 1 has ended with exit code 1: .*{REFUSED}"):
        add(engine, request)
    assert engine.closed


def a_request(name):
    return {"request_id": name, "prompt": None, "token_ids": [7], "params": {}, "max_length": 9}


@pytest.mark.parametrize("command", [["close", None], ["add", [a_request("x")]], ["step", None]])
def test_a_forged_command_is_refused_by_the_worker_and_named_by_rank_0(engine, command):
    intrude(engine, f"message{engine.ranks.num_broadcasts + 1}/1", json.dumps(command))
    refused(engine)


def test_a_repeated_command_is_refused(engine, monkeypatch):
    said, store = [], engine.ranks.messages._store

    class Overheard:
        def set(self, key, value):
            said.append(value)
            store.set(key, value)

        def __getattr__(self, name):
            return getattr(store, name)

    monkeypatch.setattr(engine.ranks.messages, "_store", Overheard())
    add(engine, "a")
    [valid] = said
    intrude(engine, f"message{engine.ranks.num_broadcasts + 1}/1", valid)
    refused(engine, "b")


@pytest.mark.parametrize("key", ["ready1", "failed1"])
def test_rank_0_hears_no_stranger(key):
    ranks = start_workers(1, {}, "")
    ranks.world_size = ranks.monitor.world_size = 2  # the other rank has not come yet
    ranks.monitor.timeout = timedelta(seconds=30)
    intruder = dist.TCPStore("127.0.0.1", ranks.store.port, is_master=False)
    intruder.set(key, SignedStore(intruder, "another token").sign(key, "true") + "true")
    with pytest.raises(RuntimeError, match=f"'{key}' .*{REFUSED}"):
        ranks.init_process_group(torch.device("cpu"))


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")
def test_the_token_is_in_no_command_line_and_no_environment(engine):
    token, [worker] = engine.ranks.messages.token.encode(), engine.ranks.workers
    assert len(token) == 64
    for name in ("cmdline", "environ"):
        assert token not in Path(f"/proc/{worker.pid}/{name}").read_bytes()


def stores(token="secret"):
    raw = dist.HashStore()
    return raw, SignedStore(raw, token)


def test_values_come_back_and_are_taken_once():
    _, store = stores()
    store.set("key", {"a": [1, None, "é"]})
    assert store.has("key")
    assert store.get("key") == store.pop("key") == {"a": [1, None, "é"]}
    assert not store.has("key")


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value[:-1] + b"2",  # another text
        lambda value: b"0" * 64 + value[64:],  # another signature
        lambda value: value[64:],  # no signature
        lambda value: b"",
        lambda value: value + b"\xff",  # no UTF-8
    ],
)
def test_a_changed_value_is_refused(change):
    raw, store = stores()
    store.set("key", 1)
    raw.set("key", change(raw.get("key")))
    with pytest.raises(RuntimeError, match=REFUSED):
        store.get("key")


def test_a_value_is_refused_under_another_key_and_in_another_engine():
    raw, store = stores()
    store.set("message1/1", 1)
    raw.set("message2/1", raw.get("message1/1"))
    with pytest.raises(RuntimeError, match=REFUSED):
        store.get("message2/1")
    with pytest.raises(RuntimeError, match=REFUSED):
        SignedStore(raw, "another").get("message1/1")
