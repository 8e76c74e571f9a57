"""Scales while they are chosen: what their stored form can say, and what blocks share.

    half   the nearest 16-bit number, never 0
    e8m0   the least power of two that is not smaller (rule `ceil`; the codec asks for smaller ones)
    m1     the same: 2^ceil(log2 s)                           ZeroQuant-FP's M1
    e4m3   E4M3(s * global) / global, global = 448 * largest / absmax of the matrix
    dq     u * super, super a 127th of the largest scale among 64 rows
    m2     super / 2^k, the least that is not smaller         ZeroQuant-FP's M2, groups of a row
    dual   u * super, u >= 1                                  DGQ

DGQ (Zhang et al., 2023) chooses super of a row by trying 80 values from absmax/127 down to 22 % of
it, given group scales found first; ours searches the group scales by this codec's own clipping
ratios instead of 20 steps from 1.02 to 0.82, keeps v * u within +-127, and weights errors by
diag(H).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from bitnest.formats import BlockFormat, integer
from bitnest.formats.block import DQ_ROWS
from bitnest.kernels.scales import (
    GREATEST_E4M3,
    LEAST_PEAK,
    as_e4m3,
    as_half,
    dq_super,
    exponent_above,
    least_super,
    power_of_two,
)

if TYPE_CHECKING:
    from bitnest.quantize.codecs.block import BlockCodec

SUPER_STEPS, SUPER_FIRST, SUPER_LAST = 80, 1.0, 0.22
MAX_SHIFT = 15
MAX_DUAL = 127  # v times it must fit int8


@dataclass(frozen=True)
class Shared:
    """What blocks of one matrix have in common.

    scale: global (B, 1, 1) of e4m3, super (B, 1, O) of m2 and dual. table: entries of a table,
    (L, 1), (B, L, 1) for a matrix or (B, L, O) for its rows.
    """

    scale: torch.Tensor | None = None
    table: torch.Tensor | None = None

    @property
    def free(self) -> bool:
        """Whether nothing here belongs to single rows."""
        return all(t is None or t.shape[-1] == 1 for t in (self.scale, self.table))

    def rows(self, rows: slice) -> Shared:
        """The same for some of the rows, of all batch entries."""
        scale, table = (
            t if t is None or t.shape[-1] == 1 else t[..., rows] for t in (self.scale, self.table)
        )
        return Shared(scale, table)

    def of(self, b: int, rows: slice) -> Shared:
        """The part of batch entry b and some of its rows, without the batch axis."""
        scale, table = self.scale, self.table
        if scale is not None:
            scale = scale[b] if scale.shape[-1] == 1 else scale[b, :, rows]
        if table is not None and table.dim() == 3:
            table = table[b] if table.shape[-1] == 1 else table[b, :, rows]
        return Shared(scale, table)


def project(
    scale: torch.Tensor, fmt: BlockFormat, half: torch.dtype, shared: Shared
) -> torch.Tensor:
    """The scale as it will be read back, never zero. scale: (..., O)."""
    if fmt.scale == "half":
        return as_half(scale, half)
    if fmt.scale in {"e8m0", "m1"}:
        return power_of_two(exponent_above(scale))
    if fmt.scale == "dq":
        top = dq_super(scale, half).repeat_interleave(DQ_ROWS, dim=-1)[..., : scale.shape[-1]]
        code = (scale / top).round().clamp_(-127, 127)
        return torch.where(code == 0, 1.0, code).mul_(top)
    assert shared.scale is not None
    if fmt.scale == "e4m3":
        return as_e4m3(scale, shared.scale)
    ratio = scale / shared.scale
    if fmt.scale == "m2":
        return torch.ldexp(shared.scale, exponent_above(ratio).clamp(-MAX_SHIFT, 0))
    return ratio.round_().clamp_(1, MAX_DUAL).mul_(shared.scale)


def share(x: torch.Tensor, rows: int | None, how: Literal["sum", "min", "max"]) -> torch.Tensor:
    """x (..., O) reduced over each `rows` rows (None: all), and spread over them again."""
    if rows == 1:
        return x
    rows = x.shape[-1] if rows is None else min(rows, x.shape[-1])
    fill = {"sum": 0.0, "min": float("inf"), "max": -float("inf")}[how]
    tiles = torch.nn.functional.pad(x, (0, -x.shape[-1] % rows), value=fill).unflatten(
        -1, (-1, rows)
    )
    reduced = {"sum": tiles.sum, "min": tiles.amin, "max": tiles.amax}[how](-1, keepdim=True)
    return reduced.expand_as(tiles).flatten(-2)[..., : x.shape[-1]]


def shared_scales(codec: BlockCodec, w: torch.Tensor, h: torch.Tensor | None) -> Shared:
    """global of e4m3; super of m2 and dual. w: (B, I, O). h: (B, I, 1) or None."""
    if codec.fmt.scale == "e4m3":
        peak = w.abs().amax((1, 2), keepdim=True).clamp_min(LEAST_PEAK)
        return Shared(scale=GREATEST_E4M3 * codec.largest / peak)
    peak = w.abs().amax(1, keepdim=True)
    tiny = least_super(codec.half)
    if codec.fmt.scale == "m2":
        return Shared(scale=(peak / codec.largest).to(codec.half).float().clamp_min(tiny))
    return Shared(scale=_dual_super(codec, w, h, peak, tiny))


def _dual_super(
    codec: BlockCodec, w: torch.Tensor, h: torch.Tensor | None, peak: torch.Tensor, tiny: float
) -> torch.Tensor:
    """DGQ's second phase: the row's int8 step, given group scales."""
    g = codec.fmt.group_size(w.shape[1])
    plain = replace(codec, fmt=integer(4, codec.fmt.group, symmetric=False))
    groups = [slice(a, min(a + g, w.shape[1])) for a in range(0, w.shape[1], g)]
    first = [plain.fit(w[:, k], None if h is None else h[:, k], Shared()) for k in groups]
    best = least = None
    for i in range(SUPER_STEPS):
        ratio = SUPER_FIRST + (SUPER_LAST - SUPER_FIRST) * i / (SUPER_STEPS - 1)
        step = (peak * (ratio / 127)).to(codec.half).float().clamp_min(tiny)
        shared, error = Shared(scale=step), torch.zeros_like(peak)
        for k, grid in zip(groups, first, strict=True):
            error += codec.dual_error(w[:, k], None if h is None else h[:, k], grid, shared)
        if best is None or least is None:
            best, least = step, error
        else:
            best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    assert best is not None
    return best
