"""Weights in few bits times 16-bit inputs: the kernels' numbers against float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from bitnest.errors import BitnestError
from bitnest.formats import parse_format
from bitnest.kernels.decode import decode
from bitnest.kernels.gpu import tiles
from bitnest.kernels.gpu.layout import GpuWeight, lay_out, why
from bitnest.kernels.gpu.linear import linear, linear_reference
from bitnest.kernels.gpu.words import shuffle, unshuffle
from tests.gpu_mode import DEVICE
from tests.gpu_weights import random_stored

SHAPE = (70, 300)  # neither a multiple of a tile nor of a group
INTEGERS = (
    "int1-g128", "int2-g32", "int3-g64-asym", "int4-g128", "int5-g48", "int6-g128", "int7-g64",
    "int8-channel", "int8-g16", "int4-b64x64", "int4-tensor", "int4-g64-dq", "int4-channel-dq",
    "int4-g32-e8m0", "int3-g64-m2", "dgq4-g64", "nvint4", "ternary-g128",
)  # fmt: skip
OTHERS = (
    "nvfp4", "mxfp4", "mxfp6", "mxfp8", "fp8-channel", "fp8-g16", "fp6-g64", "fp5_e2m2-g32",
    "nf4-g64", "lut3-g64", "lut4-channel",
)  # fmt: skip
NESTED = (
    "nest2345678-g128",
    "nest38-g32",
    "mat248-g64",
    "mwq235-g64",
    "mwq8-g16",
    "any234-channel",
)
FLOAT32, BFLOAT16, FLOAT16 = 2e-6, 6e-3, 1e-3  # of a norm, against float64


def weight(name: str, shape: tuple[int, int] = SHAPE, **options: object) -> GpuWeight:
    fmt, tensors = random_stored(name, shape, **options)  # type: ignore[arg-type]
    found = lay_out({n: t.to(DEVICE) for n, t in tensors.items()}, fmt, shape)
    assert found is not None, why(fmt, shape)
    return found


def exact(x: torch.Tensor, w: GpuWeight, bits: int | None = None) -> torch.Tensor:
    fmt = w.fmt if bits is None or len(w.widths) == 1 else w.fmt.at(bits)  # type: ignore[union-attr]
    return x.double() @ decode(w.restore(), fmt, w.shape).double().T


def error(expected: torch.Tensor, y: torch.Tensor) -> float:
    return float((expected - y.double()).norm() / expected.norm())


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)


def test_reference_multiplies_what_the_codes_say() -> None:
    w = weight("int4-channel", (2, 3))
    codes = unshuffle(w.words, w.shape, (4,), 4)[0].double() - 8
    assert w.scales is not None
    by_hand = (codes * w.scales.double().T) @ torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    x = torch.tensor([[1.0, 2.0, 3.0]], device=DEVICE)
    assert error(by_hand[None].to(DEVICE), linear_reference(x, w)) < 1e-7


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*INTEGERS, *OTHERS, *NESTED, "mxfp8_e5m2"])
def test_layout_gives_the_stored_tensors_back(name: str, half: torch.dtype) -> None:
    fmt, tensors = random_stored(name, SHAPE, half)
    found = lay_out(tensors, fmt, SHAPE)
    assert found is not None and found.nbytes >= 0.95 * fmt.nbytes(SHAPE)
    back = found.restore()
    assert back.keys() == tensors.keys()
    for part, tensor in tensors.items():
        assert back[part].dtype == tensor.dtype and torch.equal(back[part], tensor), part


@pytest.mark.parametrize("name", INTEGERS)
def test_one_token_times_integers(name: str) -> None:
    w, x = weight(name), inputs(1, SHAPE[1])
    assert error(exact(x, w), linear(x, w)) < FLOAT32


@pytest.mark.parametrize("name", [*INTEGERS, *OTHERS])
def test_some_tokens_in_bfloat16(name: str) -> None:
    w, x = weight(name), inputs(3, SHAPE[1], dtype=torch.bfloat16)
    assert error(exact(x, w), linear(x, w)) < BFLOAT16


@pytest.mark.parametrize("name", ["int5-g48", "nvfp4", "int4-g32-e8m0", "lut4-channel"])
def test_float32_inputs_lose_nothing(name: str) -> None:
    w, x = weight(name), inputs(2, SHAPE[1])
    assert error(exact(x, w), linear(x, w)) < FLOAT32


@pytest.mark.parametrize("name", ["int3-g64-asym", "mxfp4", "nf4-g64"])
def test_float16_inputs(name: str) -> None:
    w = weight(name, half=torch.float16)
    x = inputs(2, SHAPE[1], dtype=torch.float16)
    assert error(exact(x, w), linear(x, w)) < FLOAT16


@pytest.mark.parametrize("name", NESTED)
def test_every_width_of_a_nested_weight_is_a_prefix(name: str) -> None:
    w = weight(name, (20, 200))
    moved = [w.read_bytes(bits) for bits in w.widths]
    assert moved == sorted(moved)
    for bits in w.widths:
        for tokens in (1, 2):
            x = inputs(tokens, 200)
            assert error(exact(x, w, bits), linear(x, w, bits)) < FLOAT32, (bits, tokens)


@pytest.mark.parametrize("tokens", [0, 1, 17, 40])
def test_numbers_of_tokens(tokens: int) -> None:
    w, x = weight("int4-g128"), inputs(tokens, SHAPE[1])
    y = linear(x, w)
    assert y.shape == (tokens, SHAPE[0])
    if tokens:
        assert error(exact(x, w), y) < FLOAT32


@pytest.mark.parametrize("shape", [(1, 40), (130, 1), (3, 129), (257, 16)])
def test_odd_shapes(shape: tuple[int, int]) -> None:
    for name in ("int3-g16", "mxfp6"):
        w = weight(name, shape)
        for tokens in (1, 2):
            x = inputs(tokens, shape[1])
            assert error(exact(x, w), linear(x, w)) < FLOAT32


def test_inputs_that_are_not_contiguous_and_have_more_dimensions() -> None:
    w = weight("int4-g128")
    wide = torch.full((2, 3, 1000), float("nan"), device=DEVICE)
    wide[:, :, : SHAPE[1]] = x = inputs(2, 3, SHAPE[1])
    y = linear(wide[:, :, : SHAPE[1]], w)
    assert y.shape == (2, 3, SHAPE[0]) and error(exact(x, w), y) < FLOAT32
    tall = x[0].T.contiguous().T
    assert torch.equal(linear(tall, w), linear(x[0], w))
    assert error(exact(x[0, 0], w), linear(x[0, 0], w)) < FLOAT32


def test_dirty_padding_changes_nothing() -> None:
    for name in ("int3-g64", "mxfp8"):
        w = weight(name)
        segs = w.segs[w.widths[0]]
        codes = unshuffle(w.words, SHAPE, segs, w.widest)
        padded = [
            torch.nn.functional.pad(c, (0, 84), value=255 >> (8 - bits))
            for c, bits in zip(codes, segs, strict=True)
        ]
        dirty = shuffle(list(zip(padded, segs, strict=True)), w.widest)
        assert len(dirty) == len(w.words) and not torch.equal(dirty, w.words)
        given = [inputs(1, SHAPE[1]), inputs(3, SHAPE[1])]
        before = [linear(x, w) for x in given]
        w.words.copy_(dirty)
        assert all(torch.equal(y, linear(x, w)) for x, y in zip(given, before, strict=True))


def test_bias_sums_in_any_order_and_the_same_bits_every_time() -> None:
    w, bias = weight("int4-g128"), inputs(SHAPE[0])
    for tokens in (1, 5):
        x = inputs(tokens, SHAPE[1])
        y = linear(x, w, bias=bias)
        assert error(exact(x, w) + bias.double(), y) < FLOAT32
        assert torch.equal(y, linear(x, w, bias=bias))
        assert error(y.double(), linear(x, w, bias=bias, deterministic=False)) < FLOAT32


def test_tall_inputs_and_tiny_ones_keep_their_digits() -> None:
    w = weight("int8-channel")
    for size in (1e-8, 1.0, 1e6):
        x = size * inputs(1, SHAPE[1])
        assert error(exact(x, w), linear(x, w)) < FLOAT32


def test_what_has_no_kernel_says_why_and_what_does_not_fit_is_refused() -> None:
    for name in ("ternary-g128-dict", "dense", "int4-g128@had64", "stack2345-r4", "int4-g64%2:4"):
        assert why(parse_format(name), SHAPE), name
    fmt, tensors = random_stored("fp8-channel", SHAPE)
    tensors["codes"][0, 0] = 0x7F  # no number
    assert lay_out(tensors, fmt, SHAPE) is None
    w = weight("int4-g128")
    for x in (inputs(1, 299), inputs(1, 300).double()):
        with pytest.raises(BitnestError):
            linear(x, w)
    with pytest.raises(BitnestError):
        linear(inputs(1, 300), w, 3)


def test_every_case_has_a_tile() -> None:
    for operation in tiles.OPERATIONS:
        for m in (1, 16, 17, 64, 65, 4096):
            for name in ("default", "sm_90", "sm_80"):
                tile = tiles.choose(operation, 4, m, 4096, 4096, name)
                assert tile.bn >= 8 and (operation == "vector" or tile.bm >= 16)
            assert len(list(tiles.candidates(operation, m))) > 4
