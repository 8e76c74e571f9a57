"""What matrices read: outlier channels, and crest factors of inputs and weights.

Experts of a layer read the same states through gate and up: one entry for all. Channels of their
down projections have nothing in common, so of these the expert with the largest value stands for
the layer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bitnest.calibrate.blocks import kappas, read_moments
from bitnest.calibrate.moments import Moments
from bitnest.kernels.moments import BLOCKS
from bitnest.quantize.compare.crest import PAIRS
from bitnest.statistics import Statistics

OUTLIERS = 8  # listed per input
RATIO = 3.0  # of a channel's RMS to the median channel's, from which it is listed


def inputs_section(statistics: Statistics) -> list[dict[str, Any]]:
    """Every distinct input, in the model's order."""
    found = []
    for layer in statistics.layers:
        number = layer["layer"]
        kinds = {site["module"]: site["kind"] for site in layer["sites"]}
        for i, item in enumerate(layer["inputs"]):
            kind = next((kinds[r] for r in item["readers"] if r in kinds), "router")
            role = ", ".join(name.rpartition(".")[2] for name in item["readers"])
            moments = read_moments(statistics, number, f"inputs.{i}").pooled()
            found.append(_entry(item["name"], len(item["readers"]), kind, number, role, moments))
        for i, item in enumerate(layer["experts"]):
            up = read_moments(statistics, number, f"experts.{i}.up").pooled().pooled()
            found.append(
                _entry(f"{item['name']}.up", item["experts"], "expert", number, "experts", up)
            )
            down = read_moments(statistics, number, f"experts.{i}.down").pooled()
            worst = int(down.absmax.amax(1).argmax())
            one = down.at((worst,))
            role = "down, largest expert"
            found.append(_entry(f"{item['name']}.{worst}.down", 1, "expert", number, role, one))
    return found


def _entry(
    name: str, readers: int, kind: str, layer: int, role: str, moments: Moments
) -> dict[str, Any]:
    tokens, width = int(moments.tokens), moments.width
    rms = moments.mean_square().sqrt()
    kappa = moments.kappa().tolist()
    return {
        "name": name,
        "readers": readers,
        "kind": kind,
        "layer": layer,
        "role": role,
        "width": width,
        "absmax": _rounded(moments.absmax),
        "rms": _rounded(rms),
        "tokens": tokens,
        "outliers": _outliers(moments, rms),
        "over_six": int(moments.over_six) / max(1, tokens * width),
        "kappa": {str(block): value for block, value in zip(BLOCKS, kappa, strict=True)},
    }


def _outliers(moments: Moments, rms: torch.Tensor) -> list[dict[str, Any]]:
    """Channels whose RMS stands out, the strongest first."""
    median = float(rms.median())
    if median <= 0:
        return []
    order = rms.argsort(descending=True, stable=True)[:OUTLIERS].tolist()
    ranked = max(1, int(moments.ranked))
    return [
        {
            "channel": channel,
            "absmax": float(moments.absmax[channel]),
            "rms": float(rms[channel]),
            "ratio": float(rms[channel]) / median,
            "rank_share": int(moments.ranks[channel]) / ranked,
        }
        for channel in order
        if float(rms[channel]) >= RATIO * median
    ]


def crest_section(statistics: Statistics) -> dict[str, Any]:
    """Effective crest factors by kind and layer, and the limits under which integers win."""
    return {
        "limits": [
            {"pair": f"{integer}/{floating}", "block": block, "limit": limit}
            for integer, floating, block, limit in PAIRS
        ],
        "weights": _weights(statistics),
        "inputs": _inputs(statistics),
    }


def _weights(statistics: Statistics) -> list[dict[str, Any]]:
    """Per kind and layer: root of the mean over matrices of kappa^2, weighted by their size."""
    found = []
    for layer in statistics.layers:
        if not layer["sites"]:
            continue
        number = layer["layer"]
        peaks = statistics.read(number, "sites.peaks")
        own = kappas(peaks, statistics.read(number, "sites.energy")).square().numpy()
        sizes = np.array([site["shape"][0] * site["shape"][1] for site in layer["sites"]])
        for kind in dict.fromkeys(site["kind"] for site in layer["sites"]):
            chosen = [i for i, site in enumerate(layer["sites"]) if site["kind"] == kind]
            mean = np.average(own[chosen], axis=0, weights=sizes[chosen])
            found.append({"kind": kind, "layer": number, "kappa": _by_block(np.sqrt(mean))})
    return found


def _inputs(statistics: Statistics) -> list[dict[str, Any]]:
    """Per kind and layer: of all rows read, whatever the matrix."""
    found = []
    for layer in statistics.layers:
        number = layer["layer"]
        kinds = {site["module"]: site["kind"] for site in layer["sites"]}
        sums: dict[str, list[tuple[torch.Tensor, float]]] = {}
        for i, item in enumerate(layer["inputs"]):
            kind = next((kinds[r] for r in item["readers"] if r in kinds), "router")
            _collect(sums, kind, read_moments(statistics, number, f"inputs.{i}"))
        for i in range(len(layer["experts"])):
            for part in ("up", "down"):
                _collect(sums, "expert", read_moments(statistics, number, f"experts.{i}.{part}"))
        for kind, parts in sums.items():
            peaks = torch.stack([peak for peak, _ in parts]).sum(0)
            energy = torch.tensor(sum(value for _, value in parts), dtype=torch.float64)
            kappa = kappas(peaks, energy).numpy()
            found.append({"kind": kind, "layer": number, "kappa": _by_block(kappa)})
    return found


def _collect(
    sums: dict[str, list[tuple[torch.Tensor, float]]], kind: str, moments: Moments
) -> None:
    peaks = moments.peaks.reshape(-1, len(BLOCKS)).sum(0)
    sums.setdefault(kind, []).append((peaks, float(moments.square.sum())))


def _by_block(values: Any) -> dict[str, float]:
    return {str(block): float(value) for block, value in zip(BLOCKS, values, strict=True)}


def _rounded(values: torch.Tensor) -> list[float]:
    """Four digits: what a person or a plot can use of a channel's figure."""
    return [float(f"{value:.4g}") for value in values.tolist()]
