"""Wrong and right answers to lesson 02's exercises."""

import torch
import torch.nn.functional as F

from course.stages.common import greedy
from exercise_cases import Case


def decode_step(query, key, value, k_cache, v_cache, lengths):
    """By torch's own attention, with a mask that is added."""
    index = lengths.view(-1, 1, 1, 1).expand(-1, 1, *key.shape[1:])
    k_cache.scatter_(1, index, key[:, None])
    v_cache.scatter_(1, index, value[:, None])
    mask = torch.arange(k_cache.shape[1])[None] <= lengths[:, None]
    bias = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)[:, None, None]
    k, v = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    out = F.scaled_dot_product_attention(query[:, :, None], k, v, attn_mask=bias, enable_gqa=True)
    return out[:, :, 0]


def answer_together(stage, prompts, count):
    """Positions that are moved on, and no decode for the last token."""
    positions = torch.tensor(list(map(len, prompts)))
    cache = stage.new_cache(len(prompts), int(positions.max()) + count)
    logits, answers = stage.prefill(prompts, cache), [[] for _ in prompts]
    for step in range(count):
        next_ids, _ = greedy(logits)
        for answer, token in zip(answers, next_ids, strict=True):
            answer.append(token)
        if step + 1 < count:
            logits = stage.decode(next_ids, positions.clone(), cache)
        positions += 1
    return answers


STORE = "    k_cache[row, lengths], v_cache[row, lengths] = key, value\n"
CASES = {
    "cache_size": Case(
        mutants=[
            ("2 * 64 * 8 * 128 * 2", "64 * 8 * 128 * 2", "a key and a value"),
            ("2 * 64 * 8 * 128 * 2", "2 * 64 * 64 * 128 * 2", "H_kv = 8"),
            ("2 * 64 * 8 * 128 * 2", "2 * 64 * 8 * 128 * 4", "two bytes a number, not four"),
            ("2 * 64 * 8 * 128 * 2", "2 * 8 * 128 * 2", "That is one layer"),
            ("11_000_000_000 // (2", "80_000_000_000 // (2", "The weights take room"),
            ("11_000_000_000 // (2", "1 + 11_000_000_000 // (2", "round down"),
            ("11_000_000_000 // (8", "11_000_000_000 / (8", "round down"),
        ],
        other={"token_bytes": 262_144, "fit": 20, "reserved": 5.0},
    ),
    "decode_step": Case(
        mutants=[
            (STORE, "", "The cache has not changed"),
            ("[row, lengths]", "[row, lengths - 1]", "written over the last old one"),
            ("> lengths[:, None]", ">= lengths[:, None]", "does not see itself"),
            (
                "> lengths[:, None]",
                "> lengths.max().repeat(len(lengths), 1)",
                "read as far as the longest",
            ),
            ("(behind[:, None], -torch.inf)", "(behind[:, None], 0.0)", "e to the 0 is 1"),
            (" / query.shape[-1] ** 0.5", "", "not divided by the root"),
            (
                "k_cache.repeat_interleave(group, dim=2)",
                "k_cache.repeat(1, 1, group, 1)",
                "share key",
            ),
            ("return ", "return 2 * ", "not attention over each row's own tokens"),
            (
                'torch.einsum("rhp,rphd->rhd", weights, values)',
                "values[:, 0]",
                "attention over each",
            ),
            (
                "k_cache[row, lengths], v_cache[row, lengths] = key, value",
                "k_cache[:, lengths.max()], v_cache[:, lengths.max()] = key, value",
                "at place lengths[row] of each row, and nowhere else",
            ),
            (
                "k_cache[row, lengths], v_cache[row, lengths] = key, value",
                "k_cache[row, lengths], v_cache[row, lengths] = value, key",
                "The places are right, but the value went into k_cache",
            ),
            ("= key, value", "= key, 2 * value", "with another content"),
            (".masked_fill(behind[:, None], -torch.inf)", "", "Nothing is masked"),
        ],
        other=decode_step,
    ),
    "answer_together": Case(
        mutants=[
            ("lengths + step", "lengths * 0 + longest + step", "behind the padding"),
            ("lengths + step", "lengths", "must move on by one a step"),
            ("lengths + step", "lengths + step + 1", "One place is left out"),
            ("lengths + step", "lengths + step - 1", "overwrites the prompt's last one"),
            ("lengths + step", "lengths.min() + step + 0 * lengths", "overwrite their own prompt"),
            ("lengths + step", "lengths + 2 * step", "the rows should stand at"),
            (".T.tolist()", ".tolist()", "12 rows of 3"),
            ("answers.append(next_ids)", "answers.append([7, 7, 7])", "the tokens are not those"),
            ("    return torch", "    torch", "A list of tokens for each prompt is wanted"),
        ],
        other=answer_together,
        more=(
            {"answer_together": lambda *args: torch.tensor(answer_together(*args))},
            {"answer_together": lambda *args: tuple(map(tuple, answer_together(*args)))},
        ),
    ),
}
