"""Sections: outlier channels of what sites read, and crest factors against the INT/FP boundary."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bitnest.calibrate.report.common import (
    Analysis,
    by,
    in_blocks,
    mean,
    median,
    missing,
    place,
    place_name,
    some_of,
)
from bitnest.html import (
    Axis,
    Column,
    Heat,
    Markup,
    Rule,
    Section,
    Series,
    chart,
    colour_bar,
    figure,
    grid,
    heat,
    legend,
    note,
    paragraph,
    table,
)
from bitnest.html.charts import FULL, THIRD
from bitnest.html.scales import TIMES, percent, short

STRIPS, STRIP_CELLS = 40, 256
OUTLIERS = 20
ROLES = 8
CLOSE = 1.12  # lines nearer than this factor share one label

Input = Mapping[str, Any]


def inputs_section(analysis: Analysis) -> Section:
    """A strip of channel maxima per input, the largest values by role, a table of outliers."""
    name, title, inputs = "outliers", "Outlier channels", list(analysis["inputs"])
    if not inputs:
        return Section(name, title, (missing("No inputs of sites were collected."),))
    rows = [
        (place(i), i["role"], o["channel"], o["absmax"], o["rms"], o["ratio"], o["rank_share"])
        for i in inputs for o in i["outliers"]
    ]  # fmt: skip
    rows.sort(key=lambda row: -(row[5] or 0))
    columns = [
        Column("layer", place_name), Column("read by"), Column("channel", str),
        Column("largest", short), Column("rms", short), Column("of median", _times, bar=True,
                                     help="the channel's rms over the median channel's"),
        Column("tokens", percent, help="tokens in which it is among the largest 1 % of channels"),
    ]  # fmt: skip
    listing = table(columns, rows, noun="outlier channels", limit=OUTLIERS)
    return Section(name, title, (
        paragraph("Channels that are far larger than the others stretch the scale that a block of "
                  "values shares. They sit in the same channel in every token, which is why "
                  "permuting, scaling or rotating channels helps."),
        _strips(inputs),
        _largest(inputs),
        listing if rows else note("No channel stands out from its input's median."),
    ))  # fmt: skip


def _times(value: float) -> str:
    return f"{short(value)}{TIMES}"


def _peak(entry: Input) -> float:
    """Largest channel maximum over the median one."""
    middle = median(entry["absmax"])
    return max(entry["absmax"], default=0.0) / middle if middle else 0.0


def strip(values: Sequence[float], cells: int = STRIP_CELLS) -> list[float | None]:
    """log10 of channel maxima over their median; neighbours pooled to the largest of them."""
    middle = median(values) or 1.0
    size = math.ceil(len(values) / cells)
    pooled = [max(values[i : i + size]) for i in range(0, len(values), size)]
    return [math.log10(v / middle) if v > 0 else 0.0 for v in pooled]


def _strips(inputs: list[Input]) -> Markup:
    chosen = sorted(range(len(inputs)), key=lambda i: -_peak(inputs[i]))[:STRIPS]
    chosen.sort(key=lambda i: (inputs[i]["layer"], i))
    rows = [strip(inputs[i]["absmax"]) for i in chosen]
    # every row spans the whole width, whatever its number of channels
    longest = max(map(len, rows))
    rows = [[row[j * len(row) // longest] for j in range(longest)] for row in rows]
    peak = max((v for row in rows for v in row if v is not None), default=1.0)
    marks = [math.log10(m) for m in (10, 100, 1000, 3, 30, 300) if math.log10(m) < peak]
    scale = Heat(max(peak, 0.3), power=0.8, text=lambda v: f"{10**v:.3g}{TIMES}", marks=marks)
    names = [f"{place(inputs[i])} · {_clipped(inputs[i]['role'])}" for i in chosen]
    ticks = [percent(j / longest, 0) if (10 * j) % longest < 10 else "" for j in range(longest)]
    drawing = heat(rows, scale, "Largest value of every channel per input", x_name="channel",
                   y_name="", row_names=names, column_names=ticks, width=FULL, tall=14,
                   left=186)  # fmt: skip
    widest = max(len(i["absmax"]) for i in inputs)
    remarks = [some_of(len(chosen), len(inputs), "inputs", ", those with the strongest outliers,")]
    if widest > STRIP_CELLS:
        remarks.append(
            f"A cell is the largest of up to {math.ceil(widest / STRIP_CELLS)} channels."
        )
    return figure(
        "Largest |x| of every channel, per input (layer · read by)",
        colour_bar(scale, "largest value over the input's median channel"), drawing,
        note=" ".join(filter(None, remarks)) or None, pan=True,
    )  # fmt: skip


def _clipped(text: str, most: int = 26) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _largest(inputs: list[Input]) -> Markup:
    """The largest value per layer, a line for each role; share of values over six."""
    roles = by(in_blocks(inputs), lambda i: i["role"])
    shown = sorted(roles, key=lambda r: -max(max(i["absmax"], default=0) for i in roles[r]))[:ROLES]
    lines, shares = [], []
    for n, role in enumerate(shown):
        layers = by(roles[role], lambda i: i["layer"])
        top = [(k, max(max(i["absmax"], default=0) for i in v)) for k, v in layers.items()]
        over = [(k, mean(i["over_six"] for i in v)) for k, v in layers.items()]
        few = len(layers) <= 60
        lines.append(Series(_clipped(role), sorted(top), f"c{n}", dots=few, radius=2.6))
        shares.append(Series(_clipped(role), sorted(over), f"c{n}", dots=few, radius=2.6))
    cut = some_of(len(shown), len(roles), "kinds of input", " (those with the largest values)")
    keys = legend(lines)
    return grid(
        figure("Largest |x| per layer", keys,
               chart(lines, Axis("layer"), Axis("largest |x|", log=True), "Largest |x| per layer"),
               note=cut or None),
        figure("Values of 6 and more (LLM.int8's threshold)", keys,
               chart(shares, Axis("layer"), Axis("share of values", zero=True, percent=True),
                     "Share of values of at least six")),
    )  # fmt: skip


def crest_section(analysis: Analysis) -> Section:
    """Crest factors of weights and inputs per layer, with the boundaries of INT-vs-FP."""
    name, title, crest = "crest", "Crest factors: integer or float", analysis["crest"]
    if not crest or not (crest["weights"] or crest["inputs"]):
        return Section(name, title, (missing("No crest factors were collected."),), "INT or FP")
    figures = []
    for key, what in (("weights", "Weights"), ("inputs", "Inputs")):
        blocks = sorted({int(b) for entry in crest[key] for b in entry["kappa"]})
        figures += [_crest_chart(crest, key, what, block) for block in blocks]
    columns = [
        Column("integer"), Column("float"), Column("block", short), Column("boundary", short),
        Column("median of weights", short), Column("weights below", percent, bar=True),
        Column("median of inputs", short), Column("inputs below", percent, bar=True),
    ]  # fmt: skip
    rows = []
    for limit in crest["limits"]:
        integer, _, floating = limit["pair"].partition("/")
        found = [_below(crest[key], limit) for key in ("weights", "inputs")]
        rows.append((integer, floating, limit["block"], limit["limit"], *found[0], *found[1]))
    return Section(name, title, (
        paragraph("The crest factor of a block is its largest value over its rms. Below a pair's "
                  "boundary the integer format keeps more signal than the float of the same size, "
                  "above it the float does (INT-vs-FP)."),
        grid(*figures, columns=3),
        table(columns, rows, noun="pairs"),
        note("Below: share of (kind, layer) pairs under the boundary, where the integer wins."),
    ), "INT or FP")  # fmt: skip


def _below(entries: Sequence[Input], limit: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Median crest factor, and the share of entries below the limit."""
    values = [e["kappa"].get(str(limit["block"])) for e in entries]
    known = [v for v in values if v is not None]
    return median(known), mean(float(v < limit["limit"]) for v in known)


