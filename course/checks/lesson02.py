"""Checks of lesson 02's exercises: a cache's size, a decode step, positions beside padding."""

import textwrap
from typing import Any

import torch
from torch import Tensor

from course.checks import CheckFailed, attempt, check, compare, expect
from course.checks.engines import three_prompts
from course.checks.learner import stage_with
from course.measure.ladder_workload import LadderWorkload
from course.serving import start_engine
from course.stages import Recorder

# -- a cache's size ------------------------------------------------------------------------------


@check
def check_cache_size(token_bytes: Any, fit: Any, reserved: Any) -> None:
    L, H, H_kv, D, b = 64, 64, 8, 128, 2
    truth = 2 * L * H_kv * D * b
    wrong = {
        truth // 2: "Each layer keeps a key and a value: that is a factor of two (and a number has "
        "two bytes: another).",
        truth // 4: "A key and a value, and two bytes a number: two factors of two are missing.",
        2 * L * H * D * b: "Only key and value heads are kept, and H_kv = 8 of them: queries are "
        "used once.",
        truth // L: "That is one layer.",
        2 * truth: "bfloat16 has two bytes a number, not four.",
    }
    compare("token_bytes", token_bytes, truth, wrong, "The formula is in the lesson: Step 4.")
    room = 80 * 10**9 - 66 * 10**9 - 3 * 10**9
    for name, given, places in (("fit", fit, 2048), ("reserved", reserved, 8192)):
        exact = room / (places * truth)
        wrong = {
            exact: "A part of a request does not run: round down.",
            int(exact) + 1: "The last one does not fit in full: round down.",
            80 * 10**9 // (places * truth): "The weights take room, too.",
            14 * 10**9 // (places * truth): "The 3 GB of other things take room, too.",
        }
        look = f"Divide the room that is left, {room:,} bytes, by the bytes of {places:,} places."
        compare(name, given, int(exact), wrong, look)


# -- a decode step -------------------------------------------------------------------------------

Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def decode_case(lengths: list[int], places: int, heads: int, kv_heads: int, dim: int = 4) -> Case:
    """Arguments of a decode step: caches with what was stored, and rubbish (7) behind it."""
    rng = torch.Generator().manual_seed(len(lengths) + heads)
    rows = len(lengths)
    query = torch.randn(rows, heads, dim, generator=rng)
    key, value = torch.randn(2, rows, kv_heads, dim, generator=rng)
    caches = torch.randn(2, rows, places, kv_heads, dim, generator=rng)
    for row, length in enumerate(lengths):
        caches[:, row, length:] = 7.0
    return query, key, value, caches[0], caches[1], torch.tensor(lengths)


