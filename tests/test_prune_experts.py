"""Which experts go: scores against their formulas, what takes their place, routers tuned."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bitnest import api
from bitnest.api.pruning import Pruner, kept_experts
from bitnest.calibrate.data import CalibrationSet
from bitnest.checkpoint import Checkpoint
from bitnest.cli import app
from bitnest.errors import BitnestError, RecipeError
from bitnest.expert_axes import expert_axes
from bitnest.packed.loading import load_model
from bitnest.progress import Silent
from bitnest.prune.blocks import influences, least_blocks
from bitnest.prune.experts.choose import (
    constant,
    fate_errors,
    layer_error,
    reduce_layer,
    replace_experts,
)
from bitnest.prune.experts.merging import clusters, merged, merged_output
from bitnest.prune.experts.probe import LayerProbe, probe_layers
from bitnest.prune.experts.scores import SCORES, elimination, ranked, reap, relative
from bitnest.reduced import ReducedCheckpoint, Reduction
from bitnest.repair.routers import Targets, tune_routers
from bitnest.skeleton import Skeleton
from tests.tiny import VOCAB, Builder, words

MOES = ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "olmoe"]
CPU = torch.device("cpu")


def windows(count: int = 6, length: int = 16, labels: tuple[str, ...] = ("a", "b")) -> Any:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB, (count, length), generator=generator)
    names = tuple(labels[i * len(labels) // count] for i in range(count))
    return CalibrationSet(tokens, names, {n: names.count(n) for n in labels}, "0" * 64)


def probes(path: Path, calibration: Any = None) -> Iterator[LayerProbe]:
    skeleton = Skeleton.build(Checkpoint.open(path))
    return probe_layers(
        skeleton, calibration or windows(), dtype=torch.float32, device=CPU, progress=Silent()
    )


def states(model: Any, tokens: torch.Tensor, block: int) -> torch.Tensor:
    """What a block gives, (tokens, hidden)."""
    seen = []
    layer = model.model.layers[block]

    def keep(_: Any, __: Any, out: Any) -> None:
        seen.append((out[0] if isinstance(out, tuple) else out).flatten(0, 1))

    handle = layer.register_forward_hook(keep)
    with torch.no_grad():
        model(tokens)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", MOES)
def test_a_layer_without_experts_is_what_the_reduced_model_computes(
    family: str, tiny: Builder
) -> None:
    """The error predicted for dropped experts is the change of the block's output, measured."""
    path = tiny(family)
    if family == "deepseek_v3":  # two groups, which lose as many each
        path = tiny(family, "eight", n_routed_experts=8)
    calibration = windows()
    whole = load_model(path, dtype=torch.float32)
    for probe in probes(path, calibration):
        kept = ranked(probe, "reap", probe.experts - probe.groups)
        layer = replace_experts(probe, kept, "drop").layer
        reduced = ReducedCheckpoint.of(Checkpoint.open(path), Reduction({probe.block: layer}))
        skeleton = Skeleton.build(reduced)
        skeleton.fill("", dtype=torch.float32, device=CPU)
        skeleton.model.tie_weights()
        before = states(whole, calibration.tokens, probe.block)
        after = states(skeleton.model, calibration.tokens, probe.block)
        share = (after - before).square().sum(1) / before.square().sum(1)
        half = len(share) // 2
        expected = (share[:half].mean() + share[half:].mean()) / 2
        assert probe.without(kept) == pytest.approx(float(expected), rel=2e-3, abs=1e-9)
        return
    raise AssertionError("no layer of experts")


def test_scores_are_their_formulas(tiny: Builder) -> None:
    for probe in probes(tiny("qwen3_moe")):
        for e in range(probe.experts):
            chosen = (probe.index == e).any(1)
            given = [
                float(g) * float(probe.outputs[e, t].norm())
                for t, own in enumerate(probe.index)
                for i, g in zip(own.tolist(), probe.gates[t], strict=True)
                if i == e
            ]
            mean = math.fsum(given) / len(given) if given else 0.0
            assert float(reap(probe)[e]) == pytest.approx(mean, rel=1e-5)
            assert float(ranked_score(probe, "frequency")[e]) == pytest.approx(
                float(chosen.float().mean())
            )
            assert float(ranked_score(probe, "output")[e]) == pytest.approx(
                math.fsum(v * v for v in given) / len(probe.index), rel=1e-5
            )


def ranked_score(probe: LayerProbe, name: str) -> torch.Tensor:
    from bitnest.prune.experts.scores import SIMPLE

    return SIMPLE[name](probe)


