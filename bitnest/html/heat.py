"""Heat maps: a colour for every cell of a matrix, and the bar that says what the colours mean.

`Heat` is a colour scale shared by several maps: a level is

    t = ((value - low) / (high - low))^power        sequential; power 1/2 opens up small values
    t = (value / reach + 1) / 2                     diverging, reach on both sides of 0

with 32 and 25 levels. A map whose caller names cells gives each its own path and title; otherwise
the cells of one level are one path, which costs a tenth of the bytes and names only the level's
range.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bitnest.html.charts import WIDTH
from bitnest.html.colour import DIVERGING, SEQUENTIAL, level
from bitnest.html.scales import finite, short
from bitnest.html.svg import Markup, drawing, join, number, tag

Rows = Sequence[Sequence[float | None]]
LEFT, TOP, BOTTOM = 34.0, 4.0, 34.0
TALLEST = 26.0


@dataclass(frozen=True)
class Heat:
    """A colour scale: `low..high` sequential with `power`, or -high..high diverging.

    With `classes` values are indices of these CSS classes, and `text` names them.
    """

    high: float
    low: float = 0.0
    power: float = 0.5
    diverging: bool = False
    text: Callable[[float], str] = short
    classes: Sequence[str] = ()
    marks: Sequence[float] = ()  # values named on the colour bar; chosen when empty

    @property
    def levels(self) -> int:
        """How many colours there are."""
        if self.classes:
            return len(self.classes)
        return DIVERGING if self.diverging else SEQUENTIAL

    def share(self, value: float) -> float:
        """Place of a value on the colour bar, 0..1."""
        if self.diverging:
            return min(1.0, max(0.0, (value / (self.high or 1) + 1) / 2))
        span = (self.high - self.low) or 1.0
        return float(min(1.0, max(0.0, (value - self.low) / span)) ** self.power)

    def value(self, share: float) -> float:
        """The inverse of `share`."""
        if self.diverging:
            return (2 * share - 1) * self.high
        return float(self.low + share ** (1 / self.power) * (self.high - self.low))

    def level(self, value: float) -> int:
        """The colour level of a value."""
        if self.classes:
            return int(value)
        return level(self.share(value), self.levels)

    def name(self, index: int) -> str:
        """CSS class of a level."""
        if self.classes:
            return self.classes[index]
        return f"{'d' if self.diverging else 'q'}{index}"

    def says(self, index: int) -> str:
        """What a level stands for, in words."""
        if self.classes:
            return self.text(index)
        ends = (self.value(index / self.levels), self.value((index + 1) / self.levels))
        return " to ".join(self.text(v) for v in ends)


def colour_bar(scale: Heat, caption: str) -> Markup:
    """A strip of the levels with values at five places, to stand beside the maps."""
    width, left = 240.0, 16.0
    step = width / scale.levels
    cells = join(
        tag("rect", x=left + i * step, y=0, width=step + 0.4, height=10,
            class_=f"cell {scale.name(i)}")
        for i in range(scale.levels)
    )  # fmt: skip
    words = join(
        tag("text", scale.text(scale.value(s)), x=left + s * width, y=24, class_="tick middle")
        for s in _named(scale)
    )
    svg = drawing(width + 2 * left, 28, f"Colour scale: {caption}", cells, words)
    return tag("div", tag("span", caption), svg, class_="colour-bar")


def _named(scale: Heat, apart: float = 0.19) -> list[float]:
    """Places on the colour bar that get a number: both ends, and round values between."""
    if scale.diverging:
        return [0.0, 0.25, 0.5, 0.75, 1.0]
    size = scale.high - scale.low
    tens = 10.0 ** math.floor(math.log10(size)) if size > 0 else 1.0
    round_values = [f * tens / 10**e for e in range(6) for f in (5, 2, 1)]
    values = scale.marks or [v for v in round_values if scale.low < v < scale.high]
    places = [0.0, 1.0]
    for place in map(scale.share, values):
        if all(abs(place - other) >= apart for other in places):
            places.append(place)
    return places


def heat(
    rows: Rows,
    scale: Heat,
    label: str,
    *,
    x_name: str,
    y_name: str,
    row_names: Sequence[str] | None = None,
    column_names: Sequence[str] | None = None,
    title: Callable[[int, int], str] | None = None,
    width: float = WIDTH,
    tall: float | None = None,
    left: float = LEFT,
) -> Markup:
    """A map of `rows` (ragged rows are drawn as far as they go; None is an empty cell).

    With `title`, a function of (row, column), every cell says its own value on hover. Cells are
    square up to a height, flatter where there are many columns; `tall` fixes their height.
    """
    columns = max((len(row) for row in rows), default=0) or 1
    left += 12 if y_name else 0
    cell = (width - left - 4) / columns
    tall = tall or max(2.5, min(TALLEST, cell if cell > 5 else 1.6 * cell))
    height = TOP + tall * len(rows) + BOTTOM
    place = f"translate({number(left)} {number(TOP)}) scale({cell:.4f} {tall:.4f})"
    dense = min(cell, tall) < 5
    kind = "cells dense" if dense else "cells"
    cells = _single(rows, scale, title) if title else _levels(rows, scale, dense)
    names_y = row_names or [str(i) for i in range(len(rows))]
    names_x = column_names or [str(i) for i in range(columns)]
    parts = [
        tag("g", cells, transform=place, class_=kind),
        _side(names_y, tall, left),
        _bottom(names_x, cell, left, TOP + tall * len(rows)),
        tag("text", x_name, class_="name middle", x=left + cell * columns / 2, y=height - 5),
    ]
    if y_name:
        turn = f"translate(10 {number(TOP + tall * len(rows) / 2)}) rotate(-90)"
        parts.append(tag("text", y_name, class_="name middle", transform=turn))
    return drawing(width, height, label, join(parts))


def _single(rows: Rows, scale: Heat, title: Callable[[int, int], str]) -> Markup:
    return Markup("".join(
        f'<path class="{scale.name(scale.level(v))}" d="M{j} {i}h1v1h-1z">'
        f"{tag('title', title(i, j))}</path>"
        for i, row in enumerate(rows) for j, v in enumerate(row)
        if v is not None and finite(v)
    ))  # fmt: skip


def _levels(rows: Rows, scale: Heat, merge: bool) -> Markup:
    """One path per level; with `merge`, runs of one level in a row are one rectangle."""
    paths: dict[int, list[str]] = {}
    for i, row in enumerate(rows):
        found = [scale.level(v) if v is not None and finite(v) else None for v in row]
        j = 0
        while j < len(found):
            end = j + 1
            while merge and end < len(found) and found[end] == found[j]:
                end += 1
            here = found[j]
            if here is not None:
                paths.setdefault(here, []).append(f"M{j} {i}h{end - j}v1h{j - end}z")
            j = end
    return join(
        tag("path", tag("title", scale.says(n)), class_=scale.name(n), d="".join(parts))
        for n, parts in sorted(paths.items())
    )


def _every(size: float, room: float, count: int) -> int:
    """Label each n-th cell so that labels stand `room` apart: 1, 2, 5, 10, 20 ..."""
    for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000):
        if size * step >= room:
            return step
    return max(count, 1)


def _side(names: Sequence[str], tall: float, left: float) -> Markup:
    every = _every(tall, 11, len(names))
    return join(
        tag("text", name, x=left - 5, y=TOP + tall * (i + 0.5) + 3.7, class_="tick end")
        for i, name in enumerate(names)
        if i % every == 0
    )


def _bottom(names: Sequence[str], cell: float, left: float, below: float) -> Markup:
    longest = max((len(n) for n in names), default=1)
    chosen = "" in names  # the caller has said which cells are named
    every = 1 if chosen else _every(cell, 8 + 6.2 * longest, len(names))
    return join(
        tag("text", name, x=left + cell * (i + 0.5), y=below + 13, class_="tick middle")
        for i, name in enumerate(names)
        if name and i % every == 0
    )


def matrix(
    names: Sequence[str], rows: Rows, scale: Heat, label: str, *, width: float = WIDTH
) -> Markup:
    """A small square matrix with its values written in the cells (row and column names alike)."""
    left, n = 20.0 + 6.3 * max((len(name) for name in names), default=0), max(len(names), 1)
    cell = (width - left - 4) / n
    tall = min(cell, 50.0)
    parts = []
    for i, row in enumerate(rows):
        parts.append(_label(left - 8, 24 + tall * (i + 0.5) + 4, names[i], "tick end ink"))
        for j, value in enumerate(row):
            parts.append(_written(value, scale, left + cell * j, 24 + tall * i, cell, tall))
    heads = [
        _label(left + cell * (j + 0.5), 15, name, "tick middle head")
        for j, name in enumerate(names)
    ]
    return drawing(width, 28 + tall * len(names), label, join(heads + parts))


def _label(x: float, y: float, text: str, kind: str) -> Markup:
    return tag("text", text, x=x, y=y, class_=kind)


def _written(
    value: float | None, scale: Heat, x: float, y: float, wide: float, tall: float
) -> Markup:
    known = value is not None and finite(value)
    t = scale.share(value) if value is not None and known else 0.5 if scale.diverging else 0.0
    strong = abs(2 * t - 1) > 0.72 if scale.diverging else t > 0.55
    words = scale.text(value) if value is not None and known else short(None)
    kind = f"cell {scale.name(scale.level(value))}" if value is not None and known else "cell empty"
    return join((
        tag("rect", x=x + 1, y=y + 1, width=wide - 2, height=tall - 2, rx=3, class_=kind),
        _label(x + wide / 2, y + tall / 2 + 4, words, "value middle" + (" on" if strong else "")),
    ))  # fmt: skip
