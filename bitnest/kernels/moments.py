"""Sums over the rows of a matrix in one pass: largest, absolute, square, peaks of blocks, outliers.

    absmax  = max(absmax, max_t |x_tc|)        abs += sum_t |x_tc|        square += sum_t x_tc^2
    peaks  += sum over rows and blocks of b channels of (max |x| in the block)^2 * block length
    returned: number of values with |x| >= 6

and over the outputs y of an expert with gates g:

    total += sum_t y_tc      square += sum_t y_tc^2
    norms += (sum g, sum g^2, sum |y_t|, sum g |y_t|)

C (`moments.c`) where there is a compiler and x lies on the CPU, else torch, the reference. Sums of
the two differ by float32 rounding of at most 32 values.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from bitnest.kernels import native

BLOCKS = (16, 32, 128)
OUTLIER = 6.0


def add_rows(
    x: torch.Tensor,
    absmax: torch.Tensor,
    total: torch.Tensor,
    square: torch.Tensor,
    peaks: torch.Tensor,
) -> int:
    """Add rows x (n, width) float32 to absmax (width,) float32, total and square (width,) float64
    and peaks (3,) float64, all in place; gives the number of outliers."""
    library = _library()
    if library is None or x.device.type != "cpu":
        return reference(x, absmax, total, square, peaks)
    assert x.dtype == torch.float32
    if x.stride(-1) != 1:  # C reads along a row
        x = x.contiguous()
    sums = (absmax, total, square, peaks)
    assert all(t.is_contiguous() for t in sums)
    rows, width = x.shape
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in sums)
    found = library.moments_add(ctypes.c_void_p(x.data_ptr()), rows, width, x.stride(0), *pointers)
    return int(found)


def reference(
    x: torch.Tensor,
    absmax: torch.Tensor,
    total: torch.Tensor,
    square: torch.Tensor,
    peaks: torch.Tensor,
) -> int:
    """The same in torch."""
    if not len(x):
        return 0
    a = x.abs()
    absmax.copy_(torch.maximum(absmax, a.amax(0).to(absmax.device)))
    total += a.sum(0, dtype=torch.float64).to(total.device)
    square += a.double().square().sum(0).to(square.device)
    for i, block in enumerate(BLOCKS):
        short = x.shape[1] % block
        full = a[:, : x.shape[1] - short].unflatten(1, (-1, block)).amax(2).double()
        peaks[i] += block * float(full.square().sum())
        if short:
            peaks[i] += short * float(a[:, -short:].amax(1).double().square().sum())
    return int((a >= OUTLIER).sum())


def add_outputs(
    y: torch.Tensor,
    gates: torch.Tensor,
    total: torch.Tensor,
    square: torch.Tensor,
    norms: torch.Tensor,
) -> None:
    """Add outputs y (n, width) with gates (n,), float32, to total and square (width,) and norms
    (4,), float64, in place."""
    library = _library()
    if library is None or y.device.type != "cpu":
        reference_outputs(y, gates, total, square, norms)
        return
    tensors = (y.contiguous(), gates.contiguous(), total, square, norms)
    assert all(t.is_contiguous() for t in tensors) and y.dtype == gates.dtype == torch.float32
    y_at, gates_at, *sums = (ctypes.c_void_p(t.data_ptr()) for t in tensors)
    library.moments_outputs(y_at, gates_at, y.shape[0], y.shape[1], *sums)


def reference_outputs(
    y: torch.Tensor,
    gates: torch.Tensor,
    total: torch.Tensor,
    square: torch.Tensor,
    norms: torch.Tensor,
) -> None:
    """The same in torch."""
    y, g = y.double(), gates.double()
    norm = y.norm(dim=1)
    total += y.sum(0).to(total.device)
    square += y.square().sum(0).to(square.device)
    norms += torch.stack([g.sum(), g.square().sum(), norm.sum(), (g * norm).sum()]).to(norms.device)


@cache
def _library() -> ctypes.CDLL | None:
    library = native.load("moments")
    if library is not None:
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        library.moments_add.restype = count
        library.moments_add.argtypes = [pointer, count, count, count, *[pointer] * 4]
        library.moments_outputs.restype = None
        library.moments_outputs.argtypes = [pointer, pointer, count, count, *[pointer] * 3]
    return library
