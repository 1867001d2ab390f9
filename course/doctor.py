"""Look at this machine: can it run the course, and what will it use?

Exit status 0 means yes. Nothing is changed and nothing is downloaded.
"""

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys

from course import machine
from course.lessons import FILES_OF_LESSON
from course.models import CHECKPOINTS
from course.smollm2 import FOLDER, PACKAGE, cache_dir, is_complete

NEEDED = ("torch", "transformers", "tokenizers", "safetensors", "huggingface-hub", "xxhash", "tqdm")
HELPFUL = {
    "triton": "lesson 06 runs its torch twin without it (no macOS or Windows build exists)",
    "jupyterlab": "the notebooks open in it: make lab",
    "matplotlib": "the lessons draw with it",
    "gguf": "converting SmolLM2 needs it, which wrote what the storyteller learned from",
    PACKAGE: "SmolLM2's weights are in it; only the storyteller's recipe needs them",
}

PLAIN = ("the GPU", "the CPU, in plain torch")
LESSONS = {  # what each uses on a GPU, and without one
    **dict.fromkeys(FILES_OF_LESSON, PLAIN),
    "06_triton_kernels": (
        "the GPU: kernels are compiled",
        "Triton's interpreter on the CPU; recorded results stand in for timings",
    ),
    "07_cuda_graphs": (
        "the GPU: steps are captured",
        "the CPU; capture needs a GPU, so its results are shown as recorded",
    ),
    "08_tensor_parallelism": ("two of the GPUs", "two ranks on the CPU, over gloo"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing to choose."""


def main(args: argparse.Namespace) -> int:
    problems = [*_check_python(), *_check_packages()]
    _say("CPU", f"{machine.processor()}, {os.cpu_count()} cores")
    _say("memory", f"{machine.total_memory_bytes() / 2**30:.1f} GiB")
    if not problems:
        _describe_torch()
    _describe_models()
    if not problems:
        _describe_lessons()
    for problem in problems:
        print(f"  problem: {problem}")
    print("This machine cannot run the course yet." if problems else "This machine is ready.")
    return 1 if problems else 0


def _say(label: str, text: str) -> None:
    print(f"  {label:<22} {text}")


def _check_python() -> list[str]:
    _say("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return []
    return [f"Python 3.11 to 3.13 is needed, this is {platform.python_version()}"]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _check_packages() -> list[str]:
    problems = []
    for package in (*NEEDED, *HELPFUL):
        version = _version(package)
        _say(package, version or f"not installed; {HELPFUL.get(package, 'needed')}")
        if version is None and package in NEEDED:
            problems.append(f"{package} is not installed: run `make run`, or see the README")
    return problems


def _describe_torch() -> None:
    import torch

    _say("torch threads", str(torch.get_num_threads()))
    if not torch.cuda.is_available():
        _say("GPU", "none that torch can use; everything runs on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        capability = f"compute capability {gpu.major}.{gpu.minor}"
        _say(f"GPU {index}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {capability}")


def _describe_lessons() -> None:
    """What each lesson will use here: the GPU, or what takes its place."""
    import torch

    from course.models import measured_model, text_model

    print("  What the lessons use here:")
    _say("text", text_model(make=False).says.removeprefix("Text: "))
    _say("measuring", measured_model(make=False).says.removeprefix("Measured: "))
    triton = _version("triton") is not None
    for lesson, (on_gpu, on_cpu) in LESSONS.items():
        uses = on_gpu if torch.cuda.is_available() else on_cpu
        if lesson.startswith("06") and not torch.cuda.is_available() and not triton:
            uses = "plain torch twins of the kernels; recorded results stand in for timings"
        if lesson.startswith("08") and 0 < torch.cuda.device_count() < 2:
            uses = "two ranks on the CPU: this machine has one GPU"
        _say(lesson, uses)


def _describe_models() -> None:
    shipped = sorted(config.parent.name for config in CHECKPOINTS.glob("*/config.json"))
    _say("checkpoints", ", ".join(shipped) or "none; SmolLM2 is used")
    folder = cache_dir() / FOLDER
    state = "converted" if is_complete(folder) else "converted on first use"
    _say("SmolLM2", f"{state}: {folder}")
    parent = next(p for p in (folder, *folder.parents) if p.exists())
    _say("disk free there", f"{shutil.disk_usage(parent).free / 1e9:.0f} GB")
