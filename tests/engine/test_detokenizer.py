"""Text of token ids as they arrive: nothing lost, nothing taken back, and exact cuts."""

import gc
import random
import weakref
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_tokenizer
from tokenizer_families import CHARACTERS, FAMILIES, REPLACEMENT, Family, families

from nanovllm import LLM, SamplingParams
from nanovllm.engine.sequence import Sequence
from nanovllm.frontend.detokenizer import Detokenizer, TokenDecoder

TOKENIZER = tiny_tokenizer()
LLAMA = FAMILIES["llama2"]
TEXTS = st.text(alphabet="abé ñ漢字🦊👩‍🚀\u0301\n", max_size=30)  # 1 to 4 bytes, and joined signs

# -- the one property: any tokenizer, any ids, any way of reading ----------------------------------

Reads = Callable[[], bool]  # whether to read the text now
ALWAYS, NEVER = (lambda: True), (lambda: False)


def read_out(
    detokenizer: Detokenizer, ids: list[int], reads: Reads, seen: dict[int, str] | None = None
) -> tuple[str, str, int | None]:
    """The pieces of a stream joined, the text at the end, and the ids taken if a stop ended it.

    `seen` holds the text after each number of ids, as far as any reader has read it.
    """
    sent, stopped_at = "", None
    for count, token_id in enumerate(ids, 1):
        stopped = detokenizer.append(token_id)
        if reads():
            text = detokenizer.text
            assert detokenizer.text == text, "a second look shows something else"
            assert seen is None or seen.setdefault(count, text) == text, "earlier reads matter"
            assert text.startswith(sent), f"{sent!r} was taken back: now {text!r}"
            sent += text[len(sent) :]
        if stopped:
            stopped_at = count
            break
    detokenizer.finish()
    assert detokenizer.text.startswith(sent), f"{sent!r} was taken back at the end"
    return sent + detokenizer.text[len(sent) :], detokenizer.text, stopped_at


def text_of(family: Family, ids: list[int], prompt: Any = (), **params: Any) -> str:
    detokenizer = Detokenizer(family.tokenizer, SamplingParams(**params), prompt)
    joined, text, _ = read_out(detokenizer, ids, ALWAYS)
    assert joined == text
    return text


def cut(text: str, params: SamplingParams) -> str | None:
    """The text up to its first stop string; None without one."""
    found = [(text.find(s), s) for s in params.stop if s in text]
    if not found:
        return None
    at, stop = min(found)
    return text[: at + len(stop) * params.include_stop_str_in_output]


def expected(
    family: Family, prompt: list[int], ids: list[int], params: SamplingParams
) -> tuple[str, int | None]:
    """The right text, by decoding all ids anew for each id, and how many a stop string takes."""
    skip = params.skip_special_tokens
    context = family.context(prompt, skip)
    for count in range(1, len(ids) + 1) if params.stop else ():
        text = cut(family.searchable(context, ids[:count], skip), params)
        if text is not None:
            return text, count
    text = family.one_decode(context, ids, skip)
    shown = cut(text, params)
    return (text if shown is None else shown), None


def check(family: Family, prompt: list[int], ids: list[int], params: SamplingParams, seed: int):
    text, stopped_at = expected(family, prompt, ids, params)
    rng, seen = random.Random(seed), {}
    for reads in (ALWAYS, NEVER, lambda: rng.random() < 0.3):
        got = read_out(Detokenizer(family.tokenizer, params, prompt), ids, reads, seen)
        assert got == (text, text, stopped_at), (family.name, prompt, ids, params)


