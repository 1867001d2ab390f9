"""The ladder: one runnable class a stage, from no cache at all to the whole engine.

stage = STAGES[1](model_folder)                      # stage 01, Recompute
result = stage.run(ladder_workload(stage.vocab_size))

number  class               lesson                  what it adds
01      Recompute           01_naive_generate       nothing is kept: all is computed again
02      ContiguousCache     02_kv_cache             keys and values kept; a padded, static batch
03      PagedStatic         03_paged_blocks         blocks instead of one long place a request
04      PrefixCache         04_prefix_hashing       what prompts share is held once
05      ContinuousBatching  05_scheduler            requests come and go at every step
06      TritonKernels       06_triton_kernels       our own kernels (needs a GPU)
07      GraphsAndOverlap    07_cuda_graphs          captured steps, planned ahead (needs a GPU)
08      TwoRanks            08_tensor_parallelism   the model split over two ranks
"""

from course.stages.common import Recorder, Stage, StageResult
from course.stages.compare import Agreement, compare
from course.stages.contiguous import ContiguousCache
from course.stages.paged import (
    ContinuousBatching,
    GraphsAndOverlap,
    PagedStatic,
    PrefixCache,
    TritonKernels,
    TwoRanks,
)
from course.stages.recompute import Recompute

LADDER: tuple[type[Stage], ...] = (
    Recompute,
    ContiguousCache,
    PagedStatic,
    PrefixCache,
    ContinuousBatching,
    TritonKernels,
    GraphsAndOverlap,
    TwoRanks,
)
STAGES: dict[int, type[Stage]] = {stage.number: stage for stage in LADDER}

__all__ = [
    "LADDER",
    "STAGES",
    "Agreement",
    "ContiguousCache",
    "ContinuousBatching",
    "GraphsAndOverlap",
    "PagedStatic",
    "PrefixCache",
    "Recompute",
    "Recorder",
    "Stage",
    "StageResult",
    "TritonKernels",
    "TwoRanks",
    "compare",
]
