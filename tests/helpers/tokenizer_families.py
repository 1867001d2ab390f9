"""Tiny tokenizers, one for each kind of decoder that language models use, and what they decode to.

`one_decode` is the text that a Detokenizer must give. It is written without windows or state, so
that it can serve as the reference.
"""

import random
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tiny_models import tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

REPLACEMENT = "\ufffd"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>", "<|tool|>"]
CONTENT = "!,.abenoot"
SPACED = ["▁", "▁▁", "▁▁▁▁", "▁Once", "▁upon", "▁a", "▁time", "é", "漢", "oo", "STOP", REPLACEMENT]
WORDS = [
    "once",
    "upon",
    "time",
    "##s",
    "##é",
    "漢",
    "##漢",
    "STOP",
    "##OP",
    "n't",
    "'",
    REPLACEMENT,
]
CHARACTERS = "ab é ñ漢字🦊👩\u0301\n ."  # one to four bytes each
VOCAB = 304  # ids that a model may sample; the ones behind the last token stand for none


@dataclass
class Family:
    """One tokenizer, with what the reference and the random ids need to know of it."""

    name: str
    tokenizer: Any

    @cached_property
    def tokens(self) -> list[str | None]:
        return [self.tokenizer.backend_tokenizer.id_to_token(i) for i in range(VOCAB)]

    @cached_property
    def special(self) -> list[int]:
        return [i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special]

    @cached_property
    def byte_of(self) -> dict[int, int]:
        """The value of each byte token; empty for a decoder without byte fallback."""
        named = {
            i: t for i, t in enumerate(self.tokens) if re.fullmatch("<0x[0-9A-F]{2}>", t or "")
        }
        return {i: int(t[3:5], 16) for i, t in named.items()}

    def ids(self, *tokens: str) -> list[int]:
        return [self.tokens.index(token) for token in tokens]

    def bytes(self, text: str) -> list[int]:
        """One id for each byte of `text`, where the family has such ids; else any ids for it."""
        if self.byte_of:
            return self.ids(*(BYTES[byte] for byte in text.encode()))
        if self.name == "byte_level":
            return [i for c in text for i in self.tokenizer.encode(c)]
        return [self.tokens.index(c) for c in text if c in self.tokens]

    def decode(self, ids: list[int], skip: bool) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
        )

    def visible(self, ids: list[int], skip: bool) -> list[int]:
        hidden = self.special if skip else ()
        return [i for i in ids if self.tokens[i] is not None and i not in hidden]

    def split_run(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """Visible ids without the byte tokens at their end, and those byte tokens."""
        at = len(ids)
        while at and ids[at - 1] in self.byte_of:
            at -= 1
        return ids[:at], ids[at:]

    def context(self, prompt: list[int], skip: bool) -> list[int]:
        """The prompt, where a run of byte tokens at its end keeps an incomplete character only."""
        before, run = self.split_run(self.visible(prompt, skip))
        for count in (3, 2, 1):
            begun = bytes(self.byte_of[i] for i in run[-count:])
            if len(begun) == count and is_begun(begun):
                return before + self.ids("!") * (len(run) > count) + run[-count:]
        return before + self.ids("!") * bool(run)

    def one_decode(self, context: list[int], ids: list[int], skip: bool) -> str:
        """The text of the answer `ids` behind the `context` of its prompt."""
        known, whole = self.decode(context, skip), self.decode(context + ids, skip)
        count = 0  # of the characters that both have
        while known[: count + 1] == whole[: count + 1] and count < min(len(known), len(whole)):
            count += 1
        return whole[count:]

    def searchable(self, context: list[int], ids: list[int], skip: bool) -> str:
        """The text in which a stop string may be found, were `ids` the end."""
        text = self.one_decode(context, ids, skip)
        if not self.byte_of:
            return text.removesuffix(REPLACEMENT)
        shown = self.visible(ids, skip)
        _, run = self.split_run(context + shown)
        try:
            bytes(self.byte_of[i] for i in run).decode()
        except UnicodeDecodeError:
            return self.one_decode(context, self.split_run(shown)[0], skip)
        return text

    def draw(self, rng: random.Random) -> list[int]:
        """Ids of characters, of plain tokens and of anything else, which may end anywhere."""
        ids: list[int] = []
        for _ in range(rng.randint(0, 8)):
            kind = rng.random()
            if kind < 0.45:
                ids += self.bytes("".join(rng.choices(CHARACTERS, k=rng.randint(1, 3))))
            elif kind < 0.75:
                ids.append(rng.choice(self.plain))
            elif kind < 0.9:
                ids.append(rng.choice([*self.special, len(self.tokens) - 1]))
            else:
                ids.append(rng.randrange(len(self.tokenizer)))
        for _ in range(rng.choice([0, 0, 1, 3])):  # a special token within a character
            ids.insert(rng.randint(0, len(ids)), rng.choice(self.special))
        return ids[: rng.randint(0, len(ids))] if rng.random() < 0.5 else ids

    @cached_property
    def plain(self) -> list[int]:
        reserved = {*self.byte_of, *self.special}
        return [i for i, t in enumerate(self.tokens) if t is not None and i not in reserved]


def is_begun(part: bytes) -> bool:
    """Whether more bytes can make one character of `part`."""
    ends = [bytes([last]) + b"\x80" * count for last in range(0x80, 0xC0) for count in range(3)]
    return any(is_valid(part + end) for end in ends)


def is_valid(part: bytes) -> bool:
    try:
        return len(part.decode()) == 1
    except UnicodeDecodeError:
        return False


def wrapped(model: Any, decoder: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens(["<think>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def with_byte_fallback(*steps: Any) -> PreTrainedTokenizerFast:
    words = [*SPECIAL, *BYTES, *SPACED, *sorted(set(CONTENT))]
    vocab = {word: i for i, word in enumerate(words)}
    model = models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>")
    return wrapped(model, decoders.Sequence(list(steps)))


def families() -> list[Family]:
    spaces, fallback, fuse = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
    strip, always = decoders.Strip(" ", 1, 0), decoders.Metaspace("▁", prepend_scheme="always")
    plain = [*SPECIAL, *SPACED, *sorted(set(CONTENT))]
    words = {w: i for i, w in enumerate([*SPECIAL, *WORDS, *sorted(set(CONTENT))])}
    unigram = models.Unigram([(word, -1.0) for word in plain], unk_id=0, byte_fallback=False)
    wordpiece = models.WordPiece(vocab=words, unk_token="<unk>")
    made = {
        "byte_level": tiny_tokenizer(),
        "llama2": with_byte_fallback(spaces, fallback, fuse, strip),
        "tinyllama": with_byte_fallback(fallback, always, fuse),
        "gemma": with_byte_fallback(spaces, fallback, fuse),
        "wordpiece": wrapped(wordpiece, decoders.WordPiece("##", cleanup=True)),
        "t5": wrapped(unigram, always),
        "no_decoder": wrapped(models.WordLevel(words, unk_token="<unk>"), None),
    }
    return [Family(name, tokenizer) for name, tokenizer in made.items()]


FAMILIES = {family.name: family for family in families()}
