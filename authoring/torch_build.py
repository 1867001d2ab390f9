"""Choose the build of torch that `make install` takes: CUDA's for an NVIDIA GPU, else the CPU's.

On Linux, torch comes with CUDA unless it is taken from PyTorch's own index of CPU builds. That
makes an environment of 5.3 GB in place of 2.4. This module prints the address of the index to take
torch from, or nothing where pip's usual sources are right. It tells the user what it chose on
stderr. It runs before anything is installed, so it imports the standard library alone.

TORCH=cpu or TORCH=cuda in the environment decides in place of the GPU, and TORCH_INDEX names an
index outright.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PINS = Path(__file__).resolve().parent.parent / "constraints.txt"
SIGNS = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/nvidia0")  # the driver makes these
WSL_TOOL = "/usr/lib/wsl/lib/nvidia-smi"  # WSL does not always put it on the path
OLDEST_MACOS = 14  # as the wheels of the pinned torch say: macosx_14_0_arm64
SECONDS = 8  # for all of the one attempt to reach the index; an index that answers needs one


def choose() -> tuple[str, str]:
    """Return the index to take torch from, or "" for pip's usual sources, and what to say of it."""
    build, named = os.environ.get("TORCH", ""), os.environ.get("TORCH_INDEX", "")
    if build not in ("", "cpu", "cuda"):
        raise ValueError(f"TORCH must be cpu or cuda, got {build!r}")
    if named:
        return named, f"torch comes from {named}, which TORCH_INDEX names."
    if (version := installed()) and version.partition("+")[0] == pinned():
        return "", f"torch {version} is installed already and stays (`make clean` removes it)."
    refuse_macs_without_wheels()
    if platform.system() != "Linux":
        return "", "torch has one build for this system (about 0.4 GB to download in all)."
    has_gpu = find_gpu()
    seen = "An NVIDIA GPU was found" if has_gpu else "No NVIDIA GPU was found"
    reason = f"TORCH={build} was given" if build else seen
    if (build or ("cuda" if has_gpu else "cpu")) == "cuda":
        return "", (
            f"{reason}, so torch comes with CUDA (about 3 GB to download in all). "
            "For the CPU build, stop this with Ctrl-C and add TORCH=cpu."
        )
    return choose_cpu(reason)


def refuse_macs_without_wheels() -> None:
    """Raise ValueError on a Mac for which the pinned torch has no wheel."""
    if platform.system() != "Darwin":
        return
    if platform.machine() != "arm64":
        raise ValueError(
            f"torch {pinned()} has no wheels for Intel Macs, and this Python was built for one. On "
            "a Mac with Apple silicon, name a Python for it: make run PYTHON=/path/to/python3. "
            "On an Intel Mac, use Docker, as docs/platforms.md shows."
        )
    if int(platform.mac_ver()[0].partition(".")[0]) < OLDEST_MACOS:
        raise ValueError(
            f"torch {pinned()} needs macOS {OLDEST_MACOS} or later, and this is "
            f"{platform.mac_ver()[0]}. Update macOS, or use Docker, as docs/platforms.md shows."
        )


def choose_cpu(reason: str) -> tuple[str, str]:
    if os.environ.get("PIP_NO_INDEX"):
        return "", f"{reason}. torch comes from PIP_FIND_LINKS, because PIP_NO_INDEX is set."
    if is_reachable(CPU_INDEX):
        return CPU_INDEX, (
            f"{reason}, so torch's CPU build comes from {CPU_INDEX} (about 0.4 GB to download in "
            "all). For CUDA, stop this with Ctrl-C and add TORCH=cuda."
        )
    return "", (
        f"{reason}, but {CPU_INDEX} cannot be reached. torch comes from pip's usual sources, which "
        "on Linux may give CUDA's build (about 3 GB to download in all). It works without a GPU, "
        "too. If you know another index of CPU builds, stop this with Ctrl-C and add "
        "TORCH_INDEX=https://..."
    )


def find_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU whose driver runs."""
    if any(Path(sign).exists() for sign in SIGNS):
        return True
    tool = shutil.which("nvidia-smi") or shutil.which(WSL_TOOL)
    if not tool:
        return False
    try:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


def is_reachable(index: str) -> bool:
    """Ask the index once, in a process that can be ended even while it waits for a name server."""
    ask = "import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=5)"
    command = [sys.executable, "-c", ask, f"{index}/torch/"]
    try:
        return subprocess.run(command, capture_output=True, timeout=SECONDS).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def installed() -> str | None:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def pinned() -> str:
    """The version of torch in constraints.txt."""
    found = re.search(r"^torch==(\S+)$", PINS.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise ValueError(f"{PINS.name} must pin torch, as in torch==2.13.0")
    return found[1]


if __name__ == "__main__":
    try:
        chosen, says = choose()
    except ValueError as error:
        sys.exit(f"make: {error}")
    print(textwrap.fill(says, 98, break_on_hyphens=False), file=sys.stderr)
    print(chosen)
