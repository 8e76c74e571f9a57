"""Low-rank correction of what a codec leaves: W = W_hat + B A + rest, factors in int8.

With E = W - W_hat and a root R of the norm that counts, |(E - B A) R|_F is least (Eckart-Young) for

    E R = U S V^T,   B A = U_r S_r V_r^T R^-1

    lorc    R = I                        (LoRC, ZeroQuant-V2, Yao et al., 2023)
    lqer    R = diag(s), s = sqrt(diag H): RMS of the inputs  (LQER, Zhang et al., 2024)
    hlr     R = L, H + damp mean(diag H) I = L L^T: the output error itself (ours)

hlr also lets codec and residual take turns: with A held, B can undo any error that lies in the span
of A, so the codec solves what is left of W against

    H' = L (I - Q Q^T) L^T,   Q an orthonormal basis of (A L)^T

(round-to-nearest just rounds W - B A again), then B A is fitted to the new E. lorc and lqer are
fitted once, as published.

Each factor's singular directions have one 16-bit scale; B's column and A's row of a direction are
stretched until their scales agree, and rounded to int8. A is rounded first and B fitted again to
what A has become, by least squares in the same norm, before it is rounded. A residual that does not
lower the H-weighted error is stored as zeros.

Up to EXACT on the smaller side the SVD is exact. Beyond it the range of E R is sought by seeded
random probes (Halko, Martinsson and Tropp, 2011), which never touch torch's global seed. At 1536 x
1536 and rank 16 they find 96 % of the best energy in white noise, all but 3e-6 of it where the
spectrum of H falls as 1/k.

Left out: factors of other widths, and factors shared between matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

DAMP = 0.01  # share of the mean diagonal that hlr adds to H
MAX_DAMPINGS = 8
FLOOR = 1e-3  # of lqer's scales, against their mean
RIDGE = 1e-6  # share of the mean diagonal that keeps refits solvable when directions coincide
EXACT = 512  # larger matrices get a randomised SVD
OVERSAMPLE = 16
POWERS = 6  # passes of the randomised SVD over the matrix and its transpose
SEED = 0

TURNS = {"lorc": 1, "lqer": 1, "hlr": 4}  # how often codec and residual are fitted

Factors = dict[str, torch.Tensor]


class Stores(Protocol):
    """What solves B matrices and can store them."""

    def store(self, b: int, rows: slice) -> dict[str, torch.Tensor]:
        """Stored tensors of some rows of matrix b."""


@dataclass
class Best:
    """For each of B matrices the least error offered so far, and what is stored for it.

    weight: decoded, (B, O, I). error: per row, (B, O).
    """

    weight: torch.Tensor
    error: torch.Tensor
    tensors: list[dict[str, torch.Tensor]]

    @classmethod
    def of(cls, weight: torch.Tensor) -> Best:
        """Nothing offered yet."""
        error = torch.full_like(weight[..., 0], torch.inf)
        return cls(torch.empty_like(weight), error, [{} for _ in weight])

    def offer(
        self, weight: torch.Tensor, error: torch.Tensor, base: Stores, factors: list[Factors]
    ) -> None:
        """Take the matrices whose summed error is lower than what was kept."""
        better = error.sum(1) < self.error.sum(1)
        for b in better.nonzero().flatten().tolist():
            self.weight[b], self.error[b] = weight[b], error[b]
            self.tensors[b] = {**base.store(b, slice(None)), **factors[b]}

    def store(self, b: int, rows: slice) -> dict[str, torch.Tensor]:
        """Stored tensors of matrix b; rows are all of them, since factors belong to the whole."""
        return self.tensors[b]


@dataclass(frozen=True)
class Root:
    """R of a norm |X R|_F. root: (I,) if R is diagonal, (I, I) if lower triangular, None for I."""

    root: torch.Tensor | None

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """X R."""
        if self.root is None:
            return x
        return x * self.root if self.root.dim() == 1 else x @ self.root

    def over(self, x: torch.Tensor) -> torch.Tensor:
        """X R^-1."""
        if self.root is None:
            return x
        if self.root.dim() == 1:
            return x / self.root
        return torch.linalg.solve_triangular(self.root, x, upper=False, left=False)


def norm_root(kind: str, hessian: torch.Tensor | None) -> Root:
    """The root of a kind's norm, up to a factor. hessian: (I, I), which all but lorc need.

    Raises:
        ArithmeticError: H is not finite or far from positive semi-definite.
    """
    if kind == "lorc":
        return Root(None)
    assert hessian is not None
    mean = hessian.diagonal().mean()
    if not mean.isfinite():
        raise ArithmeticError("a Hessian is not finite")
    if mean == 0:  # nothing ever came in: all channels alike
        return Root(None)
    if kind == "lqer":
        scale = hessian.diagonal().clamp_min(0).sqrt()
        return Root((scale / scale.mean()).clamp_min(FLOOR))
    level = DAMP
    for _ in range(MAX_DAMPINGS):
        damped = hessian / mean
        damped.diagonal().add_(level)
        lower, info = torch.linalg.cholesky_ex(damped)
        if not info.any() and lower.isfinite().all():
            return Root(lower)
        level *= 10
    raise ArithmeticError("a Hessian is not finite or not symmetric positive semi-definite")


def best_factors(miss: torch.Tensor, root: Root, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """B (O, r) and A (r, I) of least |(E - B A) R|_F, unrounded; S is split evenly."""
    u, s, v = top_singular(root.times(miss), rank)
    half = s.sqrt()
    return u * half, root.over(half[:, None] * v)


def top_singular(
    matrix: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (O, r), S (r,), V^T (r, I) of the largest singular values; exact up to EXACT."""
    probes = rank + OVERSAMPLE
    if min(matrix.shape) <= max(EXACT, 2 * probes):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], v[:rank]
    generator = torch.Generator().manual_seed(SEED)
    start = torch.randn(matrix.shape[1], probes, generator=generator).to(matrix)
    q = torch.linalg.qr(matrix @ start).Q
    for _ in range(POWERS):
        q = torch.linalg.qr(matrix.T @ q).Q
        q = torch.linalg.qr(matrix @ q).Q
    u, s, v = torch.linalg.svd(q.T @ matrix, full_matrices=False)
    return q @ u[:, :rank], s[:rank], v[:rank]


