"""Detokenizer: one request's token ids as text, as they arrive, and the stop strings found in it.

A token may end in the middle of a character, so the text of a prefix of ids is not always a prefix
of the text. Decoding is therefore incremental over a small window of ids, and what could still
change is held back. Nothing is decoded until somebody looks, unless there are stop strings.
"""

from collections.abc import Sequence
from typing import Any

from nanovllm.sampling_params import SamplingParams
from nanovllm.validation import tokenizer_errors

REPLACEMENT = "\ufffd"  # what a tokenizer decodes an incomplete character to
LONGEST_WINDOW = 64  # ids re-decoded at most; only garbage bytes ever get here
PROMPT_IDS = 8  # of the prompt, before the first window: a token's leading space needs a context


class Detokenizer:
    """Text of the ids appended so far, behind those of a prompt, cut at the first stop string."""

    def __init__(self, tokenizer: Any, params: SamplingParams, prompt_ids: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._params = params
        self._ids = list(prompt_ids[-PROMPT_IDS:])
        self._window = 0  # ids before this one are never decoded again
        self._settled = len(self._ids)  # [_window, _settled) gives context; _text ends with it
        self._text = ""
        self._tail = ""  # text of the ids after _settled, as far as it cannot change
        self._searched = 0  # characters before this one cannot begin a stop string
        self._ended = False  # no more ids will come
        self._closed = False  # the text is whole

    def append(self, token_id: int) -> bool:
        """Take the next id; True if it completes a stop string."""
        if self._closed:
            return False
        self._ids.append(token_id)
        if not self._params.stop:
            return False
        self._catch_up()
        return self._cut_at_stop()

    def finish(self) -> None:
        """No more ids will come: `text` shows the last ones, complete characters or not.

        Decoding can fail, and the end of a request must not, so nothing is decoded here.
        """
        self._ended = True

    @property
    def text(self) -> str:
        if not self._closed:
            self._catch_up(hold_incomplete=not self._ended)
            self._closed = self._ended
        return self._text + self._tail

    @property
    def streamable(self) -> str:
        """The text that is certain to stand: without a suffix that could begin a stop string."""
        text = self.text
        if self._closed:
            return text
        longest = max((len(s) for s in self._params.stop), default=1) - 1
        for start in range(max(0, len(text) - longest), len(text)):
            if any(s.startswith(text[start:]) for s in self._params.stop):
                return text[:start]
        return text

    def _decode(self, start: int, stop: int) -> str:
        with tokenizer_errors(getattr(self._tokenizer, "name_or_path", "")):
            return self._tokenizer.decode(
                self._ids[start:stop],
                skip_special_tokens=self._params.skip_special_tokens,
                clean_up_tokenization_spaces=False,
            )

    def _catch_up(self, hold_incomplete: bool = True) -> None:
        end = len(self._ids)
        if end == self._settled:
            return
        known = len(self._decode(self._window, self._settled))
        fresh = self._decode(self._window, end)[known:]
        self._tail = fresh.rstrip(REPLACEMENT) if hold_incomplete else fresh
        if self._tail == fresh or end - self._settled > LONGEST_WINDOW:
            self._text += fresh
            self._tail = ""
            self._window, self._settled = self._settled, end

    def _cut_at_stop(self) -> bool:
        text = self._text + self._tail
        found = [(text.find(s, self._searched), s) for s in self._params.stop]
        found = [(at, s) for at, s in found if at >= 0]
        self._searched = max(0, len(text) - max(map(len, self._params.stop)) + 1)
        if not found:
            return False
        at, stop = min(found)
        self._text = text[: at + len(stop) if self._params.include_stop_str_in_output else at]
        self._tail = ""
        self._closed = True
        return True
