"""Sections: how sure the router is, and which experts are chosen together or after one another."""

from __future__ import annotations

from bitnest.calibrate.report.common import (
    NO_EXPERTS,
    Analysis,
    drawn_labels,
    missing,
    some_of,
    spread,
    totals,
)
from bitnest.calibrate.report.use import Layer
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
    histogram,
    legend,
    note,
    paragraph,
    table,
)
from bitnest.html.charts import FULL, THIRD
from bitnest.html.scales import percent, short

HISTOGRAMS = 9  # layers
MAPS = 24  # layers
MAP_EXPERTS = 32
PAIRS = 10


def bin_median(edges: list[float], counts: list[float]) -> float | None:
    """Median of a histogram, linear inside its bin."""
    total, seen = sum(counts), 0.0
    for i, count in enumerate(counts):
        if count and seen + count >= total / 2:
            return edges[i] + (total / 2 - seen) / count * (edges[i + 1] - edges[i])
        seen += count
    return None


def router_section(analysis: Analysis) -> Section:
    """Histograms of the margin between the last chosen and the first refused expert."""
    name, title = "router", "Router margins"
    layers = [layer for layer in analysis["layers"] if layer.get("margin")]
    if not layers:
        why = NO_EXPERTS if not analysis["layers"] else "No router margins were collected."
        return Section(name, title, (missing(why),))
    labels, chosen = drawn_labels(analysis), spread(layers, HISTOGRAMS)
    middles = [
        Series(label, [(layer["layer"], bin_median(layer["margin"]["edges"],
                                                   layer["margin"]["counts"][i]))
                       for layer in layers], f"c{n}", dots=len(layers) <= 60, radius=2.6)
        for n, (i, label) in enumerate(labels)
    ]  # fmt: skip
    figures = [_histogram(layer, labels) for layer in chosen]
    cut = some_of(len(chosen), len(layers), "layers")
    return Section(name, title, (
        paragraph("The k-th router logit less the (k+1)-th. Near zero, a small error in the hidden "
                  "state sends the token to another expert: the mass at the left edge is what "
                  "compression can flip."),
        figure("Median margin per layer", legend(middles),
               chart(middles, Axis("layer"), Axis("logits", zero=True), "Median margin per layer",
                     width=FULL, height=220), pan=True),
        grid(*figures, columns=3),
        note(cut) if cut else "",
    ))  # fmt: skip


def _histogram(layer: Layer, labels: list[tuple[int, str]]) -> Markup:
    margin = layer["margin"]
    sets = [(label, f"c{n}", margin["counts"][i]) for n, (i, label) in enumerate(labels)]
    drawing = histogram(margin["edges"], sets, Axis("margin, logits"),
                        f"Router margins of layer {layer['layer']}", width=THIRD,
                        height=190)  # fmt: skip
    return figure(f"Layer {layer['layer']}", drawing)


def together_section(analysis: Analysis) -> Section:
    """Co-activation inside a layer, transitions to the next one."""
    name, title, layers = "together", "Experts together and in sequence", list(analysis["layers"])
    if not layers:
        return Section(name, title, (missing(NO_EXPERTS),), "Co-activation")
    entropy = [(layer["layer"], layer.get("transition_entropy")) for layer in layers]
    pairs = _pairs(layers)
    columns = [Column("layer", short), Column("experts"), Column("phi", short, bar=True)]
    total = sum(layer["experts"] * (layer["experts"] - 1) // 2 for layer in layers)
    parts = [figure("Strongest pairs", table(columns, pairs[:PAIRS], total=total, noun="pairs"))]
    if any(v is not None for _, v in entropy):
        line = Series("transition entropy", entropy, "c0", dots=len(entropy) <= 60)
        parts.append(figure(
            "How hard the next layer's experts are to guess",
            chart([line], Axis("layer"), Axis("bits", zero=True), "Transition entropy"),
            note="Entropy of the next layer's expert, given this layer's. Low means prefetching "
                 "can guess.",
        ))  # fmt: skip
    return Section(name, title, (
        paragraph("Experts that are chosen for the same token (phi coefficient: 1 always together, "
                  "0 independent, below 0 they avoid each other), and which expert of the next "
                  "layer follows."),
        grid(*parts),
        _maps(layers, "coactivation", "Co-activation maps"),
        _maps(layers, "transitions", "Transition maps"),
    ), "Co-activation")  # fmt: skip


def _pairs(layers: list[Layer]) -> list[tuple[int, str, float]]:
    found = [
        (layer["layer"], f"{a} and {b}", value)
        for layer in layers if layer.get("coactivation")
        for a, row in enumerate(layer["coactivation"]) for b, value in enumerate(row)
        if a < b and value is not None
    ]  # fmt: skip
    return sorted(found, key=lambda item: -item[2])


def _busiest(layer: Layer) -> list[int]:
    """The most used experts of a layer, by number."""
    load = totals(layer["tokens"])
    return sorted(sorted(range(len(load)), key=lambda e: -load[e])[:MAP_EXPERTS])


def _maps(layers: list[Layer], key: str, title: str) -> Markup:
    """Small maps of some layers, folded; busiest experts only where there are many."""
    known = [n for n, layer in enumerate(layers) if layer.get(key)]
    if not known:
        return Markup("")
    chosen, phi = spread(known, MAPS), key == "coactivation"
    cut = [_cut(layers, n, phi) for n in chosen]
    peak = max((abs(v) for _, _, rows in cut for row in rows for v in row if v is not None),
               default=1.0)  # fmt: skip
    scale = Heat(peak or 1.0, diverging=True) if phi else Heat(peak or 1.0, power=0.5, text=percent)
    figures = [
        figure(_pair_name(layers, n, phi),
               heat(rows, scale, f"{title}, layer {layers[n]['layer']}", x_name="expert", y_name="",
                    row_names=list(map(str, across)), column_names=list(map(str, down)),
                    width=THIRD))
        for n, (across, down, rows) in zip(chosen, cut, strict=True)
    ]  # fmt: skip
    remarks = [
        some_of(len(chosen), len(known), "layers"),
        some_of(MAP_EXPERTS, max(layer["experts"] for layer in layers), "experts",
                " of a layer, the busiest,"),
    ]  # fmt: skip
    bar = colour_bar(scale, "phi" if phi else "share of an expert's tokens")
    return details(title, bar, grid(*figures, columns=3), note(" ".join(filter(None, remarks))))


def _pair_name(layers: list[Layer], n: int, phi: bool) -> str:
    here = f"Layer {layers[n]['layer']}"
    if phi:
        return here
    return f"{here} to {layers[n + 1]['layer'] if n + 1 < len(layers) else 'next'}"


def _cut(
    layers: list[Layer], n: int, phi: bool
) -> tuple[list[int], list[int], list[list[float | None]]]:
    """Row experts, column experts, and the values between them (no diagonal for phi)."""
    layer = layers[n]
    across = _busiest(layer)
    if phi:
        rows = layer["coactivation"]
        return across, across, [[None if a == b else rows[a][b] for b in across] for a in across]
    rows = layer["transitions"]
    following = layers[n + 1] if n + 1 < len(layers) else None
    fits = following is not None and following["experts"] == len(rows[0])
    down = (
        _busiest(following) if fits and following else list(range(min(len(rows[0]), MAP_EXPERTS)))
    )
    return across, down, [[rows[a][b] for b in down] for a in across]
