"""The tests that need an NVIDIA GPU, in parts of under ten minutes each. `make test-gpu` runs this.

    python -m authoring.gpu_tests              # all parts in order, and a report
    python -m authoring.gpu_tests list         # the parts, and what each of them runs
    python -m authoring.gpu_tests prepare      # make what the notebooks need before a part is timed
    python -m authoring.gpu_tests engine-1     # one part; `engine` runs engine-1 and engine-2
    python -m authoring.gpu_tests report       # the report of all parts that have run

Each part keeps its result in a file of its own, so that the parts can run in several calls. A part
uses the Python that runs this module and installs nothing. Arguments that this module does not
know are for pytest, on the lessons: --store-outputs, for example.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from course import machine
from course.models.random_model import random_model_dir

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "gpu-results"
NBVAL = ("--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=1800")  # as in `make test`
MODULES = ("pytest", "torch", "triton", "transformers", "xxhash")
NOTEBOOK_MODULES = (*MODULES, "nbval", "ipykernel", "ipywidgets", "matplotlib", "jupytext")
PROBE = """
import json, torch
from course import machine
print(json.dumps({"gpu": torch.cuda.is_available(), "machine": machine.line()}))
"""
KERNEL_TESTS = ("kernels", "sampling_kernels", "logprobs_kernels", "toy_kernels")
INTERRUPTED = 2  # as pytest says it
MEANINGS = {0: "passed", 1: "FAILED", INTERRUPTED: "STOPPED BEFORE ITS END", 5: "FOUND NO TESTS"}
ENDS = ("passed", "failed", "skipped")
PATIENCE = 30  # seconds for an interrupted pytest to write its results


@dataclass(frozen=True)
class Part:
    """Some tests that run together: their files, and pytest's options that choose among them."""

    name: str
    files: tuple[str, ...]
    options: tuple[str, ...] = ()

    @property
    def has_notebooks(self) -> bool:
        return self.files[0].endswith(".ipynb")

    @property
    def has_lessons(self) -> bool:
        return self.files[0].startswith("notebooks/")

    def command(self, result: Path, extra: Sequence[str] = ()) -> list[str]:
        """The call of pytest that runs this part and writes its results to `result`."""
        nbval = NBVAL if self.has_notebooks else ()
        pytest = [sys.executable, "-u", "-m", "pytest", "-v", "-p", "authoring.gpu_tests"]
        return [*pytest, *nbval, *self.options, *extra, f"--junitxml={result}", *self.files]


def all_parts() -> list[Part]:
    """Every GPU test and every notebook, each in exactly one part. Exercises are stubs."""
    lessons, solutions = (
        tuple(sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).glob("*.ipynb")))
        for folder in ("notebooks", "solutions")
    )
    half, engine = len(lessons) // 2, ("tests/gpu/test_gpu.py",)
    return [
        Part("kernels", tuple(f"tests/gpu/test_{name}.py" for name in KERNEL_TESTS)),
        Part("engine-1", engine, ("-k", "transformers")),
        Part("engine-2", engine, ("-k", "not transformers")),
        Part("lessons-1", lessons[:half]),
        Part("lessons-2", lessons[half:]),
        Part("solutions", solutions),
    ]


def chosen_parts(name: str) -> list[Part]:
    """The part of that name, or the parts whose names begin with it: engine, lessons, all."""
    return [part for part in all_parts() if name in ("all", part.name, part.name.split("-")[0])]


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.what == "list":
        for part in all_parts():
            print(f"{part.name:9} ", *part.options, *part.files)
    elif args.what == "prepare":
        prepare()
    elif args.what != "report":
        code = run_parts(chosen_parts(args.what), args)
        if args.what != "all":
            return code
    return report(args.results) if args.what in ("all", "report") else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "authoring.gpu_tests", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    names = {word for part in all_parts() for word in (part.name.split("-")[0], part.name)}
    choices = ["all", "list", "prepare", "report", *sorted(names)]
    parser.add_argument("what", nargs="?", default="all", choices=choices)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the results")
    parser.add_argument(
        "--seconds", type=float, help="stop a part after this time, and keep what it has found"
    )
    parser.add_argument(
        "--on-cpu", action="store_true", help="run without a GPU, to try this module itself"
    )
    args, args.extra = parser.parse_known_args(arguments)
    if args.extra and not any(part.has_lessons for part in chosen_parts(args.what)):
        parser.error(f"{' '.join(args.extra)}: only the lessons pass arguments on to pytest")
    args.results = args.results.resolve()
    return args


# -- before the tests ------------------------------------------------------------------------------


def probe(parts: Sequence[Part], on_cpu: bool) -> str:
    """Describe this machine in a line, or end this process if it cannot run the parts.

    Another process asks torch, so that this one holds no memory of the GPU while the tests run.
    """
    notebooks = any(part.has_notebooks for part in parts)
    needed = NOTEBOOK_MODULES if notebooks else MODULES
    if missing := [name for name in needed if find_spec(name) is None]:
        sys.exit(
            f"{sys.executable} cannot import {', '.join(missing)}. Install these packages, or name "
            "a folder that holds them in PYTHONPATH."
        )
    command: list[Any] = [sys.executable, "-c", PROBE]
    found = subprocess.run(
        command, env=machine.environment(), stdout=subprocess.PIPE, text=True, check=True
    )
    here = json.loads(found.stdout.splitlines()[-1])
    if not here["gpu"] and not on_cpu:
        sys.exit(f"make test-gpu needs an NVIDIA GPU that torch sees. This is {here['machine']}.")
    return str(here["machine"])


