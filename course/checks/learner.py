"""A learner's pieces inside the real thing.

stage_with(decode_step)             the stage of lesson 02, with a decode step of one's own
manager_with(block_keys)            a block manager that trusts one's own keys
scheduler_with(first_to_compute)    a scheduler that asks where a prompt's computing begins

Whole classes need no help: LLMEngine and course.serving.start_engine take them. Classes of several
exercises that each replace some methods become one by inheriting from all:

    mine = joined(load("04", "my_prefix_cache").MyPrefixCache, load("03", "my_blocks").MyBlocks)
    engine = start_engine(mine, scheduler_class=load("05", "my_scheduler").MyScheduler)
"""

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any

from torch import Tensor

from course.measure.ladder_workload import LadderWorkload
from course.models.choice import own_model
from course.stages import ContiguousCache, contiguous
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Batch, Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.layers.attention import rope_store, store_kv
from nanovllm.layers.backend import TORCH_BACKEND
from nanovllm.metadata import PhaseMetadata


def stage_with(decode_step: Callable[..., Tensor] | None = None) -> ContiguousCache:
    """Stage 02 over the course's own model on the CPU, ready to prefill and decode.

    decode_step(query, key, value, k_cache, v_cache, lengths) takes the place of storing and
    attending wherever a pass has one new token a row. None: the stage as it is.
    """
    stage = ContiguousCache(own_model(), device="cpu")
    if decode_step is not None:
        stage.backend = backend_with(decode_step)
    stage.prepare(LadderWorkload([[0]], [1], 0))
    return stage


def backend_with(decode_step: Callable[..., Tensor]) -> Any:
    fresh: list[Tensor] = []  # keys and values of the layer that runs

    def keep(key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
        fresh[:] = [key, value]
        if len(slots) > len(k_cache):  # more than one token a row
            store_kv(key, value, k_cache, v_cache, slots)

    def project(*args: Any) -> Tensor:
        return rope_store(*args, store=keep)

    def attend(
        query: Tensor, k_cache: Tensor, v_cache: Tensor, metadata: PhaseMetadata, scale: float
    ) -> Tensor:
        if metadata.max_query_len > 1:
            return contiguous.attend(query, k_cache, v_cache, metadata, scale)
        return decode_step(query, *fresh, k_cache, v_cache, metadata.seq_lens - 1)

    return replace(TORCH_BACKEND, rope_store=project, prefill_attention=attend)


def joined(*classes: type) -> type:
    """One class with the methods of all; where two define the same, the first one's counts.

    A class that another derives from, such as the engine's own, may be among them.
    """
    if None in classes:
        raise TypeError("joined takes classes; leave out what is None")
    unlike = list(dict.fromkeys(classes))
    kept = [c for c in unlike if not any(o is not c and issubclass(o, c) for o in unlike)]
    return type("Joined", tuple(kept), {})


def manager_with(block_keys: Callable[[list[int], int], list[bytes]]) -> type[BlockManager]:
    """A manager whose keys are block_keys(token_ids, block_size)."""

    class WithKeys(BlockManager):
        def block_hash(self, seq: Sequence, index: int) -> bytes:
            return block_keys(seq.token_ids, self.block_size)[index]

    return WithKeys


def scheduler_with(first_to_compute: Callable[[int, int, int], int]) -> type[Scheduler]:
    """A scheduler that admits with first_to_compute(num_tokens, num_hits, block_size)."""

    class Admits(Scheduler):
        def schedule_waiting(self, batch: Batch, budget: int) -> None:
            while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
                seq, manager = self.waiting[0], self.block_manager
                cached_block_ids = manager.find_cached_blocks(seq)
                if not self.can_admit(seq, cached_block_ids):
                    break
                start = first_to_compute(
                    len(seq.token_ids), len(cached_block_ids), manager.block_size
                )
                num_tokens = min(len(seq.token_ids) - start, budget)
                self.waiting.popleft()
                self.admit(seq, cached_block_ids, start)
                batch.append(self.schedule_tokens(seq, num_tokens, admitted=True))
                budget -= num_tokens

    return Admits


PIECES = {"my_blocks": "03", "my_prefix_cache": "04", "my_scheduler": "05", "my_store": "06"}
NAMES = {
    "my_blocks": "MyBlocks",
    "my_prefix_cache": "MyPrefixCache",
    "my_scheduler": "MyScheduler",
    "my_store": "store_kv",
}


def own_pieces() -> dict[str, Any]:
    """What the learner wrote for the engine, by exercise; None where its check does not pass."""
    return {name: own_piece(number, name) for name, number in PIECES.items()}


def own_piece(number: str, name: str) -> Any:
    """The class or function of one exercise, or None; prints which it is, and why."""
    from course.checks import CheckFailed
    from course.checks.core import run_check
    from course.checks.exercises import all_places, load
    from course.checks.notes import check_of

    places = [p for p in all_places() if (p.number, p.exercise.name) == (number, name)]
    if not places:
        print(f"{number} {name}: there is no such exercise here; the engine's own")
        return None
    try:
        defined = load(number, name)
        with redirect_stdout(io.StringIO()):
            run_check(check_of(places[0]), defined)
    except CheckFailed as reason:
        print(f"{number} {name}: the engine's own, as yours does not pass: {str(reason)[:70]} ...")
        return None
    except (Exception, SystemExit) as error:  # the learner's page may hold anything
        said = f"{type(error).__name__}: {error}"
        print(f"{number} {name}: the engine's own, as yours does not run: {said[:70]} ...")
        return None
    print(f"{number} {name}: yours")
    return getattr(defined, NAMES[name])
