"""Quantising a batch of matrices in any format: codecs inside, wrappers around them.

    @had, @rhad          solve W R against R^T H R, then W_hat = solution R^T
    zero                 nothing to choose: the error is tr(W H W^T)
    @awq                 solve W diag(s) against diag(1/s) H diag(1/s)
    @perm                solve W[:, order] against H[order, order]; order descends by diag(H)
    +lorc, +lqer, +hlr   solve, then fit B A to the error that is left (`lowrank`)

A solution's error is tr(dW H dW^T), which no transform changes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch

from bitnest.formats import (
    BlockFormat,
    BlockSparseFormat,
    LowRankFormat,
    NestedFormat,
    PackedFormat,
    SparseFormat,
    SplitFormat,
    TransformedFormat,
    ZeroFormat,
)
from bitnest.formats.split import WIDE
from bitnest.formats.wrappers import CoreFormat
from bitnest.kernels import encode
from bitnest.kernels.decode import SIGNS_SEED, decode, low_rank, undo_transform
from bitnest.kernels.hadamard import random_signs, rotate, whole_block
from bitnest.prune.solution import solve_sparse
from bitnest.quantize.codecs.block import BlockCodec
from bitnest.quantize.gptq import gptq, rtn
from bitnest.quantize.lowrank import (
    TURNS,
    Best,
    beyond_reach,
    fit_low_rank,
    no_factors,
    norm_root,
)
from bitnest.quantize.nested.solution import Nested, solve_nested
from bitnest.quantize.transforms.channel_scales import search
from bitnest.quantize.transforms.permutation import by_energy

TINY = 1e-30
AWQ_ROWS = 256  # evenly spread, that stand for a matrix while its exponent is searched


@dataclass(frozen=True)
class Options:
    """Dials of the solver.

    method: gptq or rtn. damp: see gptq. weighting: tokens' weights in an expert's H. min_tokens:
    tokens under which an expert's H leans on the layer's; None: its number of input channels.
    clip: search clipping ratios. half: stored type of 16-bit scales. width_weights: see `Recipe`.
    prune: how sparse formats choose (`prune/solution.py`).
    """

    method: str = "gptq"
    damp: float = 0.03
    weighting: str = "gate"
    min_tokens: int | None = None
    clip: bool = True
    half: torch.dtype = torch.bfloat16
    width_weights: tuple[tuple[int, float], ...] = ()
    prune: str = "sparsegpt"


class Solution(Protocol):
    """B solved matrices. weight: decoded, (B, O, I) float32. error: per row, (B, O)."""

    error: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:
        """See above; may be decoded when first asked for."""

    def store(self, b: int, rows: slice) -> dict[str, torch.Tensor]:
        """Stored tensors of some rows of matrix b, which are one site's."""


@dataclass
class Nearest:
    """Matrices of shape (O, I) rounded to nearest by the native kernel, already as stored."""

    shape: tuple[int, int]
    encoded: list[encode.Encoded]
    error: torch.Tensor

    @cached_property
    def weight(self) -> torch.Tensor:
        """Decoded, (B, O, I) float32."""
        return torch.stack([decode(e.tensors, e.fmt, self.shape) for e in self.encoded])

    def store(self, b: int, rows: slice) -> dict[str, torch.Tensor]:
        """Stored tensors of some rows of matrix b."""
        return self.encoded[b].rows(rows)


@dataclass
class Dropped:
    """Matrices of zeros, of which nothing is stored."""

    weight: torch.Tensor
    error: torch.Tensor

    def store(self, b: int, rows: slice) -> dict[str, torch.Tensor]:
        """No tensors."""
        return {}


@dataclass
class Split:
    """The first columns by one solution, the others by another."""

    wide: Solution
    base: Solution
    weight: torch.Tensor
    error: torch.Tensor

    def store(self, b: int, rows: slice) -> dict[str, torch.Tensor]:
        """Stored tensors of some rows of matrix b."""
        first = {WIDE + name: t for name, t in self.wide.store(b, rows).items()}
        return {**first, **self.base.store(b, rows)}


