"""SparseGPT (Frantar and Alistarh, 2023): dropping and rounding in one GPTQ sweep.

With U as in `quantize/gptq`, U_jj^2 = [H_{j:,j:}^-1]_jj: dropping weight j, when all before it
are settled and all after it free to compensate, costs w_j^2 / U_jj^2 (OBS). So

    before a block of columns    every row drops its lowest w_j^2 / U_jj^2
    for each column j:           q_j  = round(w_j) if it stays, else 0
                                 err  = (w_j - q_j) / U_jj
                                 w_k -= err * U_jk              for all k > j

Unstructured, a row's R drops still to come are the R lowest among all its columns left, of which
those in the block are settled: blocks may differ in how much they lose, rows end with the exact
count. (SparseGPT's threshold is one for all rows of a block, its count of drops fixed per block.)
Of n:m, a cell is settled when the sweep enters it. Scales of a group are fitted, when the sweep
enters it, to what would stay by the scores at that time.

Columns go in their natural order; of n:m by diag(H): groups, cells within a group and columns
within a cell descend. (Each is the better of the two, by 2 to 5 % of the error on `books-moe`.)
With a mask given, nothing is chosen: survivors are quantised around it.
"""

from __future__ import annotations

import torch

from bitnest.formats import BlockSparseFormat, SparseFormat
from bitnest.prune.masks import keep_mask, top
from bitnest.quantize.codecs.block import BlockCodec, Grid
from bitnest.quantize.codecs.scales import Shared
from bitnest.quantize.gptq import (
    Quantized,
    decode_levels,
    gather_rows,
    inverse_factor,
    refit_better,
    zero_points,
)

BLOCK = 128  # columns whose compensation of the rest is one product
SETTLED = 32  # columns settled together, unstructured: the fewer, the better they are known
SORTS = 64  # of all columns left, at most about: wide matrices settle more columns at once


def cell_order(diagonal: torch.Tensor, g: int, m: int) -> torch.Tensor:
    """Order of the columns (B, I): `column_order` with cells of m kept whole; natural without m.

    diagonal: (B, I). Short last groups and cells keep the last place of what holds them.
    """
    width = diagonal.shape[1]
    index = torch.arange(width, device=diagonal.device)
    if not m:
        return index.expand(len(diagonal), -1).contiguous()
    order = diagonal.argsort(dim=1, descending=True, stable=True)
    for size in dict.fromkeys((m, g)):
        part = index // size
        energy = diagonal.new_zeros(len(diagonal), int(part[-1]) + 1)
        energy.index_add_(1, part, diagonal)
        if width % size:
            energy[:, -1] = -1  # H_jj is never negative: the short one comes last
        order = order.gather(1, part[order].argsort(dim=1, stable=True))
        keys = energy[:, part].gather(1, order)
        order = order.gather(1, keys.argsort(dim=1, descending=True, stable=True))
    return order


