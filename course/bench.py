"""How fast is the engine on this machine, and how near to what the machine can do?

course bench                    the reference workloads W1, W2, W3 and W5 (name some to run those)
course bench sampling           how much each kind of sampling costs over temperature alone
course bench serving            requests that come and go: TTFT, TPOT and goodput at several rates
course bench attention          decode attention alone: its share of the read bandwidth
course bench queue              the host's work for a step and an add, with up to 100,000 queued
course bench transformers       this engine beside transformers' generate, turn by turn

W1 throughput: 256 prompts of 100 to 1,024 tokens, as many tokens out. W2 latency: one prompt of
128 tokens, 512 out. W3 shared prefix: 256 prompts of 2,048 common tokens and 128 of their own, 64
out. These three sample at temperature 0.6 alone. W5 is W1 with Qwen3's own sampling: temperature
0.6, top-p 0.95, top-k 20. A CPU takes an eighth of all these numbers. Every request's tokens are
counted. Without --model, a GPU runs a random model of Qwen3-0.6B's shape and a CPU runs what
`course run` does; on a GPU each workload's first run is a warm-up.

sampling: 1, 16, 64 and 256 requests of 64 tokens in and 128 out, the settings in turn; a CPU takes
1 and 8 requests of half these lengths. serving: Poisson arrivals, prompts of 8 to 3,000 tokens, 1
to 800 out, sampled as in W5; a CPU takes an eighth of the lengths. Both say more in their modules,
course/benchmarks/sampling.py and serving.py.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from course.benchmarks import against_transformers, attention, queue, sampling, serving
from course.measure import engine_runs as measure
from course.measure.workloads import WORKLOADS

SUBJECTS = (*WORKLOADS, "sampling", "serving", "attention", "queue", "transformers")
# Whose an argument is, if it is not everybody's
ENGINE, SAMPLING, SERVING = "the reference workloads", "sampling", "serving"
KERNEL, QUEUE, COMPARED = "attention", "queue", "transformers"
BELONGS = {
    "model": (ENGINE, SAMPLING, SERVING, QUEUE, COMPARED),
    "runs": (ENGINE, SAMPLING, COMPARED),
    "max_num_seqs": (ENGINE, SAMPLING, SERVING, COMPARED),
    "scale": (ENGINE, SAMPLING, SERVING, KERNEL),
    "attention_backend": (ENGINE, SAMPLING, SERVING, KERNEL),
    "enforce_eager": (ENGINE, SAMPLING, SERVING),
    "engine": (ENGINE, SAMPLING, SERVING),
    "settings": (SAMPLING,),
    "batch_sizes": (SAMPLING,),
    "rates": (SERVING,),
    "seconds": (SERVING,),
    "goodput": (SERVING,),
    "seed": (SERVING,),
    "requests": (COMPARED,),
    "batch": (COMPARED,),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every subject; `--help` says which belong to which."""
    count = {"type": positive, "metavar": "N"}
    parser.add_argument("subjects", nargs="*", type=subject, help=" ".join(SUBJECTS))
    parser.add_argument("--model", help="folder or Hugging Face id (default: see above)")
    parser.add_argument("--dtype", default="auto", help="auto (by the device), float32, ...")
    runs = "of each workload or sampling setting (default: 3)"
    parser.add_argument("--runs", default=3, help=runs, **count)
    parser.add_argument("--threads", help="torch's CPU threads (default: torch's own)", **count)
    parser.add_argument("--max-num-seqs", help="requests running at once", **count)
    record = "write the numbers here as well"
    parser.add_argument("--json", type=local_path, metavar="FILE", help=record)
    add_engine_arguments(parser.add_argument_group("all but transformers"))
    add_sampling_arguments(parser.add_argument_group("sampling"))
    add_serving_arguments(parser.add_argument_group("serving"))
    compared = parser.add_argument_group("transformers")
    compared.add_argument("--requests", default=32, help="prompts to answer (default: 32)", **count)
    compared.add_argument("--batch", default=8, help="transformers' batch (default: 8)", **count)


def add_engine_arguments(group: Any) -> None:
    scaled = "of all lengths, and for W1 to W5 of the number of requests as well (GPU: 1)"
    group.add_argument("--scale", type=fraction, help=scaled)
    group.add_argument("--attention-backend", default="auto", metavar="NAME")
    group.add_argument("--enforce-eager", action="store_true", help="compile, capture nothing")
    group.add_argument(
        "--engine",
        action="append",
        default=[],
        type=option,
        metavar="NAME=VALUE",
        help="any argument of LLM, as vLLM names it: --engine block_size=32",
    )


def add_sampling_arguments(group: Any) -> None:
    names = ",".join(sampling.SETTINGS)
    group.add_argument("--settings", type=settings, help=f"some of {names}", metavar="NAME,...")
    group.add_argument(
        "--batch-sizes",
        type=several(positive),
        metavar="N,...",
        help="requests at once (GPU: 1,16,64,256; CPU: 1,8)",
    )


def add_serving_arguments(group: Any) -> None:
    group.add_argument(
        "--rates",
        type=several(above_zero),
        metavar="R,...",
        help="requests a second (default: 0.25, 0.5, 0.75, 0.9 and 1.1 of the capacity)",
    )
    group.add_argument(
        "--seconds",
        type=above_zero,
        help="for which requests arrive at each rate (GPU: 15, CPU: 6)",
    )
    group.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        type=serving.service_level,
        metavar="METRIC:MS",
        help="what a request must meet (GPU: ttft:200 tpot:20, CPU: ttft:1000 tpot:100)",
    )
    group.add_argument("--seed", type=int, default=0, help="of arrivals and lengths (default: 0)")


def several(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A type for argparse: `1,2,3` -> [1, 2, 3], each part made by `kind`."""

    def parse(text: str) -> list[Any]:
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(
                f"must be numbers separated by commas, got {text!r}"
            ) from error

    return parse


def settings(text: str) -> list[str]:
    """Names of sampling settings, separated by commas."""
    names = text.split(",")
    if unknown := [name for name in names if name not in sampling.SETTINGS]:
        raise argparse.ArgumentTypeError(
            f"must be some of {','.join(sampling.SETTINGS)}, got {unknown[0]!r}"
        )
    return names


def above_zero(text: str) -> float:
    """A finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0 and finite, got {text}")
    return value


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
    elif others == ["queue"]:
        report = queue.measure(args)
        queue.print_report(report)
    elif others == ["attention"]:
        report = attention.measure(args)
        attention.print_report(report)
    elif others:
        module = {"sampling": sampling, "serving": serving}[others[0]]
        report = module.measure(args, start)
        module.print_report(report)
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
            listed = " and ".join(filter(None, [", ".join(owners[:-1]), owners[-1]]))
            raise ValueError(f"{option} belongs to {listed}, not to {subject}")


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
