"""Packed experts by one call of the CPU kernels, against the loop over the decoded matrices."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from bitnest.formats import AnyFormat, cut, parse_format
from bitnest.formats.inputs import parse_inputs
from bitnest.kernels.cpu.runtime import runtime
from bitnest.kernels.experts import experts_forward
from bitnest.packed import experts_call
from bitnest.packed.modules import PackedWeight, pack_experts
from bitnest.quantize.solve import Options, solve
from bitnest.sites import Site
from tests.tiny import FAMILIES, build

pytestmark = pytest.mark.skipif(runtime() is None, reason="no C compiler")

EXPERTS, HIDDEN, INNER, TOP = 4, 64, 40, 2
FLOAT32 = 3e-6  # of the largest result


def packed_experts(
    formats: Sequence[str], family: str = "qwen3_moe", *, fused: bool = False
) -> tuple[Any, dict[tuple[int, str], torch.Tensor]]:
    """An experts module with expert e in formats[e], and its decoded matrices."""
    model: Any = build(FAMILIES[family]).float()
    module = next(m for m in model.modules() if hasattr(m, "gate_up_proj"))
    sites: list[tuple[Site, AnyFormat]] = []
    stored: list[dict[str, torch.Tensor]] = []
    for expert, name in enumerate(formats):
        for param in ("gate_up_proj", "down_proj"):
            whole = getattr(module, param)[expert].detach() * 10
            half = len(whole) // 2
            parts = (
                [(0, half), (half, 2 * half)] if param == "gate_up_proj" and not fused else [None]
            )
            for rows in parts:
                matrix = whole if rows is None else whole[slice(*rows)]
                fmt = parse_format(name)
                site = Site(
                    name=f"{param}.{expert}.{rows}", kind="expert", layer=0, expert=expert,
                    shape=(matrix.shape[0], matrix.shape[1]), module="experts", param=param,
                    rows=rows,
                )  # fmt: skip
                options = Options(method="rtn", clip=False)
                found = solve(matrix[None], None, fmt, options)  # type: ignore[arg-type]
                stored.append(found.store(0, slice(0, len(matrix))))
                sites.append((site, fmt))
    for weight, tensors in zip(pack_experts(module, sites), stored, strict=True):
        weight.load(tensors, torch.device("cpu"))
    dense = {
        (e, param): module.packed_weight(e, param, torch.float32)
        for e in range(EXPERTS)
        for param in ("gate_up_proj", "down_proj")
    }
    return module, dense


def batch(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Hidden states, chosen experts, gates."""
    g = torch.Generator().manual_seed(tokens)
    gates, index = torch.rand(tokens, EXPERTS, generator=g).softmax(-1).topk(TOP)
    return torch.randn(tokens, HIDDEN, generator=g).to(dtype), index, gates


def check(module: Any, dense: dict[tuple[int, str], torch.Tensor], tokens: int = 7) -> None:
    """One call is taken, and gives what decoded matrices give in float64."""
    x, index, gates = batch(tokens)
    assert experts_call.why_not(module, x, gates) == ""
    wanted = experts_forward(
        module, lambda e, p: dense[e, p].double(), x.double(), index, gates.double(),
        dropped=module.packed_dropped,
    )  # fmt: skip
    found = module(x, index, gates)
    assert found.shape == wanted.shape and found.dtype == torch.float32
    if tokens:
        assert (found - wanted).abs().max() <= FLOAT32 * wanted.abs().max()


MIXED = ("int4-g32", "int8-channel", "int3-g32-asym", "int2-g64")


@pytest.fixture(autouse=True)
def inference() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("tokens", [0, 1, 2, 33])
@pytest.mark.parametrize("fused", [False, True])
def test_experts_of_mixed_formats(tokens: int, fused: bool) -> None:
    check(*packed_experts(MIXED, fused=fused), tokens)


def test_mixtral_and_other_gated_families() -> None:
    for family in ("mixtral", "olmoe"):
        check(*packed_experts(["int4-g32"] * EXPERTS, family))


def test_half_types_are_within_their_rounding() -> None:
    module, dense = packed_experts(MIXED)
    for dtype, limit in ((torch.bfloat16, 2**-8), (torch.float16, 2**-10)):
        x, index, gates = batch(9, dtype)
        found = module(x, index, gates)
        wanted = experts_forward(
            module, lambda e, p: dense[e, p].double(), x.double(), index, gates.double()
        )
        assert found.dtype == dtype
        assert (found - wanted).abs().max() <= limit * wanted.abs().max()


