"""From a score and a number of experts to what becomes of a layer.

What takes the place of experts that go (`fate`):

    drop        nothing: their router rows are cut out, and the router chooses among the rest
    merge       no expert is chosen to go: all are clustered and merged (`merging`)
    zero        their rows stay and give nothing; the token's other gates grow to the same sum
    copy        their rows stay and give the token itself
    constant    their rows stay and give what the expert gives on average over the tokens that
                choose it, each weighted by its gate squared and the inverse of its scale: of all
                constants the one of least relative error
    best        of drop, zero, copy and constant, for each expert that goes the one of least
                relative error, by itself

zero, copy and constant are MoE++'s (Jin et al. 2024), who train a model with them; putting them in
the place of trained experts, by error, is ours. They need bitnest's runtime; drop and merge give
ordinary models, where merged experts have one router row (see `merging`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from bitnest.errors import RecipeError
from bitnest.prune.experts.merging import clusters, merged, merged_output
from bitnest.prune.experts.probe import TINY, LayerProbe
from bitnest.prune.experts.scores import frequency, ranked
from bitnest.reduction import LayerExperts, Own
from bitnest.resized import Row, silenced

FATES = ("drop", "merge", "zero", "copy", "constant", "best")


@dataclass(frozen=True)
class Reduced:
    """What becomes of one layer. constants: (K, hidden). rows: by router tensor of the model, what
    it becomes where that is not a selection of its rows."""

    layer: LayerExperts
    constants: torch.Tensor | None = None
    rows: dict[str, torch.Tensor] = field(default_factory=dict)


def reduce_layer(
    probe: LayerProbe,
    keep: int,
    *,
    score: str = "relative",
    fate: str = "drop",
    align: bool = False,
    ordinary: bool = True,
    fisher: torch.Tensor | None = None,
) -> Reduced:
    """A layer left with `keep` experts. align: neurons, where experts are merged. ordinary: one
    router row per expert. fisher: see `scores.fisher`.

    Raises:
        RecipeError: fewer experts than a token chooses, an unknown score or fate, one that no
            ordinary model has.
    """
    if not probe.top_k <= keep <= probe.experts:
        raise RecipeError(
            f"{keep} experts where a token chooses {probe.top_k} of {probe.experts}",
            where=probe.name,
            hint=f"keep between {probe.top_k} and {probe.experts}",
        )
    if keep % probe.groups or (probe.groups > 1 and fate == "merge"):
        raise RecipeError(
            f"the router chooses among {probe.groups} groups of experts",
            where=probe.name,
            hint=f"drop them, and keep a multiple of {probe.groups}",
        )
    if fate == "merge":
        return _merged(probe, keep, align, ordinary)
    kept = ranked(probe, score, keep, fisher)
    return replace_experts(probe, kept, fate)


def replace_experts(probe: LayerProbe, kept: Sequence[int], fate: str) -> Reduced:
    """A layer of which the experts `kept` are left, and the others have a fate.

    Raises:
        RecipeError: an unknown one.
    """
    if fate not in FATES or fate == "merge":
        raise RecipeError(f"unknown fate '{fate}'", hint="one of " + ", ".join(FATES))
    gone = [e for e in range(probe.experts) if e not in set(kept)]
    fates = {e: fate if fate != "best" else best_fate(probe, e) for e in gone}
    rows: list[Row] = []
    sources: list[int] = []
    constants: list[torch.Tensor] = []
    for expert in range(probe.experts):
        if fates.get(expert) == "drop":
            continue
        sources.append(expert)
        if expert not in fates:
            rows.append(list(kept).index(expert))
        elif fates[expert] == "constant":
            rows.append(f"constant:{len(constants)}")
            constants.append(constant(probe, expert))
        else:
            rows.append(fates[expert])
    layer = LayerExperts(tuple(Own((e,)) for e in kept), tuple(rows), tuple(sources))
    return Reduced(layer, torch.stack(constants) if constants else None)


def layer_error(probe: LayerProbe, reduced: Reduced) -> float:
    """Relative error of the layer once it is reduced so; its router as it is without tuning."""
    layer = reduced.layer
    outputs = torch.stack([merged_output(probe, own) for own in layer.slots])
    if reduced.rows:
        with probe.router(reduced.rows, len(layer.rows)):
            index, gates = probe.choices(range(len(layer.rows)))
        return probe.error(probe.mix(index, gates, outputs))
    index, gates = probe.choices(layer.sources)
    off = torch.tensor([row == "zero" for row in layer.rows], device=index.device)
    gates = silenced(gates, off[index])
    total = torch.zeros_like(probe.target)
    for number, row in enumerate(layer.rows):
        if row == "zero":
            continue
        if isinstance(row, int):
            given = outputs[row]
        elif row == "copy":
            given = probe.read
        else:
            assert reduced.constants is not None
            given = reduced.constants[int(row.partition(":")[2])]
        total += (gates * (index == number)).sum(1)[:, None] * given
    return probe.error(total)


def constant(probe: LayerProbe, expert: int) -> torch.Tensor:
    """What stands in for an expert, (hidden,); see above. Zeros where no token chose it."""
    weight = probe.gate(expert).square() * probe.weight
    total = (weight[:, None] * probe.outputs[expert]).sum(0)
    return total / weight.sum().clamp_min(TINY)


def fate_errors(probe: LayerProbe, expert: int) -> dict[str, float]:
    """Relative error of each fate, this expert alone having it."""
    every = [e for e in range(probe.experts) if e != expert]
    off = probe.index == expert
    found = {
        "constant": probe.replaced({expert: constant(probe, expert)}),
        "copy": probe.replaced({expert: probe.read}),
        "zero": probe.error(probe.mix(probe.index, silenced(probe.gates, off))),
    }
    if len(every) >= probe.top_k:
        found["drop"] = probe.without(every)
    return found


def best_fate(probe: LayerProbe, expert: int) -> str:
    """The fate of least error; of equal ones the plainest."""
    errors = fate_errors(probe, expert)
    order = [fate for fate in FATES if fate in errors]
    return min(order, key=errors.__getitem__)


def _merged(probe: LayerProbe, keep: int, align: bool, ordinary: bool) -> Reduced:
    groups = clusters(probe, keep)
    slots = tuple(merged(probe, group, align) for group in groups)
    place = {e: number for number, group in enumerate(groups) for e in group}
    if not ordinary:
        rows = tuple(place[e] for e in range(probe.experts))
        return Reduced(LayerExperts(slots, rows, tuple(range(probe.experts))))
    use = frequency(probe)
    first = tuple(max(group, key=lambda e: float(use[e])) for group in groups)
    return Reduced(LayerExperts(slots, tuple(range(keep)), first), rows=router_rows(probe, slots))


def router_rows(probe: LayerProbe, slots: Sequence[Own]) -> dict[str, torch.Tensor]:
    """Router tensors of one row per merged expert: the mean of its members', by weight."""
    found = {}
    mix = torch.zeros(len(slots), probe.experts)
    for number, own in enumerate(slots):
        mix[number, list(own.experts)] = torch.tensor(own.weights)
    for name, dims, tensor in probe.router_tensors():
        mixed = tensor.float()
        for dim in dims:
            mixed = torch.tensordot(mix, mixed, dims=([1], [dim])).movedim(0, dim)
        found[name] = mixed.to(tensor.dtype)
    return found
