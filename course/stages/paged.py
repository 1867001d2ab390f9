"""Stages 03 to 08: the engine itself, with what later lessons add switched off.

Each stage says which of the engine's options it turns on; the rest is one loop. 03 and 04 also have
a scheduler of their own: it forms a batch, and lets nobody in until all of it is done.
"""

from typing import Any, ClassVar

from course.measure.ladder_workload import LadderWorkload
from course.stages.common import Recorder, Stage
from nanovllm.config import EngineArgs
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.scheduler import Batch, Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import StepRecord
from nanovllm.sampling_params import SamplingParams

BLOCK_SIZE = 16
PLAIN = {  # the engine as lesson 03 leaves it
    "block_size": BLOCK_SIZE,
    "attention_backend": "torch",
    "enable_prefix_caching": False,
    "async_scheduling": False,
    "enforce_eager": True,
    "use_tqdm_on_load": False,
    "skip_tokenizer_init": True,
}


class StaticScheduler(Scheduler):
    """Whole batches: requests come in together, and the next ones when the last one is done.

    A request is admitted only if there are blocks for all it may ever need.
    """

    def schedule_waiting(self, batch: Batch, budget: int) -> None:
        if not self.running:
            super().schedule_waiting(batch, budget)

    def can_admit(self, seq: Sequence, cached_block_ids: list[int]) -> bool:
        manager = self.block_manager
        promised = sum(manager.num_new_blocks(other, other.max_length) for other in self.running)
        needed = manager.num_new_blocks(seq, seq.max_length) - len(cached_block_ids)
        return needed + promised <= manager.num_free_after_touch(cached_block_ids)


class EngineStage(Stage):
    """A stage that is the engine with some options."""

    scheduler_class: type = Scheduler
    options: ClassVar[dict[str, Any]] = {}  # what differs from PLAIN
    engine: LLMEngine
    trace: list[StepRecord]  # the steps of the last run, without those that warmed up

    def prepare(self, workload: LadderWorkload) -> None:
        args = EngineArgs(
            str(self.folder),
            device=self.args.device,
            dtype=str(self.config.dtype),
            max_model_len=workload.max_len,
            num_gpu_blocks_override=workload.kv_tokens // BLOCK_SIZE,
            **(PLAIN | self.budget(workload) | self.options),
        )
        self.engine = LLMEngine(args, scheduler_class=self.scheduler_class)

    def budget(self, workload: LadderWorkload) -> dict[str, int]:
        """Rows and tokens a step may have: as many as there are."""
        prompt_tokens = sum(map(len, workload.prompts))
        return {
            "max_num_seqs": len(workload.prompts),
            "max_num_batched_tokens": max(prompt_tokens, workload.max_len),
        }

    def release(self) -> None:
        self.engine.close()
        del self.engine

    def serve(self, workload: LadderWorkload, recorder: Recorder) -> None:
        seqs = self.add(workload)
        request_of = {seq: i for i, seq in enumerate(seqs)}
        manager = self.engine.block_manager
        fewest, begun = manager.num_blocks, len(self.engine.trace)
        while self.engine.has_unfinished_requests():
            for seq in self.engine.advance():  # those that got a token
                recorder.token(request_of[seq], seq.token_ids[-1])
            if manager.num_free_blocks < fewest:  # only a new peak is worth counting
                fewest = manager.num_free_blocks
                reserved = manager.num_blocks * manager.block_size
                recorder.cache(reserved, live_tokens(seqs, manager.block_size))
        self.trace = self.engine.trace[begun:]

    def add(self, workload: LadderWorkload) -> list[Sequence]:
        """Queue all requests at once: greedy, each to its exact number of tokens."""
        first = self.engine.num_requests
        requests = [
            self.engine.make_request(
                str(first + i),
                prompt,
                SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False),
            )
            for i, (prompt, n) in enumerate(
                zip(workload.prompts, workload.num_outputs, strict=True)
            )
        ]
        return self.engine.add(requests)


def live_tokens(seqs: list[Sequence], block_size: int) -> int:
    """Tokens whose keys and values are in blocks that a sequence holds; a shared block once."""
    filled: dict[int, int] = {}
    for seq in seqs:
        for index, block_id in enumerate(seq.block_table):
            held = min(block_size, max(0, seq.num_computed - index * block_size))
            filled[block_id] = max(held, filled.get(block_id, 0))
    return sum(filled.values())


class PagedStatic(EngineStage):
    """A request takes the blocks it needs, instead of a place as long as the longest."""

    number, name, lesson = 3, "paged, static batch", "03_paged_blocks"
    scheduler_class = StaticScheduler


class PrefixCache(EngineStage):
    """What prompts have in common is computed once, and held once."""

    number, name, lesson = 4, "+ prefix cache", "04_prefix_hashing"
    scheduler_class = StaticScheduler
    options: ClassVar[dict[str, Any]] = {"enable_prefix_caching": True}


class ContinuousBatching(EngineStage):
    """A request comes in as soon as there is room, its prompt in chunks if need be."""

    number, name, lesson = 5, "+ continuous batching", "05_scheduler"
    options: ClassVar[dict[str, Any]] = PrefixCache.options

    def budget(self, workload: LadderWorkload) -> dict[str, int]:
        """A step has as many tokens as a request may have at most: longer prompts are chunked."""
        return super().budget(workload) | {"max_num_batched_tokens": workload.max_len}


class TritonKernels(ContinuousBatching):
    """The same, with our own kernels."""

    number, name, lesson = 6, "+ Triton kernels", "06_triton_kernels"
    needs = "cuda"
    options: ClassVar[dict[str, Any]] = {
        **ContinuousBatching.options,
        "attention_backend": "triton",
    }


class GraphsAndOverlap(TritonKernels):
    """Steps of the GPU are recorded and replayed, and planned one ahead."""

    number, name, lesson = 7, "+ graphs, overlap", "07_cuda_graphs"
    options: ClassVar[dict[str, Any]] = {
        **TritonKernels.options,
        "enforce_eager": False,
        "async_scheduling": True,
    }


class TwoRanks(ContinuousBatching):
    """The model split over two ranks, on one machine's CPU or on two of its GPUs.

    On GPUs it is stage 07 split, its steps recorded with the collectives in them; a CPU has no
    graphs to record, and its kernels are torch's.
    """

    number, name, lesson = 8, "+ two ranks", "08_tensor_parallelism"
    options: ClassVar[dict[str, Any]] = {
        **GraphsAndOverlap.options,
        "attention_backend": "auto",
        "tensor_parallel_size": 2,
    }

    @classmethod
    def fits(cls, cuda: bool, gpus: int) -> bool:
        return not cuda or gpus >= 2
