"""An engine in two calls, for lessons that look inside it: start it, and ask it.

engine = start_engine(enable_prefix_caching=False)
seqs = ask(engine, prompts, count=8)      # the requests: tokens, block tables, metrics

`queue` and `run` are the halves of `ask`, for requests with names, or that come at their own time.
"""

from collections.abc import Sequence as Several
from typing import Any

from course.models.choice import own_model
from nanovllm.config import EngineArgs
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams

SIMPLE: dict[str, Any] = {  # one step after the other, nothing captured, a small cache
    "num_gpu_blocks_override": 512,
    "max_num_batched_tokens": 4096,
    "enforce_eager": True,
    "async_scheduling": False,
    "use_tqdm_on_load": False,
}


def start_engine(
    block_manager_class: type = BlockManager,
    model: str | None = None,
    device: str = "cpu",
    scheduler_class: type = Scheduler,
    store_kv: Any = None,
    **options: Any,
) -> LLMEngine:
    """An engine of `model` (None: the course's own) on `device`; options as in EngineArgs.

    Classes, and the function that stores keys and values, may be one's own: see LLMEngine.
    """
    args = EngineArgs(model or str(own_model()), device=device, **SIMPLE | options)
    own = {"block_manager_class": block_manager_class, "scheduler_class": scheduler_class}
    return LLMEngine(args, **own, store_kv=store_kv)


def queue(
    engine: LLMEngine, name: str, prompt: list[int], count: int, ignore_eos: bool = True
) -> Sequence:
    """Queue one request, named for the trace: greedy, to `count` tokens."""
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=ignore_eos)
    [seq] = engine.add([engine.make_request(name, prompt, params)])
    return seq


def run(engine: LLMEngine) -> list[tuple[tuple[str, int, int], ...]]:
    """Answer all that is queued; the rows of every step so far."""
    while engine.has_unfinished_requests():
        engine.advance()
    return [record.rows for record in engine.trace]


def ask(
    engine: LLMEngine, prompts: Several[list[int]], count: int = 1, ignore_eos: bool = True
) -> list[Sequence]:
    """Queue prompts (token ids), run until all have `count` greedy tokens; the requests."""
    names = range(engine.num_requests, engine.num_requests + len(prompts))
    seqs = [
        queue(engine, str(name), prompt, count, ignore_eos)
        for name, prompt in zip(names, prompts, strict=True)
    ]
    run(engine)
    return seqs
