"""Capture and replay by hand: record once what a function has a device do, then do it again.

    recording = Recording(lambda: torch.relu(x @ weight), x.device)
    x.copy_(other)
    recording.replay()                  # recording.result now holds relu(other @ weight)

On a GPU it is a CUDA graph. Without one, torch's operations are written down with the very tensors
they touched, and done again on those: what holds of the one holds of the other, but for the time.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
NEEDS_HOST = (aten._local_scalar_dense.default,)  # .item(), if, int(): the host waits
CHOOSES = (aten.nonzero.default, aten.masked_select.default)  # x.nonzero(), torch.where(mask)
INDEXES = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)  # x[mask]


class Recording:
    """What `function` has the device do; `result` is what it returned, overwritten by each replay.

    The function runs once before, so that all there is to compile is compiled. On a GPU recording
    itself runs nothing, and `result` is valid after the first replay; elsewhere it runs as well.
    RuntimeError if the function asks for a value, or for as many rows as values say (`x[x > 0]`):
    while a graph is captured nothing could answer.
    """

    def __init__(self, function: Callable[[], Any], device: torch.device):
        function()
        self.is_cuda_graph = device.type == "cuda"
        if self.is_cuda_graph:
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self.result = function()
        else:
            self._writer = Writer()
            with self._writer:
                self.result = function()

    def replay(self) -> None:
        """Do it all again, on the tensors of the recording; Python does not run the function."""
        if self.is_cuda_graph:
            self._graph.replay()
        else:
            self._writer.repeat()

    def __len__(self) -> int:
        """Operations recorded (without a GPU; a CUDA graph does not tell)."""
        return len(self._writer.calls)


def by_mask(args: tuple) -> bool:
    """Whether an index is a mask. One number for all it shows (`x[mask] = 0`) needs no count."""
    _, indices, *values = args
    if values and values[0].dim() == 0:
        return False
    return any(index is not None and index.dtype == torch.bool for index in indices)


class Writer(TorchDispatchMode):
    """Writes down every operation with its arguments and results, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in NEEDS_HOST:
            raise RuntimeError("operation not permitted while capturing: the host asks for a value")
        if func in CHOOSES or (func in INDEXES and by_mask(args)):
            raise RuntimeError(
                "operation not permitted while capturing: how many are meant depends on values"
            )
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def repeat(self) -> None:
        for func, args, kwargs, old in self.calls:
            fresh = func(*args, **kwargs)
            for place, value in zip(*map(_pytree.tree_leaves, (old, fresh)), strict=True):
                if isinstance(place, torch.Tensor) and place.data_ptr() != value.data_ptr():
                    place.copy_(value)
