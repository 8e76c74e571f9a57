"""The quantised cache in models: what queries see, what is stored, and that it is a cache at all.

A lossless double, which stores what it should quantise in float32 but turns keys back and forth,
shows that everything but the codes is a plain cache's.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from bitnest.errors import BitnestError, UnsupportedModel
from bitnest.eval.kv import chunk_ends, passes
from bitnest.formats.kv import parse_kv
from bitnest.kernels import kv as kernels
from bitnest.packed import kv_cache
from bitnest.packed.kv_cache import KVLayer, open_cache
from bitnest.packed.kv_scales import calibrate_scales
from bitnest.packed.rotary import Rotation, find_rotations
from bitnest.quantize.sizing import cache_bytes
from tests.tiny import FAMILIES, build

TOKENS = 60


class Lossless(KVLayer):
    """Stores instead of quantising."""

    def _quantized(self, keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
        x = keys.float()
        if self.rotation is not None:
            x = self.rotation.turn(x, self.folded, back=True)
        return {"keys": x, "values": values.float()}

    def _decoded(self) -> tuple[torch.Tensor, torch.Tensor]:
        keys = self._stored["keys"]
        if self.rotation is not None:
            keys = self.rotation.turn(keys, self.start)
        return keys, self._stored["values"]


@pytest.fixture
def lossless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "KVLayer", Lossless)


def model_of(family: str, **options: Any) -> Any:
    return build(FAMILIES[family], **options).float().eval()


def ids_of(rows: int = 2, tokens: int = TOKENS) -> torch.Tensor:
    return torch.randint(5, 300, (rows, tokens), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def through(model: Any, ids: torch.Tensor, cache: Any, ends: list[int], **more: Any) -> Any:
    """Logits of passes that end at `ends`."""
    found, start = [], 0
    for stop in ends:
        out = model(ids[:, start:stop], past_key_values=cache, use_cache=True, **more)
        found.append(out.logits)
        start = stop
    return torch.cat(found, 1)


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gptj", "mixtral", "gpt_oss"]
)
@pytest.mark.parametrize("name", ["int4-g8-w16", "int4-g8-w0"])
@pytest.mark.usefixtures("lossless")
def test_lossless_double_gives_the_logits_of_a_plain_forward(family: str, name: str) -> None:
    model, ids = model_of(family), ids_of()
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        cached = torch.cat([out.logits for out in passes(model, ids, parse_kv(name))], 1)
    torch.testing.assert_close(cached, plain, atol=2e-4, rtol=1e-3)
    ends = [37, 38, 45, *range(46, TOKENS + 1)]
    odd = through(model, ids, open_cache(model, name), ends)
    torch.testing.assert_close(odd, plain, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["int4-g8-w16", "int8-g8-w3", "fp8-w5"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_chunks_show_queries_what_single_tokens_see(family: str, name: str) -> None:
    model, ids, fmt = model_of(family), ids_of(), parse_kv(name)
    with torch.no_grad():
        chunks = torch.cat([out.logits for out in passes(model, ids, fmt)], 1)
        plain = model(ids, use_cache=False).logits
    for strict in (True, False):
        cache = open_cache(model, fmt, strict=strict)
        single = through(model, ids, cache, list(range(1, TOKENS + 1)))
        # but for codes that rounding puts on the other side of a tie
        assert (chunks - single).abs().mean() < 0.2 * (chunks - plain).abs().mean()


def test_every_query_sees_old_tokens_quantised_and_recent_ones_as_they_came() -> None:
    fmt = parse_kv("int4-g8-w16")
    torch.manual_seed(0)
    keys, values = torch.randn(2, 1, 2, 70, 16).unbind(0)
    layer, start = KVLayer(fmt, strict=True), 0
    for stop in chunk_ends(70, fmt):
        seen, seen_values = layer.update(keys[:, :, start:stop], values[:, :, start:stop])
        for query in range(start, stop):
            old = max(0, query + 1 - 16) // 8 * 8  # oldest tokens, in whole groups
            assert query + 1 - old >= 16 or old == 0
            for found, came in ((seen, keys), (seen_values, values)):
                same = (found[:, :, : query + 1] == came[:, :, : query + 1]).all(-1)[0, 0]
                assert not same[:old].any()
                assert same[old:].all()
        start = stop


def test_prompts_are_read_as_they_came_and_stored_quantised() -> None:
    keys, values = torch.randn(2, 1, 2, 50, 16).unbind(0)
    layer = KVLayer(parse_kv("int4-g8-w0"))
    seen, _ = layer.update(keys, values)
    assert torch.equal(seen, keys)
    assert layer.folded == 48
    again, _ = layer.update(keys[:, :, :1], values[:, :, :1])
    assert not torch.equal(again[:, :, :48], keys[:, :, :48])
    assert torch.equal(again[:, :, 48:50], keys[:, :, 48:])


@pytest.mark.parametrize("name", ["int4-g8-w8", "int8-g16-w0", "fp8"])
def test_entries_are_never_requantised(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, count = KVLayer(parse_kv(name), rotation=Rotation(torch.rand(8))), 0
    fold = KVLayer._quantized

    def counting(self: Any, keys: torch.Tensor, values: torch.Tensor) -> Any:
        nonlocal count
        count += keys.shape[2]
        return fold(self, keys, values)

    monkeypatch.setattr(KVLayer, "_quantized", counting)
    before: dict[str, torch.Tensor] = {}
    for _ in range(60):
        layer.update(*torch.randn(2, 1, 2, 1, 16).unbind(0))
        for part, old in before.items():
            assert torch.equal(layer._stored[part][:, :, : old.shape[2]], old)
        before = {part: tensor.clone() for part, tensor in layer._stored.items()}
    assert count == layer.folded > 40


def test_keys_are_those_of_float64_before_the_rotation() -> None:
    torch.manual_seed(0)
    width, group, tokens = 16, 8, 40
    frequencies = torch.rand(width // 2)
    keys = torch.randn(1, 2, tokens, width)
    layer = KVLayer(parse_kv(f"int8-g{group}-w0"), rotation=Rotation(frequencies), strict=True)
    seen, _ = layer.update(keys, keys)
    angles = torch.arange(tokens).double()[:, None] * frequencies.double()
    turn = torch.polar(torch.ones_like(angles), angles)
    x = torch.complex(keys.double()[..., :8], keys.double()[..., 8:]) / turn
    back = torch.cat([x.real, x.imag], -1)
    stored = kernels.quantize_keys(back, 8, group)
    again = kernels.dequantize_keys(stored, 8, group, width).double()
    y = torch.complex(again[..., :8], again[..., 8:]) * turn
    off = (seen.double() - torch.cat([y.real, y.imag], -1)).abs()
    assert (off < 1e-5).double().mean() > 0.99  # the rest are ties of rounding
    assert off.max() < 0.05


def test_constant_channels_cost_little_only_before_the_rotation() -> None:
    torch.manual_seed(0)
    rotation = Rotation(1.0 / 10 ** torch.linspace(0, 4, 8))
    before = 10 * torch.randn(1, 1, 1, 16) + 0.1 * torch.randn(1, 1, 64, 16)
    keys = rotation.turn(before, 0)
    errors = []
    for own in (rotation, None):
        layer = KVLayer(parse_kv("int4-g64-w0"), rotation=own, strict=True)
        errors.append(float((layer.update(keys, keys)[0] - keys).square().mean()))
    assert errors[0] < errors[1] / 50


@pytest.mark.parametrize("neighbours", [False, True])
def test_turning_back_and_forth_changes_nothing_far_out(neighbours: bool) -> None:
    rotation = Rotation(torch.rand(4), neighbours)  # of 16 channels the first 8
    keys = torch.randn(2, 3, 5, 16)
    turned = rotation.turn(keys, 1_000_000)
    assert torch.equal(turned[..., 8:], keys[..., 8:])
    torch.testing.assert_close(rotation.turn(turned, 1_000_000, back=True), keys, atol=1e-5,
                               rtol=0)  # fmt: skip
    assert (turned - keys)[..., :8].abs().max() > 0.1


def small(name: str, **options: Any) -> Any:
    """A random model of a family that is not in `tests.tiny`."""
    config = getattr(transformers, f"{name}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=0, eos_token_id=0, initializer_range=0.3, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


def test_rotations_are_found_by_running_the_model() -> None:
    half = find_rotations(model_of("llama"))
    assert [(len(r.frequencies), r.neighbours) for r in half if r] == [(8, False)] * 2
    pairs = find_rotations(small("Cohere"))
    assert [(len(r.frequencies), r.neighbours) for r in pairs if r] == [(8, True)] * 4
    part = find_rotations(small("StableLm", partial_rotary_factor=0.5))
    assert [(len(r.frequencies), r.neighbours) for r in part if r] == [(4, False)] * 4
    some = find_rotations(small("SmolLM3", no_rope_layers=[1, 0, 1, 0]))
    assert [r is not None for r in some] == [True, False, True, False]
    assert find_rotations(model_of("gpt2")) == (None, None)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.usefixtures("lossless")
def test_generate_with_left_padding_and_beams_is_the_plain_one(family: str) -> None:
    model, ids = model_of(family), ids_of(3, 30)
    mask = torch.ones_like(ids)
    for row, pad in enumerate((0, 5, 11)):
        ids[row, :pad], mask[row, :pad] = 0, 0
    options: dict[str, Any] = dict(
        attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    for beams in (1, 3):
        plain = model.generate(ids, num_beams=beams, **options)
        cache = open_cache(model, "int4-g8-w8")
        cached = model.generate(ids, num_beams=beams, past_key_values=cache, **options)
        assert torch.equal(cached, plain)
        assert any(layer.folded for layer in cache.layers)


def test_generate_is_forward_token_by_token() -> None:
    model, ids, name = model_of("qwen3_moe"), ids_of(2, 30), "int4-g8-w8"
    found = model.generate(
        ids, past_key_values=open_cache(model, name), max_new_tokens=24, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    cache = open_cache(model, name)
    logits = through(model, found, cache, [30, *range(31, found.shape[1] + 1)])
    assert torch.equal(logits[:, 29:-1].argmax(-1), found[:, 30:])
    assert cache.layers[0].folded == (53 + 1 - 8) // 8 * 8


def test_left_padding_costs_no_quality() -> None:
    model, ids, errors = model_of("llama"), ids_of(8, 48), []
    with torch.no_grad():
        plain = model(ids).logits[:, -8:]
    for pad in (0, 13):
        padded = torch.cat([torch.zeros(8, pad, dtype=ids.dtype), ids], 1)
        mask = torch.cat([torch.zeros(8, pad), torch.ones(8, 48)], 1).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            cache = open_cache(model, "int4-g8-w0", strict=True)
            out = model(padded, attention_mask=mask, position_ids=positions, past_key_values=cache)
        errors.append(float((out.logits[:, -8:] - plain).square().mean()))
    assert errors[1] < 1.5 * errors[0]


@pytest.mark.parametrize("name", ["int4-g8-w16", "int8-g16-w4", "fp8", "fp8_e5m2-w10"])
@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_memory_held_is_the_formula(family: str, name: str) -> None:
    model, ids, fmt = model_of(family).bfloat16(), ids_of(), parse_kv(name)
    cache = open_cache(model, fmt)
    assert cache.nbytes == 0
    for stop in (1, 20, 41, TOKENS):
        through(model, ids[:, cache.get_seq_length() : stop], cache, [stop])
        assert cache.nbytes == 2 * cache_bytes(model.config, stop, kv=fmt)
    cache.reset()
    assert cache.nbytes == cache.get_seq_length() == 0


def test_crop_takes_back_the_window_and_refuses_to_cut_groups() -> None:
    model, ids = model_of("llama"), ids_of()
    cache = open_cache(model, "int4-g8-w16")
    assert cache.is_croppable
    expected = through(model, ids, cache, [57, 58, 59, 60])[:, 57:]
    cache.crop(-3)
    assert cache.get_seq_length() == 57
    again = through(model, ids[:, 57:], cache, [1, 2, 3])
    torch.testing.assert_close(again, expected, atol=1e-4, rtol=1e-3)
    with pytest.raises(BitnestError, match="stay whole"):
        cache.crop(-30)
    assert cache.get_seq_length() == TOKENS
    cache.crop(-(TOKENS - 8))
    assert (cache.get_seq_length(), cache.layers[0].folded) == (8, 8)
    assert not open_cache(model_of("gemma3"), "int4-g8-w16").is_croppable


def test_rows_are_repeated_and_selected_with_their_scales() -> None:
    model, ids = model_of("llama"), ids_of(2, 40)
    cache, twice = open_cache(model, "int4-g8-w8"), open_cache(model, "int4-g8-w8")
    through(model, ids, cache, [40])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2]))
    cache.reorder_cache(torch.tensor([1, 0]))
    through(model, ids[[1, 0]], twice, [40])
    more = ids_of(2, 1)
    one, other = through(model, more, cache, [1]), through(model, more, twice, [1])
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_calibrated_scales_reach_the_largest_keys_and_values() -> None:
    model, ids, seen = model_of("qwen3"), ids_of(4), {}
    scales = calibrate_scales(model, ids, parse_kv("fp8"), batch_size=3)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    for number, layer in enumerate(cache.layers):
        seen[number] = layer.keys.abs().max() / 448, layer.values.abs().max() / 448
        assert scales[number] == pytest.approx([float(x) for x in seen[number]], rel=1e-6)
    quantised = open_cache(model, "fp8", scales=scales, strict=True)
    assert through(model, ids, quantised, [TOKENS]).isfinite().all()
    assert quantised.layers[0].scales == scales[0]


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_latent_attention_is_refused(family: str) -> None:
    with pytest.raises(UnsupportedModel, match="latent"):
        open_cache(model_of(family), "int4")


def test_other_states_are_refused() -> None:
    config = transformers.Qwen3NextConfig(num_hidden_layers=4)
    with pytest.raises(UnsupportedModel, match="linear_attention"):
        kv_cache.check_family(config)
    with pytest.raises(UnsupportedModel, match="encoder-decoder"):
        kv_cache.check_family(transformers.T5Config())
