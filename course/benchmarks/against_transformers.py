"""Throughput and memory of this engine beside transformers' generate, in one process.

Both answer the same prompts with the same number of tokens each, greedy, past end-of-sequence, in
the same dtype on the same threads. transformers runs static batches in order of arrival, padded on
the left; a batch ends with its longest answer. The engine admits and retires requests at any step.
The two take turns; every round has fresh prompts, so nothing comes from the prefix cache. Prompts
are random token ids, since only their number matters here. A benchmark, not a test.
"""

import argparse
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from course import machine
from course.models.choice import pick_model

PROMPT_TOKENS = (16, 128)
OUTPUT_TOKENS = (16, 128)
MAX_MODEL_LEN = PROMPT_TOKENS[1] + OUTPUT_TOKENS[1]
MAX_NUM_SEQS = 32
BLOCK_SIZE = 16  # the engine's default


# -- the workload ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    num_output: int


def make_workload(num_requests: int, vocab_size: int, seed: int) -> list[Request]:
    """Random prompts. The lengths are the same for every seed, the token ids are not."""
    lengths, ids = random.Random(0), random.Random(seed)
    requests = []
    for _ in range(num_requests):
        num_prompt, num_output = lengths.randint(*PROMPT_TOKENS), lengths.randint(*OUTPUT_TOKENS)
        requests.append(Request(ids.choices(range(vocab_size), k=num_prompt), num_output))
    return requests


def in_batches(requests: list[Request], size: int) -> list[list[Request]]:
    return [requests[i : i + size] for i in range(0, len(requests), size)]


# -- the two sides -----------------------------------------------------------------------------


class Side(Protocol):
    """One of the two that are compared."""

    def run(self, requests: list[Request]) -> None:
        """Answer all of them."""

    def kv_tokens(self, requests: list[Request]) -> tuple[int, int]:
        """Tokens for which KV memory was reserved, and tokens it held for somebody, at the most."""


