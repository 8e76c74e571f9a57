"""Sections: what experts weigh and which tier they fall into, five rankings, changing channels."""

from __future__ import annotations

from bitnest.calibrate.report.common import (
    HOVER_CELLS,
    NO_EXPERTS,
    Analysis,
    by,
    missing,
    over_labels,
    plural,
    spread,
)
from bitnest.calibrate.report.use import Layer, expert_map
from bitnest.html import (
    Axis,
    Column,
    Heat,
    Markup,
    Section,
    Series,
    bars,
    chart,
    details,
    figure,
    grid,
    legend,
    matrix,
    note,
    paragraph,
    stack,
    table,
)
from bitnest.html.charts import FULL, WIDTH
from bitnest.html.scales import MINUS, percent, short, whole

TIER_CLASSES = ("t0", "t1", "t2", "t3")
CHANNELS, LAYERS = 12, 10
ORDER_LAYERS, ORDER_EXPERTS = 16, 8


def significance_section(analysis: Analysis) -> Section:
    """Significance against frequency, coloured by tier; the tiers by count and by place."""
    name, title, layers = "significance", "Significance and tiers", list(analysis["layers"])
    if not layers:
        return Section(name, title, (missing(NO_EXPERTS),))
    tiers = analysis["tiers"]
    most = max(layer["experts"] for layer in layers)
    wide = most > 48
    scatter, counts, places = _scatter(layers), _tier_bars(tiers), _tier_map(layers, tiers, wide)
    parts = (scatter, counts, places) if wide else (scatter, stack(counts, places))
    return Section(name, title, (
        paragraph("Significance is an expert's share of its layer's channel significance "
                  "(mean |x| times the norm of the weight's column, times routing share). Fuzzy "
                  "c-means sorts experts into four tiers; the widths in bits are the tiers' own, a "
                  "baseline without a byte budget."),
        grid(*parts),
    ))  # fmt: skip


def _scatter(layers: list[Layer]) -> Markup:
    groups: dict[int, list[tuple[float, float, str]]] = {}
    silent = 0
    for layer in layers:
        shares, weights = over_labels(layer["share"]), over_labels(layer["significance"])
        for e, (x, y) in enumerate(zip(shares, weights, strict=True)):
            silent += x <= 0 or y <= 0
            words = f"layer {layer['layer']} · expert {e}: {percent(x, 2)} of slots, {percent(y, 2)} of significance"  # noqa: E501
            groups.setdefault(layer["tier"][e], []).append((x, y, words))
    series = [
        Series(f"tier {tier}", [(x, y) for x, y, _ in found], TIER_CLASSES[min(tier, 3)],
               line=False, titles=[w for *_, w in found])
        for tier, found in sorted(groups.items())
    ]  # fmt: skip
    ends = [v for found in groups.values() for x, y, _ in found for v in (x, y) if v > 0]
    diagonal = Series("as frequent as significant", [(v, v) for v in (min(ends), max(ends))]
                      if ends else [], "faint", dashed=True, thin=True)  # fmt: skip
    axes = (Axis("share of slots", log=True, percent=True),
            Axis("share of significance", log=True, percent=True))  # fmt: skip
    remark = f"{plural(silent, 'expert')} without tokens not drawn." if silent else None
    drawing = chart([diagonal, *series], *axes, "Significance against frequency", height=360)
    return figure("Significance against frequency", legend([*series, diagonal]), drawing,
                  note=remark)  # fmt: skip


def _tier_bars(tiers: Analysis) -> Markup:
    names = [f"tier {i} · {bits} bit" for i, bits in enumerate(tiers["bits"])]
    total = sum(tiers["counts"]) or 1
    bits = sum(b * c for b, c in zip(tiers["bits"], tiers["counts"], strict=True)) / total
    centres = ", ".join(short(c) for c in tiers["centres"])
    return figure(
        "Experts per tier",
        bars(names, tiers["counts"], "Experts per tier", colours=TIER_CLASSES, text=whole),
        note=f"Mean width {short(bits)} bits per expert. Centres, in even shares: {centres}.",
    )


def _tier_map(layers: list[Layer], tiers: Analysis, wide: bool) -> Markup:
    bits = tiers["bits"]
    scale = Heat(3, text=lambda v: f"tier {int(v)}, {bits[int(v)]} bit", classes=TIER_CLASSES)
    values: list[list[float | None]] = [[*map(float, layer["tier"])] for layer in layers]
    hover = sum(map(len, values)) <= HOVER_CELLS
    drawing = expert_map(layers, values, scale, "Tier of every expert", hover=hover,
                         width=FULL if wide else WIDTH)  # fmt: skip
    keys = [Series(scale.text(i), [], c, line=False) for i, c in enumerate(TIER_CLASSES)]
    return figure("Tier of every expert", legend(keys), drawing, wide=wide, pan=wide)


