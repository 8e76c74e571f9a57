"""NestedFormat: one matrix at several widths. Planes of code bits, most significant first.

With widths w_0 < w_1 < ... < w_n, a code has w_n bits, and its first w_k bits are the code at width
w_k. `plane<w_0>` holds the first w_0 bits of every code, `plane<w_k>` the next w_k - w_(k-1): each
a bitstream I32 (O, ceil(I bits / 32)). Reading the first k + 1 planes and what belongs to them is
reading the same format cut at w_k (`at`), so a narrower matrix is a prefix, not a conversion.

    kind   beside its plane, width w has                     weight at width w
    nest   table<w> HALF (2^w,) up to 6 bits and for w_0;    scales[o, g] * table_w[code]
           scales HALF (O, G), once
    mat    affine<w> HALF (2,) = (a, b); scales HALF (O, G)  scales[o, g] * (a (code + 1/2) + b)
    mwq    w_0: scales HALF (O, G), zeros; later, for each   W_(w-1) + scales<w>[o, g] * (+-1)
           bit b of its plane, scales<b> HALF (O, G)
    any    table<w> HALF (O, 2^w)                            table_w[o, code]

nest is ours: tables of the whole matrix, nested in scaled weights. mat: MatGPTQ's uniform codes;
mwq: D2MoE's base and signed residuals; any: Any-Precision's tables per row. How codes are chosen is
`quantize/nested`. Tables of nest beyond 6 bits follow from the last stored one by halving its cells
(`kernels/nested.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from bitnest.errors import FormatError
from bitnest.formats.base import HALF, Part, total_bytes, words

KINDS = ("nest", "mat", "mwq", "any")
TABLE_BITS = 6  # up to which nest stores a table per width
MIN_GROUP, MAX_GROUP = 16, 128


@dataclass(frozen=True)
class NestedFormat:
    """Nested codes; see above.

    kind: one of KINDS. widths: at which it can be read, ascending. group: input channels per scale,
    None for `any`, which has none.

    Raises:
        FormatError: no such kind, width or group.
    """

    kind: str
    widths: tuple[int, ...]
    group: int | None = 128

    fixed_size = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise FormatError(f"unknown nested format '{self.kind}'", hint=", ".join(KINDS))
        ascending = list(self.widths) == sorted(set(self.widths))
        if not self.widths or not ascending or not 1 <= self.widths[0] <= self.widths[-1] <= 8:
            raise FormatError(
                f"widths are 1 to 8 bits, each once, ascending, not {self.digits}",
                hint="for example nest2345678-g128 or nest248-g128",
            )
        if (self.group is None) != (self.kind == "any"):
            raise FormatError(
                f"{self.kind} has {'a table per row' if self.kind == 'any' else 'groups'}",
                hint="any2345678-channel, nest2345678-g128",
            )
        if self.group is not None and not (
            MIN_GROUP <= self.group <= MAX_GROUP and self.group % 16 == 0
        ):
            raise FormatError(
                f"a group has {MIN_GROUP} to {MAX_GROUP} input channels, in steps of 16, "
                f"not {self.group}",
                hint="nest2345678-g128",
            )
        if self.kind == "mwq" and self.widths[0] == 1:
            raise FormatError("mwq begins at 2 bits: a base and its zero point", hint="mwq2345678")

    @property
    def digits(self) -> str:
        """The widths as they stand in the name."""
        return "".join(map(str, self.widths))

    @property
    def grain(self) -> str:
        """channel or g<group>."""
        return "channel" if self.group is None else f"g{self.group}"

    @property
    def name(self) -> str:
        """The spelling that `parse_format` reads back."""
        return f"{self.kind}{self.digits}-{self.grain}"

    @property
    def bits(self) -> float:
        """Bits of one whole code."""
        return self.widths[-1]

    @property
    def row_tile(self) -> int | None:
        """Output rows that share stored numbers: a table or a line is the whole matrix's."""
        return None if self.kind in {"nest", "mat"} else 1

    def group_size(self, in_features: int) -> int:
        """Input channels per scale for a weight of that width."""
        return in_features if self.group is None else min(self.group, in_features)

    def groups(self, in_features: int) -> int:
        """Scales per row: the last one may cover fewer channels than the others."""
        return -(-in_features // self.group_size(in_features))

    def plane_bits(self, width: int) -> int:
        """Code bits that the plane of `width` adds."""
        place = self.widths.index(width)
        return width - (self.widths[place - 1] if place else 0)

    def at(self, width: int) -> NestedFormat:
        """The format that is left when only the planes up to `width` are read.

        Raises:
            FormatError: not one of the widths.
        """
        if width not in self.widths:
            raise FormatError(
                f"{self.name} has no width {width}",
                hint="it has " + ", ".join(map(str, self.widths)),
            )
        return NestedFormat(self.kind, self.widths[: self.widths.index(width) + 1], self.group)

    def width_parts(self, width: int, shape: tuple[int, int]) -> dict[str, Part]:
        """What `width` adds to the narrower ones: its plane, and its table or scales."""
        rows, columns = shape
        first = width == self.widths[0]
        groups = self.groups(columns)
        bits = self.plane_bits(width)
        parts = {f"plane{width}": Part("I32", (rows, words(columns, bits)))}
        if self.kind == "any":
            return {**parts, f"table{width}": Part(HALF, (rows, 1 << width))}
        if first:
            parts["scales"] = Part(HALF, (rows, groups))
        if self.kind == "nest" and (first or width <= TABLE_BITS):
            parts[f"table{width}"] = Part(HALF, (1 << width,))
        if self.kind == "mat":
            parts[f"affine{width}"] = Part(HALF, (2,))
        if self.kind == "mwq" and first:
            parts["zeros"] = Part("I32", (words(rows, width), groups))
        if self.kind == "mwq" and not first:
            for bit in range(width - bits + 1, width + 1):
                parts[f"scales{bit}"] = Part(HALF, (rows, groups))
        return parts

    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        """Stored tensors of a weight of that (out, in) shape, narrowest width first."""
        found: dict[str, Part] = {}
        for width in self.widths:
            found.update(self.width_parts(width, shape))
        return found

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes on disk of a weight of that (out, in) shape, everything included."""
        return total_bytes(self.parts(shape))
