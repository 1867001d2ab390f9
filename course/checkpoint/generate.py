"""Write stories with SmolLM2 through this engine: python -m course.checkpoint.generate FOLDER

Every story's outline is drawn from its number; the model ends its sentences, beat by beat, all
stories of a shard at once. A sentence's end that a filter refuses is sampled again, a few times;
then the story is given up. The engine's prefix cache holds what each story has come to so far.

A shard is a file, written when it is whole, so a call goes on where the last one stopped. The
command ends after --minutes, or when there are --stories. FOLDER/record.json adds up what it took.
"""

import argparse
import json
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from course.bench import option, positive
from course.checkpoint.filters import completion_problem, story_problem
from course.checkpoint.outline import GAP, Plan, draw_plan

TRIES = 4  # for each sentence
SHARD = {"cuda": 8192, "cpu": 64}  # stories drawn for one file
LIMITS = {"cuda": {"max_num_seqs": 1024}, "cpu": {"max_num_seqs": 64}}
STOPS = [".", "!", "?", "\n"]
SYSTEM = "You write short stories for small children, in short sentences and simple words."
SAMPLING = {"temperature": 0.7, "top_p": 0.9, "max_tokens": 28, "stop": STOPS}


@dataclass
class Draft:
    """A story while it is being written."""

    plan: Plan
    head: str  # the chat up to the story
    text: str = ""
    written: list[str] = field(default_factory=list)  # the ends of sentences that the model gave
    problem: str | None = None

    @property
    def alive(self) -> bool:
        return self.problem is None


# -- writing -------------------------------------------------------------------------------------


def write_stories(llm: Any, plans: list[Plan], seed: int = 0) -> tuple[list[Draft], Counter]:
    """Write a story for each plan; drafts, some given up, and a count of what happened."""
    drafts = [Draft(plan, head_of(llm, plan)) for plan in plans]
    counts: Counter[str] = Counter()
    for beat in range(max(len(plan.beats) for plan in plans)):
        open_drafts = []
        for draft in drafts:
            if draft.alive and beat < len(draft.plan.beats):
                lead = draft.plan.beats[beat]
                draft.text = f"{draft.text} {lead.removesuffix(GAP).rstrip()}".lstrip()
                if lead.endswith(GAP):
                    open_drafts.append(draft)
        complete(llm, open_drafts, beat, seed, counts)
    for draft in filter(lambda draft: draft.alive, drafts):
        draft.problem = story_problem(draft.text, draft.plan.character, draft.plan.thing)
    counts.update(f"given up: {draft.problem}" for draft in drafts if not draft.alive)
    return drafts, counts


def head_of(llm: Any, plan: Plan) -> str:
    """The chat that asks for the story, up to where the story begins."""
    ask = (
        f"Write a short {plan.tone} story about a {plan.trait} {plan.character} named {plan.name} "
        f"who finds a {plan.thing}."
    )
    talk = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": ask}]
    tokenizer = llm.get_tokenizer()
    return tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)


def complete(llm: Any, drafts: list[Draft], beat: int, seed: int, counts: Counter) -> None:
    """End the sentence that each draft has begun; those that cannot be ended are given up."""
    from nanovllm import SamplingParams

    reasons: dict[int, str] = {}
    for attempt in range(TRIES):
        params = [
            SamplingParams(
                seed=((seed * 2**24 + draft.plan.number) * 16 + beat) * TRIES + attempt,
                include_stop_str_in_output=True,
                **SAMPLING,
            )
            for draft in drafts
        ]
        prompts = [draft.head + draft.text for draft in drafts]
        outputs = llm.generate(prompts, params, use_tqdm=False) if drafts else []
        left = []
        for draft, output in zip(drafts, outputs, strict=True):
            count(output, counts)
            if problem := accept(draft, output.outputs[0]):
                counts[f"refused: {problem}"] += 1
                reasons[draft.plan.number] = problem
                left.append(draft)
        drafts = left
    for draft in drafts:
        draft.problem = reasons[draft.plan.number]


def accept(draft: Draft, output: Any) -> str | None:
    """Add a sentence's end to the draft; or the reason why it is refused."""
    end = output.text.rstrip("\n").replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    if output.finish_reason != "stop" or not end.strip():
        return "not ended"
    if (draft.text + end).count('"') % 2:
        end += '"'  # the sentence ended inside a speech
    if problem := completion_problem(end, draft.text, draft.plan):
        return problem
    draft.text += end
    draft.written.append(end.strip())
    return None