def boundaries(limits: Sequence[Mapping[str, Any]], block: int) -> list[Rule]:
    """Lines of a block size; lines that nearly touch share the upper one's label."""
    rules: list[Rule] = []
    for limit in sorted(x["limit"] for x in limits if x["block"] == block):
        words = f"{limit}"
        if rules and (rules[-1].y or 0) * CLOSE > limit:
            words = f"{rules[-1].text}, {limit}"
            rules[-1] = Rule("", y=rules[-1].y)
        rules.append(Rule(words, y=limit))
    return rules


def _wins_below(limits: Sequence[Mapping[str, Any]], block: int) -> str:
    """What the lines of a block size say, in words."""
    here = sorted((x for x in limits if x["block"] == block), key=lambda x: x["limit"])
    names = [f"{x['pair'].partition('/')[0].upper()} below {x['limit']}" for x in here]
    return f"Dashed: {', '.join(names)}." if names else "No boundary is known for this block size."


def _crest_chart(crest: Mapping[str, Any], key: str, what: str, block: int) -> Markup:
    kinds = sorted({e["kind"] for part in ("weights", "inputs") for e in in_blocks(crest[part])})
    groups = by(in_blocks(crest[key]), lambda e: e["kind"])
    series = []
    for n, kind in enumerate(kinds[:8]):
        per_layer = by(groups.get(kind, []), lambda e: e["layer"])
        points = [(layer, mean(e["kappa"].get(str(block)) for e in found))
                  for layer, found in sorted(per_layer.items())]  # fmt: skip
        if points:
            series.append(Series(kind, points, f"c{n}", dots=len(points) <= 60, radius=2.4))
    rules = boundaries(crest["limits"], block)
    drawing = chart(series, Axis("layer"), Axis("crest factor", log=True),
                    f"Crest factors of {what.lower()} in blocks of {block}", rules=rules,
                    width=THIRD, height=220)  # fmt: skip
    remark = _wins_below(crest["limits"], block)
    return figure(f"{what}, blocks of {block}", legend(series), drawing, note=remark)
