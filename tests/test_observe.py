"""What the observer sums equals loops over single tokens in float64, whatever runs the experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from bitnest.calibrate import stream as streaming
from bitnest.calibrate.collector import reference_experts
from bitnest.calibrate.moments import Moments, top_count
from bitnest.calibrate.observe import ExpertSums, Observer
from bitnest.calibrate.sensitivity import sample_rows
from bitnest.calibrate.stream import Stream
from bitnest.checkpoint import Checkpoint
from bitnest.skeleton import Skeleton
from tests import brute
from tests.brute import LABELS, LENGTH, NAMES, close, numpy, whole

MOE = ["qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v2", "deepseek_v3", "gpt_oss"]
MODELS = [(f, i) for f in MOE for i in ("eager", "grouped_mm")] + [
    ("llama", "eager"), ("gpt2", "eager"), ("gemma2", "eager"),
]  # fmt: skip
EXPERT_MODELS = MODELS[: 2 * len(MOE)]
Everything = Callable[[int], bool]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("brute")


@cache
def recorded(root: Path, family: str, implementation: str) -> brute.Recorded:
    model = brute.load(brute.checkpoint(root, family), implementation)
    if family in MOE:
        assert model.config._experts_implementation == implementation
    return brute.record(model, brute.text())


@cache
def observed(root: Path, family: str) -> list[Observer]:
    return observe(brute.checkpoint(root, family))


def observe(
    path: Path,
    passes: Iterable[Everything] = (lambda _: True,),
    batch: int = 2,
    **options: Any,
) -> list[Observer]:
    """Observers of all blocks: batches of at most `batch` samples, a pass per set of experts."""
    skeleton, names = Skeleton.build(Checkpoint.open(path)), [NAMES[d] for d in LABELS]
    with mock.patch.object(streaming, "BATCH_TOKENS", batch * LENGTH):
        stream = Stream(
            skeleton, brute.text(), dtype=torch.float32, device=torch.device("cpu"), labels=names
        )
    seen = []
    for layer, block in enumerate(skeleton.blocks):
        prefix = f"{skeleton.prefix}.{layer}"
        skeleton.fill(prefix, dtype=stream.dtype, device=stream.device)
        seen.append(Observer(block, prefix, **{"labels": 3, "full": True, **options}))
        with torch.no_grad(), seen[-1] as observer:
            for number, experts in enumerate(passes):
                observer.experts, observer.first_pass = experts, number == 0
                for part in stream.batches():
                    observer.before_batch(LABELS[part.start], part.start * LENGTH)
                    stream.forward(layer, stream.hidden[part])
                    observer.after_batch()
        with reference_experts(m for m in block.modules() if brute.is_experts(m)):
            stream.run(layer, keep=True)
        skeleton.drop(prefix)
    return seen


def fused(observers: list[Observer]) -> dict[str, ExpertSums]:
    return {name: sums for observer in observers for name, sums in observer.fused.items()}


def check_moments(moments: Moments, rows: brute.Rows, place: Any = slice(None)) -> None:
    assert moments.tokens[place].tolist() == rows.tokens.tolist()
    assert moments.over_six[place].tolist() == rows.over_six.tolist()
    for d in range(len(NAMES)):
        for name in ("absmax", "abs", "square", "peaks"):
            assert close(getattr(moments, name)[place][d], getattr(rows, name)[d]), (name, d)
    energy = np.maximum(rows.square.sum(1, keepdims=True), 1e-300)
    kappa = np.sqrt(np.where(energy > 1e-300, rows.peaks / energy, 1.0))
    assert close(moments.kappa()[place], kappa)


@pytest.mark.parametrize(("family", "implementation"), MODELS)
def test_what_linear_layers_read_is_what_transformers_gave_them(
    family: str, implementation: str, root: Path
) -> None:
    seen = recorded(root, family, implementation)
    readers = {
        reader: own
        for observer in observed(root, family)
        for own in observer.inputs.values()
        for reader in own.readers
    }
    assert set(readers) == {name for name in seen.inputs if ".layers." in name or ".h." in name}
    for name, own in readers.items():
        rows = brute.linear_rows(seen, name, LABELS)
        check_moments(own.moments, rows)
        assert own.hessian is not None
        for d in range(len(NAMES)):
            assert close(whole(own.hessian)[d], rows.hessian[d]), (name, d)


def test_layers_that_read_one_tensor_share_its_sums_and_others_do_not(root: Path) -> None:
    groups = [own.readers for own in observed(root, "deepseek_v3")[1].inputs.values()]
    short = [{name.removeprefix("model.layers.1.") for name in group} for group in groups]
    assert {"self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"} in short
    assert {"self_attn.q_b_proj"} in short and {"self_attn.kv_b_proj"} in short
    assert {"mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"} in short
    assert {"mlp.shared_experts.down_proj"} in short


@pytest.mark.parametrize(("family", "implementation"), EXPERT_MODELS)
def test_what_experts_read_and_gave_is_summed_with_its_gates(
    family: str, implementation: str, root: Path
) -> None:
    seen, layers = recorded(root, family, implementation), fused(observed(root, family))
    assert set(layers) == set(seen.routed)
    for name, sums in layers.items():
        expected = brute.expert_layer(seen, name, LABELS)
        for d in range(len(NAMES)):
            for e in range(len(expected.up)):
                assert close(sums.norms[d, e], expected.norms[d, e])
                assert close(sums.output[d, e], expected.output[d, e])
                assert close(sums.output2[d, e], expected.output2[d, e])
        for e, rows in enumerate(expected.up):
            check_moments(sums.up, rows, (slice(None), e))
            check_moments(sums.down, expected.down[e], (slice(None), e))
        assert sums.tokens.sum() == sums.top_k * len(LABELS) * LENGTH
        check_hessians(sums, expected)


def check_hessians(sums: ExpertSums, expected: brute.ExpertLayer) -> None:
    for e, (up, down) in enumerate(zip(expected.up, expected.down, strict=True)):
        assert close(sums.weight[:, e], up.weight)
        if not up.tokens.any():
            assert e not in sums.hessians
            continue
        for d in range(len(NAMES)):
            assert close(whole(sums.hessians[e][0])[d], up.hessian[d])
            assert close(whole(sums.hessians[e][1])[d], down.hessian[d])


@pytest.mark.parametrize(("family", "implementation"), EXPERT_MODELS)
def test_router_logits_margins_and_choices_are_the_models(
    family: str, implementation: str, root: Path
) -> None:
    seen, layers = recorded(root, family, implementation), fused(observed(root, family))
    for name, sums in layers.items():
        expected = brute.expert_layer(seen, name, LABELS)
        assert sums.logits is not None and sums.logits2 is not None and sums.margins is not None
        assert close(sums.logits, expected.logits)
        assert close(sums.logits2, expected.logits2)
        assert sums.margins.tolist() == expected.margins.tolist()
        assert torch.cat(sums.trace).tolist() == expected.trace.tolist()


@pytest.mark.parametrize("weighting", ["none", "gate", "gate2"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_tokens_weigh_in_an_experts_hessian_as_asked(
    family: str, weighting: str, root: Path
) -> None:
    seen = recorded(root, family, "eager")
    layers = fused(observe(brute.checkpoint(root, family), weighting=weighting))
    for name, sums in layers.items():
        check_hessians(sums, brute.expert_layer(seen, name, LABELS, weighting))


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_hessians_summed_in_several_passes_count_everything_once(family: str, root: Path) -> None:
    some = (lambda e: e in {1}, lambda e: e in {0, 3}, lambda e: e == 2)
    parted = observe(brute.checkpoint(root, family), passes=some)
    for one, other in zip(parted, observed(root, family), strict=True):
        assert one.inputs.keys() == other.inputs.keys()
        for name, own in one.inputs.items():
            same_sums(asdict(own.moments), asdict(other.inputs[name].moments))
            assert torch.equal(own.hessian, other.inputs[name].hessian)  # type: ignore[arg-type]
        for name, sums in one.fused.items():
            whole_sums = other.fused[name]
            assert sums.hessians.keys() == whole_sums.hessians.keys()
            for e, (up, down) in sums.hessians.items():
                assert torch.equal(up, whole_sums.hessians[e][0])
                assert torch.equal(down, whole_sums.hessians[e][1])
            same_sums(asdict(sums.up), asdict(whole_sums.up))
            same_sums(asdict(sums.down), asdict(whole_sums.down))
            same_sums(vars(sums), vars(whole_sums))
            assert torch.equal(torch.cat(sums.trace), torch.cat(whole_sums.trace))


def same_sums(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[name]), name


def test_a_pass_for_some_experts_holds_no_other_experts_hessian(root: Path) -> None:
    layers = fused(observe(brute.checkpoint(root, "qwen3_moe"), passes=[lambda e: e == 2]))
    for sums in layers.values():
        assert list(sums.hessians) == [2]
        assert (sums.weight[:, 2] > 0).all() and sums.weight[:, [0, 1, 3]].eq(0).all()
        assert (sums.tokens.sum(0) > 0).all()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt2"])
def test_without_hessians_all_else_is_the_same(family: str, root: Path) -> None:
    lean = observe(brute.checkpoint(root, family), full=False)
    for one, other in zip(lean, observed(root, family), strict=True):
        for name, own in one.inputs.items():
            assert own.hessian is None
            same_sums(asdict(own.moments), asdict(other.inputs[name].moments))
        for name, sums in one.fused.items():
            assert not sums.hessians and not sums.full and sums.weight.eq(0).all()
            for part in ("norms", "output", "output2", "logits", "margins"):
                assert torch.equal(getattr(sums, part), getattr(other.fused[name], part))


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_sums_do_not_depend_on_how_samples_are_batched(batch: int, root: Path) -> None:
    seen = recorded(root, "qwen3_moe", "eager")
    observers = observe(brute.checkpoint(root, "qwen3_moe"), batch=batch)
    for name, sums in fused(observers).items():
        expected = brute.expert_layer(seen, name, LABELS)
        check_hessians(sums, expected)
        assert close(sums.norms, expected.norms)
        assert torch.cat(sums.trace).tolist() == expected.trace.tolist()
    own = observers[0].inputs["model.layers.0.self_attn.q_proj"]
    check_moments(own.moments, brute.linear_rows(seen, own.readers[0], LABELS))


@pytest.mark.parametrize("tokens", [200, 37])
def test_sampled_rows_are_those_tokens_of_the_layers_input(tokens: int, root: Path) -> None:
    sample = sample_rows(200, [], None) if tokens == 200 else torch.arange(3, 188, 5)
    assert len(sample) == tokens and sample.diff().gt(0).all()
    seen = recorded(root, "mixtral", "eager")
    for observer in observe(brute.checkpoint(root, "mixtral"), sample=sample, full=False):
        for name, rows in observer.rows.items():
            hidden = np.concatenate([call.hidden for call in seen.routed[name]])
            assert close(torch.cat(rows), hidden[sample.numpy()])


def test_a_layer_of_more_tokens_than_its_sample_is_sampled_evenly() -> None:
    sample = sample_rows(1000, [64, 300], None)
    assert len(sample) == 300 and sample[0] == 0 and sample[-1] == 999
    assert sample.diff().min() >= 3 and sample.diff().max() <= 4


def test_ranks_count_rows_in_which_a_channel_is_among_the_largest(root: Path) -> None:
    for sums in fused(observed(root, "qwen3_moe")).values():
        for moments in (sums.up, sums.down):
            assert (moments.ranked <= moments.tokens).all()
            assert (moments.ranked[moments.tokens > 0] > 0).all()
            assert torch.equal(moments.ranks.sum(-1), moments.ranked * top_count(moments.width))
    own = observed(root, "qwen3_moe")[0].inputs["model.layers.0.self_attn.q_proj"].moments
    assert own.ranks.sum(0).argmax() == 3  # the channel that the checkpoint's norms make stand out


def test_an_expert_that_no_token_chose_has_zeros_and_no_nan(root: Path) -> None:
    def starve(model: Any) -> None:
        for block in model.model.layers:
            block.mlp.router.bias.data[1] = -1e4

    path = brute.checkpoint(root, "gpt_oss", "starved", tweak=starve)
    for sums in fused(observe(path)).values():
        assert sums.tokens[:, 1].eq(0).all() and 1 not in sums.hessians
        assert sums.norms[:, 1].eq(0).all() and sums.weight[:, 1].eq(0).all()
        for moments in (sums.up, sums.down):
            for value in (moments.mean_square(), moments.mean_abs()):
                assert value[:, 1].eq(0).all() and value.isfinite().all()
            assert moments.kappa()[:, 1].eq(1).all()


def test_as_many_experts_as_a_token_takes_leave_no_margin(root: Path) -> None:
    path = brute.checkpoint(root, "mixtral", "all", num_experts_per_tok=4)
    for sums in fused(observe(path)).values():
        assert sums.margins is not None and sums.margins.eq(0).all()
        assert sums.tokens.sum(0).tolist() == [len(LABELS) * LENGTH] * 4


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "gpt2"])
def test_a_watched_block_gives_what_it_gives_unwatched(family: str, root: Path) -> None:
    skeleton = Skeleton.build(Checkpoint.open(brute.checkpoint(root, family)))
    options = {"dtype": torch.float32, "device": torch.device("cpu")}
    stream = Stream(skeleton, brute.text(3), **options)
    skeleton.fill(f"{skeleton.prefix}.0", **options)
    with torch.no_grad():
        before = stream.forward(0, stream.hidden)
        with Observer(skeleton.blocks[0], f"{skeleton.prefix}.0", labels=1, full=True) as observer:
            inside = stream.forward(0, stream.hidden)
            observer.after_batch()
        counts = [own.moments.tokens.sum() for own in observer.inputs.values()]
        after = stream.forward(0, stream.hidden)
    assert torch.allclose(inside, before, atol=1e-5) and torch.equal(after, before)
    assert counts == [own.moments.tokens.sum() for own in observer.inputs.values()]
    assert not any("forward" in vars(m) for m in skeleton.blocks[0].modules())


class Listed(nn.Module):
    """Experts in a ModuleList: each reads rows of its own, at first none."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))

    def forward(self, parts: list[torch.Tensor | None]) -> None:
        for module, x in zip(self.experts, parts, strict=True):
            if x is not None:
                module(x)


