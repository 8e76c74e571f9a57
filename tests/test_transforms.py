"""Transforms change nothing: every family's logits in float64, online, folded and rotated.

Gains, biases and sinks are random, so a fold that forgets one shows. "Equal" is 1e-9 of the largest
logit; norms and routers that would round to float32 inside are held to float64 by `in_float64`,
which is itself compared with the plain model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from bitnest.quantize.transforms import ChannelScale, Hadamard, Permutation, Transform
from bitnest.quantize.transforms.channel_scales import (
    EXPONENTS,
    awq_scales,
    nearest_power_of_two,
    search,
    smooth_scales,
    total_error,
)
from bitnest.quantize.transforms.edges import Edge
from bitnest.quantize.transforms.fold import fold_permutation, fold_rotation, fold_scale
from bitnest.quantize.transforms.online import attach, attach_experts
from bitnest.quantize.transforms.permutation import by_energy, by_energy_within, by_group_energy
from bitnest.quantize.transforms.proof import Call, Proof, capture_calls, in_float64
from bitnest.quantize.transforms.residual import rotate_residual
from bitnest.quantize.transforms.trace import find_edges
from bitnest.sites import is_experts, is_linear
from bitnest.skeleton import find_blocks
from tests.tiny import FAMILIES, VOCAB, Family, build

TOKENS = torch.arange(24).mul(13).remainder(VOCAB).view(2, 12)
TIGHT = 1e-9

_ATTENTION = {
    "input_layernorm > self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "self_attn.v_proj > self_attn.o_proj",
}
_MLP = "mlp.up_proj > mlp.down_proj"
_EXPERTS = "mlp.experts.gate_up_proj > mlp.experts.down_proj"
_DENSE = _ATTENTION | {"post_attention_layernorm > mlp.gate_proj mlp.up_proj", _MLP}
_GEMMA = _ATTENTION | {"pre_feedforward_layernorm > mlp.gate_proj mlp.up_proj", _MLP}
_MLA = {
    "input_layernorm > self_attn.q_a_proj self_attn.kv_a_proj_with_mqa",
    "self_attn.q_a_layernorm > self_attn.q_b_proj",
    "self_attn.kv_a_layernorm > self_attn.kv_b_proj",
    "self_attn.kv_b_proj > self_attn.o_proj",
    "post_attention_layernorm > mlp.experts.gate_up_proj mlp.gate "
    "mlp.shared_experts.gate_proj mlp.shared_experts.up_proj",
    "mlp.shared_experts.up_proj > mlp.shared_experts.down_proj",
    _EXPERTS,
}
# Edges of the last block into which a scale folds. The order of consumers is that of their calls.
SCALES: dict[str, set[str]] = {
    "llama": _DENSE,
    "qwen2": _DENSE,
    "qwen3": _DENSE,
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "phi3": {
        "input_layernorm > self_attn.qkv_proj",
        "self_attn.qkv_proj > self_attn.o_proj",
        "post_attention_layernorm > mlp.gate_up_proj",
        "mlp.gate_up_proj > mlp.down_proj",
    },
    "gpt2": {"ln_1 > attn.c_attn", "attn.c_attn > attn.c_proj", "ln_2 > mlp.c_fc"},
    "gptj": {
        "ln_1 > attn.k_proj attn.v_proj attn.q_proj mlp.fc_in",
        "attn.v_proj > attn.out_proj",
    },
    "mixtral": _ATTENTION
    | {"post_attention_layernorm > mlp.gate mlp.experts.gate_up_proj", _EXPERTS},
    "qwen3_moe": _ATTENTION
    | {"post_attention_layernorm > mlp.experts.gate_up_proj mlp.gate", _EXPERTS},
    "qwen2_moe": _ATTENTION
    | {
        "post_attention_layernorm > mlp.gate mlp.experts.gate_up_proj mlp.shared_expert.gate_proj "
        "mlp.shared_expert.up_proj mlp.shared_expert_gate",
        "mlp.shared_expert.up_proj > mlp.shared_expert.down_proj",
        _EXPERTS,
    },
    "olmoe": _ATTENTION
    | {"post_attention_layernorm > mlp.gate mlp.experts.gate_up_proj", _EXPERTS},
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    # clamps and an added 1 stand between up and down
    "gpt_oss": _ATTENTION | {"post_attention_layernorm > mlp.router mlp.experts.gate_up_proj"},
}
# Gemma has norms between its matrices and the stream, GPT-2 and GPT-J LayerNorms.
ROTATES = set(SCALES) - {"gemma2", "gemma3", "gpt2", "gptj"}


def tiny_model(family: str | Family, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """The family's model with random gains and sinks beside the random weights of `build`."""
    spec = FAMILIES[family] if isinstance(family, str) else family
    model = build(spec, **options).double().eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data += 0.3 * noise
    return model.to(dtype)


