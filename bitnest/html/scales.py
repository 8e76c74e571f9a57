"""From numbers to places: linear and log scales, their ticks, and numbers as people read them.

A tick lies on 1, 2 or 5 times a power of ten. Values that are missing, not finite, or not positive
on a logarithmic axis are not placed: charts leave them out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
MISSING = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
THIN = "\N{NARROW NO-BREAK SPACE}"


def finite(value: object) -> bool:
    """Whether a value is a number that can be drawn."""
    return isinstance(value, int | float) and math.isfinite(value)


def usable(values: Iterable[float | None], log: bool) -> list[float]:
    """The values that an axis can show."""
    return [v for v in values if v is not None and finite(v) and (v > 0 or not log)]


@dataclass(frozen=True)
class Scale:
    """A map of `low..high` onto `start..stop` (drawing units), linear or logarithmic."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def share(self, value: float) -> float:
        """Place of a value as a share of the scale, 0 at `low`, 1 at `high`."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def __call__(self, value: float) -> float:
        return self.start + self.share(value) * (self.stop - self.start)

    def has(self, value: float | None) -> bool:
        """Whether a value can be placed inside the scale."""
        if value is None or not finite(value) or (self.log and value <= 0):
            return False
        return -1e-9 <= self.share(value) <= 1 + 1e-9

    def ticks(self, about: int = 5) -> list[float]:
        """Round numbers inside the scale, near `about` of them."""
        return log_ticks(self.low, self.high, about) if self.log else linear_ticks(
            self.low, self.high, about)  # fmt: skip


def linear_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within `low..high`."""
    rough = (high - low) / max(about, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Powers of ten within `low..high`; with 2 and 5 between them where there is room, and evenly
    spaced ones where the range is too short for three of these."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = math.log10(high / low)
    if decades < 0.4:
        return _even_ticks(low, high, about)
    factors = (1, 2, 3, 5) if decades < 1.2 else (1, 2, 5) if decades < about / 2 else (1,)
    every = max(1, math.ceil(decades / about))
    candidates = [f * 10.0**e for e in range(first, last + 1) if e % every == 0 for f in factors]
    found = [t for t in candidates if low * 0.999 <= t <= high * 1.001]
    return found if len(found) > 2 or decades > 1.2 else _even_ticks(low, high, about)


def _even_ticks(low: float, high: float, about: int) -> list[float]:
    found = linear_ticks(low, high, about)
    return found if len(found) > 2 else linear_ticks(low, high, 2 * about)


def extent(values: Sequence[float], log: bool, zero: bool = False) -> tuple[float, float]:
    """Least and greatest with a little air; never an empty interval."""
    if not values:
        return (1.0, 10.0) if log else (0.0, 1.0)
    low, high = min(values), max(values)
    if log:
        air = (high / low) ** 0.04 if high > low else 2.0
        return low / air, high * air
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high <= low:
        air = abs(high) * 0.5 or 1.0
        return (low, high + air) if zero else (low - air, high + air)
    air = (high - low) * 0.04
    return (low - (0 if zero and low == 0 else air)), high + air


def short(value: float | None, digits: int = 3) -> str:
    """A number in a few characters: 12.3k, 0.042, 3·10⁻⁶; a dash where there is none."""
    if value is None or not finite(value):
        return MISSING
    size = abs(value)
    if size >= 1e15 or 0 < size < 1e-3:
        after = max(digits - 2, 0)
        decade = 10.0 ** math.floor(math.log10(size))
        if round(size / decade, after) >= 10:
            decade *= 10
        factor = f"{value / decade:.{after}f}".removesuffix(".0")
        return (
            power(decade) if factor == "1" else f"{factor}·{power(decade)}".replace("-", MINUS, 1)
        )
    for bound, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= bound:
            divisor = 1e3 if unit == "k" else bound
            return _digits(value / divisor, digits) + unit
    return _digits(value, digits)


def power(decade: float) -> str:
    """A power of ten with its exponent raised."""
    return f"10{str(round(math.log10(decade))).translate(SUPERSCRIPT)}"


def _digits(value: float, digits: int) -> str:
    if value == 0 or float(value).is_integer():
        return f"{value:.0f}".replace("-", MINUS)
    after = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:.{after}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return text.replace("-", MINUS)


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage with its sign."""
    if value is None or not finite(value):
        return MISSING
    return f"{100 * value:.{digits}f}{THIN}%".replace("-", MINUS)


def whole(value: float | None) -> str:
    """An integer with commas between thousands."""
    return MISSING if value is None or not finite(value) else f"{round(value):,}"
