"""Bars and histograms: amounts by name, and shares per bin."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bitnest.html.charts import HEIGHT, WIDTH, Axis, Point, Series, chart, words_at
from bitnest.html.scales import short
from bitnest.html.svg import Markup, drawing, join, tag


def bars(
    names: Sequence[str],
    values: Sequence[float],
    label: str,
    *,
    colours: Sequence[str] | None = None,
    text: Callable[[float], str] = short,
    room: int | None = None,
    width: float = WIDTH,
) -> Markup:
    """Horizontal bars, one row a name, with the value written at the end of the bar.

    room: letters left for names, so that several of these line up; without it the longest name's.
    """
    longest = max((len(n) for n in names), default=0) if room is None else room
    row, left = 26.0, 12.0 + 6.4 * longest
    most = max((v for v in values), default=0) or 1
    parts = []
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        top, length = i * row + 4, max(value / most * (width - left - 62), 1.0)
        bar = tag("rect", tag("title", f"{name}: {text(value)}"), x=left, y=top, width=length,
                  height=row - 8, rx=2, class_="bar")  # fmt: skip
        parts += [
            words_at(left - 8, top + 13, name, "tick end ink"),
            tag("g", bar, class_=colours[i] if colours else "c0"),
            words_at(left + length + 7, top + 13, text(value), "tick ink"),
        ]
    return drawing(width, max(len(names), 1) * row + 4, label, join(parts))


def histogram(
    edges: Sequence[float],
    counts: Sequence[tuple[str, str, Sequence[float]]],
    x: Axis,
    label: str,
    *,
    width: float = WIDTH,
    height: float = HEIGHT,
) -> Markup:
    """Shares per bin as outlines; `counts` is (name, colour class, counts per bin).

    Each set is divided by its own sum, so that sets of different size can be compared.
    """
    series = []
    for name, colour, values in counts:
        total = sum(values) or 1
        steps: list[Point] = []
        for i, value in enumerate(values):
            steps += [(edges[i], value / total), (edges[i + 1], value / total)]
        series.append(Series(name, steps, colour))
    y = Axis("share of tokens", zero=True, percent=True)
    return chart(series, x, y, label, width=width, height=height)
