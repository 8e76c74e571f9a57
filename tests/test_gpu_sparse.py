"""Products with sparse weights on the GPU: bitmask and 2:4, codes and 16-bit values."""

from __future__ import annotations

import pytest
import torch

from tests.gpu_mode import DEVICE
from tests.gpu_weights import random_stored

pytest.importorskip("triton")

from bitnest.errors import FormatError
from bitnest.formats import DenseFormat, SparseFormat, parse_format
from bitnest.kernels.decode import decode
from bitnest.kernels.gpu.sparse import (
    expand,
    lay_out_sparse,
    sparse_linear,
    sparse_linear_reference,
    why,
)
from bitnest.kernels.sparse import pack_mask

NAMES = (
    "int4-g32%2:4", "int4-g32%50", "int4-g48-asym%4:8", "int2-channel%30", "int8-g32-asym%2:4",
    "nvfp4%2:4", "nf4-g64-dq%7:16", "dgq4-g32%1:2", "mxfp8%80", "dense%2:4", "dense%1", "dense%90",
)  # fmt: skip
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def stored(
    name: str, shape: tuple[int, int], half: torch.dtype = torch.float16
) -> tuple[SparseFormat, dict[str, torch.Tensor]]:
    """Tensors of a random weight; bits of the mask behind the last channel are set."""
    fmt = parse_format(name)
    assert isinstance(fmt, SparseFormat)
    rows, columns = shape
    rng = torch.Generator().manual_seed(columns)
    noise = torch.rand(rows, columns, generator=rng)
    keep = torch.zeros(rows, columns, dtype=torch.bool)
    cell = fmt.cell or columns
    for first in range(0, columns, cell):
        own = noise[:, first : first + cell]
        count = min(fmt.keep, own.shape[1]) if fmt.cell else fmt.kept(columns)
        keep[:, first : first + cell].scatter_(1, own.argsort(1)[:, :count], True)
    dirty = torch.ones(rows, -(-columns // 32) * 32, dtype=torch.bool)
    dirty[:, :columns] = keep
    tensors = {"mask": pack_mask(dirty)}
    kept = fmt.kept(columns)
    if isinstance(fmt.base, DenseFormat):
        tensors["values"] = torch.randn(rows, kept, generator=rng).to(half)
    else:
        base = fmt.base.name
        tensors |= random_stored(base, shape, half)[1]
        tensors["codes"] = random_stored(base, (rows, kept), half)[1]["codes"]
    return fmt, {key: tensor.to(DEVICE) for key, tensor in tensors.items()}


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    return x.to(dtype).to(DEVICE)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(24, 70), (70, 192)])
def test_expanded_weights_are_those_that_decode_gives(name: str, shape: tuple[int, int]) -> None:
    fmt, tensors = stored(name, shape)
    weight = lay_out_sparse(tensors, fmt, shape)
    assert torch.equal(expand(weight), decode(tensors, fmt, shape))
    assert float((expand(weight) != 0).sum()) <= shape[0] * weight.kept


@pytest.mark.parametrize("name", NAMES)
def test_products_match_float64(name: str) -> None:
    shape = (70, 200)
    fmt, tensors = stored(name, shape)
    weight, x = lay_out_sparse(tensors, fmt, shape), inputs((3, shape[1]))
    want = x.double() @ decode(tensors, fmt, shape).double().T
    got = sparse_linear(x, weight).double()
    assert float((got - want).norm() / want.norm()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("m", [0, 1, 17, 33])
@pytest.mark.parametrize("name", ["int4-g32%2:4", "dense%50"])
def test_any_number_of_tokens(name: str, m: int) -> None:
    fmt, tensors = stored(name, (40, 130))
    weight, x = lay_out_sparse(tensors, fmt, (40, 130)), inputs((m, 260))[:, ::2]
    bias = inputs((40,))
    got = sparse_linear(x, weight, bias)
    assert got.shape == (m, 40)
    torch.testing.assert_close(got, sparse_linear_reference(x, weight) + bias, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["int4-g32%50", "dense%2:4"])
def test_16_bit_inputs(name: str, dtype: torch.dtype) -> None:
    fmt, tensors = stored(name, (33, 96), dtype)
    weight, x = lay_out_sparse(tensors, fmt, (33, 96)), inputs((2, 5, 96), dtype)
    want = sparse_linear_reference(x.double(), weight)
    got = sparse_linear(x, weight)
    assert got.shape == (2, 5, 33) and got.dtype == dtype
    assert float((got.double() - want).norm() / want.norm()) < TOLERANCE[dtype]


def test_calls_repeat_to_the_last_bit() -> None:
    fmt, tensors = stored("int4-g32%50", (40, 300))
    weight, x = lay_out_sparse(tensors, fmt, (40, 300)), inputs((4, 300))
    assert torch.equal(sparse_linear(x, weight), sparse_linear(x, weight))


def test_hand_made_two_of_four() -> None:
    fmt = parse_format("dense%2:4")
    tensors = {
        "mask": torch.tensor([[0b1010_0110]], dtype=torch.int32).to(DEVICE),
        "values": torch.tensor([[1.0, 2.0, 3.0, 4.0]]).half().to(DEVICE),
    }
    weight = lay_out_sparse(tensors, fmt, (1, 8))
    assert expand(weight).tolist() == [[0, 1, 2, 0, 0, 3, 0, 4]]
    assert sparse_linear(torch.eye(8, device=DEVICE), weight)[:, 0].tolist() == [
        0, 1, 2, 0, 0, 3, 0, 4,
    ]  # fmt: skip


def test_bytes_are_those_of_what_is_read() -> None:
    fmt, tensors = stored("int4-g32%50", (8, 256))
    weight = lay_out_sparse(tensors, fmt, (8, 256))
    assert weight.nbytes == fmt.nbytes((8, 256)) + 8 * 4 * 2  # and a count for 64 channels


def test_what_has_no_kernel_is_refused_and_says_why() -> None:
    assert why(parse_format("int4-g128%2:4")) is None
    for name in ("int3-g48%50", "mxfp6%50", "ternary-g32%25", "int4-g128%b16x16-50", "int4-g128"):
        assert why(parse_format(name))
        with pytest.raises(FormatError):
            lay_out_sparse({}, parse_format(name), (8, 64))
    fmt, tensors = stored("int4-g32%50", (8, 64))
    tensors["mask"][0, 0] = 0
    with pytest.raises(FormatError, match="damaged"):
        lay_out_sparse(tensors, fmt, (8, 64))
    fmt, tensors = stored("int4-g32%50", (8, 64))
    with pytest.raises(FormatError, match="64"):
        sparse_linear(inputs((1, 32)), lay_out_sparse(tensors, fmt, (8, 64)))
