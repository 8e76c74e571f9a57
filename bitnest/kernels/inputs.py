"""Rounding inputs as the model runs: the reference that every kernel is tested against.

With g channels to a scale, q the largest number and c the clip,

    float    s = c * absmax / q                     float32, division rounded to nearest; 1 for 0
    e8m0     s = 2^(floor(log2 absmax) - emax)      ocp, the default; `ceil`: the least power of two
                                                    under which nothing is clipped
    e4m3     s = E4M3(absmax / (q t)) t             t the static scale
    static   s = t

    code = clamp(round(x / s), -q, q)               ties to even; small floats: the nearest, see
                                                    `kernels/minifloat`

all in float32. Codes are finite: a NaN or an infinity makes the scale of its group NaN and the
group's codes 0, so that what its token gives is NaN, as it would be without rounding, and no other
token is touched; channels that stay as they are keep theirs. Scales below 2^-126 count as 1: such
numbers become 0. Static scales are chosen on a histogram of magnitudes (`Magnitudes`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from bitnest.errors import ArtifactError, DataError
from bitnest.formats.elements import FloatElement
from bitnest.formats.inputs import InputFormat
from bitnest.kernels.minifloat import round_to
from bitnest.kernels.scales import GREATEST_E4M3, LEAST_E4M3, as_e4m3, exponent_above, power_of_two

PERCENTILE = 0.9999
RATIOS = 64  # of the abs-max that the search of the least squared error tries
SMALLEST, GREATEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
DROPPED = 16  # bits of a float32 that a histogram leaves out: 128 bins to a binade
INFINITE = 0x7F800000 >> DROPPED  # bin of infinity; those of NaN follow


@dataclass(frozen=True)
class Coded:
    """Channels of x from `start` on, as codes.

    values: (T, n) float32, what codes stand for before their scale, finite. scales: (T, G) float32,
    of `group` channels each, positive or NaN. largest: magnitude that no value exceeds. kept:
    channels of these that stay as they are and whose values are 0, with x there (T, k); None: none.
    """

    start: int
    values: torch.Tensor
    scales: torch.Tensor
    group: int
    largest: float
    integer: bool
    kept: tuple[torch.Tensor, torch.Tensor] | None = None

    def decoded(self) -> torch.Tensor:
        """values * scales, (T, n)."""
        found = self.values * spread(self.scales, self.group, self.values.shape[1])
        if self.kept is not None:
            found[:, self.kept[0]] = self.kept[1]
        return found


def code_inputs(x: torch.Tensor, fmt: InputFormat, static: float | None = None) -> list[Coded]:
    """Round x (T, I) float32, each run of channels of one format by itself. static: the scale of a
    format that has one.

    Raises:
        ArtifactError: the format has one, and `static` is none.
    """
    check_static(fmt, static)
    wide = fmt.wide_of(x.shape[1])
    if fmt.wide is None or wide == 0:
        return [_coded(x, fmt, 0, static)]
    return [_coded(x[:, :wide], fmt.wide, 0, None), _coded(x[:, wide:], fmt, wide, None)]


def round_inputs(x: torch.Tensor, fmt: InputFormat, static: float | None = None) -> torch.Tensor:
    """The numbers that x (T, I) float32 is rounded to."""
    parts = [coded.decoded() for coded in code_inputs(x, fmt, static)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def check_static(fmt: InputFormat, static: float | None, where: str = "") -> None:
    """Refuse a static scale that cannot be one. where: what it is of.

    Raises:
        ArtifactError: the format has a static scale, and `static` is no positive float32.
    """
    if not fmt.has_static:
        return
    if not (isinstance(static, int | float) and SMALLEST <= static <= GREATEST):
        raise ArtifactError(
            f"inputs '{fmt.name}' have a static scale, and the manifest has {static}",
            where=where,
            hint="compress again",
        )


def spread(scales: torch.Tensor, group: int, columns: int) -> torch.Tensor:
    """Scales (R, G) for every one of `columns` channels."""
    if scales.shape[1] == 1:
        return scales
    return scales.repeat_interleave(group, dim=1)[:, :columns]


def _coded(x: torch.Tensor, fmt: InputFormat, start: int, static: float | None) -> Coded:
    tokens, columns = x.shape
    kept = None
    if fmt.keep is not None:
        loud = (x.abs() >= fmt.keep).any(0).nonzero()[:, 0]
        kept = (loud, x[:, loud])
        x = x.index_fill(1, loud, 0.0)
    group = columns if fmt.group is None else min(fmt.group, columns)
    count = -(-columns // group)
    groups = F.pad(x, (0, count * group - columns)).view(tokens, count, group)
    peak = groups.abs().amax(2)
    lost = ~peak.isfinite()
    scales = _scales(peak, fmt, static or 1.0).masked_fill_(lost, math.nan)
    values = _snap(groups / scales[..., None], fmt)
    if x.device.type != "cpu" or bool(lost.any()):  # elsewhere asking would wait for the device
        values.masked_fill_(lost[..., None], 0.0)
    values = values.flatten(1)[:, :columns]
    return Coded(start, values, scales, group, fmt.largest, fmt.integer, kept)


def _scales(peak: torch.Tensor, fmt: InputFormat, static: float) -> torch.Tensor:
    """Scales of groups whose largest magnitudes are `peak`."""
    if fmt.static:
        return torch.full_like(peak, static)
    if fmt.scale == "e8m0":
        if fmt.rule == "ceil":
            return power_of_two(exponent_above(peak / fmt.largest))
        emax = math.frexp(fmt.largest)[1] - 1
        return power_of_two(torch.frexp(peak).exponent - 1 - emax)
    if fmt.scale == "e4m3":
        shared = peak.new_tensor(static).reciprocal()
        return as_e4m3(peak / fmt.largest, shared)
    if fmt.clip != 100:
        peak = peak * (fmt.clip / 100)
    scale = peak / fmt.largest
    # a number over a subnormal scale may be infinite
    return torch.where(scale < SMALLEST, 1.0, scale)


def _snap(x: torch.Tensor, fmt: InputFormat) -> torch.Tensor:
    if isinstance(fmt.element, FloatElement):
        return round_to(x, fmt.element.spec, out=x)
    return x.round_().clamp_(-fmt.largest, fmt.largest)


class Magnitudes:
    """How often magnitudes occur among inputs, in bins of a 128th of a binade.

    counts: of float32 numbers by their uppermost 15 bits but the sign.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(1 << (31 - DROPPED), dtype=torch.int64)

    def add(self, x: torch.Tensor) -> None:
        """Count x, any shape."""
        bins = (x.detach().float().contiguous().view(torch.int32) & 0x7FFFFFFF) >> DROPPED
        self.counts += torch.bincount(bins.flatten(), minlength=len(self.counts)).cpu()

    def numbers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Middles of the bins that occur, float32 ascending, and their counts."""
        bins = self.counts.nonzero()[:, 0]
        middle = (bins.to(torch.int32) << DROPPED) + ((1 << (DROPPED - 1)) * (bins > 0).int())
        return middle.view(torch.float32), self.counts[bins]

    def scale(self, fmt: InputFormat, method: str = "mse", where: str = "") -> float:
        """The static scale of `fmt`. method: mse, the least squared error among RATIOS
        shares of the abs-max; percentile, PERCENTILE of all magnitudes, or absmax, as the largest
        number.
        Of nvfp4 and nvint4 always the abs-max, under which the largest scale is 448. where: what
        read them. 1 if all are 0, or too small for a scale.

        Raises:
            DataError: some were NaN or infinite.
        """
        if strange := int(self.counts[INFINITE:].sum()):
            raise DataError(
                f"{strange} of {int(self.counts.sum())} inputs were NaN or infinite on the "
                "calibration text, so they have no static scale",
                where=where,
                hint="the model overflows there, or its weights are damaged; int8-token measures "
                "every token by itself",
            )
        values, counts = self.numbers()
        peak = float(values[-1]) if len(values) else 0.0
        least = SMALLEST if fmt.scale != "e4m3" else SMALLEST * GREATEST_E4M3 / LEAST_E4M3
        if peak / fmt.largest < least:
            return 1.0
        if fmt.scale == "e4m3":
            return _single(peak / (fmt.largest * GREATEST_E4M3))
        if method == "percentile":
            share = counts.cumsum(0).double() / int(counts.sum())
            within = float(values[int((share < PERCENTILE).sum())])
            peak = within if within / fmt.largest >= SMALLEST else peak  # nearly all were 0
        best = _single(peak / fmt.largest)
        if method != "mse":
            return best
        least = math.inf
        for step in range(RATIOS, 0, -1):
            scale = max(SMALLEST, _single(peak * step / RATIOS / fmt.largest))
            miss = _snap(values / scale, fmt).mul_(scale).sub_(values).double()
            error = float((miss.square() * counts).sum())
            if error < least:
                best, least = scale, error
        return best


def _single(value: float) -> float:
    """The float32 nearest to it, in the nine digits that say which."""
    return float(f"{float(torch.tensor(value, dtype=torch.float32)):.9g}")
