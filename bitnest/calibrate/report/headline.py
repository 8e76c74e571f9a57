"""Section: what matters, in sentences made from the figures.

The rules behind the words are ours: an expert serves one domain when four fifths of its use, data
sets weighted alike, is one data set's and it takes at least an even share there; offloading suits a
model whose cache of 2 x top-k experts would be hit at least 80 % of the time with foresight (SCH),
suits it partly from 60 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bitnest.calibrate.report.common import (
    Analysis,
    asked,
    by,
    in_blocks,
    listed,
    mean,
    over_labels,
    span,
    unheld,
)
from bitnest.calibrate.report.inputs import _below
from bitnest.calibrate.report.offloading import longest_window
from bitnest.calibrate.report.sensitivity import (
    LONE_PROBE,
    prediction_quality,
    reference_format,
)
from bitnest.html import Section, tag
from bitnest.html.figures import cards
from bitnest.html.scales import MINUS, TIMES, percent, short, whole

ONE_DOMAIN = 0.8
SUITS, SUITS_PARTLY = 0.8, 0.6

Card = tuple[str, str, str]


def half_load(layer: Mapping[str, Any]) -> int:
    """How many experts, most used first, take half of a layer's slots (data sets alike)."""
    load = sorted(over_labels(layer["share"]), reverse=True)
    total, taken = sum(load), 0.0
    for i, share in enumerate(load):
        taken += share
        if taken >= total / 2 - 1e-12:
            return i + 1
    return len(load)


def specialists(analysis: Analysis) -> list[tuple[int, int, str, float]]:
    """(layer, expert, label, its part of the expert's use) of the experts that serve one domain."""
    found = []
    for layer in analysis["layers"]:
        for e, column in enumerate(zip(*layer["share"], strict=True)):
            total, best = sum(column), max(range(len(column)), key=column.__getitem__)
            enough = column[best] >= 1 / layer["experts"]
            if len(column) > 1 and total and enough and column[best] / total >= ONE_DOMAIN:
                found.append((layer["layer"], e, analysis["labels"][best], column[best] / total))
    return sorted(found, key=lambda item: -item[3])


def overview_section(analysis: Analysis) -> Section:
    """Cards with the main figures, then findings."""
    stats: list[Card] = []
    pairs: list[tuple[str, str]] = []
    for topic, saying in SAYINGS:
        card, sentence = saying(analysis)
        stats += [card] if card else []
        pairs += [("dt", topic), ("dd", sentence)] if sentence else []
    return Section("overview", "What matters", (
        cards(stats) if stats else "",
        tag("dl", *(tag(*pair) for pair in pairs), class_="findings") if pairs else "",
    ), "Overview")  # fmt: skip


Said = tuple[Card | None, str]


def _use(analysis: Analysis) -> Said:
    layers = analysis["layers"]
    if not layers:
        return (
            None,
            "The model is dense: it has no routed experts, and the sections on them stay empty.",
        )
    halves = [half_load(layer) for layer in layers]
    average, experts = mean(halves) or 0.0, mean(layer["experts"] for layer in layers) or 0.0
    low, high = min(halves), max(halves)
    span = f"{low} to {high}, layer by layer" if low != high else "in every layer"
    card = (f"{short(average)} of {short(experts)}", "experts take half of the tokens", span)
    return card, (
        f"Use is uneven: {short(average)} of {short(experts)} experts take half of a layer's slots "
        f"on average (even use would need {short(experts / 2)}); {_concentrated(layers)}."
    ) if average < 0.42 * experts else (
        f"Use is close to even: {short(average)} of {short(experts)} experts take half of a "
        f"layer's slots (even use would need {short(experts / 2)})."
    )


def _concentrated(layers: Sequence[Mapping[str, Any]]) -> str:
    """The layers of least entropy; many may need as few experts for half."""
    even = [mean(layer["balance"]) or 0.0 for layer in layers]
    names = [str(layer["layer"]) for layer, e in zip(layers, even, strict=True) if e == min(even)]
    verb = "layer {} is" if len(names) == 1 else "layers {} are"
    return (
        f"{verb.format(listed(names))} the most concentrated, with an evenness of {min(even):.2f}"
    )


