"""LoRA merged into checkpoints: peft's own merge, formulas in float64, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from bitnest import api
from bitnest.checkpoint import Checkpoint
from bitnest.cli import app
from bitnest.errors import ArtifactError, BitnestError, CheckpointError, RecipeError
from bitnest.lora import Adapter
from bitnest.merged import MergedCheckpoint
from bitnest.workdir import partial_directory
from tests.adapters import Q, adapter, float32, noise, pair, product
from tests.tiny import Builder

FUSED = {
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "target_modules": ["q_proj"],
}


def merged(base: Path, *adapters: tuple[Path, float]) -> MergedCheckpoint:
    opened = [(Adapter.open(path), scale) for path, scale in adapters]
    return MergedCheckpoint.of(Checkpoint.open(base), opened)


@pytest.fixture
def llama(tiny: Builder) -> Path:
    """A float32 dense model, so that 1e-5 says something."""
    return float32(tiny, "llama")


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
        ("llama", {"target_modules": ["q_proj", "up_proj"], "use_dora": True}),
        ("llama", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2},
                   "alpha_pattern": {"layers.1.self_attn.q_proj": 32}}),
        ("llama", {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head", "norm"]}),
        ("llama", {"target_modules": ["embed_tokens", "o_proj"], "use_dora": True}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "lora_bias": True}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
        ("qwen3_moe", FUSED),
        ("qwen3_moe", {**FUSED, "use_rslora": True,
                       "rank_pattern": {"experts.down_proj": 2}, "modules_to_save": ["gate"]}),
        ("mixtral", FUSED),
        ("mixtral", {"target_modules": ["q_proj"], "use_dora": True}),
        ("gpt_oss", FUSED),
    ],
)  # fmt: skip
def test_merged_weights_are_pefts_own(
    tiny: Builder, tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = float32(tiny, family)
    model = AutoModelForCausalLM.from_pretrained(base)
    trained = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=16, **options))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    trained.save_pretrained(tmp_path / "lora")
    wanted = trained.merge_and_unload().state_dict()
    result = api.merge(base, [str(tmp_path / "lora")], tmp_path / "out")
    assert 0 < result.changed < result.tensors
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
    assert any(not torch.allclose(found[n], before[n], atol=1e-3) for n in wanted)


@pytest.mark.parametrize("rslora", [False, True])
def test_low_rank_is_added_scaled_and_several_add_up(
    llama: Path, tmp_path: Path, rslora: bool
) -> None:
    first, second = pair(Q, 64, 64), pair(Q, 64, 64, rank=2, seed=5)
    one = adapter(tmp_path / "one", first, use_rslora=rslora)
    two = adapter(tmp_path / "two", second, r=2, use_rslora=rslora)
    base = Checkpoint.open(llama)
    scales = [8 / (math.sqrt(r) if rslora else r) for r in (4, 2)]
    wanted = base.read(f"{Q}.weight").double() + 0.5 * scales[0] * product(first, Q)
    wanted -= 2 * scales[1] * product(second, Q)
    found = merged(llama, (one, 0.5), (two, -2.0))
    torch.testing.assert_close(found.read(f"{Q}.weight").double(), wanted, rtol=1e-5, atol=1e-5)
    untouched = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(found.read(untouched), base.read(untouched))


def test_dora_rows_have_the_trained_length(llama: Path, tmp_path: Path) -> None:
    length = noise(64).abs() + 0.5
    own = {**pair(Q, 64, 64), f"{Q}.lora_magnitude_vector": length}
    found = merged(llama, (adapter(tmp_path / "a", own, use_dora=True), 1.0)).read(f"{Q}.weight")
    direction = Checkpoint.open(llama).read(f"{Q}.weight").double() + 2 * product(own, Q)
    wanted = length.double()[:, None] * direction / direction.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_by_their_names_on_disk(tiny: Builder, tmp_path: Path, family: str) -> None:
    """As transformers 4 named them; and whole experts (ESFT), to the bit."""
    experts = "block_sparse_moe.experts" if family == "mixtral" else "mlp.experts"
    last = "w2" if family == "mixtral" else "down_proj"
    path = [f"model.layers.1.{experts}.{e}.{last}" for e in range(2)]
    base = Checkpoint.open(float32(tiny, family))
    own = pair(path[0], 64, 40)
    (tmp_path / "whole").mkdir()
    new = noise(64, 40, seed=3)
    save_file({f"{path[1]}.weight": new}, tmp_path / "whole" / "experts.safetensors")
    both = merged(base.path, (adapter(tmp_path / "a", own), 1.0), (tmp_path / "whole", 1.0))
    wanted = base.read(f"{path[0]}.weight").double() + 2 * product(own, path[0])
    torch.testing.assert_close(
        both.read(f"{path[0]}.weight").double(), wanted, rtol=1e-5, atol=1e-5
    )
    assert torch.equal(both.read(f"{path[1]}.weight"), new)


@pytest.mark.parametrize(("param", "version"), [("down_proj", None), ("gate_up_proj", "0.18.1")])
def test_fused_experts_of_old_peft_have_a_on_the_output_side(
    tiny: Builder, tmp_path: Path, param: str, version: str | None
) -> None:
    base = Checkpoint.open(float32(tiny, "qwen3_moe"))
    module = "model.layers.0.mlp.experts"
    out, inner = (64, 40) if param == "down_proj" else (80, 64)
    own = {f"{module}.lora_A.weight": noise(16, out), f"{module}.lora_B.weight": noise(inner, 16)}
    config = {"target_parameters": [f"mlp.experts.{param}"], "peft_version": version}
    found = merged(base.path, (adapter(tmp_path / "a", own, **config), 1.0))
    a = own[f"{module}.lora_A.weight"].double().view(4, 4, out)
    b = own[f"{module}.lora_B.weight"].double().view(inner, 4, 4)
    delta = 2 * torch.einsum("ore,eri->eio", b, a)  # (E, out, inner), as peft 0.18 computes it
    part, rows = ("up_proj", slice(40, 80)) if param == "gate_up_proj" else (param, slice(0, 64))
    wanted = base.read(f"{module}.3.{part}.weight").double() + delta[3, rows]
    torch.testing.assert_close(
        found.read(f"{module}.3.{part}.weight").double(), wanted, rtol=1e-5, atol=1e-5
    )


def test_square_experts_are_merged_only_if_the_version_is_known(
    tiny: Builder, tmp_path: Path
) -> None:
    path = tiny("qwen3_moe", "square", moe_intermediate_size=32)  # gate and up: 64 x 64
    module = "model.layers.0.mlp.experts"
    own = {f"{module}.lora_A.weight": noise(16, 64), f"{module}.lora_B.weight": noise(64, 16)}
    kept = {}
    for version in ("0.18.1", "0.19.0", None):
        config = {"target_parameters": ["mlp.experts.gate_up_proj"], "peft_version": version}
        lora = adapter(tmp_path / str(version), own, **config)
        if version is None:
            with pytest.raises(CheckpointError, match="several ways"):
                merged(path, (lora, 1.0))
            continue
        kept[version] = merged(path, (lora, 1.0)).read(f"{module}.1.gate_proj.weight").float()
    before = Checkpoint.open(path).read(f"{module}.1.gate_proj.weight").float()
    a = own[f"{module}.lora_A.weight"].view(4, 4, 64)[1]
    b = own[f"{module}.lora_B.weight"].view(64, 4, 4)[:, :, 1]
    for version, delta in (("0.19.0", b @ a), ("0.18.1", (b @ a).T)):
        wanted = (before + 2 * delta[:32]).bfloat16().float()
        torch.testing.assert_close(kept[version], wanted, rtol=0, atol=4e-3)


def test_whole_fused_experts_go_to_their_places(tiny: Builder, tmp_path: Path) -> None:
    base = Checkpoint.open(float32(tiny, "qwen3_moe"))
    module, new = "model.layers.0.mlp.experts", noise(4, 80, 64)
    found = merged(base.path, (adapter(tmp_path / "a", {f"{module}.gate_up_proj": new}), 1.0))
    assert torch.equal(found.read(f"{module}.2.gate_proj.weight"), new[2, :40])
    assert torch.equal(found.read(f"{module}.3.up_proj.weight"), new[3, 40:])


def test_hash_depends_on_base_adapter_and_scale(llama: Path, tmp_path: Path) -> None:
    one = adapter(tmp_path / "one", pair(Q, 64, 64))
    two = adapter(tmp_path / "two", pair(Q, 64, 64, seed=9))
    hashes = [merged(llama, *own).scan() for own in ([(one, 1.0)], [(one, 0.5)], [(two, 1.0)])]
    assert len({*hashes, Checkpoint.open(llama).scan()}) == 4
    assert hashes[0] == merged(llama, (one, 1.0)).scan()


def test_bfloat16_is_rounded_once(tiny: Builder, tmp_path: Path) -> None:
    own = pair(Q, 64, 64)
    one = adapter(tmp_path / "a", own)
    found = merged(tiny("llama"), (one, 1.0)).read(f"{Q}.weight")
    base = Checkpoint.open(tiny("llama")).read(f"{Q}.weight")
    a, b = own[f"{Q}.lora_A.weight"], own[f"{Q}.lora_B.weight"]
    assert torch.equal(found, (base.float() + 2.0 * (b @ a)).bfloat16())


def test_command_writes_a_checkpoint_with_the_files_of_the_base(
    tiny: Builder, tmp_path: Path
) -> None:
    base = tiny("qwen3")
    own = adapter(tmp_path / "a", pair(Q, 64, 64))
    args = ["merge", str(base), "--lora", f"{own}:0.5", "-o", str(tmp_path / "out"), "--json", "-q"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["changed"] == 1 and said["adapters"][0]["scale"] == 0.5
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {p.name for p in base.iterdir()} | {"merged.json"}
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    written, wanted = Checkpoint.open(tmp_path / "out"), merged(base, (own, 0.5))
    assert all(torch.equal(written.read(name), wanted.read(name)) for name in written.tensors)
    assert not partial_directory(tmp_path / "out").exists()


def test_killed_merge_resumes_and_other_inputs_do_not(
    tiny: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, own = tiny("qwen3"), adapter(tmp_path / "a", pair(Q, 64, 64))
    files = sorted(p.name for p in base.glob("*.safetensors"))
    last = next(n for n, i in Checkpoint.open(base).tensors.items() if i.file.name == files[-1])
    read = MergedCheckpoint.read
    seen: list[str] = []

    def failing(self: MergedCheckpoint, name: str) -> torch.Tensor:
        if name == last:
            raise KeyboardInterrupt
        return read(self, name)

    def counting(self: MergedCheckpoint, name: str) -> torch.Tensor:
        seen.append(name)
        return read(self, name)

    monkeypatch.setattr(MergedCheckpoint, "read", failing)
    with pytest.raises(KeyboardInterrupt):
        api.merge(base, [str(own)], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(MergedCheckpoint, "read", counting)
    with pytest.raises(ArtifactError, match="other inputs"):
        api.merge(base, [f"{own}:0.5"], tmp_path / "out")
    api.merge(base, [str(own)], tmp_path / "out")
    assert {Checkpoint.open(base).tensors[name].file.name for name in seen} == {files[-1]}
    api.merge(base, [str(own)], tmp_path / "again")
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    with pytest.raises(ArtifactError, match="in the way"):
        api.merge(base, [str(own)], tmp_path / "out")


NAN = {**pair(Q, 64, 64), f"{Q}.lora_B.weight": torch.full((64, 4), math.nan)}
PLAIN = pair(Q, 64, 64)


@pytest.mark.parametrize(
    ("tensors", "config", "said"),
    [
        (NAN, {}, "NaN"),
        (pair(Q, 64, 32), {}, "is for shape"),
        (pair("model.layers.7.self_attn.q_proj", 64, 64), {}, "layers.7"),
        (pair(Q, 64, 64, rank=2), {}, "rank 2 in the weights, 4"),
        (PLAIN, {"peft_type": "LOHA"}, "LOHA"),
        (PLAIN, {"init_lora_weights": "pissa_niter_4"}, "changed the base"),
        (PLAIN, {"init_lora_weights": "olora"}, "changed the base"),
        (PLAIN, {"use_qalora": True}, "use_qalora"),
        (PLAIN, {"use_dora": True}, "DoRA magnitude"),
        ({f"{Q}.lora_A.weight": noise(4, 64)}, {}, "lacks a matrix lora_B"),
        ({f"{Q}.lora_C.weight": noise(4, 64)}, {}, "unknown adapter tensor"),
        ({f"{Q}.weight": noise(64, 63)}, {}, "is for shape"),
        ({"nowhere.weight": noise(64, 63)}, {}, "not in the base"),
    ],
)
def test_what_does_not_fit_is_refused_before_work(
    llama: Path, tmp_path: Path, tensors: dict[str, Any], config: dict[str, Any], said: str
) -> None:
    own = adapter(tmp_path / "a", tensors, **config)
    with pytest.raises(CheckpointError, match=said) as caught:
        api.merge(llama, [str(own)], tmp_path / "out")
    assert caught.value.where and caught.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_residual_base_is_taken_when_said(llama: Path, tmp_path: Path) -> None:
    own = adapter(tmp_path / "a", PLAIN, init_lora_weights="pissa")
    assert api.merge(llama, [str(own)], tmp_path / "out", residual_base=True).changed == 1


def test_tied_embedding_is_not_changed_in_one_use(tiny: Builder, tmp_path: Path) -> None:
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        own = adapter(tmp_path / "a", {name: noise(320, 64)})
        with pytest.raises(CheckpointError, match="tied"):
            merged(tiny("qwen2"), (own, 1.0))


def test_pickled_missing_and_misspelt_adapters(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "adapter_model.bin").write_bytes(b"x")
    wrong: list[tuple[list[str], type[BitnestError], str]] = [
        ([str(tmp_path / "p")], CheckpointError, "pickle"),
        ([str(tmp_path / "none")], CheckpointError, "no such adapter"),
        ([f"{tmp_path / 'p'}:much"], RecipeError, "no scale"),
        ([], RecipeError, "nothing to merge"),
    ]
    for loras, kind, said in wrong:
        with pytest.raises(kind, match=said):
            api.merge(llama, loras, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_overflow_of_float16_is_said(tiny: Builder, tmp_path: Path) -> None:
    own = adapter(tmp_path / "a", {k: v * 1e4 for k, v in PLAIN.items()})
    with pytest.raises(CheckpointError, match="once merged"):
        api.merge(tiny("qwen2"), [str(own)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def run_checkpoint(path: Path, step: int, loss: float, seed: int) -> Path:
    adapter(path, pair(Q, 64, 64, seed=seed))
    rows = [{"step": step - 1, "eval_loss": 9.0}, {"step": step, "eval_loss": loss},
            {"step": step + 1, "eval_loss": 0.1}]  # fmt: skip
    state = {"global_step": step, "log_history": rows}
    (path / "trainer_state.json").write_text(json.dumps(state))
    return path


@pytest.mark.parametrize(
    ("metric", "penalty", "weights"),
    [("loss", 1.0, [1 / 3, 2 / 3]), ("loss", 2.0, [0.2, 0.8]), ("step", 1.0, [0.25, 0.75]),
     ("step", 0.0, [0.5, 0.5])],
)  # fmt: skip
def test_checkpoints_of_a_run_are_averaged_by_their_products(
    llama: Path, tmp_path: Path, metric: str, penalty: float, weights: list[float]
) -> None:
    paths = [run_checkpoint(tmp_path / "a", 10, 2.0, 0), run_checkpoint(tmp_path / "b", 30, 1.0, 7)]
    result = api.merge(llama, [str(p) for p in paths], tmp_path / "out", weights_from=metric,
                       penalty=penalty)  # fmt: skip
    assert [a["scale"] for a in result.adapters] == pytest.approx(weights)
    wanted = Checkpoint.open(llama).read(f"{Q}.weight").double()
    for weight, seed in zip(weights, (0, 7), strict=True):
        wanted += weight * 2 * product(pair(Q, 64, 64, seed=seed), Q)
    found = Checkpoint.open(tmp_path / "out").read(f"{Q}.weight").double()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_averaging_without_a_record_or_with_scales_is_refused(llama: Path, tmp_path: Path) -> None:
    one, bare = run_checkpoint(tmp_path / "a", 10, 2.0, 0), adapter(tmp_path / "b", PLAIN)
    zero = run_checkpoint(tmp_path / "c", 10, 0.0, 0)
    wrong: list[tuple[list[str], str, float, str]] = [
        ([str(one), str(bare)], "loss", 1.0, "trainer_state.json"),
        ([f"{one}:0.5"], "loss", 1.0, "contradict"),
        ([str(one)], "luck", 1.0, "unknown metric"),
        ([str(one)], "step", -1.0, "penalty"),
        ([str(zero)], "loss", 1.0, "not a positive"),
    ]
    for loras, metric, penalty, said in wrong:
        with pytest.raises(BitnestError, match=said):
            api.merge(llama, loras, tmp_path / "out", weights_from=metric, penalty=penalty)
    assert not (tmp_path / "out").exists()