def blocks_of(model: Any) -> nn.ModuleList:
    return model.get_submodule(find_blocks(model))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    with in_float64(model):
        return model(input_ids=TOKENS, use_cache=False).logits


def assert_equal(model: Any, expected: torch.Tensor) -> None:
    assert float((logits(model) - expected).abs().max() / expected.abs().max()) < TIGHT


def factors(width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.exp2(torch.rand(width, generator=generator, dtype=torch.float64) * 6 - 3)


def shuffle(width: int, span: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(width)
    span = span or width
    starts = range(0, width, span)
    return torch.cat([start + torch.randperm(span, generator=generator) for start in starts])


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model: Any, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name


def edges_by_label(family: str, layer: int = -1, **options: Any) -> tuple[Any, Call, Any, Any]:
    """A bfloat16 model, its block, that block's call and its edges by label."""
    model = tiny_model(family, torch.bfloat16, **options)
    blocks = blocks_of(model)
    call = capture_calls(model, blocks, TOKENS)[layer]
    edges = {edge.label: edge for edge in find_edges(blocks[layer], call)}
    return model, call, blocks[layer], edges


KINDS: dict[str, Any] = {
    "hadamard": lambda width: Hadamard(16),
    "random hadamard": lambda width: Hadamard(32, 7),
    "scale": lambda width: ChannelScale(factors(width)),
    "permutation": lambda width: Permutation(shuffle(width)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5, 64), (3, 5, 40)])  # 40 leaves a tail of 8
def test_transformed_product_is_the_product(kind: str, shape: tuple[int, ...]) -> None:
    transform: Transform = KINDS[kind](shape[-1])
    w, x = torch.randn(shape, dtype=torch.float64), torch.randn(7, shape[-1], dtype=torch.float64)
    got = transform.apply_input(x) @ transform.apply_weight(w).mT
    torch.testing.assert_close(got, x @ w.mT, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(transform.invert_weight(transform.apply_weight(w)), w)
    assert not torch.equal(transform.apply_weight(w), w)
    for dtype in (torch.bfloat16, torch.float32):
        assert transform.apply_weight(w.to(dtype)).dtype == dtype
        assert transform.apply_input(x.to(dtype)).dtype == dtype


def test_scales_in_16_bit_round_the_product_once() -> None:
    w, s = torch.randn(50, 64).bfloat16(), factors(64).float()
    scale = ChannelScale(s)
    assert torch.equal(scale.apply_weight(w), (w.float() * s).bfloat16())
    assert torch.equal(scale.apply_input(w), (w.float() / s).bfloat16())
    assert torch.equal(scale.invert_weight(w), (w.float() / s).bfloat16())


def test_impossible_scales_and_orders_are_refused() -> None:
    for bad in ([1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]):
        with pytest.raises(ValueError, match="positive"):
            ChannelScale(torch.tensor(bad))
    with pytest.raises(ValueError, match="once"):
        Permutation(torch.tensor([0, 0, 2]))


@pytest.mark.parametrize("family", FAMILIES)
def test_float64_context_is_the_plain_model_and_leaves_no_trace(family: str) -> None:
    model = tiny_model(family, torch.float32)
    before = state(model)
    with torch.no_grad():
        plain = model(input_ids=TOKENS, use_cache=False).logits
    torch.testing.assert_close(logits(model).float(), plain, rtol=1e-3, atol=1e-4)
    assert_untouched(model, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_online_transform_at_every_input_keeps_the_logits(family: str, kind: str) -> None:
    model = tiny_model(family)
    expected = logits(model)
    before = state(model)
    undo = []
    for module in blocks_of(model).modules():
        if is_linear(module):
            width = module.weight.shape[1 if isinstance(module, nn.Linear) else 0]
            undo.append(attach(module, KINDS[kind](width)))
        elif is_experts(module):
            gate_up = KINDS[kind](model.config.hidden_size)
            down = KINDS[kind](module.down_proj.shape[1 if module.is_transposed else 2])
            undo.append(attach_experts(module, gate_up, down))
    changed = [name for name, tensor in model.state_dict().items() if name in before]
    assert sum(not torch.equal(model.state_dict()[n], before[n]) for n in changed) >= len(undo)
    assert_equal(model, expected)
    for step in undo:
        step()
    torch.testing.assert_close(model.state_dict(), before, rtol=1e-12, atol=1e-12)
    assert_equal(model, expected)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_online_experts_hold_in_every_implementation_and_the_router_sees_plain_states(
    family: str, implementation: str
) -> None:
    model = tiny_model(family, torch.float32)
    model.set_experts_implementation(implementation)
    seen: list[torch.Tensor] = []
    routers = [m for n, m in model.named_modules() if n.endswith(("mlp.gate", "mlp.router"))]
    for router in routers:
        router.register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone()))
    with torch.no_grad():
        expected = model(input_ids=TOKENS).logits
        for module in model.modules():
            if is_experts(module):
                attach_experts(module, Hadamard(64, 1), Hadamard(8, 2))
        got = model(input_ids=TOKENS).logits
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    plain, transformed = seen[: len(routers)], seen[len(routers) :]
    for a, b in zip(plain, transformed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def fold_all(block: nn.Module, edges: list[Edge], call: Call) -> list[Proof]:
    """Every kind of fold at every edge, one on top of the other."""
    proofs = []
    for number, edge in enumerate(edges):
        proofs.append(fold_scale(block, edge, factors(edge.width, number), call))
        order = shuffle(edge.width, edge.span)
        proofs.append(fold_permutation(block, edge, order, call))
        proofs.append(fold_rotation(block, edge, Hadamard(8, number), call))
    return proofs


@pytest.mark.parametrize("family", FAMILIES)
def test_folds_that_pass_their_proof_keep_the_logits(family: str) -> None:
    model = tiny_model(family)
    expected, before = logits(model), state(model)
    blocks = blocks_of(model)
    calls = capture_calls(model, blocks, TOKENS)
    done: list[list[str]] = []
    for block, call in zip(blocks, calls, strict=True):
        proofs = fold_all(block, find_edges(block, call), call)
        done.append([proof.what for proof in proofs if proof.exact])
        # what was refused was known beforehand to be impossible: no proof failed by running
        assert all(proof.deviation == float("inf") for proof in proofs if not proof.exact)
    assert_equal(model, expected)
    norms = [n for n, t in before.items() if t.dim() == 1 and "norm" in n]
    assert not norms or any(not torch.equal(model.state_dict()[n], before[n]) for n in norms)
    if family in SCALES:
        scales = {what.removeprefix("scale ") for what in done[-1] if what.startswith("scale")}
        assert scales == SCALES[family]
        inner = {label for label in scales if "norm" not in label and "ln_" not in label}
        closed = {"gpt2": "mlp.c_fc > mlp.c_proj", "gptj": "mlp.fc_in > mlp.fc_out"}
        closed["gpt_oss"] = _EXPERTS
        also = {closed[family]} if family in closed else set()
        orders = {w.removeprefix("permutation ") for w in done[-1] if w.startswith("perm")}
        assert orders == inner | also
        turned = {w.removeprefix("rotation ") for w in done[-1] if w.startswith("rotation")}
        assert turned == {label for label in inner if "attn" in label}


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_rotation_is_exact_or_refused(family: str) -> None:
    model = tiny_model(family)
    expected, before = logits(model), state(model)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    proof = rotate_residual(model, find_blocks(model), TOKENS)
    if family in SCALES:
        assert proof.exact == (family in ROTATES)
    if proof.exact:
        assert_equal(model, expected)
        embedding = model.get_input_embeddings().weight
        assert not torch.allclose(embedding, before["model.embed_tokens.weight"])
        assert model.get_output_embeddings().weight is not embedding
        assert not model.config.tie_word_embeddings
    else:
        assert "online" in str(proof)
        assert_untouched(model, before)
        head = model.get_output_embeddings().weight
        assert (head is model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_fold_that_passes_is_rounded_once_to_the_stored_type(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype)
    block = blocks_of(model)[0]
    call = capture_calls(model, blocks_of(model), TOKENS)[0]
    edge = next(e for e in find_edges(block, call) if e.label == _MLP)
    up, down = block.mlp.up_proj.weight.data.clone(), block.mlp.down_proj.weight.data.clone()
    others = {n: t for n, t in state(model).items() if "layers.0.mlp" not in n}
    s = factors(edge.width)
    assert fold_scale(block, edge, s, call).exact
    assert torch.equal(block.mlp.up_proj.weight, (up.double() / s[:, None]).to(dtype))
    assert torch.equal(block.mlp.down_proj.weight, (down.double() * s).to(dtype))
    for name, tensor in others.items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_power_of_two_scales_fold_without_any_loss_in_16_bit() -> None:
    model, call, block, edges = edges_by_label("llama")
    with torch.no_grad():
        expected = model(input_ids=TOKENS).logits
        for label in (_MLP, "self_attn.v_proj > self_attn.o_proj"):
            edge = edges[label]
            s = nearest_power_of_two(factors(edge.width))
            assert fold_scale(block, edge, s, call).exact
        assert torch.equal(model(input_ids=TOKENS).logits, expected)


def test_scale_across_an_added_constant_is_refused() -> None:
    """GPT-OSS multiplies by up + 1; even an edge that claims to be linear fails its proof."""
    model, call, block, edges = edges_by_label("gpt_oss")
    before, edge = state(model), edges[_EXPERTS]
    assert not edge.linear
    for claim in (edge, replace(edge, linear=True)):
        proof = fold_scale(block, claim, factors(edge.width), call)
        assert not proof.exact and "apply it online" in str(proof)
    assert_untouched(model, before)


def test_scale_that_forgets_the_router_is_refused() -> None:
    model, call, block, edges = edges_by_label("mixtral")
    before = state(model)
    edge = edges["post_attention_layernorm > mlp.gate mlp.experts.gate_up_proj"]
    for kept in (edge.consumers[:1], edge.consumers[1:]):
        part = replace(edge, consumers=kept)
        proof = fold_scale(block, part, factors(edge.width), call)
        assert not proof.exact and 1e-9 < proof.deviation < float("inf")
    assert_untouched(model, before)


def test_mixing_beyond_a_head_or_through_a_gate_is_refused() -> None:
    model, call, block, edges = edges_by_label("deepseek_v3")
    before = state(model)
    values, inner = edges["self_attn.kv_b_proj > self_attn.o_proj"], edges[_EXPERTS]
    assert values.span == 16 and inner.span == inner.width
    wide = replace(values, span=values.width)
    lonely = replace(inner, companions=())
    refused = [
        fold_permutation(block, values, shuffle(values.width), call),  # leaves its span
        fold_permutation(block, wide, shuffle(values.width), call),  # the proof says so
        fold_rotation(block, values, Hadamard(32), call),
        fold_rotation(block, wide, Hadamard(32), call),
        fold_permutation(block, lonely, shuffle(inner.width), call),  # gate rows stay behind
        fold_rotation(block, inner, Hadamard(8), call),
        fold_rotation(block, lonely, Hadamard(8), call),  # not through a product with the gate
    ]
    assert not any(proof.exact for proof in refused)
    assert sum(proof.deviation < float("inf") for proof in refused) == 4  # seen by running
    assert_untouched(model, before)


def test_clamp_that_random_states_do_not_reach_is_seen() -> None:
    """OLMoE can clamp v. Folds larger than random states would pass a proof and then clip."""
    label = "self_attn.v_proj > self_attn.o_proj"
    model, _, _, edges = edges_by_label("olmoe")
    clamped, call, block, found = edges_by_label("olmoe", clip_qkv=8.0)
    assert torch.equal(logits(model), logits(clamped)), "the clamp is meant to be out of reach"
    assert label in edges and label not in found
    assert fold_scale(block, edges[label], torch.full((32,), 1.1), call).exact  # so it is needed


def test_norm_whose_output_is_also_the_residual_is_refused_by_running() -> None:
    """MiniMax adds to the normed states: knowing all matrices that read them is not enough."""
    options = {**FAMILIES["mixtral"].options, "head_dim": 16}
    model = tiny_model(Family("minimax", "MiniMaxConfig", options, {}), torch.bfloat16)
    blocks = blocks_of(model)
    call = capture_calls(model, blocks, TOKENS)[0]
    before = state(model)
    norms = [edge for edge in find_edges(blocks[0], call) if edge.offset is not None]
    assert len(norms) == 2
    for edge in norms:
        proof = fold_scale(blocks[0], edge, factors(edge.width), call)
        assert not proof.exact and 1e-3 < proof.deviation < float("inf")
    assert not rotate_residual(model, find_blocks(model), TOKENS).exact
    assert_untouched(model, before)


def test_wrong_scale_for_an_edge_is_an_error_not_a_proof() -> None:
    _, call, block, edges = edges_by_label("llama")
    for bad in (torch.ones(171), torch.zeros(172), -torch.ones(172)):
        with pytest.raises(ValueError, match="172 positive"):
            fold_scale(block, edges[_MLP], bad, call)


def test_statistics_of_grouped_heads_are_pooled_per_value_channel() -> None:
    edge = edges_by_label("llama")[3]["self_attn.v_proj > self_attn.o_proj"]
    assert edge.width == 32 and len(edge.source) == 64
    # heads 0 and 1 of the queries read value head 0, heads 2 and 3 read value head 1
    columns = torch.arange(64.0)
    want = torch.cat([torch.arange(16.0) + 16, torch.arange(16.0) + 48])
    assert torch.equal(edge.pooled(columns), want)


def test_originals_come_back_after_an_error() -> None:
    model = tiny_model("mixtral", torch.bfloat16)
    before = state(model)
    with pytest.raises(RuntimeError), in_float64(model) as originals:
        originals.keep = True
        model.get_input_embeddings().weight.data.zero_()
        raise RuntimeError
    assert_untouched(model, before)


def rounding(step: float) -> Any:
    """Round rows to `step` levels of their largest value: a crude format."""
    return lambda w: (w / w.abs().amax(-1, True) * step).round() / step * w.abs().amax(-1, True)


def correlated(rows: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, inputs with a few strong channels, and H."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    x = torch.randn(256, width, generator=generator) @ torch.randn(
        width, width, generator=generator
    )
    x[:, ::9] *= 20
    return weight, x, x.T @ x / len(x)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("step", [1, 3, 7, 127])
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("powers", [False, True])
def test_searched_scale_is_never_worse_than_none(
    seed: int, step: int, smooth: bool, powers: bool
) -> None:
    weight, x, hessian = correlated(24, 40, seed)
    x_max = x.abs().amax(0) if smooth else None
    found = search(weight, hessian, rounding(step), x_max=x_max, powers_of_two=powers)
    assert found.plain == total_error(weight, rounding(step)(weight), hessian)
    decoded = found.transform.invert_weight(rounding(step)(found.transform.apply_weight(weight)))
    assert found.error == total_error(weight, decoded, hessian) <= found.plain
    assert (found.exponent is None) == bool((found.scale == 1).all())
    if powers:
        assert torch.equal(found.scale.log2(), found.scale.log2().round())
    if step == 7 and not smooth and not powers:
        assert found.error < 0.8 * found.plain  # the strong channels are worth protecting


def test_search_takes_no_scale_when_nothing_is_lost() -> None:
    weight, _, hessian = correlated(8, 40, 0)
    found = search(weight, hessian, lambda w: w.clone())
    assert found.exponent is None and found.error == 0.0
    assert len(EXPONENTS) == 20 and EXPONENTS[0] == 0 and EXPONENTS[-1] == 0.95


def test_stacked_experts_share_a_scale() -> None:
    weight, _, hessian = correlated(24, 40, 1)
    stack = weight.view(3, 8, 40)
    flat = search(weight, hessian, rounding(7))
    deep = search(stack, hessian, rounding(7))
    assert flat.exponent == deep.exponent and torch.equal(flat.scale, deep.scale)


def test_scales_by_hand() -> None:
    x, w = torch.tensor([16.0, 1.0]), torch.tensor([1.0, 4.0])
    # 16^.5 / 1^.5 = 4 and 1 / 2: normalised by sqrt(4 * .5)
    torch.testing.assert_close(smooth_scales(x, w, 0.5), torch.tensor([4.0, 0.5]) / 2**0.5)
    torch.testing.assert_close(awq_scales(x, 0.5), torch.tensor([2.0, 0.5]))
    torch.testing.assert_close(awq_scales(x, 0.0), torch.ones(2))
    assert nearest_power_of_two(torch.tensor([0.9, 3.0, 0.3])).tolist() == [1.0, 4.0, 0.25]


def test_dead_channels_get_finite_scales() -> None:
    x, w = torch.tensor([0.0, 4.0, 1.0]), torch.tensor([1.0, 0.0, 2.0])
    for scale in (awq_scales(x, 0.5), smooth_scales(x, w, 0.5), awq_scales(torch.zeros(3), 0.5)):
        ChannelScale(scale)
    assert awq_scales(x, 0.5)[0] == awq_scales(x, 0.5)[2]


def test_orders_by_hand() -> None:
    energy = torch.tensor([1.0, 5.0, 2.0, 2.0, 9.0, 0.0, 3.0])
    assert by_energy(energy).order.tolist() == [4, 1, 6, 2, 3, 0, 5]  # ties keep their order
    assert by_energy_within(energy, 3).order.tolist() == [1, 2, 0, 4, 3, 5, 6]
    # groups {0,1} {2,3} {4,5} weigh 6, 4, 9; channel 6 is a short group and stays last
    assert by_group_energy(energy, 2).order.tolist() == [4, 5, 1, 0, 2, 3, 6]
