"""Sums over the rows of a matrix in one pass: largest, absolute, square, peaks of blocks, outliers.

    absmax  = max(absmax, max_t |x_tc|)        abs += sum_t |x_tc|        square += sum_t x_tc^2
    peaks  += sum over rows and blocks of b channels of (max |x| in the block)^2 * block length
    returned: number of values with |x| >= 6

and over the outputs y of an expert with gates g:

    total += sum_t y_tc      square += sum_t y_tc^2
    norms += (sum g, sum g^2, sum |y_t|, sum g |y_t|)

and over a sample of rows, in how many each channel is among the largest; and over a router's logits
their sums and a histogram of the margin between the last expert chosen and the next.

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
    pointers = (t.data_ptr() for t in sums)
    return int(library.moments_add(x.data_ptr(), rows, width, x.stride(0), *pointers))


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
    y_at, gates_at, *sums = (t.data_ptr() for t in tensors)
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


def rank_rows(x: torch.Tensor, top: int, counts: torch.Tensor) -> None:
    """Add to counts (width,) int64 in how many rows of x (n, width) float32 a channel is among the
    `top` largest |x|; which of equal ones, is not said."""
    library = _library()
    if library is None or x.device.type != "cpu":
        found = x.abs().topk(top, dim=1).indices.flatten().cpu()
        counts += torch.bincount(found, minlength=len(counts))
        return
    if x.stride(-1) != 1:
        x = x.contiguous()
    assert x.dtype == torch.float32 and counts.is_contiguous() and top <= x.shape[1] == len(counts)
    values, channels = torch.empty(top), torch.empty(top, dtype=torch.int64)
    work = (t.data_ptr() for t in (values, channels, counts))
    library.moments_rank(x.data_ptr(), *x.shape, x.stride(0), top, *work)


def add_logits(
    logits: torch.Tensor,
    chosen: int,
    step: float,
    total: torch.Tensor,
    square: torch.Tensor,
    margins: torch.Tensor,
) -> None:
    """Add logits (n, experts) float32 to total and square (experts,) float64, and the lead of the
    `chosen`-th largest over the next to the histogram margins (bins,) int64, bins of `step`, the
    last one open; none if every expert is chosen."""
    library = _library()
    if library is None or logits.device.type != "cpu":
        total += logits.sum(0, dtype=torch.float64).cpu()
        square += logits.double().square().sum(0).cpu()
        if logits.shape[1] > chosen:
            top = logits.topk(chosen + 1, dim=1).values
            bins = ((top[:, -2] - top[:, -1]) / step).long().clamp_(0, len(margins) - 1)
            margins += torch.bincount(bins.cpu(), minlength=len(margins))
        return
    logits = logits.contiguous()
    assert logits.dtype == torch.float32
    assert all(t.is_contiguous() for t in (total, square, margins))
    work = torch.empty(chosen + 1)
    pointers = (t.data_ptr() for t in (work, total, square, margins))
    library.moments_logits(logits.data_ptr(), *logits.shape, chosen, step, len(margins), *pointers)


@cache
def _library() -> ctypes.CDLL | None:
    library = native.load("moments")
    if library is not None:
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        library.moments_add.restype = count
        library.moments_add.argtypes = [pointer, count, count, count, *[pointer] * 4]
        library.moments_outputs.restype = None
        library.moments_outputs.argtypes = [pointer, pointer, count, count, *[pointer] * 3]
        library.moments_rank.restype = None
        library.moments_rank.argtypes = [pointer, *[count] * 4, *[pointer] * 3]
        library.moments_logits.restype = None
        library.moments_logits.argtypes = [
            pointer, count, count, count, ctypes.c_double, count, *[pointer] * 4
        ]  # fmt: skip
    return library
