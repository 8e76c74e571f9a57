"""The Fisher against autograd through whole models, and its two formulas against exact algebra."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bitnest.calibrate import fisher as module
from bitnest.calibrate import stream as streaming
from bitnest.calibrate.fisher import Fisher, measure_fisher
from bitnest.calibrate.stream import Stream
from bitnest.calibrate.tail import open_tail
from bitnest.checkpoint import Checkpoint
from bitnest.errors import UnsupportedModel
from bitnest.progress import Silent
from bitnest.sites import ENDS, Site
from bitnest.sites import find_sites as every_site
from bitnest.skeleton import Skeleton
from tests import brute
from tests.brute import EXTRA, LABELS, LENGTH, NAMES, close, kl, numpy
from tests.tiny import FAMILIES

MODELS = ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "qwen2_moe", "llama", "gpt2", "gemma2"]
CPU: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
SEED = 5
CAP = 0.1  # of gemma2's logits, so low that it bites


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("brute")


@cache
def skeleton(path: Path) -> Skeleton:
    return Skeleton.build(Checkpoint.open(path))


def find_sites(own: Skeleton) -> list[Site]:
    """Sites of the blocks."""
    return [site for site in every_site(own) if site.kind not in ENDS]


def open_stream(path: Path, batch: int = 2) -> Stream:
    with mock.patch.object(streaming, "BATCH_TOKENS", batch * LENGTH):
        return Stream(skeleton(path), brute.text(), labels=[NAMES[d] for d in LABELS], **CPU)


def streamed(path: Path, kind: str, batch: int = 2) -> Fisher:
    options = {"kind": kind, "seed": SEED, "progress": Silent()}
    return measure_fisher(open_stream(path, batch), brute.text(), LABELS, len(NAMES), **options)


def seeds_of_the_backward_pass(logits: list[torch.Tensor], kind: str) -> list[torch.Tensor]:
    """v of every window (T - 1, V): what the loss' gradient or the KL's square root asks for."""
    generator = torch.Generator().manual_seed(SEED)
    seeds = []
    for tokens, own in zip(brute.text(), logits, strict=True):
        p = own.detach()[:-1].double().softmax(1)
        if kind == "kl":
            e = torch.randn(p.shape, generator=generator).double()
            seeds.append(torch.einsum("tv,tvw->tw", e, kl_root(p).transpose(1, 2)))
        else:
            seeds.append(p - F.one_hot(tokens[1:], p.shape[1]))
    return seeds


def kl_root(p: torch.Tensor) -> torch.Tensor:
    """A with v = A e, as written down: diag(sqrt p) - p sqrt(p)^T; (..., V, V)."""
    root = p.sqrt()
    return torch.diag_embed(root) - p[..., :, None] * root[..., None, :]


def whole_model(path: Path, kind: str) -> dict[str, np.ndarray]:
    """f_r by autograd through transformers' model in float64, a window at a time."""
    model = brute.load(path)
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_()
    seen = brute.record(model, brute.text(), graph=True)
    outputs = [(name, i) for name, parts in seen.outputs.items() for i in range(len(parts))]
    calls = [(name, i) for name, parts in seen.routed.items() for i in range(len(parts))]
    tensors = [seen.outputs[n][i] for n, i in outputs]
    tensors += [seen.routed[n][i].tensor for n, i in calls]
    if kind == "loss":
        pairs = zip(seen.logits, brute.text(), strict=True)
        total = sum(F.cross_entropy(x[:-1], t[1:], reduction="sum") for x, t in pairs)
    else:
        seeds = seeds_of_the_backward_pass(seen.logits, kind)
        total = sum((x[:-1] * v).sum() for x, v in zip(seen.logits, seeds, strict=True))
    grads = torch.autograd.grad(total, tensors, allow_unused=True)
    found: dict[str, np.ndarray] = {}
    for (name, i), grad in zip(outputs, grads, strict=False):
        if grad is not None:
            rows = numpy(grad).reshape(-1, grad.shape[-1])
            zeros = np.zeros((len(NAMES), rows.shape[1]))
            found.setdefault(name, zeros)[LABELS[i]] += (rows**2).sum(0)
    routed = dict(zip(calls, grads[len(outputs) :], strict=True))
    for name in seen.routed:
        found.update(expert_rows(seen, name, routed))
    return {name: rows / predictions(rows.ndim) for name, rows in found.items()}


