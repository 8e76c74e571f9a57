"""mat: uniform codes chosen for all widths, after MatGPTQ.

One sweep of GPTQ over one copy of the weights. Of all codes q of the widest width the one is chosen
that minimises sum_k l_k (x - decode_k(q))^2; the mean of the widths' errors, weighted by l_k, moves
the weights still to come. Then scale and zero of every width are fitted to the codes, least squares
under diag(H): decode_w = scale[o, g] (a_w (q_w + 1/2) + b_w), two numbers for each width.

Differs from MatGPTQ: a narrower code is the first bits of the wider one and stands for the middle
of its cell, where MatGPTQ rounds with the next bit, which needs one more plane than the width says;
and (a, b) are fitted, which MatGPTQ does not do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bitnest.formats.nested import NestedFormat
from bitnest.kernels.nested import choose, split_planes
from bitnest.quantize.gptq import column_order, gather_rows, inverse_factor
from bitnest.quantize.nested.tree import shares

RATIOS = tuple(0.4 + 0.05 * i for i in range(13))  # of a group's largest weight


@dataclass
class Uniform:
    """One solved matrix. codes: (O, I) uint8 of the widest width. scales: (O, G). lines: (a, b) by
    width. weight: (O, I) at the widest width."""

    fmt: NestedFormat
    codes: torch.Tensor
    scales: torch.Tensor
    lines: dict[int, torch.Tensor]
    weight: torch.Tensor

    def store(self, half: torch.dtype) -> dict[str, torch.Tensor]:
        """Its tensors as the format lays them out."""
        lines = {f"affine{w}": line.to(half) for w, line in self.lines.items()}
        planes = split_planes(self.codes, self.fmt)
        return {**planes, "scales": self.scales.to(half).contiguous(), **lines}


def uniform_table(width: int) -> torch.Tensor:
    """Middles of 2^width equal cells of [-1, 1], float32."""
    return (torch.arange(1 << width) + 0.5) * (2.0 / (1 << width)) - 1.0


def solve_uniform(
    weight: torch.Tensor,
    hessian: torch.Tensor | None,
    fmt: NestedFormat,
    *,
    half: torch.dtype = torch.bfloat16,
    damp: float = 0.03,
    weights: Mapping[int, float] | None = None,
) -> Uniform:
    """Codes, scales and lines of weight (O, I) float32 under hessian (I, I), or none."""
    columns = weight.shape[1]
    h = torch.eye(columns, device=weight.device) if hessian is None else hessian
    g, top = fmt.group_size(columns), fmt.widths[-1]
    share = shares(fmt.widths, weights)
    part = share / share.sum()
    tables = [uniform_table(w).to(weight.device) for w in fmt.widths]
    order = column_order(h.diagonal()[None], g)
    x = gather_rows(weight.T[None], order)[0].clone()
    permuted = gather_rows(gather_rows(h[None], order).transpose(1, 2), order)
    factor = inverse_factor(permuted, damp)[0]
    importance = permuted[0].diagonal()
    codes = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    scales = x.new_zeros(fmt.groups(columns), x.shape[1])
    for start in range(0, columns, g):
        stop = min(start + g, columns)
        scale = _fit_scale(x[start:stop], importance[start:stop], tables, share, half)
        scales[int(order[0, start]) // g] = scale
        errors = torch.empty_like(x[start:stop])
        for j in range(start, stop):
            target = (x[j] / scale).expand(len(tables), -1)
            code = codes[j] = choose(target, tables, share)
            level = sum(
                p * t[(code >> (top - w)).long()]
                for p, t, w in zip(part, tables, fmt.widths, strict=True)
            )
            miss = errors[j - start] = (x[j] - level * scale) / factor[j, j]
            x[j + 1 : stop] -= factor[j, j + 1 : stop, None] * miss
        if stop < columns:
            x[stop:] -= factor[start:stop, stop:].T @ errors
    back = order[0].argsort()
    codes = codes[back].T.contiguous()
    scales = scales.T.contiguous()
    return _with_lines(weight, h.diagonal(), fmt, codes, scales, half)


def _fit_scale(
    x: torch.Tensor, h: torch.Tensor, tables: list[torch.Tensor], share: torch.Tensor,
    half: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """A group's scale (O,): of some ratios of its largest weight the one of least error."""
    peak = x.abs().amax(0).clamp_min(1e-20)
    weights = h[:, None] / h.mean().clamp_min(1e-30)
    best, least = peak, torch.full_like(peak, torch.inf)
    for ratio in RATIOS:
        scale = (peak * ratio).to(half).float()
        error = torch.zeros_like(peak)
        for part, table in zip(share, tables, strict=True):
            count = len(table)
            near = ((x / scale + 1) * (count / 2)).floor_().clamp_(0, count - 1)
            near = (near + 0.5) * (2.0 / count) - 1.0
            error += part * ((x - near * scale).square_() * weights).sum(0)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best.to(half).float().clamp_min(torch.finfo(half).tiny)


def _with_lines(
    weight: torch.Tensor,
    h: torch.Tensor,
    fmt: NestedFormat,
    codes: torch.Tensor,
    scales: torch.Tensor,
    half: torch.dtype,
) -> Uniform:
    """(a, b) of every width: least squares under diag(H)."""
    columns, top = weight.shape[1], fmt.widths[-1]
    spread = scales.repeat_interleave(fmt.group_size(columns), dim=1)[:, :columns]
    lines: dict[int, torch.Tensor] = {}
    decoded = weight
    for width in fmt.widths:
        place = (codes >> (top - width)).float().add_(0.5)
        one, two = (spread * place).double(), spread.double()
        hd, wd = h.double(), weight.double()
        left = torch.tensor([
            [float((one * one * hd).sum()), float((one * two * hd).sum())],
            [float((one * two * hd).sum()), float((two * two * hd).sum())],
        ], dtype=torch.float64)  # fmt: skip
        right = torch.tensor([float((one * wd * hd).sum()), float((two * wd * hd).sum())])
        line = torch.linalg.lstsq(left, right.double()[:, None]).solution[:, 0]
        if not bool(line.isfinite().all()):
            line = torch.tensor([2.0 / (1 << width), -1.0])
        lines[width] = line.to(half).float()
        a, b = lines[width].to(weight.device)
        decoded = (place * a + b) * spread
    return Uniform(fmt, codes, scales, lines, decoded)
