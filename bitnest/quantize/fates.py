"""Fates carried out: a job with experts and blocks that are gone becomes one of the smaller model.

Rules and plans speak of the source's sites. Where some of them have fates for formats
(`formats/fates`), `reduce_job` makes the `Reduction` that they ask for, reads the checkpoint
through it and gives every site that is left the format of the one it was. Constants and weights of
mergers are means over the tokens of statistics (`Means`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from bitnest.errors import RecipeError, TargetError
from bitnest.expert_axes import ExpertAxes, expert_axes
from bitnest.formats import AnyFormat, FateFormat
from bitnest.formats.fates import parse_fate
from bitnest.kinds import ENDS
from bitnest.reduced import ReducedCheckpoint
from bitnest.reduced_config import TOP_K, first_of
from bitnest.reduction import LayerExperts, Own, Reduction
from bitnest.resized import CONSTANTS, Row
from bitnest.sites import Site, find_sites
from bitnest.skeleton import Skeleton
from bitnest.statistics import Statistics

if TYPE_CHECKING:
    from bitnest.quantize.compress import Job

WHOLE = "a fate is of all matrices of an expert, or drop of all of a block"


@dataclass(frozen=True)
class Means:
    """Of one layer's experts, over the tokens that choose them. tokens: (E,). output: (E, hidden),
    before gates; zeros for an expert that none chooses."""

    tokens: torch.Tensor
    output: torch.Tensor


def read_means(statistics: Statistics) -> dict[int, Means]:
    """By block."""
    found = {}
    for layer in statistics.layers:
        for i, _ in enumerate(layer["experts"]):
            tokens = statistics.read(layer["layer"], f"experts.{i}.up.tokens").sum(0)
            output = statistics.read(layer["layer"], f"experts.{i}.output").double().sum(0)
            mean = output / tokens.clamp_min(1)[:, None]
            found[layer["layer"]] = Means(tokens, mean.float())
    return found


@dataclass(frozen=True)
class Fates:
    """What formats ask for. experts: (block, expert) -> fate. dropped: whole blocks."""

    experts: Mapping[tuple[int, int], FateFormat]
    dropped: tuple[int, ...]

    @property
    def known(self) -> bool:
        """Whether anything is asked for."""
        return bool(self.experts or self.dropped)

    def of(self, block: int) -> dict[int, FateFormat]:
        """Of one block's experts."""
        return {e: fate for (b, e), fate in sorted(self.experts.items()) if b == block}


def read_fates(sites: Sequence[Site], formats: Mapping[str, AnyFormat]) -> Fates:
    """The fates of `sites` under formats by site name.

    Raises:
        RecipeError: part of an expert, something that is none, or a merger that cannot be.
    """
    fated = {s.name: f for s in sites if isinstance(f := formats[s.name], FateFormat)}
    if not fated:
        return Fates({}, ())
    matrices = [s for s in sites if s.kind not in {"router", *ENDS}]
    by_block: dict[int, list[Site]] = {}
    for site in matrices:
        by_block.setdefault(site.layer, []).append(site)
    dropped = tuple(
        block for block, own in by_block.items()
        if all(s.name in fated and fated[s.name].kind == "drop" for s in own)
    )  # fmt: skip
    experts: dict[tuple[int, int], list[Site]] = {}
    for site in sites:
        if site.layer in dropped and site.kind not in ENDS:
            continue
        if site.name in fated and site.expert is None:
            raise RecipeError(f"{site.name} is no expert's and cannot be {fated[site.name].name}",
                              hint=WHOLE + "; zero drops a matrix alone")  # fmt: skip
        if site.expert is not None:
            experts.setdefault((site.layer, site.expert), []).append(site)
    found: dict[tuple[int, int], FateFormat] = {}
    for place, own in experts.items():
        fates = {formats[site.name].name for site in own}
        if len(fates) > 1 and any(site.name in fated for site in own):
            odd = next(site for site in own if site.name in fated)
            raise RecipeError(
                f"parts of expert {place[1]} of block {place[0]} are {', '.join(sorted(fates))}",
                where=odd.name, hint=WHOLE,
            )  # fmt: skip
        if own[0].name in fated:
            found[place] = fated[own[0].name]
    _check_partners(found, experts)
    return Fates(found, dropped)


