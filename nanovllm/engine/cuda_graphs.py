"""GraphRunner: capture decode steps as CUDA graphs, and replay them.

The host needs longer to launch a small kernel than the GPU needs to run it. A CUDA graph records
the kernels of a whole step, and launches all of them with one call. The recorded step has a fixed
batch size, so we capture it for several sizes. A batch takes the smallest captured size that holds
it, and the rows beyond the batch are padding.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

Step = tuple[int, bool]  # the batch size and `whole_rows`, as ModelRunner.decode_step takes them


def capture_sizes(max_num_seqs: int) -> list[int]:
    """Return the batch sizes to capture, in rising order. The last one is max_num_seqs."""
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, max_num_seqs, 32)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


class GraphRunner:
    """The captured steps of one model runner; none on a CPU, or if the engine runs eagerly.

    graphs: each captured step's graph, with the output whose tensors every replay overwrites.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.graphs: dict[Step, tuple[torch.cuda.CUDAGraph, Any]] = {}

    def capture(self, run: Callable[[int, bool], Any], steps: Iterable[Step]) -> None:
        """Capture `run(*step)` for each step, all in one pool of memory.

        Graphs can share a pool because only one of them runs at a time. If the largest step comes
        first, the other ones fit into the memory that it needs.
        """
        pool = torch.cuda.graph_pool_handle()
        for step in steps:
            run(*step)  # compiles the kernels that are not compiled yet
            torch.cuda.synchronize(self.device)
            graph = torch.cuda.CUDAGraph()
            # "thread_local", because NCCL's own thread may call CUDA during the capture
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                output = run(*step)
            self.graphs[step] = (graph, output)

    def replay(self, step: Step) -> Any:
        """Launch a captured step. Return its output, which the next replay overwrites."""
        graph, output = self.graphs[step]
        graph.replay()
        return output

    def padded_size(self, num_rows: int) -> int:
        """Return the smallest captured size that holds `num_rows`; `num_rows` without graphs."""
        sizes = (size for size, _ in self.graphs if size >= num_rows)
        return min(sizes, default=num_rows)
