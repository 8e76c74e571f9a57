"""Scores: how much each expert of a layer gives. The lowest go first.

With g_te the gate of expert e for token t (0 where it is not chosen), over the sample of a probe:

    frequency   share of tokens that choose it
    gate        mean over tokens of g_te
    reap        mean over the tokens that choose it of g_te |E(x_t)| (REAP, Lasby et al. 2025)
    output      mean over tokens of (g_te |E(x_t)|)^2: the layer's error if it gave nothing
    fisher      half the sum over outputs r of mean_t (g_te E_r(x_t))^2 F_r: that error, as much as
                the model's predictions mind it. F_r: squared gradients at what the layer gives.
    relative    the layer's relative error without it, its router row cut out (ours; see `probe`)
    measured    none of these by itself: of the choices of relative, output and reap for the whole
                model the one whose KL to the original is lowest on the calibration text (ours)
    naee        not a score of one expert: every subset is tried, and that of least error kept
                (NAEE, Lu et al. 2024; its error is |y' - y|, ours is relative), where few are

`relative` is taken anew after every expert that goes: two that stand in for each other have both a
low score, but not any longer when one of them is gone. Scores only rise on the way, or nearly, so
those of the last round are bounds, and only the lowest are taken anew until one stays lowest.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import torch

from bitnest.errors import RecipeError
from bitnest.prune.experts.probe import LayerProbe

FEW = 2500  # subsets that are enumerated, at most
SCORES = ("measured", "relative", "reap", "frequency", "gate", "output", "fisher", "naee")
TRIED = ("relative", "output", "reap")  # by `measured`


def frequency(probe: LayerProbe) -> torch.Tensor:
    """See above, (E,) as all scores."""
    return torch.stack([(probe.index == e).any(1).float().mean() for e in range(probe.experts)])


def gate(probe: LayerProbe) -> torch.Tensor:
    """See above."""
    return torch.stack([probe.gate(e).mean() for e in range(probe.experts)])


def _given(probe: LayerProbe, expert: int) -> torch.Tensor:
    """g_te |E(x_t)|, (n,)."""
    return probe.gate(expert) * torch.linalg.vector_norm(probe.outputs[expert], dim=1)


def reap(probe: LayerProbe) -> torch.Tensor:
    """See above; 0 for an expert that no token chooses."""
    chosen = [(probe.index == e).any(1).sum().clamp_min(1) for e in range(probe.experts)]
    return torch.stack([_given(probe, e).sum() / chosen[e] for e in range(probe.experts)])


def output(probe: LayerProbe) -> torch.Tensor:
    """See above."""
    return torch.stack([_given(probe, e).square().mean() for e in range(probe.experts)])


def fisher(probe: LayerProbe, rows: torch.Tensor) -> torch.Tensor:
    """See above. rows: F, (hidden,)."""
    found = []
    for expert in range(probe.experts):
        given = probe.gate(expert)[:, None] * probe.outputs[expert]
        found.append(0.5 * (given.square().mean(0) * rows.to(given.device)).sum())
    return torch.stack(found)


def relative(probe: LayerProbe) -> torch.Tensor:
    """See above, each expert alone."""
    every = range(probe.experts)
    if probe.experts - 1 < probe.top_k:  # nothing can go
        return torch.full((probe.experts,), math.inf)
    return torch.tensor([probe.without([e for e in every if e != gone]) for gone in every])


SIMPLE: Mapping[str, Callable[[LayerProbe], torch.Tensor]] = {
    "frequency": frequency, "gate": gate, "reap": reap, "output": output, "relative": relative,
}  # fmt: skip


def elimination(probe: LayerProbe, least: int) -> list[tuple[int, float]]:
    """Experts in the order they go, until `least` are left, each with the layer's relative error
    once it is gone too."""
    known = dict(enumerate(relative(probe).tolist()))
    sure = set(known)  # whose errors are of what is left now
    order: list[tuple[int, float]] = []
    while len(known) > max(least, probe.top_k):
        free = [e for e in known if _may_go(probe, list(known), e, least)]
        while (expert := min(free, key=known.__getitem__)) not in sure:
            known[expert] = probe.without([e for e in known if e != expert])
            sure.add(expert)
        order.append((expert, known.pop(expert)))
        sure = set()
    return order


def _may_go(probe: LayerProbe, left: Sequence[int], expert: int, least: int) -> bool:
    """Whether its group has more left than its share of `least`."""
    size = probe.experts // probe.groups
    return sum(e // size == expert // size for e in left) > least // probe.groups


def _best_of_groups(probe: LayerProbe, score: torch.Tensor, keep: int) -> list[int]:
    """Of every group of the router as many, the best, ascending."""
    size, share = probe.experts // probe.groups, keep // probe.groups
    order = score.view(probe.groups, size).argsort(dim=1, descending=True, stable=True)[:, :share]
    return sorted((order + size * torch.arange(probe.groups)[:, None]).flatten().tolist())


def enumerated(probe: LayerProbe, keep: int) -> list[int]:
    """The subset of `keep` experts of least error.

    Raises:
        RecipeError: there are too many.
    """
    subsets = math.comb(probe.experts, keep)
    if subsets > FEW:
        raise RecipeError(
            f"{keep} of {probe.experts} experts: {subsets:,} subsets",
            where="--score naee",
            hint=f"it tries every one, up to {FEW:,}: --score relative",
        )
    every = [list(own) for own in combinations(range(probe.experts), keep)]
    size, share = probe.experts // probe.groups, keep // probe.groups
    if probe.groups > 1:
        every = [own for own in every if _even(own, size, share)]
    errors = [probe.without(own) for own in every]
    return every[errors.index(min(errors))]


def _even(kept: Sequence[int], size: int, share: int) -> bool:
    return set(Counter(e // size for e in kept).values()) == {share}


def ranked(probe: LayerProbe, score: str, keep: int, rows: torch.Tensor | None = None) -> list[int]:
    """The experts to keep, ascending; of a router's groups as many each. rows: for `fisher`.

    Raises:
        RecipeError: an unknown score, or too many subsets.
    """
    if score == "naee":
        return sorted(enumerated(probe, keep))
    if score == "relative":
        gone = {expert for expert, _ in elimination(probe, keep)}
        return [e for e in range(probe.experts) if e not in gone]
    if score == "fisher":
        if rows is None:
            raise RecipeError("the score 'fisher' needs gradients", hint="--statistics DIR")
        found = fisher(probe, rows)
    elif score in SIMPLE:
        found = SIMPLE[score](probe)
    else:
        raise RecipeError(f"unknown score '{score}'", hint="one of " + ", ".join(SCORES))
    return _best_of_groups(probe, found.cpu(), keep)
