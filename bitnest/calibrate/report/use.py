"""Sections: how often each expert is chosen on each data set, and which serve one of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bitnest.calibrate.report.common import (
    HOVER_CELLS,
    NO_EXPERTS,
    Analysis,
    drawn_labels,
    mean,
    missing,
    over_labels,
    some_of,
)
from bitnest.html import (
    Axis,
    Column,
    Heat,
    Markup,
    Section,
    Series,
    chart,
    colour_bar,
    details,
    figure,
    grid,
    heat,
    legend,
    note,
    paragraph,
    table,
)
from bitnest.html.charts import FULL, THIRD, WIDTH
from bitnest.html.colour import ordered
from bitnest.html.scales import THIN, percent, short

DOMAINS = 20
Layer = Mapping[str, Any]


def expert_map(
    layers: list[Layer],
    values: list[list[float | None]],
    scale: Heat,
    label: str,
    *,
    hover: bool,
    width: float | None = None,
) -> Markup:
    """A map of layers x experts, as wide as the number of experts asks for."""
    most = max(layer["experts"] for layer in layers)
    names = [str(layer["layer"]) for layer in layers]

    def title(i: int, j: int) -> str:
        value = values[i][j]
        words = short(None) if value is None else scale.text(value)
        return f"layer {names[i]} · expert {j} · {words}"

    return heat(
        values, scale, label, x_name="expert", y_name="layer", row_names=names,
        title=title if hover else None, width=width or map_width(most),
    )  # fmt: skip


def map_width(experts: int) -> float:
    """Width of a map: a third, a half or the whole of the page."""
    return THIRD if experts <= 24 else WIDTH if experts <= 48 else FULL


def map_columns(experts: int) -> int:
    """How many maps stand side by side."""
    return 3 if experts <= 24 else 2 if experts <= 48 else 1


def map_grid(experts: int, figures: list[Markup]) -> Markup:
    """Maps side by side, no more columns than maps."""
    return grid(*figures, columns=min(map_columns(experts), max(len(figures), 1)))


def use_section(analysis: Analysis) -> Section:
    """Heat maps of the routed share, one scale for all data sets; evenness per layer."""
    name, title, layers = "use", "Expert use per data set", list(analysis["layers"])
    if not layers:
        return Section(name, title, (missing(NO_EXPERTS),), "Expert use")
    labels, most = drawn_labels(analysis), max(layer["experts"] for layer in layers)
    peak = max(v for layer in layers for row in layer["share"] for v in row) or 1.0
    scale = Heat(peak, power=_power(layers, peak), text=_share)
    hover = len(labels) * sum(layer["experts"] for layer in layers) <= HOVER_CELLS
    maps = [
        figure(label, expert_map(layers, [layer["share"][i] for layer in layers], scale,
                                 f"share of slots per expert on {label}", hover=hover),
               pan=most > 48)
        for i, label in labels
    ]  # fmt: skip
    first = 3 if most > 48 else len(maps)
    cut = some_of(len(labels), len(analysis["labels"]), "data sets", " (those with most tokens)")
    return Section(name, title, (
        paragraph("How the router spreads a data set's tokens: the share of its routed slots that "
                  "each expert takes. All maps have one colour scale; "
                  f"even use would be {_even(layers)}."),
        colour_bar(scale, "share of the layer's slots"),
        map_grid(most, maps[:first]),
        details(f"{len(maps) - first} more data sets", map_grid(most, maps[first:]))
        if maps[first:] else "",
        note(cut) if cut else "",
        grid(_balance(analysis, layers), _mass(layers)),
        _logits(layers),
    ), "Expert use")  # fmt: skip


def _share(value: float) -> str:
    return f"{short(100 * value)}{THIN}%"


def _power(layers: list[Layer], peak: float) -> float:
    """The exponent that puts even use at two fifths of the colour scale, between 1/4 and 1."""
    even = max(1 / layer["experts"] for layer in layers)
    return min(1.0, max(0.25, math.log(0.4) / math.log(even / peak))) if even < peak else 1.0


def _even(layers: list[Layer]) -> str:
    shares = sorted({1 / layer["experts"] for layer in layers})
    return " or ".join(percent(s, 2 if s < 0.02 else 1) for s in shares)


def _balance(analysis: Analysis, layers: list[Layer]) -> Markup:
    series = [
        Series(label, [(layer["layer"], layer["balance"][i]) for layer in layers], f"c{n}",
               dots=len(layers) <= 60, radius=2.6)
        for n, (i, label) in enumerate(drawn_labels(analysis))
    ]  # fmt: skip
    drawing = chart(series, Axis("layer"), Axis("entropy of use / log experts", high=1.0),
                    "Evenness of expert use per layer")  # fmt: skip
    return figure("Evenness of use (1: all experts alike)", legend(series), drawing)


def _mass(layers: list[Layer]) -> Markup:
    """Cumulative load: how many experts take which share of the tokens, one line a layer."""
    series = []
    for n, layer in enumerate(layers):
        load = sorted(over_labels(layer["share"]), reverse=True)
        points, taken = [(0.0, 0.0)], 0.0
        for i, share in enumerate(load):
            taken += share
            points.append(((i + 1) / len(load), taken))
        series.append(Series(f"layer {layer['layer']}", points, ordered(n, len(layers)), thin=True))
    ends = [series[0], series[-1]] if len(series) > 1 else series
    even = Series("even use", [(0.0, 0.0), (1.0, 1.0)], "faint", dashed=True, thin=True)
    axis = Axis("share of experts, most used first", percent=True, low=0, high=1)
    drawing = chart([even, *series], axis, Axis("share of slots", percent=True, low=0, high=1),
                    "Cumulative share of slots")  # fmt: skip
    return figure("How few experts carry the load", legend([*ends, even]), drawing)


def _logits(layers: list[Layer]) -> Markup:
    """Router logits: mean and spread per expert, data sets averaged."""
    most = max(layer["experts"] for layer in layers)
    parts = []
    for key, title in (("logit_mean", "Mean router logit"), ("logit_std", "Spread of the logit")):
        if any(layer.get(key) is None for layer in layers):
            continue
        values: list[list[float | None]] = [[*over_labels(layer[key])] for layer in layers]
        known = [v for row in values for v in row if v is not None]
        signed = min(known) < 0
        scale = Heat(max(map(abs, known)) or 1.0, power=1.0, diverging=signed)
        parts.append(figure(
            title,
            expert_map(layers, values, scale, title, hover=False,
                       width=FULL if most > 48 else WIDTH),
            colour_bar(scale, "logit" if signed else "standard deviation"), pan=most > 48,
        ))  # fmt: skip
    if not parts:
        return Markup("")
    columns = min(2, map_columns(most))
    return details("Router logits per expert", grid(*parts, columns=columns))


def domains_section(analysis: Analysis) -> Section:
    """Experts whose share differs most between two data sets."""
    name, title, domains = "domains", "Experts of one domain", analysis["domains"]
    if not analysis["layers"]:
        return Section(name, title, (missing(NO_EXPERTS),), "Domain experts")
    if not domains:
        why = "Domain experts need at least two data sets with different use of an expert."
        return Section(name, title, (missing(why),), "Domain experts")
    shown = [label for _, label in drawn_labels(analysis)]
    columns = [
        Column("layer", short), Column("expert", short), Column("serves"), Column("rather than"),
        Column("difference", _points, bar=True, help="share on one less share on the other"),
        *(Column(label, percent) for label in shown),
    ]  # fmt: skip
    rows = [
        (d["layer"], d["expert"], d["label"], d["other"], d["difference"],
         *(d["share"].get(label) for label in shown))
        for d in domains
    ]  # fmt: skip
    average = mean(d["difference"] for d in domains[:DOMAINS])
    return Section(name, title, (
        paragraph("Experts whose share of a data set's slots is furthest above their share of "
                  f"another's; the {min(DOMAINS, len(domains))} strongest differ by "
                  f"{_points(average)} on average. Dropping one should hurt the data set it "
                  "serves more than the one it is set against: bitnest eval --without tells."),
        table(columns, rows, noun="experts", limit=DOMAINS),
    ), "Domain experts")  # fmt: skip


def _points(value: float | None) -> str:
    return short(None) if value is None else f"{100 * value:.1f} points"