def test_elimination_takes_the_least_each_time_and_naee_the_best_of_all(tiny: Builder) -> None:
    for probe in probes(tiny("qwen3_moe")):
        left = list(range(probe.experts))
        for expert, error in elimination(probe, 2):
            others = {e: probe.without([f for f in left if f != e]) for e in left}
            assert error == pytest.approx(others[expert])
            # errors of earlier rounds are bounds, or nearly: within a tenth of the least
            assert error <= 1.1 * min(others.values()) + 1e-9
            left.remove(expert)
        best = min(itertools.combinations(range(probe.experts), 2), key=probe.without)
        assert ranked(probe, "naee", 2) == list(best)
        assert probe.without(ranked(probe, "naee", 2)) <= probe.without(ranked(probe, "reap", 2))


def test_a_probe_leaves_the_block_as_it_was(tiny: Builder) -> None:
    for probe in probes(tiny("deepseek_v3")):
        before = {n: t.clone() for n, _, t in probe.router_tensors()}
        relative(probe)
        assert probe.without(range(probe.experts)) == 0
        after = {n: t for n, _, t in probe.router_tensors()}
        assert all(torch.equal(before[n], after[n]) for n in before)
        assert "forward" not in vars(probe.module)


def test_constants_are_the_best_of_all_constants(tiny: Builder) -> None:
    for probe in probes(tiny("qwen3_moe")):
        expert = int(probe.index.flatten().mode().values)
        own = constant(probe, expert)
        least = probe.replaced({expert: own})
        generator = torch.Generator().manual_seed(0)
        for _ in range(8):
            moved = own + 0.05 * own.norm() * torch.randn(own.shape, generator=generator)
            assert probe.replaced({expert: moved}) >= least


@pytest.mark.parametrize("fate", ["zero", "copy", "constant", "best"])
def test_replacements_run_as_they_are_scored(fate: str, tiny: Builder, tmp_path: Path) -> None:
    """One expert replaced: the artifact's block gives what the probe said."""
    path, calibration = tiny("qwen3_moe"), windows()
    pruner = _pruner(path, calibration)
    found = []
    for probe in probes(path, calibration):
        kept = [e for e in range(probe.experts) if e != 2]
        own = replace_experts(probe, kept, fate)
        errors = fate_errors(probe, 2)
        found.append((probe.block, own, min(errors.values()) if fate == "best" else errors[fate]))
        break
    block, own, error = found[0]
    reduction = pruner._reduction({block: own}, ())
    skeleton = Skeleton.build(pruner.reduced(reduction))
    skeleton.fill("", dtype=torch.float32, device=CPU)
    skeleton.model.tie_weights()
    whole = load_model(path, dtype=torch.float32)
    before = states(whole, calibration.tokens, block)
    after = states(skeleton.model, calibration.tokens, block)
    share = (after - before).square().sum(1) / before.square().sum(1)
    half = len(share) // 2
    expected = float((share[:half].mean() + share[half:].mean()) / 2)
    assert error == pytest.approx(expected, rel=2e-2, abs=1e-9)  # constants are stored in bfloat16


def change(path: Path, reduced: Any, calibration: Any, block: int) -> float:
    """Relative change of what a block gives, by running both models."""
    skeleton = Skeleton.build(reduced)
    skeleton.fill("", dtype=torch.float32, device=CPU)
    skeleton.model.tie_weights()
    before = states(load_model(path, dtype=torch.float32), calibration.tokens, block)
    after = states(skeleton.model, calibration.tokens, block)
    share = (after - before).square().sum(1) / before.square().sum(1)
    half = len(share) // 2
    return float((share[:half].mean() + share[half:].mean()) / 2)


def _pruner(path: Path, calibration: Any) -> Pruner:
    pruner = Pruner.__new__(Pruner)
    pruner.base, pruner.seed, pruner.trust = Checkpoint.open(path), 0, False
    pruner.progress, pruner.device = Silent(), CPU
    pruner.skeleton, pruner.calibration = Skeleton.build(pruner.base), calibration
    return pruner


