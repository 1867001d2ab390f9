"""Hostile workloads: random requests on a cramped engine, each answer compared with a quiet one's.

    python tests/helpers/hostile.py --seeds 0:10000                 # the counting model, exact
    python tests/helpers/hostile.py --seeds 0:2000 --model checkpoints/storyteller --device cuda

Everything about a workload follows from its seed: a tiny cache, block sizes 1 to 64, shared and
identical prompts, budgets down to one token, aborts at any moment, stop strings, several answers
to one prompt, failing steps, overlap on and off, one rank or (every 50th engine) two. The quiet
engine has a large cache and runs one request at a time, without overlap, sharing or chunks. It
answers a request for several answers as one request for each seed. Tokens, text and the reason for
the end must be equal. With a real model rounding differs between batches, so there tokens are
equal up to the first place where the quiet engine's two best logits lie closer than `--tie`; those
places are counted. Progress is kept in `--record`, and the same command goes on from there.
"""

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from counting_engine import CONFIG, engine_of
from counting_model import check_blocks

from nanovllm import LLMEngine, SamplingParams
from nanovllm.engine.sequence import Sequence

BLOCK_SIZES = [1, 2, 3, 4, 5, 7, 8, 16, 32, 64]
QUIET = {
    "async_scheduling": False,
    "enable_prefix_caching": False,
    "enable_chunked_prefill": False,
    "max_num_seqs": 1,
    "block_size": 16,
    "use_tqdm_on_load": False,
}
Make = Callable[..., AbstractContextManager[LLMEngine]]


class Planted(Exception):
    """The failure that a workload plants in its own steps."""


# -- what a seed stands for ----------------------------------------------------------------------


