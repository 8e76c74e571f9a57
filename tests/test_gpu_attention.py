"""Attention over a quantised KV cache: the kernel against its reference, and that against the cache
that the model runs with."""

from __future__ import annotations

import pytest
import torch

from tests.gpu_mode import DEVICE

pytest.importorskip("triton")

from bitnest.errors import FormatError
from bitnest.formats.kv import INTEGERS, KVFormat
from bitnest.kernels import kv
from bitnest.kernels.gpu.attention import (
    QuantizedKV,
    RotaryTables,
    attend_reference,
    decode_attention,
    rotary_tables,
)
from bitnest.packed.kv_cache import KVLayer
from bitnest.packed.rotary import Rotation

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def frequencies(half: int) -> torch.Tensor:
    return 10000.0 ** -(torch.arange(half) / half)


def make(
    element: str, shape: tuple[int, int, int, int, int], group: int, *, half: int,
    neighbours: bool = False, values: int | None = None, dtype: torch.dtype = torch.float32,
) -> QuantizedKV:  # fmt: skip
    batch, heads, stored, recent, width = shape
    values = values or width
    rng = torch.Generator().manual_seed(width + stored)
    loud = torch.ones(width).index_fill(0, torch.tensor([1, width - 1]), 6.0)
    keys = torch.randn(batch, heads, stored, width, generator=rng) * loud
    held = torch.randn(batch, heads, stored, values, generator=rng) + 0.5
    new_keys = torch.randn(batch, heads, recent, width, generator=rng).to(dtype).to(DEVICE)
    new_values = torch.randn(batch, heads, recent, values, generator=rng).to(dtype).to(DEVICE)
    rotation: RotaryTables | None = None
    if half:
        rotation = rotary_tables(frequencies(half).to(DEVICE), 2048, neighbours)
    if element not in INTEGERS:
        scales = (0.25, 0.5)
        k, v = (kv.quantize_fp8(x, element, s) for x, s in zip((keys, held), scales, strict=True))
        return QuantizedKV(
            element, 1, k.to(DEVICE), v.to(DEVICE), new_keys, new_values, scales=scales,
            rotation=rotation,
        )  # fmt: skip
    bits = INTEGERS[element]
    k, v = kv.quantize_keys(keys, bits, group), kv.quantize_values(held, bits)
    parts = (k.scale, k.low, v.scale, v.low)
    return QuantizedKV(
        element, group, k.codes.to(DEVICE), v.codes.to(DEVICE), new_keys, new_values,
        *(part.to(DEVICE) for part in parts), rotation=rotation,
    )  # fmt: skip


def check(
    cache: QuantizedKV, spans: list[list[int]], queries: int, *, sliding: int | None = None,
    programs: int = 5, strided: bool = False,
) -> torch.Tensor:  # fmt: skip
    batch, heads, _, width = cache.recent_keys.shape
    rng = torch.Generator().manual_seed(7)
    q = torch.randn(batch, heads * queries, 2 * width, generator=rng)
    q = q.to(DEVICE, cache.recent_keys.dtype)
    q = q[..., ::2] if strided else q[..., :width].contiguous()
    where = torch.tensor(spans, dtype=torch.int32, device=DEVICE)
    out = decode_attention(q, cache, where, sliding=sliding, programs=programs)
    want = attend_reference(q.double(), cache, where, sliding=sliding)
    error = float((out.double() - want).norm() / want.norm().clamp(min=1e-9))
    assert error < TOLERANCE[q.dtype], error
    return out


@pytest.mark.parametrize("width", [64, 80, 96, 128])
@pytest.mark.parametrize("element", ["int8", "int4", "fp8_e4m3", "fp8_e5m2"])
def test_heads_of_every_size_match_float64(element: str, width: int) -> None:
    half = width // 2 if element in INTEGERS else 0
    cache = make(element, (1, 2, 96, 37, width), 32, half=half)
    check(cache, [[64, 96, 37, 0]], 4)


@pytest.mark.parametrize("element", ["int8", "int4"])
def test_rows_of_different_lengths_and_neighbouring_pairs(element: str) -> None:
    cache = make(element, (3, 2, 160, 70, 64), 16, half=32, neighbours=True)
    check(cache, [[0, 160, 1, 0], [48, 16, 70, 0], [0, 0, 5, 0]], 3, programs=7)


@pytest.mark.parametrize("element", ["int8", "int4"])
@pytest.mark.parametrize("half", [0, 16, 20])
def test_heads_that_are_rotated_in_part_or_not_at_all(element: str, half: int) -> None:
    check(make(element, (1, 1, 64, 3, 80), 64, half=half), [[1000, 64, 3, 0]], 8)


def test_values_narrower_than_keys_and_more_queries_than_a_tile() -> None:
    check(make("int4", (1, 1, 64, 9, 64), 8, half=32, values=48), [[8, 56, 9, 0]], 20)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_queries_lose_what_their_type_does(dtype: torch.dtype) -> None:
    check(make("int4", (1, 2, 128, 20, 128), 128, half=64, dtype=dtype), [[128, 128, 20, 0]], 4)


def test_nothing_stored_and_nothing_recent() -> None:
    check(make("int4", (1, 2, 0, 19, 64), 32, half=32), [[0, 0, 19, 0]], 2)
    check(make("int8", (1, 2, 64, 0, 64), 32, half=32), [[0, 64, 0, 0]], 2)
    none = make("int8", (2, 2, 64, 4, 64), 32, half=32)
    out = check(none, [[0, 0, 0, 0], [0, 64, 4, 0]], 2)
    assert out[0].eq(0).all()