def test_merging_finds_twins_whatever_the_order_of_their_neurons(tiny: Builder) -> None:
    for probe in probes(tiny("qwen3_moe")):
        module = probe.module
        width = module.down_proj.shape[2]
        order = torch.randperm(width, generator=torch.Generator().manual_seed(3))
        rows = torch.cat([order, order + width])
        with torch.no_grad():  # expert 3 becomes expert 0 with its neurons in another order
            module.gate_up_proj[3] = module.gate_up_proj[0][rows]
            module.down_proj[3] = module.down_proj[0][:, order]
        twin = LayerProbe(
            probe.block, probe.name, module, probe.parent, probe.axes, probe.x, probe.label,
            probe.scale,
        )  # fmt: skip
        groups = clusters(twin, twin.experts - 1)
        assert [0, 3] in groups and len(groups) == twin.experts - 1
        own = merged(twin, [0, 3], align=True)
        assert math.isclose(sum(own.weights), 1, abs_tol=1e-6)
        torch.testing.assert_close(merged_output(twin, own), twin.outputs[0], rtol=1e-4, atol=1e-5)
        plain = merged_output(twin, merged(twin, [0, 3], align=False))
        assert (plain - twin.outputs[0]).norm() > 0.1 * twin.outputs[0].norm()
        return


@pytest.mark.parametrize("ordinary", [False, True])
def test_merged_layers_are_models(ordinary: bool, tiny: Builder) -> None:
    path, calibration = tiny("qwen3_moe"), windows()
    pruner = _pruner(path, calibration)
    layers = {
        p.block: reduce_layer(p, p.experts - 1, fate="merge", align=True, ordinary=ordinary)
        for p in probes(path, calibration)
    }
    reduced = pruner.reduced(pruner._reduction(layers, ()))
    assert reduced.ordinary is ordinary
    running = probes(path, calibration)  # its block keeps its weights while it waits
    first = next(running)
    one = pruner._reduction({first.block: layers[first.block]}, ())
    if ordinary:  # a model with one layer of fewer experts is none
        one = replace(
            one,
            experts={
                **one.experts,
                **{b: _all(first.experts) for b in pruner.axes.modules if b != first.block},
            },
        )
    error = layer_error(first, layers[first.block])
    assert error == pytest.approx(change(path, pruner.reduced(one), calibration, first.block), 2e-2)
    skeleton = Skeleton.build(reduced)
    skeleton.fill("", dtype=torch.float32, device=CPU)
    skeleton.model.tie_weights()
    with torch.no_grad():
        assert skeleton.model(calibration.tokens).logits.isfinite().all()


def test_targets_are_a_bound_of_the_kl_and_exact_for_small_vocabularies() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 1, 5, 12, generator=generator)
    own = p.log_softmax(-1)
    full = (own.exp() * (own - q.log_softmax(-1))).sum(-1).mean()
    kls = []
    for top in (3, 11):
        best = own.topk(top)
        rest = (1 - best.values.exp().sum(-1, keepdim=True)).log()
        targets = Targets(best.indices, torch.cat([best.values, rest], -1))
        kls.append(float(targets.kl(q, torch.tensor([0]))))
    assert kls[0] <= float(full) + 1e-6
    assert kls[1] == pytest.approx(float(full), rel=1e-5)


def test_tuning_undoes_a_router_that_was_spoilt(tiny: Builder) -> None:
    """The reduced model lacks nothing but its router is wrong: tuning lowers the KL."""
    path = tiny("qwen3_moe")
    original = Skeleton.build(Checkpoint.open(path))
    axes = expert_axes(original.model, original.prefix)
    name = "model.layers.0.mlp.gate.weight"
    generator = torch.Generator().manual_seed(0)
    right = original.checkpoint.read(name).float()
    wrong = right + right.std() * torch.randn(right.shape, generator=generator)
    base = Checkpoint.open(path)
    reduced = ReducedCheckpoint.of(base, Reduction({0: _all(axes.count)}, (), {name: wrong}))
    student = Skeleton.build(reduced)
    found = tune_routers(
        original, student, axes, windows(16), steps=24, device=CPU, dtype=torch.float32, seed=0,
        progress=Silent(),
    )  # fmt: skip
    assert found.tensors and found.after < 0.95 * found.before
    assert name in found.tensors and found.tensors[name].shape == wrong.shape


def _all(count: int) -> Any:
    from bitnest.reduced import LayerExperts, Own

    every = tuple(range(count))
    return LayerExperts(tuple(Own((e,)) for e in every), every, every)


def test_tuning_leaves_alone_what_cannot_be_better(tiny: Builder) -> None:
    path = tiny("qwen3_moe")
    original, same = (Skeleton.build(Checkpoint.open(path)) for _ in range(2))
    axes = expert_axes(original.model, original.prefix)
    found = tune_routers(
        original, same, axes, windows(8), steps=2, device=CPU, dtype=torch.float32, seed=0,
        progress=Silent(),
    )  # fmt: skip
    assert found.tensors == {} and found.before == pytest.approx(0, abs=1e-6)


