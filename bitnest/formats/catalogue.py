"""The catalogue: a representative of every family of formats, with one line on each.

The grammar in `names` spells far more than these; any name it reads can be described here. Sizes
are those of one matrix of a stated shape, everything stored counted.

Left out: who runs a format (`export/support.py`) and how far it is from a model's weights
(`quantize/compare`).
"""

from __future__ import annotations

from dataclasses import dataclass

from bitnest.formats.base import DenseFormat
from bitnest.formats.block_sparse import BlockSparseFormat
from bitnest.formats.elements import FloatElement, TableElement, TernaryElement
from bitnest.formats.names import parse_format
from bitnest.formats.nested import NestedFormat
from bitnest.formats.sparse import SparseFormat
from bitnest.formats.split import SplitFormat
from bitnest.formats.wrappers import (
    AnyFormat,
    CoreFormat,
    LowRankFormat,
    PackedFormat,
    TransformedFormat,
    core_format,
)
from bitnest.formats.zero import ZeroFormat

SHAPE = (4096, 4096)  # out, in: what sizes are stated for unless another is asked


@dataclass(frozen=True)
class Entry:
    """One line of the catalogue. family: one of FAMILIES. name: as `parse_format` reads it."""

    family: str
    name: str
    description: str


FAMILIES: dict[str, dict[str, str]] = {
    "integer": {
        "int1-g128": "signs with a scale per 128 input channels",
        "int2-g128": "integers -2 to 1",
        "int3-g128": "integers -4 to 3",
        "int4-g128": "the common 4-bit integers: the default",
        "int5-g128": "integers -16 to 15",
        "int6-g128": "integers -32 to 31",
        "int7-g128": "integers -64 to 63",
        "int8-g128": "near lossless",
        "int4-g32": "smaller groups: less error, 0.5 bits of scales",
        "int4-g128-asym": "a zero point per group, for weights off centre",
        "int4-g128-balanced": "without the most negative code",
        "int8-channel": "one scale per output row",
        "int8-tensor": "one scale for the matrix",
        "int8-b128x128": "one scale per block of 128 rows by 128 channels",
    },
    "float": {
        "fp8_e4m3-channel": "E4M3, largest 448, one scale per output row",
        "fp8_e4m3-b128x128": "E4M3 in square blocks, as DeepSeek stores its weights",
        "fp8_e5m2-channel": "E5M2: more range, less precision",
        "fp6_e3m2-g128": "E3M2, in aligned segments of 4 and 2 bits",
        "fp6_e2m3-g128": "E2M3: more precision, less range",
        "fp5_e2m2-g128": "E2M2, in aligned segments of 4 and 1 bits",
        "fp4_e2m1-g128": "E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives",
        "fp3_e1m1-g128": "E1M1: 0, 1, 2, 3 and their negatives",
    },
    "mx": {
        "mxfp8": "OCP MX: E4M3, a power of two per 32 channels",
        "mxfp8_e5m2": "OCP MX: E5M2",
        "mxfp6": "OCP MX: E2M3",
        "mxfp6_e3m2": "OCP MX: E3M2",
        "mxfp4": "OCP MX: E2M1",
        "mxfp4-ocp": "the exponent by OCP's rule, which may clip",
        "mxfp4-ceil": "the least exponent that does not clip",
        "mxint8": "OCP MX: 8-bit integers",
        "mxint6": "MX with 6-bit integers, outside OCP",
        "mxint4": "MX with 4-bit integers, outside OCP",
    },
    "nv": {
        "nvfp4": "E2M1, an E4M3 scale per 16 channels, one 32-bit scale for the matrix",
        "nvint4": "the same with 4-bit integers",
    },
    "table": {
        "nf4-g64": "QLoRA's 16 quantiles of the normal distribution",
        "lut2-g64": "4 values learned for the matrix, weighted by its inputs",
        "lut3-g64": "8 values learned for the matrix",
        "lut4-g64": "16 values learned for the matrix",
        "lut4-channel": "16 values learned for each row, no scales",
    },
    "ternary": {
        "ternary-g128": "-1, 0 and 1, five to a byte",
        "ternary-g128-dict": "entropy coded: at most this size; pays from some 60 % of zeros on",
    },
    "dual-grain": {
        "dgq4-g128": "DGQ: 4-bit groups inside int8 rows, for 4-bit weights on int8 hardware",
    },
    "nested": {
        "nest2345678-g128": "any width from 2 to 8 bits, by planes; tables of the matrix (ours)",
        "nest248-g128": "the same at 2, 4 and 8 bits",
        "mat2345678-g128": "uniform codes for all widths, after MatGPTQ",
        "mwq2345678-g128": "a base and signed residuals, after D2MoE",
        "any2345678-channel": "tables per row, clusters split in two, after Any-Precision",
        "stack12345678-r16": "signs and low-rank magnitudes, block after block, after BitStack",
    },
    "sparse": {
        "int4-g128%50": "half of every row dropped, the codes of the rest packed (SparseGPT)",
        "int4-g128%2:4": "2 of every 4 kept, the pattern of sparse tensor cores",
        "int4-g128%4:8": "4 of every 8 kept",
        "int4-g128%b16x16-50": "half of the blocks of 16 x 16 kept, which kernels read whole",
        "dense%2:4": "2 of every 4 kept, their 16-bit values",
    },
    "scale option": {
        "int4-g32-dq": "int8 scales of 16-bit scales (double quantisation)",
        "nf4-g64-dq": "NF4 with double quantisation, near QLoRA's",
        "fp4_e2m1-g32-m1": "ZeroQuant-FP M1: scales rounded up to powers of two",
        "fp4_e2m1-g32-m2": "ZeroQuant-FP M2: a row's scales are one scale over powers of two",
        "int4-g32-e8m0": "integers with powers of two as scales",
    },
    "transform": {
        "nvint4@had16": "rotated by Hadamard matrices of 16: spreads outliers, costs no bytes",
        "mxfp4@had32": "rotated by Hadamard matrices of 32",
        "int3-g128@rhad64": "rotated with random signs",
        "int4-g128@awq": "input channels scaled by what they carry (AWQ)",
        "int4-g128@perm": "input channels sorted by diag(H), so that a group holds its like",
    },
    "residual": {
        "int3-g128+lorc16": "LoRC: a rank-16 correction of the error, in int8",
        "int3-g128+lqer16": "LQER: the same, weighted by the RMS of the inputs seen",
        "int3-g128+hlr16": "weighted by all of H, codes and residual fitted in turns (ours)",
    },
    "dense": {"dense": "the source's own 16-bit values"},
    "dropped": {
        "zero": "all weights zero, nothing stored: what dropping a matrix is",
        "drop": "an expert and its router row are gone; tokens choose among the others",
        "constant": "an expert gives its mean output (MoE++)",
        "copy": "an expert gives what it reads (MoE++)",
        "merge0": "an expert is merged into expert 0 of its layer, by frequency",
    },
}

