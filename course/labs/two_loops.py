"""Lesson 07's runs of the engine's two loops, and what is watched in them.

    with watching(engine) as log: ...   # "plan 1", "launch 1", "read 1", in order
    with uploads() as sent: ...         # bytes of each piece that the host sends
    order(overlapped=True)              # that log of one request of three tokens
    four_stories(overlapped=True)       # how each of four stories ended, and the rows computed

An engine that is watched is as before once the `with` block is left.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from course.serving import queue, run, start_engine
from nanovllm.sampling_params import SamplingParams

STORIES = 2 * ["Tell a funny story about a fox.", "Tell a sad story about a cat."]


@contextmanager
def watching(engine: Any) -> Iterator[list[str]]:
    """The order in which an engine's loop plans, launches and reads its steps."""
    core, log, counts = engine.core, [], {"plan": 0, "launch": 0, "read": 0}

    def noted(what: str, function: Any) -> Any:
        def run(*args: Any) -> Any:
            counts[what] += 1
            log.append(f"{what} {counts[what]}")
            return function(*args)

        return run

    def launch(batch: Any) -> Any:
        tokens = noted("launch", runner_launch)(batch)
        tokens.read = noted("read", tokens.read)
        return tokens

    runner_launch = core.runner.launch
    with (
        patch.object(core.scheduler, "schedule", noted("plan", core.scheduler.schedule)),
        patch.object(core.runner, "launch", launch),
    ):
        yield log


@contextmanager
def uploads() -> Iterator[list[int]]:
    """The bytes of every piece that the host sends to the device."""
    from nanovllm.engine import adjustments, input_batch, model_runner, prompt_logprobs

    sent: list[int] = []

    def upload(values: Any, device: Any) -> Any:
        tensor = original(values, device)
        sent.append(tensor.numel() * tensor.element_size())
        return tensor

    original = input_batch.upload
    with ExitStack() as patches:
        for module in (adjustments, input_batch, model_runner, prompt_logprobs):
            patches.enter_context(patch.object(module, "upload", upload))
        yield sent


def order(overlapped: bool) -> list[str]:
    """What one of the two loops does for one request of three tokens, in order."""
    engine = start_engine(async_scheduling=overlapped)
    queue(engine, "a", [5, 6, 7], count=3)
    with watching(engine) as log:
        run(engine)
    return log


def four_stories(overlapped: bool) -> tuple[list[str | None], int]:
    """Four greedy stories, at most 400 tokens each: why each ended, and the rows of all steps.

    A row is one token computed, of a prompt or of an answer.
    """
    engine = start_engine(async_scheduling=overlapped, max_model_len=512)
    params = SamplingParams(temperature=0, max_tokens=400)
    requests = [engine.make_request(str(i), text, params) for i, text in enumerate(STORIES)]
    seqs = engine.add(requests)
    run(engine)
    return [seq.finish_reason for seq in seqs], sum(step.num_tokens for step in engine.trace)