@dataclass
class Wrapped:
    """A solution with what its wrapper adds: tensors of matrix b, the same for all its rows."""

    base: Solution
    weight: torch.Tensor
    error: torch.Tensor
    own: list[dict[str, torch.Tensor]]

    def store(self, b: int, rows: slice) -> dict[str, torch.Tensor]:
        """Stored tensors of some rows of matrix b."""
        return {**self.base.store(b, rows), **self.own[b]}


def solve(
    weight: torch.Tensor, hessian: torch.Tensor | None, fmt: PackedFormat, options: Options
) -> Solution:
    """Quantise B matrices (B, O, I) float32, each against its own H (B, I, I) if there is one.

    Without H, or with method rtn, weights are rounded to nearest; the error without H is the plain
    squared difference.
    """
    if isinstance(fmt, ZeroFormat):
        return Dropped(torch.zeros_like(weight), weighted_error(weight, hessian))
    if isinstance(fmt, BlockFormat):
        return _solve_block(weight, hessian, fmt, options)
    if isinstance(fmt, NestedFormat):
        h = None if options.method == "rtn" else hessian
        weights = dict(options.width_weights)
        return solve_nested(weight, h, fmt, half=options.half, damp=options.damp, weights=weights)
    if isinstance(fmt, SparseFormat | BlockSparseFormat):
        return solve_sparse(
            weight, hessian, fmt, half=options.half, damp=options.damp, clip=options.clip,
            compensate=options.method != "rtn", prune=options.prune,
        )  # fmt: skip
    if isinstance(fmt, SplitFormat):
        return _solve_split(weight, hessian, fmt, options)
    if isinstance(fmt, LowRankFormat):
        return _solve_low_rank(weight, hessian, fmt, options)
    kinds = {"awq": _awq, "perm": _permuted, "had": _hadamard, "rhad": _hadamard}
    w, h, own = kinds[fmt.kind](weight, hessian, fmt, options)
    base = solve(w, h, fmt.base, options)
    tensors = [{key: value[b] for key, value in own.items()} for b in range(len(weight))]
    decoded = [undo_transform(m, fmt, t) for m, t in zip(base.weight, tensors, strict=True)]
    return Wrapped(base, torch.stack(decoded), base.error, tensors)


def narrower_errors(solution: Solution) -> tuple[torch.Tensor, ...]:
    """Errors of a nested solution at its narrower widths, each like `error`; none of others."""
    while isinstance(solution, Wrapped):
        solution = solution.base
    return solution.narrower if isinstance(solution, Nested) else ()


def needs_statistics(fmt: PackedFormat) -> bool:
    """Whether the format cannot be chosen without inputs: even round-to-nearest needs H then."""
    if isinstance(fmt, CoreFormat | ZeroFormat):
        return False
    return fmt.kind in {"awq", "perm", "lqer", "hlr"} or needs_statistics(fmt.base)


def weighted_error(miss: torch.Tensor, hessian: torch.Tensor | None) -> torch.Tensor:
    """tr(dW H dW^T) per row, or |dW|^2: (B, O) of dW (B, O, I)."""
    if hessian is None:
        return miss.square().sum(2)
    return ((miss @ hessian) * miss).sum(2)


def _solve_block(
    weight: torch.Tensor, hessian: torch.Tensor | None, fmt: BlockFormat, options: Options
) -> Solution:
    codec = BlockCodec(fmt, options.half, options.clip)
    if hessian is not None and options.method != "rtn":
        return gptq(weight, hessian, codec, damp=options.damp)
    result = _nearest(weight, fmt, options) or rtn(weight, codec)
    if hessian is not None:
        result.error = weighted_error(weight - result.weight, hessian)
    return result


