"""Folded checkpoints compute what the original does, say what they are, and resume.

Models have loud channels (random gains of norms, loud rows of v and up), so that scales and orders
are not the identity.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bitnest import api
from bitnest.api.writing import write_checkpoint
from bitnest.artifact import Artifact
from bitnest.calibrate.data import CalibrationSet
from bitnest.checkpoint import Checkpoint
from bitnest.cli import app
from bitnest.errors import BitnestError, PlanError, RecipeError, UnsupportedModel
from bitnest.folds import parse_folds
from bitnest.packed.decoded import DecodedCheckpoint, open_checkpoint
from bitnest.quantize.folding import FoldedCheckpoint, fold_checkpoint, site_inputs
from bitnest.quantize.folding import fold as fold_module
from bitnest.quantize.folding.changes import Order, Scale, Turn, Unmapped
from bitnest.recipe_file import parse_recipe
from bitnest.sites import find_sites
from bitnest.skeleton import Skeleton
from bitnest.workdir import partial_directory
from tests.adapters import Q, adapter, pair
from tests.tiny import FAMILIES, VOCAB, Builder, build

WINDOWS = torch.randint(0, VOCAB, (8, 32), generator=torch.Generator().manual_seed(0))
TEXT = CalibrationSet(WINDOWS, ("text",) * 8, {}, "windows")
CPU = torch.device("cpu")
CALIBRATION: dict[str, Any] = {"samples": 4, "length": 32}
ALL = ["llama", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "mixtral", "qwen3_moe", "qwen2_moe",
       "deepseek_v3", "gpt_oss"]  # fmt: skip
ROTATES = ["llama", "qwen2", "phi3", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"]
fork = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def loud(tiny: Builder) -> Callable[..., Path]:
    """Makes checkpoints with loud channels, each once."""

    def make(family: str, **options: Any) -> Path:
        path = tiny.root / f"loud-{family}-{len(options)}"
        if path.exists():
            return path
        model = build(FAMILIES[family], **options)
        generator = torch.Generator().manual_seed(5)
        for name, tensor in model.named_parameters():
            if tensor.dim() == 1 and name.endswith("weight"):
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.data.copy_(noise if "gemma" in family else torch.exp2(1.5 * noise))
            elif tensor.dim() > 1 and ("up_proj" in name or "v_proj" in name):
                noise = torch.randn(tensor.shape[-2], generator=generator)
                tensor.data.mul_(torch.exp2(noise)[:, None])
        model.save_pretrained(path, max_shard_size=FAMILIES[family].shard)
        tiny.tokenizer.save_pretrained(path)
        return path

    return make


def logits(view: Checkpoint, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of the whole model, read through the view."""
    skeleton = Skeleton.build(view)
    skeleton.fill("", dtype=dtype, device=CPU)
    skeleton.model.tie_weights()
    with torch.no_grad():
        output: torch.Tensor = skeleton.model(input_ids=WINDOWS[:2], use_cache=False).logits
    return output


def folded(path: Path, *folds: str, **options: Any) -> FoldedCheckpoint:
    return fold_checkpoint(Checkpoint.open(path), folds, TEXT, **options)


