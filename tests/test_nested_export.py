"""Nested artifacts read as checkpoints, compressed anew and exported as integers."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import bitnest
from bitnest import api
from bitnest.api import exporting
from bitnest.artifact import Artifact, site_tensors
from bitnest.checkpoint import Checkpoint
from bitnest.cli import main
from bitnest.errors import (
    ArtifactError,
    BitnestError,
    CheckpointError,
    FormatError,
    RecipeError,
    TargetError,
    UnsupportedModel,
)
from bitnest.export import compressed_tensors as exporter
from bitnest.formats import parse_format
from bitnest.kernels.decode import decode
from bitnest.packed.decoded import DecodedCheckpoint, open_checkpoint
from bitnest.packed.modules import hold_decoded
from bitnest.quantize.compress import prepare, run
from bitnest.recipe import Recipe, Rule
from bitnest.safetensors_io import read_header
from tests.tiny import FAMILIES, TIED, Builder

TOKENS = torch.arange(60)[None] % 50 * 6
FAMILY_FORMATS = {
    "llama": "nest248-g32@had16", "qwen2": "mwq2345-g32", "phi3": "any248-channel",
    "gpt2": "mat248-g32", "gemma2": "nest28-g16", "mixtral": "any2345678-channel",
    "qwen3_moe": "nest248-g32", "qwen2_moe": "mat2345678-g48@rhad16",
    "deepseek_v3": "nest2345678-g16", "gpt_oss": "nest248-g32@had16", "olmoe": "mwq248-g16",
}  # fmt: skip


def nested(source: Path, out: Path, fmt: str, *rules: str) -> Path:
    recipe = Recipe(format=fmt, method="rtn", rules=tuple(Rule.parse(rule) for rule in rules))
    run(prepare(Checkpoint.open(source), recipe, device="cpu"), out)
    return out


def logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
        hold_decoded(loaded)  # the products that the other side has
        found: torch.Tensor = loaded(TOKENS).logits.float()
    return found


def written(checkpoint: Checkpoint, out: Path) -> Path:
    """The dense checkpoint as the directory that it stands for."""
    out.mkdir()
    (out / "config.json").write_text(json.dumps(checkpoint.config))
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def moe(tiny: Builder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nested Qwen2-MoE whose first layer has a matrix kept dense and one of plain integers."""
    place = tmp_path_factory.mktemp("nested")
    return nested(
        tiny("qwen2_moe"), place / "moe", "nest248-g16@had16", "*.0.self_attn.o_proj=dense",
        "*.1.self_attn.o_proj=int8-g32",
    )  # fmt: skip


