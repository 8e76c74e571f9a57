"""Coverage: what every expert saw, and by how much its inputs lean on their layer.

As fitting leans (`calibrate/sensitivity.py`), each of an expert's two inputs by itself:

    l = max(0, 1 - n / m)

n: the tokens that Hessians are summed over. Full ones do not see the windows held out for probes
(`fitted`), diagonals see all. m: --min-tokens, else the input's own width, which is the hidden size
for gate and up and the intermediate size for down. An expert is covered if neither leans. Windows
drawn for coverage count; sums over merged parts are those of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bitnest.calibrate.coverage import lean
from bitnest.statistics import Statistics

PARTS = {"up": "gate and up", "down": "down"}


@dataclass(frozen=True)
class Seen:
    """One layer's experts. tokens: routed to each (E,); fitted: of these, in its Hessian; minimum:
    that "up" and "down" ask for."""

    layer: int
    tokens: Sequence[int]
    fitted: Sequence[int]
    minimum: dict[str, int]


def coverage(statistics: Statistics, layers: Sequence[tuple[int, int]]) -> dict[str, Any] | None:
    """The `coverage` part of the analysis; None for a model without experts."""
    header = statistics.header
    full = header["hessian"] == "full"
    seen = []
    for layer, index in layers:
        prefix = f"experts.{index}"
        tokens = statistics.read(layer, f"{prefix}.up.tokens").sum(0).tolist()
        fitted = statistics.read(layer, f"{prefix}.fitted").sum(0).tolist() if full else tokens
        minimum = {
            part: header["min_tokens"]
            or statistics.read(layer, f"{prefix}.{part}.absmax").shape[-1]
            for part in PARTS
        }
        seen.append(Seen(layer, tokens, fitted, minimum))
    held = sum(not sample.get("fitted", True) for sample in header["samples"]) if full else 0
    drawn = header.get("drawn") or {"windows": 0, "rounds": 0}
    return coverage_section(seen, held=held, windows=drawn["windows"], rounds=drawn["rounds"])


def coverage_section(
    seen: Sequence[Seen], *, held: int = 0, windows: int = 0, rounds: int = 0
) -> dict[str, Any] | None:
    """Every starved expert and what it falls back to; None without experts.

    held: windows that no Hessian sees. windows, rounds: drawn for coverage.
    """
    if not seen:
        return None
    starved = [
        {"layer": own.layer, "expert": expert, "tokens": int(tokens), "fitted": int(fitted),
         "minimum": own.minimum,
         "lean": (leans := {part: lean(int(fitted), m) for part, m in own.minimum.items()}),
         "fallback": _fallback(int(tokens), int(fitted), leans)}
        for own in seen
        for expert, (tokens, fitted) in enumerate(zip(own.tokens, own.fitted, strict=True))
        if fitted < max(own.minimum.values())
    ]  # fmt: skip
    minima = sorted({max(own.minimum.values()) for own in seen})
    experts = sum(len(own.tokens) for own in seen)
    return {
        "minimum": minima[-1],
        "minima": minima,
        "held": held,
        "experts": experts,
        "covered": experts - len(starved),
        "starved": starved,
        "drawn": {"windows": windows, "rounds": rounds},
    }


def _fallback(tokens: int, fitted: int, leans: dict[str, float]) -> str:
    if not fitted:
        who = "only held-out windows" if tokens else "no token"
        return f"{who} reached it: the layer's inputs alone"
    words = {
        PARTS[part]: f"{min(99, max(1, round(100 * share)))} %"  # neither all nor nothing
        for part, share in leans.items() if share > 0
    }  # fmt: skip
    if len(words) == len(PARTS) and len(set(words.values())) == 1:
        return f"its Hessians are {words.popitem()[1]} the layer's inputs"
    said = ", that of ".join(f"{part} is {share}" for part, share in words.items())
    return f"the Hessian of {said} the layer's inputs"
