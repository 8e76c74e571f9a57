"""Adapters beside packed weights: what they add is what merging into the decoded weights gives."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from typer.testing import CliRunner

from bitnest import api
from bitnest.artifact import Artifact
from bitnest.cli import app
from bitnest.errors import BitnestError, CheckpointError
from bitnest.lora import open_adapters
from bitnest.merged import MergedCheckpoint
from bitnest.packed.adapters import Added
from bitnest.packed.decoded import DecodedCheckpoint
from bitnest.packed.modules import PackedLinear, hold_decoded
from bitnest.skeleton import Skeleton
from tests.adapters import Q, adapter, float32, noise, pair
from tests.tiny import CONTEXT, FAMILIES, VOCAB, Builder

EXPERTS = "model.layers.0.mlp.experts"
TOKENS = torch.arange(3 * 40).view(3, 40) * 7 % VOCAB
assert TOKENS.shape[1] < CONTEXT


def packed(base: Path, out: Path, **options: Any) -> Path:
    api.compress(base, out, **{"format": "int4-g32", "method": "rtn", **options})
    return out


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return found


def merged_logits(artifact: Path, loras: list[str]) -> torch.Tensor:
    """Of the dense model that the artifact decodes to, with the adapters merged in."""
    view = DecodedCheckpoint.of(Artifact.open(artifact), whole=True)
    checkpoint = MergedCheckpoint.of(view, open_adapters(loras)) if loras else view
    skeleton = Skeleton.build(checkpoint)
    skeleton.fill("", dtype=torch.float32, device=torch.device("cpu"))
    skeleton.model.tie_weights()
    return logits(skeleton.model)


def fused(param: str, out: int, inner: int, seed: int, rank: int = 4) -> dict[str, torch.Tensor]:
    """Factors of four experts; a second parameter of the module is its base_layer."""
    module = EXPERTS + (".base_layer" if param == "gate_up_proj" else "")
    a, b = noise(4 * rank, inner, seed=seed), noise(out, 4 * rank, seed=seed + 1)
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


BOTH = {**fused("gate_up_proj", 80, 64, 3), **fused("down_proj", 64, 40, 5)}
NAMES = [f"mlp.experts.{param}" for param in ("gate_up_proj", "down_proj")]
DORA = {**pair(Q, 64, 64), f"{Q}.lora_magnitude_vector": noise(64).abs() + 0.5}
C_ATTN = "transformer.h.1.attn.c_attn"


@pytest.mark.parametrize(
    ("family", "adapters"),
    [
        ("llama", [(pair(Q, 64, 64), {"use_rslora": True}, 0.5)]),
        ("llama", [(DORA, {"use_dora": True}, 0.7), (pair(Q, 64, 64, seed=8), {}, -1.0)]),
        ("llama", [({**pair(Q, 64, 64, rank=2), **pair("model.layers.1.mlp.down_proj", 64, 172)},
                    {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 32}}, 1.0)]),
        ("gpt2", [({**pair(C_ATTN, 192, 64), f"{C_ATTN}.lora_B.bias": noise(192)}, {}, 1.0)]),
        ("qwen3_moe", [({**BOTH, **pair(Q, 64, 64)}, {"target_parameters": NAMES}, 1.0)]),
        ("qwen3_moe", [(pair(f"{EXPERTS}.3.up_proj", 40, 64), {}, 1.0),
                       ({**BOTH, "model.norm.weight": noise(64)},
                        {"target_parameters": NAMES}, 0.5)]),
        ("gpt_oss", [(fused("down_proj", 64, 40, 1), {"target_parameters": NAMES[1:]}, 1.0)]),
    ],
)  # fmt: skip
def test_adapters_add_what_merging_into_decoded_weights_would(
    tiny: Builder, tmp_path: Path, family: str, adapters: list[Any]
) -> None:
    base = float32(tiny, family)
    artifact = packed(base, tmp_path / "packed")
    loras = []
    for number, (tensors, config, scale) in enumerate(adapters):
        own = adapter(tmp_path / f"a{number}", tensors, **config)
        loras.append(f"{own}:{scale}")
    found = logits(api.load(artifact, lora=loras))
    torch.testing.assert_close(found, merged_logits(artifact, loras), rtol=1e-4, atol=1e-4)
    without = logits(api.load(artifact))
    torch.testing.assert_close(without, merged_logits(artifact, []), rtol=1e-4, atol=1e-4)
    assert (found - without).abs().max() > 0.01


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_finds_its_packed_matrices(tiny: Builder, tmp_path: Path, family: str) -> None:
    """One matrix of each kind, by the names of the checkpoint."""
    artifact = packed(float32(tiny, family), tmp_path / "packed")
    sites = {r.site.kind: r.site for r in Artifact.open(artifact).packed()}
    fused = {kind for kind, site in sites.items() if "experts" in site.name and any(
        site.name.endswith(name) for name in FAMILIES[family].fused)}  # fmt: skip
    tensors: dict[str, torch.Tensor] = {}
    for kind, site in sites.items():
        if kind not in fused:
            tensors |= pair(site.name, *site.shape, seed=len(tensors))
    loras = [str(adapter(tmp_path / "a", tensors))]
    model = api.load(artifact, lora=loras)
    assert sum(isinstance(m, Added) for m in model.modules()) == len(sites) - len(fused)
    found = logits(model)
    torch.testing.assert_close(found, merged_logits(artifact, loras), rtol=1e-4, atol=1e-4)
    assert (found - logits(api.load(artifact))).abs().max() > 0.05


def test_dora_uses_row_lengths_of_the_decoded_weights(tiny: Builder, tmp_path: Path) -> None:
    artifact = packed(float32(tiny, "llama"), tmp_path / "packed", format="int2-g32")
    own = adapter(tmp_path / "a", DORA, use_dora=True)
    plain: Any = api.load(artifact).get_submodule(Q)
    adapted: Any = api.load(artifact, lora=[str(own)]).get_submodule(Q)
    a, b = (DORA[f"{Q}.lora_{x}.weight"].double() for x in "AB")
    direction = plain.weight.double() + 2 * b @ a
    wanted = DORA[f"{Q}.lora_magnitude_vector"].double()[:, None] * F.normalize(direction, dim=1)
    x = noise(5, 64, seed=2)
    torch.testing.assert_close(adapted(x).double(), x.double() @ wanted.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adapted.weight.double(), wanted, rtol=1e-4, atol=1e-5)


def test_row_lengths_follow_the_width_of_a_nested_weight(tiny: Builder, tmp_path: Path) -> None:
    artifact = packed(float32(tiny, "llama"), tmp_path / "n", format=None, nested="2-8")
    lora = [str(adapter(tmp_path / "a", DORA, use_dora=True))]
    model: Any = api.load(artifact, bits=2, lora=lora)
    narrow = logits(model)
    model.set_bits(8)
    torch.testing.assert_close(logits(model), logits(api.load(artifact, lora=lora)))
    assert (logits(model) - narrow).abs().max() > 1e-3
    model.set_bits(2)
    assert torch.equal(logits(model), narrow)


def test_factors_keep_their_type_when_the_model_changes_its(tiny: Builder, tmp_path: Path) -> None:
    artifact = packed(float32(tiny, "llama"), tmp_path / "packed")
    loras = [str(adapter(tmp_path / "a", DORA, use_dora=True))]
    loras.append(str(adapter(tmp_path / "b", pair(Q, 64, 64))))
    model: Any = api.load(artifact, lora=loras)
    before = logits(model)
    torch.nn.Module.to(model, torch.bfloat16)
    own = [m for m in model.modules() if isinstance(m, Added)]
    assert own and all(b.dtype == torch.float32 for m in own for b in m.buffers())
    torch.testing.assert_close(logits(model).float(), before, rtol=0.1, atol=0.1)


def test_kept_decoded_weights_are_not_changed(tiny: Builder, tmp_path: Path) -> None:
    artifact = packed(float32(tiny, "qwen3_moe"), tmp_path / "packed")
    own = adapter(tmp_path / "a", BOTH, target_parameters=NAMES)
    model: Any = api.load(artifact, lora=[str(own)])
    before = logits(model)
    assert hold_decoded(model)
    held = logits(model)
    torch.testing.assert_close(held, before, rtol=1e-4, atol=1e-5)  # a kernel's rounding
    assert torch.equal(logits(model), held)


def test_dropped_expert_stays_dropped(tiny: Builder, tmp_path: Path) -> None:
    rules = [f"{EXPERTS}.1.{p}_proj=zero" for p in ("gate", "up", "down")]
    artifact = packed(float32(tiny, "qwen3_moe"), tmp_path / "packed", rules=rules)
    own = {f"{EXPERTS}.1.down_proj.{k.rpartition('proj.')[2]}": v
           for k, v in pair(f"{EXPERTS}.1.down_proj", 64, 40).items()}  # fmt: skip
    lora = [str(adapter(tmp_path / "a", own))]
    assert torch.equal(logits(api.load(artifact, lora=lora)), logits(api.load(artifact)))


def whole(path: Path, name: str, *shape: int) -> Path:
    path.mkdir()
    save_file({name: noise(*shape)}, path / "experts.safetensors")
    return path


def test_what_cannot_be_kept_apart_is_refused(tiny: Builder, tmp_path: Path) -> None:
    ends = [f"kind:{kind}=int8-g32" for kind in ("embedding", "head")]
    artifact = packed(tiny("qwen3_moe"), tmp_path / "packed", rules=ends)
    wrong: list[tuple[Path, str]] = [
        (whole(tmp_path / "e", f"{EXPERTS}.1.up_proj.weight", 40, 64), "replaces a packed weight"),
        (whole(tmp_path / "s", "lm_head.weight", VOCAB, 64), "replaces the head, which is packed"),
        (adapter(tmp_path / "h", pair("lm_head", VOCAB, 64)), "changes the head, which is packed"),
        (adapter(tmp_path / "x", pair(Q, 64, 32)), "is for shape"),
        (adapter(tmp_path / "n", {**DORA, f"{Q}.lora_A.weight": torch.full((4, 64), math.nan)},
                 use_dora=True), "NaN"),
    ]  # fmt: skip
    for own, said in wrong:
        with pytest.raises(CheckpointError, match=said) as caught:
            api.load(artifact, lora=[str(own)])
        assert caught.value.hint
        with pytest.raises(CheckpointError, match=said):
            api.evaluate([artifact], lora=[str(own)])
        if "packed" in said:
            assert "compress MODEL --lora" in str(caught.value.hint)


def test_dense_embedding_and_head_of_an_artifact_are_merged(tiny: Builder, tmp_path: Path) -> None:
    artifact = packed(float32(tiny, "llama"), tmp_path / "packed")
    table = {"model.embed_tokens.lora_embedding_A": noise(4, VOCAB),
             "model.embed_tokens.lora_embedding_B": noise(64, 4)}  # fmt: skip
    lora = [str(adapter(tmp_path / "a", {**table, "lm_head.weight": noise(VOCAB, 64)}))]
    found = logits(api.load(artifact, lora=lora))
    torch.testing.assert_close(found, merged_logits(artifact, lora), rtol=1e-4, atol=1e-4)


def test_dense_router_and_its_buffer_are_merged(tiny: Builder, tmp_path: Path) -> None:
    artifact = packed(float32(tiny, "deepseek_v3"), tmp_path / "packed")
    gate = "model.layers.1.mlp.gate"
    own = {f"{gate}.e_score_correction_bias": noise(4), f"{gate}.weight": noise(4, 64, seed=1)}
    model: Any = api.load(artifact, lora=[str(adapter(tmp_path / "a", own))])
    for name, tensor in own.items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_eval_measures_the_adapter_and_counts_its_bytes(
    tiny: Builder, tmp_path: Path, text: Path
) -> None:
    base = float32(tiny, "qwen3_moe")
    artifact = packed(base, tmp_path / "packed", format="int8-g32")
    own = str(adapter(tmp_path / "loud", {k: 4 * v for k, v in pair(Q, 64, 64).items()}))
    options: dict[str, Any] = {"data": [f"t={text}"], "window": 32, "windows": 4}
    plain = api.evaluate([artifact], against=base, **options)
    far = api.evaluate([artifact], against=base, lora=[own], **options)
    near = api.evaluate([artifact], against=base, lora=[own], against_lora=[own], **options)
    kl = [report.rows[1].scores[0].kl for report in (plain, far, near)]
    means = [one.mean for one in kl if one is not None]
    assert means[1] > 10 * means[2] and means[1] > 10 * means[0]
    assert far.rows[1].model == "packed+loud" and near.rows[0].model == f"{base.name}+loud"
    assert far.rows[1].nbytes - plain.rows[1].nbytes == 4 * (4 * 64 + 64 * 4)
    with pytest.raises(BitnestError, match="--against MODEL"):
        api.evaluate([artifact], against_lora=[own], **options)
    args = ["eval", str(artifact), "--lora", own, "--data", f"t={text}", "--window", "32"]
    shown = CliRunner().invoke(app, [*args, "--windows", "4", "-q"])
    assert shown.exit_code == 0 and "packed+loud" in shown.output


def test_serving_puts_adapters_on_artifacts_and_into_checkpoints(
    tiny: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fastapi")
    base, own = float32(tiny, "llama"), adapter(tmp_path / "a", pair(Q, 64, 64))
    artifact = packed(base, tmp_path / "packed")
    served: list[Any] = []
    monkeypatch.setattr(
        "bitnest.serve.run.run_server", lambda model, *_, **__: served.append(model)
    )
    common = ["--lora", str(own), "-q", "--cache-dir", str(tmp_path / "cache")]
    for model, options in [(artifact, []), (base, ["--dense"]), (base, ["--method", "rtn"])]:
        result = CliRunner().invoke(app, ["serve", str(model), *common, *options])
        assert result.exit_code == 0, result.output
    beside, dense, compressed = served
    assert torch.equal(logits(beside), logits(api.load(artifact, lora=[str(own)])))
    assert torch.equal(logits(dense), logits(api.load(base, lora=[str(own)])))
    assert type(compressed.get_submodule(Q)) is PackedLinear
    (made,) = [p for p in (tmp_path / "cache" / "artifacts").iterdir() if p.is_dir()]
    assert Artifact.open(made).manifest["source"]["merged"][0]["adapter"] == "a"
    again = ["serve", str(base), "--lora", f"{own}:0.5", *common[2:], "--method", "rtn"]
    assert CliRunner().invoke(app, again).exit_code == 0
    assert len([p for p in made.parent.iterdir() if p.is_dir()]) == 2
