"""Launch the ranks of an engine: rank 0 starts worker processes, or torchrun has started them all.

Rank 0 opens a key-value store (torch's TCPStore) on a free port, starts one process for each other
rank, and sends each of them the port, its rank and the engine's arguments. Under torchrun the
processes and their store exist already, so each process only joins.
"""

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
from datetime import timedelta
from typing import IO, Any, cast

import torch
import torch.distributed as dist

from nanovllm.distributed.monitor import START_TIMEOUT
from nanovllm.distributed.python_command import python_command
from nanovllm.distributed.ranks import Ranks
from nanovllm.distributed.signed_store import SignedStore


def start_workers(world_size: int, settings: Any, worker_code: str) -> Ranks:
    """Start ranks 1 to world_size - 1 as processes. The calling process becomes rank 0.

    settings: anything that JSON can hold; every worker receives it.
    worker_code: the Python code that a worker runs. It calls `join_as_worker`, and its imports
    find the same files as this process's imports did.
    """
    # By default TCPStore listens on all interfaces, so we bind it to localhost ourselves.
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    options: Any = {"is_master": True, "wait_for_workers": False}
    options["master_listen_fd"] = listener.detach()  # the store closes it
    store = dist.TCPStore("127.0.0.1", port, **options)
    # Messages need a connection of their own, because a connection that waits for a key blocks
    # every other thread that uses it.
    connection = dist.TCPStore("127.0.0.1", port, is_master=False)
    messages = SignedStore(connection, token=secrets.token_hex(32))
    ranks = Ranks(0, world_size, store, messages)
    threads = str(max(1, torch.get_num_threads() // world_size))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "TORCH_CPP_LOG_LEVEL": "ERROR"}
    command = python_command(worker_code)
    for _ in range(1, world_size):
        process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE)
        ranks.workers.append(process)
    for rank, process in enumerate(ranks.workers, start=1):
        _send_bootstrap(process, ranks, rank, port, settings)
    return ranks


def _send_bootstrap(
    worker: subprocess.Popen, ranks: Ranks, rank: int, port: int, settings: Any
) -> None:
    """Write to a worker what `join_as_worker` reads.

    The token is secret, so it travels through a pipe: any user can read a command line.
    """
    bootstrap = {
        "port": port,
        "rank": rank,
        "world_size": ranks.world_size,
        "token": ranks.messages.token,
        "step_timeout": ranks.monitor.step_timeout.total_seconds(),
        "settings": settings,
    }
    stdin = cast(IO[bytes], worker.stdin)  # start_workers opened it as a pipe
    # A worker that has died already breaks the pipe. `Ranks.init_process_group` reports its end.
    with contextlib.suppress(BrokenPipeError), stdin as pipe:
        pipe.write(json.dumps(bootstrap).encode())


def join_as_worker() -> tuple[Ranks, Any]:
    """Return this worker's Ranks and the settings, after `start_workers` has started it."""
    bootstrap = json.load(sys.stdin)
    store = dist.TCPStore("127.0.0.1", bootstrap["port"], is_master=False)
    messages = SignedStore(store, bootstrap["token"])
    ranks = Ranks(bootstrap["rank"], bootstrap["world_size"], store, messages)
    ranks.monitor.step_timeout = timedelta(seconds=bootstrap["step_timeout"])
    return ranks, bootstrap["settings"]


def join_torchrun(world_size: int, engine_number: int) -> Ranks:
    """Return the Ranks of a process that torchrun has started.

    engine_number: counts the engines of this process, so that each has keys of its own in the
    store. Raises ValueError if torchrun has started another number of ranks than `world_size`.
    """
    store, rank, num_started = next(dist.rendezvous("env://", timeout=START_TIMEOUT))
    if num_started != world_size:
        raise ValueError(
            f"tensor_parallel_size={world_size}, but torchrun started {num_started} ranks; both "
            f"must be the same"
        )
    return Ranks(rank, world_size, dist.PrefixStore(f"engine{engine_number}", store))
