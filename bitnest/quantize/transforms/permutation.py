"""Orders of input channels, by how much energy they carry.

GPTQ rounds the channels that matter while others can still make up for it, and groups of channels
of like size waste less of a scale's range: both want descending diag(H). Three freedoms, from the
loosest: any order, an order that keeps groups together (so that stored groups stay contiguous
after undoing it), and an order within spans such as attention heads.

All sorts are stable, so equal statistics give the same order on every machine.
"""

from __future__ import annotations

import torch

from bitnest.quantize.transforms.per_matrix import Permutation


def by_energy(diagonal: torch.Tensor) -> Permutation:
    """Channels by descending diag(H), (I,)."""
    return Permutation(diagonal.argsort(descending=True, stable=True))


def by_energy_within(diagonal: torch.Tensor, span: int) -> Permutation:
    """Channels by descending diag(H) inside every `span` of neighbours; none leaves its span.

    A last span may be shorter.
    """
    parts = [
        start + part.argsort(descending=True, stable=True)
        for start, part in zip(range(0, len(diagonal), span), diagonal.split(span), strict=True)
    ]
    return Permutation(torch.cat(parts))


def by_group_energy(diagonal: torch.Tensor, group: int) -> Permutation:
    """Groups of `group` neighbours by descending sum of diag(H), channels within each likewise.

    Every group keeps its members, so one scale still serves the same channels. A shorter last group
    stays last, since moving it would shift the borders of the others.
    """
    inner = by_energy_within(diagonal, group).order
    whole = len(diagonal) // group * group
    energy = diagonal[:whole].unflatten(0, (-1, group)).sum(1)
    ranks = energy.argsort(descending=True, stable=True)
    order = inner[:whole].unflatten(0, (-1, group))[ranks].flatten()
    return Permutation(torch.cat([order, inner[whole:]]))
