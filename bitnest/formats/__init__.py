"""Formats: how one weight is stored, as pure size arithmetic, exact to the byte.

A format name is `int<bits>-<granularity>[-asym]`:

    int4-g128        symmetric, one scale per 128 input channels of a row
    int3-g64-asym    with an integer zero point per group
    int8-channel     one scale per row
    dense            the source's own 16 or 32-bit values

Size of an integer weight of shape (O, I), b bits, groups of g along the input axis, G = ceil(I/g):

    codes   O * ceil(I*b/32) * 4 bytes     dense little-endian bitstream, rows padded to 32 bits
    scales  O * G * 2 bytes                bfloat16, or float16 for a float16 source
    zeros   ceil(O*b/32) * 4 * G bytes     asymmetric only, packed along the output axis

Left out: how the numbers are chosen (`quantize/codecs`) and decoded (`kernels`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from bitnest.errors import FormatError

MIN_BITS, MAX_BITS = 2, 8
MIN_GROUP, MAX_GROUP = 16, 128
_NAME = re.compile(r"int(?P<bits>\d+)-(?:g(?P<group>\d+)|(?P<channel>channel))(?P<asym>-asym)?")


@dataclass(frozen=True)
class IntFormat:
    """Integer codes with a scale, and for asymmetric a zero point, per group of input channels.

    bits: 2 to 8. group: input channels per scale, 16 to 128, or None for one scale per row.
    The last group of a row may be short. w = (code - zero) * scale; symmetric weights store
    code + 2^(bits-1) and have no zero tensor.

    Raises:
        FormatError: bits or group out of range.
    """

    bits: int
    group: int | None = 128
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise FormatError(
                f"integer weights have {MIN_BITS} to {MAX_BITS} bits, not {self.bits}",
                hint="for example --bits 4, or --format int3-g64",
            )
        if self.group is not None and not (
            MIN_GROUP <= self.group <= MAX_GROUP and self.group % 16 == 0
        ):
            raise FormatError(
                f"a group has {MIN_GROUP} to {MAX_GROUP} input channels, in steps of 16, "
                f"not {self.group}",
                hint="for example int4-g128, int4-g32 or int8-channel",
            )

    @property
    def name(self) -> str:
        """The spelling that `parse_format` reads back."""
        grain = "channel" if self.group is None else f"g{self.group}"
        return f"int{self.bits}-{grain}" + ("" if self.symmetric else "-asym")

    def group_size(self, in_features: int) -> int:
        """Input channels per scale for a weight of that width."""
        return in_features if self.group is None else self.group

    def groups(self, in_features: int) -> int:
        """Scales per row: the last one may cover fewer channels than the others."""
        return -(-in_features // self.group_size(in_features))

    def tensors(self, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        """Shapes of the stored tensors: `codes` and `zeros` in 32-bit words, `scales` in 16 bit."""
        rows, columns = shape
        stored: dict[str, tuple[int, ...]] = {
            "codes": (rows, -(-columns * self.bits // 32)),
            "scales": (rows, self.groups(columns)),
        }
        if not self.symmetric:
            stored["zeros"] = (-(-rows * self.bits // 32), self.groups(columns))
        return stored

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes on disk of a weight of that (out, in) shape, scales and zero points included."""
        size = {"codes": 4, "scales": 2, "zeros": 4}
        return sum(size[key] * dims[0] * dims[1] for key, dims in self.tensors(shape).items())


@dataclass(frozen=True)
class DenseFormat:
    """The source's own values, unchanged. itemsize: bytes per value, 2 or 4."""

    itemsize: int = 2

    name = "dense"

    @property
    def bits(self) -> int:
        """Bits per weight."""
        return 8 * self.itemsize

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes on disk of a weight of that (out, in) shape."""
        return shape[0] * shape[1] * self.itemsize


Format = IntFormat | DenseFormat


def parse_format(name: str) -> Format:
    """The format spelt `name`, for example `int4-g128`, `int3-g64-asym`, `int8-channel`, `dense`.

    Raises:
        FormatError: the name is not of that form, or its numbers are out of range.
    """
    if name == "dense":
        return DenseFormat()
    match = _NAME.fullmatch(name)
    if match is None:
        raise FormatError(
            f"unknown format '{name}'",
            hint="int<bits>-g<group>[-asym] or int<bits>-channel[-asym], for example int4-g128; "
            "or dense",
        )
    group = None if match["channel"] else int(match["group"])
    return IntFormat(int(match["bits"]), group, match["asym"] is None)
