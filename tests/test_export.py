"""Exports: pack-quantized directories that other readers decode to the artifact's own weights.

Tiny random models are written as checkpoints, compressed for real, exported, and read back by
compressed-tensors, by the numpy decoder and by transformers. Every refusal is caused once.
"""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from bitnest.artifact import Artifact
from bitnest.checkpoint import Checkpoint
from bitnest.errors import ArtifactError, BitnestError, TargetError
from bitnest.export import compressed_tensors as exporter
from bitnest.export import tensors
from bitnest.export.compressed_tensors import export_compressed_tensors
from bitnest.export.engines import ENGINES
from bitnest.export.numpy_decoder import stream
from bitnest.export.schemes import quantization_config, scheme_of
from bitnest.export.verify import verify_export
from bitnest.manifest import SiteRecord
from bitnest.packed.modules import hold_decoded
from bitnest.quantize.compress import prepare, run
from bitnest.recipe import Recipe, Rule
from bitnest.sites import Site

SHAPES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "tie_word_embeddings": True,
}


def qwen(**changes: Any) -> PreTrainedConfig:
    own = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
    return Qwen3MoeConfig(**{**SHAPES, **own, **changes})


def llama(**changes: Any) -> PreTrainedConfig:
    return LlamaConfig(**{**SHAPES, "tie_word_embeddings": False, **changes})


