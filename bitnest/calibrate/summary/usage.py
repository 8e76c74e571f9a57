"""How experts are used: the parts of the analysis that come from routing and expert statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bitnest.calibrate.blocks import read_moments
from bitnest.calibrate.distribution.offload import (
    offloading,
    phi,
    transition_counts,
    transition_entropy,
    transitions,
)
from bitnest.calibrate.distribution.rankings import rankings_section
from bitnest.calibrate.distribution.significance import (
    channel_significance,
    dynamic_channels,
    expert_significance,
    joint_significance,
)
from bitnest.calibrate.distribution.tiers import fuzzy_tiers
from bitnest.calibrate.moments import Moments
from bitnest.calibrate.observe import COVER, MARGIN_WIDTH
from bitnest.statistics import Statistics

Array = np.ndarray


@dataclass(frozen=True)
class Usage:
    """One layer's experts on the datasets (L labels without `cover`, E experts, top k).

    tokens (L, E); share (L, E) of routed slots; norms (L, E, 4) as in `ExpertSums`. trace (T, k) of
    these datasets' tokens. channels: projection -> significance (L, E, C). fisher (E,) or None.
    trace_sum (E,): tr(sum x x^T) of both inputs per token of the data. logits: mean and standard
    deviation (L, E), margins (L, bins), None without a router.
    """

    layer: int
    experts: int
    top_k: int
    tokens: Array
    share: Array
    norms: Array
    trace: Array
    channels: dict[str, Array]
    fisher: Array | None
    trace_sum: Array
    logits: tuple[Array, Array] | None
    margins: Array | None

    @classmethod
    def read(cls, statistics: Statistics, layer: int, index: int) -> Usage:
        """The experts module number `index` of block `layer`."""
        item = statistics.layers[layer]["experts"][index]
        prefix = f"experts.{index}"
        keep = [i for i, label in enumerate(statistics.labels) if label != COVER]
        keep = keep or list(range(len(statistics.labels)))
        up = read_moments(statistics, layer, f"{prefix}.up")
        down = read_moments(statistics, layer, f"{prefix}.down")
        tokens = up.tokens[keep].numpy()
        slots = tokens.sum(1, keepdims=True)
        share = np.divide(tokens, slots, out=np.zeros(tokens.shape), where=slots > 0)
        trace_sum = (up.square[keep].sum((0, 2)) + down.square[keep].sum((0, 2))).numpy()
        return cls(
            layer=layer,
            experts=item["experts"],
            top_k=item["top_k"],
            tokens=tokens,
            share=share,
            norms=statistics.read(layer, f"{prefix}.norms")[keep].numpy(),
            trace=statistics.read(layer, f"{prefix}.trace").numpy()[kept_tokens(statistics)],
            channels=_channels(statistics, layer, item["name"], up, down, keep, share),
            fisher=_fisher(statistics, layer, item["name"], keep),
            trace_sum=trace_sum / max(1, int(tokens.sum()) // item["top_k"]),
            logits=_logits(statistics, layer, prefix, keep, tokens.sum(1) / item["top_k"]),
            margins=statistics.read(layer, f"{prefix}.margins")[keep].numpy()
            if statistics.has(layer, f"{prefix}.margins")
            else None,
        )

    @property
    def significance(self) -> Array:
        """Each expert's share of its layer's significance, (L, E)."""
        return expert_significance(self.channels)

    @property
    def gate_mass(self) -> Array:
        """Each expert's share of the sum of gate weights, (L, E)."""
        gates = self.norms[:, :, 0]
        total = gates.sum(1, keepdims=True)
        return np.divide(gates, total, out=np.zeros(gates.shape), where=total > 0)

    @property
    def reap(self) -> Array:
        """Mean over an expert's tokens of gate * |E(x)|, (L, E); 0 without tokens."""
        return self.norms[:, :, 3] / np.maximum(self.tokens, 1)


def expert_layers(statistics: Statistics) -> list[tuple[int, int]]:
    """(block, index) of every module of fused experts."""
    return [
        (layer["layer"], index)
        for layer in statistics.layers
        for index in range(len(layer["experts"]))
    ]


def kept_tokens(statistics: Statistics) -> Array:
    """Numbers of the tokens that belong to datasets, not to coverage."""
    kept, start = [], 0
    only = {label for label in statistics.labels if label != COVER} or set(statistics.labels)
    for sample in statistics.header["samples"]:
        if sample["label"] in only:
            kept.append(np.arange(start, start + sample["length"]))
        start += sample["length"]
    return np.concatenate(kept)


def layer_section(usage: Usage, following: Usage | None, tiers: Array | None) -> dict[str, Any]:
    """One entry of the analysis' `layers`."""
    joint = joint_significance(usage.significance)
    entropy = -(usage.share * np.log(np.where(usage.share > 0, usage.share, 1))).sum(1)
    counts = None
    if following is not None:
        counts = _pairs(usage, following)
    section: dict[str, Any] = {
        "layer": usage.layer,
        "experts": usage.experts,
        "top_k": usage.top_k,
        "tokens": usage.tokens.tolist(),
        "share": usage.share.tolist(),
        "gate_mass": usage.gate_mass.tolist(),
        "reap": usage.reap.tolist(),
        "hessian_trace": usage.trace_sum.tolist(),
        "fisher": None if usage.fisher is None else usage.fisher.tolist(),
        "significance": usage.significance.tolist(),
        "dynamics": joint.dynamics.tolist(),
        "tier": None if tiers is None else tiers.tolist(),
        "balance": (entropy / np.log(max(2, usage.experts))).tolist(),
        "margin": None,
        "logit_mean": None,
        "logit_std": None,
        "coactivation": plain(phi(_pairs(usage, usage), len(usage.trace))),
        "transitions": None if counts is None else transitions(counts).tolist(),
        "transition_entropy": None if counts is None else transition_entropy(counts),
    }
    if usage.margins is not None:
        bins = usage.margins.shape[1]
        edges = [round(MARGIN_WIDTH * i, 6) for i in range(bins + 1)]
        section["margin"] = {"edges": edges, "counts": usage.margins.tolist()}
    if usage.logits is not None:
        section["logit_mean"], section["logit_std"] = (part.tolist() for part in usage.logits)
    return section