def _solve_split(
    weight: torch.Tensor, hessian: torch.Tensor | None, fmt: SplitFormat, options: Options
) -> Solution:
    """One sweep over the columns in two formats, cut where it passes from one to the other.

    The first columns a are solved knowing that the others b will make up for them, which leaves of
    their Hessian S = H_aa - H_ab H_bb^-1 H_ba; the others against H_bb, moved to where they do:
    W_b + (W_a - A) H_ab H_bb^-1. Damped as GPTQ damps.
    """
    n = fmt.wide_of(weight.shape[2])
    if n == 0:
        return solve(weight, hessian, fmt.base, options)
    first, rest = weight[:, :, :n], weight[:, :, n:]
    if hessian is None or options.method == "rtn":
        wide, base = solve(first, None, fmt.wide, options), solve(rest, None, fmt.base, options)
    else:
        a, cross, b = hessian[:, :n, :n], hessian[:, :n, n:], hessian[:, n:, n:]
        mean = hessian.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        eye = torch.eye(b.shape[1], device=b.device)
        damped = b + eye * (options.damp * mean).clamp_min(TINY)
        move = torch.linalg.solve(damped, cross.mT).mT  # H_ab H_bb^-1
        left = a - move @ cross.mT
        wide = solve(first, (left + left.mT) / 2, fmt.wide, options)
        base = solve(rest + (first - wide.weight) @ move, b, fmt.base, options)
    decoded = torch.cat([wide.weight, base.weight], dim=2)
    return Split(wide, base, decoded, weighted_error(weight - decoded, hessian))


def _nearest(weight: torch.Tensor, fmt: BlockFormat, options: Options) -> Nearest | None:
    """The same as rtn, by native code; None where there is none for the format or the device."""
    if weight.device.type != "cpu" or not encode.supported(fmt) or not encode.available():
        return None
    encoded = [encode.encode(w, fmt, options.half, options.clip, native=True) for w in weight]
    shape = (weight.shape[1], weight.shape[2])
    return Nearest(shape, encoded, torch.stack([e.error for e in encoded]))


def _solve_low_rank(
    weight: torch.Tensor, hessian: torch.Tensor | None, fmt: LowRankFormat, options: Options
) -> Solution:
    batch, rank = range(len(weight)), fmt.rank_of((weight.shape[1], weight.shape[2]))
    roots = [norm_root(fmt.kind, None if hessian is None else hessian[b]) for b in batch]
    best, target, h = Best.of(weight), weight, hessian
    for turn in range(TURNS[fmt.kind]):
        base = solve(target, h, fmt.base, options)
        miss = weight - base.weight
        fitted = [fit_low_rank(miss[b], roots[b], rank, options.half) for b in batch]
        residual = torch.stack([low_rank(factors) for factors in fitted])
        best.offer(base.weight + residual, weighted_error(miss - residual, hessian), base, fitted)
        if turn == 0:
            nothing = [no_factors(factors) for factors in fitted]
            best.offer(base.weight, weighted_error(miss, hessian), base, nothing)
        if turn + 1 < TURNS[fmt.kind]:
            target = weight - residual
            h = torch.stack([beyond_reach(fitted[b], roots[b]) for b in batch])
    return best


Transformed = tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]


def _hadamard(
    weight: torch.Tensor, hessian: torch.Tensor | None, fmt: TransformedFormat, _: Options
) -> Transformed:
    signs = random_signs(weight.shape[2], SIGNS_SEED) if fmt.kind == "rhad" else None
    block = fmt.block or whole_block(weight.shape[2])
    w = rotate(weight, block, signs)
    if hessian is None:
        return w, None, {}
    half = rotate(hessian, block, signs).transpose(1, 2)
    return w, rotate(half, block, signs), {}


def _permuted(
    weight: torch.Tensor, hessian: torch.Tensor | None, _: TransformedFormat, __: Options
) -> Transformed:
    assert hessian is not None
    order = torch.stack([by_energy(h.diagonal()).order for h in hessian])
    w = torch.stack([m[:, o] for m, o in zip(weight, order, strict=True)])
    h = torch.stack([m[o][:, o] for m, o in zip(hessian, order, strict=True)])
    return w, h, {"order": order.to(torch.int32)}


def _awq(
    weight: torch.Tensor, hessian: torch.Tensor | None, fmt: TransformedFormat, options: Options
) -> Transformed:
    assert hessian is not None
    scales = []
    nearest = replace(options, method="rtn")
    ordered = needs_statistics(fmt.base)
    for w, h in zip(weight, hessian, strict=True):

        def rounded(x: torch.Tensor, h: torch.Tensor = h) -> torch.Tensor:
            return solve(x[None], h[None] if ordered else None, fmt.base, nearest).weight[0]

        step = -(-len(w) // AWQ_ROWS)
        scales.append(search(w[::step], h, rounded).scale.to(options.half))
    s = torch.stack(scales)
    wide = s.float()[:, None, :]
    return weight * wide, hessian / wide / wide.transpose(1, 2), {"channels": s}
