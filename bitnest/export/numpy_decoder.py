"""A second decoder of exported weights, in numpy, from the description of the files alone.

It shares no line with `kernels` or with compressed-tensors. With b bits, g the group:

    pack-quantized   code[o, i]  = bits [i*b, (i+1)*b) of row o's little-endian bitstream
                     zero[o, j]  = bits [o*b, (o+1)*b) of column j's bitstream, 2^(b-1) if symmetric
                     weight[o,i] = (code - zero) * scale[o, i // g]
    int-quantized    weight[o,i] = code[o, i] * scale[o], the code a signed byte
    FP8              bits s EEEE MMM: +-2^(E-7) * (1 + M/8), or +-2^-6 * M/8 where E = 0
    FP4              bits s EEM: +-(0 .5 1 1.5 2 3 4 6)[EEM]; an even column is the low nibble
    E8M0             2^(u - 127)
    NVFP4            scale = FP8 scale / global scale

All in float32; weight = value * scale, the scale that of the row and group, of the 128 x 128 block,
of the row, or the only one.

Left out: NaN codes, which no export writes, and zero points of floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

State = dict[str, torch.Tensor]
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def decode(state: State, scheme: Mapping[str, Any]) -> np.ndarray:
    """A weight (O, I) float32. state: its tensors. scheme: its group of the config."""
    if scheme["format"] == "pack-quantized":
        return _integers(state, scheme["weights"])
    values, scales = read_stored(state, scheme)
    rows, columns = values.shape
    args = scheme["weights"]
    if args["strategy"] == "block":
        height, width = args["block_structure"]
    else:
        height = rows if args["strategy"] == "tensor" else 1
        width = args["group_size"] or columns
    scales = scales.reshape(-(-rows // height), -(-columns // width))
    spread = scales[np.arange(rows)[:, None] // height, np.arange(columns) // width]
    return values * spread


def read_stored(state: State, scheme: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Of weights that are not packed integers, the values of the codes (O, I) and the scales as
    stored, float32."""
    kind, scale = scheme["format"], state["weight_scale"]
    if kind == "int-quantized":
        return state["weight"].numpy().astype(np.float32), scale.float().numpy()
    if kind == "float-quantized":
        return _fp8(state["weight"]), scale.float().numpy()
    if kind == "nvfp4-pack-quantized":
        divisor = state["weight_global_scale"].numpy()
        return _fp4(state["weight_packed"]), _fp8(scale) / divisor
    exponents = np.ldexp(np.float32(1), scale.numpy().astype(np.int32) - 127)
    codes = _fp8(state["weight"]) if kind == "mxfp8-quantized" else _fp4(state["weight_packed"])
    return codes, exponents.astype(np.float32)


def _integers(state: State, args: Mapping[str, Any]) -> np.ndarray:
    bits = args["num_bits"]
    rows, columns = (int(x) for x in state["weight_shape"])
    codes = stream(state["weight_packed"].numpy(), bits, columns)
    scale = state["weight_scale"].to(torch.float32).numpy()
    if args["symmetric"]:
        zero = np.full(scale.shape, 1 << (bits - 1), np.int64)
    else:
        packed = state["weight_zero_point"].numpy()
        zero = stream(np.ascontiguousarray(packed.T), bits, rows).T
    place = np.arange(columns) // (args["group_size"] or columns)
    return (codes - zero[:, place]).astype(np.float32) * scale[:, place]


def stream(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Words (R, N) int32 to their first `count` values of `bits` bits, (R, count) int64."""
    stored = words.astype("<i4").view(np.uint8)
    flat = np.unpackbits(stored, axis=1, bitorder="little")[:, : count * bits]
    planes = flat.reshape(len(words), count, bits).astype(np.int64)
    return (planes << np.arange(bits)).sum(-1)


def _fp8(codes: torch.Tensor) -> np.ndarray:
    table = np.arange(256)
    exponent, mantissa = table >> 3 & 15, table & 7
    significand = np.where(exponent == 0, mantissa, mantissa + 8)
    values = np.ldexp(significand / 8.0, np.maximum(exponent, 1) - 7)
    values = np.where(table >> 7, -values, values).astype(np.float32)
    return values[codes.view(torch.uint8).numpy()]


def _fp4(packed: torch.Tensor) -> np.ndarray:
    table = np.array([*FP4, *(-value for value in FP4)], np.float32)
    pairs = packed.numpy()
    return table[np.stack([pairs & 15, pairs >> 4], -1).reshape(len(pairs), -1)]
