"""Grouped experts on a CPU against the reference, in the cases where sorting and sizes go wrong."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from bitnest.formats import BlockFormat, parse_format
from bitnest.kernels.cpu.experts import experts_product
from bitnest.kernels.cpu.layout import lay_out
from bitnest.kernels.cpu.runtime import Forward, Linear, Network, runtime
from bitnest.kernels.decode import decode
from bitnest.kernels.encode import encode
from bitnest.kernels.experts import experts_forward

pytestmark = pytest.mark.skipif(runtime() is None, reason="no C compiler")

HIDDEN, INNER, TOP = 80, 172, 3
FORMATS = ("int4-g32", "int8-g16", "", "int2-g64", "int3-g32-asym", "int4-g128")  # "": float32


def matrix(rows: int, columns: int, name: str, seed: int) -> tuple[Linear, torch.Tensor]:
    """A random matrix as the runtime has it, and what it stands for, float64."""
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / columns**0.5
    if not name:
        return Linear(w), w.double()
    fmt = parse_format(name)
    assert isinstance(fmt, BlockFormat)
    tensors = encode(w, fmt, clip=False).tensors
    laid = lay_out(tensors, fmt, (rows, columns))
    assert laid is not None
    return Linear(laid), decode(tensors, fmt, (rows, columns), torch.float32).double()


class Mixture:
    """Experts of different formats and widths, some fused, some dropped, and their reference."""

    def __init__(self, activation: str = "silu", dropped: tuple[int, ...] = (4,)) -> None:
        self.dense: dict[tuple[int, str], torch.Tensor] = {}
        self.dropped = dropped
        networks: list[Network | None] = []
        for e, name in enumerate(FORMATS):
            inner = INNER - 24 * e
            gate, gate_dense = matrix(inner, HIDDEN, name, 3 * e)
            up, up_dense = matrix(inner, HIDDEN, FORMATS[e - 1], 3 * e + 1)
            down, down_dense = matrix(HIDDEN, inner, name, 3 * e + 2)
            both = torch.cat([gate_dense, up_dense])
            if e == 2:  # stored fused
                gate, up_linear = Linear(both.float()), None
            else:
                up_linear = up
            self.dense[e, "gate_up_proj"], self.dense[e, "down_proj"] = both, down_dense
            networks.append(None if e in dropped else Network(gate, up_linear, down))
        self.act = {
            "silu": F.silu,
            "gelu": F.gelu,
            "relu": F.relu,
            "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
        }[activation]
        self.layer = Forward(HIDDEN, activation, networks, planes=3)

    def _apply_gate(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return self.act(gate) * up

    def reference(self, x: torch.Tensor, index: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        module = SimpleNamespace(num_experts=len(FORMATS), _apply_gate=self._apply_gate)
        return experts_forward(
            module, lambda e, param: self.dense[e, param], x.double(), index, gates.double(),
            dropped=self.dropped,
        )  # fmt: skip

    def check(self, x: torch.Tensor, index: torch.Tensor, gates: torch.Tensor) -> None:
        got, want = experts_product(self.layer, x, index, gates), self.reference(x, index, gates)
        assert got.shape == want.shape
        if want.numel():
            assert (got - want).abs().max() <= 3e-6 * max(1e-3, float(want.abs().max()))


def tokens(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, index, gates."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, HIDDEN, generator=generator)
    scores = torch.rand(count, len(FORMATS), generator=generator)
    gates, index = scores.topk(TOP)
    return x, index, gates


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    return Mixture()


@pytest.mark.parametrize("count", [0, 1, 2, 17, 130])
def test_experts_of_all_widths_in_one_call(count: int, mixture: Mixture) -> None:
    mixture.check(*tokens(count))


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "relu"])
def test_other_activations(activation: str) -> None:
    Mixture(activation).check(*tokens(5))


def test_one_hot_expert_and_empty_ones(mixture: Mixture) -> None:
    x, index, gates = tokens(40)
    mixture.check(x, torch.full_like(index[:, :1], 3), gates[:, :1])


def test_only_the_dropped_expert_gives_zeros(mixture: Mixture) -> None:
    x, index, gates = tokens(3)
    got = experts_product(mixture.layer, x, torch.full_like(index, 4), gates)
    assert torch.equal(got, torch.zeros_like(x))


@pytest.mark.parametrize("count", [1, 9])
def test_indices_beyond_the_experts_mean_none(count: int, mixture: Mixture) -> None:
    x, index, gates = tokens(count)
    index[0, 1] = len(FORMATS)
    index[-1, 2] = len(FORMATS) + 7
    mixture.check(x, index, gates)
    index[0] = -1
    got = experts_product(mixture.layer, x, index, gates)
    assert torch.equal(got[0], torch.zeros(HIDDEN))


def test_an_expert_named_twice_counts_twice(mixture: Mixture) -> None:
    x, index, gates = tokens(1)
    index[0] = torch.tensor([1, 1, 0])
    mixture.check(x, index, gates)


def test_strides_and_half_types_of_inputs(mixture: Mixture) -> None:
    x, index, gates = tokens(6)
    wide = torch.randn(6, 2 * HIDDEN)
    wide[:, ::2] = x
    contiguous = experts_product(mixture.layer, x, index, gates)
    assert torch.equal(experts_product(mixture.layer, wide[:, ::2], index, gates), contiguous)
    assert torch.equal(
        experts_product(mixture.layer, x, index.T.contiguous().T, gates.T.contiguous().T),
        contiguous,
    )
    half = experts_product(mixture.layer, x.bfloat16(), index, gates)
    exact = experts_product(mixture.layer, x.bfloat16().float(), index, gates)
    assert torch.equal(half, exact.bfloat16())


def test_threads_do_not_change_a_bit(mixture: Mixture) -> None:
    before = runtime().get_threads()
    try:
        for count in (1, 33):
            found = []
            for threads in (1, 2, 3, 8):
                runtime().set_threads(threads)
                found.append(experts_product(mixture.layer, *tokens(count)))
            assert all(torch.equal(found[0], other) for other in found[1:])
    finally:
        runtime().set_threads(before)


def test_shared_network_is_added_with_its_gate(mixture: Mixture) -> None:
    x, index, gates = tokens(7)
    gate, gate_dense = matrix(48, HIDDEN, "int8-g16", 91)
    up, up_dense = matrix(48, HIDDEN, "int4-g32", 92)
    down, down_dense = matrix(HIDDEN, 48, "", 93)
    weight = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(94))
    layer = Forward(
        HIDDEN, "silu", mixture.layer.experts, Network(gate, up, down), weight, planes=3
    )
    y = (F.silu(x.double() @ gate_dense.T) * (x.double() @ up_dense.T)) @ down_dense.T
    want = mixture.reference(x, index, gates)
    want += torch.sigmoid(x.double() @ weight.double())[:, None] * y
    got = experts_product(layer, x, index, gates)
    assert (got - want).abs().max() <= 3e-6 * want.abs().max()


def test_sizes_that_do_not_fit_are_refused(mixture: Mixture) -> None:
    x, index, gates = tokens(2)
    with pytest.raises(ValueError, match="80"):
        experts_product(mixture.layer, x[:, :79], index, gates)
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        experts_product(mixture.layer, x, index, gates[:, :2])
