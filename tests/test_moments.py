"""Sums over rows: C and torch against loops over single rows, and what `Moments` makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch

from bitnest.calibrate.moments import SAMPLED_ROWS, Moments, top_count
from bitnest.kernels import moments as kernel
from bitnest.kernels import native
from tests.brute import BLOCKS, Rows, close, numpy

WIDTHS = [1, 7, 15, 16, 17, 31, 33, 40, 47, 64, 127, 128, 129, 144, 172, 256, 300]
ROWS = [1, 2, 31, 32, 33, 70]


@pytest.fixture(params=["native", "reference"])
def add_rows(request: pytest.FixtureRequest) -> Callable[..., int]:
    if request.param == "reference":
        return kernel.reference
    if native.load("moments") is None:
        pytest.skip("no compiler")
    return kernel.add_rows


@pytest.fixture(params=["native", "reference"])
def add_outputs(request: pytest.FixtureRequest) -> Callable[..., None]:
    if request.param == "reference":
        return kernel.reference_outputs
    if native.load("moments") is None:
        pytest.skip("no compiler")
    return kernel.add_outputs


@pytest.fixture(params=["native", "reference"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "reference":
        monkeypatch.setattr(kernel, "_library", lambda: None)
    yield


def noise(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Normal values of unequal channels, a tenth of which reach six."""
    generator = torch.Generator().manual_seed(seed + 1000 * rows + width)
    x = torch.randn(rows, width, generator=generator)
    return x * torch.rand(width, generator=generator).mul(7)


def empty(width: int) -> list[torch.Tensor]:
    double = torch.float64
    sums = [torch.zeros(width, dtype=double) for _ in range(2)]
    return [torch.zeros(width), *sums, torch.zeros(len(BLOCKS), dtype=double)]


def brute(x: torch.Tensor) -> Rows:
    rows = Rows.zeros(1, x.shape[1])
    for row in numpy(x):
        rows.add(0, row)
    return rows


def check(sums: list[torch.Tensor], over: int, x: torch.Tensor) -> None:
    expected = brute(x)
    names = ("absmax", "abs", "square", "peaks")
    for name, value in zip(names, sums, strict=True):
        assert close(value, getattr(expected, name)[0], 1e-6), name
    assert over == int(expected.over_six[0])
    assert torch.equal(sums[0].double(), torch.from_numpy(expected.absmax[0]))  # a maximum is exact


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_every_width_and_count_of_rows_equals_loops(
    rows: int, width: int, add_rows: Callable[..., int]
) -> None:
    x, sums = noise(rows, width), empty(width)
    check(sums, add_rows(x, *sums), x)


@pytest.mark.parametrize("width", [1, 16, 129, 172])
def test_no_rows_change_nothing(width: int, add_rows: Callable[..., int]) -> None:
    sums = empty(width)
    assert add_rows(torch.empty(0, width), *sums) == 0
    assert all(value.eq(0).all() for value in sums)


def test_rows_add_to_what_is_there(add_rows: Callable[..., int]) -> None:
    x, sums = noise(75, 172), empty(172)
    over = sum(add_rows(part, *sums) for part in x.split([1, 40, 34]))
    check(sums, over, x)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, 3:43],  # columns of wider rows
        lambda x: x[::3],  # every third row
        lambda x: x[5:6],
        lambda x: x.T,  # channels that lie apart
        lambda x: x[:1].expand(20, -1),  # rows that are all one
        lambda x: x[:, 7:8],
    ],
    ids=["columns", "rows", "one-row", "transposed", "expanded", "one-column"],
)
def test_strided_rows_are_read_where_they_lie(
    view: Callable[[torch.Tensor], torch.Tensor], add_rows: Callable[..., int]
) -> None:
    x = view(noise(40, 172))
    sums = empty(x.shape[1])
    check(sums, add_rows(x, *sums), x)


