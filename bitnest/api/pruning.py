"""prune, as a function: fewer experts and fewer blocks, written as an ordinary checkpoint.

`reduction.json` beside its files says what went, and what that was measured to cost layer by layer.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bitnest.api.texts import calibration_set, check_length, check_vocabulary, sources
from bitnest.checkpoint import Checkpoint
from bitnest.device import choose_device
from bitnest.errors import ArtifactError, RecipeError
from bitnest.packed.decoded import open_checkpoint
from bitnest.packed.loading import load_tokenizer
from bitnest.packed.modules import free_memory
from bitnest.progress import Progress, Silent
from bitnest.recipe import DEFAULT_LENGTH, DEFAULT_SAMPLES
from bitnest.reduced_config import GROUPS

if TYPE_CHECKING:
    from bitnest.calibrate.data import CalibrationSet
    from bitnest.prune.experts.choose import Reduced
    from bitnest.reduced import ReducedCheckpoint
    from bitnest.reduction import Reduction
    from bitnest.repair.routers import Tuned
    from bitnest.skeleton import Skeleton

RECORD = "reduction.json"
STEPS = 96  # of tuning routers
LEAST_WINDOWS = 8  # to tune them on


@dataclass(frozen=True)
class Chosen:
    """What is to go. errors: block -> relative error of its experts' output, by itself and before
    routers are tuned. similar: block -> 1 - cosine of what it reads and gives, of every block,
    where blocks go. score: that experts were chosen by. measured: KL on the calibration text by
    score, where several were tried. tuned: of the routers, None if they were not."""

    reduction: Reduction
    errors: dict[int, float]
    similar: dict[int, float]
    score: str = ""
    measured: dict[str, float] = field(default_factory=dict)
    tuned: Tuned | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        tuned = None
        if self.tuned is not None:
            tuned = {
                "kl_before": self.tuned.before, "kl_after": self.tuned.after,
                "steps": self.tuned.steps, "kept": bool(self.tuned.tensors),
            }  # fmt: skip
        return {
            **self.reduction.summary(), "errors": {str(b): e for b, e in self.errors.items()},
            "similar": {str(b): s for b, s in self.similar.items()}, "score": self.score,
            "measured": self.measured, "router": tuned,
        }  # fmt: skip


@dataclass(frozen=True)
class PruneResult:
    """A finished pruning. before, nbytes: of the tensors. experts: per layer, before and now.
    blocks: before and now."""

    path: Path
    before: int
    nbytes: int
    experts: tuple[int, int]
    blocks: tuple[int, int]
    sha256: str
    chosen: Chosen

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        rest = {k: v for k, v in vars(self).items() if k not in {"path", "chosen"}}
        return {"path": str(self.path), **rest, "reduction": self.chosen.to_json()}


def prune(
    model: str | Path,
    out: str | Path,
    *,
    lora: Sequence[str] = (),
    experts: str | None = None,
    blocks: int = 0,
    score: str = "measured",
    fate: str = "drop",
    align: bool = False,
    tune: bool | None = None,
    data: Sequence[str] = (),
    samples: int = DEFAULT_SAMPLES,
    length: int = DEFAULT_LENGTH,
    seed: int = 0,
    statistics: str | Path | None = None,
    device: str | None = None,
    fresh: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> PruneResult:
    """Write `model` with fewer experts and blocks into the directory `out`.

    lora: adapters, PATH or PATH:scale, merged in first. experts: how many to keep of every layer,
    `12`, or `75%`. blocks: how many to leave out. score: which experts go, see
    `prune.experts.scores`. fate: drop or merge. align: neurons before they are merged. tune: the
    routers afterwards, where that is measured to help; None: if the memory holds the model, which
    the score `measured` needs too. data, samples, length, seed: calibration texts, windows and
    tokens. statistics: for the score `fisher`. fresh: discard files of an unfinished run.

    Raises:
        RecipeError: nothing to do, or what no layer can be left with.
        UnsupportedModel: a model whose experts or blocks cannot go.
        CheckpointError, ArtifactError, DataError: what is read or written.
    """
    from bitnest.api.writing import write_checkpoint
    from bitnest.workdir import in_the_way, is_empty

    out = Path(os.path.abspath(out))
    if experts is None and not blocks:
        raise RecipeError("nothing to prune", hint="--experts 75%, or --blocks 2")
    _check_said(experts, score, fate, align, tune, statistics)
    _check_ranges(samples, length, seed, bool(tune))
    if fate not in {"drop", "merge"}:
        raise RecipeError(
            f"'{fate}' is no ordinary model", where="--fate",
            hint="drop or merge; zero, copy and constant experts need bitnest's runtime: "
            "bitnest compress MODEL --candidate constant --size SIZE",
        )  # fmt: skip
    if not is_empty(out):
        raise in_the_way(out)
    check_writable(out)
    base = open_checkpoint(model, lora, trust_remote_code=trust_remote_code)
    maker = Pruner(
        base, data=data, samples=samples, length=length, seed=seed, device=device,
        trust_remote_code=trust_remote_code, progress=progress,
    )  # fmt: skip
    maker.check(experts, blocks)
    whole = maker.fits()
    if tune is None:
        tune = whole and len(maker.calibration.tokens) >= LEAST_WINDOWS
    asked = {
        "lora": list(lora),
        "experts": experts,
        "blocks": blocks,
        "score": score,
        "fate": fate,
        "align": align,
        "tune": tune,
        "texts": list(data),
        "samples": samples,
        "length": length,
        "seed": seed,
    }
    if score == "measured" and not whole:
        score = "relative"
    chosen = maker.choose(
        experts, blocks=blocks, score=score, fate=fate, align=align, statistics=statistics
    )
    if tune and chosen.reduction.experts:
        chosen = maker.tuned(chosen)
    reduced = maker.reduced(chosen.reduction)

    def content() -> dict[str, Any]:
        own = chosen.to_json()
        return {
            "base": {"sha256": base.scan(), **base.origin()}, "asked": asked,
            "reduction": own.pop("sha256"), **own,
        }  # fmt: skip

    digest = write_checkpoint(
        reduced, out, record=(RECORD, content), fresh=fresh, progress=progress
    )
    layers = chosen.reduction.experts
    before = maker.axes.count if layers else 0
    now = len(next(iter(layers.values())).slots) if layers else 0
    count = len(maker.skeleton.blocks)
    return PruneResult(
        out, base.nbytes, reduced.nbytes, (before, now),
        (count, count - len(chosen.reduction.dropped)), digest, chosen,
    )  # fmt: skip


class Pruner:
    """A model, its calibration text, and what may go."""

    def __init__(
        self,
        base: Checkpoint,
        *,
        data: Sequence[str] = (),
        samples: int = DEFAULT_SAMPLES,
        length: int = DEFAULT_LENGTH,
        seed: int = 0,
        device: str | None = None,
        trust_remote_code: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """See `prune`."""
        from bitnest.skeleton import Skeleton

        self.base, self.seed, self.trust = base, seed, trust_remote_code
        self.progress = progress or Silent()
        self.device = choose_device(device)
        self.skeleton: Skeleton = Skeleton.build(base, trust_remote_code=trust_remote_code)
        check_length(self.skeleton.model.config, length)
        tokenizer = load_tokenizer(base.path, trust_remote_code=trust_remote_code)
        found = calibration_set(tokenizer, sources(data), samples, length, seed)
        check_vocabulary(self.skeleton.model, found, base)
        self.calibration: CalibrationSet = found

    @property
    def axes(self) -> Any:
        """What grows with the experts."""
        from bitnest.expert_axes import expert_axes

        return expert_axes(self.skeleton.model, self.skeleton.prefix)

    def choose(
        self,
        experts: str | None,
        *,
        blocks: int = 0,
        score: str = "measured",
        fate: str = "drop",
        align: bool = False,
        ordinary: bool = True,
        statistics: str | Path | None = None,
    ) -> Chosen:
        """What goes; see `prune`. ordinary: merged experts have one router row each.

        Raises:
            BitnestError: as `prune`.
        """
        from bitnest.prune.blocks import least_blocks
        from bitnest.prune.experts.choose import layer_error, reduce_layer
        from bitnest.prune.experts.probe import probe_layers
        from bitnest.prune.experts.scores import SCORES, TRIED

        if score not in SCORES:
            raise RecipeError(f"unknown score '{score}'", hint="one of " + ", ".join(SCORES))
        dropped: tuple[int, ...] = ()
        similar: dict[int, float] = {}
        dtype = torch.float32
        if blocks:
            dropped, similar = least_blocks(
                self.skeleton, self.calibration, blocks,
                dtype=dtype, device=self.device, progress=self.progress,
            )  # fmt: skip
        if experts is None:
            return Chosen(self._reduction({}, dropped), {}, similar)
        keep = kept_experts(experts, self.axes.count)
        rows = _fisher(statistics) if score == "fisher" else None
        names = TRIED if score == "measured" else (score,)
        names = ("",) if fate == "merge" else names  # which clusters all
        tried: dict[str, dict[int, Reduced]] = {name: {} for name in names}
        errors: dict[str, dict[int, float]] = {name: {} for name in names}
        for probe in probe_layers(
            self.skeleton, self.calibration, dtype=dtype, device=self.device,
            progress=self.progress,
        ):  # fmt: skip
            if probe.block in dropped:
                continue
            own = None if rows is None else rows(probe.name)
            for name in names:
                found = reduce_layer(
                    probe, keep, score=name, fate=fate, align=align, ordinary=ordinary, fisher=own
                )
                tried[name][probe.block] = found
                errors[name][probe.block] = layer_error(probe, found)
        chosen = {
            name: Chosen(self._reduction(layers, dropped), errors[name], similar, name)
            for name, layers in tried.items()
        }
        return self._least(list(chosen.values()))

    def _least(self, chosen: list[Chosen]) -> Chosen:
        """Of several the one whose KL is lowest; of equal ones the first."""
        from bitnest.repair.routers import divergences
        from bitnest.skeleton import Skeleton

        distinct = {own.reduction.sha256: own for own in reversed(chosen)}
        own = [one for one in chosen if distinct[one.reduction.sha256] is one]
        if len(own) == 1:
            return own[0]
        candidates = [
            Skeleton.build(self.reduced(one.reduction), trust_remote_code=self.trust) for one in own
        ]
        found = divergences(
            self.skeleton, candidates, self.calibration, device=self.device, dtype=torch.float32,
            progress=self.progress,
        )  # fmt: skip
        measured = {one.score: kl for one, kl in zip(own, found, strict=True)}
        return replace(own[found.index(min(found))], measured=measured)

    def check(self, experts: str | None, blocks: int) -> None:
        """Refuse, before anything is measured, numbers that no layer or model can be left with.

        Raises:
            RecipeError: they are.
            UnsupportedModel: no experts, or a router whose groups would be too small.
        """
        from bitnest.prune.blocks import check_count
        from bitnest.reduced_config import TOP_K, check_groups, first_of
        from bitnest.reduction import LayerExperts, Own

        if blocks:
            check_count(blocks, len(self.skeleton.blocks))
        if experts is None:
            return
        axes, config = self.axes, self.skeleton.model.config
        text = config.get_text_config()
        top_k, groups = first_of(text, TOP_K, 1), first_of(text, GROUPS, 1)
        keep = kept_experts(experts, axes.count)
        if keep == axes.count:
            raise RecipeError(
                f"all {keep} experts stay", where="--experts",
                hint="keep fewer" + (", or leave it out" if blocks else ""),
            )  # fmt: skip
        if keep < top_k or keep % groups:
            raise RecipeError(
                f"{keep} of {axes.count} experts, where a token chooses {top_k}"
                + (f" among {groups} groups" if groups > 1 else ""),
                where="--experts",
                hint=f"keep {max(top_k, groups)} to {axes.count}"
                + (f", a multiple of {groups}" if groups > 1 else ""),
            )
        size, share = axes.count // groups, keep // groups
        own = tuple(e for e in range(axes.count) if e % size < share)
        slots = tuple(Own((e,)) for e in own)
        block = next(iter(axes.modules))
        check_groups(config, block, LayerExperts(slots, tuple(range(keep)), own), axes.count)

    def fits(self) -> bool:
        """Whether half of the free memory holds the model in float32, as tuning needs it."""
        weights = sum(prod(info.shape) for info in self.base.tensors.values())
        return 8 * weights < free_memory(self.device)

    def _reduction(self, layers: dict[int, Reduced], dropped: tuple[int, ...]) -> Reduction:
        from bitnest.reduction import Reduction
        from bitnest.resized import CONSTANTS

        tensors = {}
        for block, found in layers.items():
            for name, values in found.rows.items():
                tensors[self._stored(name)] = values
            if found.constants is not None:
                tensors[f"{self.axes.modules[block]}.{CONSTANTS}"] = found.constants
        return Reduction({b: found.layer for b, found in layers.items()}, dropped, tensors)

    def _stored(self, name: str) -> str:
        """The checkpoint's name of a router's tensor."""
        return self.skeleton.sources[name].names[0]

    def reduced(self, reduction: Reduction) -> ReducedCheckpoint:
        """The model without what goes."""
        from bitnest.reduced import ReducedCheckpoint

        return ReducedCheckpoint.of(self.base, reduction, trust_remote_code=self.trust)

    def tuned(self, chosen: Chosen, steps: int = STEPS) -> Chosen:
        """The same with its routers tuned; see `repair.routers`.

        Raises:
            DataError: too few windows.
        """
        from bitnest.repair.routers import tune_routers
        from bitnest.skeleton import Skeleton

        reduction = chosen.reduction
        student = Skeleton.build(self.reduced(reduction), trust_remote_code=self.trust)
        found = tune_routers(
            self.skeleton, student, self.axes, self.calibration, dropped=reduction.dropped,
            steps=steps, device=self.device, dtype=torch.float32, seed=self.seed,
            progress=self.progress,
        )  # fmt: skip
        tensors = {self._stored(name): values for name, values in found.tensors.items()}
        reduction = replace(reduction, tensors={**reduction.tensors, **tensors})
        return replace(chosen, reduction=reduction, tuned=found)


def _check_said(
    experts: str | None,
    score: str,
    fate: str,
    align: bool,
    tune: bool | None,
    statistics: str | Path | None,
) -> None:
    """Refuse options that would say nothing.

    Raises:
        RecipeError: one does.
    """
    if experts is None and (score != "measured" or fate != "drop"):
        raise RecipeError("no experts go: --score and --fate say nothing", hint="--experts 75%")
    if experts is None and tune:
        raise RecipeError("no experts go: --tune says nothing", hint="--experts 75%")
    if align and fate != "merge":
        raise RecipeError("--align is for experts that are merged", hint="--fate merge")
    if fate == "merge" and score != "measured":
        raise RecipeError("--fate merge clusters all experts: --score says nothing",
                          hint="leave out --score")  # fmt: skip
    if statistics is not None and score != "fisher":
        raise RecipeError("--statistics is for gradients", hint="--score fisher")


def _check_ranges(samples: int, length: int, seed: int, tune: bool) -> None:
    """Refuse numbers that no text can be drawn with.

    Raises:
        RecipeError: they are.
    """
    if samples < 1 or length < 2 or seed < 0:
        raise RecipeError(f"{samples} windows of {length} tokens, seed {seed}",
                          hint="--samples 64 --length 512 --seed 0")  # fmt: skip
    if tune and samples < LEAST_WINDOWS:
        raise RecipeError(f"{samples} windows are too few to tune routers on", where="--samples",
                          hint=f"at least {LEAST_WINDOWS}, or --no-tune")  # fmt: skip


def check_writable(out: Path) -> None:
    """Refuse a place where no directory can be made, before anything is measured for it. Nothing is
    made.

    Raises:
        ArtifactError: it is.
    """
    place = out.parent
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ArtifactError("no directory can be made here", where=str(out),
                            hint="another -o")  # fmt: skip


def kept_experts(text: str, count: int) -> int:
    """`12` or `75%` of `count` experts.

    Raises:
        RecipeError: no such number.
    """
    try:
        value = float(text[:-1]) / 100 * count if text.endswith("%") else float(int(text))
    except ValueError:
        value = math.nan
    if not 0 < value <= count or not math.isfinite(value):
        raise RecipeError(
            f"'{text}' of {count} experts", where="--experts",
            hint=f"how many to keep: 1 to {count}, or 75%",
        )  # fmt: skip
    return max(1, round(value))


def _fisher(statistics: str | Path | None) -> Callable[[str], torch.Tensor]:
    """By experts module, squared gradients at what the layer gives, (hidden,).

    Those of each expert's output hold its gate squared; summed over experts, and divided by the
    mean sum of squared gates, they are the layer's.

    Raises:
        RecipeError: no statistics.
        StatisticsError: they hold none.
    """
    from bitnest.errors import StatisticsError
    from bitnest.statistics import Statistics

    if statistics is None:
        raise RecipeError("the score 'fisher' needs gradients", where="--score",
                          hint="bitnest analyze MODEL -o DIR, and --statistics DIR")  # fmt: skip
    opened = Statistics.open(statistics)

    def rows(name: str) -> torch.Tensor:
        for number, layer in enumerate(opened.layers):
            for place, own in enumerate(layer.get("experts", ())):
                if own["name"] != name:
                    continue
                found = opened.read(number, f"fisher.{name}.down_proj")
                norms = opened.read(number, f"experts.{place}.norms")
                tokens = opened.read(number, f"experts.{place}.up.tokens")
                if found is None or norms is None or tokens is None:
                    break
                squares = norms[..., 1].sum(1) / (tokens.sum(1) / own["top_k"]).clamp_min(1)
                layer_rows = found.sum(1) / squares.clamp_min(1e-12)[:, None]
                return layer_rows.mean(0).float()
        raise StatisticsError(f"no gradients of {name}", where=str(opened.path),
                              hint="bitnest analyze with --importance kl")  # fmt: skip

    return rows
