"""Sensitivity: what every candidate format would cost at every site, before anything is chosen.

For a site with weight error dW, input second moment H_d on dataset d and Fisher f_d (`fisher`):

    error     tr(dW H dW^T) / tr(W H W^T)             relative output error, H over all datasets
    loss_d    1/2 sum_r f_dr (dW H_d dW^T)_rr         predicted KL, nats per token of dataset d

dW is what compress would leave: GPTQ or round-to-nearest with the same solver, on the inputs of
the uncompressed model. An expert's H leans on its layer's inputs where tokens are few, as in
`quantize/block.py`; what the loss is measured with does not.

An expert's f is its sensitivity per token times how often it is used. Gradients are taken on
fewer windows than use is counted on, and an expert seen by three tokens, or by none, is not known
by them. So use is counted over all windows, and every expert is taken to have had PRIOR_TOKENS more
tokens in both [ours], which mind an error as much as the layer's tokens do on average and read what
the solver's H says. With n_f tokens and squared gradients S_r in the gradients' windows, n of N
tokens in all, s their mean over the layer's tokens and rows, and m = PRIOR_TOKENS,

    loss_d = 1/2 rho / (n_f + m) * sum_r (S_r (dW H_d dW^T)_rr + m s (dW H dW^T)_rr),
    rho    = (n + m) / (N + E m / k)

What is much used is as it was measured; what is not does not look free, nor dear by accident, which
matters to whoever searches for the cheapest (`Fisher.experience`).

With diagonal Hessians the same sums are taken over diag(H), and weights are rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from bitnest.calibrate.collector import add_moment, dense_weights, symmetric
from bitnest.calibrate.fisher import Fisher
from bitnest.calibrate.observe import ExpertSums, Input
from bitnest.formats import PackedFormat
from bitnest.kernels.experts import down_input, up_name
from bitnest.quantize.block import LAYER_SAMPLE, SLICE, stackable
from bitnest.quantize.solve import Options, needs_statistics, solve
from bitnest.sites import Site

PRIOR_TOKENS = 1.0

Sink = Callable[[Site, int, torch.Tensor], None]
"""(site, format number, decoded weight (O, I)): called for every candidate that was solved."""


@dataclass(frozen=True)
class Scored:
    """One site. error: (F,). loss: (F, L), None without a Fisher. output: tr(W H W^T), which error
    is relative to. tokens: that its H saw."""

    site: Site
    error: torch.Tensor
    loss: torch.Tensor | None
    output: float
    tokens: int


@dataclass(frozen=True)
class Inputs:
    """What a batch of B matrices with I columns reads.

    solver: (B, I, I) means over all datasets, or (B, I) their diagonals. labels: (L, B, I, I) or
    (L, B, I), means of each dataset. tokens: (B,). factor, prior: see `Fisher.experience`, (L, B).
    """

    solver: torch.Tensor
    labels: torch.Tensor
    tokens: Sequence[int]
    factor: torch.Tensor | None = None
    prior: torch.Tensor | None = None


class Observed(Protocol):
    """What is needed of an `Observer`: its inputs, and how many labels they have."""

    @property
    def inputs(self) -> dict[str, Input]:
        """Leader's name -> Input."""

    @property
    def labels(self) -> int:
        """Length of the label axis."""


