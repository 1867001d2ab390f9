"""Answer a few prompts with streaming text, and print what it cost.

course run
course run --model Qwen/Qwen3-0.6B "Why is the sky blue?" "Name three birds."
"""

import argparse
from pathlib import Path
from typing import Any

from course.arguments import positive

PROMPTS = [  # requests for stories, because the course's own model refuses all others
    "Tell me a story about a fox who finds a key.",
    "Write a short story about an owl and a lantern.",
    "Tell me a funny story about a duck who finds an umbrella.",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="*", default=PROMPTS, help="what to ask (default: three)")
    parser.add_argument(
        "--model", help="a folder or Hugging Face id (default: $COURSE_MODEL, or ours)"
    )
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, ... (default: auto)")
    parser.add_argument("--max-tokens", type=int, default=150, help="of each answer (default: 150)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default: 0.7)")
    parser.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help="torch's CPU threads (default: 1 for our model, torch's own number for another)",
    )


def main(args: argparse.Namespace) -> int:
    import torch

    from course.models.choice import pick_model
    from nanovllm import LLM, SamplingParams

    params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens, seed=0)
    model = pick_model(args.model)
    torch.set_num_threads(args.threads or usual_threads(model))
    with LLM(model, dtype=args.dtype) as llm:
        stream_answers(llm, args.prompts, params)
    return 0


def usual_threads(model: str) -> int:
    """One CPU thread for a model of the course's own, and torch's own number for any other.

    The small model's matrix products are too short to share: a second thread gains nothing on an
    idle machine, and on a busy one each product waits until every thread has had its turn.
    """
    import torch

    from course.models.choice import CHECKPOINTS

    own = Path(model).expanduser().resolve().is_relative_to(CHECKPOINTS)
    return 1 if own else torch.get_num_threads()


def stream_answers(llm: Any, prompts: list[str], params: Any) -> None:
    """Answer all prompts in one batch, and show them in order, each as it is being written.

    While an earlier answer is on the screen the later ones are written too, and wait.
    """
    tokenizer = llm.get_tokenizer()
    stream = llm.stream([as_chat(tokenizer, prompt) for prompt in prompts], params)
    unfinished = llm.llm_engine.sequences
    request_ids = list(unfinished)
    written = [""] * len(prompts)
    shown = 0
    print(f"\n> {prompts[0]}")
    for index, text in stream:
        while shown < index and request_ids[shown] not in unfinished:
            shown += 1
            print(f"\n\n> {prompts[shown]}\n{written[shown]}", end="", flush=True)
        written[index] += text
        if index == shown:
            print(text, end="", flush=True)
    for prompt, text in zip(prompts[shown + 1 :], written[shown + 1 :], strict=True):
        print(f"\n\n> {prompt}\n{text}", end="")
    print("\n\n" + summary(llm, stream.outputs))


def as_chat(tokenizer: Any, prompt: str) -> Any:
    """The prompt's token ids in the model's chat format; the prompt itself if it has none."""
    from nanovllm.checkpoint.tokenizer import tokenizer_errors

    if not tokenizer.chat_template:
        return prompt
    talk = [{"role": "user", "content": prompt}]
    with tokenizer_errors(tokenizer.name_or_path):
        ids = tokenizer.apply_chat_template(
            talk, tokenize=True, return_dict=False, add_generation_prompt=True
        )
    return {"prompt_token_ids": ids}


def summary(llm: Any, outputs: list) -> str:
    """Throughput, latency and cache use, from the engine's own records."""
    from course.machine import describe

    engine = llm.llm_engine
    dtype = str(engine.core.runner.kv_cache.dtype).removeprefix("torch.")
    rows = [
        ("model", f"{Path(engine.args.model).name}, {dtype}"),
        ("machine", describe(engine.device.type)),
        *speed_rows(outputs),
        *cache_rows(engine.block_manager, engine.trace, outputs),
    ]
    return "\n".join(f"{name:<22} {value}" for name, value in rows)


def speed_rows(outputs: list) -> list[tuple[str, str]]:
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    start = min(output.metrics.queued_ts for output in outputs)
    seconds = max(output.metrics.last_token_ts for output in outputs) - start
    rows = [("output tokens", f"{tokens} in {seconds:.2f} s: {tokens / seconds:.1f} tok/s")]
    for name, values in (
        ("time to first token", [output.metrics.ttft for output in outputs]),
        ("time per output token", [o.tpot for o in outputs if o.tpot is not None]),
    ):
        if values:
            mean, worst = 1000 * sum(values) / len(values), 1000 * max(values)
            rows.append((name, f"{mean:.0f} ms on average, {worst:.0f} at most"))
    return rows


def cache_rows(blocks: Any, trace: list, outputs: list) -> list[tuple[str, str]]:
    used = blocks.num_blocks - min(step.num_free_blocks for step in trace)
    hits = sum(output.num_cached_tokens for output in outputs)
    asked = sum(len(output.prompt_token_ids) for output in outputs)
    size = blocks.block_size
    return [
        ("KV cache", f"{used} of {blocks.num_blocks:,} blocks of {size} tokens at the peak"),
        ("prefix cache", f"{hits} of {asked} prompt tokens found"),
    ]
