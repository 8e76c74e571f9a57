"""slopes: what an output error costs, kept in an artifact, so that widths are chosen at load time.

A site's predicted loss is proportional to its relative output error, over formats and widths
alike: on the trained models at hand loss / error differs by a percent from 2 to 8 bits. So one
number per site and text, with the predictor's fit, gives the KL of every choice of widths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitnest.calibrate.predict import DROP, Fit, Predictor, relative_errors
from bitnest.manifest import rounded


@dataclass(frozen=True)
class Sensitivity:
    """texts: labels of the datasets, L. fit: of the predictor. slopes: nats of KL per unit of
    relative output error, by site, one per text."""

    texts: tuple[str, ...]
    fit: Fit
    slopes: Mapping[str, tuple[float, ...]]

    def to_json(self) -> dict[str, Any]:
        """Without the slopes, which the records of sites hold."""
        fit = self.fit
        return {
            "texts": list(self.texts), "kinds": list(fit.kinds),
            "scales": [rounded(scale) for scale in fit.scales], "flips": rounded(fit.flips),
            "error": rounded(fit.error) if fit.probes else None, "probes": fit.probes,
        }  # fmt: skip


def read_fit(content: Mapping[str, Any]) -> Fit:
    """The fit of what `Sensitivity.to_json` wrote."""
    error = float("inf") if content["error"] is None else float(content["error"])
    kinds, scales = tuple(content["kinds"]), tuple(map(float, content["scales"]))
    return Fit(kinds, scales, float(content["flips"]), error, int(content["probes"]))


def sensitivity(predictor: Predictor) -> Sensitivity:
    """Of every site that the statistics measured, on the texts whose importance they know."""
    known = np.array(predictor.known)
    coded = [f for f, name in enumerate(predictor.formats) if name != DROP]
    errors = relative_errors(predictor.statistics)[:, coded]
    losses = predictor.losses[:, coded][:, :, known]
    measured = errors > 0
    ratios = losses / np.where(measured, errors, 1.0)[:, :, None] * measured[:, :, None]
    slopes = ratios.sum(axis=1) / np.maximum(measured.sum(axis=1), 1)[:, None]
    texts = tuple(t for t, kept in zip(predictor.labels, known, strict=True) if kept)
    return Sensitivity(
        texts, predictor.fit,
        {site.name: tuple(row) for site, row in zip(predictor.sites, slopes.tolist(), strict=True)},
    )  # fmt: skip