class Sensitivity:
    """Scores the sites of one block after another.

    fisher: what was measured, None without importance. parameter: gives a site's model parameter.
    sink: see `Sink`.
    """

    def __init__(
        self,
        formats: Sequence[PackedFormat],
        options: Options,
        fisher: Fisher | None,
        parameter: Callable[[Site], torch.Tensor],
        sink: Sink,
    ) -> None:
        self.formats, self.options, self.sink = list(formats), options, sink
        self.fisher, self.parameter = fisher, parameter

    def linears(self, sites: Sequence[Site], observer: Observed) -> Iterator[Scored]:
        """Score sites that are linear layers; those with one input are solved together."""
        readers = {name: seen for seen in observer.inputs.values() for name in seen.readers}
        batches: dict[str, list[Site]] = {}
        for site in sites:
            seen = readers.get(site.module)
            batches.setdefault(seen.readers[0] if seen else site.name, []).append(site)
        for batch in batches.values():
            seen = readers.get(batch[0].module)
            if seen is None:
                yield from self._never_read(batch, observer.labels)
                continue
            tokens = seen.moments.tokens
            if seen.hessian is None:
                labels = seen.moments.mean_square().float()[:, None]
                pooled = seen.moments.pooled().mean_square().float()[None]
            else:
                labels, pooled = means(seen.hessian[:, None], seen.weight[:, None])
            inputs = Inputs(pooled, labels, [int(tokens.sum())])
            for part in self._alike([batch]):
                yield from self._score(part, inputs)

    def experts(
        self,
        sites: Sequence[Site],
        module: Any,
        sums: ExpertSums,
        rows: torch.Tensor | None,
        numbers: Sequence[int],
    ) -> Iterator[Scored]:
        """Score the experts `numbers` of a layer. rows: an even sample of the layer's inputs."""
        layer = LayerInputs(module, rows, self.options)
        for param in (up_name(module), "down_proj"):
            down = param == "down_proj"
            columns = [[s for s in sites if s.expert == e and s.param == param] for e in numbers]
            inputs = self._expert_inputs(sums, layer, numbers, down)
            if self.fisher is not None:
                known = self.fisher.experience(
                    columns[0][0].path, sums.tokens, sums.tokens.sum(1) / sums.top_k, PRIOR_TOKENS
                )
                if known is not None:
                    factor, prior = (part[:, list(numbers)] for part in known)
                    inputs = replace(inputs, factor=factor, prior=prior)
            for part in self._alike(columns):
                yield from self._score(part, inputs)

    def _alike(self, columns: list[list[Site]]) -> Iterator[list[list[Site]]]:
        """Stacks that every format can solve as one, else single sites."""
        if all(stackable(fmt, columns[0]) for fmt in self.formats):
            yield columns
        else:
            for i in range(len(columns[0])):
                yield [[column[i]] for column in columns]

    def _expert_inputs(
        self, sums: ExpertSums, layer: LayerInputs, numbers: Sequence[int], down: bool
    ) -> Inputs:
        moments = sums.down if down else sums.up
        tokens = sums.tokens[:, list(numbers)]
        counts = [int(n) for n in tokens.sum(0)]
        if not sums.full:
            labels = moments.mean_square()[:, list(numbers)].float()
            pooled = moments.pooled().mean_square()[list(numbers)].float()
            for i, expert in enumerate(numbers):
                layer.lean(pooled[i], counts[i], expert, down)
            return Inputs(pooled, labels, counts)
        width, device = moments.width, layer.weights(0, "down_proj").device
        totals = torch.stack([
            sums.hessians[e][int(down)]
            if e in sums.hessians
            else torch.zeros(len(tokens), width, width, device=device)
            for e in numbers
        ], dim=1)  # fmt: skip
        labels, pooled = means(totals, sums.weight[:, list(numbers)])
        fitted = sums.fitted[:, list(numbers)].sum(0).tolist()  # of windows that Hessians see
        for i, expert in enumerate(numbers):
            layer.lean(pooled[i], fitted[i], expert, down)
        return Inputs(pooled, labels, counts)

    def _score(self, columns: list[list[Site]], inputs: Inputs) -> Iterator[Scored]:
        """Solve the stacked matrices of every column in every format."""
        weight = torch.stack([self._stack(column) for column in columns])
        solver = inputs.solver.to(weight.device)
        energy = row_errors(weight, solver)
        fishers = [self._fisher(column) for column in columns]
        count, labels = len(self.formats), len(inputs.labels)
        errors = torch.zeros(len(columns), weight.shape[1], count, dtype=torch.float64)
        losses = torch.zeros(len(columns), weight.shape[1], count, labels, dtype=torch.float64)
        for i, fmt in enumerate(self.formats):
            solved = self._solve(weight, solver, fmt)
            miss = weight - solved
            errors[:, :, i] = row_errors(miss, solver).double().cpu().clamp_min(0)
            for d in range(labels):
                rows = row_errors(miss, inputs.labels[d].to(miss.device)).double().cpu()
                for b, f in enumerate(fishers):
                    if f is not None:
                        factor = 1.0 if inputs.factor is None else float(inputs.factor[d, b])
                        losses[b, :, i, d] = 0.5 * factor * f[d] * rows[b].clamp_min(0)
                if inputs.prior is not None:
                    losses[:, :, i, d] += 0.5 * inputs.prior[d, :, None].cpu() * errors[:, :, i]
            self._offer(columns, i, solved)
        for b, column in enumerate(columns):
            start = 0
            for site in column:
                own = slice(start, start + site.shape[0])
                start += site.shape[0]
                base = float(energy[b, own].double().sum())
                error = errors[b, own].sum(0) / base if base > 0 else torch.zeros(count)
                loss = None if fishers[b] is None else losses[b, own].sum(0)
                yield Scored(site, error, loss, base, inputs.tokens[b])

    def _solve(
        self, weight: torch.Tensor, hessian: torch.Tensor, fmt: PackedFormat
    ) -> torch.Tensor:
        if hessian.dim() == 3:
            return solve(weight, hessian, fmt, self.options).weight
        full = torch.diag_embed(hessian) if needs_statistics(fmt) else None
        return solve(weight, full, fmt, self.options).weight

    def _offer(self, columns: list[list[Site]], number: int, solved: torch.Tensor) -> None:
        for b, column in enumerate(columns):
            start = 0
            for site in column:
                self.sink(site, number, solved[b, start : start + site.shape[0]])
                start += site.shape[0]

    def _never_read(self, sites: list[Site], labels: int) -> Iterator[Scored]:
        """Sites no sample reached: all channels alike for the solver, and no loss that is known."""
        for site in sites:
            width = site.shape[1]
            inputs = Inputs(torch.eye(width)[None], torch.zeros(labels, 1, width), [0])
            yield from self._score([[site]], inputs)

    def _fisher(self, column: list[Site]) -> torch.Tensor | None:
        if self.fisher is None:
            return None
        parts = [self.fisher.of(site) for site in column]
        known = [part for part in parts if part is not None]
        return torch.cat(known, dim=1) if len(known) == len(parts) else None

    def _stack(self, sites: list[Site]) -> torch.Tensor:
        views = [site.view(self.parameter(site)) for site in sites]
        return (views[0] if len(views) == 1 else torch.cat(views)).float()


