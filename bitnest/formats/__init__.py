"""Formats: how one weight is stored, as pure size arithmetic, exact to the byte.

`names` is the grammar of format names, `block` the scaled formats, `sparse` and `block_sparse`
those with weights dropped, `wrappers` what goes around them. How the numbers are chosen is
`quantize/codecs`, how they are decoded `kernels/decode`.
"""

from bitnest.formats.base import DenseFormat, Format, Part, total_bytes
from bitnest.formats.block import BlockFormat, integer
from bitnest.formats.block_sparse import BlockSparseFormat
from bitnest.formats.fates import FateFormat, fates_apart
from bitnest.formats.names import parse_format
from bitnest.formats.nested import NestedFormat
from bitnest.formats.sparse import SparseFormat
from bitnest.formats.split import SplitFormat
from bitnest.formats.wrappers import (
    AnyFormat,
    CodedFormat,
    LowRankFormat,
    PackedFormat,
    TransformedFormat,
    code_bits,
    core_format,
    cut,
    kept_weights,
    refinement,
    widths,
)
from bitnest.formats.zero import ZeroFormat

__all__ = [
    "AnyFormat", "BlockFormat", "BlockSparseFormat", "CodedFormat", "DenseFormat", "FateFormat",
    "Format", "LowRankFormat", "NestedFormat", "PackedFormat", "Part", "SparseFormat",
    "SplitFormat", "TransformedFormat", "ZeroFormat", "code_bits", "core_format", "cut",
    "fates_apart", "integer", "kept_weights", "parse_format", "refinement", "total_bytes", "widths",
]  # fmt: skip