def rankings_section(analysis: Analysis) -> Section:
    """How far five rankings of experts agree."""
    name, title, rankings = "rankings", "Five rankings of experts", analysis["rankings"]
    if not analysis["layers"] or not rankings or not rankings.get("names"):
        return Section(name, title, (missing(NO_EXPERTS),), "Rankings")
    names = rankings["names"]
    agreement = figure(
        "Spearman rank correlation, mean over layers",
        matrix(names, rankings["mean"], Heat(1.0, diverging=True, text=_fixed), "Correlations"),
    )  # fmt: skip
    series = [
        Series(f"{names[0]} and {other}", [
            (entry["layer"], entry["correlation"][0][j]) for entry in rankings["layers"]
        ], f"c{j - 1}", dots=len(rankings["layers"]) <= 60, radius=2.6)
        for j, other in enumerate(names) if j
        and any(e["correlation"][0][j] is not None for e in rankings["layers"])
    ]  # fmt: skip
    lines = figure(f"Agreement with {names[0]}, per layer", legend(series),
                   chart(series, Axis("layer"), Axis("rank correlation", high=1.0),
                         "Agreement per layer"))  # fmt: skip
    return Section(name, title, (
        paragraph("The literature disagrees on which measure says what an expert is worth. Where "
                  "two rankings agree (1), the choice does not matter on this model; where they do "
                  "not, it does."),
        grid(agreement, lines),
        _orders(rankings),
    ), "Rankings")  # fmt: skip


def _fixed(value: float) -> str:
    return f"{value:.2f}".replace("-", MINUS)


def _orders(rankings: Analysis) -> Markup:
    """The best experts of some layers by each ranking."""
    names = rankings["names"]
    chosen = spread(rankings["top"], ORDER_LAYERS)
    rows = [
        (entry["layer"], *(
            ", ".join(map(str, (entry["order"].get(n) or [])[:ORDER_EXPERTS])) or None
            for n in names))
        for entry in chosen
    ]  # fmt: skip
    if not rows:
        return Markup("")
    columns = [Column("layer", short), *(Column(n) for n in names)]
    cut = (
        f"{len(chosen)} of {len(rankings['top'])} layers; "
        if len(chosen) < len(rankings["top"])
        else ""
    )
    return details("The first experts by each ranking", table(columns, rows, noun="layers"),
                   note(f"{cut}the first {ORDER_EXPERTS} experts, best first."))  # fmt: skip


def channels_section(analysis: Analysis) -> Section:
    """The channels whose significance changes most from data set to data set."""
    name, title, found = "channels", "Dynamic channels", analysis["dynamic_channels"]
    if not found or not found["list"]:
        why = (NO_EXPERTS if not analysis["layers"] else
               "Channels that change between data sets need at least two data sets.")  # fmt: skip
        return Section(name, title, (missing(why),))
    rows = [
        (c["layer"], c["expert"], c["projection"], c["channel"], c["change"]) for c in found["list"]
    ]
    columns = [
        Column("layer", short), Column("expert", short), Column("projection"),
        Column("channel", str), Column("change", short, bar=True),
    ]  # fmt: skip
    per_layer = by(found["list"], lambda c: c["layer"])
    busiest = sorted(per_layer, key=lambda n: -len(per_layer[n]))[:LAYERS]
    places = bars([f"layer {n}" for n in sorted(busiest)],
                  [len(per_layer[n]) for n in sorted(busiest)],
                  "Listed channels per layer", text=whole, room=10)  # fmt: skip
    cut = len(per_layer) > LAYERS
    left_out = f" ({LAYERS} of {len(per_layer)} layers: those with most)" if cut else ""
    parts = by(found["list"], lambda c: c["projection"])
    kinds = bars(list(parts), [len(p) for p in parts.values()], "Listed channels per projection",
                 colours=["c2"] * len(parts), text=whole, room=10)  # fmt: skip
    return Section(name, title, (
        paragraph(f"The {percent(found['share'])} of channels whose significance changes most "
                  f"between data sets: {whole(found['count'])} channels, kept in 16 bit as records "
                  "when a model is to serve several domains."),
        grid(
            figure("The strongest", table(columns, rows, total=found["count"], noun="channels",
                                          limit=CHANNELS)),
            figure(f"Where the {len(rows):,} strongest lie{left_out}", places, kinds),
        ),
    ))  # fmt: skip
