"""Text of token ids as they arrive: no broken characters, nothing lost, exact cuts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from nanovllm import SamplingParams
from nanovllm.engine.detokenizer import Detokenizer

TOKENIZER = tiny_tokenizer()
TEXTS = st.text(alphabet="abé ñ漢字🦊👩‍🚀\u0301\n", max_size=30)  # 1 to 4 bytes, and joined signs


def pieces_of(ids, tokenizer=TOKENIZER, prompt_ids=(), **params):
    """What a stream would send after each id and at the end, and whether a stop string ended it."""
    detokenizer = Detokenizer(tokenizer, SamplingParams(**params), prompt_ids)
    sent, pieces, stopped = "", [], False
    for token_id in ids:
        stopped = detokenizer.append(token_id)
        text = detokenizer.streamable
        assert detokenizer.streamable == text, "a second look shows something else"
        assert text.startswith(sent), "what was sent has changed"
        pieces.append(text[len(sent) :])
        sent = text
        if stopped:
            break
    detokenizer.finish()
    assert detokenizer.text.startswith(sent), "what was sent has changed at the end"
    return [*pieces, detokenizer.text[len(sent) :]], stopped


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_joined_pieces_are_the_text_and_none_is_broken(text):
    pieces, _ = pieces_of(TOKENIZER.encode(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 299), max_size=60))
def test_any_ids_give_what_the_tokenizer_gives(ids):
    pieces, _ = pieces_of(ids)
    assert "".join(pieces) == TOKENIZER.decode(ids, skip_special_tokens=True)


def test_a_character_comes_with_its_last_byte():
    ids = TOKENIZER.encode("🦊")
    assert len(ids) == 4
    assert pieces_of(ids)[0] == ["", "", "", "🦊", ""]
    assert pieces_of(ids[:3])[0][-1] == "\ufffd", "an end within a character is shown as such"


def test_garbage_is_not_held_back_for_ever():
    start_of_four_bytes = TOKENIZER.encode("🦊")[0]
    pieces, _ = pieces_of([start_of_four_bytes] * 200)
    assert "".join(pieces[:100]), "nothing came for 100 ids"
    assert len("".join(pieces)) == 200


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.data(), st.booleans())
def test_text_is_cut_at_the_first_stop_string(text, data, include):
    stop = data.draw(
        st.lists(st.text("abé 漢🦊\n", min_size=1, max_size=3), min_size=1, max_size=3)
    )
    ids = TOKENIZER.encode(text)
    pieces, stopped = pieces_of(ids, stop=stop, include_stop_str_in_output=include)
    first = min(((text.find(s), s) for s in stop if s in text), default=None)
    assert stopped == (first is not None)
    if first is None:
        assert "".join(pieces) == text
    else:
        joined = "".join(pieces)
        ends = [text[: text.find(s) + len(s) * include] for s in stop if s in text]
        assert joined in ends
        if not include:
            assert not any(s in joined for s in stop)


def test_a_stop_string_across_tokens_is_never_shown_in_part():
    ids = TOKENIZER.encode("say STOP now")
    pieces, stopped = pieces_of(ids, stop="STOP")
    assert stopped
    assert "".join(pieces) == "say "
    assert not any("S" in piece for piece in pieces)


def test_the_beginning_of_a_stop_string_comes_once_it_is_none():
    pieces, stopped = pieces_of(TOKENIZER.encode("a STOLEN key"), stop="STOP")
    assert not stopped
    assert "".join(pieces) == "a STOLEN key"


@pytest.mark.parametrize(("skip", "text"), [(True, "ab"), (False, "a<|im_end|>b")])
def test_special_tokens(skip, text):
    ids = TOKENIZER.encode("a<|im_end|>b")
    assert "".join(pieces_of(ids, skip_special_tokens=skip)[0]) == text


def test_of_two_stop_strings_in_one_token_the_first_cuts():
    ids = TOKENIZER.encode("the")
    assert len(ids) == 1
    for stop in (["t", "h"], ["h", "t"]):
        assert "".join(pieces_of(ids, stop=stop)[0]) == ""


# -- SentencePiece, as Llama 2 has it --------------------------------------------------------------

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["<unk>", *BYTES, "▁Once", "▁upon", "▁a", "▁time", "!"]


@pytest.fixture(scope="module")
def sentencepiece():
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    model = models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


STORY = [WORDS.index(word) for word in ("▁Once", "▁upon", "▁a", "▁time", "!")]


@pytest.mark.parametrize("stop", [[], ["never said"]])
def test_spaces_between_words_stay(sentencepiece, stop):
    assert "".join(pieces_of(STORY, sentencepiece, stop=stop)[0]) == "Once upon a time!"


def test_a_text_goes_on_where_its_prompt_ended(sentencepiece):
    pieces, stopped = pieces_of(STORY[2:], sentencepiece, STORY[:2])
    assert "".join(pieces) == " a time!"
    pieces, stopped = pieces_of(STORY[2:], sentencepiece, STORY[:2], stop=[" a"])
    assert stopped
    assert "".join(pieces) == ""


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_bytes_that_stand_for_characters_are_shown_as_these(sentencepiece, text):
    ids = [WORDS.index(BYTES[byte]) for byte in text.encode()]
    pieces, _ = pieces_of(ids, sentencepiece)
    assert "".join(pieces) == sentencepiece.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)