def test_listed_experts_without_tokens_at_first_keep_sums_of_their_own() -> None:
    block, rows = Listed(), [torch.randn(n, 4) for n in (10, 40, 50)]
    with torch.no_grad(), Observer(block, "b", labels=1, full=True) as observer:
        block([torch.empty(0, 4), torch.empty(0, 4), None])
        observer.after_batch()
        block(rows)
        observer.after_batch()
    for i, x in enumerate(rows):
        own = observer.inputs[f"b.experts.{i}"]
        assert own.readers == [f"b.experts.{i}"] and int(own.moments.tokens) == len(x)
        assert own.hessian is not None
        assert close(whole(own.hessian)[0], numpy(x).T @ numpy(x))


def test_rows_that_lie_transposed_in_memory_are_read_in_order() -> None:
    x = torch.randn(1, 4, 9).transpose(1, 2)  # (1, 9, 4), as state-space layers give it
    block = Listed()
    with torch.no_grad(), Observer(block, "b", labels=1, full=True) as observer:
        block([x, None, None])
    own = observer.inputs["b.experts.0"]
    assert close(own.moments.square[0], (numpy(x[0]) ** 2).sum(0))
    assert own.hessian is not None
    assert close(whole(own.hessian)[0], numpy(x[0]).T @ numpy(x[0]))


