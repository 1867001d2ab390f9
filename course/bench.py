"""How fast is the engine on this machine, and how near to what the machine can do?

course bench                    the reference workloads W1, W2 and W3 (name some to run only those)
course bench attention          decode attention alone: its share of the read bandwidth
course bench transformers       this engine beside transformers' generate, turn by turn

W1 throughput: 256 prompts of 100 to 1,024 tokens, as many tokens out. W2 latency: one prompt of
128 tokens, 512 out. W3 shared prefix: 256 prompts of 2,048 common tokens and 128 of their own, 64
out. On a CPU an eighth of all these numbers. Every request's tokens are counted. Without --model, a
GPU runs a random model of Qwen3-0.6B's shape and a CPU runs what `course run` does; on a GPU each
workload's first run is a warm-up.
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from course.benchmarks import against_transformers, attention, measure
from course.benchmarks.workloads import WORKLOADS

SUBJECTS = (*WORKLOADS, "attention", "transformers")
# Whose an argument is, if it is not everybody's
ENGINE, KERNEL, COMPARED = "W1, W2 and W3", "attention", "transformers"
BELONGS = {
    "model": (ENGINE, COMPARED),
    "runs": (ENGINE, COMPARED),
    "max_num_seqs": (ENGINE, COMPARED),
    "scale": (ENGINE, KERNEL),
    "attention_backend": (ENGINE, KERNEL),
    "enforce_eager": (ENGINE,),
    "engine": (ENGINE,),
    "requests": (COMPARED,),
    "batch": (COMPARED,),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every subject; `--help` says which belong to which."""
    count = {"type": positive, "metavar": "N"}
    parser.add_argument("subjects", nargs="*", type=subject, help=" ".join(SUBJECTS))
    parser.add_argument("--model", help="folder or Hugging Face id (default: see above)")
    parser.add_argument("--dtype", default="auto", help="auto (by the device), float32, ...")
    parser.add_argument("--runs", default=3, help="of each workload (default: 3)", **count)
    parser.add_argument("--threads", help="torch's CPU threads (default: torch's own)", **count)
    parser.add_argument("--max-num-seqs", help="requests running at once", **count)
    parser.add_argument(
        "--json", type=local_path, metavar="FILE", help="write the numbers here as well"
    )
    workloads = parser.add_argument_group("W1, W2, W3 and attention")
    workloads.add_argument("--scale", type=fraction, help="of requests and lengths (GPU: 1)")
    workloads.add_argument("--attention-backend", default="auto", metavar="NAME")
    workloads.add_argument("--enforce-eager", action="store_true", help="compile, capture nothing")
    workloads.add_argument(
        "--engine",
        action="append",
        default=[],
        type=option,
        metavar="NAME=VALUE",
        help="any argument of LLM, as vLLM names it: --engine block_size=32",
    )
    compared = parser.add_argument_group("transformers")
    compared.add_argument("--requests", default=32, help="prompts to answer (default: 32)", **count)
    compared.add_argument("--batch", default=8, help="transformers' batch (default: 8)", **count)


def positive(text: str) -> int:
    """An argument that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def local_path(text: str) -> Path:
    """A path whose leading `~` is the user's home. In `--json=~/x` no shell replaces it."""
    return Path(os.path.expanduser(text))


def fraction(text: str) -> float:
    """A number above 0 and at most 1; `1/8` is one."""
    above, _, below = text.partition("/")
    try:
        value = float(above) / float(below or 1)
    except ZeroDivisionError:
        value = math.inf  # which the next line refuses
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return value


def subject(text: str) -> str:
    if text not in SUBJECTS:
        raise argparse.ArgumentTypeError(f"one of {', '.join(SUBJECTS)}, not {text!r}")
    return text


def option(text: str) -> tuple[str, Any]:
    """`block_size=32` -> ("block_size", 32); a value that is not JSON is a string."""
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f"NAME=VALUE is wanted, got {text!r}")
    try:
        return name, json.loads(value.lower() if value in ("True", "False") else value)
    except json.JSONDecodeError:
        return name, value


def main(args: argparse.Namespace) -> int:
    start = time.perf_counter()  # torch is not imported yet: the start of an engine counts that too
    subjects = list(dict.fromkeys(args.subjects)) or list(WORKLOADS)
    others = [name for name in subjects if name not in WORKLOADS]
    if len(subjects) > 1 and others:
        raise ValueError(f"{others[0]} runs alone, got {' '.join(subjects)}")
    refuse_what_belongs_elsewhere(args, others[0] if others else ENGINE)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    if others == ["transformers"]:
        report = against_transformers.compare(args)
        against_transformers.print_report(report)
    elif others == ["attention"]:
        report = attention.measure(args)
        attention.print_report(report)
    else:
        report = measure.measure(args, subjects, start)
        measure.print_report(report)
    if args.json:
        record = {"command": command_line(sys.argv[1:]), **report}
        args.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0


def refuse_what_belongs_elsewhere(args: argparse.Namespace, subject: str) -> None:
    """ValueError for an argument that would be ignored."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for name, owners in BELONGS.items():
        if subject not in owners and getattr(args, name) != parser.get_default(name):
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} belongs to {' and '.join(owners)}, not to {subject}")


def command_line(arguments: list[str]) -> str:
    """The command as a record keeps it: without --json, and of a path only its last part."""
    kept: list[str] = []
    previous = ""
    for argument in arguments:
        if "--json" not in (argument.partition("=")[0], previous):
            name, equals, value = argument.rpartition("=")
            keep = "/" not in value or value.replace("/", "").isdigit()  # 1/8 is no path
            kept.append(name + equals + (value if keep else Path(value).name))
        previous = argument
    return " ".join(["course", *kept])