def draw_params(rng: random.Random, text: str, skip: bool) -> SamplingParams:
    """With no stop string, or with some that are in the text or nearly so."""
    stop = []
    for _ in range(rng.choice([0, 0, 1, 2])):
        at = rng.randint(0, len(text))
        stop.append(text[at : at + rng.randint(1, 4)] + rng.choice(["", "", "", "x"]) or "é")
    return SamplingParams(
        skip_special_tokens=skip, stop=stop, include_stop_str_in_output=rng.random() < 0.3
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_streamed_joined_generated_and_decoded_once_are_one_text(name):
    family, rng = FAMILIES[name], random.Random(22)
    for seed in range(3000):
        prompt, ids, skip = family.draw(rng), family.draw(rng), rng.random() < 0.6
        text = family.one_decode(family.context(prompt, skip), ids, skip)
        check(family, prompt, ids, draw_params(rng, text, skip), seed)


@pytest.mark.parametrize("name", FAMILIES)
def test_after_a_reset_the_text_is_that_of_a_new_detokenizer(name):
    """Ids before the reset leave nothing behind, wherever they and the prompt are cut."""
    family, rng = FAMILIES[name], random.Random(25)
    for seed in range(500):
        prompt, before, ids = family.draw(rng), family.draw(rng), family.draw(rng)
        params = draw_params(rng, family.one_decode([], before + ids, True), True)
        params.min_tokens = rng.choice((0, 3))
        new = read_out(Detokenizer(family.tokenizer, params, prompt), ids, ALWAYS)
        used = Detokenizer(family.tokenizer, params, prompt)
        read_out(used, before[: rng.randint(0, len(before))], lambda: rng.random() < 0.5)
        used.reset()
        assert read_out(used, ids, ALWAYS) == new, seed
        assert used.stop_string == read_stop_string(family, params, prompt, ids), seed


def read_stop_string(family, params, prompt, ids) -> str | None:
    detokenizer = Detokenizer(family.tokenizer, params, prompt)
    read_out(detokenizer, ids, NEVER)
    return detokenizer.stop_string


def ids_of(family: Family) -> st.SearchStrategy[list[int]]:
    """Characters as bytes, special tokens and any ids, cut anywhere."""
    parts = st.one_of(
        st.text(CHARACTERS, min_size=1, max_size=3).map(family.bytes),
        st.sampled_from([*family.special, len(family.tokens) - 1]).map(lambda i: [i]),
        st.integers(0, len(family.tokenizer) - 1).map(lambda i: [i]),
    )
    joined = st.lists(parts, max_size=8).map(lambda lists: [i for ids in lists for i in ids])
    return st.tuples(joined, st.integers(0, 3)).map(lambda drawn: drawn[0][: -drawn[1] or None])


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_ids_any_stop_strings_and_any_reading_give_one_text(name, data):
    family = FAMILIES[name]
    prompt, ids = data.draw(ids_of(family)), data.draw(ids_of(family))
    texts = st.text(CHARACTERS + REPLACEMENT, min_size=1, max_size=3)
    params = SamplingParams(
        stop=data.draw(st.lists(texts, max_size=2)),
        skip_special_tokens=data.draw(st.booleans()),
        include_stop_str_in_output=data.draw(st.booleans()),
    )
    check(family, prompt, ids, params, seed=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_text_is_what_decode_adds_to_the_prompt(name):
    """`one_decode` is the tokenizer's own decode wherever a prompt does not end within bytes."""
    family, rng, compared = FAMILIES[name], random.Random(5), 0
    while compared < 300:
        prompt, ids, skip = family.draw(rng), family.draw(rng), rng.random() < 0.6
        before = family.decode(prompt, skip)
        if before.endswith(REPLACEMENT) or family.split_run(family.visible(prompt, skip))[1]:
            continue
        detokenizer = Detokenizer(
            family.tokenizer, SamplingParams(skip_special_tokens=skip), prompt
        )
        _, text, _ = read_out(detokenizer, ids, ALWAYS)
        assert before + text == family.decode(prompt + ids, skip)
        compared += 1


@pytest.mark.parametrize("name", FAMILIES)
def test_a_running_request_shows_all_that_is_certain(name):
    family, rng = FAMILIES[name], random.Random(7)
    for _ in range(100):
        prompt, ids, skip = family.draw(rng), family.draw(rng), rng.random() < 0.6
        context, seen = family.context(prompt, skip), {}
        params = SamplingParams(skip_special_tokens=skip)
        read_out(Detokenizer(family.tokenizer, params, prompt), ids, ALWAYS, seen)
        for count, text in seen.items():
            before, _ = family.split_run(family.visible(ids[:count], skip))
            whole = family.one_decode(context, before, skip)
            assert text == (whole if family.byte_of else whole.removesuffix(REPLACEMENT))


# -- where a text begins ---------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [[], ["never said"]])
def test_a_skipped_special_token_takes_no_space_with_it(stop):
    ids = LLAMA.ids("▁Once", "</s>", "▁upon", "▁a")
    assert text_of(LLAMA, ids, stop=stop) == "Once upon a"
    assert text_of(LLAMA, ids, stop=stop, skip_special_tokens=False) == "Once</s> upon a"


def test_an_answer_keeps_its_first_space_behind_a_prompt_that_shows():
    words = LLAMA.ids("▁a", "▁time", "!")
    assert text_of(LLAMA, words, LLAMA.ids("<s>", "▁Once")) == " a time!"
    assert text_of(LLAMA, words, LLAMA.ids("▁Once", *["</s>"] * 20)) == " a time!"
    assert text_of(LLAMA, words, LLAMA.ids("<s>", "<0x0A>")) == " a time!", (
        "a prompt of one newline"
    )
    assert text_of(LLAMA, words, LLAMA.ids("<s>")) == "a time!", "as decode(ids) has it"


@pytest.mark.parametrize("name", ["byte_level", "llama2", "tinyllama", "gemma"])
@pytest.mark.parametrize("character", "é漢🦊")
def test_a_character_that_the_prompt_begins_belongs_to_the_answer_that_completes_it(
    name, character
):
    family = FAMILIES[name]
    ids, more = family.bytes(f"ñ{character}"), family.ids("b")
    for split in range(3, len(ids)):
        assert text_of(family, ids[split:] + more, ids[:split]) == f"{character}b"
        assert text_of(family, ids[split:] + more, ids[:split], stop=["b"]) == character
        assert text_of(family, ids[split:], ids[:split], stop=[character]) == ""
        assert text_of(family, more, ids[:split]) == "b", "nobody completes it"
        assert text_of(family, [], ids[:split]) == "", "nothing was answered"


def test_an_answer_leaves_the_prompts_complete_characters_alone():
    """A wrong byte breaks all the characters of its run, but the prompt's were there before."""
    first, *_ = LLAMA.bytes("é")
    ids = [first, *LLAMA.ids("▁a")]
    assert LLAMA.decode(LLAMA.bytes("漢") + ids, True) == f"{REPLACEMENT * 4} a"
    assert text_of(LLAMA, ids, LLAMA.bytes("漢")) == f"{REPLACEMENT} a"


# -- where a text ends -----------------------------------------------------------------------------


def pieces_of(family: Family, ids: list[int], **params: Any) -> list[str]:
    """What a stream sends after each id and at the end."""
    detokenizer, texts = Detokenizer(family.tokenizer, SamplingParams(**params)), [""]
    for token_id in ids:
        detokenizer.append(token_id)
        texts.append(detokenizer.text)
    detokenizer.finish()
    return [after[len(before) :] for before, after in pairwise([*texts, detokenizer.text])]


def test_a_character_comes_with_its_last_byte():
    family = FAMILIES["byte_level"]
    ids = family.bytes("🦊")
    assert len(ids) == 4
    assert pieces_of(family, ids) == ["", "", "", "🦊", ""]
    assert pieces_of(family, ids[:3])[-1] == REPLACEMENT, "an end within a character is shown"


def test_a_run_of_byte_tokens_comes_with_the_token_behind_it():
    """Before that, one wrong byte could still turn all of it into U+FFFD."""
    ids = [*LLAMA.ids("▁Once"), *LLAMA.bytes("éñ")]
    assert pieces_of(LLAMA, ids + LLAMA.ids("!")) == ["Once", "", "", "", "", "éñ!", ""]
    assert pieces_of(LLAMA, ids) == ["Once", "", "", "", "", "éñ"]
    assert pieces_of(LLAMA, ids[:-1])[-1] == REPLACEMENT * 3
    broken = ids[:-1] + LLAMA.ids("!")
    assert "".join(pieces_of(LLAMA, broken)) == LLAMA.decode(broken, True)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_the_pieces_of_a_whole_text_are_never_broken(text):
    for name in ("byte_level", "llama2"):
        pieces = pieces_of(FAMILIES[name], FAMILIES[name].bytes(text))
        assert "".join(pieces) == text.removeprefix(" " if name == "llama2" else "")
        assert not any(REPLACEMENT in piece for piece in pieces)


@pytest.mark.parametrize("reason", ["length", "abort"])
def test_a_request_that_ends_within_a_character_shows_all_it_has(reason):
    for name, broken in (("byte_level", 1), ("llama2", 2)):
        family = FAMILIES[name]
        params, prompt_ids = SamplingParams(), family.ids("b")
        detokenizer = Detokenizer(family.tokenizer, params, prompt_ids)
        seq = Sequence("0", None, prompt_ids, params, 99, detokenizer=detokenizer)
        for token_id in family.ids("a") + family.bytes("漢")[:2]:
            seq.append(token_id)
        assert seq.detokenizer.text == "a", "while it runs the character may be completed"
        seq.finish(reason)
        assert seq.detokenizer.text == "a" + REPLACEMENT * broken


def test_garbage_is_not_held_back():
    start_of_four_bytes = TOKENIZER.encode("🦊")[0]
    pieces = pieces_of(FAMILIES["byte_level"], [start_of_four_bytes] * 200)
    assert pieces == ["", *[REPLACEMENT] * 200]


# -- stop strings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_is_found_within_a_run_of_byte_tokens(include):
    ids = LLAMA.ids("▁Once") + LLAMA.bytes("漢字🦊🦊🦊")
    params = SamplingParams(stop=["字"], include_stop_str_in_output=include)
    got = read_out(Detokenizer(LLAMA.tokenizer, params), ids, ALWAYS)
    assert got == ("Once漢字" if include else "Once漢",) * 2 + (7,)


def test_a_stop_string_across_tokens_is_never_shown_in_part():
    family = FAMILIES["byte_level"]
    pieces = pieces_of(family, TOKENIZER.encode("say STOP now"), stop="STOP")
    assert "".join(pieces) == "say "
    assert not any("S" in piece for piece in pieces)


def test_the_beginning_of_a_stop_string_comes_once_it_is_none():
    ids = TOKENIZER.encode("a STOLEN key")
    assert "".join(pieces_of(FAMILIES["byte_level"], ids, stop="STOP")) == "a STOLEN key"


def test_a_stop_string_that_stays_in_the_text_is_shown_as_it_comes():
    ids = TOKENIZER.encode("a STOP")
    params = {"stop": "STOP", "include_stop_str_in_output": True}
    assert pieces_of(FAMILIES["byte_level"], ids, **params) == [*"a STOP", ""]


def test_of_two_stop_strings_in_one_token_the_first_cuts():
    ids = TOKENIZER.encode("the")
    assert len(ids) == 1
    for stop in (["t", "h"], ["h", "t"]):
        assert text_of(FAMILIES["byte_level"], ids, stop=stop) == ""


# -- cost ------------------------------------------------------------------------------------------


class CountingTokenizer:
    """A tokenizer that counts the ids which it decodes."""

    def __init__(self, tokenizer: Any):
        self._tokenizer, self.num_decoded = tokenizer, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def decode(self, ids: list[int], **options: Any) -> str:
        self.num_decoded += len(ids)
        return self._tokenizer.decode(ids, **options)


def texts_without_end(family: Family) -> dict[str, list[int]]:
    """Ids to repeat: words, characters, garbage, and ids that never show."""
    return {
        "plain": family.plain[:20],
        "characters": family.bytes("漢é"),
        "garbage": family.bytes("🦊")[:1],
        "special": family.special[:1],
        "no token": [len(family.tokens) - 1],
        "one space": family.ids("▁") if "▁" in family.tokens else family.plain[:1],
        "replacement": family.ids(REPLACEMENT) if REPLACEMENT in family.tokens else [],
    }


def num_decoded(family: Family, ids: list[int], stop: list[str], reads: Reads) -> int:
    """How many ids the tokenizer decodes for a text of these ids, once it knows each of them."""
    tokenizer = CountingTokenizer(family.tokenizer)
    params = SamplingParams(stop=stop)
    for _ in range(2):
        tokenizer.num_decoded = 0
        read_out(Detokenizer(tokenizer, params, family.plain[:9]), ids, reads)
    return tokenizer.num_decoded


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("stop", [[], ["never said"]])
def test_the_cost_of_a_token_does_not_grow_with_the_text(name, stop):
    family = FAMILIES[name]
    for kind, part in texts_without_end(family).items():
        ids = part * (2000 // max(1, len(part)))
        streamed = num_decoded(family, ids, stop, ALWAYS)
        assert streamed <= 10 * len(ids) + 50, (kind, streamed, len(ids))
        if not stop:
            assert num_decoded(family, ids, stop, NEVER) <= len(ids) + 50, kind


class FailingTokenizer(CountingTokenizer):
    """A tokenizer that fails the next time that it decodes, once told so."""

    fails = False

    def decode(self, ids: list[int], **options: Any) -> str:
        if self.fails:
            self.fails = False
            raise MemoryError("planted")
        return super().decode(ids, **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_decode_that_fails_loses_no_text(name):
    family, rng = FAMILIES[name], random.Random(9)
    for _ in range(50):
        prompt, ids = family.draw(rng), family.draw(rng)
        tokenizer = FailingTokenizer(family.tokenizer)
        detokenizer = Detokenizer(tokenizer, SamplingParams(), prompt)
        for token_id in ids:
            detokenizer.append(token_id)
            tokenizer.fails = True
            with suppress(MemoryError):
                detokenizer.text  # noqa: B018
            tokenizer.fails = False
        detokenizer.finish()
        assert detokenizer.text == family.one_decode(family.context(prompt, True), ids, True)


def test_a_tokenizer_is_not_kept_alive():
    (family, *_) = families()
    detokenizer = Detokenizer(family.tokenizer, SamplingParams())
    assert family.tokenizer in TokenDecoder.cache
    gone = weakref.ref(family.tokenizer)
    del family, detokenizer
    gc.collect()
    assert gone() is None


# -- in the engine ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(folder, max_model_len=96, use_tqdm_on_load=False) as llm:
        yield llm


def steps_of(llm: LLM, params: SamplingParams) -> list[Any]:
    """What each step shows of one request."""
    llm.llm_engine.add_request("stepped", [5, 6, 7], params)
    shown = []
    while llm.llm_engine.has_unfinished_requests():
        shown += [output.outputs[0] for output in llm.llm_engine.step()]
    return shown


GREEDY = {"temperature": 0.0, "max_tokens": 60, "ignore_eos": True}


@pytest.mark.parametrize("include", [False, True])
def test_a_step_shows_no_text_that_a_stop_string_takes_back(llm, include):
    whole = llm.generate([5, 6, 7], SamplingParams(**GREEDY), use_tqdm=False)[0].outputs[0].text
    for at in range(3, 50, 4):
        params = SamplingParams(
            **GREEDY, stop=[whole[at : at + 5]], include_stop_str_in_output=include
        )
        shown = steps_of(llm, params)
        last = shown[-1]
        assert (last.finish_reason, last.text) == ("stop", cut(whole, params))
        assert all(after.text.startswith(before.text) for before, after in pairwise(shown))
        assert last.text == llm.generate([5, 6, 7], params, use_tqdm=False)[0].outputs[0].text


def test_without_detokenize_no_text_is_made(llm):
    params = SamplingParams(**GREEDY, detokenize=False)
    shown = steps_of(llm, params)
    assert [output.text for output in shown] == [""] * 60
    assert list(llm.stream([5, 6, 7], params)) == []
    assert llm.generate([5, 6, 7], params, use_tqdm=False)[0].outputs[0].text == ""


@pytest.mark.parametrize("name", ["llama2", "t5"])
def test_generate_and_stream_give_the_one_text(name, tiny_model, tmp_path):
    family = FAMILIES[name]
    family.tokenizer.save_pretrained(tmp_path)
    rng, prompts = random.Random(3), []
    while len(prompts) < 40:
        prompts += [family.draw(rng)] if rng.random() < 0.5 else [family.ids("▁Once")]
        prompts = [ids for ids in prompts if ids and max(ids) < 300]
    params = [SamplingParams(max_tokens=1 + i % 12, seed=i, ignore_eos=True) for i in range(40)]
    model = str(tiny_model(family="llama"))
    with LLM(model, tokenizer=str(tmp_path), max_model_len=96, use_tqdm_on_load=False) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        pieces = [""] * len(prompts)
        for index, text in llm.stream(prompts, params):
            pieces[index] += text
    for prompt, output, joined in zip(prompts, outputs, pieces, strict=True):
        context = family.context(prompt, True)
        wanted = family.one_decode(context, output.outputs[0].token_ids, True)
        assert output.outputs[0].text == joined == wanted
