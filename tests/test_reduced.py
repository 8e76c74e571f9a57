"""Models with fewer experts and blocks: against hand-built smaller ones and formulas in float64."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch.nn import functional as F
from typer.testing import CliRunner

from bitnest import api
from bitnest.api.writing import write_checkpoint
from bitnest.calibrate.collector import dense_weights, reference_experts
from bitnest.calibrate.cover import cover
from bitnest.calibrate.data import CalibrationSet
from bitnest.calibrate.observe import Observer
from bitnest.checkpoint import Checkpoint
from bitnest.cli import app
from bitnest.errors import ArtifactError, CheckpointError, TargetError, UnsupportedModel
from bitnest.export.compressed_tensors import export_compressed_tensors
from bitnest.export.plan_targets import open_target
from bitnest.lora import Adapter
from bitnest.merged import MergedCheckpoint
from bitnest.packed.loading import load_model, load_tokenizer
from bitnest.progress import Silent
from bitnest.quantize.compress import prepare, run, with_calibration
from bitnest.quantize.transforms.online import attach_experts
from bitnest.quantize.transforms.per_matrix import Hadamard
from bitnest.recipe import Recipe
from bitnest.reduced import LayerExperts, Own, ReducedCheckpoint, Reduction
from bitnest.skeleton import Skeleton
from tests.tiny import Builder

TOKENS = torch.arange(24).view(2, 12) * 7 % 300


def keep(*experts: int) -> LayerExperts:
    """A layer of these experts, unchanged."""
    return LayerExperts(tuple(Own((e,)) for e in experts), tuple(range(len(experts))), experts)


def dense(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a checkpoint with its weights."""
    skeleton = Skeleton.build(checkpoint)
    skeleton.fill("", dtype=dtype, device=torch.device("cpu"))
    skeleton.model.tie_weights()
    return skeleton.model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS).logits.float()


def smaller(path: Path, experts: tuple[int, ...], blocks: tuple[int, ...] = (0, 1)) -> Any:
    """A model of transformers with those experts everywhere and those blocks, copied by hand."""
    full = load_model(path, dtype=torch.float32)
    config = transformers.AutoConfig.from_pretrained(path)
    text = config.to_dict()
    name = next(k for k in ("num_experts", "num_local_experts", "n_routed_experts") if k in text)
    setattr(config, name, len(experts))
    config.num_hidden_layers = len(blocks)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[b] for b in blocks]
    if hasattr(config, "first_k_dense_replace"):
        config.first_k_dense_replace = sum(b < config.first_k_dense_replace for b in blocks)
    config.dtype = torch.float32
    model = transformers.AutoModelForCausalLM.from_config(config)
    state, new = full.state_dict(), {}
    for key in model.state_dict():
        parts = key.split(".")
        if "layers" in parts:
            place = parts.index("layers") + 1
            parts[place] = str(blocks[int(parts[place])])
        value = state[".".join(parts)]
        router = any(r in key for r in ("mlp.gate.", "mlp.router."))
        if ".mlp.experts." in key or router:
            value = value[list(experts)]
        new[key] = value
    model.load_state_dict(new)
    return model.eval()


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "qwen2_moe", "olmoe"])
def test_kept_experts_are_a_smaller_model_of_the_family(tiny: Builder, family: str) -> None:
    path = tiny(family)
    layers = {0: keep(3, 0, 2), 1: keep(3, 0, 2)}
    reduced = ReducedCheckpoint.of(Checkpoint.open(path), Reduction(layers))
    assert reduced.ordinary
    assert torch.equal(logits(dense(reduced)), logits(smaller(path, (3, 0, 2))))


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_shared_experts_and_score_corrections_stay_with_their_rows(
    tiny: Builder, family: str
) -> None:
    path = tiny(family, "plain", n_group=1, topk_group=1)
    reduced = ReducedCheckpoint.of(Checkpoint.open(path), Reduction({1: keep(1, 2, 3)}))
    assert reduced.config["n_routed_experts"] == 3
    assert torch.equal(logits(dense(reduced)), logits(smaller(path, (1, 2, 3))))


def test_rows_of_a_group_stay_in_it(tiny: Builder) -> None:
    path = tiny("deepseek_v3", "groups", n_routed_experts=8)
    base = Checkpoint.open(path)
    reduced = ReducedCheckpoint.of(base, Reduction({1: keep(1, 3, 4, 6)}))
    assert torch.equal(logits(dense(reduced)), logits(smaller(path, (1, 3, 4, 6))))
    for experts in [(0, 1, 2, 4), (0, 1, 4), (0, 4)]:
        with pytest.raises(UnsupportedModel, match="groups"):
            ReducedCheckpoint.of(base, Reduction({1: keep(*experts)}))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v2"])
