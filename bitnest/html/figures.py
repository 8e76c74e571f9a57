"""What stands between charts: figures with their captions, legends, notes, grids, folded parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bitnest.html.charts import Series
from bitnest.html.svg import Markup, join, tag


def figure(
    title: str, *parts: object, note: object = None, wide: bool = False, pan: bool = False
) -> Markup:
    """A card with a title, its drawing, and a line beneath.

    wide: the whole width of its grid. pan: scrolls sideways on a phone instead of shrinking.
    """
    return tag(
        "figure",
        tag("figcaption", title),
        tag("div", *parts, class_="plot pan" if pan else "plot"),
        tag("p", note, class_="note") if note else "",
        class_="wide" if wide else None,
    )


def grid(*figures: object, columns: int = 2) -> Markup:
    """Figures side by side where there is room for them."""
    return tag("div", *figures, class_=f"grid of{columns}")


def stack(*figures: object) -> Markup:
    """Figures one under another in one place of a grid."""
    return tag("div", *figures, class_="stack")


def legend(series: Iterable[Series]) -> Markup:
    """Swatches with names, drawn as the series are drawn."""
    return tag("div", join(_swatch(s) for s in series), class_="legend")


def _swatch(series: Series) -> Markup:
    kind = "dash" if series.dashed else "stroke"
    if not series.line:
        kind = "ring" if series.hollow else "spot"
    return tag("span", tag("i", class_=f"{kind} {series.colour}"), series.name)


def note(text: object) -> Markup:
    """A small remark."""
    return tag("p", text, class_="note")


def paragraph(*parts: object) -> Markup:
    """A sentence or two of the page's own text."""
    return tag("p", *parts)


def details(summary: str, *parts: object) -> Markup:
    """A part that stays folded until the reader opens it."""
    return tag("details", tag("summary", summary), *parts)


def cards(values: Sequence[tuple[str, str, str]]) -> Markup:
    """Large figures: (figure, what it counts, remark)."""
    return tag("div", join(
        tag("div", tag("b", value), tag("span", name), tag("small", remark), class_="stat")
        for value, name, remark in values
    ), class_="stats")  # fmt: skip
