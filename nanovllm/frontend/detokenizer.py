"""Detokenizer: turn one request's token ids into text as they arrive, and find its stop strings.

The text of an answer does not depend on when somebody reads it, and a character that was shown is
never taken back. The text is what `decode(context + ids)` adds to `decode(context)`, where the
context comes from the prompt:

- The context is the prompt's last tokens. Many decoders drop the space of the first token that they
  see, so the answer " a time" keeps its space only because a context comes before it. It loses that
  space if the prompt shows nothing at all, for example because it holds only a skipped special
  token.
- If the prompt ends within a character and the answer completes it, then the whole character
  belongs to the answer. An incomplete character that the answer does not complete belongs to the
  prompt, and so do all complete characters of the prompt.

We do not decode the whole text again for every new token. Two facts tell how little is enough:

- Between two tokens that are complete characters, a decoder looks back no further than one token.
  A character has at most four bytes, so the last four tokens are always enough context. Only an
  incomplete character at the end, which shows as U+FFFD, waits for the next tokens.
- A byte-fallback decoder (Llama 2's, for example) decodes a run of byte tokens like `<0xC3>` as a
  whole, and one wrong byte turns every character of the run into U+FFFD. The text of a run can
  therefore change until the run has ended, so it waits for the next token of another kind.

The text that later ids cannot change is called *stable*. We decode nothing before somebody reads
the text, unless the request has stop strings. A request ends as soon as the decode of its ids holds
a stop string, even within a run of byte tokens.
"""

import weakref
from codecs import getincrementaldecoder
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, ClassVar

from nanovllm.checkpoint.tokenizer import tokenizer_errors
from nanovllm.sampling_params import SamplingParams
from nanovllm.validation import as_list

REPLACEMENT = "\ufffd"  # what a tokenizer decodes an incomplete character to
CONTEXT_TOKENS = 4  # decoded again with the new ids, because a character has at most four bytes


class Detokenizer:
    """The text of the ids that were appended, cut at the first stop string.

    tokenizer: a Hugging Face tokenizer.
    params: the stop strings, and whether the text keeps stop strings and special tokens.
    prompt_ids: the ids of the prompt before the text.
    """

    def __init__(self, tokenizer: Any, params: SamplingParams, prompt_ids: Sequence[int] = ()):
        self._decoder = TokenDecoder.for_tokenizer(tokenizer, params.skip_special_tokens)
        self.tokenizer = tokenizer  # keeps it alive, which the shared decoder does not
        self.params = params
        self._stop: list[str] = as_list("stop", params.stop)
        self._longest_stop = max(map(len, self._stop), default=0)
        self._prompt_context = self._decoder.context_for(prompt_ids)
        self.reset()

    def reset(self) -> None:
        """Forget all appended ids, so that they can be appended anew.

        An interrupt in the middle of `append` may leave the text in any state. Nothing that this
        method reads is changed by `append`.
        """
        self._new_ids: list[int] = []  # appended since the text was last read
        self._pending_ids: list[int] = []  # read, but still without text
        self._stable_text = ""
        self._context_ids, begun = self._prompt_context
        self._context_text = self._decoder.decode(self._context_ids)  # the stable part of it
        self._byte_run = ByteRun(begun)
        self._search_start = 0  # no stop string begins before this character
        self._num_ids = 0  # ids that were appended, as far as stop strings are looked for
        self._exempt = 0  # characters of the first `min_tokens` ids; no stop string ends in them
        self.stop_string: str | None = None  # the stop string that the text was cut at
        self._is_finished = False  # no more ids will come
        self._is_final = False  # the text will not change any more

    @property
    def text(self) -> str:
        """The stable text, and after the end the whole text."""
        if not self._is_final:
            self._decode_new_ids(final=self._is_finished)
            if self._is_finished:
                if self._num_ids > self.params.min_tokens:
                    self._truncate_at_stop()
                self._is_final = True
        if self._is_final or self.params.include_stop_str_in_output:
            return self._stable_text
        # The end of the text may turn out to be the beginning of a stop string.
        length = len(self._stable_text)
        for start in range(max(0, length - self._longest_stop + 1), length):
            if any(stop.startswith(self._stable_text[start:]) for stop in self._stop):
                return self._stable_text[:start]
        return self._stable_text

    def append(self, token_id: int) -> bool:
        """Add the next id. Return whether it completes a stop string."""
        if self._is_final:
            return False
        self._new_ids.append(token_id)
        if not self._stop:
            return False
        self._decode_new_ids()
        self._num_ids += 1
        if self._num_ids <= self.params.min_tokens:
            self._exempt = len(self._stable_text + self._byte_run.text)
            return False
        return self._truncate_at_stop()

    def finish(self) -> None:
        """Accept no more ids. From now on `text` includes incomplete characters at the end.

        Decoding can fail, and the end of a request must not, so we decode nothing here.
        """
        self._is_finished = True

    def _decode_new_ids(self, final: bool = False) -> None:
        """Decode the new ids as far as their text is stable, or to the end if `final` is true."""
        visible = [i for i in self._new_ids if not self._decoder.is_skipped(i)]
        self._new_ids = []
        for token_id in visible:
            if token_id in self._decoder.byte_of:
                self._extend_byte_run(token_id)
            else:
                self._pending_ids += [*self._byte_run.ids, token_id]
                self._byte_run = ByteRun()
        if final:
            self._pending_ids += self._byte_run.ids
            self._byte_run = ByteRun()
        if self._pending_ids or final:
            self._decode_pending_ids(final)

    def _decode_pending_ids(self, final: bool) -> None:
        """Add the text of the pending ids to the stable text, except for what may still change."""
        decoder = self._decoder
        ids = self._context_ids + self._pending_ids
        added = remove_common_prefix(self._context_text, decoder.decode(ids))
        if not added:  # a decoder that drops the first space still waits for the first token
            return
        context_text = decoder.stable_part(decoder.decode(ids[-CONTEXT_TOKENS:]))
        unsearched = max(0, len(self._stable_text) - self._longest_stop + 1)
        self._search_start = min(self._search_start, unsearched)
        self._stable_text += added if final else decoder.stable_part(added)
        self._context_ids, self._context_text = ids[-CONTEXT_TOKENS:], context_text
        self._pending_ids = []

    def _extend_byte_run(self, token_id: int) -> None:
        """Add a byte token to the run at the end. We search the run's text for stop strings."""
        run = self._byte_run
        had_text = bool(run.text)
        run.append(token_id, self._decoder.byte_of[token_id])
        # Without a context, the decoder may drop the first space of the run.
        if run.text and not had_text and not self._context_ids:
            run.text = self._decoder.decode(self._pending_ids + run.ids)

    def _truncate_at_stop(self) -> bool:
        """Cut the text at its first stop string, if there is one, and return whether there is."""
        text = self._stable_text + self._byte_run.text
        found = [
            (text.find(stop, max(self._search_start, self._exempt - len(stop) + 1)), stop)
            for stop in self._stop
        ]
        found = [(at, stop) for at, stop in found if at >= 0]
        self._search_start = max(0, len(text) - self._longest_stop + 1)
        if not found:
            return False
        at, stop = min(found)
        self.stop_string = stop
        end = at + len(stop) if self.params.include_stop_str_in_output else at
        self._stable_text = text[:end]
        self._is_final = True
        return True