def _domains(analysis: Analysis) -> Said:
    if not analysis["layers"] or len(analysis["labels"]) < 2:
        return None, ""
    found = specialists(analysis)
    counts = {label: len(items) for label, items in by(found, lambda i: i[2]).items()}
    per = (
        listed([f"{n:,} {label}" for label, n in sorted(counts.items(), key=lambda p: -p[1])], 8)
        if found
        else "none"
    )
    serve, whose = ("expert serves", "its") if len(found) == 1 else ("experts serve", "their")
    card = (whole(len(found)), f"{serve} one domain", per)
    sentence = "No expert serves one domain alone."
    if found:
        layer, expert, label, part = found[0]
        sentence = (
            f"{whole(len(found))} {serve} one domain (at least {percent(ONE_DOMAIN, 0)} of "
            f"{whose} use): {per}. The clearest is expert {expert} of layer {layer}, with "
            f"{percent(part)} of its use on {label}."
        )
    if analysis["domains"]:
        d = analysis["domains"][0]
        sentence += (
            f" Use differs most for expert {d['expert']} of layer {d['layer']}: it takes "
            f"{percent(d['share'].get(d['label']))} of the slots on {d['label']}, "
            f"{percent(d['share'].get(d['other']))} on {d['other']}."
        )
    return card, sentence


def _starved(analysis: Analysis) -> Said:
    found = analysis["coverage"]
    if not found:
        return None, ""
    starved = found["experts"] - found["covered"]
    card = (
        whole(starved),
        "expert is starved" if starved == 1 else "experts are starved",
        f"under {span(found['minima'])} tokens",
    )
    if not starved:
        return card, f"Every expert saw at least {asked(found)}{unheld(found)}."
    least = min(found["starved"], key=lambda s: s["fitted"]) if found["starved"] else None
    tail = (f"; the least, expert {least['expert']} of layer {least['layer']}, saw "
            f"{whole(least['fitted'])}" if least else "")  # fmt: skip
    return card, (
        f"{whole(starved)} of {whole(found['experts'])} experts saw fewer than {asked(found)}"
        f"{unheld(found)} and {'leans' if starved == 1 else 'lean'} on the layer's inputs{tail}."
    )


def _sensitive(analysis: Analysis) -> Said:
    found = analysis["sensitivity"]
    if not found or not found["by_layer"]:
        return None, ""
    f = reference_format(found["formats"])
    entries = [e for e in found["by_layer"] if e["loss"][f] is not None and e["parameters"]]
    total = sum(e["loss"][f] for e in entries)
    if not entries or total <= 0:
        return None, ""
    kinds = by(entries, lambda e: e["kind"])
    loss = {k: sum(e["loss"][f] for e in es) for k, es in kinds.items()}
    size = {k: sum(e["parameters"] for e in es) for k, es in kinds.items()}
    kind = max(kinds, key=lambda k: loss[k] / size[k])
    depths = {
        n: sum(e["loss"][f] for e in es)
        for n, es in by(in_blocks(entries), lambda e: e["layer"]).items()
    }
    if not depths:
        return None, ""
    layer = max(depths, key=lambda n: depths[n])
    name = found["formats"][f]["name"]
    weight = size[kind] / sum(size.values())
    card = (kind, "is the most sensitive kind", f"per parameter, at {name}")
    return card, (
        f"In {name}, {kind} costs the most per parameter: {percent(weight)} of the weights, "
        f"{percent(loss[kind] / total)} of the predicted loss. Layer {layer} is the most "
        f"sensitive, with {percent(depths[layer] / total)} of it."
    )


