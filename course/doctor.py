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
from course.models import CHECKPOINTS
from course.smollm2 import FOLDER, PACKAGE, cache_dir, is_complete

NEEDED = ("torch", "transformers", "tokenizers", "safetensors", "huggingface-hub", "xxhash", "tqdm")
HELPFUL = {
    "triton": "lesson 06 runs its torch twin without it (no macOS or Windows build exists)",
    "jupyterlab": "the notebooks open in it: make lab",
    "matplotlib": "the lessons draw with it",
    "gguf": "converting SmolLM2 needs it",
    PACKAGE: "SmolLM2's weights are in it",
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
    for problem in problems:
        print(f"  problem: {problem}")
    print("This machine cannot run the course yet." if problems else "This machine is ready.")
    return 1 if problems else 0


def _say(label: str, text: str) -> None:
    print(f"  {label:<16} {text}")


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


def _describe_models() -> None:
    shipped = sorted(config.parent.name for config in CHECKPOINTS.glob("*/config.json"))
    _say("checkpoints", ", ".join(shipped) or "none yet; SmolLM2 is used")
    folder = cache_dir() / FOLDER
    state = "converted" if is_complete(folder) else "converted on first use"
    _say("SmolLM2", f"{state}: {folder}")
    parent = next(p for p in (folder, *folder.parents) if p.exists())
    _say("disk free there", f"{shutil.disk_usage(parent).free / 1e9:.0f} GB")
