"""Checks of lesson 01's exercises: what an answer costs, top-p, and a second BOS."""

from typing import Any

import torch
from tokenizers.processors import ByteLevel, TemplateProcessing

from course.checks import attempt, check, compare, expect


@check
def check_answer_cost(computed: Any, different: Any, weights: Any) -> None:
    P, N = 100, 50
    lengths = [P + step for step in range(N)]  # what each step reads
    wrong = {
        N * P: "That is N times the prompt; but each step reads one token more than the last.",
        sum(range(P, P + N + 1)): "One step too many: the last token is written and never read.",
        P + N: "That is every token once. This loop computes the whole text again at each step.",
        P
        + N
        - 1: "That is every token once. This loop computes the whole text again at each step.",
        N * (P + N): "Not every step reads the whole text: the first reads the prompt alone.",
    }
    compare("computed", computed, sum(lengths), wrong, "Write down what steps 1, 2 and 3 read.")
    wrong = {
        P + N: "The last token is written and never read, so it is never computed.",
        P: "The answer's tokens are read, too: from step 2 on.",
    }
    look = "Which tokens does the last step read? All others were among them."
    compare("different", different, max(lengths), wrong, look)
    d, L, H, K, D, I = 512, 10, 8, 2, 64, 1536  # noqa: E741
    wrong = {
        2 * d * D * (H + K) + 3 * d * I: "That is one layer.",
        L * (2 * d * D * H * 2 + 3 * d * I): "Keys and values have K heads each, not H.",
        L * (2 * d * D * (H + K) + 2 * d * I): "The MLP has three matrices: gate, up and down.",
        L
        * (d * D * (H + 2 * K) + 3 * d * I): "o_proj is missing: it leads from H heads back to d.",
    }
    truth = L * (2 * d * D * (H + K) + 3 * d * I)
    compare("weights", weights, truth, wrong, "The formula for W stands in the lesson: Measure.")


# -- top-p ---------------------------------------------------------------------------------------


def kept_by(top_p: Any, probs: torch.Tensor, p: float) -> list[int]:
    """The ids that a learner's top_p keeps, after what any answer must be was checked."""
    logits = probs.log()
    before = logits.clone()
    result = attempt(top_p, logits, p)
    expect(isinstance(result, torch.Tensor), f"top_p returns a tensor of logits, got {result!r}.")
    expect(
        torch.equal(logits, before),
        "Your top_p changed its argument. Another row or a later step may need these logits: "
        "write into a copy (clone).",
    )
    expect(
        result.shape == logits.shape,
        f"The result has one logit for each token, {tuple(logits.shape)}; "
        f"yours has {tuple(result.shape)}. Dropped tokens stay, at -inf.",
    )
    expect(
        result.is_floating_point(),
        f"The logits are wanted, with -inf for tokens that are dropped; this is {result.dtype}. A "
        "mask says only which: write -inf where it tells.",
    )
    explain_values(result, logits)
    kept = (result > -torch.inf).nonzero().flatten().tolist()
    expect(
        torch.equal(result[kept], logits[kept]),
        "The logits that stay are not those of the same tokens any more. After sorting, position "
        "i is no longer token i: go back through the order that sort gives.",
    )
    return kept


def explain_values(result: torch.Tensor, logits: torch.Tensor) -> None:
    """What is no logit: a finite number for what is dropped, or probabilities."""
    result, logits = result.double(), logits.double()
    changed = result[(result != logits) & (result > -torch.inf)]
    fill = next(iter(changed.tolist()), -torch.inf)
    hides = fill > -torch.inf and ((changed == 0) | (changed < logits.min())).all()
    expect(
        not hides,
        f"The logits that stay are right, but dropped tokens have {fill:g}, a finite number. "
        "They get -inf: whatever else stands in the row, a softmax then gives them 0.",
    )
    shown = result > -1e4
    given, own = result[shown], logits[shown]
    expect(
        not ((given >= 0).all() and 0 < given.sum() < 1.001),
        "What you return are probabilities. The logits are wanted, as they were, and -inf for "
        "tokens that are dropped: whoever samples takes the softmax.",
    )
    shift = given - own
    expect(
        torch.equal(given, own) or shift.max() - shift.min() > 1e-4,
        "What you return are log-probabilities, or logits moved by a number. The logits are "
        "wanted as they were, and -inf for tokens that are dropped.",
    )


