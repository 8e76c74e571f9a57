"""Decode attention over a quantised cache on the CPU: against float64, on every instruction set."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bitnest.formats.kv import parse_kv
from bitnest.kernels import kv
from bitnest.kernels.cpu import attention, team
from bitnest.kernels.cpu.attention import Held, attend, attend_reference
from bitnest.packed.kv_cache import KVLayer
from bitnest.packed.rotary import Rotation
from tests.cpu_machines import machine  # noqa: F401  a fixture

FORMATS = ("int4-g128-w16", "int8-g128-w16", "fp8", "fp8_e5m2-w5")


def held(
    name: str, tokens: int, *, width: int = 64, values: int | None = None, heads: int = 2,
    batch: int = 1, rotated: int | None = None, neighbours: bool = False,
    dtype: torch.dtype = torch.float32, sliding: int | None = None,
) -> Held:  # fmt: skip
    """A layer's cache after that many tokens, with keys that have loud channels."""
    g = torch.Generator().manual_seed(tokens + width)
    keys = torch.randn(batch, heads, tokens, width, generator=g)
    keys[..., 1] += 8.0
    keys[..., width // 2] *= 5.0
    v = torch.randn(batch, heads, tokens, values or width, generator=g)
    turns = width if rotated is None else rotated
    turning = Rotation(10000.0 ** -(torch.arange(turns // 2) / max(1, turns // 2)), neighbours)
    fmt = parse_kv(name)
    layer = KVLayer(
        fmt, rotation=turning if turns else None, scales=(0.05, 0.02), sliding=sliding
    )  # fmt: skip
    layer.update(keys.to(dtype), v.to(dtype))
    return Held(
        fmt, layer._stored, layer.keys, layer.values, layer.start, layer.rotation,
        layer.scales, sliding,
    )  # fmt: skip


def queries(cache: Held, share: int = 1, n: int = 1, seed: int = 5) -> torch.Tensor:
    batch, heads, _, width = cache.keys.shape
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads * share, n, width, generator=g).to(cache.keys.dtype)


def check(cache: Held, q: torch.Tensor, limit: float = 1.5e-3, **more: Any) -> torch.Tensor:
    assert attention.why_not(cache, q.shape[2], q.shape[1]) is None
    scaling = q.shape[-1] ** -0.5
    exact = attend_reference(q, cache, scaling, dtype=torch.float64, **more)
    found = attend(q, cache, scaling, **more)
    error = float((found.double() - exact).abs().max() / exact.abs().max())
    assert error < limit, error
    return found


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("width", [64, 80, 96, 128, 36, 7])
@pytest.mark.usefixtures("machine")
def test_head_sizes_odd_ones_too(name: str, width: int) -> None:
    cache = held(name, 700, width=width, rotated=width // 2 * 2)
    for share in (1, 3, 4, 7):
        check(cache, queries(cache, share))


@pytest.mark.parametrize("name", ["int4-g8-w0", "int4-g200-w3", "int8-g100-w0", "int8-g1000-w7"])
@pytest.mark.usefixtures("machine")
def test_groups_of_any_length_are_cut_into_tiles(name: str) -> None:
    check(held(name, 2317), queries(held(name, 2317), 2))


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 128, 145, 513, 1300])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.usefixtures("machine")
def test_short_contexts_and_lengths_around_tiles(name: str, tokens: int) -> None:
    cache = held(name, tokens, width=16)
    check(cache, queries(cache, 2))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.usefixtures("machine")
def test_queries_are_causal_among_themselves(name: str) -> None:
    cache = held(name, 400, batch=2)
    found = check(cache, queries(cache, 2, 5))
    assert found.shape == (2, 5, 4, 64)


@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("rotated", [0, 16, 24, 64])
@pytest.mark.parametrize("name", ["int4-w16", "int8-w16"])
@pytest.mark.usefixtures("machine")
def test_partial_rotations_and_both_kinds_of_pairs(
    name: str, rotated: int, neighbours: bool
) -> None:
    cache = held(name, 300, rotated=rotated, neighbours=neighbours)
    check(cache, queries(cache, 2))


@pytest.mark.parametrize("name", ["int4-g8-w16", "int8-g128-w0", "fp8"])
@pytest.mark.usefixtures("machine")
def test_sliding_windows_hide_old_tokens(name: str) -> None:
    cache = held(name, 700, sliding=200)
    check(cache, queries(cache, 2, 1))
    early = Held(**{**vars(cache), "sliding": 20})
    check(early, queries(cache, 2, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("machine")
def test_recent_tokens_in_16_bits(dtype: torch.dtype) -> None:
    cache = held("int4-w128", 500, dtype=dtype)
    check(cache, queries(cache, 2), limit=8e-3)  # the result is rounded to 16 bits


@pytest.mark.usefixtures("machine")
def test_softcap_sinks_and_masks() -> None:
    cache = held("int4-w16", 400, batch=2)
    q = queries(cache, 2, 3)
    mask = torch.ones(2, 3, 390, dtype=torch.bool)
    mask[1, :, :130] = False
    check(cache, q, softcap=2.0)
    check(cache, q, sinks=torch.tensor([0.0, 3.0, -9.0, 20.0]))
    check(cache, q, mask=mask)
    added = torch.randn(2, 3, 413)[..., :400]
    check(cache, q, mask=added)


@pytest.mark.parametrize("name", ["int8-g8-w0", "int4-g128-w0"])
@pytest.mark.usefixtures("machine")
def test_constant_keys_and_queries_do_not_overflow_integers(name: str) -> None:
    """All products of a token have one sign and the largest magnitude there is."""
    keys = torch.full((1, 1, 128, 256), -1000.0)
    layer = KVLayer(parse_kv(name))
    layer.update(keys, torch.randn(1, 1, 128, 256))
    cache = Held(layer.fmt, layer._stored, layer.keys, layer.values)
    for sign in (-1.0, 1.0):
        q = torch.full((1, 1, 1, 256), 0.01 * sign)
        check(cache, q)


@pytest.mark.usefixtures("machine")
def test_value_width_differs_from_key_width() -> None:
    for name in FORMATS:
        cache = held(name, 300, width=64, values=40)
        check(cache, queries(cache, 2))


@pytest.mark.usefixtures("machine")
def test_strided_parts_and_views() -> None:
    cache = held("int4-w16", 500, batch=2)
    part = {name: t[:1] for name, t in cache.stored.items()}
    wide = torch.randn(1, 2, cache.keys.shape[2], 128)
    strided = Held(
        **{**vars(cache), "stored": part, "keys": wide[..., ::2], "values": wide[..., :64]}
    )
    check(strided, queries(cache, 2)[:1])
    roomy = {
        n: torch.cat([t, torch.full_like(t, 77)], 2)[:, :, : t.shape[2]] for n, t in part.items()
    }
    check(Held(**{**vars(strided), "stored": roomy}), queries(cache, 2)[:1])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.usefixtures("machine")
def test_same_bits_with_any_number_of_threads(name: str) -> None:
    cache, library = held(name, 1500, heads=3), team.library()
    assert library is not None
    q, found = queries(cache, 2, 2), []
    for threads in (1, 2, 5):
        library.set_threads(threads)
        found.append(attend(q, cache, 0.125))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_plain_loops_are_exact_to_float32() -> None:
    for name in FORMATS:
        cache = held(name, 600, width=128)
        q = queries(cache, 4)
        exact = attend_reference(q, cache, 0.1, dtype=torch.float64)
        found = attend(q, cache, 0.1, plain=True)
        assert float((found - exact).abs().max() / exact.abs().max()) < 2e-5


def test_reference_is_the_softmax_worked_by_hand() -> None:
    fmt = parse_kv("int8-g8-w0")
    k = kv.quantize_keys(torch.zeros(1, 1, 8, 2), 8, 8)
    v = kv.quantize_values(torch.arange(8.0).view(1, 1, 8, 1).expand(1, 1, 8, 2), 8)
    stored = {
        "keys": k.codes, "key_scale": k.scale, "key_low": k.low,
        "values": v.codes, "value_scale": v.scale, "value_low": v.low,
    }  # fmt: skip
    recent = torch.zeros(1, 1, 1, 2)
    recent[0, 0, 0, 0] = float(torch.tensor(8.0).log())
    cache = Held(fmt, stored, recent, torch.full((1, 1, 1, 2), 10.0))
    q = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    # weights 1/16 each of 0 .. 7, and 8/16 of 10
    expected = 28 / 16 + 5
    assert abs(float(attend_reference(q, cache, 1.0)[0, 0, 0, 0]) - expected) < 1e-5
    assert abs(float(attend(q, cache, 1.0)[0, 0, 0, 1]) - expected) < 1e-3
