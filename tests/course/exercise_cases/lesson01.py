"""Wrong and right answers to lesson 01's exercises."""

import torch

from exercise_cases import Case


def top_p(logits, p):
    """Token by token, largest first."""
    left, kept = logits.softmax(dim=0), torch.full_like(logits, -torch.inf)
    total = 0.0
    for token in logits.argsort(descending=True):
        kept[token] = logits[token]
        total += left[token]
        if total >= p:
            break
    return kept


def encode_prompt(tokenizer, prompt):
    if isinstance(prompt, list):
        output = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
        return output["input_ids"]
    return tokenizer(prompt).input_ids


CASES = {
    "answer_cost": Case(
        mutants=[
            ("50 * 100 + 50 * 49 // 2", "50 * 100", "reads one token more than the last"),
            ("50 * 100 + 50 * 49 // 2", "51 * 100 + 51 * 50 // 2", "One step too many"),
            ("50 * 100 + 50 * 49 // 2", "149", "every token once"),
            ("100 + 50 - 1", "150", "never read, so it is never computed"),
            ("10 * (2", "1 * (2", "That is one layer"),
            ("(8 + 2)", "(8 + 8)", "K heads each, not H"),
            ("3 * 512 * 1536", "2 * 512 * 1536", "three matrices"),
            ("100 + 50 - 1", "'many'", "should be like int"),
        ],
        other={"computed": 6225.0, "different": 149, "weights": 30_146_560},
    ),
    "top_p": Case(
        mutants=[
            ("- probs  #", "#", "look at the sum before a token"),
            ("before >= p", "before > p", "equals p"),
            ("    dropped[0] = False\n", "", "likeliest token stays"),
            ("logits.clone()", "logits", "changed its argument"),
            ("kept[order[dropped]]", "kept[dropped]", "same token after sorting"),
            ("return kept", "return values.masked_fill(dropped, -torch.inf)", "After sorting"),
            ("return kept", "return kept[kept > -torch.inf]", "Dropped tokens stay, at -inf"),
            ("values.softmax(dim=0)", "values.exp()", "a softmax of the logits"),
            ("= -torch.inf", "= -1e9", "dropped tokens have -1e+09, a finite number"),
            ("= -torch.inf", "= torch.finfo(kept.dtype).min", "a finite number"),
            ("= -torch.inf", "= 0", "dropped tokens have 0, a finite number"),
            ("= -torch.inf", "-= 1e4", "a finite number"),
            ("return kept", "return kept > -torch.inf", "A mask says only which"),
            ("return kept", "return kept.softmax(dim=0)", "are probabilities"),
            ("kept = logits.clone()", "kept = logits.softmax(dim=0)", "are probabilities"),
            ("kept = logits.clone()", "kept = logits.log_softmax(dim=0)", "are log-probabilities"),
            ("return kept", "return kept.log_softmax(dim=0)", "are log-probabilities"),
            (
                "return kept",
                "return logits.masked_fill(logits < values[~dropped].min(), -torch.inf)",
                "keeps equal ones together",
            ),
        ],
        other=top_p,
    ),
    "encode_prompt": Case(
        mutants=[
            ("text, add_special_tokens=False", "text", "two BOS"),
            (
                "return tokenizer.encode(prompt)",
                "return tokenizer.encode(prompt)[1:]",
                "plain text",
            ),
            (
                "text, add_special_tokens=False",
                "text.removeprefix('<s>'), add_special_tokens=False",
                "no BOS at all",
            ),
            ("text, add_special_tokens=False", "text.replace('<s>', '')", "did not arrive"),
            (
                "text, add_special_tokens=False)",
                "text)[1:]",
                "no BOS, the chat's first token was lost",
            ),
            ("add_generation_prompt=True", "add_generation_prompt=False", "should decode to"),
            (
                "tokenizer.encode(text, add_special_tokens=False)",
                "tokenizer(text, add_special_tokens=False)",
                "that list is its input_ids",
            ),
            ("tokenizer.encode(prompt)", "tokenizer(prompt)", "A list of ids is wanted"),
            ("return tokenizer.encode(prompt)", "return None", "got None"),
            (
                "return tokenizer.encode(text, add_special_tokens=False)",
                "ids = tokenizer.encode(text, add_special_tokens=False)\n"
                "    return ids if ids[0] == tokenizer.bos_token_id else "
                "[tokenizer.bos_token_id, *ids]",
                "The template alone decides",
            ),
        ],
        other=encode_prompt,
    ),
}