class LayerInputs:
    """Inputs of a whole layer, that experts with few tokens lean on.

    rows: (n, hidden), sampled evenly; None: nothing to lean on.
    """

    def __init__(self, module: Any, rows: torch.Tensor | None, options: Options) -> None:
        self.module, self.rows, self.options = module, rows, options
        self.weights = dense_weights(module)
        self._shared: torch.Tensor | None = None

    def lean(self, own: torch.Tensor, count: int, expert: int, down: bool) -> None:
        """own <- (1 - l) own + l H_all, l = max(0, 1 - count / minimum), in place; own may be the
        diagonal (I,) of H (I, I)."""
        minimum = self.options.min_tokens or own.shape[0]
        share = 1.0 - count / minimum
        if share <= 0 or self.rows is None or not len(self.rows):
            return
        layer = self._moment(expert, down, own.device)
        own.mul_(1 - share).add_(layer.diagonal() if own.dim() == 1 else layer, alpha=share)

    def _moment(self, expert: int, down: bool, device: torch.device) -> torch.Tensor:
        if not down and self._shared is not None:
            return self._shared
        assert self.rows is not None
        total: torch.Tensor | None = None
        for start in range(0, len(self.rows), SLICE):
            x = self.rows[start : start + SLICE].to(device)
            if down:
                x = down_input(self.module, self.weights(expert, up_name(self.module)), expert, x)
            x = x.float()
            if total is None:
                total = torch.zeros(x.shape[1], x.shape[1], device=device)
            add_moment(total, x)
        assert total is not None
        mean = symmetric(total) / len(self.rows)
        if not down:
            self._shared = mean
        return mean


def sample_rows(tokens: int, widths: Sequence[int], min_tokens: int | None) -> torch.Tensor:
    """Token numbers that stand for a layer's inputs: evenly spread, ascending."""
    wanted = max(LAYER_SAMPLE, min_tokens or max(widths, default=0))
    return torch.linspace(0, tokens - 1, min(tokens, wanted), dtype=torch.float64).long()


def means(totals: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of sums (L, B, I, I) with weights (L, B): the mean per label, and over all, (B, I, I).

    Where nothing was seen: zeros.
    """
    labels = totals.clone()
    for part in labels.flatten(0, 1):
        symmetric(part)
    weight = weight.to(labels.device)
    pooled = labels.sum(0) / weight.sum(0).clamp_min(1e-30)[:, None, None].float()
    labels /= weight.clamp_min(1e-30)[:, :, None, None].float()
    return labels, pooled


def row_errors(miss: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """(dW H dW^T)_rr of dW (B, O, I) with H (B, I, I) or its diagonal (B, I): (B, O)."""
    if hessian.dim() == 2:
        return (miss.square() * hessian[:, None]).sum(2)
    return ((miss @ hessian) * miss).sum(2)
