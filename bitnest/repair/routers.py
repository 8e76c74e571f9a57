"""Routers tuned after experts went: a short distillation that trains router matrices alone.

    minimise  KL(p || q)  over calibration windows,  p of the original model, q of the reduced one

by Adam, whatever else the model has held still. The original runs first and leaves behind, for
every token, its TOP most likely next tokens and the rest as one more outcome: no KL so taken is
over the full one, and the two models are never in memory together.

A quarter of the windows is held out. The tensors that are best on them are kept; where a rate makes
nothing better the next is a tenth of it, and where none does the routers stay as they were.

Only rows of the router that are left can help, and only by choosing otherwise among the experts
that are left: what the lost ones alone could say stays lost. QESC (Chen et al. 2025) fits the
router's logits layer by layer; fitting layers' outputs in closed form gave a fifth of what this
does (docs/log.md), because it is later layers that can make up for earlier ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from bitnest.calibrate.data import CalibrationSet
from bitnest.errors import DataError
from bitnest.expert_axes import ExpertAxes
from bitnest.progress import Progress
from bitnest.skeleton import Skeleton

TOP = 256  # tokens of the vocabulary that are told apart
RATES = (3e-3, 3e-4)  # of Adam
BATCH = 4  # windows
ROUNDS = 8  # how often the held-out windows are looked at
TINY = 1e-12


@dataclass(frozen=True)
class Tuned:
    """tensors: by the model's names, what routers became; empty if nothing was better. before,
    after: KL on the held-out windows, nats per token. steps: taken."""

    tensors: dict[str, torch.Tensor]
    before: float
    after: float
    steps: int


@dataclass(frozen=True)
class Targets:
    """What the original says: its most likely next tokens, (windows, T, TOP), and log p of them and
    of the rest, (windows, T, TOP + 1)."""

    tokens: torch.Tensor
    log: torch.Tensor

    def kl(self, logits: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        """Mean KL to logits (B, T, V) of these windows."""
        own = logits.float().log_softmax(-1)
        q = own.gather(-1, self.tokens[windows].to(own.device))
        rest = torch.log((1 - q.exp().sum(-1, keepdim=True)).clamp_min(TINY))
        p = self.log[windows].to(own.device)
        return (p.exp() * (p - torch.cat([q, rest], dim=-1))).sum(-1).mean()


def tune_routers(
    original: Skeleton,
    reduced: Skeleton,
    axes: ExpertAxes,
    calibration: CalibrationSet,
    *,
    dropped: Sequence[int] = (),
    steps: int,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    progress: Progress,
) -> Tuned:
    """Tune the routers of `reduced`. axes: of `original`, which name them. dropped: blocks of it
    that `reduced` lacks. Memory: one model and what backpropagation through it keeps of BATCH
    windows.

    Raises:
        DataError: fewer than eight windows.
    """
    tokens = calibration.tokens
    if len(tokens) < 8:
        raise DataError(f"{len(tokens)} windows are too few to tune routers on",
                        hint="--samples 64")  # fmt: skip
    held = torch.arange(len(tokens)) % 4 == 3
    fit, kept = (mask.nonzero()[:, 0] for mask in (~held, held))
    progress.phase("original's predictions", len(tokens))
    with _whole(original, dtype, device):
        targets = _targets(original, tokens, progress, device)
    with _whole(reduced, dtype, device):
        parameters = _routers(reduced, axes, dropped)
        return _tune(reduced, parameters, targets, tokens, fit, kept, steps, device, seed, progress)


@torch.no_grad()
def divergences(
    original: Skeleton,
    candidates: Sequence[Skeleton],
    calibration: CalibrationSet,
    *,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> list[float]:
    """KL of every candidate to the original over the calibration windows, as `Targets` take it.
    One model is in memory at a time."""
    tokens = calibration.tokens
    progress.phase("original's predictions", len(tokens))
    with _whole(original, dtype, device):
        targets = _targets(original, tokens, progress, device)
    found = []
    progress.phase("measuring candidates", len(candidates))
    for skeleton in candidates:
        with _whole(skeleton, dtype, device):
            total = 0.0
            for part in torch.arange(len(tokens)).split(BATCH):
                out = skeleton.model(input_ids=tokens[part].to(device), use_cache=False)
                total += float(targets.kl(out.logits, part)) * len(part)
        found.append(total / len(tokens))
        progress.step()
    return found


@contextmanager
def _whole(skeleton: Skeleton, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """The whole model in memory."""
    skeleton.fill("", dtype=dtype, device=device)
    skeleton.model.tie_weights()
    skeleton.model.to(device)
    try:
        yield
    finally:
        for name in list(skeleton.sources):
            if name in dict(skeleton.model.named_parameters()):
                skeleton.drop_parameter(name)


@torch.no_grad()
def _targets(
    skeleton: Skeleton, tokens: torch.Tensor, progress: Progress, device: torch.device
) -> Targets:
    found, logs = [], []
    for part in tokens.split(BATCH):
        own = skeleton.model(input_ids=part.to(device), use_cache=False).logits.float()
        own = own.log_softmax(-1)
        top = own.topk(min(TOP, own.shape[-1] - 1), dim=-1)
        rest = torch.log((1 - top.values.exp().sum(-1, keepdim=True)).clamp_min(TINY))
        logs.append(torch.cat([top.values, rest], dim=-1).cpu())
        found.append(top.indices.cpu())
        progress.step(len(part))
    return Targets(torch.cat(found), torch.cat(logs))


def _routers(
    skeleton: Skeleton, axes: ExpertAxes, dropped: Sequence[int]
) -> dict[str, nn.Parameter]:
    """By the original's names, the router matrices of every layer of experts that is left."""
    own = dict(skeleton.model.named_parameters())
    blocks = len(skeleton.blocks) + len(dropped)
    kept = [block for block in range(blocks) if block not in dropped]
    found = {}
    for number, block in enumerate(kept):
        before, now = f"{skeleton.prefix}.{block}.", f"{skeleton.prefix}.{number}."
        for name in axes.tensors if block in axes.modules else ():
            renamed = now + name.removeprefix(before)
            inside = name.startswith(before) and not axes.of_experts(block, name)
            if inside and renamed in own:
                found[name] = own[renamed]
    return found


