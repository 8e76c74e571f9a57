"""KV formats from recipe to artifact, evaluation, server and export."""

from __future__ import annotations

import json
import queue
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bitnest import api
from bitnest.artifact import Artifact
from bitnest.cli import app
from bitnest.errors import DataError, FormatError, TargetError, UnsupportedModel
from bitnest.eval.evaluate import evaluate
from bitnest.eval.render import protocol
from bitnest.formats.kv import parse_kv, recorded_kv
from bitnest.packed import kv_cache
from bitnest.packed.decoded import open_checkpoint
from bitnest.packed.kv_cache import open_cache
from bitnest.packed.loading import load_model, load_tokenizer
from bitnest.quantize.compress import prepare
from bitnest.quantize.sizing import artifact_sizes, cache_bytes
from bitnest.recipe import Recipe
from bitnest.recipe_file import parse_recipe
from bitnest.serve.backend import Job, Update
from bitnest.serve.backend_generate import GenerateBackend
from bitnest.serve.server import make_backend
from tests.test_kv_cache import Lossless
from tests.tiny import Builder


@pytest.fixture(scope="module")
def artifact(tiny: Builder, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that asks for int4-g8-w16."""
    out = tmp_path_factory.mktemp("kv") / "artifact"
    recipe = out.parent / "recipe.yaml"
    recipe.write_text(
        f"format: int8-g32\nkv: int4-g8-w16\nfit: {{method: rtn}}\ndata: {{texts: [w={text}]}}\n"
    )
    values = parse_recipe(recipe.read_text())
    api.compress(tiny("qwen3"), out, **values)
    return out


@pytest.fixture(scope="module")
def floats(tiny: Builder, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, which asks for fp8."""
    out = tmp_path_factory.mktemp("kv") / "floats"
    api.compress(tiny("qwen3"), out, format="int8-g32", method="rtn", kv="fp8", data=[f"w={text}"])
    return out


def test_recipe_and_artifact_keep_the_format(artifact: Path) -> None:
    manifest = Artifact.open(artifact).manifest
    name = "int4-g8-w16"
    assert manifest["kv"] == manifest["resolved"]["kv"] == manifest["recipe"]["kv"] == name
    config = json.loads((artifact / "config.json").read_text())
    assert recorded_kv(config) == parse_kv(name)
    model = load_model(artifact)
    assert recorded_kv(model.config) == parse_kv(name)
    assert open_cache(model, parse_kv(name)).layers[0].rotation is not None


def test_artifacts_without_one_do_not_mention_it(tiny: Builder, tmp_path: Path) -> None:
    api.compress(tiny("qwen3"), tmp_path / "a", format="int8-g32", method="rtn", kv="none")
    assert '"kv"' not in (tmp_path / "a" / "bitnest.json").read_text()
    assert '"kv"' not in (tmp_path / "a" / "config.json").read_text()
    config = load_model(tmp_path / "a").config
    assert recorded_kv(config) is None


def test_bad_formats_and_families_are_refused_before_work(tiny: Builder, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="int3"):
        api.compress(tiny("qwen3"), tmp_path / "a", method="rtn", kv="int3")
    with pytest.raises(UnsupportedModel, match="latent"):
        api.compress(tiny("deepseek_v2"), tmp_path / "a", method="rtn", kv="int4")
    with pytest.raises(UnsupportedModel, match="latent"):
        evaluate([tiny("deepseek_v2")], kv=["int4"], data=["w=missing"], window=64)
    with pytest.raises(FormatError, match="says nothing"):
        evaluate([tiny("qwen3")], kv=["int4-z"], data=["w=missing"])
    assert not list(tmp_path.iterdir())


def test_a_context_takes_less_room_in_a_small_cache(tiny: Builder) -> None:
    config = load_model(tiny("gemma3")).config
    wide, small = cache_bytes(config, 128), cache_bytes(config, 128, kv=parse_kv("int4-g8-w8"))
    assert small < 0.7 * wide
    # one of two layers attends to 16 tokens
    fmt = parse_kv("int4-g8-w8")
    heads, width = config.num_key_value_heads, config.head_dim
    full = fmt.nbytes(128, heads, width, width)
    assert small == full + fmt.nbytes(128, heads, width, width, sliding=16)


def test_plans_count_the_small_cache_and_the_record_of_it(tiny: Builder, artifact: Path) -> None:
    job = prepare(open_checkpoint(tiny("qwen3")), Recipe(method="rtn", kv="int4-g8-w16"))
    config, fmt = job.skeleton.model.config, parse_kv("int4-g8-w16")
    assert artifact_sizes(job, job.formats, 100).cache == cache_bytes(config, 100, kv=fmt)
    plain = replace(job, recipe=replace(job.recipe, kv=""))
    assert artifact_sizes(plain, job.formats, 100).cache == cache_bytes(config, 100)
    more = artifact_sizes(job, job.formats).artifact - artifact_sizes(plain, job.formats).artifact
    assert more > 4 * len('"kv": "int4-g8-w16"')  # thrice in the manifest, and in config.json


def test_evaluation_uses_what_the_artifact_asks_for(artifact: Path, text: Path) -> None:
    options: dict[str, Any] = dict(data=[f"w={text}"], window=64, windows=4, batch_size=3)
    own = evaluate([artifact], **options).rows
    assert [row.kv for row in own] == ["", "int4-g8-w16"]
    assert own[0].base
    assert own[1].scores[0].kl.mean > 1e-7
    plain = evaluate([artifact], kv=["none"], **options).rows
    assert [row.kv for row in plain] == [""]
    assert plain[0].scores[0].nll == own[0].scores[0].nll
    several = evaluate([artifact], against=artifact, kv=["none", "int8-g8-w8", "int4-g8-w0"],
                       **options).rows  # fmt: skip
    assert [row.kv for row in several] == ["", "", "int8-g8-w8", "int4-g8-w0"]
    losses = [row.scores[0].kl.mean for row in several[1:]]
    assert losses[0] < losses[1] < losses[2]
    assert "kv int8-g8-w8" in several[2].model


def test_evaluation_through_a_lossless_cache_is_the_plain_one(
    artifact: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache, "KVLayer", Lossless)
    rows = evaluate([artifact], kv=["int4-g8-w16", "int4-g8-w0"], data=[f"w={text}"], window=64,
                    windows=4).rows  # fmt: skip
    for row in rows[1:]:
        assert row.scores[0].nll == pytest.approx(rows[0].scores[0].nll, abs=1e-5)
        assert row.scores[0].kl.max < 1e-5


def test_compress_and_eval_take_it_from_the_command_line(
    tiny: Builder, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "a")
    app(["compress", str(tiny("qwen3")), "-o", out, "--format", "int8-g32", "--method", "rtn",
         "--kv", "int8-g8", "-q"], standalone_mode=False)  # fmt: skip
    capsys.readouterr()
    app(["eval", out, "--data", f"w={text}", "--window", "32", "--windows", "2", "--kv",
         "int4-g8-w8", "--json", "-q"], standalone_mode=False)  # fmt: skip
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["kv"] for row in rows] == ["", "int4-g8-w8"]
    assert Artifact.open(out).manifest["kv"] == "int8-g8-w128"
    app(["inspect", out], standalone_mode=False)
    assert "KV cache: int8-g8-w128\n" in capsys.readouterr().out


