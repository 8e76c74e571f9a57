"""Text cut into windows of tokens, for calibration and evaluation.

Documents are joined by the tokenizer's end-of-sequence token and cut into windows that do not
overlap. `spread` takes N windows of n tokens at 0, s, 2s, ... with s = floor(n / N), one at the
start of each Nth of the text; `random` draws whole windows by seed and keeps text order. Text is
tokenised in pieces cut before a single space between letters, where tokenizers split anyway; tokens
are kept as int32. Of very large sources the first `MAX_TOKENS` tokens are used, and that is
logged.

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

from bitnest.calibrate.sources import DataSource, load_texts, parse_source
from bitnest.errors import DataError

__all__ = [
    "CalibrationSet",
    "DataSource",
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
class CalibrationSet:
    """What a model is calibrated on.

    tokens: (samples, length) int64. labels: one per sample. counts: samples per label.
    sha256: of the tokens.
    """

    tokens: torch.Tensor
    labels: tuple[str, ...]
    counts: dict[str, int]
    sha256: str


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
    tokens = torch.from_numpy(_tokenise(tokenizer, texts, where)).long()
    available = len(tokens) // window
    wanted = 1 if count is None else count
    if available < wanted:
        raise DataError(
            f"the text is too short: {wanted} windows of {window} tokens need "
            f"{wanted * window:,} tokens, it has {len(tokens):,}",
            where=where,
            hint="more text, or fewer or shorter windows",
        )
    if count is None:
        return tokens[: available * window].view(available, window)
    if selection == "spread":
        step = len(tokens) // count  # at least the window
        return torch.stack([tokens[i * step : i * step + window] for i in range(count)])
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(available, generator=generator)[:count].sort().values
    return tokens[: available * window].view(available, window)[chosen]


def _tokenise(tokenizer: Any, texts: Iterable[str], where: str) -> np.ndarray:
    """Token numbers of the documents, joined by the end-of-sequence token; (n,) int32."""
    separator = tokenizer.eos_token_id
    parts: list[np.ndarray] = []
    total = 0
    for text in texts:
        if parts and separator is not None:
            parts.append(np.array([separator], np.int32))
        for piece in _pieces(text):
            ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
            parts.append(np.array(ids, np.int32))
            total += len(ids)
            if total >= MAX_TOKENS:
                log.info("%s: only its first %d tokens are used", where, total)
                return np.concatenate(parts)
    return np.concatenate(parts) if parts else np.empty(0, np.int32)


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
    load: Callable[[str], Iterable[str]] = load_texts,
) -> CalibrationSet:
    """Seeded random windows, split evenly over the sources (the first ones get the remainder).

    Raises:
        DataError: a source is missing, unreadable or too short.
    """
    parts: list[torch.Tensor] = []
    labels: list[str] = []
    for i, item in enumerate(sources):
        share = samples // len(sources) + (i < samples % len(sources))
        if share == 0:
            raise DataError(
                f"{samples} samples cannot be split over {len(sources)} sources",
                hint=f"--samples {len(sources)} or more",
            )
        parts.append(
            token_windows(
                tokenizer,
                load(item.source),
                window=length,
                count=share,
                selection="random",
                seed=seed + i,
                where=item.source,
            )
        )
        labels.extend([item.label] * share)
    tokens = torch.cat(parts)
    counts = {label: labels.count(label) for label in dict.fromkeys(labels)}
    digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    return CalibrationSet(tokens, tuple(labels), counts, digest)
