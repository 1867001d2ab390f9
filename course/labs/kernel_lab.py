"""Triton in a notebook, wherever that runs: on a GPU, in Triton's interpreter, or not at all.

    from course.labs.kernel_lab import agree, device, launch, tl, triton    # before Triton itself

With a GPU kernels are compiled. Without one they run in the interpreter, which must be asked for
before Triton is first imported: importing this module does. Without Triton (it has no build for
macOS and Windows) a kernel is only defined; `launch` says so and `agree` shows the twin's result.
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
has_triton = importlib.util.find_spec("triton") is not None


def ask_for_interpreter() -> None:
    """Make Triton interpret its kernels. RuntimeError if it was imported without that."""
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("Triton was imported before its interpreter was asked for: restart")
    os.environ["TRITON_INTERPRET"] = "1"


if has_triton:
    if device.type == "cpu":
        ask_for_interpreter()
    import triton
    import triton.language as tl
else:
    triton: Any = SimpleNamespace(jit=lambda kernel: kernel)  # type: ignore[no-redef]
    tl: Any = SimpleNamespace(constexpr=None)  # type: ignore[no-redef]


def where() -> str:
    """How kernels run here, in words."""
    if not has_triton:
        return "Triton is not installed: kernels are not run here, their torch twins are"
    if device.type == "cpu":
        return "no GPU: kernels run in Triton's interpreter, program after program"
    return f"kernels are compiled for {torch.cuda.get_device_name(device)}"


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> bool:
    """Run a kernel's programs, and say whether it could be done."""
    if has_triton:
        kernel[grid](*args, **constants)
    return has_triton


def call(function: Callable[[], Tensor]) -> Tensor | None:
    """What a function that launches kernels returns; nothing without Triton."""
    return function() if has_triton else None


def agree(found: Tensor | None, wanted: Tensor, ran: bool = has_triton) -> Tensor:
    """Check a kernel's result against torch's, say how far apart they are, and return it."""
    if not ran or found is None:
        print("not run here: what follows is torch's")
        return wanted
    if wanted.is_floating_point():
        apart = float((found - wanted).abs().max())
        assert apart < 1e-5, f"the kernel and torch differ by {apart:.2g}"
        print(f"the kernel and torch differ by at most {apart:.1g}")
    else:
        assert torch.equal(found, wanted), f"the kernel gave\n{found}\ntorch gave\n{wanted}"
        print("the kernel and torch agree exactly")
    return found