def _check_partners(
    found: Mapping[tuple[int, int], FateFormat], experts: Mapping[tuple[int, int], Any]
) -> None:
    for (block, expert), fate in found.items():
        if fate.kind != "merge":
            continue
        where = f"expert {expert} of block {block}"
        if fate.partner is None:
            raise RecipeError("merged with whom?", where=where, hint="merge3: with expert 3")
        if (block, fate.partner) not in experts or fate.partner == expert:
            raise RecipeError(f"no expert {fate.partner} to merge with", where=where,
                              hint="another expert of its layer")  # fmt: skip
        if (block, fate.partner) in found:
            raise RecipeError(f"expert {fate.partner}, which it is merged with, is gone itself",
                              where=where, hint="merge with an expert that stays")  # fmt: skip


def reduction_of(
    fates: Fates, skeleton: Skeleton, axes: ExpertAxes | None, means: Mapping[int, Means] | None
) -> Reduction:
    """What carries out `fates`. means: by block; None where values do not matter, only sizes.

    Raises:
        RecipeError: rows of a router or experts that a layer cannot do without.
    """
    layers: dict[int, LayerExperts] = {}
    tensors: dict[str, torch.Tensor] = {}
    text = skeleton.model.config.get_text_config()
    for block in sorted({block for block, _ in fates.experts}):
        assert axes is not None
        own = fates.of(block)
        layer, constants = _layer(own, axes.count, None if means is None else means[block])
        if not layer.slots or len(layer.rows) < first_of(text, TOP_K, 1):
            raise RecipeError(
                f"{len(layer.slots)} experts and {len(layer.rows)} router rows would be left of "
                f"{axes.count}, tokens choose {first_of(text, TOP_K, 1)}",
                where=f"block {block}", hint="keep more experts, or drop the whole block",
            )  # fmt: skip
        layers[block] = layer
        if constants:
            values = (
                torch.zeros(len(constants), int(text.hidden_size)) if means is None
                else means[block].output[constants]
            )  # fmt: skip
            tensors[f"{axes.modules[block]}.{CONSTANTS}"] = values
    return Reduction(layers, fates.dropped, tensors)


def _layer(
    own: Mapping[int, FateFormat], count: int, means: Means | None
) -> tuple[LayerExperts, list[int]]:
    """The layer that is left, and the experts that are constants, in order."""
    kept = [e for e in range(count) if e not in own]
    slots = [_merged(e, [o for o, f in own.items() if f.partner == e], means) for e in kept]
    constants = [e for e, fate in own.items() if fate.kind == "constant"]
    rows: list[Row] = []
    sources = [e for e in range(count) if e not in own or own[e].kind != "drop"]
    for expert in sources:
        fate = own.get(expert)
        if fate is None:
            rows.append(kept.index(expert))
        elif fate.kind == "merge":
            assert fate.partner is not None
            rows.append(kept.index(fate.partner))
        else:
            copy = fate.kind == "copy"
            rows.append("copy" if copy else f"constant:{constants.index(expert)}")
    return LayerExperts(tuple(slots), tuple(rows), tuple(sources)), constants


def _merged(expert: int, others: Sequence[int], means: Means | None) -> Own:
    """An expert with those that are merged into it, by their tokens."""
    members = (expert, *others)
    if not others:
        return Own(members)
    tokens = [1.0] * len(members) if means is None else [float(means.tokens[e]) for e in members]
    total = sum(tokens)
    if total == 0:
        return Own(members, (1.0, *(0.0,) * len(others)))
    return Own(members, tuple(t / total for t in tokens))


class Reducer:
    """Reduces jobs of one model; what does not depend on fates is worked out once."""

    def __init__(self, job: Job) -> None:
        self.skeleton = job.skeleton
        self._axes: ExpertAxes | None = None

    def axes(self) -> ExpertAxes:
        """Of the model.

        Raises:
            UnsupportedModel: its experts cannot be dropped.
        """
        if self._axes is None:
            self._axes = expert_axes(self.skeleton.model, self.skeleton.prefix)
        return self._axes

    def reduce(self, job: Job, means: Mapping[int, Means] | None) -> Job:
        """`job` without the experts and blocks whose formats are fates; itself if there are none.

        Raises:
            RecipeError, UnsupportedModel, CheckpointError: fates that cannot be.
        """
        fates = read_fates(job.sites, job.formats)
        if not fates.known:
            return job
        axes = self.axes() if fates.experts else None
        reduction = reduction_of(fates, self.skeleton, axes, means)
        trust = "auto_map" in job.checkpoint.config  # it was allowed, or there were no skeleton
        checkpoint = ReducedCheckpoint.of(
            job.checkpoint, reduction, trust_remote_code=trust, skeleton=self.skeleton, axes=axes
        )
        skeleton = Skeleton.build(checkpoint, trust_remote_code=trust)
        sites = find_sites(skeleton)
        former = former_sites(job.sites, self.skeleton, sites, skeleton, reduction)
        expected, plan = job.expected, job.plan
        if expected is not None:
            expected = replace(expected, source=checkpoint.hash_of(expected.source))
            if expected.sensitivity is not None:
                known = expected.sensitivity.slopes
                slopes = {new: known[old] for new, old in former.items() if old in known}
                expected = replace(
                    expected, sensitivity=replace(expected.sensitivity, slopes=slopes)
                )
        if plan is not None and plan.source:
            plan = replace(plan, source=checkpoint.hash_of(plan.source))
        return replace(
            job, checkpoint=checkpoint, skeleton=skeleton, sites=sites,
            formats={new: job.formats[old] for new, old in former.items()},
            inputs={new: job.inputs[old] for new, old in former.items() if old in job.inputs},
            expected=expected, plan=plan,
        )  # fmt: skip


