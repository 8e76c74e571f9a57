"""Which scales and orders an edge gets, from what its consumers read and what they are.

    SmoothQuant  s_j = max|x_j|^a / max|w_j|^(1-a)
    DGQ          s_j = max(1, max|x_j| / b),  b the channel maximum at the 0.5 % rank
    order        descending by mean square, the loudest channels first

Scales are rounded to powers of two (in the exponent), so that norms and weights stay exact in 16
bit; neither paper does that [ours]. A free fold leaves them as they are. Where several columns read
one channel (GQA), the largest of them counts. The rank in DGQ is read as place floor(0.005 I), from
0, in descending order [ours]. An expert that no token reached keeps its channels as they were.

Papers: SmoothQuant (2211.10438), DGQ (2310.04836).
"""

from __future__ import annotations

import torch
from torch import nn

from bitnest.folds import Fold
from bitnest.quantize.folding.places import inside_experts
from bitnest.quantize.folding.statistics import Inputs
from bitnest.quantize.transforms.channel_scales import nearest_power_of_two, smooth_scales
from bitnest.quantize.transforms.edges import Edge
from bitnest.quantize.transforms.permutation import by_energy_within
from bitnest.sites import is_experts, is_linear

DGQ_RANK = 0.005


def edge_scales(
    block: nn.Module, prefix: str, edge: Edge, inputs: Inputs, fold: Fold
) -> torch.Tensor | None:
    """Scales of producer channels, (C,) or (E, C) float64; None where nothing was read."""
    x = _statistic(block, prefix, edge, inputs, "absmax")
    if x is None:
        return None
    w = _weight_maxima(block, edge)
    if x.dim() == 1:
        scale = _scales(x, w, fold)
    else:
        rows = [_scales(*pair, fold) for pair in zip(x, w, strict=True)]
        scale = torch.stack(rows)
    return scale if fold.free else nearest_power_of_two(scale)


def edge_order(
    block: nn.Module, prefix: str, edge: Edge, inputs: Inputs, scale: torch.Tensor | None
) -> torch.Tensor | None:
    """The order of producer channels, (C,) or (E, C), within spans; None where nothing was read.

    scale: that the channels were divided by before.
    """
    energy = _statistic(block, prefix, edge, inputs, "square")
    if energy is None:
        return None
    if scale is not None:
        energy = energy / scale.square()
    rows = energy if energy.dim() == 2 else energy[None]
    orders = torch.stack([by_energy_within(row, edge.span).order for row in rows])
    return orders if energy.dim() == 2 else orders[0]


def _statistic(
    block: nn.Module, prefix: str, edge: Edge, inputs: Inputs, name: str
) -> torch.Tensor | None:
    """The largest of a statistic over the columns that read each channel, (C,) or (E, C) float64.

    name: absmax, or square for the mean of it.
    """
    each = inside_experts(block, edge)
    found = []
    for matrix in edge.consumers:
        seen = inputs.get(f"{prefix}.{matrix.module}.{matrix.param}")
        if seen is None:
            continue
        if seen.tokens.dim() and not each:
            seen = seen.pooled()
        values = seen.absmax if name == "absmax" else seen.mean_square()
        found.append(values.double().cpu())
    if not found:
        return None
    columns = torch.stack(found).amax(0)
    if columns.dim() == 1:
        return edge.pooled(columns)
    return torch.stack([edge.pooled(row) for row in columns])


def _weight_maxima(block: nn.Module, edge: Edge) -> torch.Tensor:
    """max_i |w_ij| over all consumers that multiply, routers apart, (C,) or (E, C) float64."""
    each = inside_experts(block, edge)
    modules = {m: block.get_submodule(m.module) for m in edge.consumers}
    own = [m for m in edge.consumers if is_linear(modules[m]) or is_experts(modules[m])]
    found = []
    for matrix in own or edge.consumers:
        largest = matrix.view(block).abs().amax(-2).double().cpu()
        found.append(largest if each or largest.dim() == 1 else largest.amax(0))
    columns = torch.stack(found).amax(0)
    if columns.dim() == 1:
        return edge.pooled(columns)
    return torch.stack([edge.pooled(row) for row in columns])


def _scales(x: torch.Tensor, w: torch.Tensor, fold: Fold) -> torch.Tensor:
    """Of one set of channels (C,)."""
    if not bool((x > 0).any()):
        return torch.ones_like(x)
    if fold.exponent is not None:
        return smooth_scales(x, w, fold.exponent)
    baseline = x.sort(descending=True).values[int(DGQ_RANK * len(x))]
    return (x / baseline).clamp_min(1.0) if baseline > 0 else torch.ones_like(x)
