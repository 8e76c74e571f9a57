"""Tables: words to the left, numbers to the right in equal-width figures, sorted in the browser.

A column knows how to write its value. The value itself goes into `data-v`, by which the page's
script sorts; without the script the table is complete, in the order it was given.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bitnest.html.scales import MISSING, finite
from bitnest.html.svg import Markup, join, tag

SENTENCE, NAME = 20, 32  # characters from which words may stand in lines, without a space too


@dataclass(frozen=True)
class Column:
    """A heading, how its values are written (None: as words), and whether a bar underlies them."""

    name: str
    text: Callable[[Any], str] | None = None
    bar: bool = False
    help: str | None = None


def table(
    columns: Sequence[Column],
    rows: Sequence[Sequence[Any]],
    *,
    total: int | None = None,
    noun: str = "rows",
    limit: int = 100,
) -> Markup:
    """Rows of raw values under their columns; above `limit` the first ones and a line about it.

    total: how many there are when the caller holds only some of them.
    """
    shown = rows[:limit]
    peaks = [
        max((abs(r[i]) for r in shown if finite(r[i])), default=0.0) if c.bar else 0.0
        for i, c in enumerate(columns)
    ]
    head = tag("thead", tag("tr", join(_heading(c) for c in columns)))
    body = tag("tbody", join(
        tag("tr", join(_cell(c, v, p) for c, v, p in zip(columns, row, peaks, strict=True)))
        for row in shown
    ))  # fmt: skip
    whole = tag("div", tag("table", head, body), class_="scroll", tabindex=0)
    count = max(len(rows), total or 0)
    if count <= len(shown):
        return whole
    return join((whole, tag("p", f"The first {len(shown):,} of {count:,} {noun}.", class_="note")))


def _heading(column: Column) -> Markup:
    kind = "number" if column.text else None
    return tag("th", column.name, class_=kind, scope="col", title=column.help)


def _cell(column: Column, value: Any, peak: float) -> Markup:
    if column.text is None:
        return _words(MISSING if value is None else value)
    words = column.text(value) if value is not None else MISSING
    style = f"--w:{100 * abs(value) / peak:.1f}%" if peak and finite(value) else None
    return tag(
        "td",
        words,
        class_="number bar-cell" if style else "number",
        style=style,
        data_v=repr(float(value)) if finite(value) else None,
    )


def _words(value: Any) -> Markup:
    """A cell of words; long ones break, names and paths after signs that join their parts."""
    text = str(value)
    if isinstance(value, Markup) or len(text) < (SENTENCE if " " in text else NAME):
        return tag("td", value)
    parts = re.split(r"(?<=[/._:@])", text) if len(text) >= NAME else [text]
    broken = [part for piece in parts for part in (tag("wbr"), piece)]
    return tag("td", *broken[1:], class_="long")
