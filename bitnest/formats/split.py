"""SplitFormat: the first input channels in a wider format than the others.

    128xint8-g128~int4-g128     W[:, :128] as int8-g128, the rest as int4-g128

The wider part's tensors have `wide_` before their names. With @perm the loudest channels come
first; Atom (2310.19102) keeps 128 of them in 8 bits. A matrix gives at most half of its channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bitnest.errors import FormatError
from bitnest.formats.base import Part, total_bytes
from bitnest.formats.block import BlockFormat

WIDE = "wide_"


@dataclass(frozen=True)
class SplitFormat:
    """See above. channels: in the wider format `wide`; base: of the others.

    Raises:
        FormatError: parts that cannot stand beside each other.
    """

    wide: BlockFormat
    channels: int
    base: BlockFormat

    def __post_init__(self) -> None:
        if self.channels < 1 or self.channels % 16:
            raise FormatError(
                f"wider channels come in sixteens, not {self.channels}",
                hint="for example 128xint8-g128~int4-g128",
            )
        for part in (self.wide, self.base):
            if part.scale == "e4m3" or not part.fixed_size or part.learned:
                raise FormatError(
                    f"{part.name} has numbers for the whole matrix: it cannot be a part of one",
                    hint="for example 128xint8-g128~int4-g128",
                )

    @property
    def name(self) -> str:
        """The spelling that `parse_format` reads back."""
        return f"{self.channels}x{self.wide.name}~{self.base.name}"

    @property
    def bits(self) -> float:
        """Bits of one code of the others."""
        return self.base.bits

    @property
    def grain(self) -> str:
        """The others'."""
        return self.base.grain

    @property
    def row_tile(self) -> int | None:
        """Output rows that share stored numbers."""
        first, rest = self.wide.row_tile, self.base.row_tile
        return None if first is None or rest is None else math.lcm(first, rest)

    fixed_size = True

    def wide_of(self, columns: int) -> int:
        """How many of `columns` channels are wider."""
        return min(self.channels, columns // 2)

    def shapes(self, shape: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """(out, in) of the wider part and of the others."""
        wide = self.wide_of(shape[1])
        return (shape[0], wide), (shape[0], shape[1] - wide)

    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        """Stored tensors of a weight of that (out, in) shape."""
        first, rest = self.shapes(shape)
        own = self.wide.parts(first) if first[1] else {}
        return {**{WIDE + name: part for name, part in own.items()}, **self.base.parts(rest)}

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes on disk of a weight of that (out, in) shape, everything included."""
        return total_bytes(self.parts(shape))

    def code_bits(self, shape: tuple[int, int]) -> int:
        """Bits of the codes of an (out, in) matrix."""
        first, rest = self.shapes(shape)
        return round(shape[0] * (self.wide.bits * first[1] + self.base.bits * rest[1]))
