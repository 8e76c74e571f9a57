"""What fates of experts cost their layer: relative errors on the sample of a probe (`probe`).

    zero        the expert gives nothing, its gate is lost: what sensitivity's losses are held by
    drop        it and its router row are gone; taken in the order of `scores.elimination`, each the
                error that it adds once those before it are gone, so that two experts that stand in
                for each other are not both free. None where a router chooses among groups
    constant    it gives its mean output over the tokens that choose it
    copy        it gives what it reads
    merge       it and its partner become the mean of their weights, by how often each is chosen

Partners are chosen at least as often as the expert itself, so that it is the expert that goes; of
those whose outputs come nearest on its tokens, TRIED are merged with it in earnest. Experts with
biases are not merged. Neurons are not aligned before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bitnest.calibrate.collector import dense_weights
from bitnest.calibrate.data import CalibrationSet
from bitnest.kernels.experts import expert_output
from bitnest.progress import Progress
from bitnest.prune.experts.probe import LayerProbe, probe_layers
from bitnest.prune.experts.scores import elimination
from bitnest.skeleton import Skeleton

TRIED = 2


def measure_fates(
    skeleton: Skeleton,
    calibration: CalibrationSet,
    kinds: Sequence[str],
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
) -> list[dict[str, Any]]:
    """By layer of experts: its block ("layer"), lists by expert of "zero" and every fate of
    `kinds`, None where it cannot have it, and with merge the "partner" of each, -1 for none.

    Raises:
        UnsupportedModel: a family whose layers of experts cannot be probed.
    """
    probes = probe_layers(skeleton, calibration, dtype=dtype, device=device, progress=progress)
    return [layer_fates(probe, kinds) for probe in probes]


def layer_fates(probe: LayerProbe, kinds: Sequence[str]) -> dict[str, Any]:
    """See `measure_fates`."""
    every = range(probe.experts)
    nothing = torch.zeros_like(probe.target[0])
    found: dict[str, Any] = {
        "layer": probe.block,
        "zero": [probe.replaced({e: nothing}) for e in every],
    }
    if "drop" in kinds:
        found["drop"] = _drops(probe)
    if "constant" in kinds:
        found["constant"] = [probe.replaced({e: mean_output(probe, e)}) for e in every]
    if "copy" in kinds:
        read = probe.read.float()
        found["copy"] = [probe.replaced({e: read}) for e in every]
    if "merge" in kinds:
        counts = [int((probe.index == e).any(1).sum()) for e in every]
        pairs = [_merged(probe, e, counts) for e in every]
        found["merge"] = [error for error, _ in pairs]
        found["partner"] = [partner for _, partner in pairs]
    return found


def mean_output(probe: LayerProbe, expert: int) -> torch.Tensor:
    """Over the tokens that choose it, (hidden,); zeros if none does."""
    chosen = (probe.index == expert).any(1)
    if not chosen.any():
        return torch.zeros_like(probe.target[0])
    return probe.outputs[expert][chosen].mean(0)


def _drops(probe: LayerProbe) -> list[float | None]:
    """Added error of every expert along the order, None for those that must stay: all of them where
    the router chooses among groups, of which no one may lose more rows than the others."""
    found: list[float | None] = [None] * probe.experts
    if probe.groups > 1:
        return found
    before = last = 0.0
    for expert, error in elimination(probe, probe.top_k):
        last = found[expert] = max(error - before, last)  # never cheaper than one that went before
        before = error
    return found


def _merged(probe: LayerProbe, expert: int, counts: Sequence[int]) -> tuple[float | None, int]:
    """Least error of a merger with an expert that is chosen as often or more, and which. counts:
    tokens of each."""
    own = counts[expert]
    larger = [e for e in range(probe.experts) if (counts[e], e) > (own, expert)]
    if getattr(probe.module, "has_bias", False) or not larger:
        return None, -1
    gate = probe.gate(expert)
    chosen = gate != 0
    weight = (gate.square() * probe.weight)[chosen]
    mine = probe.outputs[expert][chosen]

    def near(partner: int) -> float:
        apart = (mine - probe.outputs[partner][chosen]).square().sum(1)
        return float((apart * weight).sum())

    tried = sorted(larger, key=near)[:TRIED]
    shares = [own / max(1, own + counts[e]) for e in tried]
    return min((_exact(probe, expert, e, share), e) for e, share in zip(tried, shares, strict=True))


def _exact(probe: LayerProbe, expert: int, partner: int, share: float) -> float:
    dense = dense_weights(probe.module)

    def weights(_: int, param: str) -> torch.Tensor:
        mixed = share * dense(expert, param).float() + (1 - share) * dense(partner, param).float()
        return mixed.to(probe.module.down_proj.dtype)

    rows = probe.read.to(probe.module.down_proj.dtype)
    output = expert_output(probe.module, weights, partner, rows).float()
    return probe.replaced({expert: output, partner: output})
