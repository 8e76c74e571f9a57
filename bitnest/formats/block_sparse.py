"""BlockSparseFormat: whole blocks of a matrix dropped, those that stay without holes.

    base%b16x16-50     of the blocks of 16 rows by 16 input channels, 50 percent stay
    dense%b64x32-25    the same with 16-bit values instead of codes

Which blocks stay is free within the matrix, not a row's share: a kernel skips a block or reads it
whole. Of P = ceil(O / R) by Q = ceil(I / C) blocks, R and C cut to the matrix, always

    N = floor((P Q percent + 50) / 100), at least 1

stay, so that sizes are exact before anything is made. Block (p, q) is number p Q + q:

    mask      I32 (ceil(P Q / 32),)    bit k set: block k stays
    codes     as the base's for a matrix (N, R C); of dense: `values` HALF (N, R C)
    scales    as the base's for (O, I), zeros too: of groups in dropped blocks as well

Row n of the codes is the n-th block that stays, row after row; those at a ragged edge are filled up
with code 0, which nobody reads: every block has one size, and its place follows from its number.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitnest.errors import FormatError
from bitnest.formats.base import HALF, DenseFormat, Part, total_bytes, words
from bitnest.formats.block import BlockFormat
from bitnest.formats.sparse import check_base

SIDES = (16, 32, 64, 128)  # of a block: R and C


@dataclass(frozen=True)
class BlockSparseFormat:
    """A format of which some blocks alone are kept; see above.

    rows, columns: R and C. keep: percent of the blocks that stay, 1 to 99.

    Raises:
        FormatError: no such blocks, or a base whose rows are not apart.
    """

    base: BlockFormat | DenseFormat
    rows: int
    columns: int
    keep: int

    row_tile = None  # the choice is one for the whole matrix
    fixed_size = True
    cell = 0

    def __post_init__(self) -> None:
        if self.rows not in SIDES or self.columns not in SIDES or not 1 <= self.keep <= 99:
            raise FormatError(
                f"unknown sparsity '%{self.pattern}'",
                hint="%b16x16-50 keeps half of the blocks of 16 rows by 16 channels; sides are "
                "16, 32, 64 or 128",
            )
        check_base(self.base)

    @property
    def pattern(self) -> str:
        """The sparsity as the name spells it, without its mark."""
        return f"b{self.rows}x{self.columns}-{self.keep}"

    @property
    def name(self) -> str:
        """The spelling that `parse_format` reads back."""
        return f"{self.base.name}%{self.pattern}"

    @property
    def bits(self) -> float:
        """Bits of one survivor's code."""
        return self.base.bits

    @property
    def grain(self) -> str:
        """What one scale covers; empty for 16-bit survivors."""
        return "" if isinstance(self.base, DenseFormat) else self.base.grain

    def block(self, shape: tuple[int, int]) -> tuple[int, int]:
        """R and C in a matrix of that shape."""
        return min(self.rows, shape[0]), min(self.columns, shape[1])

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """P and Q: blocks below and beside each other."""
        r, c = self.block(shape)
        return -(-shape[0] // r), -(-shape[1] // c)

    def kept(self, shape: tuple[int, int]) -> int:
        """N, blocks that stay."""
        p, q = self.grid(shape)
        return max(1, (p * q * self.keep + 50) // 100)

    def code_parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        """The survivors' codes or values."""
        r, c = self.block(shape)
        kept = self.kept(shape)
        if isinstance(self.base, DenseFormat):
            return {"values": Part(HALF, (kept, r * c))}
        return self.base.element.code_parts(kept, r * c)

    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        """Stored tensors of a weight of that (out, in) shape."""
        p, q = self.grid(shape)
        own = {"mask": Part("I32", (words(p * q, 1),)), **self.code_parts(shape)}
        if isinstance(self.base, DenseFormat):
            return own
        return {**own, **{k: v for k, v in self.base.parts(shape).items() if k not in own}}

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes on disk of a weight of that (out, in) shape, everything included."""
        return total_bytes(self.parts(shape))
