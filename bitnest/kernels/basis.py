"""Inputs of a matrix in the basis that it is stored in, and back.

A matrix stored as W T_w reads x T_in, T_in T_w^T = 1 (`formats/wrappers`):

    @had @rhad   x R       @awq   x / s       @perm   x[order]

the outermost first. A residual changes no basis.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bitnest.formats import AnyFormat, LowRankFormat, TransformedFormat
from bitnest.kernels.decode import SIGNS_SEED
from bitnest.kernels.hadamard import random_signs, rotate, unrotate, whole_block

Tensors = Mapping[str, torch.Tensor]


def to_stored(x: torch.Tensor, fmt: AnyFormat, tensors: Tensors) -> torch.Tensor:
    """x (..., I) float32 T_in. tensors: `channels` and `order`, where the format has them."""
    if isinstance(fmt, LowRankFormat):
        return to_stored(x, fmt.base, tensors)
    if not isinstance(fmt, TransformedFormat):
        return x
    if fmt.kind == "awq":
        x = x / tensors["channels"].to(x.dtype)
    elif fmt.kind == "perm":
        x = x[..., tensors["order"].long()]
    else:
        x = rotate(x, *_rotation(fmt, x.shape[-1]))
    return to_stored(x, fmt.base, tensors)


def from_stored(x: torch.Tensor, fmt: AnyFormat, tensors: Tensors) -> torch.Tensor:
    """The inverse of `to_stored`, but for rounding."""
    if isinstance(fmt, LowRankFormat):
        return from_stored(x, fmt.base, tensors)
    if not isinstance(fmt, TransformedFormat):
        return x
    x = from_stored(x, fmt.base, tensors)
    if fmt.kind == "awq":
        return x * tensors["channels"].to(x.dtype)
    if fmt.kind == "perm":
        return x[..., tensors["order"].long().argsort()]
    return unrotate(x, *_rotation(fmt, x.shape[-1]))


def _rotation(fmt: TransformedFormat, width: int) -> tuple[int, torch.Tensor | None]:
    signs = random_signs(width, SIGNS_SEED) if fmt.kind == "rhad" else None
    return fmt.block or whole_block(width), signs