CATALOGUE: tuple[Entry, ...] = tuple(
    Entry(family, name, text) for family, names in FAMILIES.items() for name, text in names.items()
)

_MX = ("mxfp8", "mxfp8_e5m2", "mxfp6", "mxfp6_e3m2", "mxfp4", "mxint8", "mxint6", "mxint4")
_NV = ("nvfp4", "nvint4")
UNIFORM: tuple[str, ...] = (
    *("int2-g128", "int3-g128", "int4-g128", "int6-g128", "int8-g128"),
    *("fp8_e4m3-channel", "fp6_e3m2-g128", "nf4-g64", "lut3-g64", "lut4-g64"),
    *_MX,
    *(f"{name}@had32" for name in _MX),
    *_NV,
    *(f"{name}@had16" for name in _NV),
)  # what compare-formats measures unless it is told


def family(fmt: AnyFormat) -> str:
    """The family of any format; options of scales do not make one."""
    if isinstance(fmt, LowRankFormat):
        return "residual"
    if isinstance(fmt, TransformedFormat):
        return "transform"
    if isinstance(fmt, CoreFormat):
        return base_family(fmt)
    return "dropped" if isinstance(fmt, ZeroFormat) else "dense"


def base_family(fmt: PackedFormat) -> str:
    """The family of the format inside its wrappers."""
    if isinstance(fmt, ZeroFormat):
        return "dropped"
    base = core_format(fmt)
    if isinstance(base, NestedFormat):
        return "nested"
    if isinstance(base, SparseFormat | BlockSparseFormat):
        return "sparse"
    if isinstance(base, SplitFormat):
        return "split"
    if base.alias:
        return base.alias[:2]
    if base.scale == "dual":
        return "dual-grain"
    kinds = ((FloatElement, "float"), (TableElement, "table"), (TernaryElement, "ternary"))
    return next((name for kind, name in kinds if isinstance(base.element, kind)), "integer")


def bits_per_weight(fmt: AnyFormat, shape: tuple[int, int] = SHAPE) -> float:
    """Bits per weight of an (out, in) matrix, everything stored counted."""
    return 8 * fmt.nbytes(shape) / (shape[0] * shape[1])


def granularity(fmt: AnyFormat) -> str:
    """What one scale covers: `tensor`, `channel`, `g128`, `b128x128`; empty where there is none."""
    return "" if isinstance(fmt, DenseFormat | ZeroFormat) else core_format(fmt).grain


def scale_kind(fmt: AnyFormat) -> str:
    """The stored form of its scales, with the rule and the zero points where there are such."""
    if isinstance(fmt, DenseFormat | ZeroFormat):
        return ""
    base = core_format(fmt)
    if isinstance(base, SparseFormat | BlockSparseFormat):
        return scale_kind(base.base)
    if isinstance(base, SplitFormat):
        return f"{scale_kind(base.wide)}, {scale_kind(base.base)}"
    if isinstance(base, NestedFormat):
        return {
            "nest": "half, tables", "mat": "half, lines", "mwq": "half per bit, zero",
            "any": "table per row and width", "stack": "half channels, factors per bit",
        }[base.kind]  # fmt: skip
    if base.learned and base.group is None:
        return "table per row"
    kind = base.scale + (f" {base.rule}" if base.rule else "")
    return kind if base.symmetric else f"{kind}, zero"


def describe(name: str) -> Entry:
    """The catalogue's line on a format, by any spelling of it; without text if it has none.

    Raises:
        FormatError: no such format.
    """
    fmt = parse_format(name)
    return next(
        (entry for entry in CATALOGUE if entry.name == fmt.name), Entry(family(fmt), fmt.name, "")
    )