def test_dropped_experts_give_nothing() -> None:
    module, dense = packed_experts(("int4-g32", "zero", "int8-g32", "zero"))
    assert module.packed_dropped == {1, 3}
    check(module, dense)
    x, index, gates = batch(3)
    assert torch.equal(module(x, torch.full_like(index, 3), gates), torch.zeros_like(x))


def test_all_experts_on_one_and_none_on_the_others() -> None:
    module, dense = packed_experts(MIXED)
    x, index, gates = batch(5)
    one = module(x, torch.full_like(index[:, :1], 2), gates[:, :1])
    wanted = experts_forward(
        module, lambda e, p: dense[e, p], x, torch.full_like(index[:, :1], 2), gates[:, :1]
    )
    assert (one - wanted).abs().max() <= FLOAT32 * wanted.abs().max()
    index[0] = EXPERTS  # no expert: of another machine
    assert torch.equal(module(x, index, gates)[0], torch.zeros(HIDDEN))


def test_layouts_are_those_of_the_weights() -> None:
    """The matrices lie in memory once, and what points to them is made once."""
    module, dense = packed_experts(MIXED)
    before = sum(weight.nbytes for weight in module.packed)
    check(module, dense)
    made = experts_call._made[module][1]
    addresses = {id(linear.weight) for linear in made.linears}  # type: ignore[union-attr]
    assert addresses == {id(weight._laid) for weight in module.packed}
    assert sum(weight.nbytes for weight in module.packed) < 3 * before  # tiles of 16 rows
    check(module, dense)
    assert experts_call._made[module][1] is made


def test_changed_weights_are_seen() -> None:
    module, dense = packed_experts(["nest248-g32"] * EXPERTS)
    x, index, gates = batch(4)
    whole = module(x, index, gates)
    for weight in module.packed:
        weight.change(cut(weight.fmt, 2), {})
    low = {key: module.packed_weight(*key, torch.float32) for key in dense}
    found = module(x, index, gates)
    wanted = experts_forward(module, lambda e, p: low[e, p], x, index, gates)
    assert (found - wanted).abs().max() <= 1e-2 * wanted.abs().max()
    assert (found - whole).abs().max() > 0.05 * whole.abs().max()
    weight = module.packed[0]
    weight.load({n: torch.zeros_like(t) for n, t in weight.tensors.items()}, torch.device("cpu"))
    again = module(x, index, gates)
    assert not torch.equal(again, found)


def test_copies_of_a_module_have_their_own_memory() -> None:
    module, dense = packed_experts(MIXED)
    x, index, gates = batch(4)
    before = module(x, index, gates)
    other = copy.deepcopy(module)
    assert torch.equal(other(x, index, gates), before)
    check(module, dense)
    theirs = {id(weight._laid) for weight in other.packed}
    assert not theirs & {id(weight._laid) for weight in module.packed}


def test_what_is_left_to_the_loop() -> None:
    def reason(change: Any, formats: Sequence[str] = MIXED, family: str = "qwen3_moe") -> str:
        module, dense = packed_experts(formats, family)
        x, index, gates = batch(6)
        change(module)
        why = experts_call.why_not(module, x, gates)
        found = module(x, index, gates)
        wanted = experts_forward(module, lambda e, p: dense[e, p], x, index, gates)
        assert (found - wanted).abs().max() <= 3e-2 * wanted.abs().max()
        return why

    def rounding(module: Any) -> None:
        module.packed[0].inputs = parse_inputs("int8-token")

    def gate(module: Any) -> None:
        cls = type(module)
        own = {"_apply_gate": lambda self, x: self.act_fn(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]}
        module.__class__ = type("Other", (cls,), own)

    def held(module: Any) -> None:
        module.packed[1].keep = True

    def adapters(module: Any) -> None:
        module.packed_added = {}

    def activation(module: Any) -> None:
        class Own(torch.nn.SiLU):
            pass

        module.act_fn = Own()

    assert "rounded" in reason(rounding)
    assert "decoded" in reason(held)
    assert "of its own" in reason(gate)
    assert "of its own" in reason(activation)
    assert reason(adapters) == "adapters"
    assert "lut4-channel" in reason(lambda _: None, ["lut4-channel"] * EXPERTS)
    assert "int4-g32@had16" in reason(lambda _: None, [*MIXED[:3], "int4-g32@had16"])


def test_gradients_run_through_the_loop() -> None:
    module, _dense = packed_experts(MIXED)
    x, index, gates = batch(3)
    with torch.enable_grad():
        x.requires_grad_()
        assert experts_call.why_not(module, x, gates) == "gradients"
        gates.requires_grad_()
        module(x, index, gates).sum().backward()
    assert x.grad is not None and gates.grad is not None and bool((gates.grad != 0).any())
    assert isinstance(module.packed[0], PackedWeight)
