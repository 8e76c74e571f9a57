"""Quantising one decoder block from what the collector saw: linears, then experts.

Matrices that share an input and a format are solved as one: their rows are stacked. Experts of one
layer are solved in chunks, batched, gate and up first; the down projection is then fitted to the
outputs of the *quantised* gate and up.

Starved experts. With n routed tokens and a minimum m, an expert's H is

    H_e' = (1 - l) H_e + l H_all,   l = max(0, 1 - n / m)

where H_all is measured by sending an even sample of the layer's tokens through that expert, whether
or not they were routed to it. So an expert that saw nothing is fitted to the layer's inputs, and
its down projection to its own response to them (channels of different experts have nothing in
common, so averaging other experts' down inputs would be meaningless).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bitnest.calibrate.collector import (
    Collector,
    Routed,
    add_moment,
    dense_weights,
    expert_tokens,
    symmetric,
)
from bitnest.formats import (
    AnyFormat,
    BlockFormat,
    CodedFormat,
    DenseFormat,
    PackedFormat,
    SparseFormat,
    ZeroFormat,
    core_format,
)
from bitnest.kernels.experts import down_input, up_name
from bitnest.quantize.advice import Witness
from bitnest.quantize.solve import (
    Options,
    Solution,
    narrower_errors,
    needs_statistics,
    solve,
    weighted_error,
)
from bitnest.sites import Site

SLICE = 2048  # tokens sent through one expert at a time
LAYER_SAMPLE = 256  # tokens that stand for a layer's inputs, at least
TINY = 1e-30


@dataclass
class Solved:
    """One site's stored tensors and its loss.

    tensors: as the format lays them out. error: relative output error tr(dW H dW^T)/tr(W H W^T);
    for rtn |dW|^2/|W|^2. tokens: calibration tokens its H saw, None without calibration.
    narrower: of a nested format, the error at every narrower width.
    """

    site: Site
    fmt: AnyFormat
    tensors: dict[str, torch.Tensor]
    error: float
    tokens: int | None
    narrower: tuple[float, ...] = ()


class BlockSolver:
    """Solves the sites of one block and writes the decoded weights back into the model.

    parameter: gives the model parameter of a site, which must hold its weights. witness: is shown
    every matrix that was solved.
    """

    def __init__(
        self,
        formats: dict[str, AnyFormat],
        options: Options,
        parameter: Callable[[Site], torch.Tensor],
        witness: Witness | None = None,
    ) -> None:
        self.witness = witness
        self.formats = formats
        self.options = options
        self.parameter = parameter

    def weights_only(self, sites: list[Site]) -> Iterator[Solved]:
        """Round every site to nearest; no statistics needed."""
        families: dict[tuple[str, ...], list[Site]] = {}
        for site in sites:
            fmt = self.formats[site.name]
            if isinstance(fmt, DenseFormat):
                yield self._dense(site, fmt, None)
            elif isinstance(fmt, ZeroFormat) or not has_global(fmt):
                yield from self._finish([site], None, None, fmt)
            else:  # matrices that engines fuse must have one global scale: their parent's
                parent = site.module.rpartition(".")[0] if site.expert is None else site.path
                key = (parent, str(site.expert), str(site.shape[1]), fmt.name)
                families.setdefault(key, []).append(site)
        for family in families.values():
            fmt = self.formats[family[0].name]
            assert not isinstance(fmt, DenseFormat)
            yield from self._finish(family, None, None, fmt)

    def linears(self, sites: list[Site], collector: Collector) -> Iterator[Solved]:
        """Solve sites that are linear layers, those with one input and format together."""
        batches: dict[tuple[int, str, str], list[Site]] = {}
        for site in sites:
            fmt, seen = self.formats[site.name], collector.hessians.get(site.module)
            if isinstance(fmt, DenseFormat):
                yield self._dense(site, fmt, seen.tokens if seen else 0)
            elif seen is None:  # never called on any sample: nothing to fit to
                yield from self._finish([site], None, 0, fmt)
            else:
                alone = "" if stackable(fmt, [site]) else site.name
                batches.setdefault((id(seen), fmt.name, alone), []).append(site)
        for same in batches.values():
            seen = collector.hessians[same[0].module]
            fmt = self.formats[same[0].name]
            assert not isinstance(fmt, DenseFormat)
            yield from self._finish(same, seen.mean(), seen.tokens, fmt)

    def experts(
        self, sites: list[Site], module: Any, routed: Routed, chunk: int, device: torch.device
    ) -> Iterator[Solved]:
        """Solve one layer's fused experts, `chunk` experts at a time."""
        states, index, gates = routed.join()
        inputs = ExpertInputs(states, index, gates, module, self.options, device)
        by_expert: dict[int, list[Site]] = {}
        for site in sites:
            assert site.expert is not None
            by_expert.setdefault(site.expert, []).append(site)
        numbers = sorted(by_expert)
        for start in range(0, len(numbers), chunk):
            part = numbers[start : start + chunk]
            solved: dict[int, list[Solved]] = {expert: [] for expert in part}
            for param in (up_name(module), "down_proj"):
                hessians = torch.stack([inputs.hessian(expert, param) for expert in part])
                columns = [[s for s in by_expert[e] if s.param == param] for e in part]
                for item in self._expert_batch(columns, hessians, inputs):
                    assert item.site.expert is not None
                    solved[item.site.expert].append(item)
            for expert in part:
                yield from solved[expert]

    def _expert_batch(
        self, columns: list[list[Site]], hessians: torch.Tensor, inputs: ExpertInputs
    ) -> Iterator[Solved]:
        """Solve one projection of several experts; experts of equal formats go in one batch."""
        batches: dict[tuple[str, ...], list[int]] = {}
        for i, sites in enumerate(columns):
            names = tuple(self.formats[site.name].name for site in sites)
            batches.setdefault(names, []).append(i)
        for names, members in batches.items():
            for name in dict.fromkeys(names):
                chosen = [
                    [s for s, n in zip(columns[i], names, strict=True) if n == name]
                    for i in members
                ]
                fmt = self.formats[chosen[0][0].name]
                if isinstance(fmt, DenseFormat):
                    for sites in chosen:
                        for site in sites:
                            assert site.expert is not None
                            yield self._dense(site, fmt, inputs.count(site.expert))
                    continue
                h = hessians if len(members) == len(columns) else hessians[members]
                counts = [len(sites) for sites in chosen]
                if not stackable(fmt, chosen[0]) and max(counts) > 1:
                    parts = [[[sites[j]] for sites in chosen] for j in range(counts[0])]
                else:
                    parts = [chosen]
                for part in parts:
                    yield from self._expert_stacks(part, h, fmt, inputs)

    def _expert_stacks(
        self,
        chosen: list[list[Site]],
        hessians: torch.Tensor,
        fmt: PackedFormat,
        inputs: ExpertInputs,
    ) -> Iterator[Solved]:
        """Solve the stacked matrices of several experts, each against its own H."""
        weight = torch.stack([self._stack(sites) for sites in chosen])
        result = solve(weight, hessians, fmt, self.options)
        energy = weighted_error(weight, hessians)
        for b, sites in enumerate(chosen):
            expert = sites[0].expert
            assert expert is not None
            self._show(sites, weight[b], hessians[b], fmt, result.error[b], energy[b])
            yield from self._split(sites, result, energy, b, fmt, inputs.count(expert))

    def _finish(
        self,
        sites: list[Site],
        hessian: torch.Tensor | None,
        tokens: int | None,
        fmt: PackedFormat,
    ) -> Iterator[Solved]:
        weight = self._stack(sites)[None]
        h = None if hessian is None else hessian[None]
        if h is None and needs_statistics(fmt):  # no input ever seen: all channels alike
            h = torch.eye(weight.shape[2], device=weight.device)[None]
        result = solve(weight, h, fmt, self.options)
        energy = weighted_error(weight, h)
        self._show(sites, weight[0], None if h is None else h[0], fmt, result.error[0], energy[0])
        yield from self._split(sites, result, energy, 0, fmt, tokens)

    def _show(
        self,
        sites: list[Site],
        weight: torch.Tensor,
        hessian: torch.Tensor | None,
        fmt: PackedFormat,
        error: torch.Tensor,
        energy: torch.Tensor,
    ) -> None:
        """Show the witness each site of a stack (O, I)."""
        start = 0
        for site in sites if self.witness is not None else ():
            rows = slice(start, start + site.shape[0])
            start += site.shape[0]
            assert self.witness is not None
            self.witness.see(site, fmt, weight[rows], hessian, error[rows], energy[rows])

    def _stack(self, sites: list[Site]) -> torch.Tensor:
        """Rows of all sites, (sum of O, I) float32."""
        views = [site.view(self.parameter(site)) for site in sites]
        return (views[0] if len(views) == 1 else torch.cat(views)).float()

    def _split(
        self,
        sites: list[Site],
        result: Solution,
        energy: torch.Tensor,
        b: int,
        fmt: PackedFormat,
        tokens: int | None,
    ) -> Iterator[Solved]:
        """Cut stacked rows back into sites; write each decoded weight into the model."""
        start = 0
        for site in sites:
            rows = slice(start, start + site.shape[0])
            start += site.shape[0]
            site.view(self.parameter(site)).copy_(result.weight[b, rows])
            tensors = result.store(b, rows)
            base = float(energy[b, rows].double().sum())
            *narrower, error = (
                float(part[b, rows].double().sum()) / base if base > 0 else 0.0
                for part in (*narrower_errors(result), result.error)
            )
            yield Solved(site, fmt, tensors, error, tokens, tuple(narrower))

    def _dense(self, site: Site, fmt: AnyFormat, tokens: int | None) -> Solved:
        return Solved(site, fmt, {}, 0.0, tokens)


