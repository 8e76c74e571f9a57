"""nest: codes, tables and scales of one matrix that serve all widths [ours].

With W_k the matrix as width k decodes it and shares l_k, the loss is

    sum_k l_k tr((W - W_k) H (W - W_k)^T)

1. Sweep. GPTQ once, over all widths together: each width has its own copy of the weights not yet
   rounded, moved by its own errors (MatGPTQ moves one copy by their mean). At every input channel
   the code is chosen, of all there are, that costs least over the widths.
2. Passes. Channel by channel each code is chosen again with all others fixed: width k wants

    x_k = w_k + (R_k H)_j / H_jj,   R_k = W - W_k

   which is exact for the loss above and what makes up for early choices.
3. Before each pass the tables are fitted to the codes, least squares under H; at the end the scales
   are, all groups of a row together, all widths together.

Shares. A width's error falls by four with every bit. l_k = 4^(BALANCE k): 1 would let all widths
count by their relative errors and binds the narrow ones to the wide ones' codes, 0 leaves nothing
to the wide ones. The default was chosen by measurement (docs/log.md, "Matryoshka").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bitnest.formats.nested import TABLE_BITS, NestedFormat
from bitnest.kernels.nested import choose, halve, split_planes
from bitnest.quantize.gptq import column_order, gather_rows, inverse_factor
from bitnest.quantize.nested.gauss import gauss_table

BALANCE = 0.75
PASSES = 2
BLOCK = 128  # channels whose updates wait for one matrix product
RATIOS = tuple(0.7 + 0.1 * i for i in range(9))  # of a group's RMS, tried for its scale
FITTED = 3  # widths, the narrowest, that a scale is tried on
SAMPLE = 64  # rows that stand for all where a table's normal equations are formed
RIDGE = 1e-3


@dataclass
class Tree:
    """One solved matrix. codes: (O, I) uint8 of the widest width. scales: (O, G). tables: by width,
    float32. weight: (O, I) at the widest width. errors: by width, per row (O,)."""

    fmt: NestedFormat
    codes: torch.Tensor
    scales: torch.Tensor
    tables: dict[int, torch.Tensor]
    weight: torch.Tensor
    errors: dict[int, torch.Tensor]

    def store(self, half: torch.dtype) -> dict[str, torch.Tensor]:
        """Its tensors as the format lays them out."""
        planes = split_planes(self.codes, self.fmt)
        tables = {
            f"table{w}": table.to(half) for w, table in self.tables.items()
            if w == self.fmt.widths[0] or w <= TABLE_BITS
        }  # fmt: skip
        return {**planes, "scales": self.scales.to(half).contiguous(), **tables}


def shares(widths: tuple[int, ...], weights: Mapping[int, float] | None) -> torch.Tensor:
    """l_k, the widest's 1. weights: factors by width, 1 if not named."""
    top = widths[-1]
    return torch.tensor([
        4.0 ** (BALANCE * (w - top)) * (weights or {}).get(w, 1.0) for w in widths
    ])  # fmt: skip


def solve_tree(
    weight: torch.Tensor,
    hessian: torch.Tensor | None,
    fmt: NestedFormat,
    *,
    half: torch.dtype = torch.bfloat16,
    damp: float = 0.03,
    passes: int = PASSES,
    weights: Mapping[int, float] | None = None,
) -> Tree:
    """Codes, tables and scales of weight (O, I) float32 under hessian (I, I), or none."""
    return _Run(weight, hessian, fmt, half, damp, shares(fmt.widths, weights)).run(passes)