def draw_options(rng: random.Random, longest: int) -> dict[str, Any]:
    """Arguments of a cramped engine that can hold one request of `longest` tokens, just so."""
    block_size = rng.choice(BLOCK_SIZES)
    chunked = rng.random() < 0.8
    budget = rng.choice([1, 2, rng.randint(1, 40)]) if chunked else longest + rng.randint(0, 9)
    return {
        "max_model_len": longest,
        "block_size": block_size,
        "num_gpu_blocks_override": -(-longest // block_size)
        + rng.choice([0, 1, rng.randint(0, 9)]),
        "max_num_seqs": rng.randint(1, 6),
        "max_num_batched_tokens": budget,
        "enable_chunked_prefill": chunked,
        "enable_prefix_caching": rng.random() < 0.8,
        "async_scheduling": rng.random() < 0.6,
        "use_tqdm_on_load": False,
    }


def draw_prompts(rng: random.Random, longest: int, vocab: int) -> list[list[int]]:
    shared = [rng.randrange(vocab) for _ in range(longest)]
    prompts: list[list[int]] = []
    for _ in range(rng.randint(1, 12)):
        length = rng.randint(1, longest - 1 if rng.random() < 0.5 else 1 + longest // 8)
        same = rng.randint(0, length)
        prompt = shared[:same] + [rng.randrange(vocab) for _ in range(length - same)]
        if prompts and rng.random() < 0.2:
            prompt = list(rng.choice(prompts))
        elif rng.random() < 0.2:  # alike but for its head: only a chained hash tells them apart
            prompt[0] = rng.randrange(vocab)
        prompts.append(prompt)
    return prompts


def draw_params(rng: random.Random, text: str, vocab: int, exact: bool) -> dict[str, Any]:
    """Parameters of a request; its stop strings are cut from `text`, its unstopped answer."""
    params: dict[str, Any] = {"temperature": 0.0, "ignore_eos": rng.random() < 0.5}
    if exact and rng.random() < 0.3:
        params |= {"temperature": rng.choice([0.1, 0.5, 2.0]), "seed": rng.randrange(2**40)}
        params |= rng.choice([{}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}])
        params["n"] = rng.choice([1, 1, 2, 5])
    if text and rng.random() < 0.4:
        at = rng.randrange(len(text))
        params["stop"] = [text[at : at + rng.randint(1, 5)], "never said"]
        params["include_stop_str_in_output"] = rng.random() < 0.3
    if rng.random() < 0.2:
        params["stop_token_ids"] = rng.sample(range(vocab), 2)
    return params


# -- the two engines -----------------------------------------------------------------------------


class Quiet:
    """An engine that has time and room; it answers one request at a time."""

    def __init__(self, engine: LLMEngine):
        self.engine = engine

    def answer(self, prompt: list[int], params: SamplingParams) -> Sequence:
        (seq,) = self.engine.add([self.engine.make_request("quiet", prompt, params)])
        while not seq.is_finished:
            self.engine.advance()
        return seq

    def gap(self, token_ids: list[int]) -> float:
        """How far the two best logits of the next token lie apart."""
        model, seen = self.engine.core.runner.model, []
        plain = model.compute_logits
        model.compute_logits = lambda hidden: seen.append(plain(hidden)) or seen[-1]
        try:
            self.answer(token_ids, SamplingParams(temperature=0.0, max_tokens=1))
        finally:
            del model.compute_logits
        best = seen[-1][-1].float().topk(2).values
        return float(best[0] - best[1])


def plant(engine: LLMEngine, rng: random.Random, counts: Counter) -> None:
    """Let a step fail now and then, in its forward pass or in its sampler."""
    model, name = engine.core.runner.model, rng.choice(["__call__", "compute_logits"])
    plain = type(model)

    def sometimes(self: Any, *args: Any) -> Any:
        if rng.random() < 0.1:
            counts["failed steps"] += 1
            raise Planted
        return getattr(plain, name)(self, *args)

    model.__class__ = type("Failing", (plain,), {name: sometimes})


def drive(engine: LLMEngine, requests: list[dict], rng: random.Random) -> list[Sequence]:
    """Add, abort, look and step in any order until nothing is left."""
    waiting, seqs = list(requests), []
    while waiting or engine.has_unfinished_requests():
        if waiting and rng.random() < 0.5:
            count = rng.randint(1, 3)
            seqs += engine.add(waiting[:count])
            del waiting[:count]
        if seqs and rng.random() < 0.03:
            seq = rng.choice(seqs)
            engine.abort_request((seq.parent or seq).request_id)
        if seqs and rng.random() < 0.3:
            look(rng.choice(seqs))
        with suppress(Planted):
            engine.advance()
        check_blocks(engine.core)
    return seqs


def look(seq: Sequence) -> None:
    """What a stream may show now must stand to the end."""
    shown = getattr(seq, "shown", "")
    seq.shown = seq.detokenizer.text  # type: ignore[attr-defined]
    assert seq.shown.startswith(shown), (shown, seq.shown)  # type: ignore[attr-defined]


# -- one workload --------------------------------------------------------------------------------


class Hostile:
    """Workloads by seed over engines of one kind, and what they came to."""

    def __init__(self, make: Make, quiet: Quiet, exact: bool, tie: float, an_engine: int):
        self.make, self.quiet, self.exact, self.tie = make, quiet, exact, tie
        self.an_engine = an_engine  # workloads on one engine, one after the other
        self.counts: Counter[str] = Counter()

    def run(self, seed: int) -> None:
        """All the workloads of the engine that begins with workload `seed`."""
        rng = random.Random(seed)
        longest = rng.randint(4, 40)
        two_ranks = self.exact and seed // self.an_engine % 50 == 49
        with self.make(2 if two_ranks else 1, **draw_options(rng, longest)) as engine:
            if self.exact and not two_ranks and rng.random() < 0.2:
                plant(engine, rng, self.counts)
            for number in range(self.an_engine):
                self.workload(engine, longest, random.Random(f"{seed} {number}"))
                self.counts["workloads"] += 1
                self.counts["on two ranks"] += two_ranks
            assert engine.block_manager.num_free_blocks == engine.block_manager.num_blocks
            assert not engine.sequences
            assert not engine.parents
            self.counts["steps"] += len(engine.trace)

    def workload(self, engine: LLMEngine, longest: int, rng: random.Random) -> None:
        vocab, requests, answers = engine.model_config.vocab_size, [], []
        for number, prompt in enumerate(draw_prompts(rng, longest, vocab)):
            room = longest - len(prompt)
            most = rng.choice([room, rng.randint(1, room)])
            free = SamplingParams(temperature=0.0, max_tokens=most, ignore_eos=True)
            text = self.quiet.answer(prompt, free).detokenizer.text
            drawn = draw_params(rng, text, vocab, self.exact)
            params = SamplingParams(max_tokens=most, **drawn)
            for index in range(params.n):
                seed = None if params.seed is None else params.seed + index
                answers.append(self.quiet.answer(prompt, replace(params, n=1, seed=seed)))
            requests.append(engine.make_request(str(number), prompt, params))
        for seq, answer in zip(drive(engine, requests, rng), answers, strict=True):
            self.compare(seq, answer)

    def compare(self, seq: Sequence, answer: Sequence) -> None:
        got, wanted = seq.output_ids, answer.output_ids
        self.counts["requests"] += seq.index == 0
        self.counts["further answers"] += seq.index > 0
        self.counts["tokens"] += len(got)
        self.counts["preempted"] += seq.metrics.num_preempted_tokens > 0
        self.counts[f"ended by {seq.finish_reason}"] += 1
        common = next(
            (i for i, pair in enumerate(zip(got, wanted, strict=False)) if pair[0] != pair[1]), None
        )
        if common is not None:
            gap = self.quiet.gap(answer.token_ids[: answer.num_prompt_tokens + common])
            assert not self.exact, f"token {common}: {got} is not {wanted}"
            assert gap < self.tie, f"token {common}: {got} is not {wanted}, gap {gap}"
            self.counts["ties"] += 1
        elif seq.finish_reason == "abort":
            assert got == wanted[: len(got)]
        else:
            look(seq)
            ended = (got, seq.detokenizer.text, seq.finish_reason)
            assert ended == (wanted, answer.detokenizer.text, answer.finish_reason)


# -- the two kinds of engine, and the command ----------------------------------------------------


@contextmanager
def real_engine(size: int, model: str, device: str, dtype: str, **options: Any):
    from nanovllm import EngineArgs

    args = EngineArgs(model, device=device, dtype=dtype, tensor_parallel_size=size, **options)
    engine = LLMEngine(args)
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def hostile(model: str | None = None, device: str = "cpu", tie: float = 0.0, an_engine: int = 1):
    """A Hostile over the counting model, or over a model's folder."""
    make: Make = engine_of
    if model:
        given = {"model": model, "device": device, "dtype": "float32"}

        def make(size, **options):
            return real_engine(size, **given, **options)

    with ExitStack() as stack:
        engine = stack.enter_context(
            make(
                1,
                max_model_len=CONFIG["max_position_embeddings"],
                num_gpu_blocks_override=16,
                **QUIET,
            )
        )
        yield Hostile(make, Quiet(engine), model is None, tie, an_engine)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0:10000", help="first:end, of workloads")
    parser.add_argument("--model", help="a real model's folder; without it, the counting model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tie", type=float, default=1e-4, help="logits closer than this are a tie")
    parser.add_argument("--an-engine", type=int, help="workloads on one engine (1; real model: 50)")
    parser.add_argument(
        "--seconds", type=float, default=480, help="stop after these, and go on later"
    )
    parser.add_argument("--record", type=Path, default=Path(".course/hostile.json"))
    args = parser.parse_args()
    first, end = map(int, args.seeds.split(":"))
    an_engine = args.an_engine or (50 if args.model else 1)
    asked = {"seeds": args.seeds, "model": args.model, "device": args.device, "tie": args.tie}
    asked["an_engine"] = an_engine
    record = {"asked": asked, "next": first, "seconds": 0.0, "counts": {}}
    if args.record.exists() and (old := json.loads(args.record.read_text()))["asked"] == asked:
        record = old
    return run_all(args, record, end, an_engine)


def run_all(args: argparse.Namespace, record: dict, end: int, an_engine: int) -> int:
    begun, before = time.monotonic(), record["seconds"]
    with hostile(args.model, args.device, args.tie, an_engine) as work:
        work.counts.update(record["counts"])
        while record["next"] < end and time.monotonic() - begun < args.seconds:
            seed = record["next"]
            try:
                work.run(seed)
            except BaseException:
                print(f"the engine that begins with workload {seed} failed", file=sys.stderr)
                raise
            record["next"] = seed + an_engine
            record["counts"] = dict(sorted(work.counts.items()))
            record["seconds"] = round(before + time.monotonic() - begun, 1)
            if record["next"] % 100 < an_engine or record["next"] >= end:
                save(args.record, record)
        save(args.record, record)
    print(json.dumps(record, indent=2))
    return 0 if record["next"] >= end else 3  # 3: call again


def save(file: Path, record: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_suffix(".new")
    fresh.write_text(json.dumps(record, indent=2) + "\n")
    fresh.replace(file)


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    sys.exit(main())
