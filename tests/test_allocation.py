"""The solver: optimal on small instances, within its own bound on all, fair to ties and budgets."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnest.quantize.allocation.exact import integer_program, solve_exact
from bitnest.quantize.allocation.explain import marginal_price
from bitnest.quantize.allocation.problem import BudgetError, Bundle, Problem
from bitnest.quantize.allocation.relaxation import equal_slope_widths, level, relaxed_loss
from bitnest.quantize.allocation.solver import reduce, repair, solve


def instance(seed: int) -> Problem:
    """A small random problem: odd costs, ties, gaps in the choices, sometimes a bundle."""
    random = np.random.default_rng(seed)
    items, choices = int(random.integers(1, 7)), int(random.integers(2, 6))
    cost = np.sort(random.integers(0, 100, (items, choices)), axis=1)
    loss = -np.sort(-(random.random((items, choices)) ** 3), axis=1)
    if random.random() < 0.3:
        cost //= 10  # many equal costs
    if random.random() < 0.3:
        loss = np.round(loss, 1)  # many equal losses
    if random.random() < 0.3:
        loss = random.random((items, choices))  # finer is not always better
    missing = random.random((items, choices)) < 0.15
    missing[:, 0] = False
    loss[missing] = np.inf
    bundles: tuple[Bundle, ...] = ()
    if items >= 3 and random.random() < 0.5:
        bundles = (Bundle((0, 2), (0, 0), float(random.random() * 0.5)),)
    low = int(cost[:, 0].sum())
    high = int(np.where(np.isfinite(loss), cost, 0).max(axis=1).sum())
    return Problem(cost, loss, int(low + random.random() * (high - low)), bundles)


def brute_force(problem: Problem) -> float:
    """The least loss within the budget, by trying every plan."""
    allowed = [np.nonzero(np.isfinite(row))[0] for row in problem.loss]
    plans = (np.array(plan) for plan in itertools.product(*allowed))
    return min(
        (problem.loss_of(p) for p in plans if problem.cost_of(p) <= problem.budget),
        default=math.inf,
    )


@pytest.mark.parametrize("seed", range(200))
def test_small_instances_are_solved_to_the_optimum(seed: int) -> None:
    problem = instance(seed)
    best = brute_force(problem)
    exact, quick = solve_exact(problem), solve(problem)
    assert exact.loss == pytest.approx(best, rel=1e-9, abs=1e-12)
    assert quick.loss <= 1.005 * best + 1e-12
    for found in (exact, quick):
        assert found.cost == problem.cost_of(found.choice) <= problem.budget
        assert found.loss == pytest.approx(problem.loss_of(found.choice))
        assert found.bound <= best + 1e-9


@pytest.mark.parametrize("seed", range(0, 200, 4))
def test_the_integer_program_alone_finds_the_optimum(seed: int) -> None:
    problem = instance(seed)
    reduced = reduce(problem)
    if not reduced.options:
        pytest.skip("nothing is left open")
    found = integer_program(problem, reduced, repair(problem, reduced))
    assert found.loss == pytest.approx(brute_force(problem), rel=1e-9, abs=1e-12)


def curves(seed: int, items: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Costs and losses as of matrices of several sizes at 0 to 8 bits."""
    random = np.random.default_rng(seed)
    numel = random.choice([32768, 65536, 131072], items)
    bits = np.array([0, 2, 3, 4, 5, 6, 8])
    cost = (numel[:, None] * bits // 8).astype(np.int64)
    scale = np.exp(random.normal(0, 2, items))
    loss = scale[:, None] * 4.0 ** (-bits) * np.exp(random.normal(0, 0.05, (items, len(bits))))
    return cost, loss, numel


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), shares=st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_more_bytes_never_lose_more(seed: int, shares: list[float]) -> None:
    cost, loss, _ = curves(seed, 12)
    total = int(cost.max(axis=1).sum())
    budgets = sorted(int(share * total) for share in shares)
    found = [solve_exact(Problem(cost, loss, budget)) for budget in budgets]
    for less, more in itertools.pairwise(found):
        assert more.loss <= less.loss * (1 + 1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.01, 1))
def test_budget_bound_and_repeatability(seed: int, share: float) -> None:
    cost, loss, _ = curves(seed, 200)
    problem = Problem(cost, loss, int(share * cost.max(axis=1).sum()))
    found, again = solve(problem), solve(problem)
    assert (found.choice == again.choice).all()
    assert found.cost <= problem.budget
    assert found.bound <= found.loss * (1 + 1e-12)
    assert found.gap < 2e-3


def test_items_in_another_order_lose_the_same() -> None:
    cost, loss, _ = curves(3, 60)
    order = np.random.default_rng(0).permutation(60)
    budget = int(0.4 * cost.max(axis=1).sum())
    one = solve(Problem(cost, loss, budget))
    other = solve(Problem(cost[order], loss[order], budget))
    assert one.loss == pytest.approx(other.loss, rel=1e-3)


def test_equal_items_share_the_budget_and_leave_less_than_a_step() -> None:
    cost = np.tile(np.array([10, 20, 40]), (7, 1))
    loss = np.tile(np.array([4.0, 2.0, 1.0]), (7, 1))
    found = solve(Problem(cost, loss, 145))
    assert found.loss == 4.0 * 0 + 2.0 * 7  # a step to 20 saves .2 a unit, one to 40 half of that
    assert found.gap == 0


