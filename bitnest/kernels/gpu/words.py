"""Codes in the order in which GPU kernels read them, and back.

A matrix (N, K) is cut into superblocks of 128 columns, the last one filled up with zeros. A code is
cut into segments of 8, 4, 2 or 1 bits (`formats/segments.py`); each segment is stored by itself, so
that a prefix of segments is a prefix of bytes. With P codes to an element and L = 128 / P lanes,

    element[block, n, l] = sum over j < P of  code[n, 128 block + L j + l] << (s j)

an integer of s P bits: 32 for the widest segment, 16, 8 or 4... for narrower ones, so all segments
of a weight share P and L, and one shift and mask gives L neighbouring columns of a row. The
elements of a superblock's rows lie behind each other: a tile of rows is one run of bytes.
Segment k begins at byte 16 N blocks (s_0 + ... + s_(k-1)).

Left out: what codes stand for (`layout`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

BLOCK = 128  # columns of a superblock
_ELEMENT = {32: torch.int32, 16: torch.int16, 8: torch.uint8}


def blocks_of(columns: int) -> int:
    """Superblocks of a row."""
    return -(-columns // BLOCK)


def lanes_of(widest: int) -> int:
    """Elements of a row's superblock, where the widest segment has `widest` bits."""
    return BLOCK * widest // 32


def shuffle(segments: Sequence[tuple[torch.Tensor, int]], widest: int) -> torch.Tensor:
    """One buffer int32 (words,) of segments, each codes (N, K) uint8 and their bits."""
    return torch.cat([_shuffled(codes, bits, widest) for codes, bits in segments])


def unshuffle(
    words: torch.Tensor, shape: tuple[int, int], widths: Sequence[int], widest: int
) -> list[torch.Tensor]:
    """Codes (N, K) uint8 of every segment; the inverse of `shuffle`."""
    rows, columns = shape
    size = 4 * rows * blocks_of(columns)  # words per bit
    found, start = [], 0
    for bits in widths:
        part = words[start : start + size * bits]
        found.append(_codes(part, shape, bits, widest))
        start += size * bits
    return found


def _shuffled(codes: torch.Tensor, bits: int, widest: int) -> torch.Tensor:
    rows, columns = codes.shape
    count, lanes = blocks_of(columns), lanes_of(widest)
    per = BLOCK // lanes
    padded = F.pad(codes, (0, count * BLOCK - columns)).view(rows, count, per, lanes)
    element = torch.zeros(rows, count, lanes, dtype=torch.int32, device=codes.device)
    for j in range(per):
        element |= padded[:, :, j].to(torch.int32) << (bits * j)
    element = element.transpose(0, 1).contiguous()
    if bits * per == 32:
        return element.flatten()
    if bits * per >= 8:
        return element.to(_ELEMENT[bits * per]).flatten().view(torch.int32)
    raise AssertionError(f"{bits} of {widest} bits leave less than a byte to an element")


def _codes(words: torch.Tensor, shape: tuple[int, int], bits: int, widest: int) -> torch.Tensor:
    rows, columns = shape
    count, lanes = blocks_of(columns), lanes_of(widest)
    per = BLOCK // lanes
    element = words.contiguous().view(_ELEMENT[bits * per]).view(count, rows, lanes)
    element = element.transpose(0, 1).to(torch.int32)
    mask = (1 << bits) - 1
    codes = torch.empty(rows, count, per, lanes, dtype=torch.uint8, device=words.device)
    for j in range(per):
        codes[:, :, j] = (element >> (bits * j)) & mask
    return codes.view(rows, -1)[:, :columns].contiguous()