def has_global(fmt: CodedFormat) -> bool:
    """Whether one scale covers the whole matrix, beside those of its blocks."""
    core = core_format(fmt)
    base = core.base if isinstance(core, SparseFormat) else core  # blocks go matrix by matrix
    return isinstance(base, BlockFormat) and base.scale == "e4m3"


def stackable(fmt: PackedFormat, sites: list[Site]) -> bool:
    """Whether matrices of one input can be solved as one: no stored number covers rows of two."""
    tile = fmt.row_tile
    return tile is not None and all(site.shape[0] % tile == 0 for site in sites)


class ExpertInputs:
    """Hessians of one layer's experts, formed on demand from their routed tokens."""

    def __init__(
        self,
        states: torch.Tensor,
        index: torch.Tensor,
        gates: torch.Tensor,
        module: Any,
        options: Options,
        device: torch.device,
    ) -> None:
        self.states, self.index, self.gates = states, index, gates
        self.module, self.options, self.device = module, options, device
        self.weights = dense_weights(module)
        self._counts = torch.bincount(index.flatten(), minlength=module.num_experts).tolist()
        self._sample: torch.Tensor | None = None

    def count(self, expert: int) -> int:
        """Tokens routed to the expert."""
        return int(self._counts[expert])

    def hessian(self, expert: int, param: str) -> torch.Tensor:
        """H of one projection of one expert, (I, I); down's input uses the current gate and up."""
        down = param == "down_proj"
        rows, w = expert_tokens(self.index, self.gates, expert, self.options.weighting)
        own = self._second_moment(expert, rows, w, down)
        minimum = self.options.min_tokens or own.shape[0]
        lean = 1.0 - self.count(expert) / minimum
        if lean <= 0:
            return own
        return own.mul_(1 - lean).add_(self._layer_moment(expert, minimum, down), alpha=lean)

    def _layer_moment(self, expert: int, minimum: int, down: bool) -> torch.Tensor:
        """H_all: over an even sample of the layer's tokens, routed to this expert or not."""
        count = min(len(self.states), max(minimum, LAYER_SAMPLE))
        rows = torch.linspace(0, len(self.states) - 1, count, dtype=torch.float64).long()
        if down:
            return self._second_moment(expert, rows, torch.ones(count), down)
        if self._sample is None:
            self._sample = self._second_moment(expert, rows, torch.ones(count), down)
        return self._sample

    def _second_moment(
        self, expert: int, rows: torch.Tensor, w: torch.Tensor, down: bool
    ) -> torch.Tensor:
        """sum_t w_t x_t x_t^T / sum_t w_t over the tokens `rows`, a slice at a time, (I, I)."""
        total: torch.Tensor | None = None
        weights = (w / w.sum().clamp_min(TINY)).to(self.device)
        for start in range(0, max(len(rows), 1), SLICE):
            part = slice(start, start + SLICE)
            x = self.states[rows[part]].to(self.device)
            if down:
                up = self.weights(expert, up_name(self.module))
                x = down_input(self.module, up, expert, x)
            x = x.float()
            if total is None:
                total = torch.zeros(x.shape[1], x.shape[1], device=self.device)
            add_moment(total, x, weights[part])
        assert total is not None
        return symmetric(total)
