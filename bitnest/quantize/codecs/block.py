"""The block codec: choosing scales, zero points and tables, rounding, storing.

For one block of weights w with importance h (the diagonal of H, or ones):

    v = snap(w / scale)        the nearest number the element has: an integer in range, a small
    w_hat = v * scale          float, an entry of a table

`fit` minimises sum h (w - w_hat)^2 over clipping ratios of the absolute maximum (over neighbouring
exponents where scales are powers of two), then alternates least squares: scale given v, v given
scale. Every scale is projected on the values its stored form can have before any weight is rounded
with it, so what is fitted is what is decoded.

A 16-bit or int8 scale may be negative: the one extra negative code of a symmetric integer then lies
on the side that needs it, no extra bytes, and every engine that multiplies decodes it.

Arrays are laid out (..., g, O), input channel before output row: the GPTQ sweep walks along input
channels and wants them contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from bitnest.formats import BlockFormat
from bitnest.formats.block import DQ_ROWS
from bitnest.formats.elements import (
    TRITS_PER_WORD,
    FloatElement,
    IntElement,
    TableElement,
    TernaryElement,
)
from bitnest.kernels.decode import NF4
from bitnest.kernels.encode import DEFAULT_RATIOS, RATIOS, REFITS, TINY
from bitnest.kernels.minifloat import encode, round_to
from bitnest.kernels.packing import pack_bits
from bitnest.kernels.scales import pack_scales, power_of_two
from bitnest.kernels.segments import pack_segments
from bitnest.kernels.trits import encode_trits, pack_trits
from bitnest.quantize.codecs.scales import Shared, project, share, shared_scales
from bitnest.quantize.codecs.tables import learn_table, nearest, table_codes

INT8_TOP = 127
EVEN_TRITS = 85  # 256ths of zeros for which every word of the entropy code holds 10 trits or more


@dataclass
class Grid:
    """What weights of one block are rounded to, for every row.

    scale: (..., 1, O) float32. zero: the same shape, None if not stored. low, high: bounds of v
    for integers. table: ascending entries (..., L, O or 1).
    """

    scale: torch.Tensor
    zero: torch.Tensor | None = None
    low: torch.Tensor | float = 0.0
    high: torch.Tensor | float = 0.0
    table: torch.Tensor | None = None


@dataclass(frozen=True)
class BlockCodec:
    """Fits and rounds weights of one block format.

    half: stored type of 16-bit scales. clip: search clipping ratios; without it the scale covers
    the absolute maximum (or the full range), as plain round-to-nearest does.
    """

    fmt: BlockFormat
    half: torch.dtype = torch.bfloat16
    clip: bool = True

    @property
    def element(self) -> IntElement | FloatElement | TableElement | TernaryElement:
        """What a code stands for."""
        return self.fmt.element

    @property
    def refits(self) -> bool:
        """Whether scales can be fitted once more to codes already chosen."""
        table_only = self.fmt.learned and self.fmt.group is None
        return self.fmt.rows == 1 and self.fmt.scale in {"half", "dq", "e4m3"} and not table_only

    def prepare(self, w: torch.Tensor, h: torch.Tensor | None) -> Shared:
        """What groups of a row, or rows of the matrix, share; fitted to the whole matrix.

        w: (B, I, O) float32. h: (B, I, 1) or None.
        """
        if self.fmt.learned:
            return Shared(table=learn_table(w, h, self.fmt, self.half))
        rows = self.fmt.scale in {"e4m3", "m2", "dual"}
        shared = shared_scales(self, w, h) if rows else Shared()
        if isinstance(self.element, TableElement):
            return replace(shared, table=torch.tensor(NF4, device=w.device)[:, None])
        return shared

    def fit(self, w: torch.Tensor, h: torch.Tensor | None, shared: Shared) -> Grid:
        """The grid of least weighted error for one group.

        w: (..., g, O) float32. h: importance per channel, (..., g, 1), or None for ones.
        """
        if self.fmt.learned and self.fmt.group is None:
            return Grid(torch.ones_like(w[..., :1, :]), table=shared.table)
        if not self.clip:
            return self._range_grid(w, 1.0, shared)
        weight = torch.ones_like(w[..., :1]) if h is None else h.clamp_min(TINY)
        candidates = self._candidates(w, shared)
        best = next(candidates)
        plain, least = best, self._error(w, weight, best)
        for other in candidates:
            best, least = self._better(w, weight, best, least, other)
        if self.fmt.scale not in {"e8m0", "m1"}:
            for _ in range(REFITS):
                other = self._refit(w, weight, best, shared)
                best, least = self._better(w, weight, best, least, other)
        return self._agree(w, weight, plain, best, shared) if self.fmt.scale == "dq" else best

    def snap(self, w: torch.Tensor, grid: Grid) -> torch.Tensor:
        """v: the nearest number to w / scale that a code stands for, less the zero point."""
        x = w / grid.scale
        element = self.element
        if isinstance(element, FloatElement):
            return round_to(x, element.spec)
        if isinstance(element, TableElement):
            assert grid.table is not None
            return nearest(x, grid.table)
        if element.bits == 1 and element.symmetric:
            return torch.where(x > 0, 0.5, -0.5)
        return torch.clamp(x.round_(), grid.low, grid.high, out=x)  # type: ignore[arg-type]

    def dual_error(
        self, w: torch.Tensor, h: torch.Tensor | None, grid: Grid, shared: Shared
    ) -> torch.Tensor:
        """Error of one group when its scale must be a multiple of the row's; (..., 1, O)."""
        assert grid.zero is not None
        scale = self._project(grid.scale, shared)
        zero = (grid.zero * grid.scale / scale).round_().clamp_(0, (1 << int(self.fmt.bits)) - 1)
        weight = torch.ones_like(w[..., :1]) if h is None else h.clamp_min(TINY)
        return self._error(w, weight, self._with_zero(scale, zero, shared))

    def codes(self, v: torch.Tensor, zeros: torch.Tensor | None, shared: Shared) -> torch.Tensor:
        """Codes of v (O, I), uint8. zeros: spread over the columns, (O, I), if stored."""
        element = self.element
        if isinstance(element, FloatElement):
            return encode(v, element.spec)
        if isinstance(element, TableElement):
            assert shared.table is not None
            return table_codes(
                v, shared.table.T.squeeze(0) if shared.table.shape[-1] == 1 else shared.table.T
            )
        return (v + (element.zero if zeros is None else zeros)).to(torch.uint8)

    def store(
        self,
        v: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        shared: Shared,
    ) -> dict[str, torch.Tensor]:
        """Packed tensors of one weight: v (O, I), scales and zeros (O, G)."""
        fmt, columns = self.fmt, v.shape[1]
        step = 1 if fmt.rows == 1 else (len(v) if fmt.rows is None else fmt.rows)
        spread = None
        if zeros is not None:
            spread = zeros.repeat_interleave(fmt.group_size(columns), dim=1)[:, :columns]
        stored = self.pack(self.codes(v, spread, shared))
        if fmt.learned:
            assert shared.table is not None
            stored["table"] = shared.table.T.squeeze(0).to(self.half).contiguous()
            if fmt.group is None:
                stored["table"] = shared.table.T.to(self.half).contiguous()
                return stored
        stored.update(pack_scales(scales[::step], fmt, self.half, _column(shared.scale)))
        if zeros is not None:
            packed = pack_bits(zeros[::step].T, int(fmt.bits))
            stored["zeros"] = packed.T.contiguous()
        return stored

    def pack(self, codes: torch.Tensor) -> dict[str, torch.Tensor]:
        """Codes (O, I) as they are stored."""
        element = self.element
        if isinstance(element, FloatElement):
            return pack_segments(codes, element.bits)
        if not isinstance(element, TernaryElement):
            return {"codes": pack_bits(codes, element.bits)}
        if not element.coded:
            return {"codes": pack_trits(codes)}
        stream = encode_trits(codes)
        if len(stream.words) > len(codes) * -(-codes.shape[1] // TRITS_PER_WORD):
            stream = encode_trits(codes, EVEN_TRITS)  # rows unlike each other: the bound holds
        share_of_zeros = torch.tensor([stream.k], dtype=torch.uint8)
        return {"codes": stream.words, "starts": stream.offsets, "zeros_share": share_of_zeros}

    def _candidates(self, w: torch.Tensor, shared: Shared) -> Iterator[Grid]:
        """Grids worth comparing, the one without clipping first."""
        if self.fmt.scale in {"e8m0", "m1"}:
            yield self._range_grid(w, 1.0, shared)
            if not self.fmt.rule and self.fmt.scale == "e8m0":
                for ratio in (0.5, 0.25):
                    yield self._range_grid(w, ratio, shared)
            return
        first, last, count = RATIOS.get(self.fmt.bits, DEFAULT_RATIOS)
        for i in reversed(range(count)):
            yield self._range_grid(w, first + (last - first) * i / (count - 1), shared)
        element = self.element
        two_sided = isinstance(element, IntElement) and element.symmetric and element.bits > 1
        if two_sided and not self.fmt.balanced:
            for i in range(count):
                ratio = first + (last - first) * i / (count - 1)
                yield self._range_grid(w, ratio, shared, full=True)

    def _range_grid(
        self, w: torch.Tensor, ratio: float, shared: Shared, full: bool = False
    ) -> Grid:
        """The grid that covers `ratio` of the range. full: by the integer's whole, lopsided range,
        the extra code on the larger side."""
        if not self.fmt.symmetric:
            low = share(w.amin(-2, keepdim=True).clamp_max(0), self.fmt.rows, "min") * ratio
            high = share(w.amax(-2, keepdim=True).clamp_min(0), self.fmt.rows, "max") * ratio
            top = (1 << int(self.fmt.bits)) - 1
            scale = self._project((high - low) / top, shared)
            return self._with_zero(scale, (-low / scale).round_().clamp_(0, top), shared)
        if full:
            low = share(w.amin(-2, keepdim=True), self.fmt.rows, "min")
            high = share(w.amax(-2, keepdim=True), self.fmt.rows, "max")
            peak = torch.where(-low >= high, -low, -high)
            return self._symmetric(self._project(peak * (ratio / self._half), shared), shared)
        peak = share(w.abs().amax(-2, keepdim=True), self.fmt.rows, "max")
        if self.fmt.rule == "ocp":  # floor(log2 peak) - emax, emax that of the largest value
            exponent = torch.frexp(peak).exponent - math.frexp(self.largest)[1]
            return self._symmetric(power_of_two(exponent), shared)
        # divided first: a peak of largest * 2^k then has the exact scale 2^k
        return self._symmetric(self._project(peak / self.largest * ratio, shared), shared)

    @property
    def _half(self) -> int:
        return 1 << (int(self.fmt.bits) - 1)

    @property
    def largest(self) -> float:
        """The largest v that has its negative."""
        element = self.element
        if isinstance(element, FloatElement):
            return element.spec.largest
        if isinstance(element, IntElement):
            return 0.5 if element.bits == 1 else self._half - 1
        return 1.0

    def _symmetric(self, scale: torch.Tensor, shared: Shared) -> Grid:
        if isinstance(self.element, TableElement):
            return Grid(scale, table=shared.table)
        if isinstance(self.element, TernaryElement):
            return Grid(scale, low=-1.0, high=1.0)
        if isinstance(self.element, IntElement) and self.element.bits > 1:
            high = float(self._half - 1)
            return Grid(scale, low=-high if self.fmt.balanced else -high - 1, high=high)
        return Grid(scale)

    def _with_zero(self, scale: torch.Tensor, zero: torch.Tensor, shared: Shared) -> Grid:
        low, high = -zero, (1 << int(self.fmt.bits)) - 1 - zero
        if self.fmt.scale == "dual":  # v times the integer scale must fit int8
            assert shared.scale is not None
            limit = (INT8_TOP / (scale / shared.scale).round()).floor()
            low, high = torch.maximum(low, -limit), torch.minimum(high, limit)
        return Grid(scale, zero, low, high)

    def _project(self, scale: torch.Tensor, shared: Shared) -> torch.Tensor:
        return project(scale, self.fmt, self.half, shared)

    def _refit(self, w: torch.Tensor, h: torch.Tensor, grid: Grid, shared: Shared) -> Grid:
        """Least squares for the scale, given v: s = <w, v> / <v, v>, weighted."""
        v = self.snap(w, grid)
        hv = v * h
        top = share((hv * w).sum(-2, keepdim=True), self.fmt.rows, "sum")
        bottom = share(hv.mul_(v).sum(-2, keepdim=True), self.fmt.rows, "sum")
        scale = torch.where(bottom > 0, top / bottom.clamp_min(TINY), grid.scale)
        if not self.fmt.signed_scale:
            scale = torch.where(scale > 0, scale, grid.scale)
        scale = self._project(scale, shared)
        if grid.zero is not None:
            return self._with_zero(scale, grid.zero, shared)
        return replace(grid, scale=scale)

    def _agree(
        self, w: torch.Tensor, h: torch.Tensor, plain: Grid, best: Grid, shared: Shared
    ) -> Grid:
        """Scales that rows chose apart, on the super-scale that DQ_ROWS of them share, where all of
        these rows together gain from that over no clipping."""
        best = replace(best, scale=self._project(best.scale, shared))
        least = share(self._error(w, h, plain), DQ_ROWS, "sum")
        better = share(self._error(w, h, best), DQ_ROWS, "sum") < least
        return _choose(better, best, plain)

    def _error(self, w: torch.Tensor, h: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Weighted squared error of the blocks."""
        miss = self.snap(w, grid).mul_(grid.scale).sub_(w)
        return share(miss.square_().mul_(h).sum(-2, keepdim=True), self.fmt.rows, "sum")

    def _better(
        self, w: torch.Tensor, h: torch.Tensor, best: Grid, least: torch.Tensor, other: Grid
    ) -> tuple[Grid, torch.Tensor]:
        """For each block the better of two grids, and its error."""
        error = self._error(w, h, other)
        better = error < least
        return _choose(better, other, best), torch.where(better, error, least)


def _choose(mask: torch.Tensor, one: Grid, other: Grid) -> Grid:
    """`one` for the rows where mask is set, else `other`; both of the same kind."""
    scale = torch.where(mask, one.scale, other.scale)
    if one.zero is None or other.zero is None:
        return replace(other, scale=scale)
    low = torch.where(mask, torch.as_tensor(one.low), torch.as_tensor(other.low))
    high = torch.where(mask, torch.as_tensor(one.high), torch.as_tensor(other.high))
    return Grid(scale, torch.where(mask, one.zero, other.zero), low, high)


def _column(scale: torch.Tensor | None) -> torch.Tensor | None:
    """Shared scales (1, O) or (1, 1) as a column beside scales (O, G)."""
    return None if scale is None else scale.T