def predictions(dims: int) -> np.ndarray:
    counts = np.bincount(LABELS) * (LENGTH - 1.0)
    return counts.reshape(-1, *[1] * (dims - 1))


def expert_rows(
    seen: brute.Recorded, name: str, grads: dict[tuple[str, int], torch.Tensor]
) -> dict[str, np.ndarray]:
    """Squared gradients of every expert's two outputs, from that of the sum over experts."""
    experts = seen.model.get_submodule(name)
    tables: dict[str, np.ndarray] = {}
    for p in brute.passes(seen, name):
        down = brute.expert_parts(experts, p.expert)[1]
        outer = p.gate * numpy(grads[name, p.sample]).reshape(-1, len(down))[p.token]
        up = torch.from_numpy(p.up).requires_grad_()
        (inner,) = torch.autograd.grad(gated(experts, up) @ torch.from_numpy(down.T @ outer), up)
        for param, g in (("gate_up_proj", numpy(inner)), ("down_proj", outer)):
            shape = (len(NAMES), experts.num_experts, len(g))
            table = tables.setdefault(f"{name}.{param}", np.zeros(shape))
            table[LABELS[p.sample], p.expert] += g**2
    return tables


def gated(experts: Any, up: torch.Tensor) -> torch.Tensor:
    """`brute.gated` in torch; checked against it."""
    if "GptOss" in type(experts).__name__:
        gate, linear = up[::2].clamp(max=7.0), up[1::2].clamp(-7.0, 7.0)
        inner = (linear + 1) * gate * torch.sigmoid(1.702 * gate)
    else:
        gate, linear = up.chunk(2)
        inner = F.silu(gate) * linear
    assert close(numpy(inner), brute.gated(experts, numpy(up)))
    return inner


def token_counts() -> torch.Tensor:
    """Tokens per label, those that predict nothing too."""
    return torch.tensor([LABELS.count(d) * brute.text().shape[1] for d in range(3)]).double()


@pytest.mark.parametrize("kind", ["loss", "kl"])
@pytest.mark.parametrize("family", MODELS)
def test_streamed_fisher_is_that_of_autograd_through_the_whole_model(
    family: str, kind: str, root: Path
) -> None:
    path = brute.checkpoint(root, family)
    expected, found = whole_model(path, kind), streamed(path, kind)
    expected.pop("lm_head", None)
    model = skeleton(path).model
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    outside = {skeleton(path).path_of(module) for module in ends}
    met = {name for name in found.rows if name.endswith(".tokens")}
    assert set(found.rows) - met == set(expected) | outside
    for name in met:  # every token has its k experts, and the last of a window predicts nothing
        share = found.rows[name].sum(1) * found.predictions / token_counts()
        assert share.allclose(share.round()) and share[0] >= 1
    for name in expected:
        rows = found.rows[name]
        assert rows.dtype == torch.float64 and rows.any()
        wanted = expected[name].reshape(-1, rows.shape[-1])
        for own, other in zip(rows.flatten(0, -2), wanted, strict=True):
            assert close(own, other, 1e-4), name
    assert found.predictions.tolist() == predictions(1).tolist()


def test_fisher_does_not_depend_on_how_samples_are_batched(root: Path) -> None:
    path = brute.checkpoint(root, "qwen3_moe")
    one, other = streamed(path, "kl", batch=1), streamed(path, "kl", batch=100)
    for name, rows in one.rows.items():
        assert close(rows, other.rows[name]), name


