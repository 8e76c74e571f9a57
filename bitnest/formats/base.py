"""What every format answers: its name, its tensors on disk, its bytes, what its rows share.

A part is one stored tensor: a type by its safetensors name and a shape. HALF stands for the
16-bit type of the source, bfloat16 or float16; both have two bytes, so sizes do not depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Protocol

HALF = "HALF"
ITEMSIZE = {HALF: 2, "I32": 4, "F32": 4, "I16": 2, "U8": 1, "I8": 1}


@dataclass(frozen=True)
class Part:
    """One stored tensor. dtype: a key of ITEMSIZE."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return ITEMSIZE[self.dtype] * prod(self.shape)


class Format(Protocol):
    """How one weight is stored."""

    @property
    def name(self) -> str:
        """The spelling that `parse_format` reads back."""

    @property
    def bits(self) -> float:
        """Bits of one code, scales and tables not counted."""

    @property
    def row_tile(self) -> int | None:
        """Output rows that share stored numbers: 1 for none, None for all of them.

        Matrices are solved as one stack only if each has a whole number of tiles.
        """

    @property
    def fixed_size(self) -> bool:
        """Whether `parts` says the exact size. If not, it bounds it: the size depends on values."""

    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        """Stored tensors of a weight of that (out, in) shape."""

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes on disk of a weight of that (out, in) shape, everything included."""


def total_bytes(parts: dict[str, Part]) -> int:
    """Bytes of all parts."""
    return sum(part.nbytes for part in parts.values())


def words(count: int, bits: int) -> int:
    """32-bit words that hold `count` codes of `bits` bits."""
    return -(-count * bits // 32)


@dataclass(frozen=True)
class DenseFormat:
    """The source's own values, unchanged. itemsize: bytes per value, 2 or 4."""

    itemsize: int = 2

    name = "dense"
    row_tile = 1
    fixed_size = True

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return 8 * self.itemsize

    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        """One tensor, `weight`."""
        return {"weight": Part(HALF if self.itemsize == 2 else "F32", shape)}

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes on disk of a weight of that (out, in) shape."""
        return total_bytes(self.parts(shape))