class Ungated(nn.Module):
    """Experts of two matrices with ReLU between them, as transformers' interface has them."""

    has_gate, has_bias, is_transposed, num_experts = False, False, False, 3

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(3, 10, 6))
        self.down_proj = nn.Parameter(torch.randn(3, 6, 10))
        self.act_fn = nn.ReLU()

    def _apply_gate(self, up: torch.Tensor) -> torch.Tensor:
        raise AssertionError("there is no gate")


def test_experts_without_a_gate_and_without_a_router_in_sight_are_summed() -> None:
    module, hidden = Ungated(), torch.randn(30, 6)
    index, gates = torch.rand(30, 3).topk(2).indices, torch.rand(30, 2)
    with torch.no_grad(), Observer(nn.ModuleDict({"m": module}), "b", labels=1, full=True) as seen:
        module(hidden, index, gates)
    sums = seen.fused["b.m"]
    assert sums.logits is None and sums.logits2 is None and sums.margins is None
    reap, down = np.zeros(3), np.zeros((3, 10, 10))
    for x, row, own in zip(numpy(hidden), index.tolist(), numpy(gates), strict=True):
        for e, gate in zip(row, own, strict=True):
            inner = np.maximum(numpy(module.up_proj[e]) @ x, 0)
            reap[e] += gate * np.linalg.norm(numpy(module.down_proj[e]) @ inner)
            down[e] += gate * np.outer(inner, inner)
    assert close(sums.norms[0, :, 3], reap)
    assert close(np.stack([whole(sums.hessians[e][1])[0] for e in range(3)]), down)
