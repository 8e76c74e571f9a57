"""BlockFormat: codes of one element type, a scale per block of weights, one of six kinds of scale.

A block covers `rows` output rows by `group` input channels; the last block of either axis may be
short. With R = ceil(O / rows) and G = ceil(I / group):

    scale   parts                                                 bytes
    half    scales HALF (R, G)                                    2 R G
    e8m0    scales U8 (R, G), a biased exponent                   R G
    e4m3    scales U8 (R, G), E4M3 codes; global F32 (1,)         R G + 4
    dq      scales I8 (R, G); super HALF (ceil(R/64), G)          R G + 2 ceil(R/64) G
    m2      scales I32 (R, ceil(4 G / 32)); super HALF (R, 1)     4-bit shifts k: super / 2^k
    dual    scales U8 (R, G); super HALF (R, 1)                   integer multiples of super

Asymmetric integers store `zeros` I32 (ceil(R*b/32), G), packed along the rows. A learned table
stores `table` HALF (2^b,) beside group scales, or (O, 2^b) and no scales for `channel`.

`half` and `dq` scales may be negative, the others may not; integers with a scale that may not are
balanced. m1 (ZeroQuant-FP: a scale rounded up to a power of two) is stored as e8m0.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitnest.errors import FormatError
from bitnest.formats.base import HALF, Part, total_bytes, words
from bitnest.formats.elements import Element, IntElement, TableElement, TernaryElement

MIN_GROUP, MAX_GROUP = 16, 128
SCALES = ("half", "e8m0", "m1", "e4m3", "dq", "m2", "dual")
SIGNED = frozenset({"half", "dq"})
RULES = ("", "ocp", "ceil")
DQ_ROWS = 64  # scales that share a super-scale
SHIFT_BITS = 4  # of an m2 scale


@dataclass(frozen=True)
class BlockFormat:
    """Scaled codes; see above.

    element: what codes stand for. group: input channels per scale, None for all. rows: output rows
    per scale, None for all. scale: one of SCALES. rule: how an e8m0 exponent is chosen: `ocp`
    floor(log2 absmax) - emax, which may clip; `ceil` the least that does not clip; empty: whichever
    of these and the next lower gives the least weighted error. alias: a fixed name such as mxfp4.

    Raises:
        FormatError: a combination that does not exist.
    """

    element: Element
    group: int | None = 128
    rows: int | None = 1
    scale: str = "half"
    rule: str = ""
    alias: str = ""

    def __post_init__(self) -> None:
        if self.group is not None and not (
            MIN_GROUP <= self.group <= MAX_GROUP and self.group % 16 == 0
        ):
            raise FormatError(
                f"a group has {MIN_GROUP} to {MAX_GROUP} input channels, in steps of 16, "
                f"not {self.group}",
                hint="for example int4-g128, int4-g32 or int8-channel",
            )
        if self.rows is not None and self.rows < 1:
            raise FormatError(
                f"a block has at least one row, not {self.rows}", hint="int8-b128x128"
            )
        if self.scale not in SCALES or self.rule not in RULES:
            raise FormatError(
                f"unknown scale '{self.scale} {self.rule}'", hint=f"one of {', '.join(SCALES)}"
            )
        if self.rule and not self.symmetric:
            raise FormatError(
                f"the rule {self.rule} is for symmetric codes",
                hint="leave it out, or leave out -asym",
            )
        if self.learned and (self.scale != "half" or self.rows != 1):
            raise FormatError(
                "a learned table has 16-bit scales per group, or a table per row",
                hint="for example lut3-g64 or lut4-channel",
            )
        if self.rows != 1 and self.scale not in {"half", "m1"}:
            raise FormatError(f"blocks of rows have no {self.scale} scale", hint="int8-b128x128")

    @property
    def learned(self) -> bool:
        """Whether a table is learned for each matrix."""
        return isinstance(self.element, TableElement) and self.element.learned

    @property
    def bits(self) -> float:
        """Bits of one code."""
        return self.element.bits

    @property
    def symmetric(self) -> bool:
        """Whether no zero points are stored."""
        return self.element.symmetric

    @property
    def signed_scale(self) -> bool:
        """Whether a scale may be negative."""
        return self.scale in SIGNED

    @property
    def balanced(self) -> bool:
        """Whether integers leave out their most negative code."""
        element = self.element
        if not isinstance(element, IntElement) or not element.symmetric or element.bits == 1:
            return False
        return element.balanced or not self.signed_scale

    @property
    def plain_integer(self) -> bool:
        """Whether it is what engines call group-quantised integers: rows, 16-bit scales."""
        return isinstance(self.element, IntElement) and self.rows == 1 and self.scale == "half"

    @property
    def row_tile(self) -> int | None:
        """Output rows that share stored numbers."""
        if self.learned and self.group is not None:
            return None
        if isinstance(self.element, TernaryElement) and self.element.coded:
            return None
        return DQ_ROWS if self.scale == "dq" else self.rows

    @property
    def fixed_size(self) -> bool:
        """False for entropy-coded ternary codes."""
        return not (isinstance(self.element, TernaryElement) and self.element.coded)

    @property
    def name(self) -> str:
        """The spelling that `parse_format` reads back."""
        rule = f"-{self.rule}" if self.rule else ""
        if self.alias:
            return self.alias + rule
        element = self.element
        name = f"{'dgq4' if self.scale == 'dual' else element.name}-{self.grain}"
        if self.scale == "dual":
            return name
        if isinstance(element, IntElement):
            name += ("" if element.symmetric else "-asym") + (
                "-balanced" if element.balanced else ""
            )
        if isinstance(element, TernaryElement) and element.coded:
            name += "-dict"
        return name + (f"-{self.scale}" if self.scale != "half" else "") + rule

    @property
    def grain(self) -> str:
        """tensor, channel, g<group> or b<rows>x<group>."""
        if self.rows == 1:
            return "channel" if self.group is None else f"g{self.group}"
        return "tensor" if self.rows is None else f"b{self.rows}x{self.group}"

    def group_size(self, in_features: int) -> int:
        """Input channels per scale for a weight of that width."""
        return in_features if self.group is None else min(self.group, in_features)

    def groups(self, in_features: int) -> int:
        """Scales per row: the last one may cover fewer channels than the others."""
        return -(-in_features // self.group_size(in_features))

    def scale_rows(self, out_features: int) -> int:
        """Rows of the tensor of scales."""
        return 1 if self.rows is None else -(-out_features // self.rows)

    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        """Stored tensors of a weight of that (out, in) shape."""
        rows, columns = shape
        parts = self.element.code_parts(rows, columns)
        parts.update(self._scale_parts(self.scale_rows(rows), self.groups(columns), rows))
        if not self.symmetric:
            bits = int(self.element.bits)
            zeros = (words(self.scale_rows(rows), bits), self.groups(columns))
            parts["zeros"] = Part("I32", zeros)
        return parts

    def _scale_parts(self, rows: int, groups: int, out_features: int) -> dict[str, Part]:
        if self.learned:
            size = 1 << int(self.element.bits)
            if self.group is None:
                return {"table": Part(HALF, (out_features, size))}
            return {"scales": Part(HALF, (rows, groups)), "table": Part(HALF, (size,))}
        if self.scale == "half":
            return {"scales": Part(HALF, (rows, groups))}
        if self.scale == "m2":
            shifts = Part("I32", (rows, words(groups, SHIFT_BITS)))
            return {"scales": shifts, "super": Part(HALF, (rows, 1))}
        kind = "I8" if self.scale == "dq" else "U8"
        parts = {"scales": Part(kind, (rows, groups))}
        if self.scale == "dq":
            parts["super"] = Part(HALF, (-(-rows // DQ_ROWS), groups))
        elif self.scale == "dual":
            parts["super"] = Part(HALF, (rows, 1))
        elif self.scale == "e4m3":
            parts["global"] = Part("F32", (1,))
        return parts

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes on disk of a weight of that (out, in) shape, everything included."""
        return total_bytes(self.parts(shape))


def integer(bits: int, group: int | None = 128, symmetric: bool = True) -> BlockFormat:
    """Integer codes with a 16-bit scale, and for asymmetric a zero point, per group of a row.

    Raises:
        FormatError: bits or group out of range.
    """
    return BlockFormat(IntElement(bits, symmetric), group)
