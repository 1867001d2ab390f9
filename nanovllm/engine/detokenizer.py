"""Detokenizer: turns one request's token ids into text as they arrive, and finds its stop strings.

The text of an answer is one decode of all its ids behind the prompt. It does not depend on when
somebody reads it, and a character that was shown is never taken back. More exactly, the text is
what `decode(context + ids)` adds to `decode(context)`, where the context comes from the prompt:

- The context is the prompt's last tokens. Many decoders drop the space of the first token that they
  see, so the answer " a time" keeps its space behind any prompt. It loses that space only if the
  prompt shows nothing at all, for example because it holds only a skipped special token.
- If the prompt ends within a character and the answer completes it, then the whole character
  belongs to the answer. An incomplete character that the answer does not complete stays the
  prompt's, and so do all the complete ones.

We do not decode the whole text for every new token. Two things decide how little is enough:

- Between two tokens that are complete characters, a decoder looks back no further than one token.
  A character has at most four bytes, so the last four tokens are always enough context. Only an
  incomplete character at the end, which shows as U+FFFD, waits for the next tokens.
- A byte-fallback decoder (Llama 2's, for example) decodes a run of byte tokens like `<0xC3>` as a
  whole: one wrong byte turns every character of the run into U+FFFD. Nothing of a run is therefore
  certain before the run has ended, which is why its text waits for the next token of another kind.

No output is decoded before somebody reads the text, unless the request has stop strings. A request
ends as soon as the decode of its ids holds a stop string, even within a run of byte tokens.
"""

import weakref
from codecs import getincrementaldecoder
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, ClassVar

from nanovllm.checkpoint.tokenizer import tokenizer_errors
from nanovllm.sampling_params import SamplingParams

REPLACEMENT = "\ufffd"  # what a tokenizer decodes an incomplete character to
CONTEXT = 4  # tokens decoded again with the new ones, because a character has at most four bytes


class Detokenizer:
    """The text of the ids appended so far, behind those of a prompt, cut at the first stop string.

    `tokenizer` is a Hugging Face tokenizer. `params` gives the stop strings, and says whether they
    stay in the text and whether special tokens are skipped.
    """

    def __init__(self, tokenizer: Any, params: SamplingParams, prompt_ids: Sequence[int] = ()):
        self._decoder = TokenDecoder.of(tokenizer, params.skip_special_tokens)
        self._tokenizer = tokenizer  # keeps it alive: the decoder, which is shared, does not
        self._params = params
        self._unread: list[int] = []  # appended since the last read
        self._pending: list[int] = []  # read, but with no text so far
        self._text = ""  # what is certain
        self._context, begun = self._decoder.context_of(prompt_ids)
        self._context_text = self._decoder.decode(self._context)  # as far as it cannot change
        self._run = ByteRun(begun)
        self._longest_stop = max(map(len, params.stop), default=0)
        self._searched = 0  # characters before this one cannot begin a stop string
        self._num_ids = 0  # that stop strings were looked for behind, or would have been
        self._exempt = 0  # characters of the first `min_tokens` ids: no stop string ends in them
        self.stop_string: str | None = None  # the one that the text was cut at
        self._ended = False  # no more ids will come
        self._closed = False  # the text is whole

    @property
    def text(self) -> str:
        """The text that later ids cannot change. After the end it is the whole text."""
        if not self._closed:
            self._read(final=self._ended)
            if self._ended:
                if self._num_ids > self._params.min_tokens:
                    self._cut_at_stop()
                self._closed = True
        if self._closed or self._params.include_stop_str_in_output:
            return self._text
        for start in range(max(0, len(self._text) - self._longest_stop + 1), len(self._text)):
            if any(stop.startswith(self._text[start:]) for stop in self._params.stop):
                return self._text[:start]
        return self._text

    def append(self, token_id: int) -> bool:
        """Take the next id. Return True if it completes a stop string."""
        if self._closed:
            return False
        self._unread.append(token_id)
        if not self._params.stop:
            return False
        self._read()
        self._num_ids += 1
        if self._num_ids <= self._params.min_tokens:
            self._exempt = len(self._text + self._run.text)
            return False
        return self._cut_at_stop()

    def finish(self) -> None:
        """Take no more ids. From now on `text` is the text of all, incomplete characters included.

        Decoding can fail, and the end of a request must not, so nothing is decoded here.
        """
        self._ended = True

    def _read(self, final: bool = False) -> None:
        """Decode what has arrived, as far as its text is certain, or all of it if it is `final`."""
        shown = [i for i in self._unread if not self._decoder.is_skipped(i)]
        self._unread = []
        for token_id in shown:
            if token_id in self._decoder.byte_of:
                self._extend_run(token_id)
            else:
                self._pending += [*self._run.ids, token_id]
                self._run = ByteRun()
        if final:
            self._pending += self._run.ids
            self._run = ByteRun()
        if self._pending or final:
            self._decode_pending(final)

    def _decode_pending(self, final: bool) -> None:
        """Move the text of the pending ids to the certain text, but not what may still change."""
        decoder = self._decoder
        ids = self._context + self._pending
        added = text_behind(self._context_text, decoder.decode(ids))
        if not added:  # for a decoder that drops the first space, the first token is still to come
            return
        context_text = decoder.certain(decoder.decode(ids[-CONTEXT:]))
        self._searched = min(self._searched, max(0, len(self._text) - self._longest_stop + 1))
        self._text += added if final else decoder.certain(added)
        self._context, self._context_text, self._pending = ids[-CONTEXT:], context_text, []

    def _extend_run(self, token_id: int) -> None:
        """Add a byte token to the run at the end, whose text stop strings are searched in."""
        had_text = bool(self._run.text)
        self._run.append(token_id, self._decoder.byte_of[token_id])
        if self._run.text and not had_text and not self._context:  # a first space may be dropped
            self._run.text = self._decoder.decode(self._pending + self._run.ids)

    def _cut_at_stop(self) -> bool:
        """Cut the text at its first stop string and take no more ids. Return whether it has one."""
        text = self._text + self._run.text
        found = [
            (text.find(stop, max(self._searched, self._exempt - len(stop) + 1)), stop)
            for stop in self._params.stop
        ]
        found = [(at, stop) for at, stop in found if at >= 0]
        self._searched = max(0, len(text) - self._longest_stop + 1)
        if not found:
            return False
        at, stop = min(found)
        self.stop_string = stop
        self._text = text[: at + len(stop) if self._params.include_stop_str_in_output else at]
        self._closed = True
        return True


