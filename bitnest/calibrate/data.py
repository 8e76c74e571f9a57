"""Text cut into windows of tokens, for calibration and evaluation.

Documents are joined by the tokenizer's end-of-sequence token and cut into windows that do not
overlap (or packed otherwise, see `windows`). `spread` takes N windows of n tokens at 0, s, 2s, ...
with s = floor(n / N), one at the start of each Nth of the text; `random` draws whole windows by
seed and keeps text order. Text is tokenised in pieces cut before a single space between letters,
where tokenizers split anyway; tokens are kept as int32. Of very large sources the first
`MAX_TOKENS` tokens are used, and that is logged.

Calibration draws its samples from any number of labelled sources, in proportion to their weights,
reading no document and drawing no window twice (`dedup`), and reports what it read.

Left out: the same tokens across that cut for SentencePiece models, which begin each piece with a
space (a token in 130,000 characters or so).
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bitnest.calibrate.chat import Conversation, check_template
from bitnest.calibrate.dedup import Document, Documents, draw_windows
from bitnest.calibrate.sources import (
    DataSource,
    check_source,
    load_documents,
    load_texts,
    parse_source,
)
from bitnest.calibrate.windows import PACKINGS, join_documents, pack_documents, split_samples
from bitnest.errors import DataError

__all__ = [
    "CalibrationSet",
    "DataSource",
    "SourceReport",
    "calibration_windows",
    "load_texts",
    "parse_source",
    "token_windows",
]

log = logging.getLogger(__name__)

PIECE = 1 << 17  # characters tokenised at once
_SAFE_CUT = re.compile(r"[^\W\d_] (?=[^\W\d_])")
MAX_TOKENS = 50_000_000  # tokens of one source that are looked at


@dataclass(frozen=True)
class SourceReport:
    """What was read of one source and drawn from it.

    documents: read, with text in them. duplicates: of these, dropped because an earlier one, here
    or in an earlier source, has the same words. conversations: of those left, rendered by the chat
    template. samples, tokens: drawn. available: tokens there are, separators included. windows:
    whole windows there are. replaced: windows drawn and found equal to one before, so that another
    was taken. repeated: such windows that stayed, for lack of others. sha256: of the tokens drawn.
    """

    label: str
    source: str
    documents: int
    duplicates: int
    conversations: int
    samples: int
    tokens: int
    available: int
    windows: int
    replaced: int
    repeated: int
    sha256: str


@dataclass(frozen=True)
class CalibrationSet:
    """What a model is calibrated on.

    tokens: (samples, length) int64. labels: one per sample. counts: samples per label.
    sha256: of the tokens. sources: one per source, in order; several may share a label. packing:
    `join` or `documents`.
    """

    tokens: torch.Tensor
    labels: tuple[str, ...]
    counts: dict[str, int]
    sha256: str
    sources: tuple[SourceReport, ...] = ()
    packing: str = "join"

    def hashes(self) -> list[str]:
        """Of every window's tokens, so that the same window is known again; 16 digits."""
        rows = self.tokens.numpy()
        return [hashlib.sha256(row.tobytes()).hexdigest()[:16] for row in rows]


def token_windows(
    tokenizer: Any,
    texts: Iterable[str],
    *,
    window: int,
    count: int | None,
    selection: str = "spread",
    seed: int = 0,
    where: str = "",
) -> torch.Tensor:
    """Windows of tokens, (count, window) int64; all windows there are if count is None.

    selection: `spread` or `random`, see above. where: the text's name, for messages.

    Raises:
        DataError: the text has too few tokens.
    """
    if selection not in {"spread", "random"}:
        raise ValueError(f"selection '{selection}' is neither 'spread' nor 'random'")
    ids = _tokenise(tokenizer, (Document(text) for text in texts), where)
    tokens = torch.from_numpy(join_documents(ids, tokenizer.eos_token_id)).long()
    available = len(tokens) // window
    _check_enough(available, 1 if count is None else count, window, len(tokens), where)
    if count is None:
        return tokens[: available * window].view(available, window)
    if selection == "spread":
        step = len(tokens) // count  # at least the window
        return torch.stack([tokens[i * step : i * step + window] for i in range(count)])
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(available, generator=generator)[:count].sort().values
    return tokens[: available * window].view(available, window)[chosen]


def _check_enough(
    available: int, wanted: int, window: int, tokens: int, where: str, note: str = ""
) -> None:
    if available < wanted:
        raise DataError(
            f"the text is too short: {wanted} windows of {window} tokens need "
            f"{wanted * window:,} tokens, it has {tokens:,} ({available} windows){note}",
            where=where,
            hint="more text, or fewer or shorter windows",
        )


