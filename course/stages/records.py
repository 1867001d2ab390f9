"""What a stage was measured to do, as JSON: the reader's own records, and those that ship.

    results = [stage.run(workload) for _ in range(3)]
    record(results)            # into .course/stages.json, which git ignores
    load()                     # all that is known: shipped first, then the reader's own
    measured(stage, workload)  # this machine's record; the stage is run once if there is none

A file is a list of records, one for each stage, model and machine; measuring again replaces it.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from course import machine
from course.arguments import command_line
from course.clone import ROOT
from course.files import locked, write_whole
from course.measure.ladder_workload import LadderWorkload
from course.stages.common import Stage, StageResult, mean, mib

OWN = ROOT / ".course" / "stages.json"
SHIPPED = ROOT / "figures" / "data"  # stages_*.json, one file a machine
NUMBERS = (
    "seconds",
    "tokens_per_second",
    "ttft_mean_seconds",
    "tpot_mean_seconds",
    "kv_reserved_bytes",
    "kv_live_bytes",
    "peak_memory_bytes",
)


@dataclass(frozen=True)
class Record:
    """One stage on one machine: the median of its runs, and how far they lie apart."""

    stage: int
    name: str
    lesson: str
    model: str
    dtype: str
    device: str  # "cpu" or "cuda"
    machine: str
    versions: dict[str, str]
    workload: str
    command: str  # what made the record
    runs: int
    numbers: dict[str, float]  # NUMBERS, the median of the runs
    spread: dict[str, list[float]]  # of each: lowest and highest
    origin: str = field(default="yours", compare=False)  # or "shipped"; not written

    @property
    def key(self) -> tuple[int, str, str, str]:
        """What a newer record replaces an older one by."""
        return self.stage, self.machine, self.model, self.workload

    def __str__(self) -> str:
        n = self.numbers
        return (
            f"{self.stage:02} {self.name}: {n['tokens_per_second']:,.0f} tok/s; "
            f"TTFT {1000 * n['ttft_mean_seconds']:,.0f} ms, "
            f"TPOT {1000 * n['tpot_mean_seconds']:,.1f} ms; "
            f"KV {mib(round(n['kv_live_bytes']))} live{', as recorded' * (self.origin != 'yours')}"
        )

    @property
    def source(self) -> tuple[str, str, str]:
        """Records of one source make one ladder: (origin, machine, model)."""
        return self.origin, self.machine, self.model


def make_record(results: StageResult | Sequence[StageResult], command: str | None = None) -> Record:
    """The record of one or several runs of one stage on one workload."""
    runs = [results] if isinstance(results, StageResult) else list(results)
    first = runs[0]
    if any((run.number, run.workload) != (first.number, first.workload) for run in runs):
        raise ValueError("a record is of one stage and one workload, got several")
    values = {name: [float(numbers_of(run)[name]) for run in runs] for name in NUMBERS}
    return Record(
        stage=first.number,
        name=first.name,
        lesson=first.lesson,
        model=first.model,
        dtype=first.dtype,
        device=first.device,
        machine=first.machine,
        versions=machine.versions(),
        workload=str(first.workload),
        command=command or this_command(),
        runs=len(runs),
        numbers={name: statistics.median(v) for name, v in values.items()},
        spread={name: [min(v), max(v)] for name, v in values.items()},
    )


def numbers_of(result: StageResult) -> dict[str, float]:
    """The numbers of one run that a record keeps."""
    later = [value for value in result.tpot if value is not None]
    means = {"ttft_mean_seconds": mean(result.ttft), "tpot_mean_seconds": mean(later)}
    return means | {name: getattr(result, name) for name in NUMBERS if name not in means}


def this_command() -> str:
    """How this process was started, without folders; a notebook's kernel is a notebook."""
    if "ipykernel" in sys.modules:
        return "a notebook"
    if Path(sys.argv[0]).stem in ("course", "__main__"):
        return command_line(sys.argv[1:])
    return Path(sys.argv[0]).name


def record(
    results: StageResult | Sequence[StageResult], file: Path = OWN, command: str | None = None
) -> Record:
    """Write the record of a stage's runs into `file`, in place of an older one like it."""
    new = make_record(results, command)
    with locked(file):
        kept = [old for old in read(file, new.origin) if old.key != new.key]
        rows = sorted([*kept, new], key=lambda r: (r.machine, r.model, r.stage))
        text = json.dumps([without_origin(row) for row in rows], indent=2)
        write_whole(file, text + "\n")
    return new


def without_origin(row: Record) -> dict[str, Any]:
    return {name: value for name, value in asdict(row).items() if name != "origin"}


def read(file: Path, origin: str) -> list[Record]:
    """The records in a file; none if it is not there. ValueError if it holds something else."""
    if not file.exists():
        return []
    names = {f.name for f in fields(Record)} - {"origin"}
    try:
        rows = json.loads(file.read_text())
        if not all(set(row) == names for row in rows):
            raise ValueError("its fields are not those of a record")
        return [Record(**row, origin=origin) for row in rows]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file.name} holds no stage records ({error}); delete it") from error


def load(own: Path = OWN, shipped: Path = SHIPPED) -> list[Record]:
    """All records: those that ship with the course, then the reader's own."""
    found = [row for file in sorted(shipped.glob("stages_*.json")) for row in read(file, "shipped")]
    return found + read(own, "yours")


def measured(
    stage: Stage, workload: LadderWorkload, own: Path = OWN, shipped: Path = SHIPPED
) -> Record:
    """This machine's newest record of a stage; the stage is run once if there is none."""
    device = stage.device.type
    key = stage.number, machine.describe(device), stage.folder.name, str(workload)
    known = [row for row in load(own, shipped) if row.key == key]
    return known[-1] if known else record(stage.run(workload), own)
