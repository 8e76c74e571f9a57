"""GPTQ (Frantar et al., 2022): round column by column, let the columns left compensate.

    H  <- H + damp * mean(diag H) * I              X X^T, summed over tokens
    U  = upper Cholesky factor of H^-1             H^-1 = U^T U
    for each column j:   q_j  = round(w_j)
                         err  = (w_j - q_j) / U_jj
                         w_k -= err * U_jk         for all k > j

Scales of a group are fitted when the sweep enters the group, on the weights as compensated so far.
Columns go in descending diag(H), as act-order does, but groups stay whole: groups descend by their
total diag(H) and columns descend within their group, so each scale still covers g neighbouring
input channels and nothing but codes and scales is stored. (The same idea is known as group-aware
reordering.)

Last, each row's scales are fitted again, all groups at once, to the codes the sweep chose (ours; a
row keeps the scales it had if that is no better). Formats whose scales cannot follow (powers of
two, blocks of rows, tables without scales) skip it.

U needs no explicit inverse: with H = R R^T, R upper triangular (a Cholesky factorisation run from
the last column to the first), U = R^-1.

All arrays are batched over B matrices of equal shape, experts for instance, and laid out
(B, I, O): one column of W for all rows is then contiguous. A column that no token ever excited
has H_jj = 0; its weights are rounded to nearest instead of being zeroed, as some implementations
do, because text outside the calibration may excite it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bitnest.formats.block import DQ_ROWS
from bitnest.quantize.codecs.block import BlockCodec, Grid
from bitnest.quantize.codecs.scales import Shared, project

BLOCK = 128  # columns whose compensation of the rest is applied in one product
MAX_DAMPINGS = 8  # from 1 % of the mean diagonal to far beyond all of it
REFIT_BYTES = 16 << 20  # of the normal equations that are solved at once
RIDGE = 1e-4  # share of the mean diagonal that holds refitted scales where they are
SLICE = 1 << 17  # weights rounded at a time when nothing is compensated: they stay in cache
Rounded = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # levels, scales, zeros
STEP = 16  # columns compensated one by one; the block's rest follows once per step


@dataclass
class Quantized:
    """Result for B matrices of shape (O, I).

    levels: v of the codec, (B, O, I), so that weight = v * scale. scales, zeros: (B, O, G), zeros
    None if not stored. weight: the decoded matrices (B, O, I) float32. error: tr(dW H dW^T) per
    matrix and row, (B, O), with the H given (mean squared output error times tokens if H is a sum).
    """

    codec: BlockCodec
    shared: Shared
    levels: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    weight: torch.Tensor
    error: torch.Tensor

    def store(self, b: int, rows: slice) -> dict[str, torch.Tensor]:
        """Packed tensors of some rows of matrix b, which are one site's."""
        zeros = None if self.zeros is None else self.zeros[b, rows]
        shared = self.shared.of(b, rows)
        return self.codec.store(self.levels[b, rows], self.scales[b, rows], zeros, shared)


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    codec: BlockCodec,
    *,
    damp: float = 0.03,
    refit: bool = True,
) -> Quantized:
    """Quantise B matrices, each against its own H.

    weight: (B, O, I) float32, unchanged. hessian: (B, I, I) float32, symmetric, positive
    semi-definite, unchanged. damp: share of the mean diagonal added to it. refit: fit the scales
    once more at the end, where their stored form can follow.
    """
    width = weight.shape[2]
    g = codec.fmt.group_size(width)
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    order = column_order(diagonal, g)
    w = gather_rows(weight.transpose(1, 2), order)
    permuted = gather_rows(gather_rows(hessian, order).transpose(1, 2), order)
    importance = permuted.diagonal(dim1=1, dim2=2).unsqueeze(-1)
    factor = inverse_factor(permuted, damp)
    shared = codec.prepare(weight.transpose(1, 2), diagonal.unsqueeze(-1))
    levels, grids = _sweep(w, factor, importance, codec, g, shared)
    group_order = order[:, ::g] // g  # the group that came at each place
    back = group_order.argsort(dim=1)[:, None, :].expand(-1, weight.shape[1], -1)
    scales = torch.stack([grid.scale.squeeze(1) for grid in grids], dim=2).gather(2, back)
    zeros = zero_points(grids)
    if zeros is not None:
        zeros = zeros.gather(2, back)
    levels = gather_rows(levels, order.argsort(dim=1)).transpose(1, 2).contiguous()
    decoded = decode_levels(levels, scales, g)
    miss = weight - decoded
    pull = miss @ hessian  # half the gradient, for the refit too
    error = (pull * miss).sum(2)
    result = Quantized(codec, shared, levels, scales, zeros, decoded, error)
    if refit and codec.refits:
        refit_better(result, weight, hessian, pull, g)
    return result