def assert_same(view: FoldedCheckpoint) -> None:
    """The same logits in float32, where nothing is rounded."""
    want, got = logits(view.base), logits(view.keeping(view.tensors))
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("family", ALL)
def test_smoothing_and_order_keep_the_logits(loud: Callable[..., Path], family: str) -> None:
    view = folded(loud(family), "smooth-all=0.5", "permute")
    kinds = {what.split()[0] for what in view.record["done"]}
    assert kinds == {"smooth", "permute"}
    assert_same(view)
    scaled = [n for n, own in view.changes.items() if len(own) > 1]
    assert any(not torch.equal(view.read(n), view.base.read(n)) for n in scaled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral", "qwen3_moe", "gpt_oss"])
def test_powers_of_two_keep_the_logits_to_the_bit_in_16_bit(
    loud: Callable[..., Path], family: str, dtype: torch.dtype
) -> None:
    """Each product has the same mantissa and each sum the same terms, whatever it is rounded to."""
    view = folded(loud(family), "smooth-all=0.5")
    assert any("norm" in what for what in view.record["done"])
    assert torch.equal(logits(view, dtype), logits(view.base, dtype))


@pytest.mark.parametrize("family", ROTATES)
def test_rotation_keeps_the_logits(loud: Callable[..., Path], family: str) -> None:
    view = folded(loud(family), "permute", "rotate", "smooth-all=0.5")
    assert view.record["done"]["rotate residual stream"] == 1
    assert_same(view)
    tied = family == "qwen2"
    assert bool(view.copies) == tied
    table = "model.embed_tokens.weight"
    assert not torch.equal(view.read(table), view.base.read(table))
    if tied:
        assert not view.config["tie_word_embeddings"]
        assert not torch.equal(view.read(table), view.read("lm_head.weight"))


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gpt2", "gptj"])
def test_residual_rotation_is_refused_where_it_is_not_exact(
    loud: Callable[..., Path], family: str
) -> None:
    with pytest.raises(UnsupportedModel, match="cannot be rotated exactly") as error:
        folded(loud(family), "rotate")
    assert "rotate=heads" in str(error.value)
    view = folded(loud(family), "rotate=heads")
    assert_same(view)


def test_norm_with_an_offset_is_exact_once_its_readers_are_not_rounded(
    loud: Callable[..., Path],
) -> None:
    """(1 + w) / s - 1 is no bfloat16: what is rounded away goes into the columns that read it."""
    view = folded(loud("gemma2"), "smooth=0.5")
    norm, reader = "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(view.read(norm).double(), view.read_wide(norm))
    assert view.read(norm).dtype == view.read(reader).dtype == torch.bfloat16
    packed = view.keeping([reader])
    assert packed.read(reader).dtype == torch.float32
    torch.testing.assert_close(packed.read(reader).double(), view.read_wide(reader))
    assert not torch.equal(view.read(reader).double(), view.read_wide(reader))


@pytest.mark.parametrize("family", ["gemma2", "qwen3_moe", "qwen2_moe"])
def test_free_scales_are_exact_up_to_what_dense_tensors_hold(
    loud: Callable[..., Path], family: str
) -> None:
    view = folded(loud(family), "smooth-all-free=0.5", "permute")
    factors = [c for own in view.changes.values() for c in own if isinstance(c, Scale)]
    assert any(not c.exact for c in factors)
    assert_same(view)
    powers = folded(loud(family), "smooth-all=0.5", "permute")
    assert view.sha256 != powers.sha256


def test_every_expert_has_its_own_order_the_loudest_first(loud: Callable[..., Path]) -> None:
    view = folded(loud("qwen3_moe"), "smooth-all=0.5", "permute")
    skeleton = Skeleton.build(view)
    seen = site_inputs(skeleton, find_sites(skeleton), TEXT)
    orders = set()
    for expert in range(4):
        name = f"model.layers.0.mlp.experts.{expert}.down_proj"
        energy = seen[name].mean_square()
        assert (energy.diff() <= 0).all() and energy[0] > 1.5 * energy[-1]
        own = [c for c in view.changes[f"{name}.weight"] if isinstance(c, Order)]
        orders.add(tuple(own[0].index.tolist()))
    assert len(orders) == 4
    values = seen["model.layers.0.self_attn.o_proj"].mean_square().unflatten(0, (4, 16))
    kv = values.unflatten(0, (2, 2)).amax(1)  # two heads read the values of one
    assert (kv.diff() <= 0).all()


def test_smoothing_evens_out_what_matrices_read(loud: Callable[..., Path]) -> None:
    base = Checkpoint.open(loud("qwen3_moe"))
    crests = []
    for view in (base, folded(loud("qwen3_moe"), "smooth=0.5")):
        skeleton = Skeleton.build(view)
        seen = site_inputs(skeleton, find_sites(skeleton), TEXT)
        q = seen["model.layers.0.self_attn.q_proj"]
        assert q.tokens == WINDOWS.numel()
        crests.append(float(q.absmax.max() / q.mean_square().mean().sqrt()))
    assert crests[1] < 0.7 * crests[0]


def test_dgq_scales_only_channels_louder_than_the_baseline(loud: Callable[..., Path]) -> None:
    path = loud("llama", hidden_size=256, num_attention_heads=4)
    view = folded(path, "smooth=dgq")
    factors = [own[0].factor for n, own in view.changes.items() if "q_proj" in n]
    assert factors
    for factor in factors:
        assert (factor >= 1).all() and (factor > 1).sum() == 1  # 0.5 % of 256
    assert_same(view)


def test_what_cannot_be_folded_is_said(
    loud: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """GPT-OSS adds 1 to up before its product with the gate."""
    said: list[str] = []
    api.compress(loud("gpt_oss"), tmp_path / "a", format="int8-channel", fold=["smooth-all=0.5"],
                 data=[str(text)], advise=lambda a: said.append(a.text), **CALIBRATION)  # fmt: skip
    label = "smooth mlp.experts.gate_up_proj > mlp.experts.down_proj"
    assert len(said) == 1 and f"{label} (2 times)" in said[0]
    record = Artifact.open(tmp_path / "a").manifest["source"]["folded"]
    assert record["skipped"] == {label: 2} and record["asked"] == ["smooth-all=0.5"]
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "a")])
    assert "folded: smooth-all=0.5" in shown.stdout and f"not folded: 2 x {label}" in shown.stdout