def test_weights_and_hooks_are_gone_when_the_fisher_is_known(root: Path) -> None:
    path = brute.checkpoint(root, "qwen3_moe")
    streamed(path, "loss")
    model = skeleton(path).model
    assert all(p.is_meta for p in model.parameters())
    for part in model.modules():
        assert not part._forward_hooks and not part._forward_pre_hooks
        assert "forward" not in vars(part)


def test_an_expert_that_no_token_reached_has_zero_fisher(root: Path) -> None:
    def starve(model: Any) -> None:
        for block in model.model.layers:
            block.mlp.router.bias.data[1] = -1e4

    rows = streamed(brute.checkpoint(root, "gpt_oss", "starved", tweak=starve), "loss").rows
    for name in ("gate_up_proj", "down_proj"):
        table = rows[f"model.layers.1.mlp.experts.{name}"]
        assert table[:, 1].eq(0).all() and table[:, [0, 2, 3]].sum((0, 2)).gt(0).all()


def test_a_label_without_samples_has_zeros_and_no_nan(root: Path) -> None:
    stream = open_stream(brute.checkpoint(root, "llama"))
    found = measure_fisher(stream, brute.text(), LABELS, 4, kind="loss", progress=Silent())
    assert found.predictions[3] == 0
    assert all(rows[3].eq(0).all() and rows.isfinite().all() for rows in found.rows.values())


def test_unknown_importance_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="neither kl nor loss"):
        streamed(brute.checkpoint(root, "llama"), "exact")


