"""summary: statistics become the analysis dictionary, which report.json holds and the page shows.

Everything here is arithmetic on Statistics: no model is run, so a report can be made again at any
time. Keys and shapes: docs/statistics.md. Missing values are null. Windows drawn for coverage
(label `cover`) are left out of every usage figure; they count for coverage.
"""

from __future__ import annotations

from typing import Any

from bitnest.calibrate.distribution.domains import domain_experts
from bitnest.calibrate.observe import COVER
from bitnest.calibrate.summary.coverage import coverage
from bitnest.calibrate.summary.inputs import crest_section, inputs_section
from bitnest.calibrate.summary.sites import prediction_section, sensitivity_section
from bitnest.calibrate.summary.usage import (
    Usage,
    channels_section,
    expert_layers,
    layer_section,
    offloading_part,
    rankings,
    tiers_of,
)
from bitnest.statistics import Statistics

VERSION = 1
DOMAINS = 40


def summarise(statistics: Statistics) -> dict[str, Any]:
    """The analysis dictionary of `statistics`."""
    header = statistics.header
    layers = expert_layers(statistics)
    usage = [Usage.read(statistics, *place) for place in layers]
    tiers = tiers_of(usage)
    labels = [label for label in statistics.labels if label in usage_labels(statistics)]
    return {
        "version": VERSION,
        "bitnest": header["bitnest"],
        "model": header["model"],
        "architecture": header["architecture"],
        "parameters": header["source"]["parameters"],
        "bytes": header["source"]["bytes"],
        "blocks": statistics.blocks,
        "labels": labels,
        "length": header["length"],
        "lengths": sorted({sample["length"] for sample in header["samples"]}),
        "seed": header["seed"],
        "seconds": header["seconds"],
        "data": header["data"],
        "layers": [
            layer_section(part, following, own)
            for part, following, own in zip(
                usage,
                [*usage[1:], None] if usage else [],
                tiers.tiers if tiers else [None] * len(usage),
                strict=True,
            )
        ],
        "domains": domain_experts({part.layer: part.share for part in usage}, labels, DOMAINS),
        "rankings": rankings(usage),
        "tiers": tiers.section if tiers else {"centres": [], "bits": [], "counts": []},
        "dynamic_channels": channels_section(usage),
        "inputs": inputs_section(statistics),
        "crest": crest_section(statistics),
        "sensitivity": sensitivity_section(statistics),
        "prediction": prediction_section(statistics),
        "offloading": offloading_part(usage, statistics),
        "coverage": coverage(statistics, layers),
    }


def usage_labels(statistics: Statistics) -> list[str]:
    """Labels that stand for datasets: all but windows drawn for coverage."""
    return [label for label in statistics.labels if label != COVER] or statistics.labels
