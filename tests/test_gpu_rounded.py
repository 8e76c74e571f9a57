"""Integer codes of both sides: sums of integers to the last bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from bitnest.errors import BitnestError
from bitnest.formats.inputs import parse_inputs
from bitnest.kernels.decode import decode
from bitnest.kernels.gpu.layout import GpuWeight, lay_out
from bitnest.kernels.gpu.linear import linear
from bitnest.kernels.gpu.rounded import rounded_linear, rounded_reference, takes
from bitnest.kernels.inputs import code_inputs
from bitnest.kernels.products import integer_weight
from tests.gpu_mode import DEVICE
from tests.gpu_weights import random_stored

SHAPE = (35, 300)
NAMES = (
    "int8-channel", "int6-g64", "int4-g128", "int8-g48-asym", "int3-g16-asym", "int4-b16x64",
    "dgq4-g64", "mxint8", "nvint4", "int2-tensor",
)  # fmt: skip


def weight(name: str, shape: tuple[int, int] = SHAPE) -> GpuWeight:
    fmt, tensors = random_stored(name, shape)
    found = lay_out({n: t.to(DEVICE) for n, t in tensors.items()}, fmt, shape)
    assert found is not None
    return found


def coded(
    tokens: int, columns: int, group: int, bits: int = 8
) -> tuple[torch.Tensor, torch.Tensor]:
    g, top = torch.Generator().manual_seed(tokens), (1 << (bits - 1)) - 1
    codes = torch.randint(-top, top + 1, (tokens, columns), generator=g).to(torch.int8)
    scales = torch.rand(tokens, -(-columns // min(group, columns)), generator=g) + 0.01
    return codes.to(DEVICE), scales.to(DEVICE)


@pytest.mark.parametrize("group", [1 << 20, 64])
@pytest.mark.parametrize("name", NAMES)
def test_scaled_sums_follow_the_reference(name: str, group: int) -> None:
    w = weight(name)
    codes, scales = coded(3, SHAPE[1], group)
    expected = rounded_reference(codes, scales, group, w)
    y = rounded_linear(codes, scales, group, w)
    assert float((y - expected).norm() / expected.norm()) < 2e-6


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("name", ["int8-channel", "int6-channel", "int8-channel-asym", "dgq4-g64"])
def test_integer_sums_are_equal_to_the_last_bit(name: str, bits: int) -> None:
    w = weight(name, (35, 700))
    ones = "shared" if name == "dgq4-g64" else "scales"  # so that y is the sum itself
    w = replace(w, **{ones: torch.ones_like(getattr(w, ones))})
    codes, scales = coded(2, 700, 1 << 20, bits)
    found = integer_weight(w.restore(), w.fmt, w.shape)
    assert found is not None
    exact = codes.long() @ found[0].values.long().T
    assert torch.equal(rounded_linear(codes, torch.ones_like(scales), 1 << 20, w), exact.float())


@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_numbers_of_tokens_and_codes_that_are_not_contiguous(tokens: int) -> None:
    w = weight("int4-g128")
    codes, scales = coded(tokens, SHAPE[1], 128)
    given = codes.T.contiguous().T
    y = rounded_linear(given, scales, 128, w)
    assert y.shape == (tokens, SHAPE[0])
    if tokens:
        expected = rounded_reference(codes, scales, 128, w)
        assert float((y - expected).norm() / expected.norm()) < 2e-6


def test_small_floats_on_both_sides_lose_nothing_but_sums() -> None:
    w = weight("fp8-channel")
    x = 20 * torch.randn(2, SHAPE[1], generator=torch.Generator().manual_seed(0))
    (coded_x,) = code_inputs(x, parse_inputs("fp8-token"))
    values, scales = coded_x.values.half().to(DEVICE), coded_x.scales.to(DEVICE)
    y = linear(values, w, result=torch.float32) * scales
    expected = coded_x.decoded().double() @ decode(w.restore(), w.fmt, w.shape).double().cpu().T
    assert float((y.cpu() - expected).norm() / expected.norm()) < 2e-6


def test_what_has_no_integers_is_refused() -> None:
    codes, scales = coded(2, SHAPE[1], 128)
    for name in ("int1-g128", "mxfp4", "nf4-g64"):
        assert not takes(weight(name))
        with pytest.raises(BitnestError):
            rounded_linear(codes, scales, 128, weight(name))
    w = weight("int4-g128")
    for bad in ((codes.short(), scales, 128), (codes, scales[:, :1], 128), (codes, scales, 100)):
        with pytest.raises(BitnestError):
            rounded_linear(*bad, w)
