"""Packed weights laid out for the kernels of the CPU, over the formats: products, stored tensors.

Bounds are of |x| |w|, the norms of what a result adds up, against float64:

    numbers of tables rounded to bfloat16                      2^-9
    inputs as integers of 24 bits; of 16 bits                  2e-6; 1e-4
    results in bfloat16, float16                               2^-8, 2^-10 of the result, too
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from bitnest.formats import AnyFormat, DenseFormat, cut, parse_format
from bitnest.formats.catalogue import CATALOGUE
from bitnest.formats.fates import parse_fate
from bitnest.formats.inputs import parse_inputs
from bitnest.formats.zero import ZeroFormat
from bitnest.kernels import laid, paths
from bitnest.kernels.cpu.library import library
from bitnest.kernels.decode import decode
from bitnest.kernels.inputs import code_inputs
from bitnest.kernels.products import integer_product, integer_weight, rounded_product
from bitnest.packed.modules import PackedWeight
from bitnest.quantize.solve import Options, solve

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")

WRAPPED = [
    "int4-g64@had64", "int4-g64@rhad", "int4-g64@awq", "int4-g64@perm", "int4-g64+lorc8",
    "nf4-g64@had32", "int4-g64@had64+lorc8", "int4-g64@awq@perm",
]  # fmt: skip
OTHERS = [
    "64xint8-g64~int4-g64", "64xint8-g64~int4-g64@perm", "int4-g128%2:4", "int4-g128%50",
    "int8-g64%2:4", "dense%2:4", "int4-g64%50@had64", "nest248-g64", "nest2345678-g64@had64",
    "mat248-g64", "mwq234-g64", "any34-channel",
]  # fmt: skip
LISTED = [entry.name for entry in CATALOGUE if parse_fate(entry.name) is None]
NAMES = list(dict.fromkeys([*LISTED, *WRAPPED, *OTHERS]))
SHAPE = (40, 320)
TYPES = {torch.float32: (2e-6, 0.0), torch.bfloat16: (1e-4, 2**-8), torch.float16: (1e-4, 2**-10)}
TABLES = 2**-9


def why_not(fmt: AnyFormat, shape: tuple[int, int], device: str) -> str:
    """What the doctor says of it; empty: a kernel runs it."""
    return paths.path(fmt, device, shape).reason


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@cache
def stored(
    name: str, shape: tuple[int, int] = SHAPE, half: torch.dtype = torch.bfloat16
) -> tuple[AnyFormat, dict[str, torch.Tensor]]:
    """A matrix rounded to a format, with channels of different loudness."""
    fmt = parse_format(name)
    if isinstance(fmt, DenseFormat):
        return fmt, {"weight": random(*shape).to(half)}
    x = random(2 * shape[1], shape[1], seed=1) * torch.linspace(0.5, 2, shape[1])
    options = Options(method="rtn", clip=False, half=half)
    found = solve(random(1, *shape), (x.T @ x)[None] / len(x), fmt, options)  # type: ignore[arg-type]
    return fmt, found.store(0, slice(0, shape[0]))


def laid_out(name: str, shape: tuple[int, int] = SHAPE) -> laid.Laid:
    fmt, tensors = stored(name, shape)
    found = laid.lay_out(tensors, fmt, shape)
    if found is None:
        assert why_not(fmt, shape, "cpu")
        pytest.skip(why_not(fmt, shape, "cpu"))
    assert not why_not(fmt, shape, "cpu")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_products_of_every_type_of_inputs(name: str) -> None:
    weight, (fmt, tensors) = laid_out(name), stored(name)
    dense = decode(tensors, fmt, SHAPE).double()
    size = dense.norm(dim=1) + (16 if name.startswith("mwq") else 0)  # sums that cancel
    assert weight.shape == SHAPE and weight.path == "cpu"
    for dtype, (inputs, result) in TYPES.items():
        for tokens in (0, 1, 5, 17):
            x = random(tokens, SHAPE[1], seed=tokens).to(dtype)
            y, exact = weight.product(x), x.double() @ dense.T
            assert y.dtype == dtype and y.shape == exact.shape
            bound = (TABLES + inputs) * x.double().norm(dim=1)[:, None] * size
            assert ((y.double() - exact).abs() <= bound + result * exact.abs()).all(), dtype


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "dense"])
@pytest.mark.parametrize("shape", [SHAPE, (37, 200)])
def test_stored_tensors_come_back(name: str, shape: tuple[int, int], half: torch.dtype) -> None:
    if shape[1] % 64 and ("had" in name or "4:8" in name):
        pytest.skip("no such shape of the format")
    fmt, tensors = stored(name, shape, half)
    weight = laid.lay_out(tensors, fmt, shape)
    assert (weight is None) == bool(why_not(fmt, shape, "cpu"))
    if weight is None:
        return
    back = weight.restore()
    assert back.keys() == tensors.keys()
    for part, tensor in tensors.items():
        assert back[part].dtype == tensor.dtype and torch.equal(back[part], tensor), part


REFUSED = {
    "lut4-channel": "table per row", "ternary-g128-dict": "entropy", "any34-channel": "per row",
    "stack2345-r16": "low rank", "int4-g128%b16x16-50": "no CPU kernel", "zero": "no CPU kernel",
    "int3-g64%50": "int3",
    "lut4-channel@had64": "table per row",
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_formats_that_no_kernel_takes(name: str) -> None:
    fmt, tensors = stored(name)
    assert laid.lay_out(tensors, fmt, SHAPE) is None
    assert REFUSED[name] in why_not(fmt, SHAPE, "cpu")
    assert "meta" in why_not(parse_format("int4-g64"), SHAPE, "meta")


def test_what_stands_in_the_way_is_what_is_expected() -> None:
    """No format of the list falls to the reference unnoticed."""
    gone = {name for name in NAMES if why_not(parse_format(name), SHAPE, "cpu")}
    assert gone == {
        "lut4-channel", "ternary-g128-dict", "any2345678-channel", "stack12345678-r16",
        "int4-g128%b16x16-50", "zero", "any34-channel",
    }  # fmt: skip


CODED = [
    "int4-g128", "int2-g64", "int8-channel", "int4-g128-asym", "int4-g64@had64", "int4-g64@awq",
    "int8-b128x128", "dgq4-g128", "int3-g64",
]  # fmt: skip
INPUTS = ["int8-token", "int8-g64", "int4-g32", "int8-static", "mxint8"]


@pytest.mark.parametrize("rounding", INPUTS)
@pytest.mark.parametrize("name", CODED)
def test_rounded_inputs_meet_codes(name: str, rounding: str) -> None:
    weight, (fmt, tensors) = laid_out(name), stored(name)
    inputs = parse_inputs(rounding)
    static = 0.03 if inputs.has_static else None
    codes = integer_weight(tensors, fmt, SHAPE)
    assert codes is not None
    for tokens in (0, 1, 17):
        x = laid.turn(weight, random(tokens, SHAPE[1], seed=tokens))
        coded = code_inputs(x, inputs, static)
        found, wanted = weight.product_coded(coded), integer_product(coded, codes)
        assert found is not None
        size = torch.stack([p.decoded().norm(dim=1) for p in coded]).sum(0)[:, None]
        size = size * torch.cat([c.decoded() for c in codes], 1).norm(dim=1)
        assert ((found - wanted).abs() <= 1e-6 * size).all()


@pytest.mark.parametrize("name", ["int4-g64", "int8-channel", "int3-g64-asym", "ternary-g64"])
def test_integer_sums_are_exact(name: str) -> None:
    """Scales of one on both sides: float32 holds every sum."""
    fmt, tensors = stored(name)
    tensors = {**tensors, "scales": torch.ones_like(tensors["scales"])}
    weight = laid.lay_out(tensors, fmt, SHAPE)
    assert weight is not None
    x = torch.randint(-127, 128, (9, SHAPE[1]), generator=torch.Generator().manual_seed(0))
    coded = code_inputs(x.float(), parse_inputs("int8-static"), 1.0)
    exact = x.double() @ decode(tensors, fmt, SHAPE).double().T
    found = weight.product_coded(coded)
    assert found is not None and torch.equal(found.double(), exact)


@pytest.mark.parametrize("name", ["int4-g128%2:4", "int8-g64%50"])
def test_sparse_codes_meet_rounded_inputs(name: str) -> None:
    weight, (fmt, tensors) = laid_out(name), stored(name)
    for rounding in ("int8-token", "int8-g64"):
        coded = code_inputs(random(5, SHAPE[1]), parse_inputs(rounding), None)
        found = weight.product_coded(coded)
        dense = decode(tensors, fmt, SHAPE).double()
        exact = coded[0].decoded().double() @ dense.T
        assert found is not None and (found - exact).abs().max() < 2e-6 * exact.abs().max()
    coded = code_inputs(random(5, SHAPE[1]), parse_inputs("int8-g32"), None)
    assert weight.product_coded(coded) is None  # two scales within a piece


@pytest.mark.parametrize(
    "name", ["nf4-g64", "mwq234-g64", "int4-g64+lorc8", "64xint8-g64~int4-g64"]
)
def test_what_has_no_integers_leaves_rounded_inputs_to_the_reference(name: str) -> None:
    coded = code_inputs(random(2, SHAPE[1]), parse_inputs("int8-token"), None)
    assert laid_out(name).product_coded(coded) is None


# ------------------------------------------------------------------ the life of a packed weight


def packed(name: str, *, looked_up: bool = False) -> PackedWeight:
    fmt, tensors = stored(name)
    weight = PackedWeight(fmt, SHAPE)
    weight.looked_up = looked_up
    weight.load(tensors, torch.device("cpu"))
    return weight


def dense_of(name: str) -> torch.Tensor:
    fmt, tensors = stored(name)
    return decode(tensors, fmt, SHAPE)


X = random(6, SHAPE[1], seed=9)


def far(y: torch.Tensor, name: str) -> float:
    exact = X.double() @ dense_of(name).double().T
    return float((y - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("name", ["int4-g64", "int4-g64@had64", "int4-g128%2:4", "nest248-g64"])
def test_a_layout_takes_the_place_of_what_is_stored(name: str) -> None:
    weight = packed(name)
    small = weight.nbytes
    assert far(weight.product(X), name) < 5e-3
    assert weight._laid is not None and all(getattr(weight, part) is None for part in weight.parts)
    assert weight.nbytes < 1.6 * small  # rows and columns up to whole tiles, masks to words
    for part, tensor in stored(name)[1].items():
        assert torch.equal(weight.tensors[part], tensor)
    assert weight._laid is not None  # asking did not take the layout away
    weight.restore()
    assert weight.nbytes == small and weight._laid is None
    assert torch.equal(weight.decode(torch.float32), dense_of(name))


def test_types_of_a_model_do_not_touch_what_is_stored() -> None:
    weight = packed("int4-g64")
    before = weight.product(X)
    weight.to(torch.float64).to(torch.bfloat16)
    assert all(torch.equal(weight.tensors[p], t) for p, t in stored("int4-g64")[1].items())
    assert torch.equal(weight.product(X), before)


def test_a_product_of_another_type_is_the_reference() -> None:
    weight = packed("int4-g64")
    assert torch.allclose(weight.product(X.double()), X.double() @ dense_of("int4-g64").double().T)
    assert weight._laid is None


def test_rows_are_looked_up_beside_products() -> None:
    weight = packed("int4-g64", looked_up=True)
    held = {part: getattr(weight, part).data_ptr() for part in weight.parts}
    rows = torch.tensor([39, 0, 7, 7])
    for _ in range(2):
        assert far(weight.product(X), "int4-g64") < 1e-5
        assert torch.equal(weight.rows(rows, torch.float32), dense_of("int4-g64")[rows])
        assert {p: t.data_ptr() for p, t in weight.tensors.items()} == held
    assert weight._laid is not None
    weight.restore()
    assert {p: t.data_ptr() for p, t in weight.tensors.items()} == held


def test_gradients_flow_through_the_reference() -> None:
    weight, x = packed("int4-g64"), X.clone().requires_grad_()
    weight.product(X)
    weight.product(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, dense_of("int4-g64").sum(0).expand_as(X), atol=1e-4)


def test_no_tokens_give_no_rows() -> None:
    for name in ("int4-g64", "int4-g64%50", "nf4-g64", "int4-g64+lorc8", "lut4-channel"):
        assert packed(name).product(torch.empty(2, 0, SHAPE[1])).shape == (2, 0, SHAPE[0])


def test_bias_and_leading_dimensions() -> None:
    weight, bias = packed("int4-g64"), random(SHAPE[0])
    y = weight.product(X.view(2, 3, -1), bias)
    assert y.shape == (2, 3, SHAPE[0])
    assert torch.allclose(y.view(6, -1), weight.product(X) + bias)


def test_a_dropped_weight_gives_zeros() -> None:
    weight = PackedWeight(ZeroFormat(), SHAPE)
    weight.load({}, torch.device("cpu"))
    assert torch.equal(weight.product(X), torch.zeros(6, SHAPE[0])) and weight.lay_out() is None
    assert weight.nbytes == 0


def test_numbers_that_are_not_finite_stay_with_their_token() -> None:
    weight, x = packed("int4-g64"), X.clone()
    clean = weight.product(x)
    x[2, 5] = torch.inf
    y = weight.product(x)
    assert not y[2].isfinite().any()
    assert torch.equal(y[[0, 1, 3, 4, 5]], clean[[0, 1, 3, 4, 5]])


@pytest.mark.parametrize("rounding", ["int8-token", "int8-g64", "int4-g32", "int8-token-t2"])
@pytest.mark.parametrize("name", ["int4-g64", "int4-g64@had64", "int4-g64@perm", "int8-g64%2:4"])
def test_rounding_weight_gives_what_the_reference_does(name: str, rounding: str) -> None:
    fmt, tensors = stored(name)
    weight = packed(name)
    weight.inputs = parse_inputs(rounding)
    codes = integer_weight(tensors, fmt, SHAPE)
    wanted = rounded_product(
        X, weight.inputs, None, fmt, tensors, codes=codes,
        dense=decode(tensors, fmt, SHAPE) if codes is None else None,
    )  # fmt: skip
    # a rotation adds in another order, and a number half-way between codes may go to the other
    limit = 2e-2 if "had" in name else 1e-5
    assert (weight.product(X) - wanted).abs().max() <= limit * wanted.abs().max()


@pytest.mark.parametrize("name", ["nest2345678-g64", "nest248-g64@had64", "mwq234-g64"])
def test_widths_change_in_place(name: str) -> None:
    """Planes that stay do not move; the layout is not made anew."""
    fmt, tensors = stored(name)
    low, weight = cut(fmt, 2), packed(name)
    weight.product(X)
    before, kernel = weight._laid, getattr(weight._laid, "base", weight._laid)
    plane = kernel.held["bit1"].data_ptr()
    whole = weight.nbytes
    weight.change(low, {})
    narrow = weight.product(X)
    assert weight._laid is before or weight._laid.base is kernel  # type: ignore[union-attr]
    assert weight.nbytes < whole and weight.tensors.keys() == low.parts(SHAPE).keys()
    exact = X.double() @ decode(tensors, low, SHAPE).double().T
    assert (narrow - exact).abs().max() < 5e-3 * exact.abs().max()
    weight.change(fmt, {n: t for n, t in tensors.items() if n not in low.parts(SHAPE)})
    assert kernel.held["bit1"].data_ptr() == plane and weight.nbytes == whole
    assert far(weight.product(X), name) < 5e-3
    assert all(torch.equal(weight.tensors[part], tensor) for part, tensor in tensors.items())


@pytest.mark.parametrize("looked_up", [False, True])
@pytest.mark.parametrize("name", ["any34-channel", "nest248-g64"])
def test_widths_change_without_a_layout(name: str, looked_up: bool) -> None:
    """Where no kernel takes the format, and where stored tensors lie beside the layout."""
    fmt, tensors = stored(name)
    low, weight = cut(fmt, 3), packed(name, looked_up=looked_up)
    weight.product(X)
    weight.change(low, {})
    exact = X.double() @ decode(tensors, low, SHAPE).double().T
    assert (weight.product(X) - exact).abs().max() < 5e-3 * exact.abs().max()
    weight.change(fmt, {n: t for n, t in tensors.items() if n not in low.parts(SHAPE)})
    assert far(weight.product(X), name) < 5e-3
    assert torch.equal(weight.rows(torch.tensor([3]), torch.float32), dense_of(name)[[3]])


def test_other_formats_than_the_layouts_are_not_changed_in_place() -> None:
    weight = laid_out("nest248-g64")
    for other in ("nest348-g64", "mat248-g64", "nest24-g32", "nest24-g64@had64", "int4-g64"):
        assert laid.change(weight, parse_format(other), {}) is None
    turned = laid_out("nest248-g64@had64")
    assert laid.change(turned, parse_format("nest24-g64@rhad64"), {}) is None
