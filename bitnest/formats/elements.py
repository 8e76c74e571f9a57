"""Elements: the set of numbers a code can stand for before its scale, and how codes are packed.

    int        code - zero, code in [0, 2^b): zero 2^(b-1), or 1/2 for one bit (-1/2 and +1/2), or
               stored per group (asymmetric); balanced leaves out code 0: +-(2^(b-1) - 1)
    minifloat  sign, exponent, mantissa (`formats/minifloat.py`)
    nf4        16 quantiles of the normal distribution (QLoRA, Dettmers et al., 2023)
    lut        2^b values learned for this matrix
    ternary    code - 1, code in {0, 1, 2}

Integer and table codes are one dense bitstream a row; minifloats of 3, 5, 6 and 7 bits are cut
into aligned segments (`formats/segments.py`); ternary codes lie five to a byte, or as 16-bit words
of an entropy code (`kernels/trits.py`), whose size depends on the values.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitnest.errors import FormatError
from bitnest.formats.base import Part, words
from bitnest.formats.minifloat import MiniFloat
from bitnest.formats.segments import segment_words

MIN_BITS, MAX_BITS = 1, 8
TRITS_PER_BYTE = 5
TRITS_PER_WORD = 10  # the least that a 16-bit word of the entropy code holds: 3^10 < 2^16


@dataclass(frozen=True)
class IntElement:
    """Integers of 1 to 8 bits.

    Raises:
        FormatError: bits out of range, or a balanced range where there is none.
    """

    bits: int
    symmetric: bool = True
    balanced: bool = False

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise FormatError(
                f"integer weights have {MIN_BITS} to {MAX_BITS} bits, not {self.bits}",
                hint="for example --bits 4, or --format int3-g64",
            )
        if self.bits == 1 and not self.symmetric:
            raise FormatError(
                "1-bit codes with a zero point would be 0 and one other value",
                hint="int1 without -asym stands for -s and +s",
            )
        if self.balanced and (not self.symmetric or self.bits == 1):
            raise FormatError(
                "only symmetric integers of 2 bits or more have a balanced range",
                hint="leave out -balanced",
            )

    @property
    def name(self) -> str:
        """As formats are spelt."""
        return f"int{self.bits}"

    @property
    def zero(self) -> float:
        """The code of zero when it is not stored."""
        return 0.5 if self.bits == 1 else float(1 << (self.bits - 1))

    def code_parts(self, rows: int, columns: int) -> dict[str, Part]:
        """Packed codes of a (rows, columns) matrix."""
        return {"codes": Part("I32", (rows, words(columns, self.bits)))}


@dataclass(frozen=True)
class FloatElement:
    """Small floats, stored in aligned segments."""

    spec: MiniFloat

    symmetric = True

    @property
    def bits(self) -> int:
        """Sign, exponent and mantissa."""
        return self.spec.bits

    @property
    def name(self) -> str:
        """As formats are spelt."""
        return f"fp{self.spec.bits}_{self.spec.name}"

    def code_parts(self, rows: int, columns: int) -> dict[str, Part]:
        """Packed codes of a (rows, columns) matrix."""
        return {
            name: Part("I32", (rows, count))
            for name, count in segment_words(columns, self.bits).items()
        }


@dataclass(frozen=True)
class TableElement:
    """Values looked up in a table: NF4's, or one learned for the matrix (2 to 4 bits).

    Raises:
        FormatError: a learned table of another width.
    """

    bits: int = 4
    learned: bool = False

    symmetric = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 4 or (not self.learned and self.bits != 4):
            raise FormatError(
                f"a learned table has 2 to 4 bits, not {self.bits}", hint="for example lut3-g64"
            )

    @property
    def name(self) -> str:
        """As formats are spelt."""
        return f"lut{self.bits}" if self.learned else "nf4"

    def code_parts(self, rows: int, columns: int) -> dict[str, Part]:
        """Packed codes of a (rows, columns) matrix."""
        return {"codes": Part("I32", (rows, words(columns, self.bits)))}


@dataclass(frozen=True)
class TernaryElement:
    """-1, 0 and 1. coded: as words of an entropy code instead of five to a byte."""

    coded: bool = False

    symmetric = True
    name = "ternary"
    zero = 1.0

    @property
    def bits(self) -> float:
        """Bits of a code: exact for bytes, the most it can be for the entropy code."""
        return 16 / TRITS_PER_WORD if self.coded else 8 / TRITS_PER_BYTE

    def code_parts(self, rows: int, columns: int) -> dict[str, Part]:
        """Packed codes of a (rows, columns) matrix; with an entropy code, the most they take."""
        if not self.coded:
            return {"codes": Part("U8", (rows, -(-columns // TRITS_PER_BYTE)))}
        most = rows * -(-columns // TRITS_PER_WORD)
        return {
            "codes": Part("I16", (most,)),
            "starts": Part("I32", (rows + 1,)),
            "zeros_share": Part("U8", (1,)),
        }


Element = IntElement | FloatElement | TableElement | TernaryElement
