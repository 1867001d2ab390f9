"""Run stages of the ladder on this machine, and record what they do.

course ladder                   every stage this machine can run
course ladder 1 2 3 --runs 3    some of them, three times each
course ladder --draw FILE.svg   draws what is recorded, measures nothing

Each stage is held to the tokens of the first one run. Records go to .course/stages.json.
"""

import argparse
from pathlib import Path

from course.bench import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stages", nargs="*", type=positive, help="numbers (default: all)")
    parser.add_argument("--model", help="a folder or Hugging Face id (default: as lessons measure)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default: auto)")
    parser.add_argument(
        "--runs", default=1, type=positive, metavar="N", help="of each (default: 1)"
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="torch's CPU threads")
    parser.add_argument("--requests", type=positive, metavar="N", help="only the first N requests")
    parser.add_argument("--json", type=Path, metavar="FILE", help="record there instead")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="write the ladder as SVG")


def main(args: argparse.Namespace) -> int:
    from course import plots

    if args.draw is None or args.stages:
        measure(args)
    if args.draw is not None:
        plots.use_style()
        plots.save(plots.ladder(), args.draw)
    return 0


def measure(args: argparse.Namespace) -> None:
    import torch

    from course.models import has_gpu, measured_model
    from course.records import OWN, record
    from course.stages import STAGES, compare
    from course.workload import ladder_workload

    if args.threads:
        torch.set_num_threads(args.threads)
    if unknown := [number for number in args.stages if number not in STAGES]:
        raise ValueError(f"there is no stage {unknown[0]}; there are {', '.join(map(str, STAGES))}")
    cuda = args.device.startswith("cuda") or (args.device == "auto" and has_gpu())
    gpus = torch.cuda.device_count()
    wanted = args.stages or [n for n, stage in STAGES.items() if stage.fits(cuda, gpus)]
    model = args.model or measured_model().path
    reference = None
    for number in wanted:
        stage = STAGES[number](model, args.device)
        workload = ladder_workload(stage.vocab_size, stage.device.type)
        workload = workload.first(args.requests or len(workload.prompts))
        if reference is None:
            print(f"{Path(model).name}: {workload}")
        results = [stage.run(stage.part_of(workload)) for _ in range(args.runs)]
        print(sorted(results, key=lambda r: r.seconds)[len(results) // 2])
        record(results, args.json or OWN)
        if reference is None:
            reference = results[0]
        elif reference.gaps:
            print(f"   against stage {reference.number:02}: {compare(results[0], reference)}")