@pytest.mark.parametrize(("family", "method"), [("qwen3_moe", "gptq"), ("llama", "rtn")])
def test_artifact_is_that_of_the_folded_checkpoint_written_out(
    loud: Callable[..., Path], text: Path, tmp_path: Path, family: str, method: str
) -> None:
    options: dict[str, Any] = {"format": "int4-g32", "data": [str(text)], "method": method}
    folds = ["smooth-all=0.5", "permute"]
    path = loud(family)
    api.compress(path, tmp_path / "one", fold=folds, **options, **CALIBRATION)
    view = fold_checkpoint(Checkpoint.open(path), folds, calibration(path, text))
    write_checkpoint(view, tmp_path / "written")
    api.compress(tmp_path / "written", tmp_path / "two", **options, **CALIBRATION)
    one, two = (DecodedCheckpoint.of(Artifact.open(tmp_path / n), whole=True)
                for n in ("one", "two"))  # fmt: skip
    assert set(one.tensors) == set(two.tensors)
    for name in one.tensors:
        assert torch.equal(one.read(name), two.read(name)), name


def calibration(path: Path, text: Path) -> CalibrationSet:
    from bitnest.api.texts import calibration_set, sources
    from bitnest.packed.loading import load_tokenizer

    return calibration_set(load_tokenizer(path), sources([str(text)]), 4, 32, 0)