def test_dropped_block_is_a_shallower_model(tiny: Builder, family: str) -> None:
    options = {"first_k_dense_replace": 2} if family == "deepseek_v2" else {}
    path = tiny(family, "four", num_hidden_layers=4, **options)
    reduced = ReducedCheckpoint.of(Checkpoint.open(path), Reduction({}, dropped=(1,)))
    assert torch.equal(logits(dense(reduced)), logits(smaller(path, (0, 1, 2, 3), (0, 2, 3))))


def test_experts_and_blocks_go_together(tiny: Builder) -> None:
    path = tiny("mixtral", "four", num_hidden_layers=4)
    layers = {b: keep(0, 3) for b in (0, 3)}
    reduced = ReducedCheckpoint.of(Checkpoint.open(path), Reduction(layers, dropped=(1, 2)))
    assert reduced.config["num_local_experts"] == 2
    assert torch.equal(logits(dense(reduced)), logits(smaller(path, (0, 3), (0, 3))))


MIXED = (0, "zero", 1, "copy", 1, "constant:1", 2, "constant:0")
CHOICES = torch.tensor([[0, 2], [1, 0], [3, 6], [2, 4], [1, 1], [5, 7], [3, 1], [4, 6]])


def mixed(tiny: Builder, family: str = "qwen3_moe") -> tuple[Checkpoint, Reduction]:
    """Eight experts; block 0 with rows of every kind, block 1 with three experts."""
    key = "num_local_experts" if family in ("mixtral", "gpt_oss") else "num_experts"
    base = Checkpoint.open(tiny(family, "eight", **{key: 8}))
    layer = LayerExperts((Own((0,)), Own((2,)), Own((6,))), MIXED, tuple(range(8)))
    noise = torch.randn(2, 64, generator=torch.Generator().manual_seed(3))
    tensors = {"model.layers.0.mlp.experts.constants": noise.bfloat16()}
    return base, Reduction({0: layer, 1: keep(5, 1, 7)}, tensors=tensors)


