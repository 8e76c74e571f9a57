"""cover: a calibration set with windows added until every expert has its minimum of tokens.

    data    windows of the same sources, not drawn yet, that bring most to starved experts
    self    windows the model writes itself, its experts balanced (`ebss`); the whole model has to
            fit into memory

Added windows carry the label `cover`: they feed Hessians, and no figure of how experts are used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import torch

from bitnest.calibrate.coverage import routed_tokens
from bitnest.calibrate.covering import candidate_windows, draw_until_covered
from bitnest.calibrate.data import CalibrationSet, DataSource
from bitnest.calibrate.ebss import ebss
from bitnest.calibrate.observe import COVER
from bitnest.calibrate.stream import Stream
from bitnest.errors import RecipeError, UnsupportedModel
from bitnest.merged import MergedCheckpoint
from bitnest.progress import Progress
from bitnest.quantize.compress import Job
from bitnest.quantize.memory import Budget
from bitnest.reduced import ReducedCheckpoint

WAYS = ("data", "self")
WORTH = 8  # missing tokens a window has to bring, else nearly dead experts pull in hundreds


@dataclass(frozen=True)
class Drawn:
    """What was added. starved: experts still below the minimum."""

    way: str
    windows: int
    rounds: int
    tried: int
    starved: int

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dict(vars(self))


def cover(
    job: Job,
    calibration: CalibrationSet,
    way: str,
    *,
    tokenizer: Any,
    sources: Sequence[DataSource],
    limit: int,
    seed: int,
    progress: Progress,
) -> tuple[CalibrationSet, Drawn]:
    """Add at most `limit` windows; see above.

    Raises:
        RecipeError: an unknown way. UnsupportedModel: no experts.
    """
    if way not in WAYS:
        raise RecipeError(f"unknown way to cover experts '{way}'", hint=" or ".join(WAYS))
    minimum = minimum_tokens(job)
    if not minimum:
        raise UnsupportedModel(
            "the model has no routed experts to cover",
            where=str(job.checkpoint.path),
            hint="leave out --cover",
        )
    budget = Budget.plan(job.skeleton, job.sites, job.memory)

    def route(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        stream = Stream(
            job.skeleton, tokens, dtype=job.compute, device=job.device, memory_limit=budget.hidden
        )
        with torch.no_grad():
            return routed_tokens(stream, progress)

    counts = {name: found.sum(0) for name, found in route(calibration.tokens).items()}
    if way == "data":
        pool = candidate_windows(tokenizer, sources, calibration, limit=limit, seed=seed)
        found = draw_until_covered(route, pool, counts, minimum, worth=WORTH, progress=progress)
        drawn = Drawn(way, len(found.tokens), found.rounds, found.windows_tried,
                      len(found.still_starved))  # fmt: skip
        return _with(calibration, found.tokens), drawn
    return _self(job, calibration, counts, minimum, tokenizer, limit, seed, progress)


def minimum_tokens(job: Job) -> dict[str, int]:
    """Tokens asked for per expert, by experts module: --min-tokens, else its widest input."""
    minimum: dict[str, int] = {}
    for site in job.sites:
        if site.expert is not None and site.param != "weight":
            least = job.recipe.min_tokens or site.shape[1]
            minimum[site.module] = max(minimum.get(site.module, 0), least)
    return minimum


def _self(
    job: Job,
    calibration: CalibrationSet,
    counts: Mapping[str, torch.Tensor],
    minimum: Mapping[str, int],
    tokenizer: Any,
    limit: int,
    seed: int,
    progress: Progress,
) -> tuple[CalibrationSet, Drawn]:
    """Windows written by the model itself, in batches, until all experts are covered."""
    model = _whole_model(job)
    have = {name: found.clone() for name, found in counts.items()}
    parts: list[torch.Tensor] = []
    rounds = tried = 0
    while tried < limit and _starved(have, minimum):
        count = min(max(4, tried), limit - tried)
        written = ebss(
            model,
            tokenizer,
            windows=count,
            length=calibration.tokens.shape[1],
            seed=seed + rounds,
            counts=have,
            progress=progress,
        )
        rounds, tried = rounds + 1, tried + count
        parts.append(written.tokens)
        for name, found in written.counts.items():
            have[name] += found.sum(0).to(have[name].device)
    tokens = torch.cat(parts) if parts else calibration.tokens[:0]
    return _with(calibration, tokens), Drawn("self", len(tokens), rounds, tried,
                                             _starved(have, minimum))  # fmt: skip


def _whole_model(job: Job) -> Any:
    """The model with all weights; a view of a checkpoint is no directory to load it from."""
    if isinstance(job.checkpoint, MergedCheckpoint | ReducedCheckpoint):
        skeleton = replace(job.skeleton, model=deepcopy(job.skeleton.model))
        skeleton.fill("", dtype=job.checkpoint.dtype, device=job.device)
        skeleton.model.tie_weights()
        return skeleton.model.to(job.device)
    from bitnest.packed.loading import load_model

    return load_model(job.checkpoint.path, device=job.device)


def _starved(counts: Mapping[str, torch.Tensor], minimum: Mapping[str, int]) -> int:
    return sum(int((found < minimum[name]).sum()) for name, found in counts.items())


def _with(calibration: CalibrationSet, tokens: torch.Tensor) -> CalibrationSet:
    if not len(tokens):
        return calibration
    whole = torch.cat([calibration.tokens, tokens])
    return replace(
        calibration,
        tokens=whole,
        labels=(*calibration.labels, *[COVER] * len(tokens)),
        counts={**calibration.counts, COVER: len(tokens)},
        sha256=sha256(whole.numpy().tobytes()).hexdigest(),
    )