def test_a_block_that_cannot_be_differentiated_says_so(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = brute.checkpoint(root, "llama")
    stream = open_stream(path)
    forward = stream.forward
    monkeypatch.setattr(stream, "forward", lambda layer, states: forward(layer, states).detach())
    with pytest.raises(UnsupportedModel, match="block 1 cannot be differentiated"):
        measure_fisher(stream, brute.text(), LABELS, 3, progress=Silent())


def test_every_site_finds_its_own_rows(root: Path) -> None:
    path = brute.checkpoint(root, "qwen3_moe")
    found = streamed(path, "loss")
    sites = {site.name: found.of(site) for site in find_sites(skeleton(path))}
    table = found.rows["model.layers.1.mlp.experts.gate_up_proj"]
    half = table.shape[2] // 2
    prefix = "model.layers.1.mlp.experts.3"
    assert torch.equal(sites[f"{prefix}.gate_proj"], table[:, 3, :half])  # type: ignore[arg-type]
    assert torch.equal(sites[f"{prefix}.up_proj"], table[:, 3, half:])  # type: ignore[arg-type]
    for site in find_sites(skeleton(path)):
        rows = sites[site.name]
        assert rows is not None and rows.shape == (len(NAMES), site.shape[0])
    assert Fisher({}, found.predictions).of(find_sites(skeleton(path))[0]) is None


def made_up_use() -> tuple[Fisher, torch.Tensor, torch.Tensor]:
    """Two labels, three experts of four rows: 100 predictions in the gradients' windows, 200 and
    400 tokens in all, two experts each; the last expert was met by no gradient."""
    squares = torch.rand(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    squares[:, 2] = 0
    met = torch.tensor([[50, 150, 0], [120, 80, 0]], dtype=torch.float64)
    fisher = Fisher({"e.down_proj": squares / 100, "e.tokens": met / 100}, torch.tensor([100, 100]))
    return fisher, torch.tensor([[100, 290, 10], [500, 296, 4]]), torch.tensor([200, 400])


def test_use_is_counted_on_all_windows() -> None:
    fisher, tokens, seen = made_up_use()
    found = fisher.experience("e.down_proj", tokens, seen, 1e-9)
    assert found is not None
    factor, extra = found
    assert factor[0, 0].item() == pytest.approx((100 / 200) / (50 / 100))
    assert factor[1, 0].item() == pytest.approx((500 / 400) / (120 / 100))
    assert extra[:, :2].max() < 1e-9
    # one that no gradient met is as sensitive per token as the layer's tokens are
    mean = (100 * fisher.rows["e.down_proj"][0]).sum(0).mean() / 200
    assert extra[0, 2].item() == pytest.approx(float(mean * 10 / 200), rel=1e-6)


def test_every_expert_is_taken_to_have_had_some_tokens_more() -> None:
    fisher, tokens, seen = made_up_use()
    tokens[:, 2] = 0
    seen = tokens.sum(1) / 2
    found = fisher.experience("e.down_proj", tokens, seen, 3.0)
    assert found is not None
    factor, extra = found
    use = (0 + 3) / (float(seen[0]) + 3 * 3 / 2)
    mean = (100 * fisher.rows["e.down_proj"][0]).sum(0).mean() / 200
    assert extra[0, 2].item() == pytest.approx(use * float(mean))
    assert factor[0, 0].item() == pytest.approx((103 / (float(seen[0]) + 4.5)) * 100 / 53)
    assert fisher.experience("nothing", tokens, seen, 3.0) is None


# The two draws of v.


@pytest.mark.parametrize("size", [2, 5, 40])
def test_v_of_kl_has_exactly_the_covariance_of_the_softmax(size: int) -> None:
    p = torch.randn(7, size, dtype=torch.float64).mul(3).softmax(1)
    a = kl_root(p)
    exact = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    assert torch.allclose(a @ a.transpose(1, 2), exact, atol=1e-12)


def draws(
    logits: torch.Tensor, count: int, head: torch.Tensor, kind: str, tokens: torch.Tensor | None
) -> torch.Tensor:
    """Gradients (count, H) at `count` equal positions of a model with logits = states head^T."""
    states = logits.expand(count + 1, -1)[None].clone()
    tokens = torch.zeros(1, count + 1, dtype=torch.long) if tokens is None else tokens
    stream = SimpleNamespace(hidden=states, device=torch.device("cpu"), allocate=torch.empty)
    tail = mock.MagicMock()
    tail.return_value.__enter__.return_value = lambda _tokens, x: x[0] @ head.T
    with mock.patch.object(module, "open_tail", tail):
        grads = module._tail_gradients(stream, tokens, kind, SEED)  # type: ignore[arg-type]
    assert grads[0, -1].eq(0).all()  # nothing is predicted after the last token
    return grads[0, :-1]


def test_drawn_v_of_kl_is_the_formula_and_averages_to_the_softmax_covariance() -> None:
    logits, count = torch.tensor([1.5, 0.0, -1.0, 0.3, -3.0]), 40000
    v = draws(logits, count, torch.eye(5), "kl", None).double()
    p = logits.double().softmax(0)
    e = torch.randn(count, 5, generator=torch.Generator().manual_seed(SEED)).double()
    assert close(v, e @ kl_root(p).T)
    exact = torch.diag(p) - torch.outer(p, p)
    assert ((v.T @ v / count) - exact).abs().max() < 0.02 * exact.max()
    assert v.sum(1).abs().max() < 1e-5  # adding one number to all logits changes nothing


def test_v_of_the_loss_averages_to_the_same_when_labels_come_from_the_model() -> None:
    logits, count = torch.tensor([1.5, 0.0, -1.0, 0.3, -3.0]), 40000
    p = logits.double().softmax(0)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.multinomial(p, count + 1, replacement=True, generator=generator)[None]
    v = draws(logits, count, torch.eye(5), "loss", tokens).double()
    assert close(v, p - F.one_hot(tokens[0, 1:], 5))
    exact = torch.diag(p) - torch.outer(p, p)
    assert ((v.T @ v / count) - exact).abs().max() < 0.02 * exact.max()


def test_half_the_fisher_form_is_the_kl_of_a_softmax_model_to_second_order() -> None:
    generator = torch.Generator().manual_seed(3)
    head = torch.randn(9, 4, generator=generator)
    y = torch.randn(4, generator=generator)
    g = draws(y, 40000, head, "kl", None).double()
    fisher = g.T @ g / len(g)
    wide = head.double()
    for _ in range(5):
        dy = torch.randn(4, generator=generator).double() * 0.01
        true = kl((wide @ y.double())[None], (wide @ (y.double() + dy))[None])
        assert float(0.5 * dy @ fisher @ dy) == pytest.approx(true, rel=0.06)
        p = (wide @ y.double()).softmax(0)
        exact = wide.T @ (torch.diag(p) - torch.outer(p, p)) @ wide
        assert float(0.5 * dy @ exact @ dy) == pytest.approx(true, rel=0.03)


def test_fisher_of_the_last_block_predicts_the_kl_of_noise_on_its_outputs(root: Path) -> None:
    """1/2 sum_r f_r s_r^2, with f averaged over draws, is the KL of independent noise of size s."""
    path = brute.checkpoint(root, "llama")
    model = brute.load(path)
    rows = [streamed_rows(path, seed) for seed in range(12)]
    f = torch.stack(rows).mean(0)  # (O,), all labels together
    down = model.model.layers[-1].mlp.down_proj
    base = [model(t[None]).logits[0, :-1].detach() for t in brute.text()]
    size, values, generator = 0.02, [], torch.Generator().manual_seed(0)
    for _ in range(8):
        handle = down.register_forward_hook(
            lambda _m, _a, y: y + size * torch.randn(y.shape, generator=generator).double()
        )
        with torch.no_grad():
            noisy = [model(t[None]).logits[0, :-1] for t in brute.text()]
        handle.remove()
        values.append(np.mean([kl(a, b) for a, b in zip(base, noisy, strict=True)]))
    assert 0.5 * float(f.sum()) * size**2 == pytest.approx(np.mean(values), rel=0.1)


def streamed_rows(path: Path, seed: int) -> torch.Tensor:
    stream = Stream(skeleton(path), brute.text(), **CPU)
    labels = [0] * len(LABELS)
    found = measure_fisher(stream, brute.text(), labels, 1, seed=seed, progress=Silent())
    return found.rows["model.layers.1.mlp.down_proj"][0]


# The tail: what comes after the last block.


@pytest.mark.parametrize("family", [*FAMILIES, *EXTRA])
def test_logits_after_the_last_block_are_the_models_own(family: str, root: Path) -> None:
    options: dict[str, dict[str, Any]] = {
        "cohere": {"logit_scale": 0.25},
        "granite": {"logits_scaling": 4.0},
        "gemma2": {"final_logit_softcapping": CAP},
        "gptj": {"tweak": lambda model: model.float()},  # else its rotary table is rounded
    }
    path = brute.checkpoint(root, family, "tail", **options.get(family, {}))
    model, tokens = brute.load(path, dtype=torch.float32), brute.text(3)
    stream = Stream(skeleton(path), tokens, singles=True, **CPU)
    own = stream.skeleton
    for layer in range(len(own.blocks)):
        own.fill(f"{own.prefix}.{layer}", **CPU)
        stream.run(layer, keep=True)
        own.drop(f"{own.prefix}.{layer}")
    with torch.no_grad(), open_tail(stream) as tail:
        for i, window in enumerate(tokens):
            found = tail(window[None], stream.hidden[i : i + 1])
            assert close(found, numpy(model(window[None], use_cache=False).logits[0])), i
    assert all(p.is_meta for p in own.model.parameters())
    assert not any("forward" in vars(block) for block in own.blocks)


def test_a_softcap_is_part_of_the_tail(root: Path) -> None:
    path = brute.checkpoint(root, "gemma2", "tail", final_logit_softcapping=CAP)
    stream = Stream(skeleton(path), brute.text(1), **CPU)
    with torch.no_grad(), open_tail(stream) as tail:
        logits = tail(brute.text(1), torch.randn(1, LENGTH, 64) * 100)
    assert 0.9 * CAP < logits.abs().max() <= CAP
