"""What all stages share: how a stage is run, what is measured, and what comes out.

    stage = Recompute(model_folder)
    result = stage.run(ladder_workload(stage.vocab_size))
    print(result)

Memory is three numbers. A cache is reserved before anybody needs it, so what is reserved and what
holds tokens differ; the peak of the whole process (on a GPU: of what torch allocated there) has the
weights and everything passing in it.
"""

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from course import machine
from course.measure.engine_runs import check_counts
from course.measure.ladder_workload import LadderWorkload
from course.measure.roofline import kv_bytes_per_token
from course.measure.timing import synchronize
from nanovllm.checkpoint.config_json import read_model_config
from nanovllm.checkpoint.hub import find_model
from nanovllm.checkpoint.weights import resolve_dtype
from nanovllm.config import EngineArgs
from nanovllm.engine.arg_utils import resolve_args


@dataclass(frozen=True)
class StageResult:
    """One run of one stage."""

    number: int
    name: str
    lesson: str
    model: str  # the last part of its folder's name
    dtype: str
    machine: str
    device: str  # "cpu" or "cuda"
    workload: LadderWorkload
    seconds: float  # from the first request's arrival (all arrive at once) to the last token
    token_ids: list[list[int]]  # of each request, as produced
    ttft: list[float]  # seconds from arrival to each request's first token, waiting included
    tpot: list[float | None]  # seconds a token after the first; None for a single token
    kv_reserved_bytes: int  # set aside for keys and values at the peak
    kv_live_bytes: int  # of them, those that held a token's keys and values at the peak
    peak_memory_bytes: int
    gaps: list[list[float]] = field(default_factory=list)  # best logit minus second best, if kept

    @property
    def num_tokens(self) -> int:
        """Output tokens of all requests."""
        return sum(map(len, self.token_ids))

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds

    def __str__(self) -> str:
        tpot = [value for value in self.tpot if value is not None]
        return (
            f"{self.number:02} {self.name}: {self.num_tokens:,} tokens in {self.seconds:.2f} s, "
            f"{self.tokens_per_second:,.1f} tok/s; TTFT {1000 * mean(self.ttft):,.0f} ms, "
            f"TPOT {1000 * mean(tpot):,.1f} ms on average\n"
            f"   KV {mib(self.kv_reserved_bytes)} reserved, {mib(self.kv_live_bytes)} live; "
            f"peak {mib(self.peak_memory_bytes)}"
        )


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


class Recorder:
    """What a stage tells while it runs: each token as it comes, and how the cache stands."""

    def __init__(self, num_requests: int):
        self.token_ids: list[list[int]] = [[] for _ in range(num_requests)]
        self.gaps: list[list[float]] = [[] for _ in range(num_requests)]
        self.times: list[list[float]] = [[] for _ in range(num_requests)]  # of each token
        self.reserved_tokens = self.live_tokens = 0  # at the peak of live tokens
        self.start = time.perf_counter()

    def token(self, request: int, token_id: int, gap: float | None = None) -> None:
        """A request got its next token; `gap` is by how much it won over the second best."""
        self.token_ids[request].append(token_id)
        self.times[request].append(time.perf_counter() - self.start)
        if gap is not None:
            self.gaps[request].append(gap)

    def cache(self, reserved: int, live: int) -> None:
        """There is room for `reserved` tokens' keys and values, and `live` of them are there."""
        if live >= self.live_tokens:
            self.reserved_tokens, self.live_tokens = reserved, live


class Stage:
    """One rung of the ladder. A subclass says who it is, and how it serves a workload."""

    number: ClassVar[int]
    name: ClassVar[str]
    lesson: ClassVar[str]
    needs: ClassVar[str | None] = None  # "cuda" if it runs nowhere else

    def __init__(self, model: str | Path, device: str = "auto", dtype: str = "auto"):
        """model: a folder or Hugging Face id; device: "cpu", "cuda" or "auto"."""
        folder = find_model(str(model), None)
        config = read_model_config(folder)
        self.args = resolve_args(
            EngineArgs(str(folder), device=device, use_tqdm_on_load=False), config
        )
        self.device = torch.device(self.args.device)
        if self.needs == "cuda" and self.device.type != "cuda":
            raise ValueError(f"stage {self.number:02} ({self.name}) needs an NVIDIA GPU")
        self.config = replace(config, dtype=resolve_dtype(dtype, config, self.device))
        self.folder = folder

    @classmethod
    def fits(cls, cuda: bool, gpus: int) -> bool:
        """Whether a machine can run it: one with that many GPUs, or none."""
        return cuda or cls.needs is None

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def part_of(self, workload: LadderWorkload) -> LadderWorkload:
        """What of the ladder's workload it is measured on: all of it, if that takes seconds."""
        return workload

    def run(self, workload: LadderWorkload) -> StageResult:
        """Serve a workload once to warm up (two short requests), then as it is, on the clock.

        Raises RuntimeError unless every request got exactly the tokens it was to get.
        """
        self.prepare(workload)
        try:
            warm = workload.warm_up(self.vocab_size)
            self.serve(warm, Recorder(len(warm.prompts)))
            machine.reset_peak_memory(self.device.type)
            synchronize()
            recorder = Recorder(len(workload.prompts))
            self.serve(workload, recorder)
            seconds = time.perf_counter() - recorder.start
            return self._result(workload, recorder, seconds)
        finally:
            self.release()

    def prepare(self, workload: LadderWorkload) -> None:
        """Load what serving needs; not timed."""

    def serve(self, workload: LadderWorkload, recorder: Recorder) -> None:
        """Answer every request, telling the recorder of each token."""
        raise NotImplementedError

    def release(self) -> None:
        """Give back what `prepare` took."""

    def _result(self, workload: LadderWorkload, recorder: Recorder, seconds: float) -> StageResult:
        check_counts(workload.num_outputs, list(map(len, recorder.token_ids)))
        token_bytes = kv_bytes_per_token(self.config)
        return StageResult(
            number=self.number,
            name=self.name,
            lesson=self.lesson,
            model=self.folder.name,
            dtype=str(self.config.dtype).removeprefix("torch."),
            machine=machine.describe(self.device.type),
            device=self.device.type,
            workload=workload,
            seconds=seconds,
            token_ids=recorder.token_ids,
            ttft=[times[0] for times in recorder.times],
            tpot=[tpot(times) for times in recorder.times],
            kv_reserved_bytes=recorder.reserved_tokens * token_bytes,
            kv_live_bytes=recorder.live_tokens * token_bytes,
            peak_memory_bytes=machine.peak_memory_bytes(self.device.type),
            gaps=recorder.gaps if any(recorder.gaps) else [],
        )


def tpot(times: list[float]) -> float | None:
    """Time per output token after the first, of the times at which tokens came."""
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


def greedy(logits: Any) -> tuple[list[int], list[float]]:
    """The best id of each row of logits [rows, vocab_size], and its lead over the second best."""
    values, ids = logits.float().topk(2, dim=1)
    return ids[:, 0].tolist(), (values[:, 0] - values[:, 1]).tolist()
