"""A soak: 100,000 short requests, or eight minutes. Does memory stay flat, and do counters add up?

    python tests/helpers/soak.py                 # the course's own model, on this machine
    python tests/helpers/soak.py --device cuda   # call it again and it goes on from its record

Every round sends a few hundred requests; some of its streams are dropped half-way, which aborts
them. Tokens asked for must be tokens returned and tokens lost to aborts, to the last one. After
each round the record gets the process's memory and the median and mean time of a step; timings are
reported, never asserted.
"""

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from hostile import save

from course.machine import resident_bytes
from nanovllm import LLM, SamplingParams

ROUND = 500  # requests
DROPPED = 20  # of them, streamed and dropped
LONGEST_PROMPT, MOST_TOKENS = 12, 4


def memory_bytes(device: str) -> dict[str, int]:
    """What the process holds now: on the host, and on the GPU by torch."""
    held = {"resident": resident_bytes()}
    if device == "cuda":
        held["gpu_reserved"] = torch.cuda.memory_reserved()
        held["gpu_allocated"] = torch.cuda.memory_allocated()
    return held


def draw(rng: random.Random, count: int, vocab: int) -> tuple[list, list]:
    prompts = [[rng.randrange(vocab) for _ in range(rng.randint(1, LONGEST_PROMPT))]
               for _ in range(count)]  # fmt: skip
    params = [
        SamplingParams(
            temperature=rng.choice([0.0, 1.0]),
            max_tokens=rng.randint(1, MOST_TOKENS),
            ignore_eos=True,
        )
        for _ in range(count)
    ]
    return prompts, params


def one_round(llm: LLM, rng: random.Random) -> dict[str, int]:
    """Send a round; tokens asked for, returned, and lost to aborts."""
    vocab = llm.llm_engine.model_config.vocab_size
    prompts, params = draw(rng, ROUND - DROPPED, vocab)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    returned = sum(len(output.outputs[0].token_ids) for output in outputs)
    prompts, dropped = draw(rng, DROPPED, vocab)
    stream = llm.stream(prompts, dropped)
    next(stream, None)
    stream.close()
    streamed = [output.outputs[0] for output in stream.outputs]
    kept = sum(len(output.token_ids) for output in streamed)
    lost = sum(
        asked.max_tokens - len(output.token_ids)
        for asked, output in zip(dropped, streamed, strict=True)
        if output.finish_reason == "abort"
    )
    return {
        "requests": ROUND,
        "tokens asked": sum(p.max_tokens for p in [*params, *dropped]),
        "tokens returned": returned + kept,
        "tokens lost to aborts": lost,
        "aborted requests": sum(output.finish_reason == "abort" for output in streamed),
    }


def check(llm: LLM, counts: dict[str, int]) -> None:
    engine = llm.llm_engine
    found = counts["tokens returned"] + counts["tokens lost to aborts"]
    if counts["tokens asked"] != found:
        raise RuntimeError(f"tokens do not add up: {counts}")
    if engine.block_manager.num_free_blocks != engine.block_manager.num_blocks:
        raise RuntimeError("blocks are held by no request")
    if engine.sequences or engine.has_unfinished_requests():
        raise RuntimeError("requests are left over")


def soak(llm: LLM, record: dict[str, Any], most: int, seconds: float, file: Path) -> None:
    device, trace = llm.llm_engine.device.type, llm.llm_engine.core.trace
    begun, run = time.monotonic(), record["runs"] + 1
    while record["totals"].get("requests", 0) < most and time.monotonic() - begun < seconds:
        number = len(record["rounds"])
        trace.clear()
        counts = one_round(llm, random.Random(number))
        check(llm, counts)
        for name, value in counts.items():
            record["totals"][name] = record["totals"].get(name, 0) + value
        times = [step.end_time - step.start_time for step in trace]
        record["rounds"].append(
            {
                "run": run,
                "steps": len(times),
                "step_median_seconds": round(statistics.median(times), 6),
                "step_mean_seconds": round(statistics.fmean(times), 6),
                **memory_bytes(device),
            }
        )
        if number % 10 == 0:
            save(file, record)
    record["runs"] = run
    record["seconds"] = round(record["seconds"] + time.monotonic() - begun, 1)
    save(file, record)


def drift(record: dict[str, Any]) -> dict[str, Any]:
    """The first tenth of the last run's rounds after a warm-up, beside the last tenth."""
    rounds = [row for row in record["rounds"] if row["run"] == record["runs"]][2:]
    tenth = max(1, len(rounds) // 10)
    report = {"rounds": len(rounds)}
    for name in [key for key in rounds[0] if key not in ("run", "steps")] if rounds else []:
        first, last = (
            statistics.median(r[name] for r in part) for part in (rounds[:tenth], rounds[-tenth:])
        )
        report[name] = {"first": first, "last": last, "ratio": round(last / max(first, 1e-9), 3)}
    return report


def main() -> int:
    from course import machine
    from course.models.choice import pick_model

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder or Hugging Face id; the course's own without it")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=480, help="then call it again to go on")
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    file = args.record or Path(f".course/soak_{args.device}.json")
    model = pick_model(args.model)
    asked = {"model": Path(model).name, "device": args.device, "requests": args.requests}
    record = {"asked": asked, "runs": 0, "seconds": 0.0, "totals": {}, "rounds": []}
    if file.exists() and (old := json.loads(file.read_text()))["asked"] == asked:
        record = old
    record |= {"machine": machine.describe(args.device), "versions": machine.versions()}
    options = {"max_model_len": 64, "gpu_memory_utilization": 0.1, "use_tqdm_on_load": False}
    with LLM(model, device=args.device, **options) as llm:
        soak(llm, record, args.requests, args.seconds, file)
    record["drift"] = drift(record)
    save(file, record)
    print(json.dumps({k: v for k, v in record.items() if k != "rounds"}, indent=2))
    return 0 if record["totals"]["requests"] >= args.requests else 3  # 3: call again


if __name__ == "__main__":
    sys.exit(main())
