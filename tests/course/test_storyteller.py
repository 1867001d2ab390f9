"""The model that ships with the course: it loads everywhere, tells stories, and is what it says."""

import json
from pathlib import Path

import pytest
from reference import assert_same_greedy, greedy_reference
from safetensors import safe_open
from transformers import AutoTokenizer

from course.models.choice import own_model
from nanovllm import LLM, SamplingParams

FOLDER = Path(__file__).resolve().parents[2] / "checkpoints" / "storyteller"
ASKS = (
    "Tell me a story about a fox who finds a key.",
    "Write a short story about an owl and a lantern.",
)
GREEDY = SamplingParams(temperature=0.0, max_tokens=300)


def talk(ask, system=None):
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": ask}]


def text_of(output):
    return output.outputs[0].text


@pytest.fixture(scope="module")
def llm():
    with LLM(str(FOLDER), dtype="float32", use_tqdm_on_load=False) as llm:
        yield llm


def test_it_is_what_the_course_takes_by_default(monkeypatch):
    monkeypatch.delenv("COURSE_MODEL", raising=False)
    assert own_model() == FOLDER


def test_it_is_small():
    assert (FOLDER / "model.safetensors").stat().st_size <= 16 * 2**20
    with safe_open(FOLDER / "model.safetensors", "pt") as weights:
        sizes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
        dtypes = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    assert dtypes == {"BF16"}
    count = sum(size[0] * (size[1] if len(size) > 1 else 1) for size in sizes)
    assert 5_000_000 <= count <= 8_000_000
    assert f"{count / 1e6:.2f} million parameters" in (FOLDER / "README.md").read_text()


def greedy_answers(llm, count):
    prompts = [prompt_ids(llm, ask) for ask in ASKS]
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [o.outputs[0].token_ids for o in outputs], greedy_reference(FOLDER, prompts, count)


def prompt_ids(llm, ask):
    apply = llm.get_tokenizer().apply_chat_template
    return apply(talk(ask), return_dict=False, add_generation_prompt=True)


def test_greedy_tokens_are_transformers(llm):
    assert_same_greedy(*greedy_answers(llm, 64))


def test_two_ranks_tell_the_same_story():
    options = {"dtype": "float32", "tensor_parallel_size": 2, "use_tqdm_on_load": False}
    with LLM(str(FOLDER), **options) as llm:
        assert_same_greedy(*greedy_answers(llm, 64))


def test_a_story_is_on_topic_and_ends_by_itself(llm):
    for ask, words in zip(ASKS, (("fox", "key"), ("owl", "lantern")), strict=True):
        output = llm.chat(talk(ask), GREEDY, use_tqdm=False)[0]
        assert output.outputs[0].finish_reason == "stop"
        assert all(word in text_of(output) for word in words)
        assert 30 < len(text_of(output).split()) < 200


def test_a_tone_in_the_system_prompt_is_heard(llm):
    happy, sad = (
        text_of(llm.chat(talk(ASKS[0], f"You tell {tone} stories."), GREEDY, use_tqdm=False)[0])
        for tone in ("happy", "sad")
    )
    assert happy != sad


def test_a_second_turn_is_answered_with_another_story(llm):
    first = llm.chat(talk(ASKS[0]), GREEDY, use_tqdm=False)[0]
    answer = {"role": "assistant", "content": text_of(first)}
    turns = [*talk(ASKS[0]), answer, *talk("Now tell me one about a cow who finds a hat.")]
    second = llm.chat(turns, GREEDY, use_tqdm=False)[0]
    assert "cow" in text_of(second)
    assert "hat" in text_of(second)
    assert second.outputs[0].finish_reason == "stop"


def test_both_its_ends_of_sequence_are_known(llm):
    assert llm.llm_engine.eos_ids == {0, 2}
    assert AutoTokenizer.from_pretrained(FOLDER).convert_tokens_to_ids("<|im_end|>") == 2


def test_the_card_says_what_the_records_say():
    card = (FOLDER / "README.md").read_text()
    records = json.loads((FOLDER / "records.json").read_text())
    training = records["training.json"]
    assert f"Held-out loss: {training['held_out_loss']['all']:.3f} nats" in card
    assert f"{training['data']['kept']:,} stories" in card
    for position, loss in training["held_out_loss"].items():
        assert position == "all" or f"| {position} | {loss:.3f} |" in card
    assert len(records["stories"]) == 200
    assert all(sample["text"] in card for sample in training["judged"]["samples"]["0.0"])
