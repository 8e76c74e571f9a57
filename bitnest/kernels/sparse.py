"""Sparse weights on tensors: masks as bits, decoding survivors, 2:4 indices for hardware.

    pos[o, k]          the input channel of row o's k-th set bit
    w[o, pos[o, k]]  = (value(code[o, k]) - zero[o, pos // g]) * scale[o, pos // g]

and 0 elsewhere: the arithmetic of `kernels/decode.py`, in the order of the survivors.

Left out: products with packed sparse weights, and the order in which a given GPU's tensor cores
want the indices.
"""

from __future__ import annotations

import torch

from bitnest.errors import FormatError
from bitnest.formats import SparseFormat
from bitnest.kernels.packing import pack_bits, unpack_bits


def pack_mask(keep: torch.Tensor) -> torch.Tensor:
    """Bool (O, I) to bits, I32 (O, ceil(I / 32))."""
    return pack_bits(keep.to(torch.uint8), 1)


def positions(mask: torch.Tensor, fmt: SparseFormat, columns: int) -> torch.Tensor:
    """Input channels of the survivors, ascending: (O, K) int64.

    Raises:
        FormatError: a row keeps another number of weights than the format says.
    """
    keep = unpack_bits(mask, 1, columns).bool()
    count = fmt.kept(columns)
    if bool((keep.sum(1) != count).any()):
        raise FormatError(
            f"a mask of {fmt.name} does not keep {count} of {columns} weights in every row",
            hint="the file is damaged: make the artifact again",
        )
    return keep.nonzero()[:, 1].view(len(keep), count)


def spread(
    values: torch.Tensor, place: torch.Tensor, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """Survivors (O, K) at their places in a matrix of zeros (O, columns)."""
    out = torch.zeros(len(values), columns, dtype=dtype, device=values.device)
    return out.scatter_(1, place, values.to(dtype))


def pairs(mask: torch.Tensor, columns: int) -> torch.Tensor:
    """The indices of 2:4 as sparse tensor cores count them: (O, columns / 4, 2) uint8, 0 to 3.

    columns: a multiple of 4. The i-th pair says which of channels 4i to 4i + 3 stay, ascending.
    """
    cells = unpack_bits(mask, 1, columns).unflatten(1, (-1, 4)).bool()
    return cells.nonzero()[:, 2].view(*cells.shape[:2], 2).to(torch.uint8)
