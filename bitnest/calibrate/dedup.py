"""Reading every document once, and drawing no window twice.

Two documents are the same when their words are: sha256 over the text with each run of whitespace
read as one space. Two windows are the same when all their tokens are. The first one counts, within
a source and across sources. Only hashes are remembered, 16 bytes each, so that the chance of
dropping a different text among n is n^2 / 2^129.

Left out: near duplicates (other punctuation, a changed line).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from bitnest.calibrate.chat import Conversation, render
from bitnest.errors import DataError

__all__ = ["Document", "Documents", "Draw", "document_digest", "draw_windows"]

KEY = 16  # bytes of a hash that are kept
CHUNK = 1 << 20  # characters normalised at once


class Document(NamedTuple):
    """Text to tokenise. closed: it ends with the end-of-sequence token, so that none is added."""

    text: str
    closed: bool = False


class Documents:
    """The documents of one source that no source before it held, conversations rendered.

    seen: hashes of the documents so far, shared between sources. After reading: `read` documents
    with text in them, of which `duplicates` were dropped; `conversations` of those left.
    """

    def __init__(
        self,
        tokenizer: Any,
        rows: Iterable[str | Conversation],
        *,
        where: str,
        seen: set[bytes],
    ) -> None:
        self._tokenizer = tokenizer
        self._rows = rows
        self._where = where
        self._seen = seen
        self.read = self.duplicates = self.conversations = 0

    def __iter__(self) -> Iterator[Document]:
        for number, row in enumerate(self._rows, 1):
            where = f"{self._where}, document {number}"
            text = row if isinstance(row, str) else render(self._tokenizer, row, where)
            if not text.strip():
                continue
            self.read += 1
            key = document_digest(text, where)
            if key in self._seen:
                self.duplicates += 1
                continue
            self._seen.add(key)
            self.conversations += not isinstance(row, str)
            yield Document(text, not isinstance(row, str) and self._closed(text))

    def _closed(self, text: str) -> bool:
        end = getattr(self._tokenizer, "eos_token", None)
        return isinstance(end, str) and text.rstrip().endswith(end)


def document_digest(text: str, where: str = "") -> bytes:
    """The first KEY bytes of sha256 over the words of `text`, one space between them, in UTF-8.

    Raises:
        DataError: the text holds half a surrogate pair, which no encoding can write.
    """
    state = hashlib.sha256()
    begun = gap = False  # gap: whitespace since the last word
    for start in range(0, len(text), CHUNK):
        part = text[start : start + CHUNK]
        words = " ".join(part.split())
        if words:
            if begun and (gap or part[0].isspace()):
                state.update(b" ")
            state.update(_utf8(words, where))
            begun, gap = True, False
        gap = gap or part[-1].isspace()
    return state.digest()[:KEY]


def _utf8(words: str, where: str) -> bytes:
    try:
        return words.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            "not Unicode text: it holds half a surrogate pair",
            where=where,
            hint="write the file again as UTF-8",
        ) from error


class Draw(NamedTuple):
    """Windows chosen by seed.

    positions: (count,), rising. replaced: windows that were drawn, found to be the same as
    one before, and given up for another. repeated: such windows that stayed, for lack of others.
    """

    positions: torch.Tensor
    replaced: int
    repeated: int


def draw_windows(windows: np.ndarray, count: int, seed: int, seen: set[bytes]) -> Draw:
    """Choose `count` of the (available, length) `windows` at random, all different if possible.

    They are the first ones of a permutation by `seed`, so a larger count adds windows and takes
    none away. seen: hashes of windows chosen before, here and in other sources; it grows.
    """
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen: list[int] = []
    spare: list[int] = []
    for index in order:
        if len(chosen) == count:
            break
        key = hashlib.sha256(windows[index].tobytes()).digest()[:KEY]
        (spare if key in seen else chosen).append(index)
        seen.add(key)
    repeated = count - len(chosen)
    replaced = len(set(order[:count]).intersection(spare)) - repeated
    return Draw(torch.tensor(sorted(chosen + spare[:repeated])), replaced, repeated)
