"""Rounded inputs that are NaN, infinite, huge, tiny, zero, absent or not contiguous."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from bitnest import api
from bitnest.errors import ArtifactError, DataError
from bitnest.formats import parse_format
from bitnest.formats.inputs import parse_inputs
from bitnest.kernels.decode import decode
from bitnest.kernels.inputs import Magnitudes, check_static, code_inputs, round_inputs
from bitnest.kernels.products import integer_weight, rounded_product
from tests.test_inputs import NAMES, inputs, stored
from tests.tiny import Builder

SCALE = 0.02
STATIC = ["int8-static", "fp8_e4m3-static", "nvfp4", "nvint4"]
CHANNELS = 172  # no multiple of a group


def static_of(name: str) -> float | None:
    return SCALE if parse_inputs(name).has_static else None


def rounded(name: str, x: torch.Tensor) -> torch.Tensor:
    return round_inputs(x, parse_inputs(name), static_of(name))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_none_in_its_token_and_touches_no_other(
    name: str, what: float
) -> None:
    """Codes and accumulators stay finite; the scale says that the group is lost. A channel that
    stays as it is (-t) stays infinite, and is loud for the whole batch."""
    x = inputs(3, CHANNELS)
    x[1, 5] = what
    fmt = parse_inputs(name)
    keeps = fmt.keep is not None and not math.isnan(what)
    for part in code_inputs(x, fmt, static_of(name)):
        assert part.values.isfinite().all() and (part.values.abs() <= part.largest).all()
        assert part.scales[[0, 2]].isfinite().all()
    found = rounded(name, x)
    assert found[1, 5].isnan() if not keeps else found[1, 5] == what
    x[1, 5] = 100.0 if keeps else 0.0  # loud as well
    for row in (0, 2):
        assert torch.equal(found[row], rounded(name, x)[row])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weights", ["int4-g32", "int6-g128", "fp8-channel", "int4-g32@had32"])
def test_a_token_that_is_no_number_gives_none(name: str, weights: str) -> None:
    """What it gives without rounding; the other tokens get what they get alone."""
    fmt, given = parse_format(weights), parse_inputs(name)
    tensors, _ = stored(weights)
    shape = (24, CHANNELS)
    dense, codes = decode(tensors, fmt, shape), integer_weight(tensors, fmt, shape)
    x = inputs(3, CHANNELS, 4).clamp(-5, 5)

    def product(x: torch.Tensor) -> torch.Tensor:
        static = static_of(name)
        return rounded_product(x, given, static, fmt, tensors, codes=codes, dense=dense)

    quiet = product(x)
    x[1, 7] = math.nan
    found = product(x)
    assert found[1].isnan().all() and torch.equal(found[[0, 2]], quiet[[0, 2]])
    x[1, 7] = math.inf
    assert not product(x)[1].isfinite().any()


@pytest.mark.parametrize("name", NAMES)
def test_the_largest_and_the_smallest_numbers(name: str) -> None:
    """Huge numbers come near themselves, or saturate under a static scale; tiny ones are 0."""
    fmt = parse_inputs(name)
    x = torch.full((2, CHANNELS), 2e38)
    x[1] = -x[1]
    found = rounded(name, x)
    assert torch.equal(found[0], -found[1])
    if fmt.has_static:
        most = fmt.largest * SCALE * (448 if fmt.scale == "e4m3" else 1)
        assert torch.allclose(found[0], torch.tensor(most))
    else:
        assert ((found[0] / 2e38 - 1).abs() <= 0.3).all()
    tiny = rounded(name, torch.full((2, CHANNELS), 1e-41))
    assert (tiny.abs() <= 2e-41).all()
    mixed = torch.full((1, CHANNELS), 1e-41)
    mixed[0, 3] = 1.0
    assert rounded(name, mixed)[0, 4] == 0 and rounded(name, mixed).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_zeros_no_tokens_and_one_channel(name: str) -> None:
    assert torch.equal(rounded(name, torch.zeros(2, CHANNELS)), torch.zeros(2, CHANNELS))
    assert rounded(name, torch.empty(0, CHANNELS)).shape == (0, CHANNELS)
    assert rounded(name, torch.empty(0, 1)).shape == (0, 1)
    one = rounded(name, torch.tensor([[0.5], [-0.5], [0.0]]))
    assert one.shape == (3, 1) and one[0] == -one[1] and one[2] == 0
    assert 0.4 <= float(one[0]) <= 0.6


@pytest.mark.parametrize("name", NAMES)
def test_inputs_that_are_not_contiguous_are_read_right_and_left_alone(name: str) -> None:
    x = inputs(5, CHANNELS)
    want = rounded(name, x.clone())
    wide = torch.full((5, 2 * CHANNELS), math.nan)
    wide[:, ::2] = x
    offset = torch.full((7, CHANNELS + 3), math.nan)
    offset[1:6, 2:-1] = x
    for view in (x, x.T.contiguous().T, wide[:, ::2], offset[1:6, 2:-1]):
        before = view.clone()
        assert torch.equal(rounded(name, view), want)
        assert torch.equal(view, before)
    assert torch.equal(rounded(name, x[:1].expand(4, -1)), rounded(name, x[:1].repeat(4, 1)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weights", ["int4-g32", "fp8-channel"])
def test_products_of_no_tokens(name: str, weights: str) -> None:
    fmt = parse_format(weights)
    tensors, _ = stored(weights)
    shape = (24, CHANNELS)
    y = rounded_product(
        torch.empty(0, CHANNELS), parse_inputs(name), static_of(name), fmt, tensors,
        codes=integer_weight(tensors, fmt, shape), dense=decode(tensors, fmt, shape),
    )  # fmt: skip
    assert y.shape == (0, 24) and y.dtype == torch.float32


# ---------------------------------------------------------------- static scales


@pytest.mark.parametrize("name", STATIC)
@pytest.mark.parametrize("scale", [None, 0.0, -1.0, math.nan, math.inf, 1e39, 1e-45, "1"])
def test_a_static_scale_that_is_none_is_refused(name: str, scale: float | None) -> None:
    with pytest.raises(ArtifactError, match="static scale") as found:
        round_inputs(inputs(2, 64), parse_inputs(name), scale)
    assert "compress again" in str(found.value)
    with pytest.raises(ArtifactError, match="k_proj"):
        check_static(parse_inputs(name), scale, "k_proj")


@pytest.mark.parametrize("name", STATIC)
@pytest.mark.parametrize("method", ["mse", "percentile", "absmax"])
@pytest.mark.parametrize("what", [math.nan, -math.nan, math.inf, -math.inf])
def test_no_static_scale_comes_from_what_is_no_number(name: str, method: str, what: float) -> None:
    magnitudes = Magnitudes()
    magnitudes.add(inputs(8, 64))
    assert magnitudes.scale(parse_inputs(name), method) > 0
    x = inputs(8, 64)
    x[3, 3] = what
    magnitudes.add(x)
    with pytest.raises(DataError, match="1 of 1024 inputs were NaN or infinite") as found:
        magnitudes.scale(parse_inputs(name), method, "a.matrix")
    assert found.value.where == "a.matrix" and found.value.hint


@pytest.mark.parametrize("name", STATIC)
@pytest.mark.parametrize("method", ["mse", "percentile", "absmax"])
@pytest.mark.parametrize("peak", [0.0, 1e-44, 1e-38, 2e-36, 1e-34, 1.0, 3.39e38])
def test_every_static_scale_is_one_that_is_taken(name: str, method: str, peak: float) -> None:
    """From subnormal numbers to the largest, and where all but one in a million are 0."""
    fmt = parse_inputs(name)
    for zeros in (0, 10**6):
        magnitudes = Magnitudes()
        x = torch.tensor([[peak, -peak / 3]])
        magnitudes.add(x)
        magnitudes.counts[0] += zeros
        scale = magnitudes.scale(fmt, method)
        found = round_inputs(x, fmt, scale)
        assert found.isfinite().all()
        if peak >= 1e-34:
            assert float(found[0, 0]) == pytest.approx(peak, rel=0.2)
        assert not round_inputs(torch.zeros(1, 2), fmt, scale).any()


@pytest.mark.parametrize("scale", [None, 0.0, math.nan])
def test_an_artifact_without_its_static_scales_is_not_loaded(
    scale: float | None, tiny: Builder, text: Path, tmp_path: Path
) -> None:
    out = api.compress(
        tiny("llama"), tmp_path / "out", format="int8-channel", inputs="int8-static",
        device="cpu", data=[str(text)], samples=2, length=32, method="rtn",
    )  # fmt: skip
    manifest = tmp_path / "out" / "bitnest.json"
    assert out is not None
    found = json.loads(manifest.read_text())
    sites = [site for site in found["sites"] if site.get("inputs")]
    sites[1]["sites"][0][-1] = scale
    manifest.write_text(json.dumps(found))
    from transformers import AutoModelForCausalLM

    with pytest.raises(ArtifactError, match="static scale"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
