"""The machine a number was measured on: what every table and every plot says beside it."""

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from pathlib import Path


def processor() -> str:
    """The CPU's name, as its maker writes it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe(device: str | None = None) -> str:
    """One line: the GPU's name if `device` is one, else the CPU and the threads torch uses."""
    import torch

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(device))
    threads = torch.get_num_threads()
    return f"{processor()}, {threads} thread{'s' if threads > 1 else ''}"


def versions() -> dict[str, str]:
    """What a number may depend on: Python's version and those of the packages that compute."""
    found = {"python": platform.python_version()}
    for package in ("torch", "triton", "transformers", "flash-attn"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def line() -> str:
    """This machine and its versions in one line: the head of a report."""
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"{describe()}; {used}"


def environment() -> dict[str, str]:
    """The variables for a Python started from here, which then imports this copy of the course.

    The packages need not be installed, and the new process may start in any folder.
    """
    path = [str(Path(__file__).resolve().parent.parent), *filter(None, [os.getenv("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def has_triton() -> bool:
    """Whether Triton is installed; it has no build for macOS and Windows."""
    return importlib.util.find_spec("triton") is not None


def resident_bytes() -> int:
    """Memory this process holds now (its peak, where the system tells only that)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The most memory this process ever held."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory(device: str) -> None:
    """Begin a new peak: `peak_memory_bytes` then tells of what comes after this call.

    On a CPU that works on Linux, where a process may reset its own mark; elsewhere the peak is that
    of the process's whole life.
    """
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(device: str) -> int:
    """The most memory since `reset_peak_memory`: torch's on a GPU, else the whole process's."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return peak_resident_bytes()
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else peak_resident_bytes()


def total_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
