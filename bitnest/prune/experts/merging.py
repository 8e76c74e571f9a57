"""Merging: experts that give alike become one.

HC-SMoE (Chen et al. 2024): experts are clustered by what they give on average, (E, hidden), bottom
up with average linkage of Euclidean distances, and each cluster becomes the mean of its members'
weights, each weighted by how often the router chooses it. The router stays: all rows of a cluster
lead to its one expert, and a token that chose two of them gets the sum of their gates.

The clusters come from outputs over the sample's tokens, chosen or not, as published. `align` brings
every member's neurons into the order of the cluster's most used one first: of all permutations the
one of greatest inner product of its weights with that one's (weight matching, Ainsworth et al.
2023), each matrix scaled to unit norm.

For an ordinary model, whose router has one row per expert, a cluster's row is the mean of its
members' with the same weights [ours].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.optimize import linear_sum_assignment

from bitnest.calibrate.collector import dense_weights
from bitnest.kernels.experts import expert_output, up_name
from bitnest.neurons import Neurons, gate_layout
from bitnest.prune.experts.probe import TINY, LayerProbe
from bitnest.prune.experts.scores import frequency
from bitnest.reduced_tensors import blend
from bitnest.reduction import Order, Own


def clusters(probe: LayerProbe, count: int) -> list[list[int]]:
    """`count` clusters of experts, ascending by their first member."""
    if count >= probe.experts:
        return [[e] for e in range(probe.experts)]
    means = probe.outputs.mean(1).double().cpu().numpy()
    tree = linkage(means, method="average", metric="euclidean")
    names = fcluster(tree, count, criterion="maxclust")
    while len(set(names)) < count:  # equal distances join more than asked: part the largest
        sizes = np.bincount(names)
        names[np.nonzero(names == sizes.argmax())[0][-1]] = names.max() + 1
    found: dict[int, list[int]] = {}
    for expert, name in enumerate(names):
        found.setdefault(int(name), []).append(expert)
    return sorted(found.values())


def merged(probe: LayerProbe, members: Sequence[int], align: bool) -> Own:
    """The expert that a cluster becomes. Members that no token chose have no weight; of none they
    have all the same."""
    if len(members) == 1:
        return Own((members[0],))
    use = frequency(probe)[list(members)].double()
    share = use / use.sum() if float(use.sum()) else torch.full_like(use, 1 / len(members))
    orders: tuple[Order, ...] = ()
    if align:
        first = members[int(share.argmax())]
        orders = tuple(_order(probe, first, e) if e != first else None for e in members)
    return Own(tuple(members), tuple(share.tolist()), orders)


def _order(probe: LayerProbe, first: int, other: int) -> Order:
    """Neurons of `other` in the order of those of `first` that they are most like."""
    a, b = _neurons(probe, first), _neurons(probe, other)
    alike = sum((x @ y.T for x, y in zip(a, b, strict=True)), torch.zeros(()))
    _, order = linear_sum_assignment(-alike.double().cpu().numpy())
    return tuple(int(i) for i in order)


def _neurons(probe: LayerProbe, expert: int) -> list[torch.Tensor]:
    """What belongs to each neuron, (neurons, .) of unit norm: its rows of the first projection and
    its column of the second."""
    weights = dense_weights(probe.module)
    up = weights(expert, up_name(probe.module)).float()
    down = weights(expert, "down_proj").float()
    layout = _layout(probe)
    width = down.shape[1]
    parts = {
        "one": lambda: [up], "halves": lambda: [up[:width], up[width:]],
        "pairs": lambda: [up[0::2], up[1::2]],
    }[layout]()  # fmt: skip
    return [part / part.norm().clamp_min(TINY) for part in (*parts, down.T)]


def _layout(probe: LayerProbe) -> str:
    gated = up_name(probe.module) == "gate_up_proj"
    return gate_layout(probe.module, probe.name) if gated else "one"


def merged_output(probe: LayerProbe, own: Own) -> torch.Tensor:
    """What a merged expert gives on the sample, (n, hidden); biases are those of its first."""
    if len(own.experts) == 1:
        return probe.outputs[own.experts[0]]
    weights, layout = dense_weights(probe.module), _layout(probe)

    def mixed(_: int, param: str) -> torch.Tensor:
        neurons = Neurons(1) if param == "down_proj" else Neurons(0, layout)
        return blend((weights(e, param) for e in own.experts), own, neurons)

    rows = probe.read.to(next(probe.module.parameters()).dtype)
    return expert_output(probe.module, mixed, own.experts[0], rows).float()
