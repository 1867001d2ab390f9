"""Lesson 06's kernels: equal to torch where they can run, and they compile for every GPU anywhere.

Run them on a CPU with TRITON_INTERPRET=1 pytest tests/gpu/test_toy_kernels.py.
"""

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this system")

from test_kernels_compile import MEMORY, JITFunction, Recorder, compile_for

from course.benchmarks import kernel_ladder, toy_kernels
from course.checks.cells import definitions
from course.checks.exercises import code_of, define
from course.drawings import kernel_plots
from nanovllm.kernels import store
from nanovllm.layers.backend import TORCH_BACKEND

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def needs_a_run():
    if not kernel_ladder.can_run_triton():
        pytest.skip("needs an NVIDIA GPU, or TRITON_INTERPRET=1")


def test_every_version_agrees_with_torch():
    needs_a_run()
    errors = kernel_ladder.check_all(DEVICE, torch.float32)
    assert len(errors) >= 10


def test_the_recorded_ladder_has_the_versions_of_today():
    needs_a_run()
    report = kernel_plots.recorded()
    for ladder in ("store", "rope"):
        versions = getattr(kernel_ladder, f"{ladder}_versions")()
        assert all(list(rows) == list(versions) for rows in report[ladder].values())
    versions = [*kernel_ladder.decode_versions(), "FlashAttention"]
    assert all(set(rows) == set(versions) for rows in report["decode"].values())


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
    monkeypatch.setattr(store, "store_kv_kernel", Recorder(store.store_kv_kernel, launches))
    if not hasattr(toy_kernels.norm_kernel, "launches"):
        pytest.skip("Triton's interpreter is on: nothing is compiled")
    device = torch.device("cpu")
    tokens = kernel_ladder.make_tokens(5, device, dtype, seed=0)
    tokens.store(toy_kernels.store_heads)
    tokens.rope_store(toy_kernels.norm_rope_store)
    inputs = kernel_ladder.make_inputs([5, 200], device, dtype, seed=0)
    for attend in (toy_kernels.attend_whole, kernel_ladder.attend_split):
        inputs.prepare(kernel_ladder.replace(TORCH_BACKEND, decode_attention=attend))()
    assert len(launches) == 7
    for kernel, args, options in launches:
        compiled = compile_for(kernel, args, options, capability)
        assert compiled.metadata.shared <= MEMORY[capability]


TRITON = "import triton\nimport triton.language as tl"
WRITTEN = {"my_store": "store_kernel", "offsets": "offset_kernel"}  # exercises, and their kernels


@pytest.mark.parametrize("exercise", WRITTEN)
def test_what_the_exercises_ask_for_compiles(exercise):
    code = code_of("06", exercise, "solutions")
    defined = define(code, f"<compiled {exercise}>", list(definitions(TRITON)))
    kernel = getattr(defined, WRITTEN[exercise])
    if not hasattr(kernel, "src"):
        pytest.skip("Triton's interpreter is on: nothing is compiled")
    x, slots = torch.zeros(4, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int64)
    blocks = slots.int()
    args = {
        "my_store": (x, x, x, x, slots, 4096, 4096, 12, 16),
        "offsets": (blocks, blocks, slots, slots, 4096, 16, 1024),
    }[exercise]
    compiled = compile_for(kernel, args, {}, 90)
    assert "i64" in compiled.asm["ttir"]


@pytest.mark.parametrize(
    ("programs", "longest", "parts"), [(16, 640, 10), (256, 1500, 5), (4096, 900, 1), (16, 40, 1)]
)
def test_parts_keep_the_gpu_busy(programs, longest, parts):
    assert kernel_ladder.choose_splits(programs, longest, num_processors=132) == parts
