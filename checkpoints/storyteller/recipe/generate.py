"""Write stories with SmolLM2 through this engine.

    python -m checkpoints.storyteller.recipe.generate FOLDER

Every story's outline is drawn from its number, and the model ends its sentences (writer.py). The
stories come in shards, files that appear when they are whole (shards.py), so a call goes on where
the last one stopped. With --workers several processes write shards, each with its own engine on the
same device: a small model keeps a GPU busy only if several hosts feed it. A worker that dies takes
its open shard with it, and no other.

The command ends after --minutes, or when there are --stories. FOLDER/record.json adds up what it
took.
"""

import argparse
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from checkpoints.storyteller.recipe.shards import add_up, shard_file, write_shard, write_whole
from course.arguments import local_path, option, positive
from course.processes import module_command

SHARD = {"cuda": 2048, "cpu": 64}  # stories drawn for one file
LIMITS: dict[str, dict[str, Any]] = {
    "cuda": {"max_num_seqs": 1024},
    "cpu": {"max_num_seqs": 64},
}
SHARED = {"num_gpu_blocks_override": 28_000}  # of a worker: 448,000 tokens, 10 GB for SmolLM2
TELL_EVERY = 15.0  # seconds


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    start = time.perf_counter()
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.shard = args.shard or SHARD[device]
    options = {"max_model_len": 512, **LIMITS[device]}
    options |= (SHARED if args.workers > 1 and device == "cuda" else {}) | dict(args.engine)
    if args.worker is not None:
        run_engine(args, options, start)
        return 0
    check_same_settings(args.folder, {"shard": args.shard, "seed": args.seed})
    failed = run_workers(args, start) if args.workers > 1 else run_engine(args, options, start)
    record = write_record(args, device, options, failed, time.perf_counter() - start)
    print(f"{record['kept']:,} stories kept of {record['drawn']:,}, in {args.folder}")
    return 0 if record["kept"] else 1


def run_engine(args: argparse.Namespace, options: dict[str, Any], start: float) -> int:
    """Write shards in this process; gives the number of failures, which is none."""
    from course.models.smollm2 import smollm2_dir
    from nanovllm import LLM

    with LLM(args.model or str(smollm2_dir()), use_tqdm_on_load=False, **options) as llm:
        run_shards(llm, args, start)
    return 0


def run_shards(llm: Any, args: argparse.Namespace, start: float) -> None:
    """Write this worker's shards until there are enough stories, or no time for another one."""
    index, longest, told = args.worker or 0, 0.0, start
    parent = os.getppid()
    while os.getppid() == parent:  # a worker whose parent was killed has nobody to work for
        done = add_up(args.folder)
        enough = args.stories and done["kept"] >= args.stories
        used = time.perf_counter() - start
        if enough or used + longest > 60 * args.minutes:
            return
        while shard_file(args.folder, index).exists():
            index += args.workers
        cost = write_shard(llm, args.folder, index, args.shard, args.seed)
        longest = max(longest, cost["seconds"])
        if args.worker is None and time.perf_counter() - told > TELL_EVERY:
            told = time.perf_counter()
            tell(args, start)


def run_workers(args: argparse.Namespace, start: float) -> int:
    """Start the workers, tell now and then how far they are, wait for all; how many failed."""
    from course.models.smollm2 import smollm2_dir

    args.model = args.model or str(smollm2_dir())  # made once, not by every worker
    left = args.minutes - (time.perf_counter() - start) / 60
    command = module_command("checkpoints.storyteller.recipe.generate", str(args.folder))
    command += ["--workers", str(args.workers), "--minutes", str(left), "--model", args.model]
    command += ["--shard", str(args.shard), "--seed", str(args.seed)]
    command += ["--stories", str(args.stories)] if args.stories else []
    command += [f"--engine={name}={value}" for name, value in args.engine]
    workers = [subprocess.Popen([*command, "--worker", str(i)]) for i in range(args.workers)]
    try:
        told = start
        while any(worker.poll() is None for worker in workers):
            time.sleep(0.2)
            if time.perf_counter() - told > TELL_EVERY:
                told = time.perf_counter()
                tell(args, start)
            if time.perf_counter() - start > 60 * args.minutes + 30:
                break  # somebody hangs
    finally:
        for worker in workers:
            worker.kill()  # those that are still at work
    return sum(worker.wait() != 0 for worker in workers)


def tell(args: argparse.Namespace, start: float) -> None:
    """One line: how far it is, and how much time is left."""
    done, left = add_up(args.folder), args.minutes - (time.perf_counter() - start) / 60
    share = done["kept"] / max(1, done["drawn"])
    print(
        f"{done['shards']} shards, {done['kept']:,} stories kept of {done['drawn']:,} "
        f"({share:.0%}), {done['kept_per_second']:,.0f} kept/s, "
        f"{done['generated_tokens_per_second']:,.0f} tok/s, {left:.1f} minutes left",
        flush=True,
    )


def write_record(
    args: argparse.Namespace, device: str, options: dict[str, Any], failed: int, seconds: float
) -> dict[str, Any]:
    """Add this call to FOLDER/record.json, and add up all shards there."""
    from course.machine import describe, versions

    file = args.folder / "record.json"
    calls = json.loads(file.read_text())["calls"] if file.exists() else []
    calls.append({"seconds": seconds, "workers": args.workers, "workers_failed": failed})
    record = {"machine": describe(device), "versions": versions(), "engine": options}
    record |= {"calls": calls, **add_up(args.folder)}
    write_whole(file, json.dumps(record, indent=2) + "\n")
    return record


def check_same_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Shards of one folder have one size and one seed, or their numbers would not agree."""
    file = folder / "settings.json"
    if file.exists():
        before = json.loads(file.read_text())
        if before != settings:
            raise SystemExit(f"{folder} was begun with {before}, not {settings}; take another one")
        return
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings) + "\n")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    prog = "checkpoints.storyteller.recipe.generate"
    parser = argparse.ArgumentParser(description=__doc__, prog=prog)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "folder", type=local_path, help="where the stories go; may hold some already"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="then stop (default: 8)")
    parser.add_argument("--stories", type=positive, help="stop when there are so many")
    parser.add_argument("--shard", type=positive, help="stories drawn for one file")
    parser.add_argument("--workers", type=positive, default=1, help="processes (default: 1)")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="the writer (default: SmolLM2-135M-Instruct)")
    named = {"action": "append", "default": [], "type": option, "metavar": "NAME=VALUE"}
    parser.add_argument("--engine", help="any argument of LLM", **named)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
