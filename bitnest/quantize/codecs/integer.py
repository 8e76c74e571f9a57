"""The integer codec: choosing scales and zero points, rounding, storing.

For one group of weights w with importance h (the diagonal of H, or ones) and b bits:

    code = clamp(round(w / scale) + zero, 0, 2^b - 1)        w_hat = (code - zero) * scale

Symmetric: zero = 2^(b-1). The search minimises sum h (w - w_hat)^2 over clipping ratios of the
absolute maximum, then alternates least squares (scale given codes, codes given scale). The scale
may be negative, so that the one extra negative code lies on the side that needs it: no extra bytes,
and every engine that multiplies decodes it. Asymmetric: the same search over the range [min, max],
zero an integer, scale positive.

Scales are rounded to their stored 16-bit type before any code is chosen, so what is fitted is what
is decoded.

Arrays are laid out (..., g, O), input channel before output row: the GPTQ sweep walks along input
channels and wants them contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bitnest.formats import IntFormat
from bitnest.kernels.packing import pack_bits

RATIOS = {2: (0.35, 1.0, 14), 3: (0.5, 1.0, 11)}  # bits -> clip ratios: first, last, count
DEFAULT_RATIOS = (0.7, 1.0, 7)
REFITS = 2  # least-squares rounds after the ratio search
TINY = 1e-30


@dataclass
class Grid:
    """Scales and zero points of one group for every row: both (..., 1, O) float32."""

    scale: torch.Tensor
    zero: torch.Tensor


@dataclass(frozen=True)
class IntCodec:
    """Fits and rounds weights of one integer format.

    scale_dtype: stored type of the scales. clip: search clipping ratios; without it the scale
    covers the absolute maximum (or the full range), as plain round-to-nearest does.
    """

    fmt: IntFormat
    scale_dtype: torch.dtype = torch.bfloat16
    clip: bool = True

    @property
    def top(self) -> int:
        """Largest code."""
        return (1 << self.fmt.bits) - 1

    def fit(self, w: torch.Tensor, h: torch.Tensor | None = None) -> Grid:
        """The grid of least weighted error for one group.

        w: (..., g, O) float32. h: importance per channel, (..., g, 1), or None for ones.
        """
        weight = torch.ones_like(w[..., :1]) if h is None else h.clamp_min(TINY)
        if not self.clip:
            return self._range_grid(w, 1.0)
        best = self._range_grid(w, 1.0)
        least = self._error(w, weight, best)
        first, last, count = RATIOS.get(self.fmt.bits, DEFAULT_RATIOS)
        for i in range(count - 1):
            ratio = first + (last - first) * i / (count - 1)
            least = self._keep_better(w, weight, best, least, self._range_grid(w, ratio))
        if self.fmt.symmetric:
            for i in range(count):
                ratio = first + (last - first) * i / (count - 1)
                flipped = self._range_grid(w, ratio, full=True)
                least = self._keep_better(w, weight, best, least, flipped)
        for _ in range(REFITS):
            least = self._keep_better(w, weight, best, least, self._refit(w, weight, best))
        return best

    def codes(self, w: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Codes of w on the grid, float32 integers in [lowest, top]."""
        return (w / grid.scale).round_().add_(grid.zero).clamp_(0, self.top)

    @staticmethod
    def values(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The weights that the codes stand for."""
        return (codes - grid.zero).mul_(grid.scale)

    def store(
        self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Packed tensors of one weight: codes (O, I), scales (O, G), zeros (O, G) or None."""
        bits = self.fmt.bits
        stored = {"codes": pack_bits(codes, bits), "scales": scales.to(self.scale_dtype)}
        if not self.fmt.symmetric:
            assert zeros is not None
            stored["zeros"] = pack_bits(zeros.T, bits).T.contiguous()
        return stored

    def stored(self, scale: torch.Tensor) -> torch.Tensor:
        """The scale as it will be read back, never zero."""
        rounded = scale.to(self.scale_dtype).float()
        return torch.where(rounded == 0, torch.finfo(self.scale_dtype).tiny, rounded)

    def _range_grid(self, w: torch.Tensor, ratio: float, full: bool = False) -> Grid:
        if self.fmt.symmetric:
            half = 1 << (self.fmt.bits - 1)
            zero = torch.full_like(w[..., :1, :], half)
            if not full:
                peak = w.abs().amax(-2, keepdim=True)
                return Grid(self.stored(peak * (ratio / (half - 1))), zero)
            low, high = w.amin(-2, keepdim=True), w.amax(-2, keepdim=True)
            peak = torch.where(-low >= high, -low, -high)  # the larger side gets the extra code
            return Grid(self.stored(peak * (ratio / half)), zero)
        low = w.amin(-2, keepdim=True).clamp_max(0) * ratio
        high = w.amax(-2, keepdim=True).clamp_min(0) * ratio
        scale = self.stored((high - low) / self.top)
        return Grid(scale, (-low / scale).round_().clamp_(0, self.top))

    def _refit(self, w: torch.Tensor, h: torch.Tensor, grid: Grid) -> Grid:
        """Least squares for the scale, given the codes: s = <w, q> / <q, q>, weighted."""
        q = self.codes(w, grid).sub_(grid.zero)
        hq = q * h
        top = (hq * w).sum(-2, keepdim=True)
        bottom = hq.mul_(q).sum(-2, keepdim=True)
        scale = torch.where(bottom > 0, top / bottom.clamp_min(TINY), grid.scale)
        return Grid(self.stored(scale), grid.zero)

    def _error(self, w: torch.Tensor, h: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Weighted squared error; the clamp is moved by the zero point, which saves two passes."""
        lowest, top = -grid.zero, self.top - grid.zero
        miss = (w / grid.scale).round_().clamp_(lowest, top).mul_(grid.scale).sub_(w)
        return miss.square_().mul_(h).sum(-2, keepdim=True)

    def _keep_better(
        self, w: torch.Tensor, h: torch.Tensor, best: Grid, least: torch.Tensor, other: Grid
    ) -> torch.Tensor:
        error = self._error(w, h, other)
        better = error < least
        best.scale = torch.where(better, other.scale, best.scale)
        best.zero = torch.where(better, other.zero, best.zero)
        return torch.where(better, error, least)
