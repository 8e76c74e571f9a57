"""What rounding the inputs of every matrix would cost, measured as formats of weights are.

With x what a matrix W reads, e = x - Q(x) rounded in the basis that W is stored in, and f_d the
Fisher of its output rows on dataset d (`fisher`), nats per token of the dataset:

    loss_d = 1/2 sum_r f_dr E_d[(W e)_r^2]

the expectation over the tokens of d that reach the matrix. That is the K-FAC diagonal that weights
are measured by (`sensitivity`), with W E[e e^T] W^T in place of dW H dW^T; e goes through W token
by token, so no moment of e is kept. As there, every expert is taken to have had PRIOR_TOKENS more
tokens that mind an error as much as the layer's do on average; what those lose is the mean over
datasets, for an expert that few tokens reached drawn to the mean of its layer's experts [ours].

e depends on W's format by its basis alone. Rotations need no data; @perm puts channels in
descending order of energy, one order for every tensor that is read, unweighted where `compress`
weighs tokens by their gates. Scales of @awq are not known before weights are solved: that basis is
left out.
Static scales are fitted to the windows that are measured on, in a pass of their own.

A block's windows pass through it once more, through its 16-bit weights: every matrix is measured
with what it reads in the uncompressed model. Windows kept for probes are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from bitnest.calibrate.fisher import Fisher
from bitnest.calibrate.observe import Observer
from bitnest.calibrate.sensitivity import PRIOR_TOKENS
from bitnest.formats import PackedFormat
from bitnest.formats.bases import basis_format, basis_of, known_before
from bitnest.formats.inputs import InputFormat
from bitnest.kernels.basis import from_stored, to_stored
from bitnest.kernels.inputs import Magnitudes, round_inputs
from bitnest.sites import Site

Look = Callable[[Site, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class InputScored:
    """One site. error: E|W e|^2 per token that reaches it, over all datasets, (B, P) for B bases
    and P formats. loss: (B, P, L); None without a Fisher."""

    error: torch.Tensor
    loss: torch.Tensor | None


def bases_of(formats: Sequence[PackedFormat]) -> tuple[str, ...]:
    """Bases of candidate formats that errors of inputs can be measured in, in their order."""
    found = dict.fromkeys(basis_of(fmt) for fmt in formats)
    return tuple(basis for basis in found if known_before(basis))


class InputErrors:
    """Sums over one block's passes.

    orders: by site, channels in descending order of energy. parameter: gives a site's model
    parameter. static: how static scales are chosen.
    """

    def __init__(
        self,
        formats: Sequence[InputFormat],
        bases: Sequence[str],
        labels: int,
        sites: Sequence[Site],
        orders: Mapping[str, torch.Tensor],
        parameter: Callable[[Site], torch.Tensor],
        static: str,
    ) -> None:
        self.formats, self.bases, self.labels = list(formats), list(bases), labels
        self.parameter, self.orders, self.static = parameter, orders, static
        self.label = 0
        self.sums: dict[str, torch.Tensor] = {}
        self.tokens = {site.name: torch.zeros(labels, dtype=torch.float64) for site in sites}
        self._carriers = [basis_format(basis) for basis in bases]
        self._magnitudes: dict[str, list[Magnitudes]] = {}
        self._scales: dict[tuple[str, int, int], float] = {}
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def has_static(self) -> bool:
        """Whether a pass has to `weigh` first."""
        return any(fmt.has_static for fmt in self.formats)

    def weigh(self, site: Site, x: torch.Tensor) -> torch.Tensor:
        """Count magnitudes of what a site reads; x is returned."""
        if site.name in self.orders:
            own = self._magnitudes.setdefault(site.name, [Magnitudes() for _ in self.bases])
            for number, counts in enumerate(own):
                counts.add(self._stored(site, x, number))
        return x

    def settle(self) -> None:
        """Choose static scales."""
        for name, own in self._magnitudes.items():
            for b, counts in enumerate(own):
                for p, fmt in enumerate(self.formats):
                    if fmt.has_static:
                        self._scales[name, b, p] = counts.scale(fmt, self.static, name)
        self._magnitudes.clear()

    def look(self, site: Site, x: torch.Tensor) -> torch.Tensor:
        """Add the squares of W e of what a site reads; x is returned."""
        if site.name not in self.orders or not x.numel():
            return x
        errors = self._errors(site, x)
        weight = site.view(self.parameter(site)).float()
        if site.name not in self.sums:
            shape = (len(self.bases), len(self.formats), self.labels, len(weight))
            self.sums[site.name] = torch.zeros(shape, dtype=torch.float64)
        squares = (errors @ weight.T).square_().sum(2, dtype=torch.float64)
        self.sums[site.name][:, :, self.label] += squares.cpu()
        self.tokens[site.name][self.label] += errors.shape[2]
        return x

    def scored(
        self, sites: Sequence[Site], fisher: Fisher | None, observer: Observer
    ) -> dict[str, InputScored]:
        """Errors and losses of the block's sites; a site that nothing reached has none."""
        pooled = {site.name: self._pooled(site) for site in sites}
        groups: dict[tuple[str, str], list[Site]] = {}
        for site in sites:
            if site.module in observer.fused:
                groups.setdefault((site.module, site.name.rpartition(".")[2]), []).append(site)
        expected = dict(pooled)
        for group in groups.values():
            counts = torch.stack([self.tokens[site.name].sum() for site in group])
            errors = torch.stack([pooled[site.name] for site in group])
            mean = (errors * counts[:, None, None]).sum(0) / counts.sum().clamp_min(1)
            for site, n, error in zip(group, counts, errors, strict=True):
                expected[site.name] = (n * error + PRIOR_TOKENS * mean) / (n + PRIOR_TOKENS)
        return {
            site.name: InputScored(
                pooled[site.name], self._loss(site, fisher, observer, expected[site.name])
            )
            for site in sites
        }

    def _pooled(self, site: Site) -> torch.Tensor:
        if site.name not in self.sums:
            return torch.zeros(len(self.bases), len(self.formats), dtype=torch.float64)
        return self.sums[site.name].sum((2, 3)) / self.tokens[site.name].sum().clamp_min(1)

    def _loss(
        self, site: Site, fisher: Fisher | None, observer: Observer, expected: torch.Tensor
    ) -> torch.Tensor | None:
        rows = None if fisher is None else fisher.of(site)
        if fisher is None or rows is None:
            return None
        loss = torch.zeros(len(self.bases), len(self.formats), self.labels, dtype=torch.float64)
        if site.name in self.sums:
            means = self.sums[site.name] / self.tokens[site.name].clamp_min(1)[:, None]
            loss = 0.5 * (means * rows.cpu()).sum(3)
        sums = observer.fused.get(site.module)
        if sums is None or site.expert is None:
            return loss
        seen = sums.tokens.sum(1) / sums.top_k
        known = fisher.experience(site.path, sums.tokens, seen, PRIOR_TOKENS)
        if known is None:
            return loss
        factor, prior = (part[:, site.expert].cpu() for part in known)
        return loss * factor + 0.5 * expected[:, :, None] * prior

    def _stored(self, site: Site, x: torch.Tensor, basis: int) -> torch.Tensor:
        order = {"order": self.orders[site.name].to(x.device)}
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        return to_stored(rows, self._carriers[basis], order)

    def _errors(self, site: Site, x: torch.Tensor) -> torch.Tensor:
        """e (B, P, T, I) in its own basis; computed once for all that read the same tensor."""
        if self._last is not None and self._last[0] is x:
            return self._last[1]
        order = {"order": self.orders[site.name].to(x.device)}
        parts = []
        for b, carrier in enumerate(self._carriers):
            stored = self._stored(site, x, b)
            for p, fmt in enumerate(self.formats):
                missed = stored - round_inputs(stored, fmt, self._scales.get((site.name, b, p)))
                parts.append(from_stored(missed, carrier, order))
        shape = (len(self.bases), len(self.formats), *parts[0].shape)
        self._last = (x, torch.stack(parts).view(shape))
        return self._last[1]


def energy_orders(sites: Sequence[Site], observer: Observer) -> dict[str, torch.Tensor]:
    """By site, the channels of what it reads in descending order of energy over all that was seen;
    of sites that something read."""
    readers = {name: seen.moments for seen in observer.inputs.values() for name in seen.readers}
    orders: dict[str, torch.Tensor] = {}
    for site in sites:
        sums = observer.fused.get(site.module)
        if sums is not None and site.expert is not None:
            moments = sums.down if site.param == "down_proj" else sums.up
            energy = moments.square[:, site.expert].sum(0)
        elif site.module in readers:
            energy = readers[site.module].square.sum(0)
        else:
            continue
        orders[site.name] = energy.argsort(descending=True, stable=True)
    return orders
