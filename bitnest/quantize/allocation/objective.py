"""From losses per dataset to one number to minimise, and the search for its minimum.

Predicted KL on dataset d (`calibrate/predict`):

    KL_d = sum_k a_k s_kd + b sqrt(S_d),   s_kd: losses of kind k's sites, S_d = sum_k m_k s_kd

with s grown by what else is wrong. What is minimised is the mean of KL_d over datasets [ours], by
linear problems: the first counts losses alone, each further one has the tangent at the last
solution, and the best plan met is kept. A few rounds reach a fixed point. Few items, as where a
target wants whole layers equal, have several fixed points: descents then start from the plans of
smaller budgets too, and those plans compete.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from bitnest.calibrate.predict import (
    DROP,
    GROWTH,
    KAPPA,
    Fit,
    count_drops_once,
    growth,
    moves,
)
from bitnest.errors import RecipeError
from bitnest.quantize.allocation.exact import solve_exact
from bitnest.quantize.allocation.menu import Menu
from bitnest.quantize.allocation.problem import Problem, Solution
from bitnest.quantize.allocation.solver import solve

ROUNDS = 8
FEW = 500  # items, of which descents start from several plans
STARTS = (0.0, 0.5, 0.9, 0.97)  # of what a budget leaves over the cheapest choices
SETTLED = 1e-9
TINY = 1e-12


@dataclass(frozen=True)
class Background:
    """Sites that are not planned and lose something all the same: M of them.

    losses: raw, (M, L). kinds: of each. depth: (M,), see `calibrate/predict.depths`.
    """

    losses: np.ndarray
    kinds: tuple[str, ...]
    depth: np.ndarray

    @classmethod
    def none(cls, labels: int) -> Background:
        """No such sites."""
        return cls(np.zeros((0, labels)), (), np.zeros(0))


@dataclass(frozen=True)
class Objective:
    """Predicted KL of choices on a menu, with what is lost beside it. weights: of the datasets,
    (L,), sum 1. fit: its kinds are the menu's, then those that only the background has."""

    menu: Menu
    fit: Fit
    weights: np.ndarray
    background: Background

    def own(self, choice: np.ndarray) -> np.ndarray:
        """Raw losses per item and label, (N, L); a dropped expert counts once."""
        own = self.menu.losses[np.arange(len(choice)), choice].copy()
        dropped = np.array([name == DROP for name in self.menu.formats])[choice]
        count_drops_once(own, self.menu.experts, dropped)
        for gone in self.menu.taken(choice):
            own[list(gone.items)] = 0.0
            own[gone.items[-1]] = gone.loss
        return own

    def sums(self, choice: np.ndarray) -> np.ndarray:
        """Losses per label and kind, grown with each other, (L, K)."""
        own = np.concatenate([self.own(choice), self.background.losses])
        totals = np.zeros((len(self.fit.kinds), own.shape[1]))
        np.add.at(totals, self.kind, own * growth(own.sum(axis=0), self.depth))
        return totals.T

    @cached_property
    def depth(self) -> np.ndarray:
        """Of every item and the background, (N + M,)."""
        return np.concatenate([self.menu.depth, self.background.depth])

    @cached_property
    def kind(self) -> np.ndarray:
        """Number of the kind, of every item and the background, (N + M,)."""
        beside = [self.fit.kinds.index(kind) for kind in self.background.kinds]
        return np.concatenate([self.menu.kind, np.array(beside, dtype=np.int64)])

    def kl(self, choice: np.ndarray) -> np.ndarray:
        """Predicted KL per label, (L,)."""
        return self.fit.kl(self.sums(choice))

    def mean(self, choice: np.ndarray) -> float:
        """Weighted mean over labels."""
        return float(self.kl(choice) @ self.weights)

    def linear(self, choice: np.ndarray | None) -> np.ndarray:
        """Loss (N, F) in one unit; see `slope`."""
        return np.asarray((self.menu.losses * self.slope(choice)[:, None]).sum(axis=2))

    def slope(self, choice: np.ndarray | None) -> np.ndarray:
        """Of the objective by raw losses, (N, L), at a choice, or at no loss at all.

        With g_i the growth of item i at total T, c_i = a_k(i) + b / (2 sqrt(S)), S the grown sum,

            dKL / ds_i = c_i g_i + sum_j c_j s_j dg_j / dT
        """
        kind = np.array(self.fit.scales)[self.kind][:, None]
        if choice is None:
            slope = np.broadcast_to(kind, (len(kind), self.menu.losses.shape[2]))
        else:
            own = np.concatenate([self.own(choice), self.background.losses])
            total = own.sum(axis=0)
            grown = growth(total, self.depth)
            counted = moves(self.fit.kinds)[self.kind][:, None]
            reached = np.maximum((own * grown * counted).sum(axis=0), TINY)
            each = kind + counted * self.fit.flips / (2 * np.sqrt(reached))
            power = GROWTH * (1 - self.depth[:, None])
            faster = grown * power * KAPPA / (1 + KAPPA * total)
            slope = each * grown + (each * own * faster).sum(axis=0)
        return np.asarray((slope * self.weights)[: len(self.menu.items)])

    def problem(self, cost: np.ndarray, budget: int, choice: np.ndarray | None) -> Problem:
        """The linear problem whose tangent lies at a choice."""
        slope = self.slope(choice)
        loss = np.asarray((self.menu.losses * slope[:, None]).sum(axis=2))
        return Problem(cost, loss, budget, self.menu.bundles(loss, slope))

    def minimise(
        self, cost: np.ndarray, budget: int, *, exact: bool = False, settled: float = SETTLED
    ) -> Solution:
        """The plan of least predicted mean KL that is found. cost: (N, F). settled: what part of it
        one more tangent must save to be worth while.

        Its loss, bound and price are of the last linear problem, whose optimum bounds what this
        tangent allows; exact: solve every linear problem to a proven optimum.

        Raises:
            BudgetError: the cheapest choices are over the budget.
        """
        best = self._descend(cost, budget, None, exact, settled)
        if len(self.menu.items) > FEW:
            return best
        for share in STARTS:
            least = self.menu.least(cost)
            start = self._descend(cost, least + round(share * (budget - least)), None, exact)
            other = self._descend(cost, budget, start.choice, exact)
            for found in (start, other):
                if self.mean(found.choice) < self.mean(best.choice) * (1 - 1e-9):
                    best = found
        return best

    def _descend(
        self,
        cost: np.ndarray,
        budget: int,
        at: np.ndarray | None,
        exact: bool,
        settled: float = SETTLED,
    ) -> Solution:
        """Tangent after tangent, from that at `at`, while the predicted KL falls."""
        solver = solve_exact if exact else solve
        best: Solution | None = None
        for _ in range(ROUNDS):
            found = solver(self.problem(cost, budget, at))
            if best is not None:
                before, now = self.mean(best.choice), self.mean(found.choice)
                if now >= before * (1 - settled):
                    best = found if now < before else best
                    break
            best, at = found, found.choice
        assert best is not None
        return best

    def smallest(self, cost: np.ndarray, limit: float, *, exact: bool = False) -> Solution:
        """The cheapest plan whose predicted mean KL is at most `limit`, to a part in a thousand of
        the cost.

        Raises:
            RecipeError: even the best choices are predicted to lose more.
        """
        allowed = np.where(self.menu.allowed, cost, -1)
        low = self.menu.least(cost)
        high = int(allowed.max(axis=1).sum())
        best = self.minimise(cost, high, exact=exact)
        if self.mean(best.choice) > limit:
            raise RecipeError(
                f"no plan is predicted to lose less than {self.mean(best.choice):.3g} nats, "
                f"{limit:g} are asked for",
                hint="finer formats among the candidates, or a higher --max-kl",
            )
        while high - low > max(1, high // 1000):
            middle = (low + high) // 2
            found = self.minimise(cost, middle, exact=exact)
            if self.mean(found.choice) <= limit:
                best, high = found, min(middle, found.cost)
            else:
                low = middle
        return best


def with_weights(
    menu: Menu,
    fit: Fit,
    weights: np.ndarray | None = None,
    background: Background | None = None,
) -> Objective:
    """Equal weights unless told; the fit's kinds in the menu's order, those it lacks at its
    mean."""
    labels = menu.losses.shape[2]
    background = background or Background.none(labels)
    known = dict(zip(fit.kinds, fit.scales, strict=True))
    mean = float(np.exp(np.mean(np.log(fit.scales)))) if fit.scales else 1.0
    kinds = tuple(dict.fromkeys((*menu.kinds, *background.kinds)))
    ordered = replace(fit, kinds=kinds, scales=tuple(known.get(k, mean) for k in kinds))
    own = np.full(labels, 1.0 / labels) if weights is None else weights / weights.sum()
    return Objective(menu, ordered, own, background)
