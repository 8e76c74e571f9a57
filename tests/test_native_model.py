"""The C runtime gives what transformers gives, family by family, packed and not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.decode_speed import Formats, rounded
from bitnest.kernels.cpu.runtime import runtime
from bitnest.packed.modules import PackedWeight
from bitnest.packed.native_families import FAMILIES, NotNative
from bitnest.packed.native_model import NativeModel, _pick
from tests.tiny import FAMILIES as TINY
from tests.tiny import Builder, build

pytestmark = pytest.mark.skipif(runtime() is None, reason="no C compiler")

NAMES = sorted(set(FAMILIES) & set(TINY))
EXACT = 2e-5  # of logits of a few units: float32 sums in another order
CODED = 4e-3  # and inputs in 16 bits
IDS = torch.randint(0, 320, (70,), generator=torch.Generator().manual_seed(1))


def plain(name: str, **options: Any) -> Any:
    """The tiny model in float32."""
    return build(TINY[name], **options).float().eval()


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """What transformers says, (tokens, vocabulary)."""
    with torch.no_grad():
        return model(ids[None]).logits[0]


def native_logits(native: NativeModel, ids: torch.Tensor = IDS, prompt: int = 40) -> torch.Tensor:
    """The same through the cache: a prompt, then single tokens."""
    cache = native.cache()
    parts = [native.forward(ids[:prompt], cache, every=True)]
    parts += [native.forward(ids[i : i + 1], cache) for i in range(prompt, len(ids))]
    return torch.cat(parts)


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_dense_model_gives_transformers_logits(name: str) -> None:
    model = plain(name)
    got = native_logits(NativeModel.of(model, cache=torch.float32))
    assert difference(got, logits(model)) < EXACT


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("embedding", ["", "int8-g32"])
def test_four_bit_model_gives_transformers_logits(name: str, embedding: str, tiny: Builder) -> None:
    model = rounded(tiny(name), Formats("int4-g32", embedding, "")).float()
    got = native_logits(NativeModel.of(model, cache=torch.float32, planes=3))
    assert difference(got, logits(model)) < EXACT


def test_bfloat16_model_is_as_close_as_its_inputs() -> None:
    model = build(TINY["qwen3_moe"]).eval()
    native = native_logits(NativeModel.of(model, cache=torch.float32))
    exact = logits(model.float())
    assert difference(native, exact) < 3e-2


def test_looked_up_weights_run(tiny: Builder) -> None:
    for name in ("nf4-g64", "mxfp4"):  # no experts: a router in doubt may choose another one
        model = rounded(tiny("llama"), Formats(name, "", "")).float()
        got = native_logits(NativeModel.of(model, cache=torch.float32))
        assert difference(got, logits(model)) < 3e-2


def test_two_planes_of_inputs_suffice(tiny: Builder) -> None:
    model = rounded(tiny("llama"), Formats("int4-g32", "", "")).float()
    got = native_logits(NativeModel.of(model, cache=torch.float32))
    assert difference(got, logits(model)) < CODED


@pytest.mark.parametrize("name", ["mistral", "mixtral", "qwen2", "qwen3_moe"])
def test_window_hides_old_positions(name: str) -> None:
    from transformers import AutoModelForCausalLM, MistralConfig

    if name == "mistral":
        options = {**TINY["llama"].options, "sliding_window": 16}
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(MistralConfig(**options)).float().eval()
    else:
        model = plain(
            name, sliding_window=16, use_sliding_window=True, max_window_layers=1,
        )  # fmt: skip
    got = native_logits(NativeModel.of(model, cache=torch.float32))
    assert difference(got, logits(model)) < EXACT


def test_long_prompts_go_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = plain("qwen3_moe")
    monkeypatch.setattr("bitnest.packed.native_model.CHUNK", 7)
    native = NativeModel.of(model, cache=torch.float32)
    want = logits(model)
    assert difference(native.forward(IDS, native.cache(), every=True), want) < EXACT
    assert difference(native.forward(IDS, native.cache()), want[-1:]) < EXACT


def test_threads_do_not_change_a_bit() -> None:
    native = NativeModel.of(plain("qwen2_moe"))
    before = runtime().get_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            runtime().set_threads(threads)
            found.append(native_logits(native))
    finally:
        runtime().set_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_cropped_cache_goes_on_from_there() -> None:
    native = NativeModel.of(plain("llama"))
    cache = native.cache()
    native.forward(IDS, cache)
    cache.crop(30)
    got = native.forward(IDS[30:], cache, every=True)
    assert (
        torch.equal(got[-1], native_logits(native, prompt=30)[-1])
        or difference(got[-1], native_logits(native, prompt=30)[-1]) < 1e-6
    )
    with pytest.raises(ValueError, match="cropped"):
        cache.crop(71)


def test_half_precision_cache_is_close() -> None:
    model = plain("llama")
    assert difference(native_logits(NativeModel.of(model)), logits(model)) < CODED


def test_greedy_generation_is_that_of_transformers() -> None:
    model = plain("qwen3")
    native = NativeModel.of(model, cache=torch.float32)
    prompt = IDS[:9].tolist()
    with torch.no_grad():
        want = model.generate(
            IDS[None, :9], max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, 9:].tolist()
    assert list(native.generate(prompt, 12)) == want
    assert list(native.generate(prompt, 12, stop=[want[3]])) == want[: want.index(want[3]) + 1]


def test_sampling_keeps_to_the_likeliest() -> None:
    found = torch.tensor([0.0, 3.0, 2.9, -1.0])
    generator = torch.Generator().manual_seed(0)
    picked = {_pick(found, 1.0, 0.6, generator) for _ in range(50)}
    assert picked == {1, 2}


def test_ids_outside_the_vocabulary_are_refused() -> None:
    native = NativeModel.of(plain("llama"))
    for bad in ([], [320], [-1]):
        with pytest.raises(ValueError, match="vocabulary"):
            native.forward(bad, native.cache())


@pytest.mark.parametrize("name", ["gemma2", "phi3", "gpt2", "deepseek_v3", "gpt_oss"])
def test_other_families_are_refused(name: str) -> None:
    with pytest.raises(NotNative, match="family"):
        NativeModel.of(plain(name))


def test_what_is_not_understood_is_refused() -> None:
    model = plain("llama")
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(NotNative, match="hooks"):
        NativeModel.of(model)
    handle.remove()
    model.model.layers[1].mlp.down_proj = torch.nn.Sequential(model.model.layers[1].mlp.down_proj)
    with pytest.raises(NotNative, match="Sequential"):
        NativeModel.of(model)


def test_stages_take_time() -> None:
    native = NativeModel.of(plain("qwen3_moe"))
    native.timed = True
    native.forward(IDS, native.cache())
    assert np.all(native.seconds > 0)


def test_rounded_inputs_are_refused(tiny: Builder) -> None:
    from bitnest.formats.inputs import parse_inputs

    model = rounded(tiny("llama"), Formats("int8-g32", "", ""))
    model.model.layers[0].mlp.up_proj.packed.inputs = parse_inputs("int8-token")
    with pytest.raises(NotNative, match="rounds its inputs"):
        NativeModel.of(model)


def test_memory_is_what_matrices_take(tiny: Builder) -> None:
    path: Path = tiny("qwen3_moe")
    four, eight = (
        NativeModel.of(rounded(path, Formats(name, name, ""))).nbytes
        for name in ("int4-g32", "int8-g32")
    )
    assert four < eight < 2 * four


def test_packed_weights_lie_in_memory_once(tiny: Builder) -> None:
    model = rounded(tiny("qwen3_moe"), Formats("int4-g32", "int8-g32", "")).float()
    native = NativeModel.of(model)
    packed = [m for m in model.modules() if isinstance(m, PackedWeight)]
    laid = {id(weight._laid) for weight in packed}
    matrices = {id(linear.weight) for linear in native._description.linears}
    assert len(packed) > 10 and laid <= matrices
    for weight in packed:
        assert weight.looked_up or all(getattr(weight, part) is None for part in weight.parts)
    want = logits(model)
    assert {id(weight._laid) for weight in packed if weight._laid is not None} <= matrices
    assert difference(native_logits(native), want) < CODED


def test_native_model_outlives_what_it_was_made_from(tiny: Builder) -> None:
    """A change of the packed weights, or their end, does not touch its memory."""
    model = rounded(tiny("llama"), Formats("int4-g32", "int8-g32", "")).float()
    native = NativeModel.of(model)
    before = native_logits(native)
    for weight in [m for m in model.modules() if isinstance(m, PackedWeight)]:
        weight.restore()
    del model
    assert torch.equal(native_logits(native), before)


def test_tied_ends_look_rows_up_beside_products(tiny: Builder) -> None:
    model = rounded(tiny("qwen2"), Formats("int8-g32", "int8-g32", "")).float()
    packed = model.model.embed_tokens.packed
    assert model.lm_head.packed is packed and packed.looked_up
    native = NativeModel.of(model, cache=torch.float32, planes=3)
    assert native._description.head is native._description.embedding
    assert difference(native_logits(native), logits(model)) < EXACT
    assert packed._laid is not None  # looking rows up has not undone the layout


def test_a_model_that_computes_something_else_is_refused() -> None:
    model = plain("llama")
    plus = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: 1.5 * plus(x)
    with pytest.raises(NotNative, match=r"logits are 0\.\d+ away"):
        NativeModel.of(model)


def test_logits_that_are_no_numbers_are_refused() -> None:
    model = plain("llama")
    model.model.norm.weight.data[3] = torch.nan
    with pytest.raises(NotNative, match="nan away"):
        NativeModel.of(model)
