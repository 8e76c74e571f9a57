"""Low-rank residuals behind a product, in the same job.

    y = x W^T + ((x right^T) s) left^T,    s = left_scales right_scales

left (O, r) and right (r, I) in 8 bits. x right^T is a sum of products of integers, exact within a
block of inputs; the rest is float32. Threads split the rank, multiply their rows of W, wait for one
another, and add to the rows that they have just written: nothing is read twice.

The reference is `add_reference`. Relative error against float64 is that of coding the inputs: 1e-4
of the residual for two planes, 1e-6 for three.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from bitnest.kernels.cpu import team

ROWS, UNIT = 16, 32


class Factors(ctypes.Structure):
    """`lowrank_t` of lowrank.h."""

    _fields_ = [
        ("rows", c_int64), ("columns", c_int64), ("rank", c_int64),
        ("right", c_void_p), ("left", c_void_p), ("scale", c_void_p),
    ]  # fmt: skip


@dataclass(frozen=True)
class LowRank:
    """Factors as the kernel reads them. shape: (O, I). right: (r, I padded to 32) int8. left:
    (blocks of 16 rows, r, 16) int8. scales: of left's columns and right's rows, as stored.
    """

    shape: tuple[int, int]
    right: torch.Tensor
    left: torch.Tensor
    scales: tuple[torch.Tensor, torch.Tensor]
    product: torch.Tensor

    @property
    def rank(self) -> int:
        """r."""
        return len(self.right)

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return sum(t.nbytes for t in (self.right, self.left, *self.scales, self.product))

    @property
    def struct(self) -> Factors:
        """For the C functions; points into this."""
        return Factors(
            *self.shape, self.rank, self.right.data_ptr(), self.left.data_ptr(),
            self.product.data_ptr(),
        )  # fmt: skip

    def restore(self) -> dict[str, torch.Tensor]:
        """The stored tensors."""
        rows, columns = self.shape
        left = self.left.permute(0, 2, 1).reshape(-1, self.rank)[:rows].contiguous()
        return {
            "left": left, "left_scales": self.scales[0],
            "right": self.right[:, :columns].contiguous(), "right_scales": self.scales[1],
        }  # fmt: skip


def lay_out_lowrank(tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> LowRank:
    """Factors of a weight (O, I) from `left`, `left_scales`, `right` and `right_scales`."""
    left, right = tensors["left"], tensors["right"]
    rank = len(right)
    padded = F.pad(left, (0, 0, 0, -shape[0] % ROWS))
    scales = tensors["left_scales"], tensors["right_scales"]
    return LowRank(
        shape,
        F.pad(right, (0, -shape[1] % UNIT)).contiguous(),
        padded.view(-1, ROWS, rank).permute(0, 2, 1).contiguous(),
        scales,
        scales[0].float() * scales[1].float(),
    )


def declare(library: ctypes.CDLL) -> None:
    """Say what the C function takes."""
    library.lowrank_linear.argtypes = [c_void_p] * 5 + [c_int64, c_void_p]
    library.lowrank_linear.restype = None


def add_lowrank(y: torch.Tensor, x: Any, residual: LowRank, weight: Any = None) -> torch.Tensor:
    """y (T, O) float32 contiguous += the residual's product with inputs x (an `inputs_t` of codes);
    with weight, a `weight_t` in the same basis, y becomes the sum of both products instead."""
    return product_lowrank(y, weight, x, x, residual)


def product_lowrank(
    y: torch.Tensor, weight: Any, x: Any, own: Any, residual: LowRank
) -> torch.Tensor:
    """The same of a weight whose basis is another: x in it, own before its transform."""
    library = team.library()
    assert library is not None, "no native code here"
    between = torch.empty(max(1, own.tokens), residual.rank)
    struct = residual.struct
    if own.tokens:
        library.lowrank_linear(
            None if weight is None else ctypes.addressof(weight), ctypes.addressof(x),
            ctypes.addressof(own), ctypes.addressof(struct), y.data_ptr(), y.stride(0),
            between.data_ptr(),
        )  # fmt: skip
    return y


def add_reference(
    y: torch.Tensor, x: torch.Tensor, tensors: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """y + (x right^T) left^T of x (T, I) in its type, factors decoded."""
    right = tensors["right"].to(x.dtype) * tensors["right_scales"].to(x.dtype)[:, None]
    left = tensors["left"].to(x.dtype) * tensors["left_scales"].to(x.dtype)
    return y + (x @ right.T) @ left.T
