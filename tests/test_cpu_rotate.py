"""Rotated, reordered and rounded inputs on the CPU: the reference's codes, on every machine."""

from __future__ import annotations

import logging

import pytest
import torch

from bitnest.formats import parse_format
from bitnest.formats.inputs import parse_inputs
from bitnest.kernels import basis
from bitnest.kernels.cpu.rotate import code_stored, round_stored, why_not
from bitnest.kernels.inputs import code_inputs
from tests.cpu_machines import machine  # noqa: F401  a fixture

INPUTS = ("int8-token", "int6-g128", "int4-g64-c90", "int8-static", "32xint8-token~int4-g16")


def tensors_of(name: str, columns: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(columns)
    return {
        "channels": torch.rand(columns, generator=g).add(0.5).half(),
        "order": torch.randperm(columns, generator=g).int(),
    }


def inputs_of(tokens: int, columns: int) -> torch.Tensor:
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))
    if columns > 3:
        x[:, 3] *= 30
    return x


@pytest.mark.parametrize("name", ["int4-g32", "int4-g32@perm", "int4-g32@awq", "int4-g32@perm@awq"])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.usefixtures("machine")
def test_without_rotation_codes_are_equal_to_the_last_bit(name: str, inputs: str) -> None:
    fmt, rounding = parse_format(name), parse_inputs(inputs)
    for tokens, columns in ((0, 64), (1, 64), (17, 200), (3, 7), (5, 1), (2, 513)):
        x, tensors = inputs_of(tokens, columns), tensors_of(name, columns)
        x[: tokens // 2, :16] = 0
        assert why_not(x, fmt, rounding) is None
        expected = code_inputs(basis.to_stored(x, fmt, tensors), rounding, 0.02)
        found = code_stored(x, fmt, rounding, 0.02, tensors)
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a.values, b.values)
            assert torch.equal(a.scales, b.scales)
            assert (a.start, a.group, a.largest) == (b.start, b.group, b.largest)


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("int4-g32@had16", 48), ("int4-g32@rhad64", 200), ("int4-g32@rhad128", 513),
        ("int4-g32@had", 512), ("int4-g32@rhad", 4096), ("int4-g32@had", 192),
        ("int4-g32@rhad", 320), ("int4-g32@perm@rhad", 256), ("int4-g32@rhad32@awq", 160),
        ("int4-g32@had+lqer4", 1024),
    ],
)  # fmt: skip
@pytest.mark.parametrize("inputs", ["int8-token", "int4-g64-c90"])
@pytest.mark.usefixtures("machine")
def test_rotated_codes_are_within_one(name: str, columns: int, inputs: str) -> None:
    fmt, rounding, tensors = parse_format(name), parse_inputs(inputs), tensors_of(name, columns)
    for tokens in (0, 1, 17):
        x = inputs_of(tokens, columns)
        assert why_not(x, fmt, rounding) is None
        (expected,) = code_inputs(basis.to_stored(x, fmt, tensors), rounding)
        (found,) = code_stored(x, fmt, rounding, None, tensors)
        torch.testing.assert_close(found.scales, expected.scales, rtol=2e-6, atol=0)
        off = (found.values - expected.values).abs()
        assert off.numel() == 0 or off.max() <= 1
        assert off.numel() == 0 or (off > 0).float().mean() < 1e-3


@pytest.mark.usefixtures("machine")
def test_rotation_of_a_unit_vector_by_hand() -> None:
    """Row 1 of a Sylvester matrix of 16, over 4: +1/4, -1/4, ..., the largest number is 127."""
    x = torch.zeros(1, 16)
    x[0, 1] = 8.0
    (found,) = code_stored(x, parse_format("int4-g32@had16"), parse_inputs("int8-token"), None, {})
    assert found.values[0].tolist() == [127.0, -127.0] * 8
    assert abs(float(found.scales) - 2 / 127) < 1e-8


@pytest.mark.usefixtures("machine")
def test_bytes_have_zeros_behind_and_their_sums() -> None:
    x = inputs_of(5, 70)[:, ::2]  # not contiguous
    found = round_stored(x, parse_format("int4-g32"), parse_inputs("int8-token"), None, {})
    assert found.codes.shape == (5, 64)
    assert not found.codes[:, 35:].any()
    sums = found.codes.int().view(5, 4, 16).sum(2)
    assert torch.equal(found.sums, sums.int())


def test_what_is_left_to_the_reference_is_said(caplog: pytest.LogCaptureFixture) -> None:
    x, fmt, rounding = inputs_of(2, 64), parse_format("int4-g32@had16"), parse_inputs("mxfp8")
    assert "mxfp8" in str(why_not(x, fmt, rounding))
    with caplog.at_level(logging.INFO):
        found = code_stored(x, fmt, rounding, None, {})
    expected = code_inputs(basis.to_stored(x, fmt, {}), rounding)
    assert torch.equal(found[0].values, expected[0].values)
    assert "the reference" in caplog.text
