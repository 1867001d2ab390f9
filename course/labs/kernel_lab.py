"""Triton in a notebook, wherever that runs: on a GPU, in Triton's interpreter, or not at all.

    from course.labs.kernel_lab import agree, device, launch, tl, triton    # before Triton itself

With a GPU kernels are compiled. Without one they run in the interpreter, which must be asked for
before Triton is first imported: `triton` and `tl` of this module ask for it and then import Triton.
Importing the module alone changes nothing. Without Triton (it has no build for macOS and Windows) a
kernel is only defined; `launch` says so and `agree` shows the twin's result.
"""

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from course import machine

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
has_triton = machine.has_triton()


def prepare() -> None:
    """Make Triton interpret its kernels where there is no GPU, before Triton is first imported.

    RuntimeError if Triton was imported without its interpreter.
    """
    if not has_triton or device.type != "cpu":
        return
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("Triton was imported before its interpreter was asked for: restart")
    os.environ["TRITON_INTERPRET"] = "1"


def __getattr__(name: str) -> Any:
    """Import Triton when `triton` or `tl` is first asked of this module, after `prepare`."""
    if name not in ("triton", "tl"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not has_triton:
        without = {"triton": SimpleNamespace(jit=lambda kernel: kernel)}
        return without.get(name, SimpleNamespace(constexpr=None))
    prepare()
    return importlib.import_module({"triton": "triton", "tl": "triton.language"}[name])


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
    """Check a kernel's result against torch's, say how far apart they are; it, on the CPU."""
    if not ran or found is None:
        print("not run here: what follows is torch's")
        return wanted.cpu()
    if wanted.is_floating_point():
        apart = float((found - wanted).abs().max())
        assert apart < 1e-5, f"the kernel and torch differ by {apart:.2g}"
        print(f"the kernel and torch differ by at most {apart:.1g}")
    else:
        assert torch.equal(found, wanted), f"the kernel gave\n{found}\ntorch gave\n{wanted}"
        print("the kernel and torch agree exactly")
    return found.cpu()  # prints alike on every machine


def decodes_here() -> Iterator[str]:
    """A line for each shape of `course.benchmarks.attention` and each decode attention: µs a call.

    On a GPU every version of `kernel_ladder` in bfloat16; elsewhere torch's alone, in float32 and
    on shapes a sixteenth as large. The share is of the bandwidth that a reading kernel reaches.
    """
    from course.benchmarks.attention import measure_shape, shapes
    from course.benchmarks.kernel_ladder import DECODE_SCALE, decode_versions
    from course.measure.roofline import read_bandwidth

    on_gpu, peak = device.type == "cuda", read_bandwidth(device)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    versions = {n: v for n, v in decode_versions().items() if on_gpu or n == "torch"}
    yield f"{machine.describe()}, reads {peak / 1e9:,.0f} GB/s"
    for shape, lens in shapes(DECODE_SCALE[device.type]).items():
        for name, backend in versions.items():
            row = measure_shape(backend, lens, device, dtype, peak, graph=name != "torch")
            share = f"{row['share_of_read_bandwidth']:.0%} of it"
            yield f"{shape:28}{name:20}{row['microseconds']:>10,.0f} µs {share:>12}"
