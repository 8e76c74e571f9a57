"""Charts with two axes: lines and points.

A chart is a list of `Series` drawn between two `Axis`, with `Rule`s across it. Colours are CSS
classes (`colour`), marks take `currentColor`. Points carry a `<title>`, which browsers show on
hover; a chart with more than `HOVER_POINTS` loose
points draws those of a series as one path, without titles.

Left out: second axes, stacked bars. What a log axis cannot show is not drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bitnest.html.scales import THIN, Scale, extent, power, short, usable
from bitnest.html.svg import Markup, drawing, join, number, path, tag

WIDTH, HEIGHT = 450.0, 280.0  # half the page; THIRD and FULL are its other measures
THIRD, FULL = 300.0, 950.0
LEFT, RIGHT, TOP, BOTTOM = 56.0, 14.0, 12.0, 46.0
HOVER_POINTS = 1500
FEW = 24  # a line through more points than these has smaller dots

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Axis:
    """What one axis says. `low`/`high` fix an end; `zero` makes the axis include 0."""

    label: str
    log: bool = False
    zero: bool = False
    percent: bool = False
    low: float | None = None
    high: float | None = None
    ticks: Sequence[float] | None = None
    names: Sequence[str] | None = None  # words in place of numbers at `ticks`

    def scale(self, values: Sequence[float | None], start: float, stop: float) -> Scale:
        """The scale that shows `values` on `start..stop`."""
        low, high = extent(usable(values, self.log), self.log, self.zero)
        low = low if self.low is None else self.low
        high = high if self.high is None else self.high
        if high <= low:
            high = low * 10 if self.log else low + 1
        return Scale(low, high, start, stop, self.log)

    def text(self, value: float) -> str:
        """A value as the axis writes it."""
        if self.percent:
            return f"{short(100 * value)}{THIN}%"
        decade = self.log and value > 0 and math.isclose(value, 10.0 ** round(math.log10(value)))
        return power(value) if decade and not 0.0009 < value < 1.1e4 else short(value)


@dataclass(frozen=True)
class Series:
    """One line or cloud: points (x, y), y None where the line has a gap; titles one per point."""

    name: str
    points: Sequence[Point]
    colour: str = "c0"
    line: bool = True
    dots: bool = False
    dashed: bool = False
    hollow: bool = False
    thin: bool = False
    titles: Sequence[str] | None = None
    radius: float = 3.0


@dataclass(frozen=True)
class Rule:
    """A straight line across the chart at x or y, with words at its end."""

    text: str
    x: float | None = None
    y: float | None = None


@dataclass(frozen=True)
class _Frame:
    x: Scale
    y: Scale
    width: float
    height: float


def chart(
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    label: str,
    *,
    rules: Sequence[Rule] = (),
    band: Sequence[tuple[float, float, float]] = (),
    width: float = WIDTH,
    height: float = HEIGHT,
) -> Markup:
    """Series between two axes. `band` is a shaded area as (x, lower y, upper y)."""
    xs = [p[0] for s in series for p in s.points] + [r.x for r in rules]
    ys = [p[1] for s in series for p in s.points] + [r.y for r in rules]
    crowd = sum(len(s.points) for s in series if not s.line) > HOVER_POINTS
    frame = _Frame(
        x.scale(xs, LEFT, width - RIGHT), y.scale(ys, height - BOTTOM, TOP), width, height
    )
    return drawing(
        width,
        height,
        label,
        _axes(frame, x, y),
        _band(frame, band),
        join(_rule(frame, r) for r in rules),
        join(_series(frame, s, x, y, crowd) for s in series),
        join(_rule_name(frame, r) for r in rules if r.text),
    )


def _axes(frame: _Frame, x: Axis, y: Axis) -> Markup:
    bottom, right = frame.height - BOTTOM, frame.width - RIGHT
    parts = []
    for value in frame.y.ticks(5) if y.ticks is None else y.ticks:
        place = frame.y(value)
        parts.append(tag("path", class_="guide", d=path([(LEFT, place), (right, place)])))
        parts.append(words_at(LEFT - 7, place + 3.8, y.text(value), "tick end"))
    xticks = frame.x.ticks(6) if x.ticks is None else x.ticks
    for i, value in enumerate(xticks):
        if not frame.x.has(value):
            continue
        place = frame.x(value)
        parts.append(tag("path", class_="nick", d=path([(place, bottom), (place, bottom + 4)])))
        words = x.names[i] if x.names else x.text(value)
        parts.append(words_at(place, bottom + 17, words, "tick middle"))
    parts.append(tag("path", class_="axis", d=path([(LEFT, bottom), (right, bottom)])))
    parts.append(words_at((LEFT + right) / 2, frame.height - 8, x.label, "name middle"))
    turn = f"translate(11 {number((TOP + bottom) / 2)}) rotate(-90)"
    parts.append(tag("text", y.label, class_="name middle", transform=turn))
    return join(parts)


def words_at(x: float, y: float, text: str, kind: str) -> Markup:
    """Text of a drawing; `kind` is its classes."""
    return tag("text", text, x=float(x), y=float(y), class_=kind)


def _clip(scale: Scale, value: float) -> float:
    return min(max(value, scale.low), scale.high)


def _band(frame: _Frame, band: Sequence[tuple[float, float, float]]) -> Markup:
    """The area between two curves, cut off at the frame."""
    if not band:
        return Markup("")
    upper = [(frame.x(x), frame.y(_clip(frame.y, high))) for x, _, high in band]
    lower = [(frame.x(x), frame.y(_clip(frame.y, low))) for x, low, _ in reversed(band)]
    return tag("path", class_="band", d=path(upper + lower) + "Z")


def _rule(frame: _Frame, rule: Rule) -> Markup:
    bottom, right = frame.height - BOTTOM, frame.width - RIGHT
    if rule.y is not None and frame.y.has(rule.y):
        line = [(LEFT, frame.y(rule.y)), (right, frame.y(rule.y))]
    elif rule.x is not None and frame.x.has(rule.x):
        line = [(frame.x(rule.x), TOP), (frame.x(rule.x), bottom)]
    else:
        return Markup("")
    return tag("path", class_="rule", d=path(line))


def _rule_name(frame: _Frame, rule: Rule) -> Markup:
    """The words of a rule, drawn over the series."""
    right = frame.width - RIGHT
    if rule.y is not None and frame.y.has(rule.y):
        return words_at(right, frame.y(rule.y) - 4, rule.text, "rule-name end")
    if rule.x is not None and frame.x.has(rule.x):
        place = frame.x(rule.x)
        if place > (LEFT + right) * 0.6:
            return words_at(place - 5, TOP + 9, rule.text, "rule-name end")
        return words_at(place + 5, TOP + 9, rule.text, "rule-name")
    return Markup("")


def _series(frame: _Frame, series: Series, x: Axis, y: Axis, crowd: bool) -> Markup:
    runs: list[list[tuple[float, float]]] = [[]]
    marks: list[tuple[float, float, str]] = []
    for i, (px, py) in enumerate(series.points):
        if not frame.x.has(px) or py is None or not frame.y.has(py):
            runs.append([])
            continue
        place = (frame.x(px), frame.y(py))
        runs[-1].append(place)
        words = series.titles[i] if series.titles else f"{x.text(px)}: {y.text(py)}"
        marks.append((*place, words))
    if not marks:
        return Markup("")
    cloud = series.dots or not series.line
    return tag(
        "g",
        "" if cloud or not series.name else tag("title", series.name),
        _lines(series, runs) if series.line else "",
        _dots(series, marks, crowd and not series.line) if cloud else "",
        class_=series.colour,
    )


def _lines(series: Series, runs: Sequence[Sequence[tuple[float, float]]]) -> Markup:
    kind = "line" + (" dashed" if series.dashed else "") + (" thin" if series.thin else "")
    return join(tag("path", class_=kind, d=path(run)) for run in runs if len(run) > 1)


def _dots(series: Series, marks: Sequence[tuple[float, float, str]], crowd: bool) -> Markup:
    if crowd:  # a round cap on a path of no length is a dot
        d = "".join(f"M{number(x)} {number(y)}h0" for x, y, _ in marks)
        return tag("path", class_="cloud", d=d)
    radius = min(series.radius, 1.7) if series.line and len(marks) > FEW else series.radius
    name = f"{series.name} · " if series.name else ""
    return join(
        tag(
            "circle",
            tag("title", name + words),
            cx=x,
            cy=y,
            r=radius,
            class_="hollow" if series.hollow else "dot",
        )
        for x, y, words in marks
    )
