"""Answer a few prompts with streaming text, and print what it cost.

course run
course run --model Qwen/Qwen3-0.6B "Why is the sky blue?" "Name three birds."
"""

import argparse
from typing import Any

PROMPTS = [
    "Tell me a story about a fox who finds a key.",
    "What is the capital of France?",
    "Write one sentence about the sea.",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="*", default=PROMPTS, help="what to ask (default: three)")
    parser.add_argument("--model", help="a folder or Hugging Face id (default: $MODEL, or ours)")
    parser.add_argument("--max-tokens", type=int, default=100, help="tokens an answer (100)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (0.7)")


def main(args: argparse.Namespace) -> int:
    from course.models import pick_model
    from nanovllm import LLM, SamplingParams

    params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens, seed=0)
    with LLM(pick_model(args.model)) as llm:
        stream_answers(llm, args.prompts, params)
    return 0


def stream_answers(llm: Any, prompts: list[str], params: Any) -> None:
    """Run all prompts at once; print the first answer as it comes, the others behind it."""
    tokenizer = llm.get_tokenizer()
    stream = llm.stream([as_chat(tokenizer, prompt) for prompt in prompts], params)
    waiting = [""] * len(prompts)
    print(f"\n> {prompts[0]}")
    for index, text in stream:
        if index == 0:
            print(text, end="", flush=True)
        else:
            waiting[index] += text
    for prompt, text in zip(prompts[1:], waiting[1:], strict=True):
        print(f"\n\n> {prompt}\n{text}", end="")
    print("\n\n" + summary(llm, stream.outputs))


def as_chat(tokenizer: Any, prompt: str) -> Any:
    """The prompt's token ids in the model's chat format; the prompt itself if it has none."""
    if not tokenizer.chat_template:
        return prompt
    talk = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(
        talk, tokenize=True, return_dict=False, add_generation_prompt=True
    )
    return {"prompt_token_ids": ids}


def summary(llm: Any, outputs: list) -> str:
    """Throughput, latency and cache use, from the engine's own records."""
    from course.machine import describe

    engine = llm.llm_engine
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    start = min(output.metrics.arrival_time for output in outputs)
    seconds = max(output.metrics.finished_time for output in outputs) - start
    ttft = sum(output.metrics.ttft for output in outputs) / len(outputs)
    tpots = [output.tpot for output in outputs if output.tpot is not None]
    blocks = engine.block_manager
    used = blocks.num_blocks - min(record.num_free_blocks for record in engine.trace)
    hits = sum(output.num_cached_tokens for output in outputs)
    asked = sum(len(output.prompt_token_ids) for output in outputs)
    rows = [
        ("machine", describe(engine.device.type)),
        ("output tokens", f"{tokens} in {seconds:.2f} s: {tokens / seconds:.1f} tok/s"),
        ("time to first token", f"{1000 * ttft:.0f} ms on average"),
    ]
    if tpots:
        mean = 1000 * sum(tpots) / len(tpots)
        rows.append(("time per output token", f"{mean:.1f} ms on average"))
    rows.append(
        ("KV cache", f"{used} of {blocks.num_blocks} blocks of {blocks.block_size} tokens at most")
    )
    rows.append(("prefix cache", f"{hits} of {asked} prompt tokens found"))
    return "\n".join(f"{name:<22} {value}" for name, value in rows)
