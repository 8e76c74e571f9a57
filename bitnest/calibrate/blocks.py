"""One block's statistics as named tensors, and back: the names `bitnest/statistics.py` lists."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from bitnest.calibrate.collector import symmetric
from bitnest.calibrate.input_errors import InputScored
from bitnest.calibrate.moments import Moments
from bitnest.calibrate.observe import ExpertSums, Observer
from bitnest.calibrate.sensitivity import Scored
from bitnest.kernels.moments import BLOCKS
from bitnest.sites import Site
from bitnest.statistics import Statistics

FIGURE_ROWS = 1 << 15  # of a matrix, looked at in one go
EXPERT_SUMS = ("norms", "output", "output2", "weight", "fitted", "logits", "logits2", "margins")


@dataclass(frozen=True)
class WeightFigures:
    """Of one matrix. columns: norms of its columns (I,). peaks, energy: see `Moments`."""

    columns: torch.Tensor
    peaks: torch.Tensor
    energy: float


def weight_figures(
    sites: Sequence[Site], parameter: Callable[[Site], torch.Tensor]
) -> dict[str, WeightFigures]:
    """Column norms and crest factors of every site's weight."""
    return {site.name: row_figures(site.view(parameter(site))) for site in sites}


def row_figures(matrix: torch.Tensor) -> WeightFigures:
    """Those of a matrix (O, I) of any float type, some rows at a time."""
    sums = Moments.zeros((), matrix.shape[1])
    for start in range(0, len(matrix), FIGURE_ROWS):
        sums.add((), matrix[start : start + FIGURE_ROWS].float().contiguous())
    return WeightFigures(sums.square.sqrt().float(), sums.peaks, float(sums.square.sum()))


def block_tensors(
    layer: int,
    sites: Sequence[Site],
    modules: Mapping[str, nn.Module],
    observer: Observer,
    scored: Mapping[str, Scored],
    weights: Mapping[str, WeightFigures],
    fisher: Mapping[str, torch.Tensor],
    *,
    keep_hessians: bool,
    formats: int,
    rounded: Mapping[str, InputScored],
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The block's record for the header, and its tensors."""
    tensors: dict[str, torch.Tensor] = {}
    inputs = list(observer.inputs.items())
    for i, (_, seen) in enumerate(inputs):
        put_moments(tensors, f"inputs.{i}", seen.moments)
        if keep_hessians and seen.hessian is not None:
            tensors[f"inputs.{i}.hessian"] = _symmetric(seen.hessian)
            tensors[f"inputs.{i}.weight"] = seen.weight
    fused = list(observer.fused.items())
    for i, (name, sums) in enumerate(fused):
        rows = torch.cat(observer.rows[name])
        _put_experts(tensors, f"experts.{i}", sums, rows, keep_hessians)
    tensors.update({f"fisher.{name}": rows for name, rows in fisher.items()})
    put_sites(tensors, sites, scored, weights, formats)
    if rounded and sites:
        missed = [rounded[site.name] for site in sites]
        tensors["sites.input_error"] = torch.stack([item.error for item in missed])
        losses = [item.loss for item in missed if item.loss is not None]
        if len(losses) == len(missed):
            tensors["sites.input_loss"] = torch.stack(losses)
    record = {
        "layer": layer,
        "inputs": [
            {"name": name, "readers": seen.readers, "width": seen.moments.width}
            for name, seen in inputs
        ],
        "experts": [
            {
                "name": name,
                "experts": int(modules[name].num_experts),  # type: ignore[arg-type]
                "top_k": sums.top_k,
            }
            for name, sums in fused
        ],
        "sites": [asdict(site) for site in sites],
    }
    return record, tensors


def read_moments(statistics: Statistics, layer: int, prefix: str) -> Moments:
    """The moments stored under `prefix` in one block."""
    return Moments(
        **{f.name: statistics.read(layer, f"{prefix}.{f.name}") for f in fields(Moments)}
    )


def put_moments(tensors: dict[str, torch.Tensor], prefix: str, moments: Moments) -> None:
    """Add the tensors of `moments` under `prefix`."""
    for f in fields(Moments):
        tensors[f"{prefix}.{f.name}"] = getattr(moments, f.name)


def _put_experts(
    tensors: dict[str, torch.Tensor],
    prefix: str,
    sums: ExpertSums,
    rows: torch.Tensor,
    keep_hessians: bool,
) -> None:
    put_moments(tensors, f"{prefix}.up", sums.up)
    put_moments(tensors, f"{prefix}.down", sums.down)
    for name in EXPERT_SUMS:
        value = getattr(sums, name)
        if value is not None:
            tensors[f"{prefix}.{name}"] = value
    tensors[f"{prefix}.trace"] = torch.cat(sums.trace)
    tensors[f"{prefix}.rows"] = rows
    if keep_hessians and sums.full:
        labels, experts = sums.tokens.shape
        for down, (key, width) in enumerate((("up", sums.up.width), ("down", sums.down.width))):
            empty = torch.zeros(labels, width, width)
            found = [_symmetric(sums.hessians[e][down]) if e in sums.hessians else empty
                     for e in range(experts)]  # fmt: skip
            tensors[f"{prefix}.hessian.{key}"] = torch.stack(found, dim=1)


def _symmetric(totals: torch.Tensor) -> torch.Tensor:
    """Whole matrices of sums (L, I, I) that `add_moment` made, on the CPU."""
    return torch.stack([symmetric(part.clone()) for part in totals]).cpu()


def put_sites(
    tensors: dict[str, torch.Tensor],
    sites: Sequence[Site],
    scored: Mapping[str, Scored],
    weights: Mapping[str, WeightFigures],
    formats: int,
) -> None:
    """Add what is stored of a layer's sites: figures of their weights, errors and losses."""
    if not sites:
        return
    tensors["sites.peaks"] = torch.stack([weights[site.name].peaks for site in sites])
    tensors["sites.energy"] = torch.tensor(
        [weights[site.name].energy for site in sites], dtype=torch.float64
    )
    for site in sites:
        tensors[f"columns.{site.name}"] = weights[site.name].columns
    if not formats:
        return
    own = [scored[site.name] for site in sites]
    tensors["sites.error"] = torch.stack([item.error for item in own]).float()
    tensors["sites.output"] = torch.tensor([item.output for item in own], dtype=torch.float64)
    losses = [item.loss for item in own if item.loss is not None]
    if len(losses) == len(own):
        tensors["sites.loss"] = torch.stack(losses)


def kappas(peaks: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
    """Effective crest factors (..., len(BLOCKS)) from peaks (..., len(BLOCKS)) and energy (...)."""
    assert peaks.shape[-1] == len(BLOCKS)
    ratio = peaks / energy.clamp_min(1e-300)[..., None]
    return torch.where(energy[..., None] > 0, ratio, 1.0).sqrt()
