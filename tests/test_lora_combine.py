"""TIES and DARE over whole changes: against their formulas, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bitnest import api
from bitnest.checkpoint import Checkpoint
from bitnest.cli import app
from bitnest.combining import Combine
from bitnest.errors import ArtifactError, BitnestError, MissingExtra
from bitnest.lora import Adapter
from bitnest.merged import MergedCheckpoint
from tests.adapters import Q, adapter, float32, noise, pair
from tests.tiny import Builder

DOWN = "model.layers.0.mlp.experts.3.down_proj"
DORA = {**pair(Q, 64, 64, seed=5), f"{Q}.lora_magnitude_vector": noise(64).abs() + 0.5}


@pytest.fixture
def base(tiny: Builder) -> Path:
    return float32(tiny, "qwen3_moe")


@pytest.fixture
def loras(tmp_path: Path) -> list[Path]:
    """A plain one and one with DoRA, on one matrix; the plain one changes an expert too."""
    plain = adapter(tmp_path / "plain", {**pair(Q, 64, 64), **pair(DOWN, 64, 40)})
    return [plain, adapter(tmp_path / "dora", DORA, use_dora=True)]


def changes(base: Path, loras: list[Path], name: str) -> list[torch.Tensor]:
    """What each adapter alone makes of a tensor, less the tensor."""
    weight = Checkpoint.open(base)
    return [
        MergedCheckpoint.of(weight, [(Adapter.open(path), 1.0)]).read(name) - weight.read(name)
        for path in loras
    ]


def trimmed(delta: torch.Tensor, density: float) -> torch.Tensor:
    least = delta.abs().flatten().sort(descending=True).values[int(density * delta.numel()) - 1]
    return torch.where(delta.abs() >= least, delta, 0.0)


def elected(deltas: list[torch.Tensor], scales: list[float]) -> torch.Tensor:
    """TIES from its paper: elect the sign of the sum, average over those that have it."""
    stacked = torch.stack(deltas)
    sign = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    agree = (stacked.sign() == sign).float()
    weighted = stacked * torch.tensor(scales).view(-1, 1, 1) * agree
    return weighted.sum(0) / agree.sum(0).clamp(min=1)


def merged(base: Path, loras: list[Path], scales: list[float], **way: Any) -> MergedCheckpoint:
    pairs = [(Adapter.open(path), scale) for path, scale in zip(loras, scales, strict=True)]
    return MergedCheckpoint.of(Checkpoint.open(base), pairs, combine=Combine(**way))


def test_ties_trims_elects_and_averages_whole_changes(base: Path, loras: list[Path]) -> None:
    pytest.importorskip("peft")
    found = merged(base, loras, [1.0, 0.5], method="ties", density=0.3)
    name = f"{Q}.weight"
    both = [trimmed(delta, 0.3) for delta in changes(base, loras, name)]
    wanted = Checkpoint.open(base).read(name) + elected(both, [1.0, 0.5])
    torch.testing.assert_close(found.read(name), wanted, rtol=1e-5, atol=1e-5)
    alone = trimmed(changes(base, loras[:1], f"{DOWN}.weight")[0], 0.3)
    wanted = Checkpoint.open(base).read(f"{DOWN}.weight") + alone
    torch.testing.assert_close(found.read(f"{DOWN}.weight"), wanted, rtol=1e-5, atol=1e-5)


def test_dare_keeps_a_share_and_scales_it_up(base: Path, loras: list[Path]) -> None:
    pytest.importorskip("peft")
    name = f"{DOWN}.weight"
    delta = changes(base, loras[:1], name)[0]
    own = merged(base, loras, [1.0, 0.5], method="dare_linear", density=0.25)
    found = own.read(name) - Checkpoint.open(base).read(name)
    kept = found.abs() > 1e-7
    assert 0.2 < kept.float().mean() < 0.3
    torch.testing.assert_close(found[kept], 4 * delta[kept], rtol=1e-3, atol=1e-5)
    other = merged(base, loras, [1.0, 0.5], method="dare_linear", density=0.25, seed=1)
    before = torch.random.get_rng_state()
    assert torch.equal(own.read(name), own.read(name))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(own.read(name), other.read(name))
    assert own.scan() != other.scan() != merged(base, loras, [1.0, 0.5]).scan()


def test_whole_density_is_the_sum_and_the_election(base: Path, loras: list[Path]) -> None:
    pytest.importorskip("peft")
    name, weight = f"{Q}.weight", Checkpoint.open(base)
    plain = merged(base, loras, [1.0, -0.5]).read(name)
    summed = merged(base, loras, [1.0, -0.5], method="dare_linear", density=1.0).read(name)
    torch.testing.assert_close(summed, plain, rtol=1e-5, atol=1e-5)
    wanted = weight.read(name) + elected(changes(base, loras, name), [1.0, -0.5])
    found = merged(base, loras, [1.0, -0.5], method="dare_ties", density=1.0).read(name)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_fused_experts_are_combined_one_by_one(tiny: Builder, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    path, module = float32(tiny, "gpt_oss"), "model.layers.0.mlp.experts"
    loras = []
    for seed in (0, 7):
        own = {f"{module}.lora_A.weight": noise(16, 40, seed=seed),
               f"{module}.lora_B.weight": noise(64, 16, seed=seed + 1)}  # fmt: skip
        config = {"target_parameters": ["mlp.experts.down_proj"]}
        loras.append(adapter(tmp_path / str(seed), own, **config))
    name = f"{module}.down_proj"
    deltas = changes(path, loras, name)
    found = merged(path, loras, [1.0, 1.0], method="ties", density=0.2).read(name)
    for expert in range(4):
        own_deltas = [trimmed(delta[expert], 0.2) for delta in deltas]
        wanted = Checkpoint.open(path).read(name)[expert] + elected(own_deltas, [1.0, 1.0])
        torch.testing.assert_close(found[expert], wanted, rtol=1e-5, atol=1e-5)


def test_command_records_and_resumes_one_way_only(
    base: Path, loras: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    args = ["merge", str(base), "--combine", "dare_ties", "--density", "0.4", "--seed", "3", "-q"]
    both = [arg for path in loras for arg in ("--lora", str(path))]
    monkeypatch.setattr("bitnest.api.writing._verify", lambda *_: (_ for _ in ()).throw(OSError()))
    assert CliRunner().invoke(app, [*args, *both, "-o", str(tmp_path / "out")]).exit_code != 0
    monkeypatch.undo()
    with pytest.raises(ArtifactError, match="other inputs"):
        api.merge(base, [str(p) for p in loras], tmp_path / "out")
    done = CliRunner().invoke(app, [*args, *both, "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "out" / "merged.json").read_text())
    assert record["combine"] == {"method": "dare_ties", "density": 0.4, "seed": 3}
    written = Checkpoint.open(tmp_path / "out")
    wanted = merged(base, loras, [1.0, 1.0], method="dare_ties", density=0.4, seed=3)
    assert all(torch.equal(written.read(name), wanted.read(name)) for name in written.tensors)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"combine": "luck"}, "unknown way"),
        ({"combine": "ties", "density": 0.0}, "no share"),
        ({"combine": "ties", "density": 1.5}, "no share"),
        ({"density": 0.5}, "for ties and dare"),
        ({"combine": "ties", "seed": 1}, "for dare"),
    ],
)
def test_options_that_say_nothing_are_refused(
    base: Path, loras: list[Path], tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(BitnestError, match=said) as caught:
        api.merge(base, [str(p) for p in loras], tmp_path / "out", **options)
    assert caught.value.hint and not (tmp_path / "out").exists()


def test_without_peft_the_extra_is_named(
    base: Path, loras: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitnest.errors.find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match="peft") as caught:
        api.merge(base, [str(p) for p in loras], tmp_path / "out", combine="ties")
    assert "bitnest[lora]" in str(caught.value.hint)
    assert api.merge(base, [str(p) for p in loras], tmp_path / "out").changed == 2
