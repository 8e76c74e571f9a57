"""Experts switched off for a measurement: what gets worse without an expert is what it serves.

At transformers' experts interface every token t comes with its chosen experts e and their gates
g_te. With the set O switched off,

    g'_te = 0                                                    for e in O
    g'_te = g_te * (sum over all of g_t) / (sum over e not in O of g_t)   for the others

so a token keeps the sum of its gates, and one whose gates all belong to O (or whose others sum to
0) gets nothing from its layer's routed experts. Tokens that chose no expert of O are untouched, to
the bit. This is the zero replacement of MoE++ (Jin et al. 2024), which prunes that way; measuring
with it is ours. It is not surgery on the router: routing stays as it was, no other expert is
picked instead, and shared experts run as always.

Only gates change, so dense and packed experts and every implementation of them are measured alike.
The expert's matrices are still multiplied: nothing gets smaller or faster, and NaN in them stays.

Left out: experts kept as a ModuleList of separate modules, whose gates are applied by their
family's own code. They are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bitnest.artifact import Artifact, is_artifact
from bitnest.checkpoint import Checkpoint
from bitnest.errors import BitnestError, UnsupportedModel
from bitnest.resized import silenced
from bitnest.sites import Site, find_sites
from bitnest.skeleton import Skeleton

OPTION = "--without"


@dataclass(frozen=True)
class Off:
    """Experts of one layer that are switched off together. layer: block number. experts: sorted."""

    layer: int
    experts: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.layer}:{','.join(map(str, self.experts))}"


@dataclass(frozen=True)
class Switch:
    """What is off while one row is measured; the default is nothing.

    label: as in the row's name, `2:15,3`. experts: `LAYER:EXPERT` of each. modules: dotted name of
    an experts module -> numbers of its experts that are off.
    """

    label: str = ""
    experts: tuple[str, ...] = ()
    modules: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def parse_without(specs: Sequence[str]) -> tuple[Off, ...]:
    """Read `LAYER:EXPERT[,EXPERT...]`, one set of experts each.

    Raises:
        BitnestError: another spelling, an expert or a set named twice.
    """
    found: list[Off] = []
    for spec in specs:
        match = re.fullmatch(r"([0-9]+):([0-9]+(?:,[0-9]+)*)", spec)
        if match is None:
            raise BitnestError(
                f"{OPTION} {spec}: not of the form LAYER:EXPERT[,EXPERT...]",
                where=OPTION,
                hint=f"such as {OPTION} 2:15, or {OPTION} 2:15,3 for both at once; numbers start "
                "at 0",
            )
        experts = sorted(int(number) for number in match[2].split(","))
        off = Off(int(match[1]), tuple(dict.fromkeys(experts)))
        if len(off.experts) < len(experts) or off in found:
            raise BitnestError(
                f"{OPTION} {spec}: named twice", where=OPTION, hint="each set of experts once"
            )
        found.append(off)
    return tuple(found)


def find_switches(
    offs: Sequence[Off], name: str, path: Path, *, trust_remote_code: bool = False
) -> tuple[Switch, ...]:
    """Where the model in `path`, called `name`, keeps the experts to switch off; reads no weights.

    Layers are decoder blocks counted from 0, as in `bitnest inspect`.

    Raises:
        BitnestError: a layer without experts, an expert beyond the layer's number of them, a model
            without experts.
        UnsupportedModel: experts whose gates cannot be reached.
        CheckpointError, ArtifactError: a model that cannot be opened.
    """
    if not offs:
        return ()
    layers: dict[int, list[Site]] = {}
    for site in _sites(path, trust_remote_code):
        if site.kind == "expert" and site.expert is not None:
            layers.setdefault(site.layer, []).append(site)
    if not layers:
        raise BitnestError(
            f"'{name}' has no experts to switch off",
            where=str(path),
            hint=f"{OPTION} is for Mixture-of-Experts models",
        )
    return tuple(_switch(off, layers, name, path) for off in offs)


def _sites(path: Path, trust_remote_code: bool) -> list[Site]:
    if is_artifact(path):
        return [record.site for record in Artifact.open(path).records]
    checkpoint = Checkpoint.open(path)
    return find_sites(Skeleton.build(checkpoint, trust_remote_code=trust_remote_code))


def _switch(off: Off, layers: Mapping[int, list[Site]], name: str, path: Path) -> Switch:
    sites = layers.get(off.layer)
    if sites is None:
        raise BitnestError(
            f"{OPTION} {off}: layer {off.layer} of '{name}' has no experts",
            where=str(path),
            hint=f"layers with experts: {_ranges(sorted(layers))}",
        )
    modules = {site.module for site in sites}
    if any(site.param == "weight" for site in sites) or len(modules) > 1:
        raise UnsupportedModel(
            f"{OPTION} {off}: '{name}' does not keep the experts of layer {off.layer} in one "
            "module, so their gates cannot be reached",
            where=str(path),
            hint=f"{OPTION} needs a family whose experts run behind transformers' experts "
            "interface",
        )
    count = 1 + max(site.expert or 0 for site in sites)
    if off.experts[-1] >= count:
        raise BitnestError(
            f"{OPTION} {off}: layer {off.layer} of '{name}' has {count} experts, there is no "
            f"expert {off.experts[-1]}",
            where=str(path),
            hint=f"experts are numbered 0 to {count - 1}",
        )
    addresses = tuple(f"{off.layer}:{expert}" for expert in off.experts)
    return Switch(str(off), addresses, {modules.pop(): off.experts})


def _ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers with runs folded: 1, 3-5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs)


@contextmanager
def switched_off(model: Any, switch: Switch) -> Iterator[None]:
    """Run `model` without the experts of `switch`; undone on leaving.

    Raises:
        UnsupportedModel: while running, experts that are not called with one gate per choice.
    """
    with ExitStack() as stack:
        for name, experts in switch.modules.items():
            module = model.get_submodule(name)
            stack.enter_context(_forward(module, _silenced(name, module.forward, experts)))
        yield


@contextmanager
def _forward(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _silenced(name: str, run: Callable[..., Any], experts: tuple[int, ...]) -> Callable[..., Any]:
    def forward(
        hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> Any:
        if top_k_index.dtype.is_floating_point or top_k_index.shape != top_k_weights.shape:
            raise UnsupportedModel(
                f"experts are called with choices {tuple(top_k_index.shape)} and gates "
                f"{tuple(top_k_weights.shape)}",
                where=name,
                hint=f"{OPTION} needs one gate per chosen expert",
            )
        return run(hidden_states, top_k_index, silence(top_k_index, top_k_weights, experts))

    return forward


def silence(index: torch.Tensor, gates: torch.Tensor, experts: Sequence[int]) -> torch.Tensor:
    """Gates (tokens, k) with those of `experts` 0 and each token's others scaled to the same sum.

    index: (tokens, k) integers, the chosen experts. Tokens without any of `experts` keep their
    gates bit for bit; those whose others sum to 0 get zeros.
    """
    off = torch.isin(index, torch.tensor(experts, device=index.device, dtype=index.dtype))
    return silenced(gates, off)
