"""From token ids to text that can be sent while more is coming.

Two things can go wrong when text leaves token by token. A character of several bytes may be split
over tokens, and decodes to U+FFFD until its last byte is there: such text is held back. A stop
string may straddle tokens: the longest end of the text that could still become one is held back,
and nothing from a stop string on is ever emitted.

Text is decoded after the last prompt tokens, because some tokenizers drop the leading space of the
first piece they see.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTEXT = 6  # tokens of the prompt decoded along with the first generated ones
_INCOMPLETE = "\ufffd"


class Detokenizer:
    """Decodes one request's tokens, one at a time, into complete characters."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_CONTEXT:])
        self._start = 0  # decoded again each time, for the context
        self._done = len(self._ids)  # everything before was emitted

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)

    def push(self, token: int) -> str:
        """The text that `token` completes: empty while it ends inside a character."""
        self._ids.append(token)
        return self._advance(final=False)

    def finish(self) -> str:
        """What is left, incomplete characters as U+FFFD."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        if self._done == len(self._ids):
            return ""
        before = self._decode(self._ids[self._start : self._done])
        text = self._decode(self._ids[self._start :])
        if not final and text.endswith(_INCOMPLETE):
            return ""
        self._start, self._done = self._done, len(self._ids)
        return text[len(before) :]


class StopWatch:
    """Lets text through up to the first stop string, which itself is never emitted."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The part of the text so far that can no longer be the beginning of a stop string."""
        if self.stopped:
            return ""
        held = self._held + text
        found = [at for at in (held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return held[: min(found)]
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """What was held back and turned out not to be a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class TextStream:
    """Tokens in, sendable text out: the detokenizer followed by the stop strings."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stops: Sequence[str]
    ) -> None:
        self._characters = Detokenizer(tokenizer, prompt)
        self._stops = StopWatch(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met."""
        return self._stops.stopped

    def push(self, token: int) -> str:
        """The text that may be sent after `token`."""
        return self._stops.push(self._characters.push(token))

    def finish(self) -> str:
        """The text that may be sent once no token follows."""
        text = self._stops.push(self._characters.finish())
        return text if self.stopped else text + self._stops.finish()
