"""The ends in statistics: what embedding and head read, and what each candidate format costs there.

    head        1/2 sum_v f_v (dE H_d dE^T)_vv        f_v = mean over tokens of p_v (1 - p_v)
    embedding   1/2 sum_v q_v sum_c f_c dE_vc^2       f_c = mean over tokens of g_c^2
    tied        the sum of both

in nats per token of dataset d, f as in `end_gradients`, all of them per dataset. H_d is the second
moment of what the head reads, q_v the share of the dataset's tokens that are v; PRIOR of it is
spread evenly over the vocabulary [ours], so that tokens the data does not hold are not free. Both
are one shape: a weight per row, a second moment of channels, which `Use` holds.

Solved as `compress` solves them (`quantize/ends.py`), slice by slice. They are scored before the
blocks where probes need them: what a probe's first block reads hangs on its embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bitnest.calibrate.blocks import put_moments, put_sites, row_figures
from bitnest.calibrate.collector import add_moment, symmetric
from bitnest.calibrate.fisher import Fisher
from bitnest.calibrate.moments import Moments
from bitnest.calibrate.observe import Input
from bitnest.calibrate.sensitivity import Scored, means, row_errors
from bitnest.calibrate.stream import Stream
from bitnest.calibrate.tail import open_head
from bitnest.formats import PackedFormat
from bitnest.quantize.ends import joined, slice_rows, solve_end
from bitnest.quantize.solve import Options, needs_statistics
from bitnest.sites import Site

PRIOR = 0.01  # share of a dataset's tokens that may be any of the vocabulary
Keep = Callable[[Site, int, dict[str, torch.Tensor]], None]
"""(site, format number, stored tensors): called for every candidate that was solved."""


@dataclass(frozen=True)
class Ends:
    """What is known of the ends. sites: one or two. tied: whether one matrix serves both uses.

    head, table: module paths. tokens: of each dataset that are v, (L, V) int64. read: the head's
    input, None if no site reads it.
    """

    sites: Sequence[Site]
    tied: bool
    head: str
    table: str
    tokens: torch.Tensor
    read: Input | None


@dataclass(frozen=True)
class Use:
    """One use of a matrix. rows: (L, V) float64, weight of each row. inputs: (L, I, I) or their
    diagonals (L, I), float32."""

    rows: torch.Tensor
    inputs: torch.Tensor


def reads_head(site: Site, tied: bool) -> bool:
    """Whether the site is multiplied with what the head reads."""
    return site.kind == "head" or tied


def lookups(tokens: torch.Tensor, labels: Sequence[int], count: int, size: int) -> torch.Tensor:
    """Of tokens (samples, length), how often each dataset has each of `size`: (count, size)."""
    found = torch.zeros(count, size, dtype=torch.int64)
    for label, row in zip(labels, tokens, strict=True):
        found[label] += torch.bincount(row, minlength=size)
    return found


def observe_head(
    stream: Stream,
    tokens: torch.Tensor,
    labels: Sequence[int],
    count: int,
    *,
    held: frozenset[int],
    full: bool,
    reader: str,
) -> Input:
    """What the head reads of `tokens` (samples, length), which must have passed all blocks.

    held: samples that Hessians do not see. reader: module path of the site that it belongs to.
    """
    found: Input | None = None
    with torch.no_grad(), open_head(stream) as read:
        for i in range(len(tokens)):
            x = read(tokens[i : i + 1], stream.hidden[i : i + 1].to(stream.device)).float()
            if found is None:
                width = x.shape[1]
                square = torch.zeros(count, width, width, device=x.device) if full else None
                weight = torch.zeros(count, dtype=torch.float64)
                found = Input([reader], Moments.zeros((count,), width), square, weight)
            found.moments.add((labels[i],), x)
            if found.hessian is not None and i not in held:
                add_moment(found.hessian[labels[i]], x)
                found.weight[labels[i]] += len(x)
            stream.forget()
    assert found is not None
    return found


def score_ends(
    ends: Ends,
    matrix: Callable[[Site], torch.Tensor],
    formats: Sequence[PackedFormat],
    options: Options,
    fisher: Fisher | None,
    work: int,
    device: torch.device,
    keep: Keep = lambda _site, _number, _tensors: None,
) -> Iterator[Scored]:
    """Error and loss of every site in every format. matrix: gives a site's weight (V, I), of any
    float type. work: bytes of copies at a time."""
    for site in ends.sites:
        solver, tokens = _solver(ends, site)
        weight = matrix(site)
        uses = _uses(ends, site, fisher)
        scorer = _Scorer(weight, None if solver is None else solver.to(device), uses, options)
        found = []
        for number, fmt in enumerate(formats):
            found.append(scorer.score(fmt, slice_rows(fmt, site.shape, work)))
            keep(site, number, scorer.stored)
        error = torch.tensor([f[0] for f in found], dtype=torch.float64)
        loss = torch.stack([f[1] for f in found]) if uses else None
        yield Scored(site, error, loss, scorer.energy, tokens)


class _Scorer:
    """Solves one matrix in one format after another. stored: tensors of the last."""

    def __init__(
        self,
        weight: torch.Tensor,
        solver: torch.Tensor | None,
        uses: Sequence[Use],
        options: Options,
    ) -> None:
        self.weight, self.solver, self.uses, self.options = weight, solver, uses, options
        self.energy = 0.0
        self.stored: dict[str, torch.Tensor] = {}

    def score(self, fmt: PackedFormat, rows: int) -> tuple[float, torch.Tensor]:
        """Relative error, and loss per dataset (L,) float64."""
        solver = self.solver
        if solver is not None and solver.dim() == 1:  # diagonals: rounded to nearest
            hessian = torch.diag(solver) if needs_statistics(fmt) else None
        else:
            hessian = solver
        norm = torch.ones(1, self.weight.shape[1]) if solver is None else solver[None]
        labels = len(self.uses[0].rows) if self.uses else 0
        loss, error, energy = torch.zeros(labels, dtype=torch.float64), 0.0, 0.0
        slices = []
        for part in solve_end(self.weight, hessian, fmt, self.options, rows):
            miss = part.weight[None] - part.solution.weight
            error += float(row_errors(miss, norm).double().clamp_min(0).sum())
            energy += float(row_errors(part.weight[None], norm).double().sum())
            for use in self.uses:
                for d in range(labels):
                    own = row_errors(miss, use.inputs[d : d + 1].to(miss.device))[0].double().cpu()
                    loss[d] += 0.5 * (use.rows[d, part.rows] * own.clamp_min(0)).sum()
            slices.append(part.solution.store(0, slice(0, len(part.weight))))
        self.energy, self.stored = energy, joined(slices)
        return error / energy if energy > 0 else 0.0, loss


def _solver(ends: Ends, site: Site) -> tuple[torch.Tensor | None, int]:
    """H that the site is solved against, (I, I), its diagonal (I,) or None, and its tokens."""
    if ends.read is None or not reads_head(site, ends.tied):
        return None, 0
    return _moments(ends.read)[1], int(ends.read.moments.tokens.sum())


def _moments(read: Input) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each dataset (L, I, I) and over all (I, I), or their diagonals."""
    if read.hessian is None:
        return read.moments.mean_square().float(), read.moments.pooled().mean_square().float()
    labels, pooled = means(read.hessian[:, None], read.weight[:, None])
    return labels[:, 0], pooled[0]