def reference_step(
    case: Case,
    store: bool = True,
    own_length: bool = True,
    masked: bool = True,
    fill: float | None = None,
) -> Tensor:
    """Row by row. Wrong on purpose with store=False (the new token is left out), own_length=False
    (every row reads as far as the longest), masked=False (all places are read), or a number to
    fill hidden scores with."""
    query, key, value, k_cache, v_cache, lengths = case
    outputs = []
    for row, length in enumerate(lengths.tolist()):
        k, v = k_cache[row].clone(), v_cache[row].clone()
        k[length], v[length] = key[row], value[row]
        end = length + store if own_length else int(lengths.max()) + 1
        end = end if masked and fill is None else len(k)
        group = query.shape[1] // k.shape[1]
        k, v = (x[:end].repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("hd,phd->hp", query[row], k) / query.shape[-1] ** 0.5
        if fill is not None:
            scores[:, length + 1 :] = fill
        outputs.append(torch.einsum("hp,phd->hd", scores.softmax(-1), v))
    return torch.stack(outputs)


def close(one: Any, two: Tensor) -> bool:
    return one.shape == two.shape and torch.allclose(one, two, atol=1e-4)


@check
def check_decode_step(decode_step: Any) -> None:
    case = decode_case([2, 4], places=6, heads=2, kv_heads=2)
    query, key, value, k_cache, v_cache, lengths = case
    caches = k_cache.clone(), v_cache.clone()
    out = attempt(decode_step, query, key, value, *caches, lengths)
    shape = tuple(query.shape)
    expect(
        isinstance(out, Tensor) and out.shape == shape,
        f"The result is a tensor {shape}, one vector for each row and query head; yours is "
        f"{tuple(out.shape) if isinstance(out, Tensor) else out!r}.",
    )
    check_stored(case, caches)
    check_attended(case, out)
    case = decode_case([0, 3, 5], places=8, heads=6, kv_heads=2)
    out = attempt(decode_step, *(x.clone() for x in case))
    expect(
        close(out, reference_step(case)),
        "With 6 query heads and 2 key heads the result is another. Query heads 0, 1 and 2 share "
        "key head 0: neighbours do, so each key head is repeated in place (repeat_interleave).",
    )
    tells_the_same_story(decode_step)


def check_stored(case: Case, caches: tuple[Tensor, Tensor]) -> None:
    _, key, value, k_before, v_before, lengths = case
    row = torch.arange(len(lengths))
    expect(
        not (torch.equal(caches[0], k_before) and torch.equal(caches[1], v_before)),
        "The cache has not changed. Store key and value in it, in place: the next step reads them.",
    )
    behind = lengths - 1
    expect(
        not torch.equal(caches[0][row, behind], key),
        "The new key was written over the last old one. Lengths 2 means that places 0 and 1 are "
        "taken: the new token goes to place 2.",
    )
    wanted = k_before.clone(), v_before.clone()
    wanted[0][row, lengths], wanted[1][row, lengths] = key, value
    expect(
        not torch.equal(caches[0][row, lengths], value),
        "The places are right, but the value went into k_cache: keys belong there, and values in "
        "v_cache.",
    )
    for name, cache, want in zip(("k_cache", "v_cache"), caches, wanted, strict=True):
        expect(
            torch.equal(cache, want),
            f"{name} should change at place lengths[row] of each row, and nowhere else. These "
            f"(row, place) are too many or few, or with another content: "
            f"{(cache != want).any(-1).any(-1).nonzero().tolist()}.",
        )


def check_attended(case: Case, out: Tensor) -> None:
    right = reference_step(case)
    expect(
        not close(out, reference_step(case, store=False)),
        "The new token does not see itself: its own key and value are missing from what its query "
        "reads. Look at the edge of the mask.",
    )
    expect(
        not close(out, reference_step(case, own_length=False)),
        "Short rows read as far as the longest. Behind a row's own token stands rubbish: each row "
        "needs its own mask.",
    )
    expect(
        not close(out, reference_step(case, masked=False)),
        "Nothing is masked: every row reads all places of the cache, with the rubbish behind its "
        "own token. Hide what stands behind place lengths[row] before the softmax.",
    )
    query, *rest = case
    unscaled = (query * query.shape[-1] ** 0.5, *rest)
    expect(
        not close(out, reference_step(unscaled)),
        "The scores are not divided by the root of the head's dimension.",
    )
    expect(
        not close(out, reference_step(case, fill=0.0)),
        "Hidden places were given a score of 0. But e to the 0 is 1: they have weight. A score of "
        "minus infinity has none.",
    )
    expect(torch.isfinite(out).all(), "The result has NaN or inf: is a row masked in full?")
    expect(
        close(out, right),
        "The result is not attention over each row's own tokens. Is what is masked exactly the "
        "places behind lengths[row]?",
    )


def tells_the_same_story(decode_step: Any) -> None:
    """In all layers of the real model, against the stage's own attention."""
    prompts = [prompt[:-1] for prompt in three_prompts()]
    stages = [stage_with(decode_step), stage_with()]
    ours, theirs = (attempt(answers_of, stage, prompts, 8) for stage in stages)
    expect(
        ours == theirs,
        "On small tensors all is right, but in the real model the tokens are others. Does your "
        "function keep something from one call to the next?",
    )


# -- positions beside padding --------------------------------------------------------------------


def tell(answers: list[list[int]]) -> None:
    """Print each beginning with what was answered."""
    decode = start_engine().get_tokenizer().decode
    for prompt, answer in zip(three_prompts(), answers, strict=True):
        print(textwrap.fill(f"{decode(prompt)} |{decode(answer)}", 95), "\n")


def answers_of(stage: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Greedy answers by the stage itself, as a batch."""
    recorder = Recorder(len(prompts))
    workload = LadderWorkload(prompts, [count] * len(prompts), 0)
    stage.serve_batch(range(len(prompts)), workload, recorder)
    return recorder.token_ids


@check
def check_answer_together(answer_together: Any) -> None:
    stage, prompts = stage_with(), three_prompts()
    alone = [answers_of(stage, [prompt], 12)[0] for prompt in prompts]
    asked: list[list[int]] = []  # the positions of each step
    decode = stage.decode

    def spy(next_ids: Any, positions: Tensor, cache: Tensor) -> Tensor:
        asked.append(torch.as_tensor(positions).tolist())
        explain_positions(asked, [len(prompt) for prompt in prompts])
        return decode(next_ids, positions, cache)

    stage.decode = spy
    answers = attempt(answer_together, stage, prompts, 12)
    expect(asked, "stage.decode was never called: compute the answers as one batch.")
    expect(
        as_lists(answers, len(prompts)) == alone,
        "Positions are right, but the tokens are not those of each row alone.",
    )


def as_lists(answers: Any, count: int) -> list[list[int]]:
    """Rows of tokens, be they tensors, tuples or lists."""
    try:
        rows = [[int(token) for token in row] for row in answers]
    except (TypeError, ValueError):
        raise CheckFailed(f"A list of tokens for each prompt is wanted, got {answers!r}.") from None
    expect(
        len(rows) == count,
        f"A list of tokens for each of {count} prompts is wanted; yours are {len(rows)} rows of "
        f"{len(rows[0]) if rows else 0}. One for each step? Turn them.",
    )
    return rows


def explain_positions(asked: list[list[int]], lengths: list[int]) -> None:
    """The positions of decode steps, against each row's own."""
    expect(
        len(asked[0]) == len(lengths),
        f"A step decoded {len(asked[0])} rows. All three are to be answered in one batch.",
    )
    longest = max(lengths)
    expect(
        asked[0] != [longest] * len(lengths),
        f"Every row still goes on at position {longest}, behind the padding: short rows then read "
        "rubbish, and are turned as if far from their prompt. Each has a length of its own.",
    )
    expect(
        asked[0] != [min(lengths)] * len(lengths),
        "All rows go on at the shortest one's end: the others overwrite their own prompt there.",
    )
    expect(
        asked[0] != [length + 1 for length in lengths],
        "One place is left out: the first answer token stands right behind the prompt, at position "
        "`length`, since positions count from 0.",
    )
    expect(
        asked[0] != [length - 1 for length in lengths],
        "The first answer token overwrites the prompt's last one: positions count from 0, so a "
        "prompt of 10 ends at 9.",
    )
    expect(
        len(asked) < 2 or asked[1] != asked[0],
        "The second token is written over the first: positions must move on by one a step.",
    )
    step = len(asked) - 1
    wanted = [length + step for length in lengths]
    expect(
        asked[step] == wanted,
        f"In step {step} the rows should stand at {wanted}, yours at {asked[step]}.",
    )
