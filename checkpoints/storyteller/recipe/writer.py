"""SmolLM2 ends the sentences of outlines, through this engine: beat by beat, many stories at once.

A sentence's end that a filter refuses is sampled again, a few times; then the story is given up.
The engine's prefix cache holds what each story has come to so far.

What the host does for each request decides the speed, since the model is small. So sentences end
at token ids, not at strings (looking for a string decodes every token), nothing is filtered by
top-p (which costs a sort of the vocabulary a row), and prompts are tokenized in batches.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from checkpoints.storyteller.recipe.filters import completion_problem, story_problem
from checkpoints.storyteller.recipe.outline import GAP, Plan

TRIES = 4  # for each sentence
ENDS = (".", "!", "?", "\n", '."', '!"', '?"', "..", "...", "\n\n")  # tokens that end a sentence
FIRST_END = re.compile(r"[.!?\n]")  # some tokens hold one and more; the text is cut behind it
SYSTEM = "You write short stories for small children, in short sentences and simple words."
SAMPLING = {"temperature": 0.6, "max_tokens": 28}


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


def write_stories(llm: Any, plans: list[Plan], seed: int = 0) -> tuple[list[Draft], Counter]:
    """Write a story for each plan; drafts, some given up, and a count of what happened."""
    head = head_template(llm)
    drafts = [Draft(plan, head.replace(ASK_GOES_HERE, ask_for(plan))) for plan in plans]
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


ASK_GOES_HERE = "@@@"


def head_template(llm: Any) -> str:
    """The chat that asks for a story, up to where it begins; the request itself is still open."""
    talk = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": ASK_GOES_HERE}]
    tokenizer = llm.get_tokenizer()
    return tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)


def ask_for(plan: Plan) -> str:
    return (
        f"Write a short {plan.tone} story about a {plan.trait} {plan.character} named {plan.name} "
        f"who finds a {plan.thing}."
    )


def complete(llm: Any, drafts: list[Draft], beat: int, seed: int, counts: Counter) -> None:
    """End the sentence that each draft has begun; those that cannot be ended are given up."""
    if not drafts:
        return
    tokenizer = llm.get_tokenizer()
    stops = [i for i in tokenizer.convert_tokens_to_ids(end_tokens()) if i is not None]
    texts = [draft.head + draft.text for draft in drafts]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    left = [(draft, {"prompt_token_ids": i}) for draft, i in zip(drafts, ids, strict=True)]
    reasons: dict[int, str] = {}
    for attempt in range(TRIES):
        left = attempt_once(llm, left, (seed, beat, attempt), stops, reasons, counts)
    for draft, _ in left:
        draft.problem = reasons[draft.plan.number]


def end_tokens() -> list[str]:
    """ENDS as a byte-level vocabulary spells them."""
    return [end.replace("\n", "\N{LATIN CAPITAL LETTER C WITH DOT ABOVE}") for end in ENDS]


def attempt_once(
    llm: Any,
    asked: list[tuple[Draft, dict]],
    turn: tuple[int, int, int],
    stops: list[int],
    reasons: dict[int, str],
    counts: Counter,
) -> list[tuple[Draft, dict]]:
    """Ask once for all of `asked`; those whose sentence is still open, their reasons noted."""
    from nanovllm import SamplingParams

    if not asked:
        return []
    seed, beat, attempt = turn
    params = [
        SamplingParams(
            seed=((seed * 2**24 + draft.plan.number) * 16 + beat) * TRIES + attempt,
            stop_token_ids=stops,
            include_stop_str_in_output=True,
            **SAMPLING,
        )
        for draft, _ in asked
    ]
    outputs = llm.generate([prompt for _, prompt in asked], params, use_tqdm=False)
    left = []
    for (draft, prompt), output in zip(asked, outputs, strict=True):
        count(output, counts)
        if problem := accept(draft, output.outputs[0].text):
            counts[f"refused: {problem}"] += 1
            reasons[draft.plan.number] = problem
            left.append((draft, prompt))
    return left


def accept(draft: Draft, text: str) -> str | None:
    """Add a sentence's end to the draft, cut where the sentence ends; or why it is refused."""
    found = FIRST_END.search(text)
    end = text[: found.end()].rstrip("\n") if found else ""
    end = end.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    if not end.strip():
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