def prepare() -> None:
    """Make the random model that the lessons measure, unless it is there."""
    print("The lessons measure a random model of Qwen3-0.6B's shape.", flush=True)
    print(f"It is in {random_model_dir()}.", flush=True)


# -- a part ----------------------------------------------------------------------------------------


def run_parts(parts: Sequence[Part], args: argparse.Namespace) -> int:
    """Run these parts in order and keep their results. Returns 0 if all passed, else 1."""
    here = probe(parts, args.on_cpu)
    for part in parts:
        result_of(part, args.results).unlink(missing_ok=True)
    if any(part.has_notebooks for part in parts) and not args.on_cpu:
        prepare()
    codes = [run(part, here, args) for part in parts]
    return int(any(codes))


def result_of(part: Part, folder: Path) -> Path:
    return folder / f"{part.name}.xml"


def run(part: Part, here: str, args: argparse.Namespace) -> int:
    """Run a part and keep its result. Returns pytest's exit code, which is 0 if all passed."""
    print(f"\n== {part.name}: {', '.join(part.files)}", flush=True)
    result = result_of(part, args.results)
    result.parent.mkdir(parents=True, exist_ok=True)
    command = part.command(result, args.extra if part.has_lessons else ())
    start, code = time.monotonic(), INTERRUPTED
    try:
        code = wait(command, part, args.seconds)
    finally:
        seconds = time.monotonic() - start
        keep(result, machine=here, seconds=f"{seconds:.1f}", exit=str(code))
    print(f"== {part.name}: {seconds:.0f} s, {meaning(code)}", flush=True)
    return code


def wait(command: list[str], part: Part, limit: float | None) -> int:
    """The exit code of pytest, which is interrupted as by Ctrl-C after `limit` seconds.

    An interrupted pytest still writes the results that it has. Ctrl-C itself reaches pytest too,
    because the two processes share a terminal, so here it only needs time to finish.
    """
    variables = machine.environment() | ({"OMP_NUM_THREADS": "1"} if part.has_notebooks else {})
    variables.pop("TRITON_INTERPRET", None)  # kernels must be compiled here
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    with subprocess.Popen(command, cwd=ROOT, env=variables) as process:
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            print(f"\n== {part.name}: stopped after {limit:g} s", flush=True)
            process.send_signal(signal.SIGINT)
            return end(process)
        except KeyboardInterrupt:
            end(process)
            raise


def end(process: subprocess.Popen[bytes]) -> int:
    """The exit code of an interrupted pytest, which is killed if it does not end."""
    try:
        return process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def keep(result: Path, **attributes: str) -> None:
    """Note in a result's file how its run went; the file is made if pytest could not write one."""
    try:
        root = ElementTree.parse(result).getroot()
    except (OSError, ElementTree.ParseError):
        root = ElementTree.Element("testsuites")
    root.attrib.update(attributes)
    ElementTree.ElementTree(root).write(result, encoding="utf-8", xml_declaration=True)


def report(folder: Path) -> int:
    """Print what all parts found. Returns 1 if one has not run, did not end or found a failure."""
    parts = {part.name: root_of(result_of(part, folder)) for part in all_parts()}
    roots = [root for root in parts.values() if root is not None]
    cases = [case for root in roots for case in root.iter("testcase") if case.get("name")]
    print("", *dict.fromkeys(root.get("machine") for root in roots), in_all(cases), sep="\n")
    reasons = Counter(reason.get("message") for case in cases for reason in case.iter("skipped"))
    for reason, count in reasons.most_common():
        print(f"skipped {count}: {reason}")
    for case in cases:
        if end_of(case) == "failed":
            print(f"FAILED {case.get('classname')}: {case.get('name')}")
    for name, root in parts.items():
        print(line_of_part(name, root))
    return int(any(root is None or root.get("exit") != "0" for root in parts.values()))


def root_of(result: Path) -> Element | None:
    return ElementTree.parse(result).getroot() if result.exists() else None


def in_all(cases: list[Element]) -> str:
    """How many test cases ended in which way, and the seconds that they took together."""
    counts = Counter(map(end_of, cases))
    found = ", ".join(f"{counts[end]} {end}" for end in ENDS if counts[end])
    return f"{sum(float(case.get('time', 0)) for case in cases):8.1f} s  in all: {found}"


def end_of(case: Element) -> str:
    """How a test case ended: one of ENDS."""
    children = {child.tag for child in case}
    return "failed" if children & {"failure", "error"} else ENDS[2 * ("skipped" in children)]


def line_of_part(name: str, root: Element | None) -> str:
    """How a part ended and how long it took; a part without a result has not run."""
    if root is None:
        return f"{'':10}  part {name}: HAS NOT RUN"
    ended = meaning(int(root.attrib["exit"]))
    return f"{float(root.attrib['seconds']):8.1f} s  part {name}: {ended}"


def meaning(code: int) -> str:
    """What pytest's exit code says; a negative one is the signal that killed it."""
    return MEANINGS.get(code, f"BROKE OFF (exit code {code})")


def pytest_report_teststatus(report: Any) -> tuple[str, str, str] | None:
    """A hook of pytest, for which this module is a plugin: each line ends in the test's seconds."""
    if report.when != "call" or report.outcome not in ("passed", "failed"):
        return None
    letter = "." if report.passed else "F"
    return report.outcome, letter, f"{report.outcome.upper()} in {report.duration:.1f} s"


if __name__ == "__main__":
    sys.exit(main())
