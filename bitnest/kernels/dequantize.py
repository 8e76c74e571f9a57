"""Decoding packed integer weights: the reference every faster kernel is tested against.

    w[o, i] = (code[o, i] - zero[o, i // g]) * scale[o, i // g]

computed in float32 and rounded once to the requested type. Symmetric weights have
zero = 2^(bits-1). The product of two bfloat16 values is exact in float32, so decoding to bfloat16
rounds once: the same number any engine computes that multiplies in bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bitnest.formats import IntFormat
from bitnest.kernels.packing import unpack_bits


def decode_int(
    tensors: Mapping[str, torch.Tensor],
    fmt: IntFormat,
    shape: tuple[int, int],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The (out, in) weight stored as `codes`, `scales` and, if asymmetric, `zeros`.

    tensors: as `IntFormat.tensors(shape)` lays them out.
    """
    rows, columns = shape
    g = fmt.group_size(columns)
    codes = unpack_bits(tensors["codes"], fmt.bits, columns)
    scales = tensors["scales"].float()
    if fmt.symmetric:
        zeros = torch.full_like(scales, 2 ** (fmt.bits - 1))
    else:
        zeros = unpack_bits(tensors["zeros"].T, fmt.bits, rows).T.float()
    whole = columns // g * g
    weight = torch.empty((rows, columns), dtype=dtype, device=codes.device)
    if whole:
        body = codes[:, :whole].unflatten(1, (-1, g)).float()
        count = whole // g
        body = body.sub_(zeros[:, :count, None]).mul_(scales[:, :count, None])
        weight[:, :whole] = body.flatten(1).to(dtype)
    if whole < columns:
        tail = codes[:, whole:].float().sub_(zeros[:, -1:]).mul_(scales[:, -1:])
        weight[:, whole:] = tail.to(dtype)
    return weight