def fit_low_rank(miss: torch.Tensor, root: Root, rank: int, half: torch.dtype) -> Factors:
    """Stored factors (`formats/wrappers.py`) of one error matrix (O, I) float32.

    rank: at most the smaller side. half: stored type of the scales.
    """
    left, right = best_factors(miss, root, rank)
    stretch = _ratio(right.abs().amax(1), left.abs().amax(0)).sqrt()
    a, a_scales = _int8(right / stretch[:, None], 1, half)
    seen = root.times(a.float() * a_scales.float()[:, None])
    b, b_scales = _int8(_least_squares(root.times(miss), seen), 0, half)
    return {"left": b, "left_scales": b_scales, "right": a, "right_scales": a_scales}


def no_factors(factors: Factors) -> Factors:
    """Factors of the same layout whose product is zero."""
    return {name: torch.zeros_like(tensor) for name, tensor in factors.items()}


def beyond_reach(factors: Factors, root: Root) -> torch.Tensor:
    """H' (I, I): what the codec's error costs if B is free to follow and A is held.

    Positive semi-definite by construction.
    """
    a = factors["right"].float() * factors["right_scales"].float()[:, None]
    q = torch.linalg.qr(root.times(a).T).Q
    whole = root.times(torch.eye(a.shape[1], device=a.device))
    rest = whole - (whole @ q) @ q.T
    return rest @ rest.T


def _least_squares(wanted: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """X (O, r) of least |wanted - X basis|_F; basis (r, I)."""
    gram = basis @ basis.T
    size = gram.diagonal().sqrt()
    size = torch.where(size > 0, size, 1)  # directions of any length count alike in the ridge
    gram = gram / size / size[:, None]
    gram.diagonal().add_(RIDGE)
    return torch.linalg.solve(gram, (basis / size[:, None]) @ wanted.T).T / size


def _ratio(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x / y, 1 where either is 0."""
    return torch.where((x > 0) & (y > 0), x / y, 1)


def _int8(x: torch.Tensor, axis: int, half: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of x and one scale for each index of the other axis, which covers its largest entry."""
    scale = (x.abs().amax(axis, keepdim=True) / 127).to(half).float()
    codes = (x / torch.where(scale > 0, scale, 1)).round().clamp_(-127, 127).to(torch.int8)
    return codes, scale.flatten().to(half)