def test_rotated_artifact_of_a_tied_model_opens_with_its_own_head(
    loud: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    path = loud("qwen2")
    result = api.compress(path, tmp_path / "a", format="int8-channel", fold=["rotate"],
                          method="rtn", **CALIBRATION)  # fmt: skip
    assert result.forecast is not None
    size = sum(f.stat().st_size for f in (tmp_path / "a").iterdir())
    assert size <= result.forecast["disk"] <= size + 4000
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    with torch.no_grad():
        got = model(input_ids=WINDOWS[:2]).logits
    want = logits(Checkpoint.open(path))
    assert (got - want).abs().max() < 0.05 * want.abs().max()
    assert not model.config.tie_word_embeddings


def digests(directory: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in directory.iterdir()}


class _Slow:
    """A progress that takes its time after every block that is compressed."""

    compressing = False

    def phase(self, name: str, total: int) -> None:
        self.compressing = name == "compressing"

    def step(self, amount: int = 1, note: str = "") -> None:
        if self.compressing:
            time.sleep(0.5)


def test_killed_run_resumes_to_the_same_bytes_without_measuring_again(
    loud: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = loud("mixtral", num_hidden_layers=3)
    options: dict[str, Any] = {"format": "int4-g32", "fold": ["permute", "smooth-all=0.5"],
                               "data": [str(text)], **CALIBRATION}  # fmt: skip
    api.compress(path, tmp_path / "whole", **options)
    out = tmp_path / "killed"
    process = fork.Process(target=lambda: api.compress(path, out, progress=_Slow(), **options))
    process.start()
    state = partial_directory(out) / "state"
    while not (state / "block-00000.json").exists():
        assert process.is_alive()
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
    process.join()
    assert (state / "folds.json").exists() and not out.exists()
    with pytest.raises(BitnestError, match="different: fold"):
        api.compress(path, out, **{**options, "fold": ["permute"]})

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the folds were chosen again")

    with monkeypatch.context() as patch:
        patch.setattr("bitnest.quantize.compress.fold_view", never)
        api.compress(path, out, **options)
    assert digests(out) == digests(tmp_path / "whole")
    assert not partial_directory(out).exists()
    with monkeypatch.context() as patch:  # and a finished one is known by its inputs
        patch.setattr("bitnest.quantize.compress.fold_view", never)
        api.compress(path, out, **options)


def test_damaged_folds_are_chosen_anew(tmp_path: Path, loud: Callable[..., Path]) -> None:
    from bitnest.quantize.folding.store import load, save

    view = folded(loud("mixtral"), "rotate", "permute", "smooth-all=0.5")
    save(tmp_path, "key", view.changes, view.record)
    found = load(tmp_path, "key")
    assert found is not None and load(tmp_path, "other") is None
    again = FoldedCheckpoint(
        view.path, view.config, view.tensors, view.base, view.folds, found[0], view.copies
    )
    assert again.sha256 == view.sha256 and found[1] == view.record
    for name in view.changes:
        assert torch.equal(again.read(name), view.read(name))
    nbytes = sum(info.nbytes for info in view.tensors.values())
    assert (tmp_path / "folds.safetensors").stat().st_size < 0.5 * nbytes
    with (tmp_path / "folds.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    assert load(tmp_path, "key") is None
    (tmp_path / "folds.json").write_text("{")
    assert load(tmp_path, "key") is None


def test_adapters_and_nested_artifacts_can_be_folded(
    loud: Callable[..., Path], tmp_path: Path, text: Path
) -> None:
    path = loud("qwen3_moe")
    lora = adapter(tmp_path / "lora", pair(Q, 64, 64))
    merged = open_checkpoint(path, [f"{lora}:0.5"])
    view = fold_checkpoint(merged, ["smooth-all=0.5", "permute"], TEXT)
    assert_same(view)
    assert set(view.origin()) >= {"merged", "folded"}
    assert view.scan() not in {merged.scan(), Checkpoint.open(path).scan()}
    api.compress(path, tmp_path / "nested", format="nest48-g32", method="rtn")
    decoded = open_checkpoint(tmp_path / "nested")
    assert_same(fold_checkpoint(decoded, ["smooth-all=0.5", "permute"], TEXT))
    api.compress(tmp_path / "nested", tmp_path / "again", format="int4-g32", fold=["permute"],
                 data=[str(text)], **CALIBRATION)  # fmt: skip
    source = Artifact.open(tmp_path / "again").manifest["source"]
    assert {"decoded", "folded"} <= set(source)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"fold": ["smooth"], "format": "int8-channel"}, "unknown fold 'smooth'"),
    ({"fold": ["smooth=loud"], "format": "int8-channel"}, "unknown fold"),
    ({"fold": ["smooth=1.5"], "format": "int8-channel"}, "from 0 to 1"),
    ({"fold": ["permute=1"], "format": "int8-channel"}, "unknown fold"),
    ({"fold": ["smooth=0.5", "smooth=dgq"], "format": "int8-channel"}, "contradict"),
    ({"fold": ["permute"], "bits": 4.0}, "a budget or a plan"),
    ({"fold": ["permute"]}, "a budget or a plan"),
    ({"fold": ["permute"], "max_kl": 0.1}, "a budget or a plan"),
    ({"fold": ["permute"], "nested": "4-8", "method": "rtn"}, "--nested"),
    ({"fold": ["permute"], "format": "int8-channel", "statistics": "here"}, "--statistics"),
    (
        {"fold": ["permute"], "format": "int8-channel", "rules": ["*.experts.0.*=drop"]},
        "dropped",
    ),
    ({"fold": ["permute"], "format": "int8-channel", "memory": 1 << 20}, "too little"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_does_not_go_together_is_refused_before_work(
    loud: Callable[..., Path], tmp_path: Path, text: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BitnestError, match=message) as error:
        api.compress(loud("qwen3_moe"), tmp_path / "out" / "a", data=[str(text)],
                     **{**CALIBRATION, **options})  # fmt: skip
    assert error.value.hint
    assert not (tmp_path / "out").exists()


def test_plan_is_refused(loud: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("rules: [{'kind:expert': int4-g32}]\n")
    with pytest.raises(RecipeError, match="a budget or a plan"):
        api.compress(loud("llama"), tmp_path / "a", plan=tmp_path / "plan.yaml", fold=["permute"])


def test_nothing_that_can_be_folded_is_an_error_that_leaves_nothing(
    tiny: Builder, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fold_module, "find_edges", lambda *_: [])
    with pytest.raises(RecipeError, match="nothing can be folded by smooth=dgq") as error:
        api.compress(tiny("llama"), tmp_path / "a", format="int8-channel", fold=["smooth=dgq"],
                     data=[str(text)], **CALIBRATION)  # fmt: skip
    assert "smooth-all" in (error.value.hint or "")
    assert list(tmp_path.iterdir()) == []


def test_even_channels_need_no_scales_and_that_is_said(
    tiny: Builder, tmp_path: Path, text: Path
) -> None:
    said: list[str] = []
    api.compress(tiny("llama"), tmp_path / "a", format="int8-channel", fold=["smooth=dgq"],
                 data=[str(text)], advise=lambda a: said.append(a.text), **CALIBRATION)  # fmt: skip
    assert said == ["no scales at 4 edges: channels are as loud as each other there"]
    assert Artifact.open(tmp_path / "a").manifest["source"]["folded"]["even"] == 4


def test_text_is_asked_for_where_it_is_needed(tiny: Builder) -> None:
    with pytest.raises(RecipeError, match="text"):
        fold_checkpoint(Checkpoint.open(tiny("llama")), ["permute"], None)


def test_folds_are_a_recipe_key(loud: Callable[..., Path], tmp_path: Path, text: Path) -> None:
    assert parse_recipe("fold: [smooth=0.5, permute]\n") == {"fold": ["smooth=0.5", "permute"]}
    with pytest.raises(PlanError, match="unknown fold"):
        parse_recipe("fold: [smoth=0.5]\n")
    for spelt in ("smooth=dgq", "smooth-all=0.5", "smooth-free=0.8", "smooth-all-free=dgq"):
        assert [str(f) for f in parse_folds([spelt])] == [spelt]
    assert [str(f) for f in parse_folds(["permute", "smooth=0.50", "rotate"])] == [
        "rotate", "smooth=0.5", "permute",
    ]  # fmt: skip
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"format: int8-channel\nfold: [permute]\ndata: {{texts: ['{text}'], samples: 4, "
        "length: 32}\n"
    )
    out = tmp_path / "a"
    done = CliRunner().invoke(
        app, ["compress", str(loud("llama")), "-o", str(out), "--recipe", str(recipe)]
    )
    assert done.exit_code == 0, done.output
    assert Artifact.open(out).manifest["resolved"]["fold"] == ["permute"]


def test_folded_artifact_exports_and_is_verified(
    loud: Callable[..., Path], tmp_path: Path, text: Path
) -> None:
    api.compress(loud("llama"), tmp_path / "a", format="int8-channel", fold=["smooth=0.5"],
                 data=[str(text)], **CALIBRATION)  # fmt: skip
    found = api.export(tmp_path / "a", tmp_path / "b")
    assert found.verified == 14


def test_channels_that_would_leave_their_tensor_are_not_mapped() -> None:
    swapped = Order(-2, torch.tensor([2, 3, 0, 1]))
    with pytest.raises(Unmapped):
        swapped.cut(None, slice(0, 2))
    inside = Order(-2, torch.tensor([1, 0, 2, 3]))
    kept = inside.cut(None, slice(0, 2))
    assert kept is not None and kept.index.tolist() == [1, 0]
    assert inside.cut(None, slice(2, 4)) is None
    turn = Turn(-2, 2, torch.ones(2, dtype=torch.int8), torch.tensor([1, 2]))
    with pytest.raises(Unmapped):
        turn.cut(None, slice(0, 2))


def test_fold_that_changes_the_function_is_undone_and_said(
    loud: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Orders that forget the gate: the proof refuses each, and nothing is left to fold."""
    from dataclasses import replace

    find = fold_module.find_edges
    monkeypatch.setattr(
        fold_module,
        "find_edges",
        lambda *a: [replace(e, companions=()) for e in find(*a) if "mlp.up" in e.label],
    )
    with pytest.raises(RecipeError, match=r"permute mlp.up_proj > mlp.down_proj"):
        folded(loud("llama"), "permute")
