"""Dropping blocks in a GPTQ sweep [ours: LPViT's second-order score in SparseGPT's sweep].

LPViT (Xu et al., 2024) drops a block S of a matrix by (dW g)^2 + 1/2 dW^T H dW, dW = -W in S and 0
elsewhere: with H of the matrix' inputs the second term is the sum over its rows of w_S H_SS w_S^T.
The sweep lets what comes later make up for a block, so here it is what remains then:

    cost(S) = sum over rows of w_S ([H_{j:,j:}^-1]_SS)^-1 w_S^T = sum over rows of |w_S U_SS^-1|^2

j the first column of S, U as in `quantize/gptq` ([H_{j:,j:}^-1]_SS = U_SS^T U_SS); it is exactly
the error that dropping S adds when all columns before it are settled. Of the blocks to come the
dearest stay, so many that the matrix ends with its exact count, and what the sweep enters is
settled; all else is `Sweep`: errors of dropping and of rounding go into the columns left, scales
are fitted to what stays.

Left out: the first-order term (dW g)^2. It takes a gradient of every weight, which compress does
not have, and it is small where training has converged.
"""

from __future__ import annotations

import torch

from bitnest.formats import BlockSparseFormat
from bitnest.kernels.block_sparse import spread_mask
from bitnest.prune.sparsegpt import SORTS, Sweep


class BlockSweep(Sweep):
    """A sweep over B matrices that settles columns of blocks, in natural order."""

    fmt: BlockSparseFormat

    def _begin_choice(self) -> None:
        self.shape = (self.w.shape[2], self.width)
        self.block = self.fmt.block(self.shape)
        self.keep = torch.zeros_like(self.w, dtype=torch.bool)
        p, q = self.fmt.grid(self.shape)
        left = p * q - self.fmt.kept(self.shape)
        self.left = torch.full((len(self.w), 1), left, device=self.w.device)
        c = self.block[1]
        self.step = max(1, q // SORTS) * c  # wide matrices settle several columns of blocks at once
        own = torch.eye(c, dtype=self.w.dtype, device=self.w.device).repeat(len(self.w), q, 1, 1)
        for i in range(q):  # U_SS of every column of blocks, the last may be narrower
            part = self.factor[:, i * c : (i + 1) * c, i * c : (i + 1) * c]
            own[:, i, : part.shape[1], : part.shape[2]] = part
        eye = torch.eye(c, dtype=own.dtype, device=own.device).expand_as(own)
        self.inverses = torch.linalg.solve_triangular(own, eye, upper=True).transpose(2, 3)

    def _costs(self, start: int) -> torch.Tensor:
        """Of the blocks from column `start` on, as weights look now: (B, P, Q - start / C)."""
        r, c = self.block
        w = self.w[:, start:]
        pad = (0, -w.shape[2] % r, 0, -w.shape[1] % c)
        w = torch.nn.functional.pad(w, pad).unflatten(1, (-1, c))
        cost = (self.inverses[:, start // c :] @ w).square_().sum(2)
        return cost.unflatten(2, (-1, r)).sum(3).transpose(1, 2)

    def _settle(self, start: int, stop: int) -> None:
        """Settle which blocks of the columns from `start` on stay, where blocks begin there; for
        columns after `stop`, as it looks."""
        c = self.block[1]
        if start % self.step:
            return  # settled with those before
        costs = self._costs(start)
        order = costs.flatten(1).argsort(dim=1, stable=True)
        place = torch.arange(order.shape[1], device=order.device).expand_as(order)
        drop = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order, place < self.left)
        drop = drop.view_as(costs)
        if stop > start:
            self.left = self.left - drop[:, :, : self.step // c].sum((1, 2))[:, None]
        left = (self.shape[0], self.width - start)
        rest = spread_mask(~drop, self.fmt, left) if left[1] else drop
        self.keep[:, start:] = rest.transpose(1, 2)

    def _block_end(self, start: int) -> int:
        """Columns of blocks begin where the sweep's blocks do, and groups too, or lie in one."""
        if not self.chosen:
            return super()._block_end(start)
        end = min((start // self.step + 1) * self.step, self.width)
        if self.step % self.g:
            end = min(end, (start // self.g + 1) * self.g)
        return end
