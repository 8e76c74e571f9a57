"""Sections: whether experts can live off the device, and whether each saw enough data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bitnest.calibrate.report.common import (
    NO_EXPERTS,
    Analysis,
    asked,
    missing,
    plural,
    some_of,
    spread,
    totals,
    unheld,
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
    table,
)
from bitnest.html.charts import FULL
from bitnest.html.colour import ordered
from bitnest.html.scales import TIMES, percent, short, whole

CURVES = 24  # layers
STARVED = 40
BORROWED = "share of the Hessian that is the layer's inputs"
POLICIES = (("belady", "Belady (knows the future)"), ("lfu", "LFU"), ("lru", "LRU"))

Offloading = Mapping[str, Any]


def offloading_section(analysis: Analysis) -> Section:
    """Hit rates over cache sizes with SCH, SCH over rho, SRP over windows."""
    name, title, found = "offloading", "Offloading suitability", analysis["offloading"]
    if not found:
        why = NO_EXPERTS if not analysis["layers"] else "No routing trace was kept in this run."
        return Section(name, title, (missing(why),), "Offloading")
    return Section(name, title, (
        paragraph("How often the expert that a token needs is already in a cache of the layer's "
                  "experts. SRP says how well a window of tokens predicts its experts, SCH what "
                  f"a cache of rho {TIMES} top-k experts reaches that sees the next m tokens (Not "
                  "All Models Suit Expert Offloading)."),
        grid(_hits(found, analysis["layers"]), _sch(found), _srp(found), _each_layer(found)),
        note(f"Measured on a trace of {whole(found['tokens'])} tokens, top-{found['top_k']} of "
             "each layer, batch of one."),
    ), "Offloading")  # fmt: skip


def longest_window(found: Offloading) -> int:
    """Index of the longest look-ahead m of SCH."""
    return max(range(len(found["sch"]["m"])), key=lambda i: found["sch"]["m"][i])


def _hits(found: Offloading, layers: Sequence[Mapping[str, Any]]) -> Markup:
    rates, sch = found["hit_rates"], found["sch"]
    series = [
        Series(words, list(zip(rates["sizes"], rates[key], strict=True)), f"c{n}",
               dots=len(rates["sizes"]) <= 40, radius=2.4)
        for n, (key, words) in enumerate(POLICIES)
    ]  # fmt: skip
    if layers:
        experts = max(layer["experts"] for layer in layers)
        chance = [(s, min(1.0, s / experts)) for s in rates["sizes"]]
        series.append(Series("any experts at random", chance, "faint", dashed=True, thin=True))
    if sch["m"]:
        i = longest_window(found)
        points = [
            (r * found["top_k"], v) for r, v in zip(sch["rho"], sch["values"][i], strict=True)
        ]
        series.append(Series(f"SCH, m = {sch['m'][i]}", points, "c3", line=False, hollow=True,
                             radius=5.0))  # fmt: skip
    drawing = chart(series, Axis("experts cached per layer", zero=True),
                    Axis("hit rate", percent=True, low=0, high=1), "Cache hit rates",
                    rules=[Rule(f"2 {TIMES} top-k", x=2 * found["top_k"])])  # fmt: skip
    return figure("Hit rates over cache size", legend(series), drawing)


def _sch(found: Offloading) -> Markup:
    sch = found["sch"]
    series = [
        Series(f"m = {m}", list(zip(sch["rho"], values, strict=True)), ordered(n, len(sch["m"])),
               dots=True)
        for n, (m, values) in enumerate(zip(sch["m"], sch["values"], strict=True))
    ]  # fmt: skip
    drawing = chart(series, Axis("rho (cache size / top-k)"),
                    Axis("hits", percent=True, zero=True, high=1), "SCH over rho")  # fmt: skip
    return figure(f"SCH: hits of a cache of rho {TIMES} top-k experts", legend(series), drawing)


def _srp(found: Offloading) -> Markup:
    chosen = spread(found["srp"], CURVES)
    lines = [
        Series(f"layer {e['layer']}", list(zip(found["windows"], e["values"], strict=True)),
               ordered(n, len(chosen)), thin=True)
        for n, e in enumerate(chosen)
    ]  # fmt: skip
    average = Series("mean of layers", list(zip(found["windows"], found["srp_mean"], strict=True)),
                     "c1", dots=True, radius=3.6)  # fmt: skip
    ends = [lines[0], lines[-1]] if len(lines) > 1 else lines
    ticks = found["windows"]
    axis = Axis("tokens in the window (m)", log=True, ticks=ticks, names=[str(w) for w in ticks])
    drawing = chart([*lines, average], axis, Axis("SRP", percent=True, zero=True, high=1),
                    "SRP over windows")  # fmt: skip
    cut = some_of(len(chosen), len(found["srp"]), "layers")
    return figure("SRP: how well a window predicts its experts", legend([*ends, average]), drawing,
                  note=cut or None)  # fmt: skip


def _each_layer(found: Offloading) -> Markup:
    """Hit rate of LRU and Belady at 2 x top-k, layer by layer."""
    rates, size = found["hit_rates"], 2 * found["top_k"]
    per_layer = rates.get("layers") or []
    if size not in rates["sizes"] or not per_layer:
        return Markup("")
    at = rates["sizes"].index(size)
    series = [
        Series(words, [(e.get("layer", n), e[key][at]) for n, e in enumerate(per_layer)],
               f"c{c}", dots=len(per_layer) <= 60)
        for c, (key, words) in enumerate(POLICIES)
    ]  # fmt: skip
    drawing = chart(series, Axis("layer"), Axis("hit rate", percent=True, zero=True, high=1),
                    "Hit rates per layer")  # fmt: skip
    return figure(f"Hit rates per layer with {size} experts cached", legend(series), drawing)


def coverage_section(analysis: Analysis) -> Section:
    """Tokens per expert against the stated minimum, and what starved experts fall back to."""
    name, title, found = "coverage", "Coverage", analysis["coverage"]
    if not found:
        why = NO_EXPERTS if not analysis["layers"] else "No minimum of tokens was asked for."
        return Section(name, title, (missing(why),))
    columns = [
        Column("layer", short), Column("expert", short),
        Column("tokens", whole, help="routed to it in all windows"),
        Column("in its Hessian", whole, help="of these, in windows not held out for probes"),
        Column("borrowed, gate and up", percent, bar=True, help=BORROWED),
        Column("borrowed, down", percent, bar=True, help=BORROWED), Column("falls back to"),
    ]  # fmt: skip
    rows = [
        (s["layer"], s["expert"], s["tokens"], s["fitted"], s["lean"]["up"], s["lean"]["down"],
         s["fallback"])
        for s in sorted(found["starved"], key=lambda s: (s["fitted"], s["tokens"]))
    ]  # fmt: skip
    drawn = found["drawn"]
    more = (
        f" {whole(drawn['windows'])} more windows were drawn in {whole(drawn['rounds'])} rounds to "
        "get there." if drawn["windows"] else ""
    )  # fmt: skip
    return Section(name, title, (
        paragraph(f"{whole(found['covered'])} of {whole(found['experts'])} experts saw at least "
                  f"{asked(found)}{unheld(found)}.{more} An expert below that borrows from its "
                  "layer in proportion to what it lacks, each of its inputs by itself."),
        _load(analysis["layers"], found["minimum"]),
        table(columns, rows, noun="starved experts", limit=STARVED) if rows
        else note("No expert is starved."),
    ))  # fmt: skip


def _load(layers: Sequence[Mapping[str, Any]], minimum: int) -> Markup:
    counts = sorted((t for layer in layers for t in totals(layer["tokens"])), reverse=True)
    if not counts:
        return Markup("")
    chosen = spread(list(enumerate(counts)), 600)
    zero = sum(c <= 0 for c in counts)
    series = Series("tokens of the expert at that rank", [(i + 1, c) for i, c in chosen], "c0")
    rules = [Rule(f"minimum {minimum:,}", y=minimum)] if minimum > 0 else []
    drawing = chart([series], Axis("experts, most used first", low=0),
                    Axis("tokens of the data sets", log=True), "Tokens per expert", rules=rules,
                    width=FULL, height=230)  # fmt: skip
    remark = f"{plural(zero, 'expert')} without tokens not on the line." if zero else None
    return figure("Tokens per expert", drawing, note=remark, pan=True)