def reduce_job(job: Job, means: Mapping[int, Means] | None) -> Job:
    """See `Reducer.reduce`."""
    return Reducer(job).reduce(job, means)


def check_engine_fates(job: Job, target: str) -> None:
    """Refuse layers of unequal numbers of experts where an engine is to load them. Blocks may go.

    Raises:
        RecipeError: see `read_fates`.
        TargetError: experts go, but not by drop, or not as many of every layer.
    """
    fates = read_fates(job.sites, job.formats)
    experts = fates.experts
    if target == "native" or not experts:
        return
    layers = {site.layer for site in job.sites if site.expert is not None} - {*fates.dropped}
    counts = {sum(block == layer for block, _ in experts) for layer in layers}
    other = next((fate.name for fate in experts.values() if fate.kind != "drop"), None)
    if other is not None or len(counts) > 1:
        raise TargetError(
            f"{target} cannot load "
            + (f"experts that are {other}" if other else "layers of unequal numbers of experts"),
            hint="drop as many experts of every layer, or plan for native",
        )


def check_candidates(names: Sequence[str], target: str, *, experts: bool) -> None:
    """Refuse fates among candidates that no plan can have. names: of all formats. experts: whether
    the model has any.

    Raises:
        RecipeError: a merger with an expert that is named, or fates that an engine cannot load.
    """
    fates = [fate for name in names if (fate := parse_fate(name)) is not None]
    named = next((fate for fate in fates if fate.partner is not None), None)
    if named is not None:
        raise RecipeError(f"a candidate names no expert: whom {named.kind} suits best is measured",
                          where=f"--candidate {named.name}",
                          hint="--candidate merge, or --rule 'PATTERN=merge3'")  # fmt: skip
    blocks_alone = not experts and all(fate.kind == "drop" for fate in fates)
    if fates and target != "native" and not blocks_alone:
        raise RecipeError(
            f"{target} cannot load layers with unequal numbers of experts",
            where=f"--candidate {fates[0].name}",
            hint="--target native, or drop as many of every layer: --rule 'PATTERN=drop'",
        )


def needs_means(job: Job) -> bool:
    """Whether a fate of the job is made of values that statistics hold.

    Raises:
        RecipeError: see `read_fates`.
    """
    fates = read_fates(job.sites, job.formats).experts.values()
    return any(fate.kind in {"constant", "merge"} for fate in fates)


def former_sites(
    old: Sequence[Site],
    old_skeleton: Skeleton,
    new: Sequence[Site],
    new_skeleton: Skeleton,
    reduction: Reduction,
) -> dict[str, str]:
    """Name of every site of the reduced model -> that of the source's it was."""
    kept = [b for b in range(len(old_skeleton.blocks)) if b not in reduction.dropped]
    names = {_key(s, s.layer, s.expert, old_skeleton): s.name for s in old}
    found = {}
    for site in new:
        block = len(old_skeleton.blocks) if site.kind in ENDS else kept[site.layer]
        expert = site.expert
        if expert is not None and block in reduction.experts:
            expert = reduction.experts[block].slots[expert].experts[0]
        found[site.name] = names[_key(site, block, expert, new_skeleton)]
    return found


def _key(site: Site, block: int, expert: int | None, skeleton: Skeleton) -> tuple[Any, ...]:
    """What tells a site of a block from its others, whatever numbers stand in its name."""
    module = site.module.removeprefix(f"{skeleton.prefix}.{site.layer}.")
    return block, expert, module, site.param, site.rows
