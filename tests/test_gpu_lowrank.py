"""Low-rank residuals behind a packed product."""

from __future__ import annotations

import pytest
import torch

from tests.gpu_mode import DEVICE

pytest.importorskip("triton")

from bitnest.errors import FormatError
from bitnest.formats import parse_format
from bitnest.kernels.decode import low_rank
from bitnest.kernels.gpu.layout import lay_out
from bitnest.kernels.gpu.lowrank import (
    LowRank,
    add_low_rank,
    add_low_rank_reference,
    lay_out_low_rank,
    low_rank_linear,
    low_rank_linear_reference,
)
from bitnest.kernels.packing import pack_bits

TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def factors(n: int, k: int, rank: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(n + rank)
    return {
        "left": torch.randint(-127, 128, (n, rank), generator=rng, dtype=torch.int8),
        "right": torch.randint(-127, 128, (rank, k), generator=rng, dtype=torch.int8),
        "left_scales": (torch.rand(rank, generator=rng) / 500).half(),
        "right_scales": (torch.rand(rank, generator=rng) / 500).half(),
    }


def on_device(tensors: dict[str, torch.Tensor]) -> LowRank:
    return lay_out_low_rank({name: tensor.to(DEVICE) for name, tensor in tensors.items()})


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("m", "n", "k", "rank"),
    [(1, 200, 1100, 16), (17, 130, 64, 5), (3, 128, 513, 33), (40, 7, 300, 1)],
)
def test_residual_matches_float64(m: int, n: int, k: int, rank: int, dtype: torch.dtype) -> None:
    tensors = factors(n, k, rank)
    x = torch.randn(m, 2 * k, generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE)
    x = x[:, ::2]  # strided
    y = torch.zeros(m, n, dtype=dtype, device=DEVICE)
    add_low_rank(y, x, on_device(tensors))
    want = x.cpu().double() @ low_rank({key: t.double() for key, t in tensors.items()}).double().T
    error = float((y.cpu().double() - want).norm() / want.norm())
    assert error < TOLERANCE[dtype], error


def test_it_is_added_and_repeats_to_the_last_bit() -> None:
    one = on_device(factors(70, 600, 8))
    x, y = torch.randn(2, 600).to(DEVICE), torch.randn(2, 70).to(DEVICE)
    first = add_low_rank(y.clone(), x, one)
    assert torch.equal(first, add_low_rank(y.clone(), x, one))
    torch.testing.assert_close(first, add_low_rank_reference(y.clone(), x, one))
    torch.testing.assert_close(
        first - y, add_low_rank(torch.zeros_like(y), x, one), atol=1e-5, rtol=0
    )


def test_reference_is_the_decoded_residual() -> None:
    one = LowRank(
        torch.tensor([[1], [2]], dtype=torch.int8),
        torch.tensor([[3, -4]], dtype=torch.int8),
        torch.tensor([0.5]),
    )
    y = add_low_rank_reference(torch.ones(1, 2), torch.tensor([[1.0, 1.0]]), one)
    assert y.tolist() == [[0.5, 0.0]]


def test_no_tokens_and_no_outputs_change_nothing() -> None:
    one = on_device(factors(8, 32, 4))
    assert add_low_rank(
        torch.zeros(0, 8, device=DEVICE), torch.zeros(0, 32, device=DEVICE), one
    ).shape == (0, 8)


def test_shapes_that_do_not_fit_are_refused() -> None:
    one = on_device(factors(8, 32, 4))
    with pytest.raises(FormatError, match="residual of 8 x 32"):
        add_low_rank(torch.zeros(1, 9, device=DEVICE), torch.zeros(1, 32, device=DEVICE), one)
    with pytest.raises(FormatError, match="contiguous"):
        add_low_rank(torch.zeros(8, 2, device=DEVICE).T, torch.zeros(2, 32, device=DEVICE), one)
    with pytest.raises(FormatError, match="factors"):
        lay_out_low_rank({**factors(8, 32, 4), "right": torch.zeros(3, 32, dtype=torch.int8)})


@pytest.mark.parametrize("m", [1, 3])
def test_behind_a_packed_product(m: int) -> None:
    fmt = parse_format("int4-g32")
    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (48, 96), generator=rng, dtype=torch.uint8)
    scales = torch.rand(48, 3, generator=rng).half() / 50
    tensors = {"codes": pack_bits(codes, 4).to(DEVICE), "scales": scales.to(DEVICE)}
    weight, one = lay_out(tensors, fmt, (48, 96)), on_device(factors(48, 96, 8))
    x = torch.randn(2, m, 96, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    got = low_rank_linear(x, weight, one)
    assert got.shape == (2, m, 48)
    torch.testing.assert_close(got, low_rank_linear_reference(x, weight, one), atol=1e-4, rtol=1e-4)
