"""Small floats on tensors: round to the nearest value, encode to codes, decode by table.

Rounding in float32, with 2^E the power of two below |x|:

    x    <- clamp(x, -largest, largest)
    step  = max(2^E, 2^min_exponent) * 2^-m       spacing of the values around x
    q     = round(x / step) * step                ties to the even multiple of step

Dividing and multiplying by a power of two is exact here, so `round` is the only rounding. A result
that carries into the next binade is that binade's first value, and a float32 subnormal has E masked
to nothing and so takes the smallest step. As in IEEE 754 a tie between two values of odd
significand, which happens between normal values when m = 0, goes to the larger magnitude.

Infinities saturate and NaN stays NaN. Up to `largest` this is the cast of torch and ml_dtypes. From
half a step beyond it theirs give infinity in e5m2, and in e4m3 NaN, or 448 in recent torch.

Left out: scales (the caller divides by them), stochastic rounding and gradients.
"""

from __future__ import annotations

import torch

from bitnest.formats.minifloat import MiniFloat

EXPONENT_MASK = 0x7F800000  # float32: 1 sign, 8 exponent (bias 127) and 23 mantissa bits


def round_to(x: torch.Tensor, spec: MiniFloat, out: torch.Tensor | None = None) -> torch.Tensor:
    """Float32 x to the nearest values of `spec`, saturating; the sign of zero is kept.

    out: where to write, which may be x itself (then a third faster). The seven passes run over
    slices that stay in cache, say 2^16 elements, four times as fast as over a whole weight.

    Raises:
        TypeError: x is not float32, whose bits the exponent is read from.
    """
    if x.dtype != torch.float32:
        raise TypeError(f"round_to takes float32, not {x.dtype}")
    largest = spec.largest
    q = torch.clamp(x, -largest, largest, out=out)
    step = (q.view(torch.int32) & EXPONENT_MASK).view(torch.float32)
    step.clamp_min_(spec.smallest_normal).mul_(2.0**-spec.mantissa)
    return q.div_(step).round_().mul_(step)


def encode(values: torch.Tensor, spec: MiniFloat) -> torch.Tensor:
    """Float32 values that `spec` represents exactly to codes, uint8, the sign bit above the others.

    The caller guarantees finite values, as `round_to` returns for finite or infinite input: any
    other value, NaN included, gives an arbitrary code.
    """
    bits = values.view(torch.int32)
    lowest = (spec.min_exponent + 127) << 23
    binade = (bits & EXPONENT_MASK).clamp_min_(lowest)
    # |v| in units of its step: below 2^m for subnormal, from 2^m for normal values
    units = values.abs().div_(binade.view(torch.float32)).mul_(1 << spec.mantissa)
    magnitude = units.to(torch.int32) + (((binade - lowest) >> 23) << spec.mantissa)
    return (magnitude | (bits < 0).to(torch.int32) << (spec.bits - 1)).to(torch.uint8)


def decode(
    codes: torch.Tensor, spec: MiniFloat, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Codes below 2^bits, uint8, to their values, NaN and infinities included.

    float32 and bfloat16 hold every value. float16 does not reach the top binade of e5m0 and e5m1,
    which it turns into infinities.
    """
    table = torch.tensor(spec.values(), dtype=dtype, device=codes.device)
    # index_select is three times as fast as table[codes] on a CPU
    return table.index_select(0, codes.flatten().to(torch.int32)).view(codes.shape)