def test_windows_that_read_nothing_quantised_are_said(artifact: Path, text: Path) -> None:
    options: dict[str, Any] = dict(kv=["int4-g8-w16", "fp8"], data=[f"w={text}"], windows=2)
    short, enough = (evaluate([artifact], window=n, **options) for n in (24, 25))
    assert short.rows[1].scores[0].kl.max < 1e-9
    assert short.unread_caches == short.to_json()["unread_caches"] == {"int4-g8-w16": 48}
    assert "--window 48" in protocol(short)
    assert enough.rows[1].scores[0].kl.max > 1e-9
    assert enough.unread_caches == {} and "quantised" not in protocol(enough)


def answer(backend: Any, prompt: list[int], tokens: int) -> list[int]:
    news: queue.Queue[Update] = queue.Queue()
    backend.submit(Job("one", tuple(prompt), tokens), news.put)
    found: list[int] = []
    while not (update := news.get(timeout=60)).finished:
        assert update.error is None
        found += update.tokens
    return [*found, *update.tokens]


def test_served_tokens_are_those_of_generate_with_the_cache(artifact: Path) -> None:
    model, fmt = load_model(artifact, dtype="float32"), parse_kv("int4-g8-w8")
    prompt = list(range(5, 45))
    expected = model.generate(
        torch.tensor([prompt]), past_key_values=open_cache(model, fmt), max_new_tokens=20,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    backend = GenerateBackend(model, (), kv=fmt)
    backend.start()
    try:
        for _ in range(2):  # every job has a cache of its own
            assert answer(backend, prompt, 20) == expected[0, 40:].tolist()
    finally:
        backend.stop()


def test_a_quantised_cache_is_served_by_generate_and_says_so(
    artifact: Path, tiny: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitnest.serve import run

    model, tokenizer = load_model(artifact), load_tokenizer(artifact)
    assert make_backend("continuous", model, tokenizer).name == "continuous"
    assert make_backend("continuous", model, tokenizer, kv=parse_kv("fp8")).name == "generate"
    said: list[str] = []
    monkeypatch.setattr(run, "_run", lambda *_: None)
    run.run_server(model, tokenizer, model_name="m", port=0, kv=parse_kv("int4"), say=said.append)
    assert any("int4-g128-w128" in line and "one request at a time" in line for line in said)
    latent = load_model(tiny("deepseek_v2"))
    with pytest.raises(UnsupportedModel):
        make_backend("generate", latent, tokenizer, kv=parse_kv("int4"))


def test_serve_takes_the_artifacts_format_unless_told(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitnest.serve import run

    seen: list[Any] = []
    monkeypatch.setattr(run, "run_server", lambda *_, **options: seen.append(options["kv"]))
    for more in ([], ["--kv", "none"], ["--kv", "fp8"]):
        app(["serve", str(artifact), *more, "-q"], standalone_mode=False)
    assert seen == [parse_kv("int4-g8-w16"), None, parse_kv("fp8")]


def test_fp8_goes_over_to_engines_with_calibrated_scales(
    floats: Path, text: Path, tmp_path: Path
) -> None:
    result = api.export(floats, tmp_path / "x", samples=4, length=64)
    assert not any("KV cache" in note for note in result.notes)
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    scheme = config["quantization_config"]["kv_cache_scheme"]
    assert (scheme["num_bits"], scheme["type"], scheme["strategy"]) == (8, "float", "tensor")
    index = json.loads((tmp_path / "x" / "model.safetensors.index.json").read_text())
    found: dict[str, float] = {}
    for name, file in index["weight_map"].items():
        if name.endswith(("k_scale", "v_scale")):
            tensor = load_file(tmp_path / "x" / file)[name]
            assert tensor.shape == (1,)
            found[name] = float(tensor)
    assert sorted(found) == [
        f"model.layers.{n}.self_attn.{part}" for n in (0, 1) for part in ("k_scale", "v_scale")
    ]
    model, tokenizer = load_model(floats), load_tokenizer(floats)
    ids = torch.tensor([tokenizer(text.read_text())["input_ids"][:64]])
    with torch.no_grad():
        layers = model(ids, use_cache=True).past_key_values.layers
    for n, layer in enumerate(layers):  # of a part of the text: not more
        for part, values in (("k_scale", layer.keys), ("v_scale", layer.values)):
            scale = found[f"model.layers.{n}.self_attn.{part}"]
            assert 0.5 * scale < float(values.abs().max()) / 448 <= 1.5 * scale


def test_caches_that_engines_do_not_have_stay_behind(
    artifact: Path, floats: Path, text: Path, tmp_path: Path
) -> None:
    result = api.export(artifact, tmp_path / "x")
    assert any("int4-g8-w16" in note and "16 bits" in note for note in result.notes)
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    assert config["quantization_config"]["kv_cache_scheme"] is None
    note = api.export(floats, tmp_path / "y", engine="transformers", verify=False).notes[-1]
    assert "transformers" in note
    notes = api.export(floats, tmp_path / "z", kv="none", verify=False).notes
    assert not any("KV" in note for note in notes)
    for kv in ("int4", "fp8_e5m2", "fp8-w8"):
        with pytest.raises(TargetError, match="engines have no KV cache"):
            api.export(floats, tmp_path / "w", kv=kv)
    with pytest.raises(TargetError, match="multiple of 32, not 16"):
        api.export(floats, tmp_path / "w", kv="fp8", engine="vllm-cpu")
    moved = text.rename(text.with_suffix(".away"))
    try:
        with pytest.raises(DataError) as caught:
            api.export(floats, tmp_path / "w")
        assert "--data" in caught.value.hint
    finally:
        moved.rename(text)
    assert not (tmp_path / "w").exists()


def test_vllm_is_told_of_fp8_only(artifact: Path, floats: Path) -> None:
    from bitnest.cli.serve import _left_behind, _vllm_kv

    assert "int4-g8-w16" in str(_left_behind(artifact, None, "vllm-cuda"))
    assert _left_behind(artifact, "none", "vllm-cuda") is None
    assert _left_behind(floats, None, "vllm-cuda") is None
    assert _vllm_kv("fp8", "vllm") == "fp8"
    assert _vllm_kv("none", "vllm") is None
    assert _vllm_kv(None, "vllm") is None
    assert _vllm_kv("int4", "bitnest") is None
    with pytest.raises(TargetError, match="int8-g128-w128"):
        _vllm_kv("int8", "vllm")