def test_a_choice_above_the_line_is_taken_where_it_fits_best() -> None:
    # 15 is above the line from 10 to 20, but the only one that 35 units allow
    problem = Problem(np.array([[10, 15, 20], [10, 15, 20]]), np.array([[9.0, 6.0, 1.0]] * 2), 35)
    assert solve(problem).loss == 7.0


def test_dropping_an_expert_is_one_decision() -> None:
    cost = np.array([[0, 10], [0, 10], [0, 10]])
    loss = np.array([[0.5, 0.0], [0.5, 0.0], [0.5, 0.0]])
    alone = solve(Problem(cost, loss, 20))
    together = solve(Problem(cost, loss, 20, (Bundle((0, 1, 2), (0, 0, 0), 0.2),)))
    assert alone.loss == 0.5 and together.loss == pytest.approx(0.2)
    assert (together.choice == 0).all() and together.cost == 0


def test_the_price_of_a_plan_is_that_of_steps_that_were_open() -> None:
    cost = np.array([[0, 10], [0, 10], [0, 10], [0, 10], [0, 10]])
    loss = np.array([[0.5, 0.0], [0.5, 0.0], [0.5, 0.0], [0.1, 0.0], [0.04, 0.0]])
    problem = Problem(cost, loss, 10, (Bundle((0, 1, 2), (0, 0, 0), 0.2),))
    found = solve(problem)
    assert found.choice.tolist() == [0, 0, 0, 1, 0]
    # up: the expert as a whole for .2 / 30, the last item for .04 / 10; down: the fourth, .1 / 10
    assert marginal_price(problem, found.choice) == pytest.approx((0.2 / 30 + 0.1 / 10) / 2)
    kept = np.array([1, 1, 1, 1, 0])  # now it is the expert that would go first
    assert marginal_price(problem, kept) == pytest.approx((0.04 / 10 + 0.2 / 30) / 2)
    odd = np.array([0, 0, 0, 0, 1])  # not the best: up .1 / 10 is worth more than down .04 / 10
    assert 0.04 / 10 <= marginal_price(problem, odd) <= 0.1 / 10


def test_too_small_a_budget_says_what_it_would_take() -> None:
    with pytest.raises(BudgetError) as caught:
        solve(Problem(np.array([[3, 9], [4, 8]]), np.ones((2, 2)), 6))
    assert caught.value.least == 7 and "7" in caught.value.what


@pytest.mark.parametrize(
    "cost, loss, bundles",
    [
        ([[1, 2]], [[1.0]], ()),
        ([[1, 2]], [[1.0, math.nan]], ()),
        ([[-1, 2]], [[1.0, 2.0]], ()),
        ([[1, 2]], [[math.inf, math.inf]], ()),
        ([[1], [1]], [[1.0], [1.0]], (Bundle((0, 1), (0, 0), 1.0), Bundle((1,), (0,), 1.0))),
    ],
)
def test_problems_that_are_none(cost: list, loss: list, bundles: tuple[Bundle, ...]) -> None:
    with pytest.raises(ValueError):
        Problem(np.array(cost), np.array(loss), 5, bundles)


def test_thirty_thousand_items_end_near_the_bound() -> None:
    cost, loss, numel = curves(1, 30_000)
    bundles = tuple(
        Bundle((i, i + 1, i + 2), (0, 0, 0), float(loss[i : i + 3, 0].max()))
        for i in range(0, 30_000, 3)
    )
    found = solve(Problem(cost, loss, int(3 * numel.sum() / 8), bundles))
    assert found.gap < 1e-5


def test_widths_of_equal_slope_are_baq_s_closed_form() -> None:
    c, numel = np.array([1.0, 4.0, 16.0, 64.0]), np.ones(4)
    widths = equal_slope_widths(c, numel, 3.0, np.zeros(4), np.full(4, 16.0))
    mean_log = np.log2(c).mean()
    assert widths == pytest.approx(3.0 + 0.5 * (np.log2(c) - mean_log))
    losses = c * 4.0 ** (-widths)
    assert losses == pytest.approx(losses[0])  # every item ends with equal loss


def test_limits_bend_the_widths_but_not_their_mean() -> None:
    c, numel = np.array([1e-6, 1.0, 1.0, 1e6]), np.array([1.0, 2.0, 3.0, 2.0])
    widths = equal_slope_widths(c, numel, 4.0, np.full(4, 2.0), np.full(4, 8.0))
    assert widths @ numel / numel.sum() == pytest.approx(4.0)
    assert widths.min() == 2.0 and widths.max() == 8.0


@pytest.mark.parametrize("seed", range(8))
def test_the_relaxation_is_below_every_plan_on_ideal_curves(seed: int) -> None:
    random = np.random.default_rng(seed)
    numel = random.choice([4096, 8192], 30)
    bits = np.arange(1, 9)
    c = np.exp(random.normal(0, 2, 30)) * numel
    loss = c[:, None] * 4.0 ** (-bits.astype(float))
    found = solve_exact(Problem(numel[:, None] * bits, loss, int(3.5 * numel.sum())))
    fitted = np.array([level(row, bits) for row in loss])
    assert fitted == pytest.approx(c)
    widths = equal_slope_widths(c, numel, 3.5, np.ones(30), np.full(30, 8.0))
    assert relaxed_loss(c, widths) <= found.loss * (1 + 1e-9)
    assert found.loss < 1.3 * relaxed_loss(c, widths)