def _pairs(this: Usage, other: Usage) -> Array:
    """Pairs of experts that tokens chose, (E, E'); choices of none are left out."""
    traces, sizes = [], []
    for usage in (this, other):
        none = usage.experts + np.arange(usage.top_k)  # a number of its own for each choice
        traces.append(np.where(usage.trace < usage.experts, usage.trace, none))
        sizes.append(usage.experts + usage.top_k)
    found = transition_counts(traces[0], traces[1], sizes[0], sizes[1])
    return found[: this.experts, : other.experts]


@dataclass(frozen=True)
class LayerTiers:
    """Tiers per layer, and the section."""

    tiers: list[Array]
    section: dict[str, Any]


def tiers_of(usages: Sequence[Usage]) -> LayerTiers | None:
    """Fuzzy c-means over all experts of the model, by E times their mean share of significance, so
    that layers with different numbers of experts can be compared."""
    if not usages:
        return None
    points = [usage.experts * joint_significance(usage.significance).mean for usage in usages]
    found = fuzzy_tiers(np.concatenate(points))
    cuts = np.cumsum([len(part) for part in points])[:-1]
    return LayerTiers(np.split(found.tiers, cuts), found.section())


def rankings(usages: Sequence[Usage]) -> dict[str, Any]:
    """Five rankings of every layer's experts, and how they correlate."""
    return rankings_section(
        {
            usage.layer: {
                "frequency": usage.share.mean(0),
                "gate mass": usage.gate_mass.mean(0),
                "REAP": usage.norms[:, :, 3].sum(0) / np.maximum(usage.tokens.sum(0), 1),
                "Hessian trace": usage.trace_sum,
                "Fisher": usage.fisher,
            }
            for usage in usages
        }
    )


def channels_section(usages: Sequence[Usage]) -> dict[str, Any]:
    """The channels whose significance changes most between datasets."""
    channels = {(u.layer, name): s for u in usages for name, s in u.channels.items()}
    if not channels:
        return {"share": 0.01, "count": 0, "list": []}
    return dynamic_channels(channels).section()


def offloading_part(usages: Sequence[Usage], statistics: Statistics) -> dict[str, Any] | None:
    """SRP, SCH and cache hit rates; None for a model without experts. Layers where choices may be
    no expert are left out: their requests differ in number from token to token."""
    usages = [usage for usage in usages if usage.trace.max(initial=0) < usage.experts]
    if not usages:
        return None
    only = {label for label in statistics.labels if label != COVER} or set(statistics.labels)
    lengths = [s["length"] for s in statistics.header["samples"] if s["label"] in only]
    starts = np.cumsum([0, *lengths[:-1]])
    traces = {usage.layer: usage.trace for usage in usages}
    return offloading(traces, {usage.layer: usage.experts for usage in usages}, starts)


def plain(values: Array) -> list[Any]:
    """Nested lists, None for NaN."""
    found = values.astype(object)
    found[np.isnan(values)] = None
    return list(found.tolist())


def _channels(
    statistics: Statistics,
    layer: int,
    module: str,
    up: Moments,
    down: Moments,
    keep: Sequence[int],
    share: Array,
) -> dict[str, Array]:
    """Significance of every projection's input channels, (L, E, C)."""
    columns: dict[str, dict[int, torch.Tensor]] = {}
    params: dict[str, str] = {}
    for site in statistics.layers[layer]["sites"]:
        if site["module"] == module:
            projection = site["name"].rpartition(".")[2]
            norms = statistics.read(layer, f"columns.{site['name']}")
            columns.setdefault(projection, {})[site["expert"]] = norms
            params[projection] = site["param"]
    found = {}
    for projection, norms_of in columns.items():
        moments = down if params[projection] == "down_proj" else up
        norms = torch.stack([norms_of[e] for e in sorted(norms_of)])
        mean = moments.mean_abs()[list(keep)]
        found[projection] = channel_significance(mean.numpy(), norms.double().numpy(), share)
    return found


def _fisher(statistics: Statistics, layer: int, module: str, keep: Sequence[int]) -> Array | None:
    """Sum of f over an expert's outputs, mean over datasets, (E,)."""
    total: Array | None = None
    for name in statistics.names(layer):
        if name.startswith(f"fisher.{module}.") and not name.endswith(".tokens"):
            part = statistics.read(layer, name)[list(keep)].double().sum(2).mean(0).numpy()
            total = part if total is None else total + part
    return total


def _logits(
    statistics: Statistics, layer: int, prefix: str, keep: Sequence[int], tokens: Array
) -> tuple[Array, Array] | None:
    if not statistics.has(layer, f"{prefix}.logits"):
        return None
    count = np.maximum(tokens, 1)[:, None]
    mean = statistics.read(layer, f"{prefix}.logits")[list(keep)].numpy() / count
    square = statistics.read(layer, f"{prefix}.logits2")[list(keep)].numpy() / count
    return mean, np.sqrt(np.maximum(square - mean**2, 0))
