"""Sections: what each kind and layer costs at each width, and whether predictions hold."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from bitnest.calibrate.report.common import (
    Analysis,
    by,
    in_blocks,
    median,
    missing,
    place,
    plural,
    spearman,
    spread,
)
from bitnest.html import (
    Axis,
    Column,
    Markup,
    Rule,
    Section,
    Series,
    chart,
    figure,
    grid,
    legend,
    note,
    paragraph,
    stack,
    table,
)
from bitnest.html.charts import FULL
from bitnest.html.colour import ordered
from bitnest.html.scales import MINUS, percent, short

SITES = 25
TABLE_FORMATS = 3
KINDS = 6
LINES = 24  # layers drawn per kind
LONE_PROBE = "The prediction rests on one probe: nothing says how far it is off."

Sensitivity = Mapping[str, Any]


def reference_format(formats: Sequence[Mapping[str, Any]], bits: float = 4.0) -> int:
    """Index of the format whose width is nearest `bits`."""
    return min(range(len(formats)), key=lambda f: abs(formats[f]["bits"] - bits))


def best_per_width(
    formats: Sequence[Mapping[str, Any]], loss: Sequence[float | None]
) -> list[tuple[float, float | None]]:
    """(bits, least loss of the formats of that width), by width."""
    best: dict[float, float | None] = {}
    for entry, value in zip(formats, loss, strict=True):
        old = best.get(entry["bits"])
        best[entry["bits"]] = value if old is None else old if value is None else min(old, value)
    return sorted(best.items())


def sensitivity_section(analysis: Analysis) -> Section:
    """Lines over bits per kind and layer, cost per parameter, the most sensitive sites."""
    name, title, found = "sensitivity", "Sensitivity", analysis["sensitivity"]
    if not found or not found["formats"]:
        why = "Sensitivity was not measured in this run, so no kind or layer can be ranked by it."
        return Section(name, title, (missing(why),))
    return Section(name, title, (
        paragraph(f"What a site would cost if it alone were compressed: its error after "
                  f"{found['method'].upper()}, weighted by its importance ({found['importance']}), "
                  "as KL divergence in nats per token, before calibration. Each point is the best "
                  "of the formats of that width."),
        grid(*_over_bits(found)),
        _per_layer(found),
        _sites(found),
    ))  # fmt: skip


def _over_bits(found: Sensitivity) -> list[Markup]:
    figures = []
    values = [v for e in found["by_layer"] for v in e["loss"] if v]
    low, high = (min(values) / 1.6, max(values) * 1.6) if values else (None, None)
    for kind, entries in list(by(found["by_layer"], lambda e: e["kind"]).items())[:KINDS]:
        chosen = spread(sorted(entries, key=lambda e: e["layer"]), LINES)
        series = [
            Series(_line_name(e), best_per_width(found["formats"], e["loss"]),
                   ordered(i, len(chosen)), thin=len(chosen) > 8, dots=len(chosen) <= 8, radius=2.4)
            for i, e in enumerate(chosen)
        ]  # fmt: skip
        keys = series if len(series) <= 6 else [series[0], series[len(series) // 2], series[-1]]
        drawing = chart(series, Axis("bits per weight"),
                        Axis("predicted KL, nats/token", log=True, low=low, high=high),
                        f"Sensitivity of {kind} over bits")  # fmt: skip
        cut = len(chosen) < len(entries)
        remark = f"{len(chosen)} of {len(entries)} layers are drawn." if cut else None
        figures.append(figure(f"{kind[:1].upper()}{kind[1:]}", legend(keys), drawing, note=remark))
    return figures


def _line_name(entry: Mapping[str, Any]) -> str:
    where = place(entry)
    return where if isinstance(where, str) else f"layer {where}"


def _per_layer(found: Sensitivity) -> Markup:
    """Cost per million parameters at one width, a line for each kind."""
    f = reference_format(found["formats"])
    groups = list(by(in_blocks(found["by_layer"]), lambda e: e["kind"]).items())[:8]
    series = [
        Series(kind, sorted((e["layer"], _per_million(e, f)) for e in entries), f"c{n}",
               dots=len(entries) <= 60, radius=2.8)
        for n, (kind, entries) in enumerate(groups)
    ]  # fmt: skip
    drawing = chart(series, Axis("layer"), Axis("nats/token per million parameters", log=True),
                    "Sensitivity per parameter by layer and kind", width=FULL,
                    height=260)  # fmt: skip
    return figure(f"Where a bit is worth most: loss per parameter in {found['formats'][f]['name']}",
                  legend(series), drawing, pan=True)  # fmt: skip


def _per_million(entry: Mapping[str, Any], f: int) -> float | None:
    loss = entry["loss"][f]
    return None if loss is None or not entry["parameters"] else 1e6 * loss / entry["parameters"]


def _sites(found: Sensitivity) -> Markup:
    order = sorted(range(len(found["formats"])), key=lambda i: found["formats"][i]["bits"])
    chosen, f = spread(order, TABLE_FORMATS), reference_format(found["formats"])
    chosen = sorted({*chosen, f}, key=order.index)
    prefix = common_prefix([s["name"] for s in in_blocks(found["sites"])])
    columns = [
        Column(f"site ({prefix}…)" if prefix else "site"), Column("kind"),
        Column("parameters", short), Column("Fisher", short),
        Column("H error", lambda v: percent(v, 2), help=f"in {found['formats'][f]['name']}"),
        *(Column(f"KL, {found['formats'][i]['name']}", short, bar=i == f) for i in chosen),
    ]  # fmt: skip
    ranked = sorted(found["sites"], key=lambda s: -(s["loss"][f] or 0))
    rows = [
        (s["name"].removeprefix(prefix), s["kind"], s["parameters"], s["fisher"], s["error"][f],
         *(s["loss"][i] for i in chosen))
        for s in ranked[:SITES]
    ]  # fmt: skip
    listing = table(columns, rows, total=len(ranked), noun="sites", limit=SITES)
    return figure(f"The most sensitive sites, by predicted KL in {found['formats'][f]['name']}",
                  listing)  # fmt: skip


def common_prefix(names: Sequence[str]) -> str:
    """What all names begin with, whole parts only: "model.layers."."""
    first, last = min(names, default=""), max(names, default="")
    parts = zip(first.split(".")[:-1], last.split(".")[:-1], strict=False)
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], parts)
    return "".join(f"{part}." for part, _ in shared) if len(names) > 1 else ""


def prediction_section(analysis: Analysis) -> Section:
    """Predicted against measured KL with the diagonal and one standard deviation around it."""
    name, title, found = "prediction", "Predicted against measured KL", analysis["prediction"]
    if not found or not found["points"]:
        why = "No probes were measured in this run, so predictions have no error bar."
        return Section(name, title, (missing(why),), "Prediction")
    points = found["points"]
    order = {label: i for i, label in enumerate(analysis["labels"])}  # colours as elsewhere
    points = sorted(points, key=lambda p: order.get(p.get("label"), len(order)))
    groups = by(points, lambda p: p.get("label") or "all data")
    series = [
        Series(label, [(p["predicted"], p["measured"]) for p in ps], f"c{n % 8}", line=False,
               titles=[_point(p) for p in ps], radius=3.8)
        for n, (label, ps) in enumerate(groups.items())
    ]  # fmt: skip
    known = [p for p in points if (p["predicted"] or 0) > 0 and (p["measured"] or 0) > 0]
    ends = [p[k] for p in known for k in ("predicted", "measured")] or [0.1, 1.0]
    low, high = min(ends) / 1.3, max(ends) * 1.3
    factor = None if found["error"] is None else math.exp(found["error"])
    if high > 1e6 * low:  # a probe without any loss would flatten all the others
        low = high / 1e6
    band = [(v, v / factor, v * factor) for v in (low, high)] if factor else []
    diagonal = Series("equal", [(low, low), (high, high)], "faint", dashed=True, thin=True)
    axes = [
        Axis(f"{k} KL, nats/token", log=True, low=low, high=high) for k in ("predicted", "measured")
    ]
    drawing = chart([diagonal, *series], axes[0], axes[1], "Predicted against measured KL",
                    band=band, height=440)  # fmt: skip
    return Section(name, title, (
        paragraph(_lead(points, factor)),
        grid(figure("Probes", legend([*series, diagonal]), drawing),
             stack(figure("How good the prediction is", _quality(known, groups)),
                   figure("Residual over width", _residuals(known, groups, factor)))),
        note("Sums of second-order losses, scaled by "
             + ", ".join(f"{kind} {short(v)}" for kind, v in found["scales"].items())
             + f", and {short(found['flips'])} times their square root for changed experts: fitted "
             f"to {plural(found['probes'], 'probe')}. "
             + ("Each point is predicted by a fit to the other probes." if factor
                else "Points are predicted without it.")),
    ), "Prediction")  # fmt: skip


def _lead(points: Sequence[Mapping[str, Any]], factor: float | None) -> str:
    if factor is None:
        return LONE_PROBE
    return (
        f"KL of mixed plans, predicted, then measured: {plural(len(points), 'point')}. The shaded "
        f"band is one standard error, a factor of {factor:.2f}."
    )


def _point(point: Mapping[str, Any]) -> str:
    return (f"{short(point.get('bits'))} bits: predicted {short(point['predicted'])}, "
            f"measured {short(point['measured'])}")  # fmt: skip


def prediction_quality(points: Sequence[Mapping[str, Any]]) -> tuple[float | None, float | None]:
    """Rank correlation of predicted and measured, and the median of predicted / measured."""
    pairs = [(p["predicted"], p["measured"]) for p in points]
    agreement = spearman([a for a, _ in pairs], [b for _, b in pairs])
    return agreement, median(a / b for a, b in pairs)


def _residuals(
    known: Sequence[Mapping[str, Any]],
    groups: Mapping[str, Sequence[Mapping[str, Any]]],
    factor: float | None,
) -> Markup:
    """Measured over predicted against the plan's width."""
    series = [
        Series(label, [(p["bits"], p["measured"] / p["predicted"]) for p in ps
                       if p in known and p.get("bits") is not None],
               f"c{n % 8}", line=False, radius=3.2)
        for n, (label, ps) in enumerate(groups.items())
    ]  # fmt: skip
    widths = [x for s in series for x, _ in s.points] or [0.0]
    band = [(w, 1 / factor, factor) for w in (min(widths), max(widths))] if factor else []
    return chart(series, Axis("bits per weight"), Axis("measured / predicted", log=True),
                 "Residual over width", rules=[Rule("", y=1.0)], band=band, height=240)  # fmt: skip


def _quality(
    known: Sequence[Mapping[str, Any]],
    groups: Mapping[str, Sequence[Mapping[str, Any]]],
) -> Markup:
    columns = [Column("data set"), Column("probes", short), Column("rank correlation", _three),
               Column("median ratio", _three, help="predicted / measured")]  # fmt: skip
    rows = []
    for label, ps in groups.items():
        kept = [p for p in ps if p in known]
        rows.append((label, len(ps), *prediction_quality(kept)))
    if len(groups) > 1:
        rows.append(("all", len(known), *prediction_quality(known)))
    return table(columns, rows, noun="data sets")


def _three(value: float) -> str:
    return f"{value:.3f}".replace("-", MINUS)
