"""KV formats and their codes: names, exact bytes, and the reference against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitnest.errors import FormatError
from bitnest.formats.kv import KVFormat, parse_kv, read_kv
from bitnest.kernels import kv


@pytest.mark.parametrize(
    ("spelt", "name"),
    [
        ("fp8", "fp8_e4m3"),
        ("fp8_e5m2-w16", "fp8_e5m2-w16"),
        ("int4", "int4-g128-w128"),
        ("int8-w0", "int8-g128-w0"),
        ("int4-w32-g16", "int4-g16-w32"),
    ],
)
def test_names_say_every_default_and_read_back(spelt: str, name: str) -> None:
    fmt = parse_kv(spelt)
    assert fmt.name == name
    assert parse_kv(name) == fmt


@pytest.mark.parametrize(
    "spelt",
    ["int3", "fp4", "", "int4-w", "int4-g4", "int4-g2048", "fp8-g32", "int4-w1-w2", "int4-x3",
     "int4-w9999999", "none"],
)  # fmt: skip
def test_impossible_formats_are_refused(spelt: str) -> None:
    with pytest.raises(FormatError):
        parse_kv(spelt)


def test_none_is_the_models_own_cache() -> None:
    assert read_kv("none") is None
    assert read_kv(None) is None


@pytest.mark.parametrize("tokens", [0, 1, 128, 191, 192, 4096])
def test_bytes_are_those_of_the_formula_by_hand(tokens: int) -> None:
    heads, keys, values = 8, 128, 96
    folded = 0 if tokens < 192 else (tokens - 128) // 64 * 64
    a_token = heads * (keys // 2 + values // 2 + 4)
    a_group = heads * keys * 4
    recent = (tokens - folded) * heads * (keys + values) * 2
    expected = folded * a_token + folded // 64 * a_group + recent
    assert parse_kv("int4-g64").nbytes(tokens, heads, keys, values) == expected


def test_sliding_layers_hold_no_more_than_their_window_and_a_group() -> None:
    fmt = KVFormat("int8", 16, 32)
    for tokens in range(1, 300):
        stored, recent = fmt.spans(tokens, 100)
        assert min(tokens, 99) <= stored + recent <= 99 + 15
    assert fmt.spans(1000, 20) == (0, 19)


@pytest.mark.parametrize("width", [8, 7])
def test_nibbles_come_back(width: int) -> None:
    codes = torch.randint(0, 16, (2, 3, 5, width), dtype=torch.uint8)
    packed = kv.pack_nibbles(codes)
    assert packed.shape[-1] == 4
    assert torch.equal(kv.unpack_nibbles(packed, width), codes)


def reference(x: np.ndarray, axis: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Values after quantisation in float64, and the steps; extremes over `axis`."""
    low = x.min(axis, keepdims=True).astype(np.float16).astype(np.float64)
    scale = ((x.max(axis, keepdims=True) - low) / (2**bits - 1)).astype(np.float16)
    step = scale.astype(np.float64)
    codes = np.clip(np.rint((x - low) / np.where(step > 0, step, 1)), 0, 2**bits - 1)
    return low + step * codes, np.broadcast_to(step, x.shape)


@pytest.mark.parametrize("bits", [4, 8])
def test_keys_and_values_are_those_of_float64(bits: int) -> None:
    torch.manual_seed(0)
    keys = torch.randn(2, 3, 32, 10) * 4 + 20 * torch.randn(1, 3, 1, 10)
    found = kv.dequantize_keys(kv.quantize_keys(keys, bits, 8), bits, 8, 10)
    grouped = keys.double().numpy().reshape(2, 3, 4, 8, 10)
    check(found.reshape(2, 3, 4, 8, 10), *reference(grouped, 3, bits))
    values = torch.randn(2, 3, 5, 9)
    found = kv.dequantize_values(kv.quantize_values(values, bits), bits, 9)
    check(found, *reference(values.double().numpy(), 3, bits))


def check(found: torch.Tensor, expected: np.ndarray, step: np.ndarray) -> None:
    """Equal but where float32 and float64 fall on two sides of a tie."""
    off = np.abs(found.double().numpy() - expected)
    assert (off <= 1e-4).mean() > 0.995
    assert (off <= step * 1.001).all()


def test_constant_and_huge_channels_stay_finite() -> None:
    keys = torch.full((1, 1, 8, 2), 3.0)
    keys[..., 1] = torch.linspace(-1e6, 1e6, 8)
    found = kv.dequantize_keys(kv.quantize_keys(keys, 4, 8), 4, 8, 2)
    assert torch.equal(found[..., 0], keys[..., 0])
    assert found[..., 1].abs().max() <= 66000
    assert kv.dequantize_values(kv.quantize_values(torch.full((1, 1, 1, 4), torch.nan), 4), 4,
                                4).isnan().all()  # fmt: skip


@pytest.mark.parametrize(("element", "most"), [("fp8_e4m3", 448.0), ("fp8_e5m2", 57344.0)])
def test_fp8_takes_the_nearest_and_clips(element: str, most: float) -> None:
    x = torch.tensor([0.3, -1.0, 1e9, -1e9, 0.0])
    found = kv.dequantize_fp8(kv.quantize_fp8(x, element, 2.0), element, 2.0)
    assert found[2:].tolist() == [2 * most, -2 * most, 0.0]
    bits = 3 if element == "fp8_e4m3" else 2
    assert abs(float(found[0]) - 0.3) <= 0.3 * 2.0 ** -(bits + 1)
    assert found[1] == -1.0
