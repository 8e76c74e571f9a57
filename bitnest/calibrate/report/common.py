"""What the sections share: checking the dictionary, choosing what is drawn, small statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from bitnest.errors import ArtifactError
from bitnest.html import Markup, tag
from bitnest.html.scales import finite, short
from bitnest.kinds import ENDS

Analysis = Mapping[str, Any]
T = TypeVar("T")

VERSION = 1
KEYS = (
    "version", "bitnest", "model", "architecture", "parameters", "bytes", "blocks", "labels",
    "length", "lengths", "seed", "seconds", "data", "layers", "domains", "rankings", "tiers",
    "dynamic_channels", "inputs", "crest", "sensitivity", "prediction", "offloading", "coverage",
)  # fmt: skip
MOST_LABELS = 8  # data sets drawn with a colour of their own: the palette's size
HOVER_CELLS = 20_000  # cells of one family of maps that carry their own title
NO_EXPERTS = "This model has no routed experts, so there is nothing to show here."


def check(analysis: Analysis) -> None:
    """Refuse what is not an analysis of this version.

    Raises:
        ArtifactError: another version, or a part is missing.
    """
    lacking = [key for key in KEYS if key not in analysis]
    if lacking:
        raise ArtifactError(
            f"the analysis lacks {', '.join(lacking)}",
            where="report.json",
            hint="run `bitnest analyze` again",
        )
    if analysis["version"] != VERSION:
        raise ArtifactError(
            f"analysis of version {analysis['version']!r}, this bitnest shows version {VERSION}",
            where="report.json",
            hint="run `bitnest analyze` again",
        )


def missing(text: str) -> Markup:
    """The sentence that stands where a section has nothing to show."""
    return tag("p", text, class_="missing")


def place(entry: Mapping[str, Any]) -> int | str:
    """Where an entry with `layer` and `kind` belongs: its layer's number, or the ends."""
    return "ends" if entry["kind"] in ENDS else int(entry["layer"])


def place_name(value: int | str) -> str:
    """What `place` gave, in a table."""
    return value if isinstance(value, str) else short(value)


def in_blocks(entries: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those that belong to a layer."""
    return [entry for entry in entries if entry["kind"] not in ENDS]


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most `most` items, evenly spaced, first and last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def drawn_labels(analysis: Analysis) -> list[tuple[int, str]]:
    """(index, label) of the data sets that are drawn: those with the most tokens, in order."""
    tokens = {d["label"]: d.get("tokens") or 0 for d in analysis["data"]}
    labels = list(enumerate(analysis["labels"]))
    best = sorted(labels, key=lambda pair: -tokens.get(pair[1], 0))[:MOST_LABELS]
    return sorted(best)


def some_of(shown: int, total: int, noun: str, which: str = "") -> str:
    """A sentence that says what was left out, or nothing."""
    return "" if shown >= total else f"{shown:,} of {total:,} {noun}{which} are drawn."


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the numbers among the values."""
    known = [v for v in values if v is not None and finite(v)]
    return sum(known) / len(known) if known else None


def median(values: Iterable[float | None]) -> float | None:
    """Median of the numbers among the values."""
    known = sorted(v for v in values if v is not None and finite(v))
    if not known:
        return None
    middle = len(known) // 2
    return known[middle] if len(known) % 2 else (known[middle - 1] + known[middle]) / 2


def over_labels(rows: Sequence[Sequence[float | None]]) -> list[float]:
    """Mean per expert over data sets, rows [label][expert]; 0 where nothing is known."""
    return [mean(column) or 0.0 for column in zip(*rows, strict=True)]


def totals(rows: Sequence[Sequence[float]]) -> list[float]:
    """Sum per expert over data sets."""
    return [sum(column) for column in zip(*rows, strict=True)]


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 0; equal values share their mean rank."""
    order = sorted(range(len(values)), key=values.__getitem__)
    found = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for i in order[start:end]:
            found[i] = (start + end - 1) / 2
        start = end
    return found


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Rank correlation; None for fewer than three points or where all are equal."""
    if len(x) < 3:
        return None
    a, b = ranks(x), ranks(y)
    ma, mb = sum(a) / len(a), sum(b) / len(b)
    va, vb = sum((p - ma) ** 2 for p in a), sum((q - mb) ** 2 for q in b)
    if not va or not vb:
        return None
    return sum((p - ma) * (q - mb) for p, q in zip(a, b, strict=True)) / math.sqrt(va * vb)


def listed(names: Sequence[str], most: int = 4) -> str:
    """Names joined as in a sentence, with a count of those left out."""
    shown = list(names[:most])
    if len(names) > most:
        shown.append(f"{len(names) - most:,} more")
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def plural(count: int, noun: str) -> str:
    """A count with its noun: 1 expert, 2 experts."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def span(values: Iterable[int]) -> str:
    """What they are: 256, or 128 to 256."""
    known = sorted(values)
    low, high = known[0], known[-1]
    return f"{high:,}" if low == high else f"{low:,} to {high:,}"


def asked(coverage: Mapping[str, Any]) -> str:
    """What an expert should see, which hangs on its layer's width."""
    words = f"{span(coverage['minima'])} tokens"
    return words if len(coverage["minima"]) == 1 else f"the {words} that its layer asks for"


def unheld(coverage: Mapping[str, Any]) -> str:
    """Which windows count, where not all do."""
    return " in windows that are not held out for probes" if coverage["held"] else ""


def seeds(seed: int | None) -> str:
    """The seed of an analysis; merged parts may have had one each."""
    return "several seeds" if seed is None else f"seed {seed}"


def by(items: Iterable[T], key: Callable[[T], Any]) -> dict[Any, list[T]]:
    """Items grouped by a key, in order of first appearance."""
    groups: dict[Any, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
