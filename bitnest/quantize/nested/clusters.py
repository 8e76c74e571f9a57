"""any: tables per row by splitting clusters, after Any-Precision LLM.

A row's weights are clustered at the narrowest width by k-means weighted with sensitivity, here
diag(H) (`quantize/codecs/tables.py`); for every further bit each cluster is cut in two where that
lowers its weighted squared error most, exactly. An entry is its cluster's weighted mean. No errors
are compensated, as there. (Any-Precision starts at 3 bits, from SqueezeLLM's tables.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bitnest.formats.block import BlockFormat
from bitnest.formats.elements import TableElement
from bitnest.formats.nested import NestedFormat
from bitnest.kernels.nested import split_planes
from bitnest.quantize.codecs.tables import learn_table, table_codes

TINY = 1e-300


@dataclass
class Clusters:
    """One solved matrix. codes: (O, I) uint8 of the widest width. tables: by width, (O, 2^w).
    weight: (O, I) at the widest width."""

    fmt: NestedFormat
    codes: torch.Tensor
    tables: dict[int, torch.Tensor]
    weight: torch.Tensor

    def store(self, half: torch.dtype, rows: slice = slice(None)) -> dict[str, torch.Tensor]:
        """Tensors of some rows as the format lays them out."""
        tables = {f"table{w}": t[rows].to(half).contiguous() for w, t in self.tables.items()}
        return {**split_planes(self.codes[rows], self.fmt), **tables}


def solve_clusters(
    weight: torch.Tensor,
    hessian: torch.Tensor | None,
    fmt: NestedFormat,
    *,
    half: torch.dtype = torch.bfloat16,
) -> Clusters:
    """Tables of weight (O, I) float32, weighted by diag(hessian (I, I)), or by ones."""
    columns = weight.shape[1]
    ones = torch.ones(columns, device=weight.device)
    h = ones if hessian is None else hessian.diagonal().clamp_min(1e-20)
    h = h / h.mean()
    first, top = fmt.widths[0], fmt.widths[-1]
    base = BlockFormat(TableElement(first, learned=True), None)
    table = learn_table(weight.T[None], h[None, :, None], base, half)[0].T
    order = weight.argsort(dim=1)
    x = weight.gather(1, order).double()
    hs = h[order].double()
    code = table_codes(weight, table).gather(1, order).long()
    sums = _running(x * hs), _running(hs)
    tables: dict[int, torch.Tensor] = {}
    for width in range(first, top + 1):
        if width > first:
            code = _split(code, *sums)
        if width in fmt.widths:
            tables[width] = _means(code, 1 << width, x, hs).to(half).float()
    back = order.argsort(dim=1)
    codes = code.gather(1, back).to(torch.uint8)
    decoded = tables[top].gather(1, codes.long())
    return Clusters(fmt, codes, tables, decoded)


def _running(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(x.cumsum(1), (1, 0))


def _split(code: torch.Tensor, weighted: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """One more bit for ascending codes (O, I) of sorted values: every cluster cut at its best."""
    rows, columns = code.shape
    wide = torch.arange(columns, device=code.device).expand(rows, -1)
    start = torch.full((rows, 256), columns, device=code.device)
    start.scatter_reduce_(1, code, wide, "amin")
    stop = torch.zeros((rows, 256), dtype=torch.long, device=code.device)
    stop.scatter_reduce_(1, code, wide + 1, "amax")
    a, b = start.gather(1, code), stop.gather(1, code)  # of the cluster each value is in

    def energy(i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        top = weighted.gather(1, j) - weighted.gather(1, i)
        return top.square() / (mass.gather(1, j) - mass.gather(1, i)).clamp_min(TINY)

    cut = wide.clone()  # the upper half would begin here
    gain = torch.where(cut > a, energy(a, cut) + energy(cut, b), -torch.inf)
    best = torch.full((rows, 256), -torch.inf, dtype=gain.dtype, device=code.device)
    best.scatter_reduce_(1, code, gain, "amax")
    where = torch.where((gain == best.gather(1, code)) & (gain > -torch.inf), cut, columns)
    place = torch.full((rows, 256), columns, device=code.device)
    place.scatter_reduce_(1, code, where, "amin")
    return 2 * code + (wide >= place.gather(1, code)).long()


def _means(code: torch.Tensor, size: int, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Weighted means of the clusters (O, size); an empty one has its neighbour's to the left."""
    top = torch.zeros(len(x), size, dtype=x.dtype, device=x.device).scatter_add_(1, code, x * h)
    mass = torch.zeros_like(top).scatter_add_(1, code, h)
    means = top / mass.clamp_min(TINY)
    filled = torch.where(mass > 0, torch.arange(size, device=x.device), -1).cummax(1).values
    first = (mass > 0).to(torch.uint8).argmax(1, keepdim=True)
    return means.gather(1, torch.where(filled < 0, first, filled))
