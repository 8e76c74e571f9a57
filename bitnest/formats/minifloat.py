"""Floats of 2 to 8 bits: sign, `e` exponent bits, `m` mantissa bits, as pure arithmetic.

Bit layout of a code, most significant first:  s | e bits E | m bits M

    E > 0   (-1)^s * 2^(E - bias) * (1 + M / 2^m)     normal, bias = 2^(e-1) - 1
    E = 0   (-1)^s * 2^(1 - bias) * (M / 2^m)         subnormal, and both zeros

So the values grow with the code, and within a sign the code is the rank of the value. The codes
that are not numbers are the topmost of each sign:

    e4m3    1 per sign, NaN (the FN variant: no infinities)
    e5m2    4 per sign, infinity then three NaN, as in IEEE 754
    other   none, as OCP MX defines e3m2, e2m3 and e2m1

e = 1 has bias 0, and its values are evenly spaced: sign-magnitude integers times 2^(1-m).

Left out: tensors (`kernels.minifloat`), scales, and exponents without a sign (E8M0).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from bitnest.errors import FormatError

MAX_EXPONENT_BITS, MAX_MANTISSA_BITS, MAX_BITS = 5, 3, 8
_INFINITIES = {(5, 2): 1}  # per sign, below the NaN codes
_NANS = {(4, 3): 1, (5, 2): 3}  # per sign, topmost


@dataclass(frozen=True)
class MiniFloat:
    """A small float. exponent: 1 to 5 bits, mantissa: 0 to 3 bits, with the sign 8 bits at most.

    Raises:
        FormatError: a field out of range, or more than 8 bits in all.
    """

    exponent: int
    mantissa: int

    def __post_init__(self) -> None:
        if not (
            1 <= self.exponent <= MAX_EXPONENT_BITS
            and 0 <= self.mantissa <= MAX_MANTISSA_BITS
            and self.bits <= MAX_BITS
        ):
            raise FormatError(
                f"no small float has {self.exponent} exponent and {self.mantissa} mantissa bits: "
                f"1 to {MAX_EXPONENT_BITS}, 0 to {MAX_MANTISSA_BITS}, "
                f"and {MAX_BITS} bits with the sign",
                where=self.name,
                hint="for example e4m3, e5m2, e3m2, e2m3 or e2m1",
            )

    @property
    def name(self) -> str:
        """The field's spelling: e4m3."""
        return f"e{self.exponent}m{self.mantissa}"

    @property
    def bits(self) -> int:
        """Bits per code, the sign included."""
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        """What the exponent field exceeds the exponent by."""
        return (1 << (self.exponent - 1)) - 1

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal value, which the subnormal ones share."""
        return 1 - self.bias

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest finite value: e4m3 8, e5m2 15, e3m2 4, e2m3 and e2m1 2."""
        return math.frexp(self.largest)[1] - 1

    @property
    def largest(self) -> float:
        """Largest finite value: e4m3 448, e5m2 57344, e3m2 28, e2m3 7.5, e2m1 6."""
        return _magnitude(self, _finite_codes(self) - 1)

    @property
    def smallest_normal(self) -> float:
        """Smallest positive value of full precision."""
        return math.ldexp(1.0, self.min_exponent)

    @property
    def smallest_subnormal(self) -> float:
        """Smallest positive value; without mantissa bits it is the smallest normal one."""
        return math.ldexp(1.0, self.min_exponent - self.mantissa)

    @property
    def nan_codes(self) -> tuple[int, ...]:
        """Codes that are not a number, ascending; empty for all but e4m3 and e5m2."""
        return tuple(code for code, value in enumerate(self.values()) if math.isnan(value))

    @property
    def special_codes(self) -> tuple[int, ...]:
        """Codes that are not finite, ascending: NaN and, for e5m2, the infinities."""
        return tuple(code for code, value in enumerate(self.values()) if not math.isfinite(value))

    def values(self) -> tuple[float, ...]:
        """The value of every code, in code order, NaN and infinities included."""
        return _values(self)


@cache
def _values(spec: MiniFloat) -> tuple[float, ...]:
    fields = (spec.exponent, spec.mantissa)
    magnitudes = [_magnitude(spec, code) for code in range(_finite_codes(spec))]
    magnitudes += [math.inf] * _INFINITIES.get(fields, 0) + [math.nan] * _NANS.get(fields, 0)
    return tuple(math.copysign(value, sign) for sign in (1, -1) for value in magnitudes)


def _finite_codes(spec: MiniFloat) -> int:
    """Codes per sign that are numbers: the first ones."""
    fields = (spec.exponent, spec.mantissa)
    return (1 << (spec.bits - 1)) - _INFINITIES.get(fields, 0) - _NANS.get(fields, 0)


def _magnitude(spec: MiniFloat, code: int) -> float:
    field, fraction = divmod(code, 1 << spec.mantissa)
    leading = 1 << spec.mantissa if field else 0  # the normal values' implied one
    return math.ldexp(leading + fraction, max(field, 1) - spec.bias - spec.mantissa)
