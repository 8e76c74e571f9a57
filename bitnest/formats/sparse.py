"""SparseFormat: most weights dropped, the codes of those that stay without holes.

    base%50       unstructured: of I input channels every row drops floor(I p / 100 + 1/2)
    base%2:4      n:m: of every m neighbouring input channels every row keeps n
    dense%2:4     the same with the survivors' 16-bit values instead of codes

Every row keeps the same number K of weights, whatever their values: sizes are exact before
anything is made, rows can be addressed, and row o's survivors are K codes in a row. Of n:m, the
last r = I mod m channels keep min(n, r). With K survivors a row, in ascending input channel:

    mask     I32 (O, ceil(I / 32))    bit i of row o set: weight (o, i) stays
    codes    as the base's for a matrix (O, K); of dense: `values` HALF (O, K)
    scales   as the base's for (O, I), zeros too: groups are of input channels, not of survivors

One bitmask serves all patterns. For 2:4 it has the 4 bits per 4 weights that the hardware's two
2-bit indices take, so these follow nibble by nibble (`kernels/sparse.py`); numbering the 6 patterns
in 3 bits would save a quarter bit per weight, and no kernel could read it.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitnest.errors import FormatError
from bitnest.formats.base import HALF, DenseFormat, Part, total_bytes, words
from bitnest.formats.block import BlockFormat
from bitnest.formats.elements import IntElement

CELLS = (2, 4, 8, 16)  # m of n:m: divides the smallest group, so that no cell crosses two


def check_base(base: BlockFormat | DenseFormat) -> None:
    """Refuse codes that cannot be dropped one by one.

    Raises:
        FormatError: scales or tables of several rows, sizes that depend on values, no zero.
    """
    if isinstance(base, DenseFormat):
        return
    element = base.element
    signs = isinstance(element, IntElement) and element.symmetric and element.bits == 1
    if base.rows != 1 or not base.fixed_size or base.learned or signs:
        raise FormatError(
            f"{base.name} cannot be sparse",
            hint="codes with a zero, their scales in groups of a row: int4-g128%2:4, "
            "nvfp4%50, dense%2:4",
        )


@dataclass(frozen=True)
class SparseFormat:
    """A format whose rows keep some weights only; see above.

    drop: percent of a row's weights dropped, 1 to 99; 0 for n:m. keep, cell: n and m, 0 for
    unstructured.

    Raises:
        FormatError: no such sparsity, or a base whose rows are not apart.
    """

    base: BlockFormat | DenseFormat
    drop: int = 0
    keep: int = 0
    cell: int = 0

    def __post_init__(self) -> None:
        ratio = self.cell in CELLS and 1 <= self.keep < self.cell and self.drop == 0
        share = 1 <= self.drop <= 99 and self.keep == self.cell == 0
        if not ratio and not share:
            raise FormatError(
                f"unknown sparsity '%{self.pattern}'",
                hint="%50 drops half of every row, %2:4 keeps 2 of every 4; m is 2, 4, 8 or 16",
            )
        check_base(self.base)

    @property
    def pattern(self) -> str:
        """The sparsity as the name spells it, without its mark."""
        return f"{self.keep}:{self.cell}" if self.cell or self.keep else str(self.drop)

    @property
    def name(self) -> str:
        """The spelling that `parse_format` reads back."""
        return f"{self.base.name}%{self.pattern}"

    @property
    def bits(self) -> float:
        """Bits of one survivor's code."""
        return self.base.bits

    @property
    def row_tile(self) -> int | None:
        """Output rows that share stored numbers."""
        return self.base.row_tile

    fixed_size = True

    @property
    def grain(self) -> str:
        """What one scale covers; empty for 16-bit survivors."""
        return "" if isinstance(self.base, DenseFormat) else self.base.grain

    def kept(self, in_features: int) -> int:
        """Survivors of each row, at least one."""
        if not self.cell:
            return max(1, in_features - (in_features * self.drop + 50) // 100)
        return in_features // self.cell * self.keep + min(self.keep, in_features % self.cell)

    def code_parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        """The survivors' codes or values."""
        rows, kept = shape[0], self.kept(shape[1])
        if isinstance(self.base, DenseFormat):
            return {"values": Part(HALF, (rows, kept))}
        return self.base.element.code_parts(rows, kept)

    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        """Stored tensors of a weight of that (out, in) shape."""
        own = {"mask": Part("I32", (shape[0], words(shape[1], 1))), **self.code_parts(shape)}
        if isinstance(self.base, DenseFormat):
            return own
        return {**own, **{k: p for k, p in self.base.parts(shape).items() if k not in own}}

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes on disk of a weight of that (out, in) shape, everything included."""
        return total_bytes(self.parts(shape))