def test_no_sequence_gives_an_empty_answer() -> None:
    cache = make("int4", (0, 2, 64, 4, 64), 32, half=32)
    spans = torch.zeros(0, 4, dtype=torch.int32, device=DEVICE)
    assert decode_attention(torch.zeros(0, 8, 64, device=DEVICE), cache, spans).shape == (0, 8, 64)


@pytest.mark.parametrize("sliding", [1, 5, 33, 70, 150])
def test_sliding_window_and_left_padding_hide_tokens(sliding: int) -> None:
    cache = make("int4", (2, 1, 128, 33, 64), 16, half=32)
    check(cache, [[16, 128, 33, 0], [0, 112, 30, 60]], 2, sliding=sliding)


@pytest.mark.parametrize("programs", [1, 2, 6, 13, 64])
def test_any_number_of_programs_gives_the_same_but_for_the_order_of_sums(programs: int) -> None:
    cache = make("int8", (2, 3, 192, 70, 64), 64, half=32)
    check(cache, [[0, 192, 70, 0], [64, 64, 3, 0]], 1, programs=programs, strided=True)


def test_calls_repeat_to_the_last_bit() -> None:
    cache = make("int4", (2, 2, 64, 33, 64), 32, half=32)
    spans = [[0, 64, 33, 0], [0, 32, 17, 0]]
    assert torch.equal(check(cache, spans, 4), check(cache, spans, 4))


def test_what_lies_behind_a_span_is_not_read_into_the_answer() -> None:
    cache = make("int4", (1, 2, 96, 40, 64), 32, half=32)
    clean = check(cache, [[0, 64, 21, 0]], 2)
    cache.recent_keys[:, :, 21:] = float("nan")
    cache.recent_values[:, :, 21:] = 0
    cache.keys[:, :, 64:], cache.values[:, :, 64:] = 255, 255
    assert cache.key_scale is not None and cache.value_scale is not None
    cache.key_scale[:, :, 2:], cache.value_scale[:, :, 64:] = float("inf"), float("nan")
    spans = torch.tensor([[0, 64, 21, 0]], dtype=torch.int32, device=DEVICE)
    rng = torch.Generator().manual_seed(7)
    q = torch.randn(1, 4, 128, generator=rng).to(DEVICE)[..., :64].contiguous()
    assert torch.equal(decode_attention(q, cache, spans, programs=5), clean)


@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("element", ["int4", "int8", "fp8_e4m3"])
def test_the_cache_that_models_run_with_reads_the_same(element: str, neighbours: bool) -> None:
    integer = element in INTEGERS
    fmt = KVFormat(element, 16 if integer else 1, 8)
    rotation = Rotation(frequencies(16), neighbours) if integer else None
    layer = KVLayer(fmt, rotation=rotation)
    rng = torch.Generator().manual_seed(1)
    for tokens in (50, *[1] * 5):
        k, v = (torch.randn(1, 2, tokens, 32, generator=rng) for _ in "kv")
        keys, values = layer.update(k, v)
    parts = layer._stored
    tables = rotary_tables(frequencies(16), 512, neighbours)
    cache = QuantizedKV(
        element, fmt.group, parts["keys"], parts["values"], layer.keys, layer.values,
        *(parts.get(n) for n in ("key_scale", "key_low", "value_scale", "value_low")),
        rotation=tables if integer else None,
    )  # fmt: skip
    q = torch.randn(1, 4, 32, generator=rng)
    shown = torch.nn.functional.scaled_dot_product_attention(
        q[:, :, None], keys.repeat_interleave(2, 1), values.repeat_interleave(2, 1)
    )[:, :, 0]
    spans = torch.tensor([[0, layer.folded, layer.keys.shape[2], 0]], dtype=torch.int32)
    assert layer.folded >= 32
    want = attend_reference(q.double(), cache, spans).float()
    torch.testing.assert_close(want, shown, atol=2e-6, rtol=1e-5)
    if DEVICE == "cpu":
        torch.testing.assert_close(decode_attention(q, cache, spans), shown, atol=2e-6, rtol=1e-5)


def test_tables_turn_as_float64_does_at_a_million() -> None:
    tables = rotary_tables(frequencies(32), 1 << 20)
    keys = torch.randn(1, 1, 70, 64, dtype=torch.float64)
    want = Rotation(frequencies(32)).turn(keys, (1 << 20) - 70)
    torch.testing.assert_close(tables.turn(keys, (1 << 20) - 70), want, atol=1e-6, rtol=1e-6)


def test_uniform_scores_average_the_values() -> None:
    cache = make("int4", (1, 1, 32, 4, 32), 32, half=0)
    q = torch.zeros(1, 1, 32, device=DEVICE)
    spans = torch.tensor([[0, 32, 4, 0]], dtype=torch.int32, device=DEVICE)
    held = kv.Codes(
        cache.values, *(x for x in (cache.value_scale, cache.value_low) if x is not None)
    )
    every = torch.cat([kv.dequantize_values(held, 4, 32), cache.recent_values], 2)
    for out in (decode_attention(q, cache, spans), attend_reference(q, cache, spans)):
        torch.testing.assert_close(out[0], every.mean(2)[0])


def test_sizes_that_the_kernel_does_not_take_are_refused() -> None:
    with pytest.raises(FormatError, match="channels"):
        make("int8", (1, 1, 32, 4, 33), 32, half=0)
    with pytest.raises(FormatError, match="rotated"):
        make("int8", (1, 1, 32, 4, 32), 32, half=5)
    good = make("int8", (1, 2, 32, 4, 32), 32, half=0)
    with pytest.raises(FormatError, match="contiguous"):
        QuantizedKV(
            "int8", 32, good.keys.transpose(2, 3), good.values, good.recent_keys,
            good.recent_values, good.key_scale, good.key_low, good.value_scale, good.value_low,
        )  # fmt: skip
