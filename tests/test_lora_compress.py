"""LoRA merged before calibration: what is compressed is the merged model, and says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from bitnest import api
from bitnest.artifact import Artifact
from bitnest.checkpoint import Checkpoint
from bitnest.cli import app
from bitnest.errors import ArtifactError, BitnestError, CheckpointError, StatisticsError
from bitnest.statistics import Statistics
from tests.adapters import Q, adapter, float32, pair
from tests.tiny import Builder

UP = "model.layers.1.mlp.experts.2.up_proj"
CALIBRATION: dict[str, Any] = {"samples": 4, "length": 32}
MEASURING: dict[str, Any] = {"fisher_windows": 2, "probes": 2, "probe_windows": 2, **CALIBRATION}


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return adapter(tmp_path / "code", {**pair(Q, 64, 64), **pair(UP, 40, 64)})


def sites(path: Path) -> dict[str, torch.Tensor]:
    from bitnest.packed.decoded import DecodedCheckpoint

    view = DecodedCheckpoint.of(Artifact.open(path), whole=True)
    return {name: view.read(name) for name in view.tensors}


def test_artifact_is_that_of_the_merged_checkpoint(
    tiny: Builder, tmp_path: Path, text: Path, lora: Path
) -> None:
    base = float32(tiny, "qwen3_moe")
    api.merge(base, [f"{lora}:0.5"], tmp_path / "merged")
    options: dict[str, Any] = {"format": "int4-g32", "data": [str(text)], **CALIBRATION}
    api.compress(tmp_path / "merged", tmp_path / "two", **options)
    api.compress(base, tmp_path / "one", lora=[f"{lora}:0.5"], **options)
    api.compress(base, tmp_path / "none", **options)
    one, two, none = (sites(tmp_path / name) for name in ("one", "two", "none"))
    assert all(torch.equal(one[name], two[name]) for name in two)
    assert not torch.equal(one[f"{UP}.weight"], none[f"{UP}.weight"])
    source = Artifact.open(tmp_path / "one").manifest["source"]
    assert [(a["adapter"], a["scale"]) for a in source["merged"]] == [("code", 0.5)]
    assert source["sha256"] != Artifact.open(tmp_path / "none").manifest["source"]["sha256"]
    assert not (tmp_path / "one" / "merged.json").exists()


def test_the_resolved_recipe_names_the_adapters(tiny: Builder, tmp_path: Path, lora: Path) -> None:
    base = float32(tiny, "qwen3_moe")
    said = f"{lora}:0.5"
    api.compress(base, tmp_path / "a", lora=[said], format="int4-g32", method="rtn")
    recipe = Artifact.open(tmp_path / "a").manifest["resolved"]
    assert recipe["lora"] == [said]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    done = CliRunner().invoke(
        app,
        ["compress", str(base), "--recipe", str(tmp_path / "r.yaml"), "-o", str(tmp_path / "b")],
    )
    assert done.exit_code == 0, done.output
    first, second = (Artifact.open(tmp_path / name) for name in "ab")
    packed = [name for name in first.manifest["files"] if name.startswith("packed")]
    assert packed and all(
        first.manifest["files"][name] == second.manifest["files"][name] for name in packed
    )


def test_killed_run_resumes_with_the_same_adapters_only(
    tiny: Builder, tmp_path: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitnest.artifact import Writer

    base = tiny("qwen3_moe")
    options: dict[str, Any] = {"format": "int4-g32", "method": "rtn"}
    write = Writer.write_block

    def failing(self: Writer, layer: int, *args: Any) -> None:
        if layer == 1:
            raise KeyboardInterrupt
        write(self, layer, *args)

    monkeypatch.setattr(Writer, "write_block", failing)
    with pytest.raises(KeyboardInterrupt):
        api.compress(base, tmp_path / "out", lora=[str(lora)], **options)
    monkeypatch.undo()
    for other in ([], [f"{lora}:2"]):
        with pytest.raises(ArtifactError, match="other inputs"):
            api.compress(base, tmp_path / "out", lora=other, **options)
    done = api.compress(base, tmp_path / "out", lora=[str(lora)], **options)
    again = api.compress(base, tmp_path / "again", lora=[str(lora)], **options)
    for file in sorted(p.name for p in done.path.glob("*.safetensors")):
        assert (done.path / file).read_bytes() == (again.path / file).read_bytes()


def test_statistics_are_of_the_merged_model_alone(
    tiny: Builder, tmp_path: Path, text: Path, lora: Path
) -> None:
    base, loras = tiny("qwen3_moe"), [f"{lora}:0.5"]
    formats = ["int4-g32", "int8-g32"]
    options: dict[str, Any] = {"data": [str(text)], "formats": formats, **MEASURING}
    plain = api.analyze(base, tmp_path / "plain", **options)
    own = api.analyze(base, "qwen3_moe+code-x0.5-statistics", lora=loras, **options)
    assert [a["scale"] for a in own.header["source"]["merged"]] == [0.5]
    assert "merged" not in plain.header["source"]
    found = api.plan(base, bits=4.5, lora=loras)  # finds them by their name
    assert found.plan.source == own.header["source"]["sha256"]
    wrong: list[tuple[list[str], Path]] = [
        (loras, plain.path), ([], own.path), ([str(lora)], own.path)
    ]  # fmt: skip
    for asked, place in wrong:
        with pytest.raises(StatisticsError, match="of another model"):
            api.plan(base, bits=4.5, lora=asked, statistics=place)
        with pytest.raises(StatisticsError, match="of another model"):
            api.compress(
                base, tmp_path / "out", bits=4.5, lora=asked, statistics=place, **CALIBRATION
            )
        with pytest.raises(BitnestError, match="of another model"):
            api.compress(base, tmp_path / "out", format="int4-g32", lora=asked, statistics=place,
                         **CALIBRATION)  # fmt: skip
    assert not (tmp_path / "out").exists()
    result = api.compress(base, tmp_path / "fine", bits=4.5, lora=loras, **CALIBRATION)
    assert Artifact.open(result.path).manifest["plan"]
    with pytest.raises(BitnestError, match="of another model"):
        api.compress(base, tmp_path / "out", plan=found.plan, **CALIBRATION)


def test_limit_is_measured_against_the_merged_model(
    tiny: Builder, tmp_path: Path, text: Path, lora: Path
) -> None:
    base, loud = tiny("qwen3_moe"), [f"{lora}:20"]
    options: dict[str, Any] = {"data": [str(text)], "formats": ["int4-g32", "int8-g32"]}
    api.analyze(base, tmp_path / "st", lora=loud, **options, **MEASURING)
    result = api.compress(base, tmp_path / "out", max_kl=0.05, lora=loud, **CALIBRATION,
                          statistics=tmp_path / "st", check=[str(text)])  # fmt: skip
    assert result.measured is not None
    named = [f"words={text}"]
    far = api.evaluate([tmp_path / "out"], against=base, data=named, window=32, windows=4)
    near = api.evaluate([tmp_path / "out"], against=base, against_lora=loud, data=named, window=32,
                        windows=4)  # fmt: skip
    kl = [report.rows[1].scores[0].kl for report in (near, far)]
    assert kl[0] is not None and kl[1] is not None
    assert kl[0].mean < 0.05 < kl[1].mean
    assert near.rows[0].model == "qwen3_moe+code-x20"


def test_commands_name_what_they_make_after_the_adapter(
    tiny: Builder, text: Path, lora: Path
) -> None:
    base = str(tiny("qwen3_moe"))
    run = CliRunner().invoke
    made = run(app, ["compress", base, "--lora", str(lora), "--method", "rtn", "--bits", "4"])
    assert made.exit_code == 0, made.output
    assert Path("qwen3_moe+code-4bit/bitnest.json").exists()
    assert f"--against-lora {lora}" in made.stderr
    assert "merged: code x 1" in run(app, ["inspect", "qwen3_moe+code-4bit"]).output
    args = ["--samples", "4", "--length", "32", "--format", "int4-g32", "--data", str(text)]
    more = ["--fisher-windows", "2", "--probes", "2", "--probe-windows", "2"]
    made = run(app, ["analyze", base, "--lora", str(lora), *args, *more])
    assert made.exit_code == 0, made.output
    assert Statistics.open("qwen3_moe+code-statistics").header["source"]["merged"]
    planned = run(app, ["plan", base, "--lora", str(lora), "--bits", "4.2", "-o", "p.yaml"])
    assert planned.exit_code == 0, planned.output
    assert f"bitnest compress {base} --lora {lora} --plan p.yaml" in planned.stderr
    Path("r.yaml").write_text(f"lora: [{lora}]\nformat: int4-g32\nfit: {{method: rtn}}\n")
    made = run(app, ["compress", base, "--recipe", "r.yaml", "-o", "r", "--json"])
    assert made.exit_code == 0, made.output
    assert Artifact.open(Path("r")).manifest["source"]["merged"][0]["adapter"] == "code"


@pytest.mark.parametrize(
    ("module", "shape", "said"),
    [(Q, (64, 32), "is for shape"), ("model.layers.9.self_attn.q_proj", (64, 64), "layers.9")],
)
def test_adapter_of_another_base_is_refused_before_work(
    tiny: Builder, tmp_path: Path, module: str, shape: tuple[int, int], said: str
) -> None:
    base, own = tiny("qwen3_moe"), str(adapter(tmp_path / "a", pair(module, *shape)))
    verbs: list[Any] = [
        lambda: api.compress(base, tmp_path / "out", bits=4, lora=[own]),
        lambda: api.analyze(base, tmp_path / "out", lora=[own]),
        lambda: api.plan(base, lora=[own]),
        lambda: api.evaluate([base], lora=[own]),
        lambda: api.load(base, lora=[own]),
    ]
    for verb in verbs:
        with pytest.raises(CheckpointError, match=said) as caught:
            verb()
        assert caught.value.where and caught.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    args = ["compress", str(base), "--lora", own, "-o", str(tmp_path / "out"), "--json"]
    failed = CliRunner().invoke(app, args)
    assert isinstance(failed.exception, CheckpointError)  # `main` makes it exit code 2


def test_dense_model_is_loaded_as_merge_would_write_it(tiny: Builder, tmp_path: Path) -> None:
    """Fused experts, a transposed layer, a bias, types: parameter by parameter."""
    names = {"qwen3_moe": UP, "gpt2": "transformer.h.0.attn.c_attn"}
    for family, module in names.items():
        base = tiny(family)
        shape = (192, 64) if family == "gpt2" else (40, 64)
        tensors = pair(module, *shape)
        if family == "gpt2":
            tensors[f"{module}.lora_B.bias"] = torch.ones(192)
        own = adapter(tmp_path / family, tensors)
        api.merge(base, [str(own)], tmp_path / f"{family}-merged")
        wanted = api.load(tmp_path / f"{family}-merged").state_dict()
        found, plain = api.load(base, lora=[str(own)]).state_dict(), api.load(base).state_dict()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert any(not torch.equal(found[name], plain[name]) for name in wanted)
        assert found.keys() == wanted.keys() and Checkpoint.open(base).tensors