def by_hand(module: Any, weight: Any, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """What experts with the rows MIXED give for CHOICES, token by token in float64."""
    out = torch.zeros_like(x, dtype=torch.float64)
    for t, (chosen, own) in enumerate(zip(CHOICES.tolist(), gates.double(), strict=True)):
        off = [MIXED[row] == "zero" for row in chosen]
        left = sum(g for g, o in zip(own, off, strict=True) if not o)
        for row, g, o in zip(chosen, own, off, strict=True):
            kind = MIXED[row]
            if o:
                continue
            g = g * own.sum() / left
            if kind == "copy":
                out[t] += g * x[t].double()
            elif isinstance(kind, str):
                out[t] += g * module.constants[int(kind[-1])].double()
            else:
                up = F.linear(x[t].double(), weight(kind, "gate_up_proj").double())
                a, b = up.chunk(2)
                out[t] += g * F.linear(F.silu(a) * b, weight(kind, "down_proj").double())
    return out


@pytest.mark.parametrize("path", ["eager", "batched_mm", "grouped_mm", "reference", "online"])
def test_rows_mean_the_same_in_every_way_to_run_experts(tiny: Builder, path: str) -> None:
    base, reduction = mixed(tiny)
    model = dense(ReducedCheckpoint.of(base, reduction))
    module = model.model.layers[0].mlp.experts
    x, gates = torch.randn(8, 64), torch.rand(8, 2)
    want = by_hand(module, dense_weights(module), x, gates)
    if path == "reference":
        with reference_experts([module]), torch.no_grad():
            got = module(x, CHOICES, gates)
    else:
        if path == "online":
            attach_experts(module, down=Hadamard(8, 1))
        else:
            model.config._experts_implementation = path
            module.config._experts_implementation = path
        with torch.no_grad():
            got = module(x, CHOICES, gates)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_packed_experts_read_rows_alike(tiny: Builder, family: str, tmp_path: Path) -> None:
    base, reduction = mixed(tiny, family)
    reduced = ReducedCheckpoint.of(base, reduction)
    assert not reduced.ordinary
    artifact = compressed(reduced, tmp_path / "a")
    model = load_model(artifact, dtype=torch.float32)
    module = model.model.layers[0].mlp.experts
    x, gates = torch.randn(8, 64), torch.rand(8, 2)
    want = by_hand(module, lambda e, p: module.packed_weight(e, p, torch.float64), x, gates)
    with torch.no_grad():
        got = module(x, CHOICES, gates)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    assert model.model.layers[1].mlp.experts.num_experts == 3
    full, packed = logits(dense(reduced)), logits(model)
    assert F.cosine_similarity(full, packed, dim=-1).median() > 0.999  # 8 bits; some choices flip


def compressed(checkpoint: Checkpoint, out: Path, method: str = "rtn", **recipe: Any) -> Path:
    """An artifact of the checkpoint."""
    job = prepare(checkpoint, Recipe(**{"format": "int8-g32", "method": method, **recipe}))
    if method != "rtn":
        tokens = torch.randint(0, 300, (8, 32), generator=torch.Generator().manual_seed(0))
        job = with_calibration(job, CalibrationSet(tokens, ("t",) * 8, {"t": 8}, "0"))
    run(job, out)
    return out


def test_calibrated_artifact_of_unequal_layers_evaluates(
    tiny: Builder, tmp_path: Path, text: Path
) -> None:
    base, reduction = mixed(tiny)
    reduced = ReducedCheckpoint.of(base, reduction)
    out = compressed(reduced, tmp_path / "a", "gptq")
    config = json.loads((out / "config.json").read_text())
    assert config["num_local_experts"] == 8 and config["bitnest_experts"]["1"]["rows"] == [0, 1, 2]
    manifest = json.loads((out / "bitnest.json").read_text())
    assert manifest["source"]["reduced"]["sha256"] == reduction.sha256
    asked = ["eval", str(out), "--data", str(text), "--window", "32", "--windows", "2", "--json"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    full, packed = logits(dense(reduced)), logits(load_model(out, dtype=torch.float32))
    assert F.cosine_similarity(full, packed, dim=-1).median() > 0.999


@pytest.mark.parametrize("path", ["eager", "batched_mm", "grouped_mm"])
def test_biases_of_no_expert_are_not_added(tiny: Builder, path: str) -> None:
    """gpt_oss: experts with biases, which a choice of none must not bring in."""
    base, reduction = mixed(tiny, "gpt_oss")
    model = dense(ReducedCheckpoint.of(base, reduction))
    module = model.model.layers[0].mlp.experts
    x, gates = torch.randn(8, 64), torch.rand(8, 2)
    with torch.no_grad():
        with reference_experts([module]):
            want = module(x, CHOICES, gates)
        module.config._experts_implementation = path
        got = module(x, CHOICES, gates)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    nothing = module(x, torch.full((8, 2), 1), gates)
    assert not nothing.any()


def test_calibration_counts_tokens_by_expert_not_by_row(tiny: Builder) -> None:
    base, reduction = mixed(tiny)
    skeleton = Skeleton.build(ReducedCheckpoint.of(base, reduction))
    skeleton.fill("", dtype=torch.float32, device=torch.device("cpu"))
    module = skeleton.model.model.layers[0].mlp.experts
    with Observer(skeleton.blocks[0], "model.layers.0", labels=1, full=False) as observer:
        observer.before_batch(0, 0)
        module(torch.randn(8, 64), CHOICES, torch.rand(8, 2))
    sums = observer.fused["model.layers.0.mlp.experts"]
    seen = sums.tokens[0].tolist()
    assert seen == [2, 3, 2]  # row 0; rows 2 and 4, where token 3 chose both; row 6
    assert sums.logits is None
    assert torch.cat(sums.trace).max() == 3  # no expert


def test_merge_is_the_weighted_mean_in_float32_rounded_once(tiny: Builder) -> None:
    base = Checkpoint.open(tiny("qwen3_moe"))
    order = tuple(torch.randperm(40, generator=torch.Generator().manual_seed(1)).tolist())
    own = Own((1, 3), (0.3, 0.7), (None, order))
    layer = LayerExperts((own, Own((0,))), (0, 1), (3, 0))
    reduced = ReducedCheckpoint.of(base, Reduction({0: layer, 1: keep(0, 2)}))
    for part, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        a, b = (base.read(f"model.layers.0.mlp.experts.{e}.{part}.weight").float() for e in (1, 3))
        b = b.index_select(dim, torch.tensor(order))
        got = reduced.read(f"model.layers.0.mlp.experts.0.{part}.weight")
        assert torch.equal(got, (a * 0.3 + b * 0.7).bfloat16())
    assert torch.equal(
        reduced.read("model.layers.0.mlp.gate.weight"),
        base.read("model.layers.0.mlp.gate.weight")[[3, 0]],
    )


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_permuted_neurons_compute_the_same(tiny: Builder, family: str) -> None:
    base = Checkpoint.open(tiny(family))
    orders = [torch.randperm(40, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    slots = tuple(Own((e,), orders=(tuple(o.tolist()),)) for e, o in enumerate(orders))
    layer = LayerExperts(slots, (0, 1, 2, 3), (0, 1, 2, 3))
    reduced = ReducedCheckpoint.of(base, Reduction({0: layer, 1: layer}))
    name = next(n for n in reduced.tensors if ("layers.0" in n and "down_proj" in n) or ".w2." in n)
    assert not torch.equal(reduced.read(name), base.read(name))
    torch.testing.assert_close(logits(dense(reduced)), logits(dense(base)), rtol=1e-4, atol=1e-4)


def test_router_may_come_with_the_reduction(tiny: Builder) -> None:
    base = Checkpoint.open(tiny("gpt_oss"))
    weight, bias = torch.randn(3, 64), torch.randn(3)
    names = ("model.layers.1.mlp.router.weight", "model.layers.1.mlp.router.bias")
    reduction = Reduction(
        {0: keep(0, 1, 2), 1: keep(0, 1, 2)}, tensors=dict(zip(names, (weight, bias), strict=True))
    )
    reduced = ReducedCheckpoint.of(base, reduction)
    assert torch.equal(reduced.read(names[0]), weight.bfloat16())
    assert torch.equal(reduced.read(names[1]), bias.bfloat16())
    other = replace(reduction, tensors={names[0]: weight, names[1]: bias + 1})
    assert other.sha256 != reduction.sha256
    assert Reduction.from_json(
        json.loads(json.dumps(reduction.to_json())), reduction.tensors
    ).sha256 == reduction.sha256  # fmt: skip
    with pytest.raises(CheckpointError, match="shape"):
        ReducedCheckpoint.of(base, replace(reduction, tensors={names[0]: weight[:2]}))
    with pytest.raises(CheckpointError, match="no router"):
        ReducedCheckpoint.of(base, replace(reduction, tensors={"lm_head.weight": weight}))


def test_merged_adapter_is_reduced_like_any_base(tiny: Builder, tmp_path: Path) -> None:
    path, name = tiny("qwen3_moe"), "model.layers.1.mlp.experts.2.up_proj"
    adapter = tmp_path / "lora"
    adapter.mkdir()
    factors = {"A": torch.randn(4, 64), "B": torch.randn(40, 4)}
    save_file(
        {f"base_model.model.{name}.lora_{k}.weight": v for k, v in factors.items()},
        adapter / "adapter_model.safetensors",
    )
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 4}')
    base = Checkpoint.open(path)
    merged = MergedCheckpoint.of(base, [(Adapter.open(adapter), 1.0)])
    reduction = Reduction({0: keep(2, 3), 1: keep(2, 3)})
    reduced = ReducedCheckpoint.of(merged, reduction)
    want = (base.read(f"{name}.weight").float() + factors["B"] @ factors["A"]).bfloat16()
    assert torch.equal(reduced.read("model.layers.1.mlp.experts.0.up_proj.weight"), want)
    assert reduced.scan() != ReducedCheckpoint.of(base, reduction).scan()
    assert {"merged", "reduced"} <= reduced.origin().keys()


def _with(**change: Any) -> Reduction:
    return Reduction({0: replace(keep(0, 1, 2), **change), 1: keep(0, 1, 2)})


@pytest.mark.parametrize(
    ("reduction", "said"),
    [
        (Reduction({0: keep(0, 4)}), "no expert"),
        (Reduction({0: keep(0, 1, 1)}), "twice"),
        (Reduction({0: keep(0)}), "1 rows"),
        (Reduction({0: LayerExperts((), ("zero", "copy"), (0, 1))}), "without experts"),
        (Reduction({2: keep(0, 1)}), "no block 2"),
        (Reduction({}, dropped=(0, 1)), "all blocks"),
        (Reduction({0: keep(0, 1)}, dropped=(0,)), "given experts"),
        (_with(rows=(0, 1, 3)), "no slot"),
        (_with(rows=(0, 1, 1)), "reaches slot 2"),
        (_with(rows=(0, 1, 2, "constant:0"), sources=(0, 1, 2, 3)), "constants of shape"),
        (_with(sources=(0, 1)), "rows"),
        (_with(slots=(Own((0, 1), (0.5, 0.6)), Own((2,)), Own((3,)))), "sum to 1"),
        (_with(slots=(Own((0,), orders=((0, 0, 1),)), Own((2,)), Own((3,)))), "permutation"),
    ],
)
def test_what_is_no_model_is_refused(tiny: Builder, reduction: Reduction, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        ReducedCheckpoint.of(Checkpoint.open(tiny("qwen3_moe")), reduction)


def test_block_that_would_change_its_kind_is_refused(tiny: Builder) -> None:
    path = tiny("qwen3_moe", "sparse-steps", num_hidden_layers=4, decoder_sparse_step=2)
    with pytest.raises((UnsupportedModel, CheckpointError)):
        ReducedCheckpoint.of(Checkpoint.open(path), Reduction({}, dropped=(1,)))


def test_written_checkpoint_is_an_ordinary_model(tiny: Builder, tmp_path: Path) -> None:
    path = tiny("mixtral")  # in shards
    reduced = ReducedCheckpoint.of(
        Checkpoint.open(path), Reduction({0: keep(3, 1), 1: keep(0, 2)}, dropped=())
    )
    digest = write_checkpoint(reduced, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    assert type(model.model.layers[0].mlp.experts).__name__ == "MixtralExperts"
    assert torch.equal(logits(model.eval()), logits(dense(reduced)))
    record = json.loads((tmp_path / "out" / "origin.json").read_text())
    assert record["sha256"] == digest == reduced.scan()
    assert record["reduced"]["experts"]["0"]["slots"] == [[3], [1]]
    with pytest.raises(ArtifactError):
        write_checkpoint(reduced, tmp_path / "out")


def test_unequal_layers_are_written_as_no_checkpoint_and_no_export(
    tiny: Builder, tmp_path: Path
) -> None:
    base = Checkpoint.open(tiny("qwen3_moe"))
    reduced = ReducedCheckpoint.of(base, Reduction({0: keep(0, 1, 2)}))
    with pytest.raises(CheckpointError, match="unequal"):
        write_checkpoint(reduced, tmp_path / "out")
    artifact = compressed(reduced, tmp_path / "a", format="int4-channel")
    with pytest.raises(TargetError, match="unequal"):
        export_compressed_tensors(artifact, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    with pytest.raises(TargetError, match="unequal"):
        open_target("vllm-cpu", reduced.config)
    equal = ReducedCheckpoint.of(base, Reduction({0: keep(0, 1, 2), 1: keep(1, 2, 3)}))
    artifact = compressed(equal, tmp_path / "b", format="int4-channel")
    result = export_compressed_tensors(artifact, tmp_path / "out")
    assert result.verified == 8 + 2 * 3 * 3
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_local_experts"] == 3


def test_nested_artifact_of_unequal_layers_is_analyzed(
    tiny: Builder, tmp_path: Path, text: Path
) -> None:
    """Choices of no expert are in no count, no pair, and no cache."""
    base, reduction = mixed(tiny)
    reduced = ReducedCheckpoint.of(base, reduction)
    artifact = compressed(reduced, tmp_path / "a", format="nest2348-g32")
    out = tmp_path / "s"
    api.analyze(artifact, out, data=[f"a={text}"], samples=4, length=32, probes=2,
                probe_windows=1, fisher_windows=1, formats=["int4-g32"])  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    layer, other = report["layers"]
    assert layer["experts"] == 3 and len(layer["tokens"][0]) == 3
    assert sum(layer["tokens"][0]) < sum(other["tokens"][0])
    assert np.shape(layer["transitions"]) == (3, 3)
    assert layer["margin"] is None and other["margin"] is not None
    assert [row["layer"] for row in report["offloading"]["srp"]] == [1]


def test_self_sampling_runs_the_reduced_model(tiny: Builder) -> None:
    """The base lies in the directory: it has other experts, and would be counted for the wrong."""
    base, reduction = mixed(tiny)
    job = prepare(ReducedCheckpoint.of(base, reduction), Recipe(format="int4-g32", min_tokens=40))
    tokens = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    calibration = CalibrationSet(tokens, ("t",) * 2, {"t": 2}, "0")
    found, drawn = cover(job, calibration, "self", tokenizer=load_tokenizer(base.path), sources=(),
                         limit=4, seed=0, progress=Silent())  # fmt: skip
    assert drawn.windows == 4 and len(found.tokens) == 6
    assert all(p.is_meta for p in job.skeleton.model.parameters())
