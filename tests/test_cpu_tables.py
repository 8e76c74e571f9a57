"""Weights that look numbers up and bfloat16 weights on the CPU kernels, against float64.

The bound of a result is that of its rounding: numbers of a table to bfloat16 (2^-9 of each product
at most, nothing where bfloat16 holds them), and float32 sums.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from bitnest.formats import DenseFormat, parse_format
from bitnest.formats.block import BlockFormat
from bitnest.formats.elements import FloatElement
from bitnest.formats.segments import segments, split_parts
from bitnest.kernels.cpu import layout
from bitnest.kernels.cpu.layout_tables import lay_dense
from bitnest.kernels.cpu.library import declare, library
from bitnest.kernels.decode import decode
from bitnest.kernels.native import build_variant
from bitnest.kernels.packing import pack_bits

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")

EXACT = ["fp8-channel", "fp8_e5m2-g64", "mxfp8", "mxfp6_e3m2", "fp7_e3m3-g32", "fp5_e3m1-g48",
         "fp3_e2m0-g16", "fp8-g128-dq", "fp6_e3m2-g32-e4m3"]  # fmt: skip
ROUNDED = ["nf4-g64", "nf4-channel", "lut2-g16", "lut3-g48", "lut4-g128"]
SHAPES = [(33, 200), (16, 32), (5, 70), (100, 416)]  # odd tails, one tile, less than a block, many
FLOAT32 = 2e-6  # of the sum of magnitudes
ISAS = {
    "avx512": ("-march=skylake-avx512",),
    "avx2": ("-march=haswell",),
    "portable": ("-DBITNEST_PORTABLE",),
}


def stored(fmt: BlockFormat, shape: tuple[int, int], half: torch.dtype = torch.bfloat16) -> dict:
    """Random tensors of a format, every finite code among them."""
    torch.manual_seed(sum(shape))
    bits, found = int(fmt.bits), {}
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8)
    if isinstance(fmt.element, FloatElement):
        bad = fmt.element.spec.special_codes
        codes = torch.where(torch.isin(codes, torch.tensor(bad, dtype=torch.uint8)), 1, codes)
        low = bits
        for name, width in zip(split_parts(bits), segments(bits), strict=True):
            low -= width
            found[name] = pack_bits((codes >> low) & ((1 << width) - 1), width)
    else:
        found["codes"] = pack_bits(codes, bits)
    for name, part in fmt.parts(shape).items():
        if name in found:
            continue
        if part.dtype == "HALF":
            found[name] = (torch.rand(part.shape) + 0.5).to(half)
        elif part.dtype == "F32":
            found[name] = torch.rand(part.shape) + 0.5
        else:
            found[name] = torch.randint(100, 126, part.shape, dtype=torch.uint8)
            if part.dtype == "I8":
                found[name] = found[name].view(torch.int8)
    return found


def check(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rounding: float) -> None:
    """y against x W^T in float64, row by row of what is added up."""
    x, weight = x.double(), weight.double()
    bound = (x.abs() @ weight.abs().T) * (rounding + FLOAT32) + 1e-30
    assert y.shape == (*x.shape[:-1], len(weight))
    assert ((y.double() - x @ weight.T).abs() <= bound).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", EXACT + ROUNDED)
def test_every_count_of_tokens_on_odd_shapes(name: str, shape: tuple[int, int]) -> None:
    fmt = parse_format(name)
    assert isinstance(fmt, BlockFormat)
    tensors = stored(fmt, shape)
    weight = layout.lay_out(tensors, fmt, shape)
    assert weight is not None and layout.why_not(fmt, shape) == ""
    dense = decode(tensors, fmt, shape, torch.float32)
    for tokens in (0, 1, 2, 3, 4, 5, 17, 130):
        x = torch.randn(tokens, shape[1]).bfloat16().float()
        check(weight.product(x), x, dense, 0 if name in EXACT else 2**-9)


@pytest.mark.parametrize("name", EXACT + ROUNDED)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_restored_bit_for_bit(name: str, half: torch.dtype) -> None:
    fmt, shape = parse_format(name), (37, 111)
    assert isinstance(fmt, BlockFormat)
    tensors = stored(fmt, shape, half)
    weight = layout.lay_out(tensors, fmt, shape)
    assert weight is not None
    back = weight.restore()
    assert back.keys() == tensors.keys()
    for name_, tensor in tensors.items():
        assert back[name_].dtype == tensor.dtype and torch.equal(back[name_], tensor), name_


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-10), (torch.float32, 0)]
)
def test_inputs_keep_all_their_bits(dtype: torch.dtype, error: float) -> None:
    """Only the result is rounded to the type of the inputs."""
    fmt, shape = parse_format("fp8-g128"), (64, 256)
    assert isinstance(fmt, BlockFormat)
    tensors = stored(fmt, shape)
    weight = layout.lay_out(tensors, fmt, shape)
    assert weight is not None
    dense = decode(tensors, fmt, shape, torch.float32) / 64
    weight.struct.factor /= 64  # within float16
    for tokens in (1, 9):
        x = (torch.randn(tokens, 256) / 3).to(dtype)
        check(weight.product(x), x, dense, error)


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_subnormal_codes_of_fp8_count(name: str) -> None:
    """The products of bfloat16 flush subnormal numbers: no number of the table may be one."""
    fmt = parse_format(f"fp8_{name}-g32")
    assert isinstance(fmt, BlockFormat) and isinstance(fmt.element, FloatElement)
    codes = (
        torch.arange(4).repeat(16, 8).to(torch.uint8)
    )  # 0 and the three smallest, or two of them
    tensors = {"codes": pack_bits(codes, 8), "scales": torch.ones(16, 1).bfloat16()}
    weight = layout.lay_out(tensors, fmt, (16, 32))
    assert weight is not None
    x = torch.zeros(4, 32)
    x[torch.arange(4), torch.arange(4)] = 1.0
    values = torch.tensor(fmt.element.spec.values()[:4])
    assert torch.equal(weight.product(x), values[:, None].expand(4, 16))


@pytest.mark.parametrize("shape", SHAPES)
def test_dense_bfloat16(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape).bfloat16()
    weight = lay_dense(matrix)
    assert torch.equal(weight.restore()["weight"], matrix)
    for tokens in (0, 1, 3, 6, 130):
        x = torch.randn(tokens, shape[1])
        check(weight.product(x), x, matrix, 0)


def test_dense_of_other_types_is_left_to_torch() -> None:
    tensors = {"weight": torch.randn(4, 8).half()}
    assert layout.lay_out(tensors, DenseFormat(), (4, 8)) is None


def test_inputs_that_are_not_contiguous() -> None:
    fmt, shape = parse_format("nf4-g64"), (48, 192)
    assert isinstance(fmt, BlockFormat)
    tensors = stored(fmt, shape)
    weight = layout.lay_out(tensors, fmt, shape)
    assert weight is not None
    wide = torch.randn(3, 5, 400).bfloat16()
    for x in (wide[..., 100:292], wide.transpose(0, 1)[..., :192], wide[..., ::2][..., :192]):
        assert torch.equal(weight.product(x), weight.product(x.contiguous()))


def test_tables_of_rows_are_refused_with_a_reason() -> None:
    assert "row" in layout.why_not(parse_format("lut4-channel"), (16, 32))


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_other_instruction_sets(isa: str) -> None:
    other = build_variant("cpu", ISAS[isa])
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if other is None or {"avx512": "avx512bw", "avx2": "avx2"}.get(isa, "") not in flags:
        pytest.skip("not for this machine")
    declare(other)
    shape = (40, 224)
    for name in EXACT + ROUNDED + ["dense"]:
        fmt = parse_format(name)
        tensors = (
            stored(fmt, shape)
            if isinstance(fmt, BlockFormat)
            else {"weight": torch.randn(shape).bfloat16()}
        )
        weight = layout.lay_out(tensors, fmt, shape)
        assert weight is not None
        dense = decode(tensors, fmt, shape, torch.float32)
        for tokens in (1, 2, 4, 11):
            x = torch.randn(tokens, shape[1])
            y = torch.empty(tokens, shape[0])
            other.linear(
                ctypes.byref(weight.struct), x.data_ptr(), tokens, x.stride(0), y.data_ptr(),
                shape[0], 0, 3, 128,
            )  # fmt: skip
            check(y, x, dense, 2**-9 if name in ROUNDED else 0)
