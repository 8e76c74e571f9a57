"""Exports of rounded inputs: engines are told what the artifact does, or nothing is written.

Every scheme against a config written out by hand, every tensor against the artifact's numbers,
every refusal caused once. compressed-tensors parses and decodes what is written where it is there.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from bitnest import api, demo
from bitnest.api import exporting
from bitnest.artifact import Artifact
from bitnest.cli import main
from bitnest.errors import ArtifactError, TargetError
from bitnest.export.compressed_tensors import export_compressed_tensors
from bitnest.export.input_scales import shared_scales
from bitnest.export.rules import check_site_storage
from bitnest.export.schemes import quantization_config, scheme_of
from bitnest.export.support import engines_of
from bitnest.export.targets import check_engine, engine_notes
from bitnest.export.verify import verify_export
from bitnest.formats import parse_format
from bitnest.formats.inputs import parse_inputs
from bitnest.kernels.inputs import round_inputs
from bitnest.manifest import SiteRecord
from bitnest.sites import Site

SHAPES: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 128,
}
CPU_RUNS = [
    "int8-channel/int8-token", "int8-channel/int8-static", "int4-g128/int8-token",
    "fp8-channel/fp8-token",
]  # fmt: skip


def dynamic(bits: int, kind: str, strategy: str, group: int | None = None) -> dict[str, Any]:
    return {
        "num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy,
        "group_size": group, "dynamic": True,
    }  # fmt: skip


INT8_WEIGHT = {
    "num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None,
    "dynamic": False, "actorder": None,
}  # fmt: skip
INT4_WEIGHT = {**INT8_WEIGHT, "num_bits": 4, "strategy": "group", "group_size": 128}
FP8_WEIGHT = {**INT8_WEIGHT, "type": "float"}
SCALES = {"mx": {"scale_dtype": "torch.uint8"}, "nv": {"scale_dtype": "torch.float8_e4m3fn"}}
FP4_WEIGHT = {**FP8_WEIGHT, "num_bits": 4, "strategy": "group", "group_size": 32, **SCALES["mx"]}
# name: file format, weights, input_activations
SCHEMES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "int8-channel/int8-token": ("int-quantized", INT8_WEIGHT, dynamic(8, "int", "token")),
    "int8-channel/int8-static": (
        "int-quantized",
        INT8_WEIGHT,
        {**dynamic(8, "int", "tensor"), "dynamic": False},
    ),
    "int4-g128/int8-token": ("pack-quantized", INT4_WEIGHT, dynamic(8, "int", "token")),
    "int4-g128/int4-token": ("pack-quantized", INT4_WEIGHT, dynamic(4, "int", "token")),
    "int4-g128/fp8-token": ("pack-quantized", INT4_WEIGHT, dynamic(8, "float", "token")),
    "fp8-channel/fp8-token": ("float-quantized", FP8_WEIGHT, dynamic(8, "float", "token")),
    "fp8-tensor/fp8-static": (
        "float-quantized",
        {**FP8_WEIGHT, "strategy": "tensor"},
        {**dynamic(8, "float", "tensor"), "dynamic": False},
    ),
    "fp8-b128x128/fp8-g128": (
        "float-quantized",
        {**FP8_WEIGHT, "strategy": "block", "block_structure": [128, 128]},
        dynamic(8, "float", "group", 128),
    ),
    "mxfp8/mxfp8": (
        "mxfp8-quantized",
        {**FP4_WEIGHT, "num_bits": 8},
        {**dynamic(8, "float", "group", 32), **SCALES["mx"]},
    ),
    "mxfp4/mxfp4-ceil": (
        "mxfp4-pack-quantized",
        FP4_WEIGHT,
        {**dynamic(4, "float", "group", 32), **SCALES["mx"]},
    ),
    "mxfp4/fp8-g128": (
        "mxfp4-pack-quantized",
        FP4_WEIGHT,
        dynamic(8, "float", "group", 128),
    ),
    "nvfp4/nvfp4": (
        "nvfp4-pack-quantized",
        {**FP8_WEIGHT, "num_bits": 4, "strategy": "tensor_group", "group_size": 16, **SCALES["nv"]},
        {**dynamic(4, "float", "tensor_group", 16), "dynamic": "local", **SCALES["nv"]},
    ),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints `dense` and `moe` with the demo's tokenizer."""
    place = tmp_path_factory.mktemp("sources")
    experts = {"moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2}
    configs = {"dense": LlamaConfig(**SHAPES), "moe": Qwen3MoeConfig(**SHAPES, **experts)}
    for name, config in configs.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(place / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (place / name / file).write_bytes((demo.model_path() / file).read_bytes())
    return place


def compress(source: Path, out: Path, fmt: str, *rules: str) -> Path:
    api.compress(
        source, out, format=fmt, method="rtn", rules=rules, samples=2, length=32,
        data=[str(demo.calibration_text())], device="cpu",
    )  # fmt: skip
    return out


def read_config(export: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((export / "config.json").read_text())
    return dict(config["quantization_config"])


def read_tensors(export: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in export.glob("*.safetensors"):
        found |= load_file(file)
    return found


def fake(leaf: str, name: str, scale: float | None = None, expert: int | None = None) -> SiteRecord:
    """A packed matrix of layer 0 in `name`, weights/inputs."""
    weights, _, inputs = name.partition("/")
    part = "self_attn" if expert is None else f"mlp.experts.{expert}"
    kind = "attention" if expert is None else "expert"
    path = f"model.layers.0.{part}.{leaf}"
    site = Site(path, kind, 0, expert, (256, 256), path, "weight")
    fmt = parse_format(weights).name
    spelt = parse_inputs(inputs).name if inputs else ""
    return SiteRecord(site, fmt, 0, 0.0, None, "packed", inputs=spelt, input_scale=scale)


# --- what the config says ---


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_is_the_one_written_out_here(name: str) -> None:
    config = quantization_config([fake("o_proj", name)], [])
    layout, weights, inputs = SCHEMES[name]
    assert config["format"] == layout
    assert config["config_groups"] == {
        "group_0": {
            "targets": ["Linear"], "format": layout, "weights": weights,
            "input_activations": inputs, "output_activations": None,
        }
    }  # fmt: skip


@pytest.mark.parametrize("name", SCHEMES)
def test_the_library_parses_every_scheme(name: str) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    config = quantization_config([fake("o_proj", name)], [])
    parsed = quantization.QuantizationConfig.model_validate(config)
    inputs = parsed.config_groups["group_0"].input_activations
    assert {key: getattr(inputs, key) for key in SCHEMES[name][2] if key != "scale_dtype"} == {
        key: value for key, value in SCHEMES[name][2].items() if key != "scale_dtype"
    }


PRESETS = {
    "int8-channel/int8-token": "INT8", "fp8-tensor/fp8-static": "FP8", "nvfp4/nvfp4": "NVFP4",
    "fp8-channel/fp8-token": "FP8_DYNAMIC", "fp8-b128x128/fp8-g128": "FP8_BLOCK",
    "mxfp4/mxfp4-ceil": "MXFP4", "mxfp8/mxfp8": "MXFP8", "int4-g128/int8-token": "W4A8",
    "int4-g128/fp8-token": "W4AFP8",
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_inputs_are_those_of_the_librarys_presets(name: str) -> None:
    schemes = pytest.importorskip("compressed_tensors.quantization.quant_scheme")
    if not schemes.is_preset_scheme(PRESETS[name]):
        pytest.skip("a version without this preset")
    preset = schemes.preset_name_to_scheme(PRESETS[name], ["Linear"])
    config = quantization_config([fake("o_proj", name)], [])["config_groups"]["group_0"]
    ours = schemes.QuantizationScheme.model_validate(config)
    for key in ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic"):
        theirs = getattr(preset.input_activations, key)
        assert getattr(ours.input_activations, key) == theirs, key
        assert getattr(ours.weights, key) == getattr(preset.weights, key), key


def test_matrices_without_rounded_inputs_keep_a_group_without_them() -> None:
    records = [
        *(fake(leaf, "int8-channel/int8-token") for leaf in ("q_proj", "k_proj", "v_proj")),
        fake("o_proj", "int8-channel"),
    ]
    config = quantization_config(records, [])
    groups = config["config_groups"]
    names = {r.site.name.rpartition(".")[2]: scheme_of(config, r.site.name) for r in records}
    assert names["q_proj"] == names["k_proj"] == names["v_proj"] != names["o_proj"]
    assert groups[names["q_proj"]]["input_activations"] == dynamic(8, "int", "token")
    assert groups[names["o_proj"]]["input_activations"] is None
    assert groups[names["q_proj"]]["format"] == "int-quantized"
    assert groups[names["o_proj"]]["format"] == "pack-quantized"
    assert config["format"] == "mixed-precision"


# --- what the files hold ---


def test_int8_weights_are_signed_bytes_the_extra_code_and_negative_scales_too(
    sources: Path, tmp_path: Path
) -> None:
    artifact = compress(sources / "dense", tmp_path / "a", "int8-channel/int8-token")
    result = export_compressed_tensors(artifact, tmp_path / "e", engine="vllm-cpu")
    assert result.formats == {"int8-channel/int8-token": 14}
    assert result.verified == 14
    tensors = read_tensors(tmp_path / "e")
    name = "model.layers.1.mlp.down_proj"
    assert {k.rpartition(".")[2] for k in tensors if k.startswith(name)} == {
        "weight", "weight_scale",
    }  # fmt: skip
    codes, scales = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
    assert codes.dtype == torch.int8
    assert scales.shape == (128, 1)
    every = [value for key, value in tensors.items() if value.dtype == torch.int8]
    assert len(every) == 14
    assert min(int(value.min()) for value in every) == -128
    assert max(int(value.max()) for value in every) == 127
    assert any(bool((tensors[key] < 0).any()) for key in tensors if key.endswith("weight_scale"))
    again = verify_export(Artifact.open(artifact), tmp_path / "e", torch.bfloat16, package=False)
    assert again == (14, "numpy")


@pytest.mark.parametrize(
    ("fmt", "tensor"),
    [
        ("int8-channel/int8-static", "input_scale"),
        ("fp8-tensor/fp8-static", "input_scale"),
        ("nvfp4/nvfp4", "input_global_scale"),
    ],
)
def test_static_scales_are_the_manifests(
    sources: Path, tmp_path: Path, fmt: str, tensor: str
) -> None:
    artifact = compress(sources / "dense", tmp_path / "a", fmt)
    export_compressed_tensors(artifact, tmp_path / "e")
    tensors = read_tensors(tmp_path / "e")
    for record in Artifact.open(artifact).packed():
        scale = tensors[f"{record.site.name}.{tensor}"]
        assert (scale.dtype, scale.shape) == (torch.float32, (1,))
        assert record.input_scale is not None
        own = 1 / record.input_scale if tensor == "input_global_scale" else record.input_scale
        assert float(scale) == pytest.approx(own, rel=1e-7)


def test_calibrated_scales_of_what_is_loaded_as_one_are_equal_to_begin_with(
    sources: Path, tmp_path: Path
) -> None:
    artifact = compress(sources / "dense", tmp_path / "a", "int8-channel/int8-static")
    records = Artifact.open(artifact).records
    assert shared_scales(records) == (records, [])


def test_differing_scales_of_a_fused_matrix_become_the_largest(
    sources: Path, tmp_path: Path
) -> None:
    artifact = compress(sources / "dense", tmp_path / "a", "int8-channel/int8-static")
    manifest = json.loads((artifact / "bitnest.json").read_text())
    for group in manifest["sites"]:
        if group["name"] == "model.layers.0.self_attn.k_proj":
            group["sites"][0][-1] = 0.5
    (artifact / "bitnest.json").write_text(json.dumps(manifest))
    result = export_compressed_tensors(artifact, tmp_path / "e")
    assert result.verified == 14
    tensors = read_tensors(tmp_path / "e")
    layer = "model.layers.0.self_attn"
    assert [float(tensors[f"{layer}.{x}_proj.input_scale"]) for x in "qkv"] == [0.5] * 3
    assert float(tensors[f"{layer}.o_proj.input_scale"]) < 0.5
    assert any("the largest is written for all" in note for note in result.notes)


def test_experts_of_a_layer_share_the_scale_of_gates_and_ups_and_that_of_downs() -> None:
    name = "fp8-channel/fp8-static"
    leaves = ("gate_proj", "up_proj", "down_proj")
    records = [
        fake(leaf, name, 1.0 + i + 10 * e, e) for e in (0, 1) for i, leaf in enumerate(leaves)
    ]
    found, notes = shared_scales([*records, fake("o_proj", name, 0.25)])
    assert [record.input_scale for record in found] == [12.0, 12.0, 13.0, 12.0, 12.0, 13.0, 0.25]
    assert len(notes) == 2


@pytest.mark.parametrize("scale", [None, 0.0, float("nan"), float("inf")])
def test_a_static_scale_that_is_none_is_refused(scale: float | None) -> None:
    with pytest.raises(ArtifactError, match="static scale"):
        shared_scales([fake("o_proj", "int8-channel/int8-static", scale)])


@pytest.mark.parametrize("damage", ["scale", "arguments"])
def test_verification_sees_inputs_rounded_in_another_way(
    sources: Path, tmp_path: Path, damage: str
) -> None:
    artifact = compress(sources / "dense", tmp_path / "a", "int8-channel/int8-static")
    export_compressed_tensors(artifact, tmp_path / "e")
    if damage == "scale":
        file = next(
            f
            for f in (tmp_path / "e").glob("*.safetensors")
            if "input_scale" in str(load_file(f).keys())
        )
        tensors = load_file(file)
        key = next(key for key in tensors if key.endswith("input_scale"))
        tensors[key] = tensors[key] * 1.0001
        save_file(tensors, file)
    else:
        config = json.loads((tmp_path / "e/config.json").read_text())
        config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = None
        (tmp_path / "e/config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="not rounded as the artifact's"):
        verify_export(Artifact.open(artifact), tmp_path / "e", torch.bfloat16, package=False)


# --- refusals, and weights alone ---


@pytest.mark.parametrize(
    "name",
    [
        "int8-channel/int6-g128", "int8-channel/int8-token-c90", "int8-channel/int8-token-t6",
        "int4-g128/128xint8-token~int4-g128", "int8-channel/fp8-token", "int8-g128/int4-token",
        "int4-g128/int8-static", "int4-g64/fp8-token", "int4-g128-asym/fp8-token",
        "fp8-channel/int8-token", "fp8-b128x128/fp8-token", "fp8-channel/fp8_e5m2-token",
        "mxfp8/mxfp4", "nvfp4/mxfp4", "mxfp4/mxint8",
    ],
)  # fmt: skip
def test_inputs_that_engines_lack_are_refused_by_name(name: str) -> None:
    with pytest.raises(TargetError, match="do not export with weights of") as caught:
        quantization_config([fake("o_proj", name, 1.0)], [])
    assert caught.value.where == "model.layers.0.self_attn.o_proj"
    assert "--weights-only" in caught.value.hint


def test_refused_inputs_leave_nothing_and_weights_alone_are_said_to_be(
    sources: Path, tmp_path: Path
) -> None:
    artifact = compress(sources / "dense", tmp_path / "a", "int8-channel/int6-g64")
    with pytest.raises(TargetError, match="int6-g64"):
        api.export(artifact, tmp_path / "e")
    assert not (tmp_path / "e").exists()
    result = api.export(artifact, tmp_path / "e", weights_only=True)
    assert result.formats == {"int8-channel": 14}
    assert "14 matrices are rounded in the artifact (int6-g64)" in result.notes[0]
    group = read_config(tmp_path / "e")["config_groups"]["group_0"]
    assert (group["format"], group["input_activations"]) == ("pack-quantized", None)


def test_the_command_refuses_unless_weights_alone_are_asked_for(
    sources: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    artifact = compress(sources / "dense", tmp_path / "a", "int8-channel/int8-token-c90")

    def run(*arguments: str) -> tuple[int, str, str]:
        argv = ["bitnest", "export", str(artifact), "-o", str(tmp_path / "e"), *arguments]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as exit_:
            main()
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out, err

    code, out, err = run("--quiet")
    assert (code, out) == (2, "") and "--weights-only" in err
    assert not (tmp_path / "e").exists()
    code, out, _ = run("--quiet", "--json", "--weights-only")
    assert code == 0 and "int8-token-c90" in json.loads(out)["notes"][0]


def test_weights_only_of_an_artifact_without_rounded_inputs_says_nothing(
    sources: Path, tmp_path: Path
) -> None:
    artifact = compress(sources / "dense", tmp_path / "a", "int8-channel")
    plain = api.export(artifact, tmp_path / "e")
    assert api.export(artifact, tmp_path / "f", weights_only=True).notes == plain.notes


def test_requantising_a_nested_artifact_refuses_to_drop_inputs(
    sources: Path, tmp_path: Path
) -> None:
    artifact = compress(sources / "dense", tmp_path / "a", "int4-g128/int8-token")
    rounded = Artifact.open(artifact)
    with pytest.raises(TargetError, match="would not be there"):
        exporting._dropped_inputs(rounded, weights_only=False)
    assert exporting._dropped_inputs(rounded, weights_only=True)


def test_q_and_k_of_one_format_and_different_inputs_are_refused(
    sources: Path, tmp_path: Path
) -> None:
    rule = "*.k_proj=int8-channel/dense"
    artifact = compress(sources / "dense", tmp_path / "a", "int8-channel/int8-token", rule)
    with pytest.raises(TargetError, match="int8-channel/int8-token and this is int8-channel"):
        api.export(artifact, tmp_path / "e")


def test_input_groups_must_divide_the_channels() -> None:
    record = fake("o_proj", "mxfp4/fp8-g128")
    odd = replace(record, site=replace(record.site, shape=(256, 320)))
    with pytest.raises(TargetError, match="320 input channels do not divide into groups of 128"):
        check_site_storage(odd)


# --- what single engines run ---


@pytest.mark.parametrize("name", CPU_RUNS)
def test_vllm_cpu_runs_what_was_seen_to_run(name: str) -> None:
    check_engine("vllm-cpu", [fake("o_proj", name, 1.0)], {})


@pytest.mark.parametrize("name", sorted({*SCHEMES} - {*CPU_RUNS}))
def test_vllm_cpu_is_refused_what_it_refused(name: str) -> None:
    with pytest.raises(TargetError, match="vllm-cpu does not run"):
        check_engine("vllm-cpu", [fake("o_proj", name, 1.0)], {})


def test_fp8_weights_run_on_a_cpu_beside_rounded_inputs_only() -> None:
    with pytest.raises(TargetError, match="does not run fp8 weights"):
        check_engine("vllm-cpu", [fake("o_proj", "fp8-channel")], {})
    assert "vllm-cpu with fp8_e4m3-token" in engines_of(parse_format("fp8-channel"))
    assert "vllm-cpu with int8-token" in engines_of(parse_format("int8-channel"))
    assert "vllm-cpu" in engines_of(parse_format("int4-g128"))


@pytest.mark.parametrize("fmt", ["int8-channel/int8-static", "fp8-channel/fp8-token"])
def test_transformers_rounds_inputs_to_the_same_numbers(
    sources: Path, tmp_path: Path, fmt: str
) -> None:
    pytest.importorskip("compressed_tensors")
    artifact = compress(sources / "dense", tmp_path / "a", fmt)
    export_compressed_tensors(artifact, tmp_path / "e", engine="transformers")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "e", dtype=torch.float32).eval()
    linear = model.model.layers[1].self_attn.o_proj
    record = next(
        r for r in Artifact.open(artifact).packed() if r.site.name.endswith("1.self_attn.o_proj")
    )
    torch.manual_seed(0)
    x = torch.randn(1, 24, 128) * 0.02
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))  # which decodes the weights
        theirs, weight = linear(x)[0], linear.weight
    rounded = round_inputs(x[0], parse_inputs(record.inputs), record.input_scale)
    torch.testing.assert_close(theirs, rounded @ weight.T, rtol=1e-5, atol=1e-7)
    assert float((theirs - x[0] @ weight.T).norm() / theirs.norm()) > 1e-3


def test_experts_that_transformers_would_not_round_are_refused() -> None:
    record = fake("up_proj", "int8-channel/int8-token", expert=0)
    with pytest.raises(TargetError, match="does not run int8-channel experts with inputs"):
        check_engine("transformers", [record], {})


@pytest.mark.parametrize("name", ["fp8-channel/fp8-token", "int4-g128/int8-token", "mxfp4/mxfp4"])
def test_experts_that_vllm_cpu_refused_are_refused(name: str) -> None:
    with pytest.raises(TargetError, match="experts with inputs rounded"):
        check_engine("vllm-cpu", [fake("up_proj", name, expert=0)], {})
    check_engine("vllm-cpu", [fake("up_proj", "int8-channel/int8-token", expert=0)], {})


def test_tensor_scales_that_vllm_rounds_anew_are_told_of() -> None:
    records = [fake(leaf, "fp8-tensor/fp8-static", 1.0) for leaf in ("q_proj", "k_proj", "v_proj")]
    assert any("rounds q_proj/k_proj/v_proj anew" in note for note in engine_notes(records, {}))
    assert not any("anew" in note for note in engine_notes(records[:1], {}))


def test_notes_name_the_package_that_packed_integers_need() -> None:
    notes = engine_notes([fake("o_proj", "int4-g128/int8-token")], {})
    assert any("int/int8-token only with the package humming" in note for note in notes)