class _Run:
    """State, input channel before row: w (I, O), levels (K, I, O), codes (I, O)."""

    def __init__(
        self,
        weight: torch.Tensor,
        hessian: torch.Tensor | None,
        fmt: NestedFormat,
        half: torch.dtype,
        damp: float,
        share: torch.Tensor,
    ) -> None:
        self.fmt, self.half, self.share = fmt, half, share
        self.w = weight.T.contiguous()
        self.known = hessian is not None
        columns = weight.shape[1]
        self.g = fmt.group_size(columns)
        h = torch.eye(columns, device=weight.device) if hessian is None else hessian.clone()
        mean = h.diagonal().mean().clamp_min(torch.finfo(h.dtype).tiny)
        self.hessian = h
        self.damp = damp
        self.damped = h + damp * mean * torch.eye(columns, device=h.device)
        self.codes = torch.zeros(self.w.shape, dtype=torch.uint8, device=weight.device)
        self.scales = self.w.new_zeros(fmt.groups(columns), self.w.shape[1])
        self.tables = self._start()

    def run(self, passes: int) -> Tree:
        """All steps."""
        self._sweep()
        for _ in range(passes if self.known else 0):
            self._fit_tables()
            self._pass()
        self._fit_tables()
        self._fit_scales()
        decoded = [self._decoded(k) for k in range(len(self.fmt.widths))]
        misses = [self.w - own for own in decoded]
        errors = [((self.hessian @ miss) * miss).sum(0) for miss in misses]
        return Tree(
            self.fmt,
            self.codes.T.contiguous(),
            self.scales.T.contiguous(),
            dict(zip(self.fmt.widths, self.tables, strict=True)),
            decoded[-1].T.contiguous(),
            dict(zip(self.fmt.widths, errors, strict=True)),
        )

    # tables

    def _start(self) -> list[torch.Tensor]:
        tables: list[torch.Tensor] = []
        for width in self.fmt.widths:
            if not tables or width <= TABLE_BITS:
                tables.append(gauss_table(width).to(self.half).float().to(self.w.device))
            else:
                tables.append(self._halved(tables[-1], width))
        return tables

    def _halved(self, table: torch.Tensor, width: int) -> torch.Tensor:
        while len(table) < 1 << width:
            table = halve(table)
        return table

    def _values(self, k: int) -> torch.Tensor:
        """What codes stand for at width k, before scales, (I, O)."""
        down = self.fmt.widths[-1] - self.fmt.widths[k]
        return self.tables[k][(self.codes >> down).long()]

    def _spread(self, scales: torch.Tensor) -> torch.Tensor:
        return scales.repeat_interleave(self.g, dim=0)[: len(self.w)]

    def _decoded(self, k: int) -> torch.Tensor:
        return self._values(k).mul_(self._spread(self.scales))

    def _loss(self, k: int) -> float:
        miss = self.w - self._decoded(k)
        return float(((self.damped @ miss) * miss).sum())

    def _fit_tables(self) -> None:
        """Least squares for the stored tables; one is kept where it helps and ascends."""
        scales = self._spread(self.scales)
        for k, width in enumerate(self.fmt.widths):
            if k and width > TABLE_BITS:
                self.tables[k] = self._halved(self.tables[k - 1], width)
                continue
            old, before = self.tables[k], self._loss(k)
            pull = self.damped @ (self.w - self._decoded(k))
            codes = (self.codes >> (self.fmt.widths[-1] - width)).long()
            right = torch.zeros(1 << width, device=old.device)
            right.index_add_(0, codes.flatten(), (scales * pull).flatten())
            left = self._normal(codes, scales, 1 << width)
            left.diagonal().add_(RIDGE * left.diagonal().mean())
            step = torch.linalg.solve_ex(left, right)[0].nan_to_num()
            table = (old + step).to(self.half).float()
            if bool((table[1:] <= table[:-1]).any()):
                continue
            self.tables[k] = table
            if not self._loss(k) < before:
                self.tables[k] = old

    def _normal(self, codes: torch.Tensor, scales: torch.Tensor, size: int) -> torch.Tensor:
        """sum over rows of S^T H S, S (I, size) a row's scales at its codes, from a sample."""
        rows = codes.shape[1]
        chosen = range(0, rows, max(1, rows // SAMPLE))
        left = torch.zeros(size, size, device=codes.device)
        for o in chosen:
            s = torch.zeros(len(codes), size, device=codes.device)
            s.scatter_(1, codes[:, o : o + 1], scales[:, o : o + 1])
            left += s.T @ (self.damped @ s)
        return left * (rows / len(chosen))

    # scales

    def _fit_scale(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """A group's scale (O,): of some ratios of its RMS the one of least error. x: (K, g, O)."""
        rms = x[-1].square().mean(0).sqrt().clamp_min(1e-20)
        best, least = rms, torch.full_like(rms, torch.inf)
        weights = h[:, None] / h.mean().clamp_min(1e-30)
        for ratio in RATIOS:
            scale = (rms * ratio).to(self.half).float()
            error = torch.zeros_like(rms)
            for k in range(min(FITTED, len(x))):
                table = self.tables[k]
                borders = (table[1:] + table[:-1]) / 2
                y = x[k] / scale
                near = table[torch.bucketize(y, borders)]
                error += self.share[k] * ((y - near).mul_(scale).square_() * weights).sum(0)
            better = error < least
            best, least = torch.where(better, scale, best), torch.where(better, error, least)
        return best.to(self.half).float().clamp_min(torch.finfo(self.half).tiny)

    def _fit_scales(self) -> None:
        """Least squares for the scales of every row, all groups and widths together."""
        groups = len(self.scales)
        rows = self.w.shape[1]
        left = self.w.new_zeros(rows, groups, groups)
        right = self.w.new_zeros(rows, groups)
        before = self._row_losses()
        for k, part in enumerate(self.share.tolist()):
            values = self._values(k)
            pull = self.damped @ (self.w - self._decoded(k))
            for a in range(groups):
                own = slice(a * self.g, (a + 1) * self.g)
                right[:, a] += part * (values[own] * pull[own]).sum(0)
                spread = self.damped[:, own] @ values[own]
                product = values.mul(spread)
                for b in range(groups):
                    other = slice(b * self.g, (b + 1) * self.g)
                    left[:, b, a] += part * product[other].sum(0)
        ridge = RIDGE * left.diagonal(dim1=1, dim2=2).mean(1)
        left.diagonal(dim1=1, dim2=2).add_(ridge[:, None].clamp_min(1e-30))
        step = torch.linalg.solve_ex(left, right[:, :, None])[0][:, :, 0].nan_to_num()
        old = self.scales
        wanted = (old + step.T).to(self.half).float()
        self.scales = torch.where(wanted > 0, wanted, old)
        self.scales = torch.where(self._row_losses() < before, self.scales, old)

    def _row_losses(self) -> torch.Tensor:
        """The loss above by row, (O,)."""
        total = torch.zeros(self.w.shape[1], device=self.w.device)
        for k, part in enumerate(self.share.tolist()):
            miss = self.w - self._decoded(k)
            total += part * ((self.damped @ miss) * miss).sum(0)
        return total

    # codes

    def _sweep(self) -> None:
        order = column_order(self.hessian.diagonal()[None], self.g)
        w = gather_rows(self.w[None], order)[0]
        permuted = gather_rows(gather_rows(self.hessian[None], order).transpose(1, 2), order)
        factor = inverse_factor(permuted, self.damp)[0]
        importance = permuted[0].diagonal()
        x = w.repeat(len(self.fmt.widths), 1, 1)
        columns = len(w)
        codes = torch.zeros_like(self.codes)
        for start in range(0, columns, self.g):
            stop = min(start + self.g, columns)
            scale = self._fit_scale(x[:, start:stop], importance[start:stop])
            self.scales[int(order[0, start]) // self.g] = scale
            errors = torch.empty_like(x[:, start:stop])
            for j in range(start, stop):
                own = x[:, j]
                code, level = self._choose(own / scale)
                codes[j] = code
                miss = torch.div(own - level * scale, factor[j, j], out=errors[:, j - start])
                if j + 1 < stop:
                    x[:, j + 1 : stop].sub_(factor[j, j + 1 : stop, None] * miss[:, None])
            if stop < columns:
                x[:, stop:].sub_(factor[start:stop, stop:].T @ errors)
        self.codes[order[0]] = codes

    def _pass(self) -> None:
        scales = self._spread(self.scales)
        decoded = torch.stack([self._decoded(k) for k in range(len(self.fmt.widths))])
        left = self.w - decoded
        diagonal = self.damped.diagonal()
        for start in range(0, len(self.w), BLOCK):
            stop = min(start + BLOCK, len(self.w))
            pull = self.damped[start:stop] @ left
            near = self.damped[start:stop, start:stop]
            for j in range(start, stop):
                own = decoded[:, j]
                target = own + pull[:, j - start] / diagonal[j]
                self.codes[j], level = self._choose(target / scales[j])
                change = level * scales[j] - own
                left[:, j] -= change
                decoded[:, j] += change
                if j + 1 < stop:
                    i = j - start
                    pull[:, i + 1 :].sub_(near[i, i + 1 :, None] * change[:, None])

    def _choose(self, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (O,) of targets (K, O), and what they stand for at each width."""
        codes = choose(targets, self.tables, self.share)
        top, number = self.fmt.widths[-1], codes.long()
        levels = [
            table[number >> (top - w)]
            for w, table in zip(self.fmt.widths, self.tables, strict=True)
        ]
        return codes, torch.stack(levels)