class Engine:
    """This repository's engine."""

    def __init__(self, model: str, args: argparse.Namespace):
        from nanovllm import LLM

        max_num_seqs = args.max_num_seqs or MAX_NUM_SEQS
        limits = {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": max_num_seqs}
        limits["num_gpu_blocks_override"] = max_num_seqs * MAX_MODEL_LEN // BLOCK_SIZE
        self.llm = LLM(model, dtype=args.dtype, use_tqdm_on_load=False, **limits)
        self.dtype = self.llm.llm_engine.core.runner.kv_cache.dtype
        self.device = self.llm.llm_engine.device.type

    def run(self, requests: list[Request]) -> None:
        from nanovllm import SamplingParams

        params = [
            SamplingParams(temperature=0.0, max_tokens=r.num_output, ignore_eos=True)
            for r in requests
        ]
        prompts = [{"prompt_token_ids": r.prompt} for r in requests]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        check_lengths(requests, [len(output.outputs[0].token_ids) for output in outputs])

    def kv_tokens(self, requests: list[Request]) -> tuple[int, int]:
        blocks = self.llm.llm_engine.block_manager
        fewest_free = min(step.num_free_blocks for step in self.llm.llm_engine.trace)
        used = blocks.num_blocks - fewest_free
        return blocks.num_blocks * blocks.block_size, used * blocks.block_size


class Transformers:
    """transformers' generate, in static batches padded on the left."""

    def __init__(self, model: str, dtype: Any, device: str, batch_size: int):
        from transformers import AutoModelForCausalLM

        self.batch_size = batch_size
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device)
        self.model.generation_config.eos_token_id = None  # never stop early

    def run(self, requests: list[Request]) -> None:
        for batch in in_batches(requests, self.batch_size):
            self._run_batch(batch)

    def _run_batch(self, batch: list[Request]) -> None:
        import torch

        width, longest = max(len(r.prompt) for r in batch), max(r.num_output for r in batch)
        padding = [width - len(r.prompt) for r in batch]
        ids = [[0] * pad + r.prompt for pad, r in zip(padding, batch, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in padding]
        device = self.model.device
        output = self.model.generate(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=longest,
            do_sample=False,
            pad_token_id=0,
        )
        check_lengths([Request([], longest)], [output.shape[1] - width])

    def kv_tokens(self, requests: list[Request]) -> tuple[int, int]:
        """Counted, not measured: a row is as long as its batch's longest prompt and answer."""
        return max(map(self._batch_tokens, in_batches(requests, self.batch_size)))

    @staticmethod
    def _batch_tokens(batch: list[Request]) -> tuple[int, int]:
        longest = max(len(r.prompt) for r in batch) + max(r.num_output for r in batch) - 1
        return len(batch) * longest, sum(len(r.prompt) + r.num_output - 1 for r in batch)


def check_lengths(requests: list[Request], lengths: list[int]) -> None:
    wanted = [r.num_output for r in requests]
    if lengths != wanted:
        raise RuntimeError(f"answers of {wanted} tokens were wanted, there came {lengths}")


# -- comparing ---------------------------------------------------------------------------------


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Load both, warm both up, let them take turns; returns what to print or to keep."""
    from transformers import AutoConfig

    model = pick_model(args.model)
    config = AutoConfig.from_pretrained(model)
    workloads = [make_workload(args.requests, config.vocab_size, r) for r in range(args.runs + 1)]
    warm_up, rounds = workloads[0], workloads[1:]

    before = machine.resident_bytes()
    engine = Engine(model, args)
    engine.run(warm_up)
    between = machine.resident_bytes()
    theirs = Transformers(model, engine.dtype, engine.device, args.batch)
    theirs.run(warm_up)
    after = machine.resident_bytes()

    sides: dict[str, Side] = {"engine": engine, "transformers": theirs}
    seconds = take_turns(sides, rounds)
    growth = {"engine": between - before, "transformers": after - between}
    bytes_per_token = kv_bytes_per_token(config, engine.dtype.itemsize)
    results = {
        name: summarise(side, warm_up, seconds[name], growth[name], bytes_per_token)
        for name, side in sides.items()
    }
    return {**describe(model, engine, args, warm_up), **results}


def take_turns(sides: dict[str, Side], rounds: list[list[Request]]) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for requests in rounds:
        for name, side in sides.items():
            start = time.perf_counter()
            side.run(requests)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def summarise(
    side: Side, requests: list[Request], seconds: list[float], growth: int, bytes_per_token: int
) -> dict[str, Any]:
    """One side's numbers; tokens a second are wanted output tokens, at the median of the rounds."""
    reserved, used = side.kv_tokens(requests)
    return {
        "seconds": seconds,
        "tokens_per_second": sum(r.num_output for r in requests) / statistics.median(seconds),
        "kv_bytes_reserved": reserved * bytes_per_token,
        "kv_bytes_used": used * bytes_per_token,
        "resident_growth_bytes": growth,
    }


def describe(
    model: str, engine: Engine, args: argparse.Namespace, requests: list[Request]
) -> dict[str, Any]:
    import torch
    import transformers

    return {
        "model": Path(model).name if Path(model).exists() else model,
        "machine": machine.describe(engine.device),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "requests": args.requests,
        "prompt_tokens": sum(len(r.prompt) for r in requests),
        "output_tokens": sum(r.num_output for r in requests),
        "max_num_seqs": args.max_num_seqs or MAX_NUM_SEQS,
        "batch": args.batch,
        "peak_resident_bytes": machine.peak_resident_bytes(),
    }


def kv_bytes_per_token(config: Any, itemsize: int) -> int:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * itemsize


def print_report(report: dict[str, Any]) -> None:
    ours, theirs = report["engine"], report["transformers"]
    rounds = len(ours["seconds"])
    print(f"{report['model']}, {report['dtype']}, on {report['machine']}")
    print(
        f"{report['requests']} prompts, {report['prompt_tokens']:,} tokens in, "
        f"{report['output_tokens']:,} out; median of {rounds} rounds (fastest to slowest)"
    )
    columns = (f"nanovllm, {report['max_num_seqs']} at once", f"transformers, by {report['batch']}")
    print_row("", *columns)
    print_row("output tokens/s", *(f"{r['tokens_per_second']:.1f}" for r in (ours, theirs)))
    print_row("seconds", *(spread(r["seconds"]) for r in (ours, theirs)))
    for label, key in (
        ("KV cache reserved", "kv_bytes_reserved"),
        ("  of it used, at most", "kv_bytes_used"),
        ("process grew by", "resident_growth_bytes"),
    ):
        print_row(label, *(f"{r[key] / 2**20:,.0f} MiB" for r in (ours, theirs)))
    ratio = ours["tokens_per_second"] / theirs["tokens_per_second"]
    print(f"nanovllm gave {ratio:.2f} times as many output tokens a second.")


def print_row(label: str, *cells: str) -> None:
    print(f"  {label:<22}" + "".join(f"{cell:>26}" for cell in cells))


def spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
