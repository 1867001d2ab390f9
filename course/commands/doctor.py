"""Look at this machine: can it run the course, and what will it use?

The doctor compares the installed versions with what the project asks for. It then answers a prompt
with the course's own model, and reads the files of the model that COURSE_MODEL names. Exit status 0
means that all of it works. Nothing is changed and nothing is downloaded.
"""

import argparse
import importlib.metadata
import os
import platform
import shutil
import tomllib
from pathlib import Path
from typing import Any

from course import machine
from course.clone import ROOT, is_clone
from course.lessons import FILES_OF_LESSON
from course.models.choice import VARIABLE, is_downloaded, own_model
from course.models.smollm2 import FOLDER, PACKAGE, cache_dir, is_complete

DISTRIBUTION = "nanovllm-course"
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
    if not problems:  # else torch or transformers may not even be importable
        _describe_torch()
        problems += [*_check_own_model(), *_check_named_model()]
    _describe_smollm2()
    if not problems and is_clone():
        _describe_lessons()
    for problem in problems:
        print(f"  problem: {problem}")
    print(_verdict(problems))
    return 1 if problems else 0


def _verdict(problems: list[str]) -> str:
    if problems:
        return "This machine cannot run the course yet."
    if is_clone():
        return "This machine is ready."
    return "This machine can run nanovllm. The lessons need a clone of the course's repository."


def _say(label: str, text: str) -> None:
    print(f"  {label:<22} {text}")


# -- versions ------------------------------------------------------------------------------------


def project() -> tuple[str, list[str]]:
    """The Python versions and the packages that the project asks for, with their bounds.

    They come from pyproject.toml in a clone, because the metadata of an editable installation is as
    old as the installation. Without a clone they come from the installed metadata.
    """
    if is_clone():
        table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        return table["requires-python"], table["dependencies"]
    metadata = importlib.metadata.metadata(DISTRIBUTION)
    return metadata["Requires-Python"], metadata.get_all("Requires-Dist") or []


def _check_python() -> list[str]:
    from packaging.specifiers import SpecifierSet

    version, wanted = platform.python_version(), project()[0]
    _say("Python", f"{version} on {platform.system()} {platform.machine()}")
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return []
    return [
        f"Python {wanted} is needed, and this is {version}: run `make clean`, then `make install`"
    ]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _check_packages() -> list[str]:
    from packaging.requirements import Requirement

    needed = [Requirement(text) for text in project()[1]]
    needed = [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    names = [requirement.name for requirement in needed]
    for package in (*names, *(name for name in HELPFUL if name not in names)):
        _say(package, _version(package) or f"not installed; {HELPFUL.get(package, 'needed')}")
    return [problem for requirement in needed if (problem := _problem_with(requirement))]


def _problem_with(requirement: Any) -> str | None:
    """Say why the installed version of a package does not fit, and how to repair it."""
    package, wanted, version = requirement.name, requirement.specifier, _version(requirement.name)
    repair = (
        "run `make install`, or see docs/install.md"
        if is_clone()
        else f'pip install "{requirement}"'
    )
    if version is None:
        return None if package in HELPFUL else f"{package} is not installed: {repair}"
    if wanted.contains(version, prereleases=True):  # prereleases: nightly builds of torch count too
        return None
    return f"{package} {version} is installed, and {package}{wanted} is needed: {repair}"


# -- models --------------------------------------------------------------------------------------


def _check_own_model() -> list[str]:
    """Answer a prompt with the course's own model, as every lesson does."""
    if not is_clone():
        return []
    try:
        folder = own_model()
        _try(folder)
    except Exception as error:  # packages that do not fit together raise anything
        _say("own model", "does not work")
        said = f"{type(error).__name__}: {error}"
        return [
            f"the course's own model does not work ({said}). Restore it: git checkout checkpoints"
        ]
    _say("own model", f"{folder.name}, which answers")
    return []


def _try(folder: Path) -> None:
    """Load a small model and answer one question, in little memory."""
    from nanovllm import LLM, SamplingParams

    small = {"num_gpu_blocks_override": 16, "max_model_len": 64, "enforce_eager": True}
    question = [{"role": "user", "content": "Tell me a story."}]
    with LLM(folder, use_tqdm_on_load=False, **small) as llm:
        llm.chat(question, SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)


def _check_named_model() -> list[str]:
    """Read the files of the model that COURSE_MODEL names, except its weights."""
    if not (named := os.environ.get(VARIABLE)):
        return []
    folder = Path(named).expanduser()
    try:
        if folder.exists():
            _read_all_but_weights(folder)
        elif named.startswith(("/", ".", "~")):
            raise FileNotFoundError("there is no such folder")
        elif not is_downloaded(named):
            _say(VARIABLE, f"{named}, which is not on this machine; its first use downloads it")
            return []
        else:
            from huggingface_hub import snapshot_download

            _read_all_but_weights(Path(snapshot_download(named, local_files_only=True)))
    except Exception as error:  # as above
        _say(VARIABLE, f"{named}, which cannot be used")
        return [f"{VARIABLE}={named!r} cannot be used ({error}): name another model, or unset it"]
    _say(VARIABLE, f"{named}, whose files can be read (its weights were not loaded)")
    return []


def _read_all_but_weights(folder: Path) -> None:
    from nanovllm import EngineArgs
    from nanovllm.checkpoint.config_json import read_model_config
    from nanovllm.checkpoint.safetensors_files import find_weight_files
    from nanovllm.checkpoint.tokenizer import load_tokenizer

    read_model_config(folder)
    load_tokenizer(EngineArgs(str(folder)), folder)
    find_weight_files(folder)


def _describe_smollm2() -> None:
    folder = cache_dir() / FOLDER
    state = "converted" if is_complete(folder) else "converted on first use"
    _say("SmolLM2", f"{state}: {folder}")
    parent = next(p for p in (folder, *folder.parents) if p.exists())
    _say("disk free there", f"{shutil.disk_usage(parent).free / 1e9:.0f} GB")


# -- what is used --------------------------------------------------------------------------------


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

    from course.models.choice import measured_model, text_model

    print("  What the lessons use here:")
    _say("text", text_model().says.removeprefix("Text: "))
    _say("measuring", measured_model(make=False).says.removeprefix("Measured: "))
    triton = _version("triton") is not None
    for lesson, (on_gpu, on_cpu) in LESSONS.items():
        uses = on_gpu if torch.cuda.is_available() else on_cpu
        if lesson.startswith("06") and not torch.cuda.is_available() and not triton:
            uses = "plain torch twins of the kernels; recorded results stand in for timings"
        if lesson.startswith("08") and 0 < torch.cuda.device_count() < 2:
            uses = "two ranks on the CPU: this machine has one GPU"
        _say(lesson, uses)