def count(output: Any, counts: Counter) -> None:
    counts["requests"] += 1
    counts["generated_tokens"] += len(output.outputs[0].token_ids)
    counts["prompt_tokens"] += len(output.prompt_token_ids)
    counts["cached_prompt_tokens"] += output.num_cached_tokens
    counts["preempted_tokens"] += output.metrics.num_preempted_tokens


# -- shards --------------------------------------------------------------------------------------


def shard_file(folder: Path, index: int) -> Path:
    return folder / "stories" / f"{index:05d}.jsonl"


def write_shard(llm: Any, folder: Path, index: int, size: int, seed: int) -> dict[str, Any]:
    """Write one shard's stories and what they cost; the stories appear when they are whole."""
    start = time.perf_counter()
    plans = [draw_plan(number, seed) for number in range(index * size, (index + 1) * size)]
    drafts, counts = write_stories(llm, plans, seed)
    kept = [draft for draft in drafts if draft.alive]
    cost = {
        "drawn": len(drafts),
        "kept": len(kept),
        "seconds": time.perf_counter() - start,
        **dict(sorted(counts.items())),
    }
    file = shard_file(folder, index)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".json").write_text(json.dumps(cost, indent=2) + "\n")
    lines = [json.dumps(as_record(draft), ensure_ascii=False) + "\n" for draft in kept]
    scratch = file.with_suffix(".part")
    scratch.write_text("".join(lines), encoding="utf-8")
    scratch.rename(file)
    return cost


def as_record(draft: Draft) -> dict[str, Any]:
    """A story as its line in a shard: its plan without the beats, its text, what was written."""
    plan = asdict(draft.plan)
    del plan["beats"]
    return {**plan, "text": draft.text, "written": draft.written}


def add_up(folder: Path) -> dict[str, Any]:
    """What all shards took together."""
    total: Counter[str] = Counter()
    files = sorted((folder / "stories").glob("*.json"))
    for file in files:
        if file.with_suffix(".jsonl").exists():
            total.update(json.loads(file.read_text()))
    seconds = max(total["seconds"], 1e-9)
    rates = {
        "generated_tokens_per_second": total["generated_tokens"] / seconds,
        "kept_stories_per_second": total["kept"] / seconds,
    }
    return {"shards": len(files), **total, **rates}


# -- the command ---------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    start = time.perf_counter()
    import torch

    from course.machine import describe, versions
    from course.smollm2 import smollm2_dir
    from nanovllm import LLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = args.shard or SHARD[device]
    options = {"max_model_len": 512, **LIMITS[device], **dict(args.engine)}
    check_same_settings(args.folder, {"shard": size, "seed": args.seed})
    with LLM(args.model or str(smollm2_dir()), use_tqdm_on_load=False, **options) as llm:
        run_shards(llm, args, size, start)
    record = {"machine": describe(device), "versions": versions(), "engine": options}
    record |= add_up(args.folder)
    (args.folder / "record.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"{record['kept']:,} stories kept of {record['drawn']:,}, in {args.folder}")
    return 0


def run_shards(llm: Any, args: argparse.Namespace, size: int, start: float) -> None:
    """Write shards until there are enough stories, or no time for another one as long."""
    index, longest = 0, 0.0
    while True:
        done = add_up(args.folder)
        enough = args.stories and done.get("kept", 0) >= args.stories
        used = time.perf_counter() - start
        if enough or used + longest > 60 * args.minutes:
            return
        while shard_file(args.folder, index).exists():
            index += 1
        cost = write_shard(llm, args.folder, index, size, args.seed)
        longest = max(longest, cost["seconds"])
        rate = cost["generated_tokens"] / cost["seconds"]
        print(
            f"shard {index}: kept {cost['kept']:,} of {cost['drawn']:,} stories in "
            f"{cost['seconds']:.1f} s, {rate:,.0f} tok/s",
            flush=True,
        )


def check_same_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Shards of one folder have one size and one seed, or their numbers would not agree."""
    file = folder / "settings.json"
    if file.exists():
        before = json.loads(file.read_text())
        if before != settings:
            raise SystemExit(f"{folder} was begun with {before}, not {settings}; take another one")
        return
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings) + "\n")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, prog="course.checkpoint.generate")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, help="where the stories go; may hold some already")
    parser.add_argument("--minutes", type=float, default=8.0, help="then stop (default: 8)")
    parser.add_argument("--stories", type=positive, help="stop when there are so many")
    parser.add_argument("--shard", type=positive, help="stories drawn for one file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="the writer (default: SmolLM2-135M-Instruct)")
    named = {"action": "append", "default": [], "type": option, "metavar": "NAME=VALUE"}
    parser.add_argument("--engine", help="any argument of LLM", **named)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
