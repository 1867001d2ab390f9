"""Every stage on one workload, each beside its own roofline; and the engine beside others.

climbed = climb(model, workload, peaks)     # [Rung]: what was measured, and the least it needed
show(*shares(climbed))                      # the share of the roofline that each stage reached
show(*rivals(reference_workloads()))        # recorded on an H200: this engine, vLLM, nano-vLLM
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from course.measure.ladder_workload import LadderWorkload
from course.measure.roofline import Peaks, Work, count_work
from course.show import plots
from course.stages import STAGES, Stage, StageResult
from course.stages.records import SHIPPED

# Output tokens a second on one H200, lowest and highest of several runs: measured before this
# engine was written, with FlashAttention-3, Qwen3-0.6B's shape in bfloat16.
OTHERS = {
    "vLLM 0.24": {"W1": (22_700, 23_200), "W2": (543, 557), "W3": (14_200, 14_800)},
    "nano-vLLM": {"W1": (15_900, 18_200), "W2": (430, 452), "W3": (10_800, 11_300)},
}


@dataclass(frozen=True)
class Rung:
    """One stage: what it did, and what its own steps needed at least."""

    result: StageResult
    works: list[Work]
    peaks: Peaks

    @property
    def floor_seconds(self) -> float:
        """These steps take at least this long; a shared prefix is read for each request."""
        return self.peaks.seconds(self.works)

    @property
    def share(self) -> float:
        return self.floor_seconds / self.result.seconds

    def __str__(self) -> str:
        r = self.result
        moved = sum(work.num_bytes(shared=False) for work in self.works) / 1e9
        flops = sum(work.flops for work in self.works) / 1e9
        ttft, floor = sum(r.ttft) / len(r.ttft), 1e3 * self.floor_seconds / r.num_tokens
        return (
            f"{r.number:02} {r.name:<22} {r.tokens_per_second:8,.0f} {ttft:7.2f} "
            f"{len(self.works):6,} {moved:8,.1f} {flops:9,.1f} {floor:12.3f} {self.share:6.0%}"
        )


HEADER = (
    f"{'stage':<25} {'tok/s':>8} {'TTFT s':>7} {'steps':>6} {'GB':>8} {'GFLOP':>9} "
    f"{'floor ms/tok':>12} {'share':>6}"
)


def climb(model: str, workload: LadderWorkload, peaks: Peaks, numbers: Iterable[int]) -> list[Rung]:
    """Run some stages one after the other on the same requests."""
    rungs = []
    for number in numbers:
        stage = STAGES[number](model)
        job = stage.part_of(workload)
        result = stage.run(job)
        rungs.append(Rung(result, works_of(stage, job), peaks))
    return rungs


def works_of(stage: Stage, workload: LadderWorkload) -> list[Work]:
    """What each step of a stage that has just run needed at least."""
    if stage.number == 1:
        steps = recompute_steps(workload)
    elif stage.number == 2:
        steps = static_steps(workload)
    else:
        steps = stage.trace
    ids = sorted({row[0] for step in steps for row in step.rows}, key=int)
    prompts = map(len, workload.prompts)
    return count_work(stage.config, steps, dict(zip(ids, prompts, strict=True)))


def recompute_steps(workload: LadderWorkload) -> list[Any]:
    """Stage 01's: for each token one row, the whole text so far."""
    lengths = zip(map(len, workload.prompts), workload.num_outputs, strict=True)
    return [
        SimpleNamespace(rows=[(str(i), 0, length + n)])
        for i, (length, count) in enumerate(lengths)
        for n in range(count)
    ]


def static_steps(workload: LadderWorkload) -> list[Any]:
    """Stage 02's, as useful work: padding and rows that are done are not counted."""
    size = max(1, workload.kv_tokens // workload.max_len)
    steps = []
    for first in range(0, len(workload.prompts), size):
        batch = range(first, min(first + size, len(workload.prompts)))
        lengths = {i: len(workload.prompts[i]) for i in batch}
        steps.append([(str(i), 0, lengths[i]) for i in batch])
        for n in range(1, max(workload.num_outputs[i] for i in batch)):
            running = [i for i in batch if n < workload.num_outputs[i]]
            steps.append([(str(i), lengths[i] + n - 1, 1) for i in running])
    return [SimpleNamespace(rows=rows) for rows in steps]


def shares(rungs: list[Rung]) -> tuple[Any, str]:
    """Measured seconds of each stage, and within them the least its steps needed."""
    names = [f"{r.result.number:02} {r.result.name}" for r in rungs]
    machine = rungs[0].result.machine
    fig, axes = plots.figure("Measured seconds, and the floor within", machine, height=3.2)
    measured = [r.result.seconds for r in rungs]
    axes.barh(names, measured, color=plots.SKY, label="measured")
    axes.barh(
        names,
        [r.floor_seconds for r in rungs],
        height=0.4,
        color=plots.BLUE,
        hatch="//",
        edgecolor="white",
        label="floor of the same steps",
    )
    for y, rung in enumerate(rungs):
        axes.annotate(f" {rung.share:.0%}", (rung.result.seconds, y), va="center", fontsize=9)
    axes.set(xlabel="seconds")
    axes.invert_yaxis()
    axes.legend(loc="lower right")
    words = "; ".join(
        f"{name} {rung.result.seconds:.2f} s, floor {rung.floor_seconds:.2f} s"
        for name, rung in zip(names, rungs, strict=True)
    )
    return fig, f"Seconds of each stage on {machine}, and its floor: {words}."


def reference_workloads(file: Path = SHIPPED / "h200_workloads.json") -> dict[str, Any]:
    """The finished engine's record on an H200: its machine, peaks and workloads W1, W2, W3."""
    return json.loads(file.read_text())


def rivals(report: dict[str, Any]) -> tuple[Any, str]:
    """Recorded throughput of three engines on three workloads, a panel each."""
    fig, panels = plots.figure("Output tokens a second", report["machine"], columns=3, height=3.0)
    words = []
    for axes, (name, entry) in zip(panels, report["workloads"].items(), strict=True):
        spread = entry["slowest_tokens_per_second"], entry["fastest_tokens_per_second"]
        ranges = {engine: values[name] for engine, values in OTHERS.items()}
        for y, (engine, (low, high)) in enumerate({"this engine": spread, **ranges}.items()):
            axes.barh(engine, high, color=plots.COLOURS[y], hatch=plots.HATCHES[y], alpha=0.8)
            words.append(f"{name} {engine} {low:,.0f} to {high:,.0f}")
        axes.set(title=name, xlabel="tok/s", xlim=(0, None))
        axes.invert_yaxis()
        if axes is not panels[0]:
            axes.set_yticklabels([])
    return fig, "Recorded output tokens a second, slowest to fastest run: " + "; ".join(words) + "."


def run_vllm(path: Path | str) -> float:
    """W2 on this machine's vLLM, tokens a second: 128 tokens in, 512 out, the second of two runs.

    ImportError where vLLM is not installed.
    """
    import time

    from vllm import LLM, SamplingParams

    llm = LLM(str(path), max_model_len=1024, skip_tokenizer_init=True)
    params = SamplingParams(temperature=0, max_tokens=512, ignore_eos=True, detokenize=False)
    for seed in (1, 2):  # the first warms up
        start = time.perf_counter()
        llm.generate({"prompt_token_ids": [seed] * 128}, params, use_tqdm=False)
    return 512 / (time.perf_counter() - start)