def _tune(
    skeleton: Skeleton,
    parameters: Mapping[str, nn.Parameter],
    targets: Targets,
    tokens: torch.Tensor,
    fit: torch.Tensor,
    kept: torch.Tensor,
    steps: int,
    device: torch.device,
    seed: int,
    progress: Progress,
) -> Tuned:
    def kl(windows: torch.Tensor) -> torch.Tensor:
        out = skeleton.model(input_ids=tokens[windows].to(device), use_cache=False)
        return targets.kl(out.logits, windows)

    @torch.no_grad()
    def measure() -> float:
        parts = kept.split(BATCH)
        return sum(float(kl(part)) * len(part) for part in parts) / len(kept)

    first = {name: p.detach().clone() for name, p in parameters.items()}
    before = measure()
    best, after, taken = first, before, 0
    for rate in RATES:
        progress.phase("tuning routers", steps)
        for name, p in parameters.items():
            p.data.copy_(first[name])
        for step in _descend(list(parameters.values()), kl, fit, steps, rate, seed):
            taken += 1
            progress.step()
            if step % max(1, steps // ROUNDS) == 0 or step == steps:
                now = measure()
                if now < after:
                    best, after = {n: p.detach().clone() for n, p in parameters.items()}, now
        if after < before:
            break
    changed = {} if best is first else {n: t.float().cpu() for n, t in best.items()}
    return Tuned(changed, before, after, taken)


def _descend(
    parameters: Sequence[nn.Parameter],
    kl: object,
    fit: torch.Tensor,
    steps: int,
    rate: float,
    seed: int,
) -> Iterator[int]:
    """Adam with a rate that falls to zero; gives the number of every step once it is taken."""
    assert callable(kl)
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.requires_grad_(True)
    optimiser = torch.optim.Adam(parameters, lr=rate)
    try:
        for step in range(1, steps + 1):
            for group in optimiser.param_groups:
                group["lr"] = rate * (1 - (step - 1) / steps)
            chosen = fit[torch.randperm(len(fit), generator=generator)[:BATCH]]
            loss = kl(chosen)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            yield step
    finally:
        for p in parameters:
            p.requires_grad_(False)