def _offload(analysis: Analysis) -> Said:
    found = analysis["offloading"]
    if not found or 2 not in found["sch"]["rho"]:
        return None, ""
    sch, size = found["sch"], 2 * found["top_k"]
    i = longest_window(found)
    best = sch["values"][i][sch["rho"].index(2)]
    if best is None:  # fewer experts than that
        return None, ""
    verdict = (
        "suits" if best >= SUITS else "partly suits" if best >= SUITS_PARTLY else "does not suit"
    )
    rates, lru = found["hit_rates"], None
    if size in rates["sizes"]:
        lru = rates["lru"][rates["sizes"].index(size)]
    experts = mean(layer["experts"] for layer in analysis["layers"])
    chance = min(1.0, size / experts) if experts else None
    card = (percent(best, 0), f"hits with 2 {TIMES} top-k cached", f"SCH; LRU {percent(lru, 0)}")
    return card, (
        f"Offloading {verdict} this model: with {size} experts cached per layer, {percent(best)} "
        f"of requests hit with foresight (SCH, m = {sch['m'][i]}), {percent(lru)} with LRU, and "
        f"{percent(chance)} if routing were random."
    )


def _integer(analysis: Analysis) -> Said:
    crest = analysis["crest"]
    if not crest or not crest["limits"]:
        return None, ""
    verdicts = []
    for limit in crest["limits"]:
        middle, below = _below(crest["weights"], limit)
        if middle is None or below is None:
            continue
        integer, _, floating = limit["pair"].partition("/")
        wins = integer if middle < limit["limit"] else floating
        share = below if wins == integer else 1 - below
        words = wins.upper() if share > 0.995 else f"{wins.upper()} ({percent(share, 0)} of layers)"
        verdicts.append((words, wins == integer, middle, limit["block"]))
    if not verdicts:
        return None, ""
    integers = [words for words, won, *_ in verdicts if won]
    floats = [words for words, won, *_ in verdicts if not won]
    parts = [f"integers win as {listed(integers)}"] if integers else []
    parts += [f"floats win as {listed(floats)}"] if floats else []
    blocks = {block: middle for *_, middle, block in verdicts}
    factors = " and ".join(f"{short(m)} in blocks of {b}" for b, m in sorted(blocks.items()))
    card = (f"{len(integers)} of {len(verdicts)}", "format pairs where integers win",
            f"weights: {', '.join(integers) or 'floats throughout'}")  # fmt: skip
    return card, f"For the weights {', '.join(parts)}; the median crest factor is {factors}."


def _agreement(analysis: Analysis) -> Said:
    rankings = analysis["rankings"]
    if not analysis["layers"] or not rankings or not rankings.get("names"):
        return None, ""
    pairs = [
        (value, rankings["names"][i], rankings["names"][j])
        for i, row in enumerate(rankings["mean"]) for j, value in enumerate(row)
        if i < j and value is not None
    ]  # fmt: skip
    if not pairs:
        return None, ""
    low = min(pairs)
    word = "agree" if low[0] > 0.9 else "mostly agree" if low[0] > 0.7 else "disagree"
    return None, (
        f"Rankings of experts {word}: {low[1]} and {low[2]} are furthest apart, with a rank "
        f"correlation of {low[0]:.2f}.".replace("-", MINUS)
    )


def _predicts(analysis: Analysis) -> Said:
    found = analysis["prediction"]
    points = [
        p for p in (found["points"] if found else [])
        if (p["predicted"] or 0) > 0 and (p["measured"] or 0) > 0
    ]  # fmt: skip
    if not found or not points:
        return None, ""
    if found["error"] is None:
        return None, LONE_PROBE
    agreement, _ = prediction_quality(points)
    factor = math.exp(found["error"])
    card = (
        f"{TIMES}{factor:.2f}",
        "error of a predicted KL",
        f"one sigma, {found['probes']} probes",
    )
    order = f" They rank with a correlation of {agreement:.3f}." if agreement is not None else ""
    return card, (
        f"A predicted KL is within a factor of {factor:.2f} of the measured one (one standard "
        f"deviation, {found['probes']} probes, {len(points):,} points).{order}"
    )


SAYINGS = (
    ("Expert use", _use), ("Domains", _domains), ("Coverage", _starved),
    ("Sensitivity", _sensitive), ("Offloading", _offload), ("INT or FP", _integer),
    ("Rankings", _agreement), ("Prediction", _predicts),
)  # fmt: skip