@pytest.fixture(scope="module")
def dense(tiny: Builder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nested(tiny("qwen3"), tmp_path_factory.mktemp("nested") / "dense", "nest248-g32@had16")


# ---------------------------------------------------------------- the checkpoint it stands for


@pytest.mark.parametrize("family", FAMILY_FORMATS)
def test_decoded_checkpoint_is_the_original_in_layout_and_the_artifact_in_values(
    tiny: Builder, tmp_path: Path, family: str
) -> None:
    ends = ["kind:embedding=int8-g32"] if family in {"mixtral", *TIED} - {"gpt2"} else []
    artifact = nested(tiny(family), tmp_path / "a", FAMILY_FORMATS[family], *ends)
    found, original = open_checkpoint(artifact), Checkpoint.open(tiny(family))
    assert isinstance(found, DecodedCheckpoint)
    assert found.sources and found.bits == parse_format(FAMILY_FORMATS[family]).bits
    assert {n: (i.dtype, i.shape, i.nbytes) for n, i in found.tensors.items()} == {
        n: (i.dtype, i.shape, i.nbytes) for n, i in original.tensors.items()
    }
    plain = written(found, tmp_path / "d")
    loaded = AutoModelForCausalLM.from_pretrained(plain, dtype="auto")
    headers = found.artifact.headers()
    for record in found.artifact.packed():
        fmt = parse_format(record.format)
        matrix = decode(site_tensors(record, headers), fmt, record.site.shape, loaded.dtype)
        assert torch.equal(record.site.view(loaded.get_parameter(record.site.path)), matrix)
    mine, theirs = logits(plain), logits(artifact)
    experts = any(record.site.expert is not None for record in found.artifact.packed())
    assert torch.equal(mine, theirs) or experts  # which transformers sums in another order
    assert (mine - theirs).norm() < 0.01 * theirs.norm()
    assert not torch.equal(mine, logits(tiny(family)))


def test_type_of_decoded_weights_is_the_models(tiny: Builder, tmp_path: Path) -> None:
    for family in ("qwen2", "gemma3", "qwen3"):
        artifact = nested(tiny(family), tmp_path / family, "nest248-g32")
        assert open_checkpoint(artifact).dtype == getattr(torch, FAMILIES[family].dtype)


def test_widest_width_that_is_there_is_read(dense: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(dense, cut)
    for file in cut.glob("*.w8.safetensors"):
        file.unlink()
    found = open_checkpoint(cut)
    assert isinstance(found, DecodedCheckpoint) and found.bits == 4
    name = "model.layers.1.mlp.down_proj"
    model: Any = bitnest.load(dense, bits=4)
    expected = model.get_submodule(name).packed.decode(torch.bfloat16)
    assert torch.equal(found.read(f"{name}.weight"), expected)
    whole = open_checkpoint(dense)
    assert not torch.equal(whole.read(f"{name}.weight"), found.read(f"{name}.weight"))
    assert whole.scan() != found.scan() == open_checkpoint(cut).scan()


def test_one_lost_plane_of_one_block_counts_for_all(dense: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(dense, cut)
    next(cut.glob("*.w4.safetensors")).unlink()
    found = open_checkpoint(cut)
    assert isinstance(found, DecodedCheckpoint) and found.bits == 2


def test_changed_plane_is_found_before_work(dense: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(dense, broken)
    file = next(broken.glob("*.w8.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match="checksum"):
        export(broken, tmp_path / "e")
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


def test_infinite_weight_is_refused(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = open_checkpoint(dense)

    def broken(*values: Any) -> torch.Tensor:
        weight = decode(*values)
        weight[0, 0] = torch.inf
        return weight

    monkeypatch.setattr("bitnest.packed.decoded.decode", broken)
    with pytest.raises(CheckpointError, match="infinite"):
        found.read("model.layers.0.mlp.up_proj.weight")


def test_sites_that_cannot_be_put_back_are_refused(dense: Path) -> None:
    found = open_checkpoint(dense)
    assert isinstance(found, DecodedCheckpoint)
    sites = [record.site for record in found.artifact.records]
    found.check_sites(sites)
    with pytest.raises(UnsupportedModel, match=sites[0].name):
        found.check_sites(sites[1:])


# ---------------------------------------------------------------- export --bits


def export(artifact: Path, out: Path, **options: Any) -> Any:
    options = {"bits": 4, "group": 32, "method": "rtn", "device": "cpu", **options}
    return api.export(artifact, out, **options)


def test_export_is_that_of_the_decoded_model_compressed(dense: Path, tmp_path: Path) -> None:
    plain = written(open_checkpoint(dense), tmp_path / "d")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(dense / name, plain / name)
    recipe = Recipe(format="int4-g32", method="rtn")
    run(prepare(Checkpoint.open(plain), recipe, device="cpu"), tmp_path / "a")
    api.export(tmp_path / "a", tmp_path / "expected")
    result = export(dense, tmp_path / "e")
    for file in (tmp_path / "expected").glob("*"):
        same = (tmp_path / "e" / file.name).read_bytes() == file.read_bytes()
        assert same or file.name == "config.json", file.name
    assert torch.equal(logits(tmp_path / "e"), logits(tmp_path / "a"))
    assert result.verified == result.weights == 14
    assert {p.name for p in tmp_path.iterdir()} == {"d", "a", "e", "expected"}


def test_result_says_what_it_cost(dense: Path, text: Path, tmp_path: Path) -> None:
    result = export(dense, tmp_path / "e", method="gptq", data=[str(text)], samples=4, length=32)
    made = result.requantised
    assert (made.decoded, made.format, made.method) == (8, "int4-g32", "gptq")
    assert set(made.errors) == {"attention", "mlp"}
    assert all(0 < error < 0.1 for error in made.errors.values())
    assert result.to_json()["requantised"]["errors"] == made.errors
    assert "8-bit width" in str(result) and "is added" in str(result)
    wide = export(dense, tmp_path / "w", bits=8)
    assert all(wide.requantised.errors[k] < made.errors[k] for k in made.errors)


def test_sites_keep_what_they_had_and_ends_are_dense(moe: Path, tmp_path: Path) -> None:
    result = export(moe, tmp_path / "e", bits=3, group=16)
    assert result.formats == {"int3-g16": 6 + 24 + 6, "int8-g32": 1}
    names = {n for f in (tmp_path / "e").glob("*.safetensors") for n in read_header(f)}
    assert "model.layers.0.self_attn.o_proj.weight" in names
    assert "model.layers.0.mlp.experts.3.up_proj.weight_packed" in names
    exported = json.loads((tmp_path / "e/config.json").read_text())["quantization_config"]
    assert exported["quant_method"] == "compressed-tensors"


def test_packed_ends_are_decoded_not_quantised(tiny: Builder, tmp_path: Path) -> None:
    rules = ["kind:embedding=nest248-g32"]
    artifact = nested(tiny("qwen2"), tmp_path / "a", "nest248-g32", *rules)
    export(artifact, tmp_path / "e")
    found = open_checkpoint(artifact)
    name = "model.embed_tokens.weight"
    headers = {
        n: i for f in (tmp_path / "e").glob("*.safetensors") for n, i in read_header(f).items()
    }
    from bitnest.safetensors_io import read_tensor

    assert torch.equal(read_tensor(headers[name]), found.read(name))


def test_missing_planes_are_said(dense: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(dense, cut)
    for file in cut.glob("*.w8.safetensors"):
        file.unlink()
    result = export(cut, tmp_path / "e", bits=8)
    assert result.requantised.decoded == 4
    assert any("decoded at 4 bits" in note and ".w8." in note for note in result.notes)
    assert any("wider than the 4 bits" in note for note in result.notes)


def test_group_of_a_whole_row(dense: Path, tmp_path: Path) -> None:
    assert set(export(dense, tmp_path / "e", group="channel").formats) == {"int4-channel"}
    assert set(export(dense, tmp_path / "f", group="g16").formats) == {"int4-g16"}


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bits": 9}, RecipeError, "2 to 8 bits"),
        ({"bits": 1}, RecipeError, "2 to 8 bits"),
        ({"group": 7}, FormatError, "group"),
        ({"group": 0}, FormatError, "group"),
        ({"group": "wide"}, RecipeError, "no number"),
        ({"group": 128}, TargetError, "do not divide"),
        ({"engine": "tensorrt"}, TargetError, "unknown engine"),
        ({"engine": "vllm-cpu", "bits": 3}, TargetError, "runs 4-bit"),
        ({"engine": "vllm-cuda", "group": 16}, TargetError, "groups of"),
        ({"method": "awq"}, RecipeError, "unknown method"),
        ({"bits": None}, RecipeError, "without --bits"),
        ({"bits": None, "group": None, "method": "gptq"}, TargetError, "even grid"),
    ],
)
def test_refused_before_work(
    dense: Path, tmp_path: Path, options: dict[str, Any], error: type[BitnestError], message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def never(*_: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(DecodedCheckpoint, "read", never)
    monkeypatch.setattr(DecodedCheckpoint, "scan", never)
    with pytest.raises(error, match=message) as caught:
        export(dense, tmp_path / "e", **options)
    assert caught.value.hint and "--rule" not in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_without_bits_the_hint_names_them(dense: Path, moe: Path, tmp_path: Path) -> None:
    for artifact in (dense, moe):
        with pytest.raises(TargetError) as caught:
            api.export(artifact, tmp_path / "e")
        assert "--bits 4" in caught.value.hint


def test_bits_where_nothing_is_nested(tiny: Builder, tmp_path: Path) -> None:
    plain = nested(tiny("qwen3"), tmp_path / "a", "int4-g32")
    with pytest.raises(RecipeError, match="nothing here is nested") as caught:
        export(plain, tmp_path / "e")
    assert "leave out --bits" in caught.value.hint
    with pytest.raises(ArtifactError, match="not a bitnest artifact"):
        export(tiny("qwen3"), tmp_path / "e")


def test_families_without_packed_kernels_are_refused_before_work(
    tiny: Builder, tmp_path: Path
) -> None:
    artifact = nested(tiny("gpt_oss"), tmp_path / "a", "nest248-g32")
    with pytest.raises(TargetError, match="all experts in one tensor"):
        export(artifact, tmp_path / "e")


def test_output_in_the_way_is_kept(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "e").mkdir()
    (tmp_path / "e/precious").write_text("kept")
    with pytest.raises(ArtifactError, match="in the way"):
        export(dense, tmp_path / "e")
    assert [p.name for p in tmp_path.rglob("*")] == ["e", "precious"]


def test_disk_is_asked_for_both_copies(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitnest.quantize.preflight.free_bytes", lambda _: 100_000)
    with pytest.raises(ArtifactError, match="of disk, 100,000 are free"):
        export(dense, tmp_path / "e")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- all or nothing


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def stop(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("fail", [full, stop])
@pytest.mark.parametrize("where", ["write", "verify", "decode"])
def test_nothing_is_left_after_an_error(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str,
    fail: Callable[..., Any],
) -> None:  # fmt: skip
    real, calls = DecodedCheckpoint.read, []

    def later(self: DecodedCheckpoint, name: str) -> torch.Tensor:
        calls.append(name)
        if len(calls) > 9:  # in the second block
            fail()
        return real(self, name)

    if where == "decode":
        monkeypatch.setattr(DecodedCheckpoint, "read", later)
    else:
        monkeypatch.setattr(exporter, "write_file" if where == "write" else "verify_export", fail)
    with pytest.raises((ArtifactError, KeyboardInterrupt)):
        export(dense, tmp_path / "e")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from bitnest import api
from bitnest.quantize import compress
real = compress._Run._store
def store(self, layer, solved, rounders):
    real(self, layer, solved, rounders)
    if layer == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
compress._Run._store = store
api.export(sys.argv[1], sys.argv[2], bits=4, group=int(sys.argv[4]), method="rtn", device="cpu")
"""


def killed(artifact: Path, out: Path, group: int = 32) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(artifact), str(out), "0", str(group)], check=False
    )
    assert done.returncode == -signal.SIGKILL


def test_killed_run_is_resumed_and_gives_the_same_bytes(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(dense, tmp_path / "whole")
    killed(dense, tmp_path / "e")
    assert not (tmp_path / "e").exists()
    real, seen = DecodedCheckpoint.read, []

    def read(self: DecodedCheckpoint, name: str) -> torch.Tensor:
        seen.append(name)
        return real(self, name)

    monkeypatch.setattr(DecodedCheckpoint, "read", read)
    export(dense, tmp_path / "e")
    assert not any("layers.0.mlp" in name for name in seen)
    assert any("layers.1.mlp" in name for name in seen)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "e" / file.name).read_bytes() == file.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"whole", "e"}


def test_leftovers_of_another_command_are_replaced(dense: Path, tmp_path: Path) -> None:
    killed(dense, tmp_path / "e", group=16)
    assert set(export(dense, tmp_path / "e").formats) == {"int4-g32"}
    assert [p.name for p in tmp_path.iterdir()] == ["e"]


def test_two_at_once_are_refused(dense: Path, tmp_path: Path) -> None:
    with exporting._workshop(tmp_path / "e") as place:
        (place / "precious").write_text("kept")
        with pytest.raises(ArtifactError, match="another process"):
            export(dense, tmp_path / "e")
        assert (place / "precious").read_text() == "kept"


# ---------------------------------------------------------------- compress NESTED


def test_compressing_a_nested_artifact_is_compressing_what_it_decodes_to(
    moe: Path, text: Path, tmp_path: Path
) -> None:
    plain = written(open_checkpoint(moe), tmp_path / "d")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(moe / name, plain / name)
    options: dict[str, Any] = {
        "format": "int3-g32", "data": [str(text)], "samples": 4, "length": 32, "device": "cpu",
    }  # fmt: skip
    for source, out in ((moe, "a"), (plain, "b")):
        api.compress(source, tmp_path / out, **options)
    for file in (tmp_path / "b").glob("packed-*"):
        assert (tmp_path / "a" / file.name).read_bytes() == file.read_bytes()
    manifest = Artifact.open(tmp_path / "a").manifest["source"]
    original = Artifact.open(moe).manifest["source"]
    assert manifest["decoded"] == {"bits": 8, "source": original}
    assert "decoded" not in original


def test_a_budget_can_be_planned_from_a_nested_artifact(
    dense: Path, text: Path, tmp_path: Path
) -> None:
    result = api.compress(
        dense, tmp_path / "a", bits=3.5, data=[str(text)], samples=4, length=32, device="cpu",
        statistics=None, candidates=["int2-g32", "int4-g32"],
    )  # fmt: skip
    assert result.bits <= 3.5 and len({group.format for group in result.groups}) > 1


def test_fused_and_transposed_experts_are_compressed_again(tiny: Builder, tmp_path: Path) -> None:
    artifact = nested(tiny("gpt_oss"), tmp_path / "a", "nest248-g32@had16")
    api.compress(artifact, tmp_path / "b", format="int8-g32", method="rtn", device="cpu")
    near, far = logits(artifact), logits(tiny("gpt_oss"))
    again = logits(tmp_path / "b")
    assert (again - near).norm() < 0.05 * far.norm()


# ---------------------------------------------------------------- the command line


def test_commands_say_what_they_do(
    dense: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def command(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bitnest", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), *capsys.readouterr()

    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = command(
        "export", dense, "--bits", 4, "--group", 32, "--method", "rtn", "--json",
        "-o", tmp_path / "e",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["requantised"]["decoded"] == 8
    code, _, err = command("export", dense, "--bits", 9, "-o", tmp_path / "f")
    assert code == 2 and "2 to 8 bits" in err
    code, _, err = command(
        "compress", dense, "--format", "int4-g32", "--method", "rtn", "-o", tmp_path / "a"
    )
    assert code == 0, err
    assert "decoded at 8 bits: the error of that width is added" in err
