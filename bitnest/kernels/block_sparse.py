"""Block-sparse weights on tensors: matrices cut into blocks, masks of blocks, and back.

    block (p, q) of (O, I)    rows pR to pR + R, columns qC to qC + C, number p Q + q
    w = (value(code) - zero) * scale in blocks whose bit is set, 0 elsewhere

the arithmetic of `kernels/decode.py`. Left out: products with packed blocks.
"""

from __future__ import annotations

import torch

from bitnest.errors import FormatError
from bitnest.formats import BlockSparseFormat
from bitnest.kernels.packing import pack_bits, unpack_bits


def cut_blocks(matrix: torch.Tensor, fmt: BlockSparseFormat) -> torch.Tensor:
    """(..., O, I) as blocks (..., P, Q, R, C), edges filled up with 0."""
    shape = (matrix.shape[-2], matrix.shape[-1])
    (r, c), (p, q) = fmt.block(shape), fmt.grid(shape)
    padded = torch.nn.functional.pad(matrix, (0, q * c - shape[1], 0, p * r - shape[0]))
    return padded.unflatten(-1, (q, c)).unflatten(-3, (p, r)).transpose(-3, -2)


def join_blocks(blocks: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The inverse: (..., P, Q, R, C) to (..., O, I)."""
    whole = blocks.transpose(-3, -2).flatten(-4, -3).flatten(-2, -1)
    return whole[..., : shape[0], : shape[1]]


def spread_mask(keep: torch.Tensor, fmt: BlockSparseFormat, shape: tuple[int, int]) -> torch.Tensor:
    """Of blocks (..., P, Q) to that of weights (..., O, I)."""
    r, c = fmt.block(shape)
    wide = keep.repeat_interleave(r, -2).repeat_interleave(c, -1)
    return wide[..., : shape[0], : shape[1]]


def pack_block_mask(keep: torch.Tensor) -> torch.Tensor:
    """Bool (P, Q) to bits, I32 (ceil(P Q / 32),)."""
    return pack_bits(keep.flatten().to(torch.uint8), 1)


def block_mask(mask: torch.Tensor, fmt: BlockSparseFormat, shape: tuple[int, int]) -> torch.Tensor:
    """Bits to bool (P, Q).

    Raises:
        FormatError: another number of blocks than the format says.
    """
    p, q = fmt.grid(shape)
    keep = unpack_bits(mask, 1, p * q).bool()
    if int(keep.sum()) != fmt.kept(shape):
        raise FormatError(
            f"a mask of {fmt.name} does not keep {fmt.kept(shape)} of {p * q} blocks",
            hint="the file is damaged: make the artifact again",
        )
    return keep.view(p, q)


def place_blocks(
    stored: torch.Tensor, keep: torch.Tensor, fmt: BlockSparseFormat, shape: tuple[int, int]
) -> torch.Tensor:
    """Blocks that stay (N, R C), in the order of their numbers, as a matrix (O, I); 0 elsewhere."""
    r, c = fmt.block(shape)
    blocks = torch.zeros(keep.numel(), r * c, dtype=stored.dtype, device=stored.device)
    blocks[keep.flatten()] = stored
    return join_blocks(blocks.view(*keep.shape, r, c), shape)
