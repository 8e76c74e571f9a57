"""Solving a sparse format: which weights stay, what they become, and how that is stored.

    sparsegpt    mask, rounding and compensation in one sweep; needs H and method gptq. Of blocks:
                 `block_sweep`
    wanda        the mask of |W_ij| sqrt(H_jj); survivors quantised (gptq or rtn) as they are
    magnitude    the mask of |W_ij|; the same

Without H every method is magnitude's, and with method rtn sparsegpt's mask is wanda's. Wanda and
magnitude leave 16-bit survivors as they were, as published.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from bitnest.errors import RecipeError
from bitnest.formats import BlockSparseFormat, DenseFormat, SparseFormat
from bitnest.kernels.block_sparse import cut_blocks, pack_block_mask
from bitnest.kernels.sparse import pack_mask
from bitnest.prune.block_sweep import BlockSweep
from bitnest.prune.masks import METHODS, fixed_mask
from bitnest.prune.sparsegpt import Sweep, sparse_gptq
from bitnest.quantize.codecs.block import BlockCodec
from bitnest.quantize.gptq import Quantized, rtn


@dataclass
class Pruned:
    """Sparse matrices. weight: (B, O, I) float32, 0 where dropped. error: (B, O). keep: bool
    (B, O, I). quantized: levels and scales, None for 16-bit survivors. half: their type."""

    fmt: SparseFormat | BlockSparseFormat
    weight: torch.Tensor
    error: torch.Tensor
    keep: torch.Tensor
    quantized: Quantized | None
    half: torch.dtype

    def store(self, b: int, rows: slice) -> dict[str, torch.Tensor]:
        """Packed tensors of some rows of matrix b, which are one site's."""
        if isinstance(self.fmt, BlockSparseFormat):
            return self._store_blocks(self.fmt, b, rows)
        keep = self.keep[b, rows]
        count = self.fmt.kept(keep.shape[1])
        place = keep.nonzero()[:, 1].view(len(keep), count)
        own = {"mask": pack_mask(keep)}
        if self.quantized is None:
            values = self.weight[b, rows].gather(1, place).to(self.half)
            return {**own, "values": values}
        q = self.quantized
        levels, shared = q.levels[b, rows].gather(1, place), q.shared.of(b, rows)
        zeros = None
        if q.zeros is not None:
            zeros = q.zeros[b, rows].gather(1, place // q.codec.fmt.group_size(keep.shape[1]))
        own |= q.codec.pack(q.codec.codes(levels, zeros, shared))
        return {**own, **{k: t for k, t in q.store(b, rows).items() if k not in own}}

    def _store_blocks(self, fmt: BlockSparseFormat, b: int, rows: slice) -> dict[str, torch.Tensor]:
        """The same of blocks; rows: all of the matrix."""
        keep = cut_blocks(self.keep[b, rows].to(torch.uint8), fmt).amax((-1, -2)).bool()
        own = {"mask": pack_block_mask(keep)}
        if self.quantized is None:
            values = cut_blocks(self.weight[b, rows].to(self.half), fmt)
            return {**own, "values": values[keep].flatten(1).contiguous()}
        q, shared, zeros = self.quantized, self.quantized.shared.of(b, rows), None
        levels = q.levels[b, rows]
        if q.zeros is not None:
            g, width = q.codec.fmt.group_size(levels.shape[1]), levels.shape[1]
            zeros = q.zeros[b, rows].repeat_interleave(g, dim=1)[:, :width]
        codes = cut_blocks(q.codec.codes(levels, zeros, shared), fmt)
        own |= q.codec.pack(codes[keep].flatten(1).contiguous())
        return {**own, **{k: t for k, t in q.store(b, rows).items() if k not in own}}


def solve_sparse(
    weight: torch.Tensor,
    hessian: torch.Tensor | None,
    fmt: SparseFormat | BlockSparseFormat,
    *,
    half: torch.dtype,
    damp: float,
    clip: bool = True,
    compensate: bool = True,
    prune: str = "sparsegpt",
) -> Pruned:
    """Prune and quantise B matrices (B, O, I) float32, each against its own H if there is one.

    compensate: method gptq. prune: one of `masks.METHODS`. The error without H is the plain squared
    difference.

    Raises:
        RecipeError: no such method of pruning.
    """
    if prune not in METHODS:
        raise RecipeError(f"unknown pruning method '{prune}'", hint=", ".join(METHODS))
    base = fmt.base
    codec = None if isinstance(base, DenseFormat) else BlockCodec(base, half, clip)
    sweep = hessian is not None and compensate
    quantized: Quantized | None = None
    if sweep and prune == "sparsegpt":
        assert hessian is not None
        kind = BlockSweep if isinstance(fmt, BlockSparseFormat) else Sweep
        found, keep = sparse_gptq(weight, hessian, fmt, codec, damp=damp, kind=kind)
        left = found.weight if isinstance(found, Quantized) else found
        quantized = found if isinstance(found, Quantized) else None
    else:
        keep = fixed_mask(weight, None if prune == "magnitude" else hessian, fmt)
        left = weight * keep
        if codec is not None:
            if sweep:
                assert hessian is not None
                found, _ = sparse_gptq(left, hessian, fmt, codec, damp=damp, keep=keep)
                assert isinstance(found, Quantized)
                quantized = found
            else:
                quantized = rtn(left, codec)
                quantized = replace(quantized, weight=quantized.weight * keep)
            left = quantized.weight
    if quantized is None:
        left = left.to(half).float()
    miss = weight - left
    error = miss.square().sum(2) if hessian is None else ((miss @ hessian) * miss).sum(2)
    return Pruned(fmt, left, error, keep, quantized, half)