def test_blocks_that_change_nothing_go_first(tiny: Builder, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = tiny("qwen3_moe", "silent", num_hidden_layers=4)
    state = load_file(path / "model.safetensors")
    for name, tensor in state.items():
        if name.startswith("model.layers.2.") and ("o_proj" in name or "down_proj" in name):
            tensor.zero_()
    save_file(state, path / "model.safetensors")
    skeleton = Skeleton.build(Checkpoint.open(path))
    dropped, found = least_blocks(
        skeleton, windows(), 1, dtype=torch.float32, device=CPU, progress=Silent()
    )
    assert dropped == (2,) and found[2] == pytest.approx(0, abs=1e-5)
    assert min(found[b] for b in (0, 1, 3)) > found[2]
    again = influences(skeleton, windows(), dtype=torch.float32, device=CPU, progress=Silent())
    assert again == found


def test_prune_writes_what_transformers_opens(tiny: Builder, tmp_path: Path) -> None:
    path, out = tiny("qwen3_moe", "pruned", num_hidden_layers=4), tmp_path / "out"
    text = tmp_path / "t.txt"
    text.write_text(words(4000), encoding="utf-8")
    arguments = [
        "prune", str(path), "--experts", "50%", "--blocks", "1", "-o", str(out), "--data",
        str(text), "--samples", "12", "--length", "16", "--json",
    ]  # fmt: skip
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    said = json.loads(done.stdout)
    config = json.loads((out / "config.json").read_text())
    key = next(k for k in ("num_experts", "num_local_experts") if k in config)
    count = json.loads((path / "config.json").read_text())[key]
    assert config[key] == count // 2 and config["num_hidden_layers"] == 3
    assert "bitnest_experts" not in config
    assert said["blocks"] == [4, 3] and said["experts"] == [count, count // 2]
    record = json.loads((out / "reduction.json").read_text())
    assert record["dropped"] == said["reduction"]["dropped"] and record["base"] != record["sha256"]
    model = load_model(out, dtype=torch.float32)
    with torch.no_grad():
        assert model(windows().tokens).logits.isfinite().all()
    shared = api.compress(out, tmp_path / "small", bits=4, method="rtn")
    assert shared.path.exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "nothing to prune"),
        ({"experts": "0"}, "'0' of"),
        ({"experts": "150%"}, "'150%' of"),
        ({"experts": "100%"}, "all 4 experts stay"),
        ({"blocks": 1, "tune": True}, "--tune says nothing"),
        ({"experts": "many"}, "'many' of"),
        ({"experts": "1"}, "experts, where a token chooses"),
        ({"experts": "50%", "align": True}, "experts that are merged"),
        ({"experts": "50%", "fate": "merge", "score": "reap"}, "says nothing"),
        ({"experts": "50%", "statistics": "nowhere"}, "for gradients"),
        ({"blocks": 1, "score": "reap"}, "no experts go"),
        ({"experts": "50%", "samples": 4, "tune": True}, "too few to tune"),
        ({"experts": "50%", "length": 1}, "windows of 1 tokens"),
        ({"experts": "50%", "score": "luck"}, "unknown score"),
        ({"experts": "50%", "fate": "constant"}, "no ordinary model"),
        ({"experts": "50%", "score": "fisher"}, "needs gradients"),
        ({"blocks": 9}, "9 of"),
    ],
)
def test_what_cannot_be_pruned_is_said_before_work(
    options: dict[str, Any], said: str, tiny: Builder, tmp_path: Path
) -> None:
    text = tmp_path / "t.txt"
    text.write_text(words(2000), encoding="utf-8")
    with pytest.raises(BitnestError, match=said):
        api.prune(
            tiny("qwen3_moe"), tmp_path / "out",
            **{"data": [str(text)], "samples": 8, "length": 16, **options},
        )  # fmt: skip
    assert not list(tmp_path.glob("out*"))


def test_dense_models_have_no_experts(tiny: Builder, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text(words(2000), encoding="utf-8")
    with pytest.raises(BitnestError, match="experts"):
        api.prune(tiny("llama"), tmp_path / "out", experts="50%", data=[str(text)], samples=8,
                  length=16)  # fmt: skip


def test_numbers_of_experts() -> None:
    assert [kept_experts(t, 16) for t in ("75%", "12", "50%", "16")] == [12, 12, 8, 16]
    with pytest.raises(RecipeError):
        kept_experts("nan%", 16)
    assert set(SCORES) >= {"relative", "reap", "naee"}
