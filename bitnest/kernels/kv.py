"""Keys and values as codes and back: the reference in torch (`formats/kv.py` has the formats).

    keys     (B, H, n, D), n = groups of g tokens    codes (B, H, n, C), scale, low (B, H, n/g, D)
    values   (B, H, n, E)                            codes (B, H, n, C), scale, low (B, H, n, 1)

Codes are bytes: C = D for 8 bits; for 4 bits C = ceil(D / 2), even channels in the low nibble.
Scale and low are float16, and codes are fitted to them as stored:

    low = f16(min x), scale = f16((max x - low) / (2^b - 1)), q = clamp(round((x - low) / scale))

so every value is at most scale / 2 off, but for the rounding of scale and low, 2^-11 of them.
Values beyond +-65504, float16's largest, are clipped to it.

8-bit floats: q = fp8(clamp(x / s)), the nearest, largest magnitudes clipped; s is one number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LARGEST = torch.finfo(torch.float16).max
FP8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


@dataclass(frozen=True)
class Codes:
    """Codes (B, H, n, C) uint8 with scale and low, see above."""

    codes: torch.Tensor
    scale: torch.Tensor
    low: torch.Tensor


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """(..., d) uint8 of values 0 to 15 -> (..., ceil(d / 2))."""
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: torch.Tensor, width: int) -> torch.Tensor:
    """The inverse: (..., ceil(width / 2)) -> (..., width)."""
    both = torch.stack((packed & 15, packed >> 4), dim=-1)
    return both.flatten(-2)[..., :width]


def _fit(x: torch.Tensor, dim: int, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scale and low of float32 x, extremes taken over `dim`."""
    most = 2**bits - 1
    x = x.clamp(-LARGEST, LARGEST)
    low = x.amin(dim, keepdim=True).half()
    scale = ((x.amax(dim, keepdim=True) - low.float()) / most).clamp(min=0).half()
    step = scale.float()
    codes = ((x - low.float()) / torch.where(step > 0, step, 1)).round_().clamp_(0, most)
    return codes.to(torch.uint8), scale, low


def quantize_keys(keys: torch.Tensor, bits: int, group: int) -> Codes:
    """Keys (B, H, n, D), before rotary embedding; n a multiple of `group`."""
    batch, heads, tokens, width = keys.shape
    x = keys.float().view(batch, heads, tokens // group, group, width)
    codes, scale, low = _fit(x, 3, bits)
    codes = codes.view(keys.shape)
    return Codes(pack_nibbles(codes) if bits == 4 else codes, scale.squeeze(3), low.squeeze(3))


def dequantize_keys(stored: Codes, bits: int, group: int, width: int) -> torch.Tensor:
    """(B, H, n, D) float32. width: D."""
    codes = unpack_nibbles(stored.codes, width) if bits == 4 else stored.codes
    batch, heads, tokens, _ = codes.shape
    x = codes.view(batch, heads, tokens // group, group, width).float()
    x = x.mul_(stored.scale.float().unsqueeze(3)).add_(stored.low.float().unsqueeze(3))
    return x.view(batch, heads, tokens, width)


def quantize_values(values: torch.Tensor, bits: int) -> Codes:
    """Values (B, H, n, E)."""
    codes, scale, low = _fit(values.float(), 3, bits)
    return Codes(pack_nibbles(codes) if bits == 4 else codes, scale, low)


def dequantize_values(stored: Codes, bits: int, width: int) -> torch.Tensor:
    """(B, H, n, E) float32. width: E."""
    codes = unpack_nibbles(stored.codes, width) if bits == 4 else stored.codes
    return codes.float().mul_(stored.scale.float()).add_(stored.low.float())


def quantize_fp8(x: torch.Tensor, element: str, scale: float) -> torch.Tensor:
    """Bytes of `x` in an 8-bit float; element: a key of FP8."""
    most = torch.finfo(FP8[element]).max
    return (x.float() / scale).clamp_(-most, most).to(FP8[element]).view(torch.uint8)


def dequantize_fp8(codes: torch.Tensor, element: str, scale: float) -> torch.Tensor:
    """float32 of the same shape."""
    return codes.view(FP8[element]).float().mul_(scale)
