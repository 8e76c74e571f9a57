"""Exports of FP8, MXFP8, MXFP4 and NVFP4: read by other code to the artifact's own numbers.

Widths are chosen for their edges: 160 and 288 input channels leave partial 128 x 128 blocks and an
odd number of groups; heads make k and v narrower than q.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitnest import api
from bitnest.artifact import Artifact
from bitnest.errors import ArtifactError, TargetError
from bitnest.export import tensors
from bitnest.export.compressed_tensors import export_compressed_tensors
from bitnest.export.engines import ENGINES
from bitnest.export.layouts import packed_layout
from bitnest.export.numpy_decoder import decode, read_stored
from bitnest.export.schemes import quantization_config
from bitnest.export.targets import check_engine, engine_notes
from bitnest.export.verify import _same_stored, verify_export
from bitnest.safetensors_io import read_header, read_tensor
from tests.test_export import checkpoint, compress, fake, llama, logits, qwen, read_config
from tests.tiny import Builder

FORMATS = [
    "fp8-channel", "fp8-tensor", "fp8-b128x128", "mxfp8", "mxfp8-ocp",
    "mxfp4", "mxfp4-ocp", "mxfp4-ceil", "fp4-g32-e8m0", "fp4-g32-m1", "nvfp4",
]  # fmt: skip


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = llama(hidden_size=160, intermediate_size=288)
    return checkpoint(tmp_path_factory.mktemp("source") / "dense", config)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("source") / "moe", qwen())


def same_logits(artifact: Path, export: Path) -> None:
    ours, theirs = logits(artifact), logits(export)
    assert ours.std() > 0
    torch.testing.assert_close(theirs, ours, rtol=2**-6, atol=float(ours.std()) * 2**-6)


def tensors_of(export: Path, name: str) -> dict[str, Any]:
    """Part -> place of every tensor of a linear."""
    index = json.loads((export / "model.safetensors.index.json").read_text())["weight_map"]
    keys = [key for key in index if key.startswith(f"{name}.")]
    return {key.rpartition(".")[2]: read_header(export / index[key])[key] for key in keys}


# --- what is written decodes to the artifact's weights ---


@pytest.mark.parametrize("fmt", FORMATS)
def test_each_format_decodes_bit_for_bit_and_reloads(dense: Path, tmp_path: Path, fmt: str) -> None:
    pytest.importorskip("compressed_tensors")
    artifact = compress(dense, tmp_path / "a", fmt)
    result = export_compressed_tensors(artifact, tmp_path / "e", engine="transformers")
    assert result.verified == 2 * 7
    assert result.verifier.startswith("compressed-tensors")
    again = verify_export(Artifact.open(artifact), tmp_path / "e", torch.bfloat16, package=False)
    assert again == (2 * 7, "numpy")
    same_logits(artifact, tmp_path / "e")


@pytest.mark.parametrize("fmt", ["fp8-channel", "fp8-tensor", "mxfp4"])
def test_experts_reload_in_transformers(moe: Path, tmp_path: Path, fmt: str) -> None:
    pytest.importorskip("compressed_tensors")
    artifact = compress(moe, tmp_path / "a", fmt)
    result = export_compressed_tensors(artifact, tmp_path / "e", engine="transformers")
    assert result.verified == 2 * (4 + 3 * 4)
    same_logits(artifact, tmp_path / "e")


@pytest.mark.parametrize("fmt", ["fp8-b128x128", "mxfp8", "nvfp4"])
def test_experts_that_transformers_misreads_still_verify(
    moe: Path, tmp_path: Path, fmt: str
) -> None:
    pytest.importorskip("compressed_tensors")
    artifact = compress(moe, tmp_path / "a", fmt)
    assert export_compressed_tensors(artifact, tmp_path / "e").verified == 2 * (4 + 3 * 4)
    opened = Artifact.open(artifact)
    assert verify_export(opened, tmp_path / "e", torch.bfloat16, package=False)[0] == 2 * 16


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("fmt", ["fp8-channel", "fp8-b128x128"])
def test_fp8_reloads_in_the_models_dtype(tmp_path: Path, dtype: torch.dtype, fmt: str) -> None:
    pytest.importorskip("compressed_tensors")
    artifact = compress(checkpoint(tmp_path / "s", llama(), dtype), tmp_path / "a", fmt)
    export_compressed_tensors(artifact, tmp_path / "e", engine="transformers")
    scale = tensors_of(tmp_path / "e", "model.layers.0.self_attn.q_proj")["weight_scale"]
    assert read_tensor(scale).dtype == dtype
    same_logits(artifact, tmp_path / "e")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("fmt", ["mxfp8", "mxfp4", "nvfp4"])
def test_families_decoded_to_bfloat16_verify_in_other_models_and_say_so(
    tmp_path: Path, dtype: torch.dtype, fmt: str
) -> None:
    pytest.importorskip("compressed_tensors")
    artifact = compress(checkpoint(tmp_path / "s", llama(), dtype), tmp_path / "a", fmt)
    result = export_compressed_tensors(artifact, tmp_path / "e", engine="transformers")
    assert result.verified == 2 * 7
    assert verify_export(Artifact.open(artifact), tmp_path / "e", dtype, package=False)[0] == 2 * 7
    assert any("dtype=torch.bfloat16" in note for note in result.notes)


def test_formats_of_different_files_become_groups_of_their_own(moe: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    artifact = compress(moe, tmp_path / "a", "mxfp4", "kind:attention=fp8-channel")
    result = export_compressed_tensors(artifact, tmp_path / "e", engine="transformers")
    assert result.formats == {"fp8_e4m3-channel": 8, "mxfp4": 24}
    config = read_config(tmp_path / "e")
    assert config["format"] == "mixed-precision"
    groups = [group["format"] for group in config["config_groups"].values()]
    assert groups == ["mxfp4-pack-quantized", "float-quantized"]  # experts first
    same_logits(artifact, tmp_path / "e")


def test_integers_and_floats_mix(dense: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    rules = ["*.down_proj=int4-g32", "kind:attention=nvfp4", "*.1.self_attn.o_proj=dense"]
    artifact = compress(dense, tmp_path / "a", "mxfp8", *rules)
    result = export_compressed_tensors(artifact, tmp_path / "e", engine="transformers")
    assert result.formats == {"int4-g32": 2, "mxfp8": 4, "nvfp4": 7}
    assert read_config(tmp_path / "e")["format"] == "mixed-precision"
    same_logits(artifact, tmp_path / "e")


def test_schemes_of_one_file_format_keep_it_at_top_level(dense: Path, tmp_path: Path) -> None:
    artifact = compress(dense, tmp_path / "a", "fp8-channel", "*.down_proj=fp8-tensor")
    export_compressed_tensors(artifact, tmp_path / "e", verify=False)
    config = read_config(tmp_path / "e")
    assert config["format"] == "float-quantized"
    assert len(config["config_groups"]) == 2


def test_rules_of_mxfp4_are_one_scheme_and_may_share_a_fused_layer(
    dense: Path, tmp_path: Path
) -> None:
    artifact = compress(dense, tmp_path / "a", "mxfp4", "*.k_proj=mxfp4-ocp")
    result = export_compressed_tensors(artifact, tmp_path / "e", verify=False)
    assert len(result.formats) == 2
    groups = read_config(tmp_path / "e")["config_groups"]
    assert [group["targets"] for group in groups.values()] == [["Linear"]]


# --- the files are what the library's own presets describe ---


@pytest.mark.parametrize(
    ("fmt", "preset"),
    [
        ("fp8-channel", "FP8_DYNAMIC"), ("fp8-tensor", "FP8"), ("fp8-b128x128", "FP8_BLOCK"),
        ("mxfp8", "MXFP8A16"), ("mxfp4", "MXFP4A16"), ("nvfp4", "NVFP4A16"),
        ("int4-g128", "W4A16"), ("int8-channel", "INT8"),
    ],
)  # fmt: skip
def test_arguments_are_those_of_the_librarys_preset(fmt: str, preset: str) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

    config = quantization_config([fake("model.layers.0.mlp.up_proj", 0, fmt)], [])
    (group,) = QuantizationConfig.model_validate(config).config_groups.values()
    expected = preset_name_to_scheme(preset, ["Linear"]).weights
    assert group.weights.model_dump() == expected.model_dump()
    assert group.input_activations is None
    assert group.format == config["format"]


@pytest.mark.parametrize("fmt", ["mxfp8", "mxfp4", "nvfp4"])
def test_file_format_is_the_one_the_library_infers(fmt: str) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationConfig

    config = quantization_config([fake("model.layers.0.mlp.up_proj", 0, fmt)], [])
    (group,) = QuantizationConfig.model_validate(config).config_groups.values()
    assert infer_module_format(torch.nn.Linear, group).value == config["format"]


@pytest.mark.parametrize(
    ("fmt", "expected"),
    [
        ("fp8-channel", {"weight": ("F8_E4M3", (160, 288)), "weight_scale": ("BF16", (160, 1))}),
        ("fp8-tensor", {"weight": ("F8_E4M3", (160, 288)), "weight_scale": ("BF16", (1,))}),
        ("fp8-b128x128", {"weight": ("F8_E4M3", (160, 288)), "weight_scale": ("BF16", (2, 3))}),
        ("mxfp8", {"weight": ("F8_E4M3", (160, 288)), "weight_scale": ("U8", (160, 9))}),
        ("mxfp4", {"weight_packed": ("U8", (160, 144)), "weight_scale": ("U8", (160, 9))}),
        (
            "nvfp4",
            {
                "weight_packed": ("U8", (160, 144)),
                "weight_scale": ("F8_E4M3", (160, 18)),
                "weight_global_scale": ("F32", (1,)),
            },
        ),
    ],
)
def test_tensors_on_disk_are_the_documented_ones(
    dense: Path, tmp_path: Path, fmt: str, expected: dict[str, Any]
) -> None:
    artifact = compress(dense, tmp_path / "a", fmt)
    export_compressed_tensors(artifact, tmp_path / "e", verify=False)
    found = tensors_of(tmp_path / "e", "model.layers.1.mlp.down_proj")
    assert {part: (info.dtype, info.shape) for part, info in found.items()} == expected


def test_group_of_experts_comes_before_one_of_shared_experts() -> None:
    records = [
        fake("model.layers.0.mlp.shared_experts.up_proj", 0, "fp8-channel"),
        fake("model.layers.0.mlp.experts.0.up_proj", 0, "mxfp4", expert=0),
    ]
    groups = quantization_config(records, [])["config_groups"]
    assert groups["group_0"]["format"] == "mxfp4-pack-quantized"


# --- the second decoder, by hand-computed values ---


def test_numpy_reads_every_e4m3_code_as_torch_does() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[None]
    state = {"weight": codes, "weight_scale": torch.ones(1, 1)}
    values, _ = read_stored(state, {"format": "float-quantized"})
    finite = np.isfinite(codes.float().numpy())
    assert finite.sum() == 254
    np.testing.assert_array_equal(values[finite], codes.float().numpy()[finite])


def test_numpy_reads_nibbles_low_first_and_divides_by_the_global_scale() -> None:
    packed = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]], dtype=torch.uint8)
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    values += [-value for value in values]
    scale = torch.tensor([[0x38]], dtype=torch.uint8).view(torch.float8_e4m3fn)  # 1.0
    state = {"weight_packed": packed, "weight_scale": scale}
    state["weight_global_scale"] = torch.tensor([4.0])
    scheme = {"format": "nvfp4-pack-quantized"}
    scheme["weights"] = {"strategy": "tensor_group", "group_size": 16}
    assert decode(state, scheme)[0].tolist() == [value / 4 for value in values]
    state["weight_scale"] = torch.tensor([[124]], dtype=torch.uint8)  # 2^-3
    scheme["format"] = "mxfp4-pack-quantized"
    assert decode(state, scheme)[0].tolist() == [value / 8 for value in values]


def test_blocks_spread_over_partial_edges() -> None:
    state = {
        "weight": torch.ones(3, 5).to(torch.float8_e4m3fn),
        "weight_scale": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
    }
    args = {"strategy": "block", "block_structure": [2, 2], "group_size": None}
    found = decode(state, {"format": "float-quantized", "weights": args})
    assert found.tolist() == [[1, 1, 2, 2, 3]] * 2 + [[4, 4, 5, 5, 6]]


# --- refusals, all before anything is written ---


@pytest.mark.parametrize(
    ("fmt", "message"),
    [
        ("int4-g32-m1", "16-bit scales"), ("int4-g32-dq", "16-bit scales"),
        ("int8-b128x128", "16-bit scales"), ("mxint8", "16-bit scales"),
        ("nvint4", "16-bit scales"), ("dgq4-g32", "16-bit scales"), ("int1-g32", "2 to 8 bits"),
        ("fp6-g32", "no scheme"), ("mxfp6", "no scheme"), ("fp8_e5m2-channel", "no scheme"),
        ("nf4-g32", "no scheme.*nf4"), ("lut3-g32", "no scheme.*lut3"),
        ("ternary-g32", "no scheme.*ternary"), ("fp8-g64", "per channel, tensor or b128x128"),
        ("fp4-channel", "mxfp4"), ("int4-g32@had32", "not transformed .@had32"),
        ("mxfp4@rhad32", "not transformed"), ("int4-g32+lorc4", "residual .*lorc4"),
    ],
)  # fmt: skip
def test_formats_without_a_place_are_refused_by_name(
    moe: Path, tmp_path: Path, fmt: str, message: str
) -> None:
    artifact = compress(moe, tmp_path / "a", "int4-g32", f"*.1.self_attn.o_proj={fmt}")
    with pytest.raises(TargetError, match=message) as caught:
        export_compressed_tensors(artifact, tmp_path / "e")
    assert caught.value.where == "model.layers.1.self_attn.o_proj"
    assert "bitnest serve" in caught.value.hint
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(("fmt", "group"), [("mxfp4", 32), ("mxfp8", 32), ("nvfp4", 16)])
def test_short_last_group_of_floats_is_refused(tmp_path: Path, fmt: str, group: int) -> None:
    source = checkpoint(tmp_path / "s", llama(intermediate_size=72))
    artifact = compress(source, tmp_path / "a", fmt)
    with pytest.raises(TargetError, match=f"groups of {group}") as caught:
        export_compressed_tensors(artifact, tmp_path / "e")
    assert caught.value.where.endswith("down_proj")
    assert "fp8-channel" in caught.value.hint


@pytest.mark.parametrize(
    ("engine", "fmt", "rules", "message"),
    [
        ("vllm-cpu", "int4-g32", ["kind:attention=fp8-channel"], "fp8 weights"),
        ("vllm-cpu", "int4-g32", ["kind:attention=mxfp4"], "mxfp4 weights"),
        ("vllm-cpu", "int4-g32", ["kind:attention=mxfp8"], "mxfp8 weights"),
        ("vllm-cpu", "int4-g32", ["kind:attention=nvfp4"], "nvfp4 weights"),
        ("vllm-cpu", "int4-g32", ["kind:expert=fp8-channel"], "fp8 experts"),
        ("transformers", "mxfp4", ["kind:expert=nvfp4"], "nvfp4 experts"),
        ("transformers", "mxfp4", ["kind:expert=mxfp8"], "mxfp8 experts"),
        ("transformers", "mxfp4", ["kind:expert=fp8-b128x128"], "fp8-block experts"),
        ("transformers", "mxfp4", ["*.1.mlp.experts.*=fp8-channel"], "one scheme"),
        ("vllm-cuda", "mxfp4", ["kind:attention=fp8-b128x128"], "multiples of 128"),
    ],
)
def test_engine_limits_are_refused_by_name(
    moe: Path, tmp_path: Path, engine: str, fmt: str, rules: list[str], message: str
) -> None:
    artifact = compress(moe, tmp_path / "a", fmt, *rules)
    with pytest.raises(TargetError, match=message) as caught:
        export_compressed_tensors(artifact, tmp_path / "e", engine=engine)
    assert caught.value.where.startswith("model.layers.")
    assert caught.value.hint
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("engine", "fmt", "rules"),
    [
        ("vllm-cuda", "mxfp4", ["kind:attention=fp8-tensor"]),
        ("vllm-cuda", "mxfp8", ["*.o_proj=nvfp4"]),
        ("vllm-cuda", "fp8-channel", []),
    ],
)
def test_what_vllm_runs_is_exported_for_it_with_a_note(
    moe: Path, tmp_path: Path, engine: str, fmt: str, rules: list[str]
) -> None:
    artifact = compress(moe, tmp_path / "a", fmt, *rules)
    result = export_compressed_tensors(artifact, tmp_path / "e", engine=engine)
    assert any("not tried" in note for note in result.notes)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_fused_nvfp4_gets_one_global_scale_and_exports_for_vllm(
    tiny: Builder, text: Path, tmp_path: Path, method: str
) -> None:
    model = tiny("qwen3_moe", "even", moe_intermediate_size=64)
    api.compress(
        model, tmp_path / "a", format="nvfp4", method=method, samples=4, length=32,
        data=[str(text)] if method == "gptq" else [],
    )  # fmt: skip
    artifact = Artifact.open(tmp_path / "a")
    headers = artifact.headers()
    families: dict[tuple[str, int | None], set[float]] = {}
    for record in artifact.packed():
        site = record.site
        if site.name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            value = float(read_tensor(headers[f"{site.name}.global"]))
            families.setdefault((site.name.rpartition(".")[0], site.expert), set()).add(value)
    assert families and all(len(values) == 1 for values in families.values())
    assert len(set.union(*families.values())) > 1
    result = export_compressed_tensors(tmp_path / "a", tmp_path / "e", engine="vllm-cuda")
    assert result.verified == result.weights


@pytest.mark.parametrize(
    ("odd", "message"),
    [("k_proj", "q_proj/k_proj/v_proj.*global scales"), ("up_proj", "gate_proj/up_proj.*global")],
)
def test_fused_nvfp4_of_unequal_global_scales_is_refused_for_vllm(
    dense: Path, tmp_path: Path, odd: str, message: str
) -> None:
    records = Artifact.open(compress(dense, tmp_path / "a", "nvfp4")).records
    scales = {record.site.name: 2048.0 for record in records}
    assert check_engine("vllm-cuda", records, {}, scales)
    scales[next(name for name in scales if name.endswith(odd))] = 1024.0
    with pytest.raises(TargetError, match=message):
        check_engine("vllm-cuda", records, {}, scales)
    (note,) = [note for note in engine_notes(records, {}, scales) if "global scales" in note]
    assert note.startswith("not for vllm-cuda")


def test_blocks_that_end_within_a_fused_matrix_are_refused() -> None:
    records = [fake(f"model.layers.0.mlp.{n}_proj", 0, "fp8-b128x128") for n in ("gate", "up")]
    sized = [_with_shape(record, (192, 256)) for record in records]
    with pytest.raises(TargetError, match="192 rows end within a block") as caught:
        check_engine("vllm-cuda", sized, {})
    assert caught.value.where.endswith("gate_proj")
    last = [_with_shape(records[0], (256, 256)), _with_shape(records[1], (192, 256))]
    check_engine("vllm-cuda", last, {})


def _with_shape(record: Any, shape: tuple[int, int]) -> Any:
    from dataclasses import replace

    return replace(record, site=replace(record.site, shape=shape))


def test_every_engines_families_exist() -> None:
    formats = ["fp8-channel", "fp8-b128x128", "mxfp8", "mxfp4", "nvfp4"]
    known = {packed_layout(fake("m.layers.0.q", 0, fmt)).family for fmt in formats}
    for engine in ENGINES.values():
        assert {*engine.floats, *engine.expert_floats, *engine.to_bfloat16} <= known


# --- damage is found ---


@pytest.mark.parametrize("part", ["codes", "scales", "global"])
@pytest.mark.parametrize("package", [True, False])
def test_a_wrong_bit_is_found_by_either_reader(
    dense: Path, tmp_path: Path, part: str, package: bool
) -> None:
    if package:
        pytest.importorskip("compressed_tensors")
    artifact = compress(dense, tmp_path / "a", "nvfp4")
    export_compressed_tensors(artifact, tmp_path / "e", verify=False)
    places = tensors_of(tmp_path / "e", "model.layers.1.self_attn.o_proj")
    key = {"codes": "weight_packed", "scales": "weight_scale", "global": "weight_global_scale"}
    info = places[key[part]]
    data = bytearray(info.file.read_bytes())
    data[info.start] ^= 1
    info.file.write_bytes(data)
    with pytest.raises(ArtifactError, match="does not decode"):
        verify_export(Artifact.open(artifact), tmp_path / "e", torch.bfloat16, package=package)


def test_other_codes_with_the_same_products_are_not_the_same_weight() -> None:
    record = _with_shape(fake("model.layers.0.mlp.up_proj", 0, "mxfp4"), (1, 32))
    config = quantization_config([record], [])
    ones = {"codes": torch.full((1, 4), 0x22222222, dtype=torch.int32)}  # 1.0
    ones["scales"] = torch.full((1, 1), 128, dtype=torch.uint8)
    same = {"weight_packed": torch.full((1, 16), 0x22, dtype=torch.uint8)}
    same["weight_scale"] = torch.full((1, 1), 128, dtype=torch.uint8)
    twos = {"weight_packed": torch.full((1, 16), 0x44, dtype=torch.uint8)}  # 2.0, half the scale
    twos["weight_scale"] = torch.full((1, 1), 127, dtype=torch.uint8)
    assert _same_stored(record, ones, same, config)
    assert not _same_stored(record, ones, twos, config)


def test_a_wrong_code_written_removes_the_export(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = compress(dense, tmp_path / "a", "mxfp4")
    real = tensors.read_tensor

    def flipped(info: Any) -> torch.Tensor:
        tensor = real(info)
        if tensor.dtype == torch.int32:
            tensor[-1, -1] ^= 1 << 28
        return tensor

    monkeypatch.setattr(tensors, "read_tensor", flipped)
    with pytest.raises(ArtifactError, match="does not decode"):
        export_compressed_tensors(artifact, tmp_path / "e")
    assert not (tmp_path / "e").exists()
