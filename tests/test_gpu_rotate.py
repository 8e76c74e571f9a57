"""Permuted and rotated inputs as codes: the kernels against `kernels/inputs.py`."""

from __future__ import annotations

import pytest
import torch

from tests.gpu_mode import DEVICE

pytest.importorskip("triton")

from bitnest.errors import FormatError
from bitnest.formats.elements import FloatElement
from bitnest.formats.inputs import InputFormat, parse_inputs
from bitnest.kernels.gpu.rotate import (
    Quantized,
    quantize,
    quantize_reference,
    rotated_inputs,
)
from bitnest.kernels.hadamard import hadamard, random_signs
from bitnest.kernels.minifloat import decode

FORMATS = (
    "int8-token", "int6-token", "int4-token-c90", "int8-g128", "int6-g48", "int4-g32", "fp8-token",
    "fp8_e5m2-g64", "fp6_e2m3-token", "mxfp4", "mxfp8-ceil", "mxint8", "128xint8-token~int4-g128",
)  # fmt: skip


def inputs(tokens: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    rng = torch.Generator().manual_seed(tokens + columns)
    x = torch.randn(tokens, columns, generator=rng)
    x[:, ::37] *= 30  # loud channels
    if tokens > 2:
        x[1] = 0
        x[2] *= 1e-30
    return x.to(dtype).to(DEVICE)


def cpu(found: list[Quantized]) -> list[Quantized]:
    return [Quantized(q.start, q.codes.cpu(), q.scales.cpu(), q.group) for q in found]


def numbers(part: Quantized, fmt: InputFormat) -> torch.Tensor:
    """Codes as places on the format's own scale, so that neighbours differ by one."""
    element = fmt.element
    if not isinstance(element, FloatElement):
        return part.codes.float()
    magnitude = (part.codes & ((1 << (fmt.bits - 1)) - 1)).float()
    return torch.where(part.codes >> (fmt.bits - 1) > 0, -magnitude, magnitude)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(5, 300), (1, 64), (17, 40)])
def test_permuted_codes_and_scales_are_the_references_bits(
    name: str, shape: tuple[int, int]
) -> None:
    fmt, x = parse_inputs(name), inputs(*shape)
    order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(0)).int()
    got = cpu(quantize(x, fmt, order=order.to(DEVICE)))
    want = quantize_reference(x.cpu(), fmt, order=order)
    assert [(q.start, q.group) for q in got] == [(q.start, q.group) for q in want]
    for mine, reference in zip(got, want, strict=True):
        assert torch.equal(mine.codes, reference.codes)
        assert torch.equal(mine.scales, reference.scales)


@pytest.mark.parametrize("name", ["int8-static", "nvfp4", "fp8-static"])
def test_static_scales(name: str) -> None:
    fmt, x = parse_inputs(name), inputs(4, 96)
    for mine, want in zip(
        cpu(quantize(x, fmt, static=0.037)), quantize_reference(x.cpu(), fmt, static=0.037),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(mine.codes, want.codes) and torch.equal(mine.scales, want.scales)
    with pytest.raises(FormatError, match="static"):
        quantize(x, fmt)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_and_strided_inputs_give_the_same_bits(dtype: torch.dtype) -> None:
    fmt = parse_inputs("int8-g32")
    x = inputs(6, 2 * 96, dtype)[::2, ::2]
    mine, want = cpu(quantize(x, fmt))[0], quantize_reference(x.cpu(), fmt)[0]
    assert torch.equal(mine.codes, want.codes) and torch.equal(mine.scales, want.scales)


def test_ties_go_to_even_and_zeros_keep_their_sign() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -0.5, -2.5, 126.5, -0.0, 0.0]], device=DEVICE)
    got = cpu(quantize(x, parse_inputs("int8-token")))[0]
    assert got.codes.tolist() == [[127, 0, 2, 0, -2, 126, 0, 0]]
    assert got.scales.tolist() == [[1.0]]
    x = torch.tensor([[448.0, -0.0, 1.0625, 2.0**-9, 2.0**-10, -447.0]], device=DEVICE)
    got = cpu(quantize(x, parse_inputs("fp8-token")))[0]
    assert got.codes.tolist() == [[0x7E, 0x80, 0x38, 1, 0, 0xFE]]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("columns", "block"), [(256, 128), (300, 64), (96, 32), (80, 16)])
def test_rotated_codes_are_one_step_off_at_most(name: str, columns: int, block: int) -> None:
    fmt, x = parse_inputs(name), inputs(3, columns, torch.bfloat16)
    signs = random_signs(columns, 0)
    got = cpu(quantize(x, fmt, block=block, signs=signs.to(DEVICE)))
    want = quantize_reference(x.cpu(), fmt, block=block, signs=signs)
    for mine, reference in zip(got, want, strict=True):
        torch.testing.assert_close(mine.scales, reference.scales, rtol=2e-6, atol=0)
        own = fmt.wide if fmt.wide is not None and mine.start == 0 else fmt
        assert own is not None
        off = (numbers(mine, own) - numbers(reference, own)).abs()
        assert off.max() <= 1 and (off > 0).float().mean() < 0.01


@pytest.mark.parametrize("width", [128, 256, 192, 48, 12, 28 * 16])
def test_whole_widths_rotate_as_the_matrix_does(width: int) -> None:
    x, signs = inputs(2, width), random_signs(width, 0)
    want = (x.cpu().double() * signs.double()) @ (hadamard(width) * width**-0.5)
    got = rotated_inputs(x, width, signs.to(DEVICE)).cpu().double()
    assert float((got - want).norm() / want.norm()) < 1e-6


def test_blocks_that_leave_a_tail_leave_it_alone() -> None:
    x = inputs(2, 150)
    got = rotated_inputs(x, 64, None)
    assert torch.equal(got[:, 128:], x[:, 128:])
    with pytest.raises(FormatError, match="whole width"):
        rotated_inputs(x, 256, None)


@pytest.mark.parametrize("name", ["int8-token", "int4-g32", "fp8-token"])
def test_no_tokens(name: str) -> None:
    for options in ({}, {"block": 32}):
        found = quantize(torch.zeros(0, 64, device=DEVICE), parse_inputs(name), **options)[0]
        assert found.codes.shape == (0, 64) and len(found.scales) == 0


def test_wide_tokens_take_two_passes_and_agree() -> None:
    fmt, x = parse_inputs("int8-token"), inputs(1, 8192 + 128, torch.bfloat16)
    mine = cpu(quantize(x, fmt, block=128))[0]
    want = quantize_reference(x.cpu(), fmt, block=128)[0]
    assert (mine.codes.int() - want.codes.int()).abs().max() <= 1


def test_channels_that_stay_are_refused() -> None:
    with pytest.raises(FormatError, match="no GPU kernel"):
        quantize(torch.zeros(1, 32, device=DEVICE), parse_inputs("int8-token-t6"))


def test_codes_decode_to_what_was_given_within_half_a_step() -> None:
    x = inputs(4, 128)[:1]
    got = cpu(quantize(x, parse_inputs("int8-token")))[0]
    assert (got.codes * got.scales - x.cpu()).abs().max() <= got.scales.max() * 0.5001
    fmt = parse_inputs("fp8-token")
    assert isinstance(fmt.element, FloatElement)
    part = cpu(quantize(x, fmt))[0]
    back = decode(part.codes, fmt.element.spec) * part.scales
    assert ((back - x.cpu()).abs() <= x.cpu().abs() / 15 + part.scales * 2**-10).all()
