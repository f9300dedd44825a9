"""Tokens in, text out as soon as it is certain. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"
"""What a tokenizer shows for the bytes of a character that are not all there yet."""


class TextStream:
    """The text of one answer, piece by piece; the pieces joined are the text of all tokens, special ones left out.

    Held back is what a later token may still change: bytes of an unfinished character, and an end of the text with
    which one of the `stop` texts may have begun. After a stop text appeared, `stopped` is true and nothing of it is
    in the pieces.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, [text for text in stop if text]
        self.stopped = False
        self._ids: list[int] = []
        # Text is made from a window of tokens: those before `_read` give context, as some tokenizers write the
        # first token of a text without its space.
        self._window, self._read = 0, 0
        self._held = ""

    def push(self, token: int) -> str:
        """The text that is certain after one more token."""
        self._ids.append(token)
        text = self._decode(self._window)
        return self._emit("" if text.endswith(_UNFINISHED) else self._advance(text))

    def finish(self) -> str:
        """What is still held back, when no token follows."""
        if self.stopped:
            return ""
        text = self._emit(self._advance(self._decode(self._window)))
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _decode(self, start: int, end: int | None = None) -> str:
        return str(self.tokenizer.decode(self._ids[start:end], skip_special_tokens=True))

    def _advance(self, text: str) -> str:
        new = text[len(self._decode(self._window, self._read)) :]
        self._window, self._read = self._read, len(self._ids)
        return new

    def _emit(self, new: str) -> str:
        text = self._held + new
        found = [at for at in map(text.find, self.stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        certain = len(text) - max((_overlap(text, stop) for stop in self.stop), default=0)
        self._held = text[certain:]
        return text[:certain]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
