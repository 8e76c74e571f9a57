"""Products with sparse weights on the CPU: against the decoded weight, on every machine."""

from __future__ import annotations

import pytest
import torch

from bitnest.errors import FormatError
from bitnest.formats import SparseFormat, parse_format
from bitnest.kernels.cpu.sparse import lay_out_sparse, product_codes, product_halves, why_not
from bitnest.kernels.decode import decode
from bitnest.prune.solution import Pruned
from bitnest.quantize.solve import Options, solve
from tests.cpu_machines import machine, planes_of  # noqa: F401  a fixture

CODES = (
    "int4-g128%2:4", "int4-g32%50", "int8-g128%2:4", "int4-g64-asym%30", "int4-g16%1:8",
    "int8-channel%50", "int4-g48-asym%4:8", "int4-channel%99",
)  # fmt: skip
SHAPES = ((24, 70), (40, 256), (3, 7), (1, 1), (17, 333))


def stored(
    name: str, shape: tuple[int, int], half: torch.dtype = torch.bfloat16
) -> tuple[SparseFormat, dict[str, torch.Tensor]]:
    fmt = parse_format(name)
    w = torch.randn(1, *shape, generator=torch.Generator().manual_seed(shape[1]))
    found = solve(w, None, fmt, Options(half=half))  # type: ignore[arg-type]
    assert isinstance(found, Pruned)
    assert isinstance(fmt, SparseFormat)
    return fmt, found.store(0, slice(0, shape[0]))


def inputs_of(tokens: int, columns: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, columns, generator=g) * torch.rand(columns, generator=g) * 3


def close(found: torch.Tensor, exact: torch.Tensor, limit: float) -> None:
    scale = exact.abs().max() if exact.numel() else torch.tensor(1.0)
    if found.numel():
        assert float((found.double() - exact).abs().max() / scale.clamp_min(1e-30)) < limit


@pytest.mark.parametrize("name", CODES)
@pytest.mark.usefixtures("machine")
def test_codes_times_planes_of_inputs(name: str) -> None:
    for shape in SHAPES:
        fmt, tensors = stored(name, shape)
        weight = lay_out_sparse(tensors, fmt, shape)
        dense = decode(tensors, fmt, shape).double()
        for tokens, planes, block in ((0, 2, 128), (1, 2, 128), (17, 1, 64), (5, 3, 448)):
            struct, exact, _kept = planes_of(inputs_of(tokens, shape[1]), planes, block)
            close(product_codes(struct, weight), exact @ dense.T, 2e-6)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["dense%2:4", "dense%50", "dense%1"])
@pytest.mark.usefixtures("machine")
def test_16_bit_survivors(name: str, half: torch.dtype) -> None:
    for shape in SHAPES:
        fmt, tensors = stored(name, shape, half)
        weight = lay_out_sparse(tensors, fmt, shape)
        dense = decode(tensors, fmt, shape).double()
        for tokens in (0, 1, 17):
            x = inputs_of(tokens, 2 * shape[1])[:, ::2]
            close(product_halves(x, weight), x.double() @ dense.T, 2e-6)


@pytest.mark.parametrize("name", [*CODES, "dense%2:4"])
@pytest.mark.usefixtures("machine")
def test_layout_is_undone(name: str) -> None:
    for shape in SHAPES:
        fmt, tensors = stored(name, shape)
        restored = lay_out_sparse(tensors, fmt, shape).restore()
        assert restored.keys() == tensors.keys()
        for part, tensor in tensors.items():
            assert torch.equal(restored[part], tensor), part


@pytest.mark.usefixtures("machine")
def test_sums_of_products_are_exact_integers() -> None:
    """Scales of 1 on both sides: the result is the integer, bit for bit."""
    fmt, tensors = stored("int4-g128%2:4", (40, 256))
    tensors["scales"] = torch.ones_like(tensors["scales"])
    weight = lay_out_sparse(tensors, fmt, (40, 256))
    x = torch.randint(-127, 128, (9, 256), generator=torch.Generator().manual_seed(0)).double()
    x[:, 0] = 127
    struct, exact, (_codes, scales, _sums) = planes_of(x, 1, 256)
    assert torch.equal(scales, torch.ones_like(scales))
    assert torch.equal(
        product_codes(struct, weight).double(), exact @ decode(tensors, fmt, (40, 256)).double().T
    )


@pytest.mark.usefixtures("machine")
def test_a_damaged_mask_is_refused() -> None:
    fmt, tensors = stored("int4-g32%50", (3, 70))
    tensors["mask"] = tensors["mask"].clone()
    tensors["mask"][1, 0] = 0
    with pytest.raises(FormatError, match="mask"):
        lay_out_sparse(tensors, fmt, (3, 70))


@pytest.mark.usefixtures("machine")
def test_formats_left_to_the_reference() -> None:
    for name, says in (
        ("int3-g32%50", "int3"),
        ("nvfp4%2:4", "nvfp4"),
        ("int4-g32%b16x16-50", "b16"),
    ):
        assert says in str(why_not(parse_format(name)))
    assert why_not(parse_format("int4-g32%50")) is None
