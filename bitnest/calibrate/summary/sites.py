"""Sensitivity of sites, and predicted against measured KL."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitnest.calibrate.predict import Predictor, candidate_bits
from bitnest.statistics import Statistics


def sensitivity_section(statistics: Statistics) -> dict[str, Any] | None:
    """Every site's error and loss in every candidate format; None if neither was measured."""
    if not statistics.formats:
        return None
    importance = statistics.header["importance"]
    losses = None
    if importance is not None:
        predictor = Predictor(statistics)
        losses = predictor.losses[:, :, predictor.known].mean(2)
    bits = candidate_bits(statistics)
    fisher, unknown = _fisher(statistics), [None] * len(bits)
    sites: list[dict[str, Any]] = []
    for layer in statistics.layers:
        if not layer["sites"]:
            continue
        errors = statistics.read(layer["layer"], "sites.error").tolist()
        for site, error in zip(layer["sites"], errors, strict=True):
            number = len(sites)
            sites.append(
                {
                    "name": site["name"],
                    "kind": site["kind"],
                    "layer": site["layer"],
                    "expert": site["expert"],
                    "projection": site["name"].rpartition(".")[2],
                    "parameters": site["shape"][0] * site["shape"][1],
                    "fisher": fisher.get(site["name"]),
                    "error": error,
                    "loss": unknown if losses is None else losses[number].tolist(),
                }
            )
    return {
        "method": statistics.header["method"],
        "importance": None if importance is None else importance["kind"],
        "formats": [
            {"name": name, "bits": float(b)}
            for name, b in zip(statistics.formats, bits, strict=True)
        ],
        "sites": sites,
        "by_layer": [] if losses is None else _by_layer(sites),
    }


def _by_layer(sites: list[dict[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for site in sites:
        groups.setdefault((site["layer"], site["kind"]), []).append(site)
    return [
        {
            "layer": layer,
            "kind": kind,
            "parameters": sum(site["parameters"] for site in own),
            "loss": np.sum([site["loss"] for site in own], axis=0).tolist(),
        }
        for (layer, kind), own in groups.items()
    ]


def _fisher(statistics: Statistics) -> dict[str, float]:
    """Sum of f over a site's outputs, mean over the datasets it was measured on."""
    importance = statistics.header["importance"]
    if importance is None or importance["kind"] == "probes":
        return {}
    known = [i for i, count in enumerate(importance["predictions"]) if count]
    found = {}
    for layer in statistics.layers:
        number = layer["layer"]
        for site in statistics.sites_of(number):
            key = f"fisher.{site.module if site.param == 'weight' else site.path}"
            if not statistics.has(number, key):
                continue
            rows = statistics.read(number, key)[known]
            if rows.dim() == 3:
                rows = rows[:, site.expert or 0]
            if site.rows is not None:
                rows = rows[:, site.rows[0] : site.rows[1]]
            found[site.name] = float(rows.double().sum(1).mean())
    return found


def prediction_section(statistics: Statistics) -> dict[str, Any] | None:
    """Probes: predicted by a fit to the others, and measured; None if there were none.

    error: None for a single probe, which no other predicts.
    """
    if not statistics.formats or statistics.header["importance"] is None:
        return None
    predictor = Predictor(statistics)
    if not predictor.points:
        return None
    fit = predictor.fit
    return {
        "scales": dict(zip(fit.kinds, fit.scales, strict=True)),
        "flips": fit.flips,
        "error": fit.error if fit.probes > 1 else None,
        "probes": fit.probes,
        "points": [
            {
                "label": point.label,
                "bits": point.bits,
                "predicted": point.predicted,
                "measured": point.measured,
            }
            for point in predictor.points
        ],
    }
