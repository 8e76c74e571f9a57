"""What native code takes: rules on formats alone, without torch or a compiler.

`kernels/encode.c` rounds a row's groups one after the other, each with what is stored for it and at
most one number for the whole matrix. Left out are scales that rows share (blocks, dq, dual) or that
are found from a whole row (m2), tables learned for a matrix, ternary codes, and the symmetric
one-bit integers, whose two values are halves.
"""

from __future__ import annotations

from bitnest.formats.base import DenseFormat
from bitnest.formats.block import BlockFormat
from bitnest.formats.elements import FloatElement, IntElement, TableElement
from bitnest.formats.wrappers import AnyFormat, core_format
from bitnest.formats.zero import ZeroFormat

NATIVE_SCALES = frozenset({"half", "e8m0", "m1", "e4m3"})


def native_encoder(fmt: AnyFormat) -> bool:
    """Whether the C encoder rounds to nearest in `fmt`, or in the format inside its wrappers."""
    if isinstance(fmt, DenseFormat | ZeroFormat):
        return False
    base = core_format(fmt)
    if not isinstance(base, BlockFormat):
        return False
    if base.rows != 1 or base.scale not in NATIVE_SCALES:
        return False
    element = base.element
    if isinstance(element, IntElement):
        return element.bits > 1 or not element.symmetric
    table = isinstance(element, TableElement) and not element.learned
    return table or isinstance(element, FloatElement)