def checkpoint(
    path: Path, config: PreTrainedConfig, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0
) -> Path:
    """A random model of `config` written to `path`. scale: multiplies its matrices."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    model.save_pretrained(path)
    return path


def compress(source: Path, out: Path, fmt: str, *rules: str) -> Path:
    recipe = Recipe(format=fmt, method="rtn", rules=tuple(Rule.parse(rule) for rule in rules))
    run(prepare(Checkpoint.open(source), recipe, device="cpu"), out)
    return out


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("source") / "moe", qwen())


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("source") / "dense", llama())


@pytest.fixture(scope="module")
def moe4(moe: Path) -> Path:
    return compress(moe, moe.parent / "moe-int4", "int4-g32")


def logits(path: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    hold_decoded(model)  # the products that the other side has
    with torch.no_grad():
        return model(torch.arange(48)[None] % 90).logits.float()


def read_config(export: Path) -> dict[str, Any]:
    return json.loads((export / "config.json").read_text())["quantization_config"]


# --- what is written decodes to the artifact's weights ---


@pytest.mark.parametrize(
    "fmt",
    [
        "int2-g32", "int3-g32", "int4-g32", "int5-g32", "int6-g32", "int7-g32", "int8-g32",
        "int2-g16-asym", "int3-g32-asym", "int4-g32-asym", "int7-g32-asym", "int8-g32-asym",
        "int3-channel", "int4-channel", "int8-channel", "int4-channel-asym",
    ],
)  # fmt: skip
def test_each_width_decodes_bit_for_bit_in_two_other_readers(
    dense: Path, tmp_path: Path, fmt: str
) -> None:
    pytest.importorskip("compressed_tensors")
    artifact = compress(dense, tmp_path / "a", fmt)
    result = export_compressed_tensors(artifact, tmp_path / "e")
    assert result.weights == result.verified == 2 * 7
    assert result.verifier.startswith("compressed-tensors")
    opened = Artifact.open(artifact)
    again = verify_export(opened, tmp_path / "e", torch.bfloat16, package=False)
    assert again == (2 * 7, "numpy")


@pytest.mark.parametrize("fmt", ["int2-g32", "int3-g64", "int4-g32", "int8-channel"])
def test_experts_reload_in_transformers_with_the_artifacts_logits(
    moe: Path, tmp_path: Path, fmt: str
) -> None:
    pytest.importorskip("compressed_tensors")
    artifact = compress(moe, tmp_path / "a", fmt)
    result = export_compressed_tensors(artifact, tmp_path / "e", engine="transformers")
    assert result.verified == 2 * (4 + 3 * 4)
    ours, theirs = logits(artifact), logits(tmp_path / "e")
    assert ours.std() > 0
    torch.testing.assert_close(theirs, ours, rtol=2**-6, atol=float(ours.std()) * 2**-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dense_model_reloads_in_transformers_in_every_dtype(tmp_path: Path, dtype: Any) -> None:
    pytest.importorskip("compressed_tensors")
    source = checkpoint(tmp_path / "s", llama(attention_bias=True), dtype)
    artifact = compress(source, tmp_path / "a", "int4-g32", "*.down_proj=int8-channel")
    export_compressed_tensors(artifact, tmp_path / "e", engine="transformers")
    ours, theirs = logits(artifact), logits(tmp_path / "e")
    torch.testing.assert_close(theirs, ours, rtol=2**-6, atol=float(ours.std()) * 2**-6)


def test_mixed_formats_reload_in_transformers(moe: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    rules = [
        "kind:attention=int8-channel",
        "*.0.self_attn.o_proj=int5-g32",
        "*.1.self_attn.*=dense",
    ]
    artifact = compress(moe, tmp_path / "a", "int4-g32", *rules)
    result = export_compressed_tensors(artifact, tmp_path / "e", engine="transformers")
    assert result.formats == {"int4-g32": 24, "int5-g32": 1, "int8-channel": 3}
    assert read_config(tmp_path / "e")["format"] == "pack-quantized"
    ours, theirs = logits(artifact), logits(tmp_path / "e")
    torch.testing.assert_close(theirs, ours, rtol=2**-6, atol=float(ours.std()) * 2**-6)


def test_bitstream_crossing_words_is_read_by_hand_computed_values() -> None:
    # 3-bit codes 0..7, 0..: the stream's bytes are 0o76543210 repeated, three bytes per eight codes
    chunk = (0o76543210).to_bytes(3, "little")
    words = np.frombuffer(chunk * 4, "<i4").reshape(1, 3)
    assert stream(words, 3, 32).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7] * 4]
    assert stream(words, 3, 5).tolist() == [[0, 1, 2, 3, 4]]


def test_layout_on_disk_is_the_documented_one(moe4: Path, tmp_path: Path) -> None:
    export_compressed_tensors(moe4, tmp_path / "e")
    index = json.loads((tmp_path / "e/model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.1.mlp.experts.3.down_proj"
    file = exporter.read_header(tmp_path / "e" / index[f"{name}.weight_packed"])
    kinds = {key: (file[f"{name}.{key}"].dtype, file[f"{name}.{key}"].shape) for key in PARTS}
    assert kinds == {
        "weight_packed": ("I32", (64, 8)),
        "weight_scale": ("BF16", (64, 2)),
        "weight_shape": ("I64", (2,)),
    }
    assert f"{name}.weight_zero_point" not in index
    assert "model.layers.1.mlp.gate.weight" in index
    assert not any(key.endswith("experts.3.down_proj.weight") for key in index)


PARTS = ("weight_packed", "weight_scale", "weight_shape")


def test_config_ignores_every_dense_linear(moe4: Path, tmp_path: Path) -> None:
    export_compressed_tensors(moe4, tmp_path / "e")
    config = read_config(tmp_path / "e")
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert {"lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"} <= {*config["ignore"]}


def test_dense_tensors_and_files_are_copied_verbatim(moe4: Path, tmp_path: Path) -> None:
    export_compressed_tensors(moe4, tmp_path / "e")
    before = (moe4 / "model-00001-of-00001.safetensors").read_bytes()
    assert (tmp_path / "e/model-00001-of-00003.safetensors").read_bytes() == before
    generation = "generation_config.json"
    assert (tmp_path / "e" / generation).read_bytes() == (moe4 / generation).read_bytes()
    assert not (tmp_path / "e/bitnest.json").exists()


def fake(name: str, layer: int, fmt: str, expert: int | None = None) -> SiteRecord:
    kind = "attention" if expert is None else "expert"
    site = Site(name, kind, layer, expert, (64, 64), name, "weight")
    return SiteRecord(site, fmt, 0, 0.0, None, "" if fmt == "dense" else "packed")


def test_pattern_of_layer_1_does_not_catch_layer_11() -> None:
    records = [
        fake(f"model.layers.{i}.self_attn.q_proj", i, "int8-channel" if i == 1 else "int4-g64")
        for i in range(12)
    ]
    config = quantization_config(records, [])
    by_layer = [scheme_of(config, record.site.name) for record in records]
    assert by_layer == ["group_1" if i == 1 else "group_0" for i in range(12)]
    assert scheme_of(config, "other.tower.self_attn.q_proj") is None


def test_dense_expert_layers_are_ignored_whatever_the_experts_number() -> None:
    records = [
        fake(f"model.layers.{i}.mlp.experts.{e}.up_proj", i, "dense" if i else "int4-g64", e)
        for i in range(2)
        for e in range(12)
    ]
    config = quantization_config(records, [])
    assert len(config["ignore"]) == 2  # one pattern and the head, not twelve names
    found = {scheme_of(config, r.site.name) for r in records if r.format == "dense"}
    assert found == {None}


# --- refusals, all before anything is written ---


@pytest.mark.parametrize(
    ("rules", "site", "message"),
    [
        (["*.experts.2.down_proj=int8-g32"], "0.mlp.experts.2.down_proj", "layer's experts"),
        (["*.1.mlp.experts.3.up_proj=dense"], "1.mlp.experts.3.up_proj", "layer's experts"),
        (["*.k_proj=int8-g32"], "0.self_attn.k_proj", "q_proj/k_proj/v_proj"),
        (["*.v_proj=dense"], "0.self_attn.v_proj", "q_proj/k_proj/v_proj"),
    ],
)
def test_mixed_schemes_in_what_engines_load_as_one_are_refused(
    moe: Path, tmp_path: Path, rules: list[str], site: str, message: str
) -> None:
    artifact = compress(moe, tmp_path / "a", "int4-g32", *rules)
    with pytest.raises(TargetError, match=message) as caught:
        export_compressed_tensors(artifact, tmp_path / "e")
    assert caught.value.where == f"model.layers.{site}"
    assert caught.value.hint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_gate_and_up_of_different_formats_are_refused(dense: Path, tmp_path: Path) -> None:
    artifact = compress(dense, tmp_path / "a", "int4-g32", "*.up_proj=int4-g64")
    with pytest.raises(TargetError, match="gate_proj/up_proj"):
        export_compressed_tensors(artifact, tmp_path / "e")


def test_short_last_group_is_refused(dense: Path, tmp_path: Path) -> None:
    artifact = compress(dense, tmp_path / "a", "int4-g64")  # down_proj has 96 input channels
    with pytest.raises(TargetError, match="96 input channels") as caught:
        export_compressed_tensors(artifact, tmp_path / "e")
    assert caught.value.where.endswith("down_proj")
    assert "g32" in caught.value.hint


def test_group_wider_than_the_matrix_is_refused(dense: Path, tmp_path: Path) -> None:
    artifact = compress(dense, tmp_path / "a", "int4-g128")  # q_proj has 64 input channels
    with pytest.raises(TargetError, match="64 input channels") as caught:
        export_compressed_tensors(artifact, tmp_path / "e")
    assert "g64" in caught.value.hint


def test_experts_fused_on_disk_are_refused(tmp_path: Path) -> None:
    config = GptOssConfig(
        **{**SHAPES, "intermediate_size": 64}, num_local_experts=4, num_experts_per_tok=2
    )
    artifact = compress(checkpoint(tmp_path / "s", config), tmp_path / "a", "int4-g32")
    with pytest.raises(TargetError, match="all experts in one tensor"):
        export_compressed_tensors(artifact, tmp_path / "e")


def test_transposed_linears_are_refused(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=64, n_head=2, n_layer=1, vocab_size=96, n_positions=64)
    artifact = compress(checkpoint(tmp_path / "s", config), tmp_path / "a", "int4-g32")
    with pytest.raises(TargetError, match="transposed"):
        export_compressed_tensors(artifact, tmp_path / "e")


def test_artifact_without_packed_weights_is_refused(dense: Path, tmp_path: Path) -> None:
    artifact = compress(dense, tmp_path / "a", "dense")
    with pytest.raises(TargetError, match="nothing to export"):
        export_compressed_tensors(artifact, tmp_path / "e")


def test_scales_that_would_round_are_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "s", llama(), scale=1e-5)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    artifact = compress(source, tmp_path / "a", "int4-g32")
    with pytest.raises(TargetError, match="not exact"):
        export_compressed_tensors(artifact, tmp_path / "e")
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("engine", "fmt", "rules", "message"),
    [
        ("vllm-cpu", "int4-g32", ["kind:expert=int8-g32"], "runs 4-bit experts, not 8-bit"),
        ("vllm-cpu", "int4-g32", ["kind:attention=int3-g32"], "runs 4-bit weights, not 3-bit"),
        ("vllm-cpu", "int4-channel", [], "groups only"),
        ("vllm-cpu", "int4-g32-asym", [], "symmetric experts"),
        ("vllm-cuda", "int8-g32-asym", [], "zero points at 4-bit only"),
        ("vllm-cuda", "int4-g16", [], "groups of channel, 32, 64, 128, not 16"),
        ("transformers", "int4-g32", ["kind:attention=int4-g32-asym"], "zero points"),
        ("transformers", "int4-g32", ["*.1.mlp.experts.*=int8-g32"], "one scheme"),
        ("transformers", "int4-g32", ["*.1.mlp.experts.*=dense"], "one scheme"),
        ("transformers", "int4-g32", ["kind:expert=dense"], "dense experts"),
        ("tensorrt", "int4-g32", [], "unknown engine"),
    ],
)
def test_engine_limits_are_refused_by_name(
    moe: Path, tmp_path: Path, engine: str, fmt: str, rules: list[str], message: str
) -> None:
    artifact = compress(moe, tmp_path / "a", fmt, *rules)
    with pytest.raises(TargetError, match=message) as caught:
        export_compressed_tensors(artifact, tmp_path / "e", engine=engine)
    assert caught.value.hint
    assert not (tmp_path / "e").exists()


def test_sides_that_cpu_kernels_cannot_tile_are_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "s", llama(intermediate_size=80))
    artifact = compress(source, tmp_path / "a", "int4-g16")
    with pytest.raises(TargetError, match="divide by 32"):
        export_compressed_tensors(artifact, tmp_path / "e", engine="vllm-cpu")


def test_one_expert_per_token_is_refused_on_a_cpu(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "s", qwen(num_experts_per_tok=1))
    artifact = compress(source, tmp_path / "a", "int4-g32")
    with pytest.raises(TargetError, match="experts per token"):
        export_compressed_tensors(artifact, tmp_path / "e", engine="vllm-cpu")


def test_widths_that_need_more_software_are_noted_not_refused(dense: Path, tmp_path: Path) -> None:
    artifact = compress(dense, tmp_path / "a", "int3-g32")
    result = export_compressed_tensors(artifact, tmp_path / "e", engine="vllm-cuda")
    assert any("humming" in note for note in result.notes)
    assert any("0.18" in note for note in result.notes)


def test_without_an_engine_every_engines_limits_are_noted(moe: Path, tmp_path: Path) -> None:
    artifact = compress(moe, tmp_path / "a", "int4-g16-asym")
    notes = export_compressed_tensors(artifact, tmp_path / "e").notes
    for name in ENGINES:
        assert any(note.startswith(f"not for {name}") for note in notes)


# --- all or nothing ---


def test_a_wrong_bit_is_found_and_the_export_removed(
    moe4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tensors.read_tensor
    seen = []

    def flipped(info: Any) -> torch.Tensor:
        tensor = real(info)
        if tensor.dtype == torch.int32 and not seen:
            seen.append(info)
            tensor[-1, -1] ^= 1 << 31
        return tensor

    monkeypatch.setattr(tensors, "read_tensor", flipped)
    with pytest.raises(ArtifactError, match="does not decode") as caught:
        export_compressed_tensors(moe4, tmp_path / "e")
    assert "model.layers.0" in caught.value.where
    assert list(tmp_path.iterdir()) == []


def test_numpy_decoder_finds_a_wrong_scale(moe4: Path, tmp_path: Path) -> None:
    export_compressed_tensors(moe4, tmp_path / "e", verify=False)
    index = json.loads((tmp_path / "e/model.safetensors.index.json").read_text())["weight_map"]
    key = "model.layers.1.self_attn.o_proj.weight_scale"
    info = exporter.read_header(tmp_path / "e" / index[key])[key]
    data = bytearray(info.file.read_bytes())
    data[info.start] ^= 1
    info.file.write_bytes(data)
    with pytest.raises(ArtifactError, match="does not decode"):
        verify_export(Artifact.open(moe4), tmp_path / "e", torch.bfloat16, package=False)


def test_damaged_artifact_is_not_exported(moe: Path, tmp_path: Path) -> None:
    artifact = compress(moe, tmp_path / "a", "int4-g32")
    file = next(artifact.glob("packed-*"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match="checksum"):
        export_compressed_tensors(artifact, tmp_path / "e")
    assert not (tmp_path / "e").exists()


def test_full_disk_leaves_nothing_behind(
    moe4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = exporter.write_file
    calls = []

    def full(file: Path, entries: Any) -> Any:
        calls.append(file)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, entries)

    monkeypatch.setattr(exporter, "write_file", full)
    with pytest.raises(ArtifactError, match="No space left") as caught:
        export_compressed_tensors(moe4, tmp_path / "e")
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_interrupt_leaves_nothing_behind(
    moe4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(exporter, "verify_export", stop)
    with pytest.raises(KeyboardInterrupt):
        export_compressed_tensors(moe4, tmp_path / "e")
    assert list(tmp_path.iterdir()) == []


def test_output_in_the_way_is_kept(moe4: Path, tmp_path: Path) -> None:
    (tmp_path / "e").mkdir()
    (tmp_path / "e/precious").write_text("kept")
    with pytest.raises(ArtifactError, match="in the way"):
        export_compressed_tensors(moe4, tmp_path / "e")
    assert (tmp_path / "e/precious").read_text() == "kept"


def test_empty_output_and_leftovers_of_a_killed_run_are_replaced(
    moe4: Path, tmp_path: Path
) -> None:
    (tmp_path / "e").mkdir()
    (tmp_path / ".e.export-partial").mkdir()
    (tmp_path / ".e.export-partial/half").write_text("")
    export_compressed_tensors(moe4, tmp_path / "e", verify=False)
    assert [p.name for p in tmp_path.iterdir()] == ["e"]
    assert (tmp_path / "e/config.json").exists()
    assert not (tmp_path / "e/half").exists()


def test_unwritable_place_is_said_clearly(moe4: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write"):
        export_compressed_tensors(moe4, tmp_path / "file/e")


def test_not_an_artifact_is_said_clearly(moe: Path, tmp_path: Path) -> None:
    with pytest.raises(BitnestError, match="not a bitnest artifact"):
        export_compressed_tensors(moe, tmp_path / "e")
