"""From statistics to what policies look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bitnest.calibrate.distribution.significance import joint_significance
from bitnest.calibrate.predict import Predictor, output_errors, token_shares
from bitnest.calibrate.summary.usage import Usage, expert_layers
from bitnest.errors import RecipeError
from bitnest.quantize.allocation.menu import FATE, Menu
from bitnest.quantize.allocation.objective import Background, with_weights
from bitnest.quantize.allocation.policies.common import Evidence
from bitnest.sites import Site
from bitnest.statistics import Statistics


def read_evidence(
    predictor: Predictor,
    menu: Menu,
    *,
    weights: np.ndarray | None = None,
    background: Background | None = None,
    latency: Mapping[str, float] | None = None,
    exact: bool = False,
) -> Evidence:
    """Everything the policies may look at, from the predictor's statistics.

    weights: of the dataset labels. background: what sites that are not planned lose. latency:
    seconds per weight of every format, as measured; without it the bytes that a token reads stand
    for time.
    """
    statistics = predictor.statistics
    place = {site.name: i for i, site in enumerate(predictor.sites)}
    rows = [[place[site.name] for site in item] for item in menu.items]
    share = token_shares(statistics)
    per_item = np.array([share[group].max() for group in rows])
    gates, significance = expert_use(statistics, [item[0] for item in menu.items])
    return Evidence(
        objective=with_weights(menu, predictor.fit, weights, background),
        share=per_item,
        gate=gates,
        noise=_noise(predictor, menu, rows),
        significance=significance,
        latency=_latency(menu, per_item, latency),
        exact=exact,
    )


def expert_use(statistics: Statistics, sites: Sequence[Site]) -> tuple[np.ndarray, np.ndarray]:
    """Mean gate weight of the tokens routed to each site's expert, 1 outside experts; significance
    of the expert, over datasets and relative to an even share, NaN outside experts. (N,) each."""
    gates, values = np.ones(len(sites)), np.full(len(sites), np.nan)
    by_layer: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for layer, index in expert_layers(statistics):
        usage = Usage.read(statistics, layer, index)
        tokens = usage.tokens.sum(0)
        mean = usage.norms[:, :, 0].sum(0) / np.maximum(tokens, 1)
        by_layer[layer] = (mean, usage.experts * joint_significance(usage.significance).mean)
    for i, site in enumerate(sites):
        if site.expert is not None and site.layer in by_layer:
            gates[i] = by_layer[site.layer][0][site.expert]
            values[i] = by_layer[site.layer][1][site.expert]
    return gates, values


def _noise(predictor: Predictor, menu: Menu, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Output error per token of every choice, (N, F): share * tr(dW H dW^T), summed."""
    noise = output_errors(predictor.statistics)
    columns = [
        np.zeros(len(noise)) if name in {"dense", FATE} else noise[:, predictor.column(name)]
        for name in menu.formats
    ]
    whole = np.stack(columns, axis=1)
    return np.stack([whole[list(group)].sum(axis=0) for group in rows])


def _latency(menu: Menu, share: np.ndarray, measured: Mapping[str, float] | None) -> np.ndarray:
    if measured is None:
        return np.asarray(menu.nbytes * share[:, None], dtype=np.float64)
    per_weight = np.array([measured.get(name, np.nan) for name in menu.formats])
    if np.isnan(per_weight).all():
        raise RecipeError("the table of latencies has none of the candidates",
                          hint="candidates: " + ", ".join(menu.formats))  # fmt: skip
    filled = np.where(np.isnan(per_weight), np.nanmax(per_weight), per_weight)
    return np.asarray(menu.numel[:, None] * filled * share[:, None])