def test_six_itself_is_an_outlier_and_the_number_below_is_not(add_rows: Callable[..., int]) -> None:
    below = np.nextafter(np.float32(6), np.float32(0))
    x = torch.tensor([[6.0, -6.0, float(below), -float(below), 7.0]])
    assert add_rows(x, *empty(5)) == 3


def test_a_short_last_block_counts_with_its_own_length(add_rows: Callable[..., int]) -> None:
    x = torch.ones(1, 172)
    x[0, 171] = 3.0
    sums = empty(172)
    add_rows(x, *sums)
    assert sums[3].tolist() == [160 + 12 * 9, 160 + 12 * 9, 128 + 44 * 9]


def test_large_and_tiny_values_keep_their_sums(add_rows: Callable[..., int]) -> None:
    x, sums = torch.full((64, 33), 1e-15), empty(33)
    x[:, 5] = 3e15
    over = add_rows(x, *sums)
    assert over == 64
    assert close(sums[1][5], 64 * 3e15, 1e-6) and close(sums[1][:5], np.full(5, 64e-15), 1e-6)
    assert close(sums[2][5], 64 * 9e30, 1e-6) and close(sums[2][:5], np.full(5, 64e-30), 1e-6)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [0, *ROWS])
def test_outputs_norms_and_gates_equal_loops(
    rows: int, width: int, add_outputs: Callable[..., None]
) -> None:
    y, gates = noise(rows, width, 1), torch.rand(rows, generator=torch.Generator().manual_seed(1))
    total, square = (torch.zeros(width, dtype=torch.float64) for _ in range(2))
    norms = torch.zeros(4, dtype=torch.float64)
    expected = [np.zeros(width), np.zeros(width), np.zeros(4)]
    for _ in range(2):
        add_outputs(y, gates, total, square, norms)
        for row, gate in zip(numpy(y), numpy(gates), strict=True):
            norm = np.sqrt((row**2).sum())
            expected[0] += row
            expected[1] += row**2
            expected[2] += (gate, gate**2, norm, gate * norm)
    scale = max(float(np.abs(numpy(y)).sum()), 1e-30)  # sums of both signs may cancel
    assert np.abs(numpy(total) - expected[0]).max() <= 1e-6 * scale
    assert close(square, expected[1], 1e-6) and close(norms, expected[2], 1e-6)


def test_outputs_and_gates_that_lie_apart_are_read_in_order(
    add_outputs: Callable[..., None],
) -> None:
    y, gates = noise(12, 20).T, torch.rand(20, 2)[:, 1]
    total, square = (torch.zeros(12, dtype=torch.float64) for _ in range(2))
    norms = torch.zeros(4, dtype=torch.float64)
    add_outputs(y, gates, total, square, norms)
    length = np.sqrt((numpy(y) ** 2).sum(1))
    assert close(square, (numpy(y) ** 2).sum(0)) and close(norms[3], numpy(gates) @ length)