def refit_better(
    result: Quantized, weight: torch.Tensor, hessian: torch.Tensor, pull: torch.Tensor, g: int
) -> None:
    """Replace the scales of the rows (or tiles of rows) whose error falls by that."""
    codec = result.codec
    scales = refit_scales(pull, hessian, result.levels, result.scales, codec, result.shared, g)
    decoded = decode_levels(result.levels, scales, g)
    miss = weight - decoded
    loss = ((miss @ hessian) * miss).sum(2)
    gain = result.error - loss
    if codec.fmt.scale == "dq":  # a tile's scales are stored together
        rows = gain.shape[1]
        tiles = torch.nn.functional.pad(gain, (0, -rows % DQ_ROWS)).unflatten(1, (-1, DQ_ROWS))
        gain = tiles.sum(2).repeat_interleave(DQ_ROWS, dim=1)[:, :rows]
    better = (gain > 0)[:, :, None]
    result.scales = torch.where(better, scales, result.scales)
    result.weight = torch.where(better, decoded, result.weight)
    result.error = torch.where(gain > 0, loss, result.error)


def refit_scales(
    pull: torch.Tensor,
    hessian: torch.Tensor,
    levels: torch.Tensor,
    scales: torch.Tensor,
    codec: BlockCodec,
    shared: Shared,
    g: int,
) -> torch.Tensor:
    """Least-squares scales of each row, all groups together, given the codes; (B, O, G).

    With v_k a row's levels in group k and 0 elsewhere, |w - sum s_k v_k|^2 under H is
    least where sum_l (v_k^T H v_l) s_l = v_k^T H w. Solved as a step from the present scales,
    with a small ridge towards no step, and projected on what is stored.

    pull: (w - w_hat) H, (B, O, I).
    """
    groups = scales.shape[2]
    rows = max(DQ_ROWS, REFIT_BYTES // (4 * groups**2 * len(levels)) // DQ_ROWS * DQ_ROWS)
    if rows < levels.shape[1]:  # the (G, G) systems of all rows would not fit: some rows at a time
        parts = [slice(a, a + rows) for a in range(0, levels.shape[1], rows)]
        done = [
            refit_scales(pull[:, p], hessian, levels[:, p], scales[:, p], codec, shared.rows(p), g)
            for p in parts
        ]
        return torch.cat(done, dim=1)
    padding = groups * g - levels.shape[2]
    split = torch.nn.functional.pad(levels, (0, padding)).unflatten(2, (groups, g))
    right = torch.nn.functional.pad(pull, (0, padding)).unflatten(2, (groups, g))
    right = (split * right).sum(3)
    left = torch.empty(*scales.shape, groups, dtype=pull.dtype, device=pull.device)
    for k in range(groups):
        part = slice(k * g, min((k + 1) * g, levels.shape[2]))
        spread = levels[..., part] @ hessian[:, part]
        spread = torch.nn.functional.pad(spread, (0, padding)).unflatten(2, (groups, g))
        left[..., k, :] = (split * spread).sum(3)
    diagonal = left.diagonal(dim1=2, dim2=3)
    diagonal.add_(RIDGE * diagonal.mean(2, keepdim=True).clamp_min(torch.finfo(left.dtype).tiny))
    step = torch.linalg.solve_ex(left, right.unsqueeze(3))[0].squeeze(3)
    wanted = scales + torch.nan_to_num(step)
    if not codec.fmt.signed_scale:
        wanted = torch.where(wanted > 0, wanted, scales)
    return project(wanted.transpose(1, 2), codec.fmt, codec.half, shared).transpose(1, 2)


def rtn(
    weight: torch.Tensor, codec: BlockCodec, importance: torch.Tensor | None = None
) -> Quantized:
    """Round to nearest, group by group: no compensation.

    weight: (B, O, I) float32. importance: (B, I) weights of the clipping search, or None. The
    error is the sum of squared weight differences per row, importance-weighted if given.
    """
    width = weight.shape[2]
    g = codec.fmt.group_size(width)
    h = None if importance is None else importance.unsqueeze(-1)
    shared = codec.prepare(weight.transpose(1, 2), h)
    parts: list[Rounded] = []
    whole = width // g * g
    if codec.fmt.rows == 1 and codec.fmt.scale != "dq" and shared.free:  # no row needs another
        if whole:
            parts.append(_round_groups(weight[..., :whole], importance, 0, g, codec, shared))
        if whole < width:
            tail = weight[..., whole:]
            parts.append(_round_groups(tail, importance, whole, width - whole, codec, shared))
    else:
        parts = [
            _round_group(
                weight[..., a : a + g], None if h is None else h[:, a : a + g], codec, shared
            )
            for a in range(0, width, g)
        ]
    levels = torch.cat([part[0] for part in parts], dim=2)
    scales = torch.cat([part[1] for part in parts], dim=2)
    zeros = [part[2] for part in parts if part[2] is not None]
    decoded = decode_levels(levels, scales, g)
    miss = (weight - decoded).square_()
    error = miss.sum(2) if importance is None else (miss @ importance[:, :, None]).squeeze(2)
    return Quantized(
        codec, shared, levels, scales, torch.cat(zeros, dim=2) if zeros else None, decoded, error
    )


def _round_group(
    weight: torch.Tensor, h: torch.Tensor | None, codec: BlockCodec, shared: Shared
) -> Rounded:
    """Levels (B, O, g), scales and zeros (B, O, 1) of one group, all rows in sight."""
    w = weight.transpose(1, 2).contiguous()
    grid = codec.fit(w, h, shared)
    zero = None if grid.zero is None else grid.zero.transpose(1, 2)
    return codec.snap(w, grid).transpose(1, 2), grid.scale.transpose(1, 2), zero


def _round_groups(
    weight: torch.Tensor,
    importance: torch.Tensor | None,
    first: int,
    g: int,
    codec: BlockCodec,
    shared: Shared,
) -> Rounded:
    """Levels (B, O, n*g), scales and zeros (B, O, n) of n groups of g columns.

    Groups are fitted a cache-sized slice at a time. first: weight's first column in the matrix.
    """
    batch, rows, width = weight.shape
    n = width // g
    groups = weight.reshape(batch, rows * n, g)
    h = None
    if importance is not None:
        part = importance[:, first : first + width].view(batch, 1, n, g)
        h = part.expand(-1, rows, -1, -1).reshape(batch, rows * n, g)
    levels = torch.empty_like(groups)
    scales = levels.new_empty(batch, rows * n)
    zeros = None if codec.fmt.symmetric else torch.empty_like(scales)
    step = max(1, SLICE // g)
    for b in range(batch):
        own = shared.of(b, slice(None))
        for start in range(0, rows * n, step):
            some = slice(start, start + step)
            w = groups[b, some].T.contiguous()
            grid = codec.fit(w, None if h is None else h[b, some].T, own)
            levels[b, some] = codec.snap(w, grid).T
            scales[b, some] = grid.scale[0]
            if zeros is not None and grid.zero is not None:
                zeros[b, some] = grid.zero[0]
    shape = (batch, rows, n)
    return (
        levels.view(batch, rows, width),
        scales.view(shape),
        None if zeros is None else zeros.view(shape),
    )


def column_order(diagonal: torch.Tensor, g: int) -> torch.Tensor:
    """Order of the columns: groups by total importance, columns by importance within theirs.

    diagonal: (B, I). A short last group keeps the last place, so that every batch entry has its
    groups at the same offsets. Returns indices (B, I). Ties keep their natural order.
    """
    batch, width = diagonal.shape
    whole = width // g * g
    parts = []
    if whole:
        body = diagonal[:, :whole].unflatten(1, (-1, g))
        inside = body.argsort(dim=2, descending=True, stable=True)
        groups = body.sum(2).argsort(dim=1, descending=True, stable=True)
        inside = inside.gather(1, groups[:, :, None].expand(-1, -1, g))
        parts.append((groups[:, :, None] * g + inside).flatten(1))
    if whole < width:
        tail = diagonal[:, whole:].argsort(dim=1, descending=True, stable=True)
        parts.append(tail + whole)
    return torch.cat(parts, dim=1).view(batch, width)


def inverse_factor(hessian: torch.Tensor, damp: float) -> torch.Tensor:
    """U (B, I, I), upper triangular, with U^T U = (H + damp * mean(diag H) * I)^-1.

    A matrix that is still not positive definite gets ten times the damping until it is.

    Raises:
        ArithmeticError: no damping helps, because values are not finite.
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1).clamp_min(torch.finfo(hessian.dtype).tiny)
    level = torch.full_like(mean, damp)
    for _ in range(MAX_DAMPINGS):
        damped = hessian.flip(1, 2)  # last column first: the factor comes out upper triangular
        damped.diagonal(dim1=1, dim2=2).add_((level * mean)[:, None])
        lower, info = torch.linalg.cholesky_ex(damped)
        if not info.any():
            upper = lower.flip(1, 2)
            eye = torch.eye(upper.shape[1], dtype=upper.dtype, device=upper.device)
            return torch.linalg.solve_triangular(upper, eye.expand_as(upper), upper=True)
        level = torch.where(info > 0, level * 10, level)
    raise ArithmeticError("a Hessian is not finite or not symmetric positive semi-definite")


def gather_rows(matrix: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Rows of each matrix (B, I, N) in its own order (B, I)."""
    return torch.stack([m[o] for m, o in zip(matrix, order, strict=True)])


def _sweep(
    w: torch.Tensor,
    factor: torch.Tensor,
    importance: torch.Tensor,
    codec: BlockCodec,
    g: int,
    shared: Shared,
) -> tuple[torch.Tensor, list[Grid]]:
    """The loop above on columns already in order. w (B, I, O) is used up."""
    width = w.shape[1]
    levels = torch.empty_like(w)
    pivots = factor.diagonal(dim1=1, dim2=2).unsqueeze(2).contiguous()
    grids: list[Grid] = []
    if g >= width:  # one scale per row: fitted once, before the sweep
        grids.append(codec.fit(w, importance, shared))
    block = BLOCK if g >= width else BLOCK // g * g
    for start in range(0, width, block):
        stop = min(start + block, width)
        errors = torch.empty_like(w[:, start:stop])
        a = start
        while a < stop:
            z = min(a + STEP, stop, (a // g + 1) * g)  # a step never crosses into the next group
            if g < width and a % g == 0:
                group = slice(a, min(a + g, width))
                grids.append(codec.fit(w[:, group], importance[:, group], shared))
            grid = grids[-1]
            for j in range(a, z):
                column, level = w[:, j : j + 1], levels[:, j : j + 1]
                miss = errors[:, j - start : j - start + 1]
                level.copy_(codec.snap(column, grid))
                torch.addcmul(column, level, grid.scale, value=-1, out=miss)
                miss.div_(pivots[:, j : j + 1])
                if j + 1 < z:
                    w[:, j + 1 : z].addcmul_(factor[:, j, j + 1 : z, None], miss, value=-1)
            if z < stop:
                update = factor[:, a:z, z:stop].transpose(1, 2)
                w[:, z:stop].baddbmm_(update, errors[:, a - start : z - start], alpha=-1)
            a = z
        if stop < width:
            update = factor[:, start:stop, stop:].transpose(1, 2)
            w[:, stop:].baddbmm_(update, errors, alpha=-1)
    return levels, grids


def zero_points(grids: list[Grid]) -> torch.Tensor | None:
    """Zero points of the groups in the order of `grids`, (B, O, G)."""
    zeros = [grid.zero.squeeze(1) for grid in grids if grid.zero is not None]
    return torch.stack(zeros, dim=2) if zeros else None


def decode_levels(levels: torch.Tensor, scales: torch.Tensor, g: int) -> torch.Tensor:
    """levels * scale on (B, O, I), groups along the last axis."""
    scale = scales.repeat_interleave(g, dim=2)[..., : levels.shape[2]]
    return levels * scale