class ByteRun:
    """A run of byte tokens that may go on, and the text that it has if it ends here.

    `begun` are bytes of the prompt that the run continues. The text is empty once a byte is wrong,
    because a byte-fallback decoder then shows U+FFFD for every byte of the run.
    """

    def __init__(self, begun: bytes = b""):
        self.ids: list[int] = []
        self.text = ""
        self._utf8: Any = getincrementaldecoder("utf-8")()
        self._utf8.decode(begun)

    def append(self, token_id: int, byte: int) -> None:
        self.ids.append(token_id)
        try:
            self.text += self._utf8.decode(bytes([byte])) if self._utf8 else ""
        except UnicodeDecodeError:
            self.text, self._utf8 = "", None


class TokenDecoder:
    """Decodes with one tokenizer, with or without special tokens, and knows its kinds of tokens.

    All requests share it, so that each fact about the vocabulary is found once.
    """

    _made: ClassVar[Any] = weakref.WeakKeyDictionary()  # tokenizer -> {skip_special_tokens: this}

    @classmethod
    def of(cls, tokenizer: Any, skip_special_tokens: bool) -> "TokenDecoder":
        """Return the one that was made for this tokenizer, or make it. It lives as long as that."""
        made = cls._made.setdefault(tokenizer, {})
        if skip_special_tokens not in made:
            made[skip_special_tokens] = cls(tokenizer, skip_special_tokens)
        return made[skip_special_tokens]

    def __init__(self, tokenizer: Any, skip_special_tokens: bool):
        self._tokenizer = weakref.proxy(tokenizer)
        self._skip_special_tokens = skip_special_tokens
        self._skipped: dict[int, bool] = {}
        self.byte_of = self._find_byte_tokens()  # id -> byte; empty without byte fallback

    def decode(self, ids: list[int]) -> str:
        with tokenizer_errors(getattr(self._tokenizer, "name_or_path", "")):
            return self._tokenizer.decode(
                ids,
                skip_special_tokens=self._skip_special_tokens,
                clean_up_tokenization_spaces=False,
            )

    def certain(self, text: str) -> str:
        """Drop the incomplete character at the end of the text, if there may be one."""
        return text if self.byte_of else text.removesuffix(REPLACEMENT)

    def is_skipped(self, token_id: int) -> bool:
        """Whether `decode` leaves this id out. It is a skipped special token, or no token at all.

        We decode the id three times in a row, because a decoder may drop a first space.
        """
        if token_id not in self._skipped:
            self._skipped[token_id] = not self.decode([token_id] * 3)
        return self._skipped[token_id]

    def context_of(self, prompt_ids: Sequence[int]) -> tuple[list[int], bytes]:
        """Return the ids behind which an answer is decoded, and bytes of an incomplete character.

        Only a byte-fallback decoder needs these bytes. They are empty for all other decoders.
        """
        shown = (i for i in reversed(prompt_ids) if not self.is_skipped(i))
        last = list(islice(shown, CONTEXT))[::-1]
        if not last or last[-1] not in self.byte_of:
            return last, b""
        # A wrong byte in the answer would break the prompt's complete characters: leave them out.
        for ids in (last[-3:], last[-2:], last[-1:]):
            begun = bytes(self.byte_of[i] for i in ids if i in self.byte_of)
            if len(begun) == len(ids) and is_incomplete(begun):
                return ids, begun
        return self._plain_token, b""

    @cached_property
    def _plain_token(self) -> list[int]:
        """Some token that shows as text and is no byte token, in a list; else an empty list."""
        ids: Iterator[int] = (i for i in range(len(self._tokenizer)) if i not in self.byte_of)
        return next(([i] for i in ids if self.decode([i])), [])

    def _find_byte_tokens(self) -> dict[int, int]:
        """The ids of the tokens `<0x00>` to `<0xFF>`, if the decoder makes characters of them."""
        names = [f"<0x{byte:02X}>" for byte in range(256)]
        ids = self._tokenizer.convert_tokens_to_ids(names)
        unknown = (None, self._tokenizer.unk_token_id)
        byte_of = {i: byte for byte, i in enumerate(ids) if i not in unknown}
        falls_back = len(byte_of) == 256 and self.decode([ids[0xC3], ids[0xA9]]) == "é"
        return byte_of if falls_back else {}


def text_behind(known: str, text: str) -> str:
    """Remove from the text the beginning that it has in common with `known`.

    This is all of `known`, unless `known` ends in an incomplete character that `text` completes.
    """
    while not text.startswith(known):
        known = known[:-1]
    return text[len(known) :]


def is_incomplete(begun: bytes) -> bool:
    """Whether these bytes begin one character that more bytes can complete."""
    try:
        return not getincrementaldecoder("utf-8")().decode(begun)
    except UnicodeDecodeError:
        return False