def naive_ranks(x: np.ndarray, count: int) -> np.ndarray:
    ranks = np.zeros(x.shape[1], int)
    for row in x:
        ranks[np.argsort(-np.abs(row))[:count]] += 1
    return ranks


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("width", [40, 172, 300])
def test_ranked_rows_are_spread_over_all_batches(width: int) -> None:
    moments, expected, ranked = Moments.zeros((2,), width), np.zeros(width, int), 0
    for seed, rows in enumerate([5, 32, 33, 100, 1, *[64] * 20]):
        x = noise(rows, width, seed)
        moments.add((1,), x)
        taken = [numpy(x)[i] for i in range(0, rows, -(-rows // SAMPLED_ROWS))]
        assert len(taken) <= SAMPLED_ROWS
        expected += naive_ranks(np.stack(taken), top_count(width))
        ranked += len(taken)
    assert moments.ranked.tolist() == [0, ranked]
    assert moments.ranks[1].tolist() == expected.tolist() and moments.ranks[0].eq(0).all()


@pytest.mark.parametrize(("width", "count"), [(1, 1), (64, 1), (100, 1), (101, 2), (4096, 41)])
def test_the_largest_hundredth_is_never_empty(width: int, count: int) -> None:
    assert top_count(width) == count


@pytest.mark.usefixtures("either")
def test_merged_halves_are_the_whole() -> None:
    whole, halves = Moments.zeros((2, 3), 47), [Moments.zeros((2, 3), 47) for _ in range(2)]
    for i, place in enumerate([(0, 0), (1, 2), (0, 0), (1, 2), (0, 1)]):
        x = noise(10 + i, 47, i)
        whole.add(place, x)
        halves[i % 2].add(place, x)
    merged = halves[0].merged(halves[1])
    for name, value in asdict(whole).items():
        assert torch.allclose(getattr(merged, name), value, rtol=1e-12), name


def test_merging_leaves_both_halves_as_they_were() -> None:
    one, other = Moments.zeros((1,), 9), Moments.zeros((1,), 9)
    one.add((0,), noise(4, 9))
    other.add((0,), noise(7, 9))
    before = asdict(one), asdict(other)
    one.merged(other)
    for kept, now in zip(before, (one, other), strict=True):
        assert all(torch.equal(value, getattr(now, name)) for name, value in kept.items())


def test_pooled_labels_are_one_sum_over_all_rows() -> None:
    moments, every = Moments.zeros((3, 2), 40), Moments.zeros((2,), 40)
    for label in range(3):
        for expert in range(2):
            x = noise(5 + label, 40, expert)
            moments.add((label, expert), x)
            every.add((expert,), x)
    for name, value in asdict(moments.pooled()).items():
        assert torch.allclose(value, getattr(every, name), rtol=1e-12), name


@pytest.mark.usefixtures("either")
def test_crest_factor_of_equal_magnitudes_is_one_and_of_one_channel_the_root_of_its_block() -> None:
    moments = Moments.zeros((3,), 256)
    moments.add((0,), torch.ones(8, 256) * torch.tensor([1.0, -1.0]).repeat(128))
    single = torch.zeros(8, 256)
    single[:, 77] = 5.0
    moments.add((1,), single)
    kappa: Any = moments.kappa()
    assert close(kappa[0], np.ones(3)) and close(kappa[1], np.sqrt(BLOCKS))
    assert kappa[2].eq(1).all()  # nothing was read
    assert close(moments.mean_square()[1, 77], 25.0) and close(moments.mean_abs()[1, 77], 5.0)


@pytest.mark.usefixtures("either")
def test_zeros_alone_have_no_nan() -> None:
    moments = Moments.zeros((1,), 40)
    moments.add((0,), torch.zeros(6, 40))
    moments.add((0,), torch.empty(0, 40))
    assert moments.tokens.tolist() == [6] and moments.kappa().eq(1).all()
    assert moments.mean_square().eq(0).all()


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize(("experts", "chosen"), [(1, 1), (4, 4), (4, 1), (8, 2), (128, 8)])
def test_logits_and_margins_equal_loops_over_tokens(experts: int, chosen: int) -> None:
    x = 3 * torch.randn(50, experts, generator=torch.Generator().manual_seed(experts))
    total, square = (torch.ones(experts, dtype=torch.float64) for _ in range(2))
    margins = torch.zeros(7, dtype=torch.int64)
    kernel.add_logits(x, chosen, 0.25, total, square, margins)
    expected = [0] * 7
    for row in x.tolist() if experts > chosen else ():
        ordered = sorted(row, reverse=True)
        expected[min(int((ordered[chosen - 1] - ordered[chosen]) / 0.25), 6)] += 1
    assert margins.tolist() == expected
    assert close(total, 1 + numpy(x).sum(0)) and close(square, 1 + (numpy(x) ** 2).sum(0))
