"""Stored tensors to the memory layout of the CPU kernels, whatever the format.

Each family of formats has a file: `why_not` says what stands in the way, `lay_out` converts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import ModuleType

import torch

from bitnest.formats import AnyFormat, BlockFormat, DenseFormat, NestedFormat, SparseFormat
from bitnest.formats.elements import IntElement, TernaryElement
from bitnest.kernels.cpu import layout_integers, layout_nested, layout_tables, sparse
from bitnest.kernels.cpu.library import library
from bitnest.kernels.cpu.linear import CpuWeight
from bitnest.kernels.cpu.sparse import SparseWeight

log = logging.getLogger(__name__)

Tensors = Mapping[str, torch.Tensor]


def families(fmt: AnyFormat) -> tuple[ModuleType, ...]:
    """Files that may lay the format out, in the order they are asked."""
    if isinstance(fmt, BlockFormat):
        whole = isinstance(fmt.element, IntElement | TernaryElement)
        return (layout_integers,) if whole else (layout_integers, layout_tables)
    if isinstance(fmt, DenseFormat):
        return (layout_tables,)
    if isinstance(fmt, NestedFormat):
        return (layout_nested,)
    return ()


def why_not(fmt: AnyFormat, shape: tuple[int, int]) -> str:
    """Why no CPU kernel runs a weight of that format and (out, in) shape; empty: one does."""
    if library() is None:
        return "the C kernels were not built"
    if isinstance(fmt, SparseFormat):
        return sparse.why_not(fmt) or ""
    reasons = [family.why_not(fmt, shape) for family in families(fmt)]
    return min(reasons, key=len, default=f"no CPU kernel for {fmt.name}")


def lay_out(
    tensors: Tensors, fmt: AnyFormat, shape: tuple[int, int]
) -> CpuWeight | SparseWeight | None:
    """The weight stored as `fmt.parts(shape)`, for the CPU kernels; None where `why_not`."""
    if library() is None:
        return None
    if isinstance(fmt, SparseFormat):
        return None if sparse.why_not(fmt) else sparse.lay_out_sparse(tensors, fmt, shape)
    for family in families(fmt):
        if not family.why_not(fmt, shape):
            made: CpuWeight = family.lay_out(tensors, fmt, shape)
            return made
    return None
