"""Channel scales that make rounding cheaper, with the exponent searched.

    SmoothQuant  s_j = max_t |x_tj|^a / max_i |w_ij|^(1 - a)
    AWQ          s_j = m_j^a,   m_j = mean_t |x_tj|, or sqrt(H_jj) where only H is known

    s normalised to s / sqrt(max s * min s), so that weights stay in the range they were in
    a in {0, 0.05, ... 0.95} and no scale at all, whichever gives the least

        tr(dW H dW^T),   dW = W - Q(W diag s) diag(1/s)

Both are exact in real numbers; a scale rounded to powers of two is exact in 16 bit too when folded.
No scale is always a candidate and wins ties, so the choice is never worse than none in this error.
SmoothQuant's error is also in its activations, which this does not measure: give a `quantize`
that includes them, or a fixed exponent, where activations are quantised.

Left out: AWQ's clip search, which belongs to the codec. Papers: SmoothQuant (2211.10438), AWQ
(2306.00978).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bitnest.quantize.transforms.per_matrix import ChannelScale

EXPONENTS = tuple(step / 20 for step in range(20))

Quantize = Callable[[torch.Tensor], torch.Tensor]
"""W (..., O, I) -> W_hat, the values that W is stored as."""


@dataclass(frozen=True, eq=False)
class Choice:
    """What the search found.

    scale: (I,), ones if none is best. exponent: None for no scale. error: tr(dW H dW^T) with it.
    plain: without any scale.
    """

    scale: torch.Tensor
    exponent: float | None
    error: float
    plain: float

    @property
    def transform(self) -> ChannelScale:
        """The scale as a transform."""
        return ChannelScale(self.scale)


def smooth_scales(x_max: torch.Tensor, w_max: torch.Tensor, a: float) -> torch.Tensor:
    """SmoothQuant's scales, normalised. x_max, w_max: largest magnitude per channel, (I,)."""
    return _normalise(_positive(x_max) ** a / _positive(w_max) ** (1 - a))


def awq_scales(magnitude: torch.Tensor, a: float) -> torch.Tensor:
    """AWQ's scales, normalised. magnitude: mean |x_j| or sqrt(H_jj), (I,)."""
    return _normalise(_positive(magnitude) ** a)


def nearest_power_of_two(scale: torch.Tensor) -> torch.Tensor:
    """The nearest powers of two, in the exponent."""
    return torch.exp2(scale.log2().round())


def total_error(weight: torch.Tensor, weight_hat: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(dW H dW^T), summed over the leading axes of W (..., O, I). hessian: (I, I)."""
    miss = (weight - weight_hat).reshape(-1, weight.shape[-1])
    return float(((miss @ hessian) * miss).sum(dtype=torch.float64))


def search(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    quantize: Quantize,
    *,
    x_max: torch.Tensor | None = None,
    magnitude: torch.Tensor | None = None,
    powers_of_two: bool = False,
) -> Choice:
    """The best scale for W (..., O, I) as `quantize` stores it; matrices sharing x go stacked.

    x_max: (I,) asks for SmoothQuant's scales; otherwise AWQ's, from `magnitude` (I,) or sqrt(H_jj).
    powers_of_two: round scales before they are tried.
    """
    best = plain = total_error(weight, quantize(weight), hessian)
    scale, exponent = hessian.new_ones(weight.shape[-1]), None
    for a in EXPONENTS:
        s = _candidate(weight, hessian, x_max, magnitude, a)
        transform = ChannelScale(nearest_power_of_two(s) if powers_of_two else s)
        decoded = transform.invert_weight(quantize(transform.apply_weight(weight)))
        error = total_error(weight, decoded, hessian)
        if error < best:
            best, scale, exponent = error, transform.scale, a
    return Choice(scale, exponent, best, plain)


def _candidate(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    x_max: torch.Tensor | None,
    magnitude: torch.Tensor | None,
    a: float,
) -> torch.Tensor:
    if x_max is not None:
        w_max = weight.abs().reshape(-1, weight.shape[-1]).amax(0).to(x_max.dtype)
        return smooth_scales(x_max, w_max, a)
    return awq_scales(hessian.diagonal().sqrt() if magnitude is None else magnitude, a)


def _positive(values: torch.Tensor) -> torch.Tensor:
    """Dead channels take the least positive value: a zero would make a scale 0 or infinite."""
    alive = values[values > 0]
    return values.clamp_min(alive.min()) if len(alive) else torch.ones_like(values)


def _normalise(scale: torch.Tensor) -> torch.Tensor:
    return scale / (scale.max() * scale.min()).sqrt()
