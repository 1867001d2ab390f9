"""What a workload needs at least, and what the machine could do: together, its roofline.

Needed is counted from the engine's trace, a step at a time. Bytes: each weight once a step (the
head only if a row samples), and the keys and values of every context token once for each request in
the step. FLOPs: two for each weight and computed token (the head: each sampled row), and four for
each head's channel, computed token and token it attends to. Norms, rotations, softmax, sampling,
the rows of the embedding and everything that is written are left out: this is a floor.

A step cannot be faster than its bytes at the read bandwidth, nor than its FLOPs at the rate of a
large matrix product; both can go on at once. So

    roofline seconds = sum over steps of max(bytes / bandwidth, FLOPs / rate)
    share of the roofline = roofline seconds / measured seconds

Bandwidth and rate are measured here, on the same device and in the same process.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

BUFFER_BYTES = {"cuda": 8 * 2**30, "cpu": 2**29}  # far more than any cache holds
MATRIX = {"cuda": 8192, "cpu": 2048}  # rows and columns
REPEATS = 10


@dataclass(frozen=True)
class Work:
    """What one step needs at least."""

    weight_bytes: int
    kv_bytes: int  # a shared prefix read once for each request
    kv_bytes_shared: int  # a shared prefix read once for all of them
    flops: int

    def num_bytes(self, shared: bool) -> int:
        return self.weight_bytes + (self.kv_bytes_shared if shared else self.kv_bytes)


@dataclass(frozen=True)
class Peaks:
    """What the device can do, measured: bytes read a second, FLOP/s of a large matrix product."""

    bandwidth: float
    flops: float

    def seconds(self, works: Iterable[Work], shared: bool = False) -> float:
        """The roofline: a step takes at least its bytes' time, and at least its FLOPs' time."""
        return sum(
            max(work.num_bytes(shared) / self.bandwidth, work.flops / self.flops) for work in works
        )


# -- counting ----------------------------------------------------------------------------------


def count_work(
    config: Any, trace: Iterable[Any], num_prompt_tokens: dict[str, int], shared_prefix: int = 0
) -> list[Work]:
    """What each step of a trace needed.

    config: nanovllm's ModelConfig. trace: StepRecords, whose rows are (request_id, first position,
    tokens computed). num_prompt_tokens: of each request. shared_prefix: tokens all have in common.
    """
    computed = dict.fromkeys(num_prompt_tokens, 0)  # the furthest that each request has ever come
    works = []
    for step in trace:
        num_sampled = 0
        for request_id, start, count in step.rows:
            end = start + count
            # A row samples if it ends with its request's newest token. After a preemption a
            # request repeats tokens, and samples again only past the furthest point it had reached.
            num_sampled += end >= num_prompt_tokens[request_id] and end > computed[request_id]
            computed[request_id] = max(computed[request_id], end)
        works.append(_work(config, step.rows, num_sampled, shared_prefix))
    return works


def _work(config: Any, rows: Iterable[tuple[str, int, int]], sampled: int, shared: int) -> Work:
    rows = list(rows)
    layers, channels = config.num_hidden_layers, config.num_attention_heads * config.head_dim
    body, head = layers * layer_weights(config), config.vocab_size * config.hidden_size
    tokens = sum(count for _, _, count in rows)
    # Token p attends to p + 1 tokens: a row of n from `start` to n * start + n (n + 1) / 2 pairs.
    pairs = sum(count * start + count * (count + 1) // 2 for _, start, count in rows)
    contexts = [start + count for _, start, count in rows]
    prefixes = [min(context, shared) for context in contexts]
    read_once = sum(contexts) - sum(prefixes) + max(prefixes, default=0)
    return Work(
        weight_bytes=(body + (head if sampled else 0)) * config.dtype.itemsize,
        kv_bytes=sum(contexts) * kv_bytes_per_token(config),
        kv_bytes_shared=read_once * kv_bytes_per_token(config),
        flops=2 * body * tokens + 2 * head * sampled + 4 * layers * channels * pairs,
    )


def layer_weights(config: Any) -> int:
    """Weights in one layer's matrices: query, key, value, output; gate, up, down."""
    hidden, dim = config.hidden_size, config.head_dim
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    return heads * dim * hidden + 3 * hidden * config.intermediate_size


def kv_bytes_per_token(config: Any) -> int:
    """Bytes of one token's keys and values, in all layers."""
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return values * config.dtype.itemsize


# -- measuring ---------------------------------------------------------------------------------


def measure_peaks(device: Any, dtype: Any) -> Peaks:
    """Read bandwidth in bytes/s and matrix rate in FLOP/s of a torch device, in `dtype`."""
    return Peaks(read_bandwidth(device), matrix_rate(device, dtype))


def read_bandwidth(device: Any) -> float:
    """Bytes a second of one pass over a buffer much larger than any cache, the best of several."""
    import torch

    wanted = BUFFER_BYTES[device.type]
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        wanted = 2 ** int(math.log2(min(wanted, free // 2)))
    buffer = torch.zeros(wanted // 4, dtype=torch.float32, device=device)
    return max(wanted / seconds_of(read, device) for read in _ways_to_read(buffer))


def _ways_to_read(buffer: Any) -> list[Callable[[], Any]]:
    """Functions that read a whole buffer: a sum, and on a GPU our kernel in several shapes."""
    ways: list[Callable[[], Any]] = [buffer.sum]
    if buffer.is_cuda:
        try:
            from course.measure.read_kernel import ways_to_read
        except ModuleNotFoundError:  # no triton: what torch's own sum reaches is shown
            return ways
        ways += ways_to_read(buffer)
    return ways


def matrix_rate(device: Any, dtype: Any) -> float:
    """FLOP/s of a large square matrix product by torch."""
    import torch

    size = MATRIX[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: a @ b, device)


def seconds_of(function: Callable[[], Any], device: Any) -> float:
    """The fastest of several calls, after a warm-up, in seconds on the device's own clock."""
    for _ in range(3):
        function()
    timed = cuda_seconds if device.type == "cuda" else cpu_seconds
    return min(timed(function) for _ in range(REPEATS))


def cuda_seconds(function: Callable[[], Any]) -> float:
    """Seconds of one call on the GPU's clock."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def cpu_seconds(function: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
