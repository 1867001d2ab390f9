"""Lesson 06's kernels: equal to torch where they can run, and they compile for every GPU anywhere.

Run them on a CPU with TRITON_INTERPRET=1 pytest tests/test_toy_kernels.py.
"""

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this system")

from course import toy_kernels  # noqa: E402
from course.benchmarks import kernel_ladder  # noqa: E402
from nanovllm.ops.backend import TORCH  # noqa: E402
from test_kernels_compile import MEMORY, JITFunction, Recorder, compile_for  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def needs_a_run():
    if not kernel_ladder.can_run_triton():
        pytest.skip("needs an NVIDIA GPU, or TRITON_INTERPRET=1")


def test_every_version_agrees_with_torch():
    needs_a_run()
    errors = kernel_ladder.check_all(DEVICE, torch.float32)
    assert len(errors) >= 11


def test_a_wrong_version_is_found(monkeypatch):
    monkeypatch.setattr(
        kernel_ladder, "store_versions", lambda: {"torch": TORCH_STORE, "swapped": swapped}
    )
    with pytest.raises(AssertionError, match="store, swapped"):
        kernel_ladder.check_all(DEVICE, torch.float32)


TORCH_STORE = kernel_ladder.attention.store_kv


def swapped(key, value, k_cache, v_cache, slots):
    TORCH_STORE(value, key, k_cache, v_cache, slots)


@pytest.mark.parametrize("capability", MEMORY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_they_compile(capability, dtype, monkeypatch):
    """What the benchmark would launch is compiled for a card that is not here."""
    launches: list = []
    for name, kernel in vars(toy_kernels).copy().items():
        if isinstance(kernel, JITFunction) and name.endswith("_kernel"):
            monkeypatch.setattr(toy_kernels, name, Recorder(kernel, launches))
    if not hasattr(toy_kernels.norm_kernel, "launches"):
        pytest.skip("Triton's interpreter is on: nothing is compiled")
    device = torch.device("cpu")
    tokens = kernel_ladder.make_tokens(5, device, dtype, seed=0)
    tokens.store(toy_kernels.store_heads)
    tokens.rope_store(toy_kernels.norm_rope_store)
    inputs = kernel_ladder.make_inputs([5, 200], device, dtype, seed=0)
    for attend in (toy_kernels.attend_whole, kernel_ladder.attend_split):
        inputs.prepare(kernel_ladder.replace(TORCH, attend_decodes=attend))()
    assert len(launches) == 7
    for kernel, args, options in launches:
        compiled = compile_for(kernel, args, options, capability)
        assert compiled.metadata.shared <= MEMORY[capability]


@pytest.mark.parametrize(
    ("programs", "longest", "parts"), [(16, 640, 10), (256, 1500, 5), (4096, 900, 1), (16, 40, 1)]
)
def test_parts_keep_the_gpu_busy(programs, longest, parts):
    assert kernel_ladder.choose_splits(programs, longest, num_processors=132) == parts
