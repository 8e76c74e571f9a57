"""Low-rank residuals on the CPU: against float64, on every machine."""

from __future__ import annotations

import pytest
import torch

from bitnest.kernels.cpu.lowrank import add_lowrank, add_reference, lay_out_lowrank
from tests.cpu_machines import machine, planes_of  # noqa: F401  a fixture


def factors(rows: int, columns: int, rank: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(rank)
    return {
        "left": torch.randint(-127, 128, (rows, rank), dtype=torch.int8, generator=g),
        "left_scales": torch.rand(rank, generator=g).mul(0.01).half(),
        "right": torch.randint(-127, 128, (rank, columns), dtype=torch.int8, generator=g),
        "right_scales": torch.rand(rank, generator=g).mul(0.01).half(),
    }


@pytest.mark.parametrize("shape", [(64, 128), (17, 33), (1, 1), (40, 300)])
@pytest.mark.parametrize("rank", [1, 7, 32])
@pytest.mark.usefixtures("machine")
def test_residual_is_added(shape: tuple[int, int], rank: int) -> None:
    tensors = factors(*shape, rank)
    residual = lay_out_lowrank(tensors, shape)
    for tokens, planes, block in ((0, 2, 128), (1, 2, 128), (17, 3, 64), (4, 1, 320)):
        g = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, shape[1], generator=g)
        y = torch.randn(tokens, shape[0], generator=g)
        struct, exact, _kept = planes_of(x, planes, block)
        expected = add_reference(y.double(), exact, tensors)
        found = add_lowrank(y.clone(), struct, residual)
        if tokens:
            size = y.abs().max() + (expected - y).abs().max()  # they may cancel
            assert float((found - expected).abs().max() / size) < 1e-6


def test_layout_is_undone() -> None:
    for shape, rank in (((17, 33), 5), ((32, 64), 16)):
        tensors = factors(*shape, rank)
        restored = lay_out_lowrank(tensors, shape).restore()
        assert all(torch.equal(restored[name], tensor) for name, tensor in tensors.items())


def test_reference_by_hand() -> None:
    tensors = {
        "left": torch.tensor([[2], [-1]], dtype=torch.int8),
        "left_scales": torch.tensor([0.5]),
        "right": torch.tensor([[3, 4]], dtype=torch.int8),
        "right_scales": torch.tensor([2.0]),
    }
    found = add_reference(torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, -1.0]]), tensors)
    assert found.tolist() == [[-1.0, 2.0]]  # x right = -2; left (1, -0.5)