def make_detokenizer(
    tokenizer: Any, params: SamplingParams, prompt_ids: Sequence[int]
) -> Detokenizer | None:
    """Make the detokenizer of one answer. Return None if the request is for token ids only."""
    if tokenizer is None or not params.detokenize:
        return None
    return Detokenizer(tokenizer, params, prompt_ids)


class ByteRun:
    """A run of byte tokens that may go on, and the text that it has if it ends here.

    begun: bytes at the end of the prompt that the run continues. The text is empty once a byte is
    wrong, because a byte-fallback decoder then shows U+FFFD for every byte of the run.
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

    All requests share one TokenDecoder, so that each fact about the vocabulary is found once.
    """

    # tokenizer -> {skip_special_tokens: its TokenDecoder}
    cache: ClassVar[Any] = weakref.WeakKeyDictionary()

    @classmethod
    def for_tokenizer(cls, tokenizer: Any, skip_special_tokens: bool) -> "TokenDecoder":
        """Return the cached decoder of this tokenizer, or make it. It lives while that lives."""
        decoders = cls.cache.setdefault(tokenizer, {})
        if skip_special_tokens not in decoders:
            decoders[skip_special_tokens] = cls(tokenizer, skip_special_tokens)
        return decoders[skip_special_tokens]

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

    def stable_part(self, text: str) -> str:
        """Return the text without an incomplete character at its end, if there may be one."""
        return text if self.byte_of else text.removesuffix(REPLACEMENT)

    def is_skipped(self, token_id: int) -> bool:
        """Return whether `decode` omits this id: a skipped special token, or no token at all.

        We decode the id three times in a row, because a decoder may drop the first space.
        """
        if token_id not in self._skipped:
            self._skipped[token_id] = not self.decode([token_id] * 3)
        return self._skipped[token_id]

    def context_for(self, prompt_ids: Sequence[int]) -> tuple[list[int], bytes]:
        """Return the context of an answer to a prompt, and bytes of an incomplete character.

        Only a byte-fallback decoder needs these bytes. They are empty for all other decoders.
        """
        visible = (i for i in reversed(prompt_ids) if not self.is_skipped(i))
        last = list(islice(visible, CONTEXT_TOKENS))[::-1]
        if not last or last[-1] not in self.byte_of:
            return last, b""
        # A wrong byte in the answer would break complete characters in its run, so the context
        # may not hold such characters of the prompt.
        for ids in (last[-3:], last[-2:], last[-1:]):
            begun = bytes(self.byte_of[i] for i in ids if i in self.byte_of)
            if len(begun) == len(ids) and is_incomplete_utf8(begun):
                return ids, begun
        return self._text_token, b""

    @cached_property
    def _text_token(self) -> list[int]:
        """A token that shows as text and is no byte token, in a list that is empty without one."""
        ids: Iterator[int] = (i for i in range(len(self._tokenizer)) if i not in self.byte_of)
        return next(([i] for i in ids if self.decode([i])), [])

    def _find_byte_tokens(self) -> dict[int, int]:
        """Return the byte of each token `<0x00>` to `<0xFF>`, if the decoder joins such tokens."""
        names = [f"<0x{byte:02X}>" for byte in range(256)]
        ids = self._tokenizer.convert_tokens_to_ids(names)
        unknown = (None, self._tokenizer.unk_token_id)
        byte_of = {i: byte for byte, i in enumerate(ids) if i not in unknown}
        falls_back = len(byte_of) == 256 and self.decode([ids[0xC3], ids[0xA9]]) == "é"
        return byte_of if falls_back else {}


def remove_common_prefix(known: str, text: str) -> str:
    """Return `text` without the beginning that it has in common with `known`.

    This beginning is all of `known`, unless `known` ends in an incomplete character that `text`
    completes.
    """
    while not text.startswith(known):
        known = known[:-1]
    return text[len(known) :]


def is_incomplete_utf8(data: bytes) -> bool:
    """Return whether these bytes are the beginning of one character that more bytes complete."""
    try:
        return not getincrementaldecoder("utf-8")().decode(data)
    except UnicodeDecodeError:
        return False
