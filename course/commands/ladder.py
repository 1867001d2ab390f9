"""Run stages of the ladder on this machine, and record what they do.

course ladder                   every stage this machine can run that is not recorded yet
course ladder 1 2 3 --again     some of them, recorded or not
course ladder --draw FILE.svg   draws what is recorded, measures nothing (.png as well)

Records go to .course/stages.json, each as soon as its stage is done: stopped, the same command goes
on from there. Each stage is held to the tokens of the first one that was run.
"""

import argparse
from pathlib import Path
from typing import Any

from course.arguments import local_path, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stages", nargs="*", type=positive, help="numbers (default: all)")
    parser.add_argument("--model", help="a folder or Hugging Face id (default: as lessons measure)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default: auto)")
    parser.add_argument(
        "--runs", default=1, type=positive, metavar="N", help="of each (default: 1)"
    )
    parser.add_argument("--again", action="store_true", help="also what is recorded already")
    parser.add_argument("--threads", type=positive, metavar="N", help="torch's CPU threads")
    parser.add_argument(
        "--requests", type=positive, metavar="N", help="only the first N requests; needs --json"
    )
    parser.add_argument("--json", type=local_path, metavar="FILE", help="record there instead")
    draw = parser.add_argument_group("drawing")
    draw.add_argument(
        "--draw", type=local_path, nargs="+", metavar="FILE", help="to .svg, .png or both"
    )
    draw.add_argument("--shipped", action="store_true", help="only what the course brings along")


def main(args: argparse.Namespace) -> int:
    for file in args.draw or ():
        if file.suffix not in (".svg", ".png"):
            raise ValueError(f"--draw draws to .svg or .png, not {file.suffix or file}")
    if not args.draw or args.stages:
        measure(args)
    for file in args.draw or ():
        draw(file, args.shipped)
    return 0


def draw(file: Path, shipped: bool) -> None:
    """The recorded ladder as a picture; the same records give the same bytes of SVG."""
    from course.show import plots

    plots.use_style()
    rows = [row for row in plots.load() if not shipped or row.origin == "shipped"]
    plots.save(plots.ladder(records=rows), file)
    print(f"The ladder is in {file}.")


def measure(args: argparse.Namespace) -> None:
    import torch
    from tqdm.auto import tqdm

    from course.models.choice import has_gpu, measured_model
    from course.stages import STAGES, compare
    from course.stages.records import OWN, record

    if args.threads:
        torch.set_num_threads(args.threads)
    if unknown := [number for number in args.stages if number not in STAGES]:
        raise ValueError(f"there is no stage {unknown[0]}; there are {', '.join(map(str, STAGES))}")
    if args.requests and not args.json:
        raise ValueError(
            "--requests needs --json FILE: a part of the workload is no rung of your ladder, "
            "which .course/stages.json holds"
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    cuda = args.device.startswith("cuda") or (args.device == "auto" and has_gpu())
    gpus = torch.cuda.device_count()
    wanted = args.stages or [n for n, stage in STAGES.items() if stage.fits(cuda, gpus)]
    model = args.model or measured_model().path
    reference = None
    with tqdm(wanted, disable=None, unit="stage") as bar:
        for number in bar:
            stage = STAGES[number](model, args.device)
            bar.set_description(stage.name)
            job = work_of(stage, args)
            if not args.again and (done := recorded(stage, job, args)):
                bar.write(f"{done} (recorded; --again measures it once more)")
                continue
            results = [stage.run(job) for _ in range(args.runs)]
            bar.write(str(sorted(results, key=lambda r: r.seconds)[len(results) // 2]))
            record(results, args.json or OWN)
            reference = reference or results[0]
            if reference is not results[0] and reference.gaps:
                same = compare(results[0], reference)
                bar.write(f"   against stage {reference.number:02}: {same}")


def work_of(stage: Any, args: argparse.Namespace) -> Any:
    from course.measure.ladder_workload import ladder_workload

    workload = ladder_workload(stage.vocab_size, stage.device.type)
    return stage.part_of(workload.first(args.requests or len(workload.prompts)))


def recorded(stage: Any, job: Any, args: argparse.Namespace) -> Any:
    """This machine's record of the stage on this workload, if there is one of as many runs."""
    from course import machine
    from course.stages.records import OWN, read

    here = machine.describe(stage.device.type), machine.versions(), stage.folder.name, str(job)
    for row in read(args.json or OWN, "yours"):
        same = (row.machine, row.versions, row.model, row.workload) == here
        if same and row.stage == stage.number and row.runs >= args.runs:
            return row
    return None
