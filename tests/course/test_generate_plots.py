"""Lesson 01: its drawings, the line that it lays through measured steps, and what it measures."""

import pytest
import torch

from course.drawings import generate_plots
from course.drawings.generate_plots import OverlappedCost, StepCost
from course.labs import naive_lab
from course.models.choice import own_model
from course.stages import Recompute


def flops(n: int) -> int:
    return 100 * n + n * n


def cost(lengths: list[int], fitted: tuple[int, int]) -> StepCost:
    """A model whose steps take 5 s and a second for every ten operations."""
    return StepCost("toy", lengths, [5 + flops(n) / 10 for n in lengths], fitted, flops)


def test_two_steps_give_what_every_step_costs() -> None:
    found = cost([1, 7, 30, 90], fitted=(0, 2))
    assert found.fixed == pytest.approx(5)
    assert found.rate == pytest.approx(10)
    assert found.step(55) == pytest.approx(5 + flops(55) / 10)


def test_on_a_gpu_the_longer_of_starting_and_computing_counts() -> None:
    lengths = [1, 7, 30, 90]
    seconds = [max(5.0, flops(n) / 1000) for n in lengths]
    found = OverlappedCost("toy", lengths, seconds, fitted=(0, 3), flops=flops)
    assert (found.fixed, found.rate) == pytest.approx((5, 1000))
    assert [found.step(n) for n in lengths] == pytest.approx(seconds)
    assert found.step(20) == 5


def test_an_answer_is_the_sum_of_its_steps_the_first_of_which_reads_the_prompt() -> None:
    found = cost([1, 30], fitted=(0, 1))
    clock = found.answer(prompt=4, count=3)
    assert clock == pytest.approx([found.step(4), found.step(4) + found.step(5), clock[2]])
    assert clock[2] - clock[1] == pytest.approx(found.step(6))


def test_every_figure_says_in_words_what_it_shows() -> None:
    angles = torch.arange(8.0)[:, None] * torch.tensor([1.0, 0.1])
    turns = generate_plots.rope_turns(torch.stack((angles.cos(), angles.sin()), dim=1), (0, 1))
    assert "pair 0 by 1.000 radians, pair 1 by 0.100 radians" in turns.alt_text
    kept = {"top_k": [True, False], "top_p": [True, True]}
    words = generate_plots.kept_words(["a", "b"], [0.75, 0.25], kept)
    assert "top_k keeps 1, top_p keeps 2" in words.alt_text
    weights = generate_plots.attention_weights(torch.tensor([[1.0, 0.0], [0.25, 0.75]]))
    assert "token 0: 1.00; token 1: 0.25, 0.75" in weights.alt_text
    steps = generate_plots.step_and_answer(
        [cost([1, 30], (0, 1))] * 2, [float(i) for i in range(16)], 4, "a machine"
    )
    assert "1 tokens, 395000.0 at 30, predicted 395000.0" in steps.alt_text


def test_only_what_an_earlier_step_read_is_hatched() -> None:
    (axes,) = generate_plots.recomputed(prompt=3, count=4).axes
    hatched = [bool(patch.get_hatch()) for patch in axes.patches]
    assert len(hatched) == 3 + 4 + 5 + 6
    assert hatched.count(False) == 3 + 3  # the prompt, and one token in each later step


def test_pytorch_counts_the_operations_of_the_formula(tiny_model) -> None:
    stage = Recompute(tiny_model(), device="cpu")
    answer = naive_lab.timed_answer(stage, [1, 2, 3], count=4)
    assert len(answer.token_ids[0]) == len(answer.times[0]) == len(answer.gaps[0]) == 4
    for n in (1, 9, 30):
        assert naive_lab.counted_flops(stage, n) == naive_lab.step_flops(stage.config, n)


def test_the_question_ends_where_the_answer_begins() -> None:
    tokenizer, ids = naive_lab.question(own_model())
    text = tokenizer.decode(ids)
    assert naive_lab.QUESTION in text
    assert text.endswith("assistant\n")


def test_each_filter_keeps_its_tokens() -> None:
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    assert naive_lab.kept_by(logits).tolist() == [True] * 4
    assert naive_lab.kept_by(logits, top_k=1).tolist() == [False, True, False, False]
    assert naive_lab.kept_by(logits, top_p=0.7).tolist() == [False, True, False, True]
    assert naive_lab.kept_by(logits, min_p=0.2).tolist() == [True, True, False, True]


def test_only_a_stage_on_a_gpu_adds_its_costs(tiny_model, monkeypatch) -> None:
    stage, other = (Recompute(tiny_model(), device="cpu") for _ in range(2))
    naive_lab.timed_answer(stage, [1], count=1)
    monkeypatch.setattr(naive_lab, "CPU_LENGTHS", (1, 2, 3, 4, 40))
    costs, _ = naive_lab.step_costs(stage, other)
    assert [cost.lengths for cost in costs] == [(1, 2, 3, 4, 40)]