def _tokenise(
    tokenizer: Any, documents: Iterable[Document], where: str
) -> Iterator[tuple[np.ndarray, bool]]:
    """Token numbers of each document, (n,) int32, and whether it is closed."""
    total = 0
    for text, closed in documents:
        parts: list[np.ndarray] = []
        for piece in _pieces(text):
            ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
            parts.append(np.array(ids, np.int32))
            total += len(ids)
            if total >= MAX_TOKENS:
                log.info("%s: only its first %d tokens are used", where, total)
                yield np.concatenate(parts), closed
                return
        yield np.concatenate(parts) if parts else np.empty(0, np.int32), closed


def _pieces(text: str) -> Iterator[str]:
    """Parts of about PIECE characters, cut where byte-level tokenizers always cut.

    That is before a single space between two letters; only text without any within a piece is cut
    elsewhere. (SentencePiece tokenizers may mark the start of a part and so add one token to it.)
    """
    start = 0
    while len(text) - start > PIECE:
        stop = start + PIECE
        cuts = [m.start() + 1 for m in _SAFE_CUT.finditer(text, max(start, stop - 4096), stop)]
        cut = cuts[-1] if cuts else stop
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]


def calibration_windows(
    tokenizer: Any,
    sources: Sequence[DataSource],
    *,
    samples: int,
    length: int,
    seed: int,
    pack: str = "join",
    load: Callable[[str], Iterable[str | Conversation]] | None = None,
) -> CalibrationSet:
    """Seeded random windows, split over the sources by weight; equal ones share evenly.

    Sources of one label count as one under it. More samples of the same seed are these and others,
    unless sources share windows. pack: `join` or `documents`, see `windows`. load: gives a source's
    documents instead of `load_documents`.

    Raises:
        DataError: a source is missing, unreadable or too short, holds no document of its own, or
            conversations the tokenizer has no template for. What a glance at the sources shows
            is raised before any is read through.
    """
    _check_sizes(length, pack)
    shares = split_samples(samples, [item.weight for item in sources])
    if load is None:
        _check_sources(tokenizer, sources)
    seen: tuple[set[bytes], set[bytes]] = (set(), set())
    parts: list[torch.Tensor] = []
    reports: list[SourceReport] = []
    for i, (item, share) in enumerate(zip(sources, shares, strict=True)):
        rows = (load or load_documents)(item.source)
        tokens, report = _draw(tokenizer, item, rows, share, length, seed + i, pack, seen)
        parts.append(tokens)
        reports.append(report)
    labels = [item.label for item, share in zip(sources, shares, strict=True) for _ in range(share)]
    counts = {label: labels.count(label) for label in dict.fromkeys(labels)}
    joined = torch.cat(parts)
    return CalibrationSet(joined, tuple(labels), counts, _sha256(joined), tuple(reports), pack)


def _draw(
    tokenizer: Any,
    item: DataSource,
    rows: Iterable[str | Conversation],
    share: int,
    length: int,
    seed: int,
    pack: str,
    seen: tuple[set[bytes], set[bytes]],
) -> tuple[torch.Tensor, SourceReport]:
    """`share` windows of one source. seen: hashes of documents and of windows so far."""
    documents = Documents(tokenizer, rows, where=item.source, seen=seen[0])
    ids = _tokenise(tokenizer, documents, item.source)
    if pack == "join":
        joined = join_documents(ids, tokenizer.eos_token_id)
        available = len(joined)
        windows = joined[: available // length * length].reshape(-1, length)
    else:
        windows, available = pack_documents(ids, tokenizer.eos_token_id, length)
    _check_distinct(documents, item.source)
    note = f"; {documents.duplicates} of its {documents.read} documents are copies"
    note = note if documents.duplicates else ""
    _check_enough(len(windows), share, length, available, item.source, note)
    draw = draw_windows(windows, share, seed, seen[1])
    tokens = torch.from_numpy(windows)[draw.positions].long()
    report = SourceReport(
        item.label, item.source, documents.read, documents.duplicates, documents.conversations,
        share, share * length, available, len(windows), draw.replaced, draw.repeated,
        _sha256(tokens),
    )  # fmt: skip
    return tokens, report


def _check_sizes(length: int, pack: str) -> None:
    if length < 1:
        raise DataError(f"windows of {length} tokens", hint="--length 2 or more")
    if pack not in PACKINGS:
        raise DataError(f"unknown packing '{pack}'", hint="one of: " + ", ".join(PACKINGS))


def _check_sources(tokenizer: Any, sources: Sequence[DataSource]) -> None:
    for item in sources:
        first = check_source(item.source)
        if first is not None and not isinstance(first, str):
            check_template(tokenizer, item.source)


def _check_distinct(documents: Documents, where: str) -> None:
    if not documents.read:
        raise DataError("the text is empty", where=where, hint="name a source with text in it")
    if documents.read == documents.duplicates:
        raise DataError(
            f"every document ({documents.read}) is a copy of one in an earlier source",
            where=where,
            hint="leave this source out",
        )


def _sha256(tokens: torch.Tensor) -> str:
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
