"""Formats around a format: a transform of the input axis before it, a low-rank residual behind it.

    base@had64     W R stored, R the block Hadamard matrix of 64; W_hat = decode R^T
    base@had       the same with one block for the whole width, where that is a Hadamard order
    base@rhad64    the same with random signs (`kernels/hadamard.py` says which)
    base@awq       W diag(s) stored, s HALF (I,) in `channels`; W_hat = decode diag(1/s)
    base@perm      columns in the order I32 (I,) of `order`; W_hat[:, order] = decode
    base+lorc16    W_hat = decode + B A: B (O, r) and A (r, I) in int8 codes, a 16-bit scale per
    base+lqer16    column of B and row of A: `left` I8 (O, r), `left_scales` HALF (r,), `right` I8
    base+hlr16     (r, I), `right_scales` HALF (r,). lorc fits to no inputs, lqer to their RMS, hlr
                   to their second moments (`quantize/lowrank.py`)

What is decoded is always the weight in its own basis, so nothing around it needs to know: every
family runs, routers see what they always saw.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bitnest.errors import FormatError
from bitnest.formats.base import HALF, DenseFormat, Part, total_bytes
from bitnest.formats.block import BlockFormat
from bitnest.formats.block_sparse import BlockSparseFormat
from bitnest.formats.nested import NestedFormat
from bitnest.formats.sparse import SparseFormat
from bitnest.formats.split import SplitFormat
from bitnest.formats.zero import ZeroFormat

CoreFormat = BlockFormat | NestedFormat | SparseFormat | BlockSparseFormat | SplitFormat
TRANSFORMS = ("had", "rhad", "awq", "perm")
HADAMARD_BLOCKS = (16, 32, 64, 128)
RESIDUALS = ("lorc", "lqer", "hlr")
MAX_RANK = 512


@dataclass(frozen=True)
class TransformedFormat:
    """A format whose matrix is transformed along its input axis before it is stored.

    kind: one of TRANSFORMS. block: of a Hadamard matrix, 0 for the whole width (`whole_block` of
    `kernels/hadamard.py`) and for other kinds.

    Raises:
        FormatError: no such transform.
    """

    base: CoreFormat | TransformedFormat
    kind: str
    block: int = 0

    def __post_init__(self) -> None:
        blocks = (0, *HADAMARD_BLOCKS) if self.kind in {"had", "rhad"} else (0,)
        if self.kind not in TRANSFORMS or self.block not in blocks:
            raise FormatError(
                f"unknown transform '@{self.kind}{self.block or ''}'",
                hint="@had16 to @had128 or @had, the same with @rhad, @awq or @perm",
            )
        inner = self.base
        while isinstance(inner, TransformedFormat):
            if inner.kind == self.kind:
                raise FormatError(f"@{self.kind} twice", hint="each transform goes once")
            inner = inner.base
        if self.kind == "awq" and isinstance(inner, NestedFormat) and inner.kind == "stack":
            raise FormatError("stack scales input channels itself", hint="leave out @awq")

    @property
    def name(self) -> str:
        """The spelling that `parse_format` reads back."""
        return f"{self.base.name}@{self.kind}{self.block or ''}"

    @property
    def bits(self) -> float:
        """Bits of one code."""
        return self.base.bits

    @property
    def row_tile(self) -> int | None:
        """Output rows that share stored numbers."""
        return self.base.row_tile

    @property
    def fixed_size(self) -> bool:
        """As the base's."""
        return self.base.fixed_size

    def own_parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        """What the transform adds."""
        if self.kind == "awq":
            return {"channels": Part(HALF, (shape[1],))}
        return {"order": Part("I32", (shape[1],))} if self.kind == "perm" else {}

    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        """Stored tensors of a weight of that (out, in) shape."""
        return {**self.base.parts(shape), **self.own_parts(shape)}

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes on disk of a weight of that (out, in) shape, everything included."""
        return total_bytes(self.parts(shape))


@dataclass(frozen=True)
class LowRankFormat:
    """A format with a low-rank correction of its error.

    kind: lorc, lqer or hlr. rank: of the correction, at most the smaller side of the matrix.

    Raises:
        FormatError: no such kind or rank.
    """

    base: CoreFormat | TransformedFormat
    kind: str
    rank: int

    row_tile = None

    def __post_init__(self) -> None:
        if self.kind not in RESIDUALS or not 1 <= self.rank <= MAX_RANK:
            raise FormatError(
                f"unknown residual '+{self.kind}{self.rank}'",
                hint=f"+lorc<rank>, +lqer<rank> or +hlr<rank>, rank 1 to {MAX_RANK}",
            )
        if isinstance(core_format(self.base), NestedFormat):
            raise FormatError(
                f"{self.base.name} has an error at every width, +{self.kind} corrects one",
                hint="leave out the residual",
            )

    @property
    def name(self) -> str:
        """The spelling that `parse_format` reads back."""
        return f"{self.base.name}+{self.kind}{self.rank}"

    @property
    def bits(self) -> float:
        """Bits of one code of the base."""
        return self.base.bits

    @property
    def fixed_size(self) -> bool:
        """As the base's."""
        return self.base.fixed_size

    def rank_of(self, shape: tuple[int, int]) -> int:
        """The rank a matrix of that shape gets."""
        return min(self.rank, *shape)

    def own_parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        """What the residual adds."""
        rank = self.rank_of(shape)
        return {
            "left": Part("I8", (shape[0], rank)),
            "left_scales": Part(HALF, (rank,)),
            "right": Part("I8", (rank, shape[1])),
            "right_scales": Part(HALF, (rank,)),
        }

    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        """Stored tensors of a weight of that (out, in) shape."""
        return {**self.base.parts(shape), **self.own_parts(shape)}

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes on disk of a weight of that (out, in) shape, everything included."""
        return total_bytes(self.parts(shape))


CodedFormat = CoreFormat | TransformedFormat | LowRankFormat
PackedFormat = CodedFormat | ZeroFormat
AnyFormat = PackedFormat | DenseFormat


def cut(fmt: AnyFormat, width: int) -> AnyFormat:
    """A nested format as it is read at `width`: its widest width up to that. Others as they are.

    Raises:
        FormatError: narrower than its narrowest.
    """
    if isinstance(fmt, NestedFormat):
        held = [w for w in fmt.widths if w <= width]
        if not held:
            raise FormatError(
                f"{fmt.name} begins at {fmt.widths[0]} bits, not {width}",
                hint=f"--bits {fmt.widths[0]} or more",
            )
        return fmt.at(held[-1])
    if isinstance(fmt, TransformedFormat):
        base = cut(fmt.base, width)
        assert not isinstance(base, DenseFormat | ZeroFormat | LowRankFormat)
        return replace(fmt, base=base)
    return fmt


def widths(fmt: AnyFormat) -> tuple[int, ...]:
    """At which a nested format can be read; none of others."""
    if isinstance(fmt, DenseFormat | ZeroFormat):
        return ()
    core = core_format(fmt)
    return core.widths if isinstance(core, NestedFormat) else ()


def refinement(fmt: AnyFormat, part: str) -> int | None:
    """The width for which a nested format's part is read first; None for what its narrowest needs,
    and for other formats."""
    if isinstance(fmt, DenseFormat | ZeroFormat):
        return None
    core = core_format(fmt)
    if not isinstance(core, NestedFormat):
        return None
    later = core.widths[1:]
    return next((w for w in later if part in core.width_parts(w, (1, 1))), None)


def kept_weights(fmt: AnyFormat, shape: tuple[int, int]) -> int:
    """Weights of an (out, in) matrix that are not dropped; of blocks at an edge all they have."""
    if isinstance(fmt, ZeroFormat):
        return 0
    core = fmt if isinstance(fmt, DenseFormat) else core_format(fmt)
    if isinstance(core, SparseFormat):
        return shape[0] * core.kept(shape[1])
    if isinstance(core, BlockSparseFormat):
        rows, columns = core.block(shape)
        return min(core.kept(shape) * rows * columns, shape[0] * shape[1])
    return shape[0] * shape[1]


def code_bits(fmt: AnyFormat, shape: tuple[int, int]) -> int:
    """Bits of the codes of an (out, in) matrix; of sparse ones the survivors' and the mask's."""
    core = fmt if isinstance(fmt, DenseFormat | ZeroFormat) else core_format(fmt)
    mask = 0
    if isinstance(core, SplitFormat):
        return core.code_bits(shape)
    if isinstance(core, SparseFormat):
        mask = shape[0] * shape[1]
    elif isinstance(core, BlockSparseFormat):
        rows, columns = core.grid(shape)
        mask = rows * columns
    return round(fmt.bits * kept_weights(fmt, shape)) + mask


def core_format(fmt: CodedFormat) -> CoreFormat:
    """The format at the core of its wrappers."""
    while not isinstance(fmt, CoreFormat):
        fmt = fmt.base
    return fmt
