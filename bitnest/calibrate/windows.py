"""Tokenised documents laid into windows, and how many windows each source gives.

join        all documents in a row, the end-of-sequence token between them, cut every n tokens
documents   every window begins where a document does, or goes on in one longer than a window

With `documents`, in their order: a document of n tokens or more is cut into windows of its own from
its first token on; shorter ones are put behind one another until n tokens are full, then the next
document begins the next window. What a cut leaves over is dropped, at most one document's rest per
window, and so is a last window that is not full: samples have one length and no padding, which
would be routed to experts like text.

A document that ends with the end-of-sequence token itself (a rendered conversation) gets none after
it.

Left out: block-diagonal attention between the documents of a window.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from bitnest.errors import DataError

__all__ = ["PACKINGS", "join_documents", "pack_documents", "split_samples"]

PACKINGS = ("join", "documents")

Tokens = tuple[np.ndarray, bool]
"""Token numbers of a document, (n,) int32, and whether it ends with the end-of-sequence token."""


def join_documents(documents: Iterable[Tokens], separator: int | None) -> np.ndarray:
    """All documents in a row, `separator` between them; (n,) int32. None: nothing between them."""
    parts: list[np.ndarray] = []
    closed = True
    for ids, ends in documents:
        if parts and not closed:
            parts.append(_end(separator))
        if len(ids):
            parts.append(ids)
        closed = ends
    return np.concatenate(parts) if parts else np.empty(0, np.int32)


def pack_documents(
    documents: Iterable[Tokens], separator: int | None, length: int
) -> tuple[np.ndarray, int]:
    """Windows that begin with a document, (windows, length) int32, and how many tokens there were.

    The tokens include separators and what was dropped.
    """
    filled: list[np.ndarray] = []
    row: list[np.ndarray] = []
    size = total = 0
    closed = True
    for ids, ends in documents:
        if len(ids) >= length:
            filled.append(ids[: len(ids) // length * length].reshape(-1, length))
            total += len(ids)
            continue
        added = [ids] if closed or not row else [_end(separator), ids]
        row += added
        size += sum(map(len, added))
        closed = ends
        if size >= length:
            filled.append(np.concatenate(row)[None, :length])
            total += size
            row, size = [], 0
    windows = np.concatenate(filled) if filled else np.empty((0, length), np.int32)
    return windows, total + size


def _end(separator: int | None) -> np.ndarray:
    return np.array([] if separator is None else [separator], np.int32)


def split_samples(samples: int, weights: Sequence[int]) -> list[int]:
    """`samples` split by weight: whole parts first, then one more by the largest remainder.

    Of equal remainders the first ones get it.

    Raises:
        DataError: no sources, or one that would get none.
    """
    if not weights:
        raise DataError("no calibration text", hint="--data path/to/file")
    whole = sum(weights)
    shares = [samples * weight // whole for weight in weights]
    order = sorted(range(len(weights)), key=lambda i: -(samples * weights[i] % whole))
    for i in order[: samples - sum(shares)]:
        shares[i] += 1
    if min(shares) < 1:
        raise DataError(
            f"{samples} samples cannot be split over {len(weights)} sources",
            hint=f"--samples {-(-whole // min(weights))} or more",
        )
    return shares