@check
def check_top_p(top_p: Any) -> None:
    sorted_probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    kept = kept_by(top_p, sorted_probs, 0.7)
    expect(
        kept != [0],
        "At p = 0.7 only 0.5 is left. You drop the token with which the sum crosses p: look at the "
        "sum before a token, not at the one that includes it.",
    )
    expect(kept == [0, 1], f"At p = 0.7, 0.5 and 0.3 stay; yours keeps tokens {kept}.")
    kept = kept_by(top_p, torch.tensor([0.05, 0.5, 0.15, 0.3]), 0.7)
    expect(
        kept == [1, 3],
        f"Of 0.05, 0.5, 0.15, 0.3 at p = 0.7, tokens 1 and 3 stay; yours keeps {kept}. Is what "
        "you drop still the same token after sorting?",
    )
    kept = kept_by(top_p, torch.full((4,), 0.25), 0.5)  # nothing here is rounded
    expect(
        len(kept) != 4,
        "Of four equally likely tokens two reach p = 0.5; yours keeps all. A threshold "
        "on probabilities keeps equal ones together: decide by the place in the sorted order.",
    )
    expect(
        len(kept) == 2,
        f"Of four equally likely tokens two reach p = 0.5, and no third is needed; yours keeps "
        f"{len(kept)}. What happens when the sum before a token equals p?",
    )
    kept = kept_by(top_p, sorted_probs, 0.0)
    expect(kept == [0], f"At p = 0 the likeliest token stays all the same; yours keeps {kept}.")
    kept = kept_by(top_p, sorted_probs, 1.0)
    expect(kept == [0, 1, 2, 3], f"p = 1 drops nothing; yours keeps {kept}.")
    agree_with_engine(top_p)


def agree_with_engine(top_p: Any) -> None:
    """As the finished sampler, on logits of many tokens, not scaled to probabilities."""
    from nanovllm.layers.sampler import filter_scores

    for seed, p in enumerate((0.1, 0.5, 0.9)):
        logits = 3 * torch.randn(1000, generator=torch.Generator().manual_seed(seed))
        off = torch.tensor([[0]]), torch.tensor([[p]]), torch.tensor([[-torch.inf]])
        result = attempt(top_p, logits, p)
        explain_values(result, logits)
        expect(
            torch.equal(result, filter_scores(logits[None], *off)[0]),
            f"On 1,000 random logits at p = {p} the engine keeps other tokens. Are your "
            "probabilities a softmax of the logits?",
        )


# -- a second BOS --------------------------------------------------------------------------------

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def tokenizer_with_bos() -> Any:
    """The course's tokenizer with a BOS, which it puts before every text, and its template, too."""
    from transformers import AutoTokenizer

    from course.models.choice import own_model

    tokenizer = AutoTokenizer.from_pretrained(own_model())
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = TEMPLATE
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def ids_of(encode_prompt: Any, tokenizer: Any, prompt: Any) -> list[int]:
    """What a learner's encode_prompt returns, if that is ids in a row."""
    ids = attempt(encode_prompt, tokenizer, prompt)
    expect(
        not hasattr(ids, "keys"),
        f"A list of ids is wanted, and this is a dict ({type(ids).__name__}): that list is its "
        "input_ids.",
    )
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    is_row = isinstance(ids, (list, tuple)) and all(isinstance(i, int) for i in ids)
    expect(is_row, f"A list of ids is wanted, got {ids!r}.")
    return list(ids)


@check
def check_encode_prompt(encode_prompt: Any) -> None:
    tokenizer = tokenizer_with_bos()
    bos, text = tokenizer.bos_token_id, "Once upon a time"
    ids = ids_of(encode_prompt, tokenizer, text)
    expect(ids[:1] == [bos], "A plain text no longer begins with BOS: no template writes it there.")
    expect(ids == tokenizer.encode(text), "A plain text's ids are no longer what encode gives.")
    chat = [{"role": "user", "content": "Tell me a story."}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    wanted = tokenizer.encode(rendered, add_special_tokens=False)
    ids = ids_of(encode_prompt, tokenizer, chat)
    expect(
        ids[:2] != [bos, bos],
        "The chat still begins with two BOS: the template writes one, and encode adds another.",
    )
    expect(ids[:1] == [bos], "The chat now begins with no BOS at all. One of the two must stay.")
    expect(ids == wanted, f"The chat's ids should decode to {rendered!r}, not to {decoded(ids)!r}.")
    quotes = [{"role": "user", "content": f"What does {tokenizer.bos_token * 2} mean?"}]
    ids = ids_of(encode_prompt, tokenizer, quotes)
    expect(
        ids.count(bos) == 3,
        "A user wrote the BOS token twice into a message, and it did not arrive. Do not take BOS "
        "out of text or ids: see to it that the second is never added.",
    )
    tokenizer.chat_template = TEMPLATE.removeprefix("{{ bos_token }}")
    ids = ids_of(encode_prompt, tokenizer, chat)
    expect(
        ids[:1] != [bos],
        "With a template that writes no BOS, as some models have, yours added one, or cut off the "
        "first token. The template alone decides how a chat begins.",
    )
    expect(ids == wanted[1:], "With a template that writes no BOS, a token of the chat was lost.")
    tokenizer.backend_tokenizer.post_processor = ByteLevel()  # adds nothing
    expect(
        ids_of(encode_prompt, tokenizer, chat) == wanted[1:],
        "With a tokenizer that adds no BOS, the chat's first token was lost: you cut off what was "
        "never added. Ask encode not to add it.",
    )


def decoded(ids: list[int]) -> str:
    return tokenizer_with_bos().decode(ids)
