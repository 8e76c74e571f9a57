"""Which weights of a matrix stay: scores, and the exact choice of the highest in every row.

    magnitude    |W_ij|
    wanda        |W_ij| sqrt(H_jj)         (Sun et al., 2023; sqrt(H_jj) is an input's RMS)
    sparsegpt    W_ij^2 / [H^-1]_jj        in the sweep (`sparsegpt`)

A block's score is the sum of its weights' squared ones. Ties go to the lower input channel (of
blocks, to the lower number), so a mask is a function of the scores and its counts exact.
"""

from __future__ import annotations

import torch

from bitnest.formats import BlockSparseFormat, SparseFormat
from bitnest.kernels.block_sparse import cut_blocks, spread_mask
from bitnest.recipe import PRUNERS as METHODS

__all__ = ["METHODS", "block_keep_mask", "fixed_mask", "keep_mask", "top"]


def keep_mask(score: torch.Tensor, fmt: SparseFormat) -> torch.Tensor:
    """Bool like `score` (..., O, I): the weights that stay, of every row or cell the highest."""
    width = score.shape[-1]
    if not fmt.cell:
        return top(score, fmt.kept(width))
    whole = width // fmt.cell * fmt.cell
    cells = top(score[..., :whole].unflatten(-1, (-1, fmt.cell)), fmt.keep).flatten(-2)
    tail = top(score[..., whole:], min(fmt.keep, width - whole))
    return torch.cat([cells, tail], dim=-1)


def top(score: torch.Tensor, count: int) -> torch.Tensor:
    """Bool: the `count` highest along the last axis."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order[..., :count], True)


def fixed_mask(
    weight: torch.Tensor, hessian: torch.Tensor | None, fmt: SparseFormat | BlockSparseFormat
) -> torch.Tensor:
    """Wanda's mask of weights (B, O, I) under H (B, I, I); of magnitudes without H."""
    score = weight.abs()
    if hessian is not None:
        score = score * hessian.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()[:, None]
    return (
        block_keep_mask(score, fmt) if isinstance(fmt, BlockSparseFormat) else keep_mask(score, fmt)
    )


def block_keep_mask(score: torch.Tensor, fmt: BlockSparseFormat) -> torch.Tensor:
    """Bool like `score` (B, O, I): of every matrix the blocks of the highest sums of squares."""
    shape = (score.shape[1], score.shape[2])
    sums = cut_blocks(score.square(), fmt).sum((-1, -2))
    keep = top(sums.flatten(1), fmt.kept(shape)).view_as(sums)
    return spread_mask(keep, fmt, shape)
