"""Models that attend to a quantised cache without decoding it: the same logits."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from bitnest.kernels.cpu import attention, team
from bitnest.packed import kv_attention
from bitnest.packed.kv_attention import Deferred
from bitnest.packed.kv_cache import KVLayer, open_cache
from tests.tiny import FAMILIES, build

needs_kernel = pytest.mark.skipif(team.library() is None, reason="no compiler here")


def model_of(family: str) -> Any:
    return build(FAMILIES[family]).float().eval()


def ids_of(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(5, 300, (rows, tokens), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Query tokens of every call of the kernel."""
    seen: list[int] = []
    attend = attention.attend

    def counting(q: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        seen.append(q.shape[2])
        return attend(q, *args, **more)

    monkeypatch.setattr(attention, "attend", counting)
    return seen


@torch.no_grad()
def logits(
    model: Any,
    ids: torch.Tensor,
    name: str,
    ends: list[int],
    deferred: bool = True,
    mask: Any = None,
) -> Any:
    cache = open_cache(model, name)
    for layer in cache.layers:
        layer.defers = layer.defers and deferred  # type: ignore[union-attr]
    found, start = [], 0
    for stop in ends:
        more = {} if mask is None else {"attention_mask": mask[:, :stop]}
        found.append(
            model(ids[:, start:stop], past_key_values=cache, use_cache=True, **more).logits
        )
        start = stop
    return torch.cat(found, 1)


@needs_kernel
@pytest.mark.parametrize("name", ["int8-g8-w16", "int4-g16-w0", "fp8-w5", "fp8_e5m2"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3", "mixtral"])
def test_logits_are_those_of_a_decoded_cache(family: str, name: str, calls: list[int]) -> None:
    model, ids = model_of(family), ids_of(2, 90)
    ends = [60, *range(61, 80), 84, 90]
    expected = logits(model, ids, name, ends, deferred=False)
    assert not calls
    found = logits(model, ids, name, ends)
    assert {1, 5, 6} <= set(calls)
    # in bfloat16 the decoded cache alone is further off
    assert float((found - expected).abs().max()) < 8e-3 * float(expected.abs().max())


@needs_kernel
def test_padded_rows_see_what_their_masks_say(calls: list[int]) -> None:
    model, ids = model_of("llama"), ids_of(3, 60)
    mask = torch.ones(3, 60, dtype=torch.long)
    mask[1, :7] = mask[2, :31] = 0
    ends = [40, *range(41, 61)]
    expected = logits(model, ids, "int8-g8-w8", ends, deferred=False, mask=mask)
    found = logits(model, ids, "int8-g8-w8", ends, mask=mask)
    assert calls
    seen = mask.bool()
    assert float((found - expected)[seen].abs().max()) < 8e-3 * float(expected.abs().max())


@needs_kernel
def test_one_token_decodes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = model_of("llama"), ids_of(1, 50)
    cache = open_cache(model, "int4-g8-w8")
    with torch.no_grad():
        model(ids[:, :49], past_key_values=cache, use_cache=True)

        def refuse(self: Any) -> Any:
            raise AssertionError("the cache was decoded")

        monkeypatch.setattr(KVLayer, "_decoded", refuse)
        model(ids[:, 49:], past_key_values=cache, use_cache=True)


@needs_kernel
def test_generate_with_beams(calls: list[int]) -> None:
    model, ids = model_of("llama"), ids_of(2, 40)
    for options in ({}, {"num_beams": 3}):
        out = model.generate(
            ids, past_key_values=open_cache(model, "int8-g8-w8"), max_new_tokens=12,
            do_sample=False, pad_token_id=0, **options,
        )  # fmt: skip
        assert out.shape[1] > 40
    assert calls


def test_anything_else_that_touches_keys_has_them_decoded() -> None:
    layer = KVLayer(attention_format(), defers=True)
    plain = KVLayer(attention_format())
    keys, values = torch.randn(2, 1, 2, 40, 16).unbind(0)
    one = keys[:, :, :1], values[:, :, :1]
    for cache in (layer, plain):
        cache.update(keys, values)
    deferred, expected = layer.update(*one), plain.update(*one)
    for found, dense in zip(deferred, expected, strict=True):
        assert isinstance(found, Deferred)
        assert (found.shape, found.dtype) == (dense.shape, dense.dtype)
        # later tokens change nothing of what was read
        layer.update(*one)
        assert torch.equal(found + 0, dense)
        assert torch.equal(found[:, :, 3:7].transpose(1, 2), dense[:, :, 3:7].transpose(1, 2))
        assert torch.equal(torch.cat([found, found], 1), torch.cat([dense, dense], 1))
        assert not isinstance(found * 2, Deferred)


def test_what_the_kernel_refuses_is_decoded_and_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(team, "library", lambda: None)
    monkeypatch.setattr(kv_attention, "_said", set())
    model, ids = model_of("llama"), ids_of(1, 60)
    ends = [50, 51, 52]
    expected = logits(model, ids, "int4-g8-w8", ends, deferred=False)
    with caplog.at_level(logging.INFO):
        found = logits(model, ids, "int4-g8-w8", ends)
    assert torch.equal(found, expected)
    said = [r for r in caplog.records if "decodes all of it" in r.getMessage()]
    assert len(said) == 1


def attention_format() -> Any:
    from bitnest.formats.kv import parse_kv

    return parse_kv("int4-g8-w8")
