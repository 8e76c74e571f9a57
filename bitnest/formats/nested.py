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
    stack  w_0: channels HALF (I,) = s; for each bit b of    sum over b <= w of
           its plane, left<b> HALF (O, r), right<b> (r, I)   +-1 (left_b right_b)[o, i] / s[i]

nest is ours: tables of the whole matrix, nested in scaled weights. mat: MatGPTQ's uniform codes;
mwq: D2MoE's base and signed residuals; any: Any-Precision's tables per row; stack: BitStack's signs
and low-rank magnitudes, bit b the signs of block b, r = min(rank, O, I). How codes are chosen is
`quantize/nested`. Tables of nest beyond 6 bits follow from the last stored one by halving its cells
(`kernels/nested.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bitnest.errors import FormatError
from bitnest.formats.base import HALF, Part, total_bytes, words

KINDS = ("nest", "mat", "mwq", "any", "stack")
TABLE_BITS = 6  # up to which nest stores a table per width
MIN_GROUP, MAX_GROUP = 16, 128
MAX_RANK = 64  # of a block of stack


@dataclass(frozen=True)
class NestedFormat:
    """Nested codes; see above.

    kind: one of KINDS. widths: at which it can be read, ascending. group: input channels per scale,
    None for `any` and `stack`, which have none. rank: of a block of `stack`, None for other kinds.

    Raises:
        FormatError: no such kind, width, group or rank.
    """

    kind: str
    widths: tuple[int, ...]
    group: int | None = 128
    rank: int | None = None

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
        own = {"any": "a table per row", "stack": "a rank"}.get(self.kind, "groups")
        if (self.group is None, self.rank is None) != (own != "groups", own != "a rank"):
            raise FormatError(
                f"{self.kind} has {own}",
                hint="any2345678-channel, nest2345678-g128, stack12345678-r16",
            )
        if self.rank is not None and not 1 <= self.rank <= MAX_RANK:
            raise FormatError(
                f"a block has a rank of 1 to {MAX_RANK}, not {self.rank}", hint="stack12345678-r16"
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
        """channel, g<group> or r<rank>."""
        if self.rank is not None:
            return f"r{self.rank}"
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
        """Output rows that share stored numbers: a table, line or `right` is the whole matrix's."""
        return None if self.kind in {"nest", "mat", "stack"} else 1

    def group_size(self, in_features: int) -> int:
        """Input channels per scale for a weight of that width."""
        return in_features if self.group is None else min(self.group, in_features)

    def groups(self, in_features: int) -> int:
        """Scales per row: the last one may cover fewer channels than the others."""
        return -(-in_features // self.group_size(in_features))

    def rank_of(self, shape: tuple[int, int]) -> int:
        """The rank that a block of a matrix of that shape gets; 0 for kinds without."""
        return min(self.rank or 0, *shape)

    def plane_bits(self, width: int) -> int:
        """Code bits that the plane of `width` adds."""
        place = self.widths.index(width)
        return width - (self.widths[place - 1] if place else 0)

    def bits_of(self, width: int) -> range:
        """Which code bits these are, the most significant being bit 1."""
        return range(width - self.plane_bits(width) + 1, width + 1)

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
        return replace(self, widths=self.widths[: self.widths.index(width) + 1])

    def width_parts(self, width: int, shape: tuple[int, int]) -> dict[str, Part]:
        """What `width` adds to the narrower ones: its plane, and its table or scales."""
        rows, columns = shape
        first = width == self.widths[0]
        groups = self.groups(columns)
        bits = self.plane_bits(width)
        parts = {f"plane{width}": Part("I32", (rows, words(columns, bits)))}
        if self.kind == "any":
            return {**parts, f"table{width}": Part(HALF, (rows, 1 << width))}
        if self.kind == "stack":
            return {**parts, **self._stack_parts(width, shape)}
        if first:
            parts["scales"] = Part(HALF, (rows, groups))
        if self.kind == "nest" and (first or width <= TABLE_BITS):
            parts[f"table{width}"] = Part(HALF, (1 << width,))
        if self.kind == "mat":
            parts[f"affine{width}"] = Part(HALF, (2,))
        if self.kind == "mwq" and first:
            parts["zeros"] = Part("I32", (words(rows, width), groups))
        if self.kind == "mwq" and not first:
            for bit in self.bits_of(width):
                parts[f"scales{bit}"] = Part(HALF, (rows, groups))
        return parts

    def _stack_parts(self, width: int, shape: tuple[int, int]) -> dict[str, Part]:
        rows, columns = shape
        rank = self.rank_of(shape)
        first = width == self.widths[0]
        parts = {"channels": Part(HALF, (columns,))} if first else {}
        for bit in self.bits_of(width):
            parts[f"left{bit}"] = Part(HALF, (rows, rank))
            parts[f"right{bit}"] = Part(HALF, (rank, columns))
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
