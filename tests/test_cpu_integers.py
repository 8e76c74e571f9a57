"""Integer products in C: error by planes of inputs, and sums of codes to the last bit."""

from __future__ import annotations

import pytest
import torch

from bitnest.formats.inputs import parse_inputs
from bitnest.kernels.cpu.layout import lay_out
from bitnest.kernels.cpu.library import library
from bitnest.kernels.decode import decode
from bitnest.kernels.inputs import code_inputs
from bitnest.kernels.products import integer_product, integer_weight
from tests.gpu_weights import random_stored

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")

BOUNDS = {1: 1e-2, 2: 5e-5, 3: 3e-7}  # of a norm, by planes, on normally distributed inputs
NAMES = (
    "int1-g128", "int2-g128", "int3-g128", "int4-g128", "int4-g32-asym", "int5-g128", "int6-g128",
    "int7-channel", "int8-channel-asym", "mxfp4", "nvfp4", "dgq4-g32", "ternary-g128",
)  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 33), (100, 416), (16, 2048)])
@pytest.mark.parametrize("name", NAMES)
def test_error_against_float64(name: str, shape: tuple[int, int]) -> None:
    fmt, stored = random_stored(name, shape)
    weight, dense = lay_out(stored, fmt, shape), decode(stored, fmt, shape).double()
    assert weight is not None
    for tokens in (0, 1, 17):
        wide = torch.randn(tokens, 2 * shape[1], generator=torch.Generator().manual_seed(1))
        x = wide[:, ::2]  # not contiguous
        want = x.double() @ dense.T
        size = x.double().square().sum(1)[:, None].sqrt() * dense.square().sum(1).sqrt()
        for planes, bound in BOUNDS.items():
            y = weight.product(x, planes).double()
            assert y.shape == want.shape and (y - want).norm() <= bound * size.norm(), planes


@pytest.mark.parametrize("name", ["int2-channel", "int4-channel", "int8-channel", "dgq4-g32"])
def test_sums_of_codes_are_exact(name: str) -> None:
    """One scale a row on each side: the product is one integer, scaled, whatever the order."""
    shape = (40, 416)
    fmt, stored = random_stored(name, shape)
    weight, codes = lay_out(stored, fmt, shape), integer_weight(stored, fmt, shape)
    assert weight is not None and codes is not None
    x = torch.randn(17, 416, generator=torch.Generator().manual_seed(1))
    coded = code_inputs(x, parse_inputs("int8-token"))
    y = weight.product_coded(coded)
    assert y is not None
    scale = coded[0].scales.double() * codes[0].scales.double().T
    found, exact = y.double() / scale, integer_product(coded, codes).double() / scale
    assert (found - found.round()).abs().max() < 0.3  # integers up to 2^20 in float32
    assert torch.equal(found.round(), exact.round())