class Sweep:
    """One sweep over B matrices.

    codec: None for 16-bit survivors. keep: (B, O, I) a mask to hold to, or None to choose one.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        hessian: torch.Tensor,
        fmt: SparseFormat | BlockSparseFormat,
        codec: BlockCodec | None,
        damp: float,
        keep: torch.Tensor | None,
    ) -> None:
        self.fmt, self.codec, self.chosen = fmt, codec, keep is None
        width = weight.shape[2]
        self.width = width
        self.g = codec.fmt.group_size(width) if codec else width
        diagonal = hessian.diagonal(dim1=1, dim2=2).clamp_min(0)
        self.order = cell_order(diagonal, self.g, fmt.cell)
        self.w = gather_rows(weight.transpose(1, 2), self.order)
        permuted = gather_rows(gather_rows(hessian, self.order).transpose(1, 2), self.order)
        self.importance = diagonal.gather(1, self.order).unsqueeze(-1)
        self.factor = inverse_factor(permuted, damp)
        self.pivots = self.factor.diagonal(dim1=1, dim2=2).unsqueeze(2).contiguous()
        if keep is None:
            self._begin_choice()
        else:
            self.keep = gather_rows(keep.transpose(1, 2), self.order)
        self.shared = Shared()
        if codec:
            self.shared = codec.prepare(weight.transpose(1, 2), diagonal.unsqueeze(-1))
        self.grids: list[Grid] = []

    def _begin_choice(self) -> None:
        """Nothing is chosen yet. left: drops to come, of every row."""
        assert isinstance(self.fmt, SparseFormat)
        self.keep = torch.zeros_like(self.w, dtype=torch.bool)
        left = self.width - self.fmt.kept(self.width)
        self.left = torch.full((*self.w.shape[::2], 1), left, device=self.w.device)

    def run(self) -> torch.Tensor:
        """Levels, or weights without a codec, (B, I, O) in the sweep's order; w is used up."""
        width, w, factor = self.width, self.w, self.factor
        levels = torch.zeros_like(w)
        if self.codec and self.g >= width:
            if self.chosen and not self.fmt.cell:
                self._settle(0, 0)
            self._fit(0, width)
        stop = 0
        while stop < width:
            start, stop = stop, self._block_end(stop)
            if self.chosen and not self.fmt.cell:
                self._settle(start, stop)
            errors = torch.empty_like(w[:, start:stop])
            for j in range(start, stop):
                if self.g < width and j % self.g == 0:
                    self._fit(j, min(j + self.g, width))
                if self.chosen and self.fmt.cell and self._enters_cell(j):
                    self._cell(j)
                column, keep = w[:, j : j + 1], self.keep[:, j : j + 1]
                level = column.clone()
                value = level
                if self.codec:
                    level = self.codec.snap(column, self.grids[-1])
                    value = level * self.grids[-1].scale
                levels[:, j : j + 1] = level * keep
                miss = (column - value * keep).div_(self.pivots[:, j : j + 1])
                errors[:, j - start : j - start + 1] = miss
                if j + 1 < stop:
                    w[:, j + 1 : stop].addcmul_(factor[:, j, j + 1 : stop, None], miss, value=-1)
            if stop < width:
                update = factor[:, start:stop, stop:].transpose(1, 2)
                w[:, stop:].baddbmm_(update, errors, alpha=-1)
        return levels

    def _score(self, a: int, z: int) -> torch.Tensor:
        """w^2 / U_jj^2 of columns a to z, (B, O, z - a)."""
        return (self.w[:, a:z] / self.pivots[:, a:z]).square_().transpose(1, 2).contiguous()

    def _settle(self, start: int, stop: int) -> None:
        """Settle which weights of a block stay, unstructured; for columns after it, as it looks."""
        order = self._score(start, self.width).argsort(dim=2, stable=True)
        place = torch.arange(order.shape[2], device=order.device).expand_as(order)
        drop = torch.zeros_like(order, dtype=torch.bool).scatter_(2, order, place < self.left)
        self.left = self.left - drop[:, :, : stop - start].sum(2, keepdim=True)
        self.keep[:, start:] = ~drop.transpose(1, 2)

    def _block_end(self, start: int) -> int:
        """Where the block that starts there ends: groups begin where blocks do, or lie in one."""
        size = BLOCK
        if self.chosen and not self.fmt.cell:
            size = max(SETTLED, self.width // SORTS // 16 * 16)
        if self.g <= size:
            return min(start + size // self.g * self.g, self.width)
        return min(start + size, (start // self.g + 1) * self.g, self.width)

    def _enters_cell(self, j: int) -> bool:
        """Cells begin at multiples of m within their group: only the last group is not one of m,
        and its short cell is its last."""
        return (j % self.g) % self.fmt.cell == 0

    def _cell(self, j: int) -> None:
        """Settle which weights of the cell at j stay."""
        z = min(j + self.fmt.cell, self.width)
        count = min(self.fmt.keep, z - j)
        self.keep[:, j:z] = top(self._score(j, z), count).transpose(1, 2)

    def _fit(self, a: int, z: int) -> None:
        """Scales of columns a to z, fitted to what stays as it looks now."""
        assert self.codec is not None
        keep = self.keep[:, a:z]
        if self.chosen and self.fmt.cell:
            assert isinstance(self.fmt, SparseFormat)
            keep = keep_mask(self._score(a, z), self.fmt).transpose(1, 2)
        part = self.w[:, a:z] * keep
        self.grids.append(self.codec.fit(part, self.importance[:, a:z], self.shared))


def sparse_gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    fmt: SparseFormat | BlockSparseFormat,
    codec: BlockCodec | None,
    *,
    damp: float = 0.03,
    keep: torch.Tensor | None = None,
    kind: type[Sweep] = Sweep,
) -> tuple[Quantized | torch.Tensor, torch.Tensor]:
    """Drop and quantise B matrices, each against its own H; see above.

    weight: (B, O, I) float32, unchanged. hessian: (B, I, I) float32. keep: a mask (B, O, I) to hold
    to; weights it drops must be 0 then. Returns what is left, its levels 0 where dropped (without a
    codec the weights themselves), and the mask. kind: of the sweep.
    """
    sweep = kind(weight, hessian, fmt, codec, damp, keep)
    levels = sweep.run()
    back = sweep.order.argsort(dim=1)
    levels = gather_rows(levels, back).transpose(1, 2).contiguous()
    mask = gather_rows(sweep.keep, back).transpose(1, 2).contiguous()
    if codec is None:
        return levels, mask
    g, grids = sweep.g, sweep.grids
    place = (sweep.order[:, ::g] // g).argsort(dim=1)[:, None].expand(-1, weight.shape[1], -1)
    scales = torch.stack([grid.scale.squeeze(1) for grid in grids], dim=2).gather(2, place)
    zeros = zero_points(grids)
    zeros = None if zeros is None else zeros.gather(2, place)
    decoded = decode_levels(levels, scales, g)
    miss = weight - decoded
    pull = miss @ hessian
    error = (pull * miss).sum(2)
    result = Quantized(codec, sweep.shared, levels, scales, zeros, decoded, error)
    if codec.refits:
        refit_better(result, weight, hessian, pull, g)
    return result, mask
