"""Worker: a rank that another process started, and that carries out rank 0's commands.

A worker makes the same engine as rank 0. Then it waits for the commands that rank 0 broadcasts (see
`LLMEngine.on_all_ranks`) and carries out each of them, until rank 0 closes the engine or is gone.
"""

import signal
import sys
from typing import Any

import torch

from nanovllm.config import EngineArgs
from nanovllm.distributed.launch import join_as_worker
from nanovllm.engine.llm_engine import LLMEngine


def run_worker() -> None:
    """Run one worker process to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group, rank 0 too
    ranks, settings = join_as_worker()
    engine = LLMEngine(EngineArgs(**settings), ranks=ranks)
    try:
        while run_command(engine, *ranks.broadcast(None)):
            pass
    except torch.distributed.DistError:  # rank 0 is gone
        sys.exit(1)
    except BaseException as error:
        ranks.monitor.report_error(error)
        raise
    finally:
        engine.release(kill=False)


def run_command(engine: LLMEngine, command: str, payload: Any, abandoned_ids: list[str]) -> bool:
    """Carry out one of rank 0's commands on this rank. Return False once the engine is closed.

    abandoned_ids: requests that nobody waits for any more, which are aborted first.
    """
    if abandoned_ids:
        engine.abort_on_this_rank(abandoned_ids)
    match command:
        case "add":
            engine.add_on_this_rank(payload)
        case "abort":
            engine.abort_on_this_rank(payload)
        case "step":
            engine.parents.forget_ended(engine.core.step())
        case "reset_prefix_cache":
            engine.block_manager.reset_prefix_cache()
        case "close":
            return False
        case _:
            raise ValueError(f"rank 0 has sent {command!r}, which is no command of this engine")
    return True