def _uses(ends: Ends, site: Site, fisher: Fisher | None) -> list[Use]:
    """What the matrix is used for, with what errors cost there; empty without a Fisher."""
    found: list[Use] = []
    if fisher is None:
        return found
    if reads_head(site, ends.tied):
        assert ends.read is not None
        found.append(Use(fisher.rows[ends.head], _moments(ends.read)[0]))
    if site.kind == "embedding":
        found.append(Use(token_shares(ends.tokens), fisher.rows[ends.table].float()))
    return found


def token_shares(counts: torch.Tensor) -> torch.Tensor:
    """q of counts (L, V): shares of each dataset's tokens, PRIOR of them spread evenly."""
    total = counts.sum(1, keepdim=True).clamp_min(1).double()
    return (1 - PRIOR) * counts.double() / total + PRIOR / counts.shape[1]


def end_record(
    ends: Ends,
    layer: int,
    matrix: Callable[[Site], torch.Tensor],
    scored: Sequence[Scored],
    fisher: Fisher | None,
    *,
    keep_hessians: bool,
    formats: int,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The ends' record for the header, and their tensors: as a block's, without experts."""
    tensors: dict[str, torch.Tensor] = {"lookups": ends.tokens}
    inputs = []
    if ends.read is not None:
        put_moments(tensors, "inputs.0", ends.read.moments)
        inputs = [
            {"name": ends.head, "readers": ends.read.readers, "width": ends.read.moments.width}
        ]
        if keep_hessians and ends.read.hessian is not None:
            whole = [symmetric(part.clone()) for part in ends.read.hessian]
            tensors["inputs.0.hessian"] = torch.stack(whole).cpu()
            tensors["inputs.0.weight"] = ends.read.weight
    if fisher is not None:
        own = {ends.head, ends.table} & fisher.rows.keys()
        tensors.update({f"fisher.{name}": fisher.rows[name] for name in sorted(own)})
    figures = {site.name: row_figures(matrix(site)) for site in ends.sites}
    by_name = {item.site.name: item for item in scored}
    put_sites(tensors, ends.sites, by_name, figures, formats)
    record = {
        "layer": layer,
        "inputs": inputs,
        "experts": [],
        "sites": [asdict(site) for site in ends.sites],
    }
    return record, tensors
