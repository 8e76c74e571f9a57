"""EBSS: calibration windows that the model writes itself, likely to it and even over its experts.

Expert-balanced self-sampling of MoEQuant (Hu et al., 2025, arXiv 2505.03804, section 4.2) searches

    argmin_D  -1/N sum_i log P(D_i | D_<i) + sigma(D) / tau

sigma the imbalance of experts (see `branching`), with w branches (theirs: w = 4, tau = 1.2). What
differs from the paper, or is not in it [ours]:

rule          `beam` is the paper's. Its windows fall into loops of a few words, likely to the model
              and useless as inputs, so the default is `sample`, which draws from the distribution
              whose mode the beam looks for.
balance       is 1 / tau.
first token   drawn evenly from the vocabulary without its special tokens, each once while they
              last, as in the authors' published script (which is beam search without sigma). No
              log P is counted for it, and no start-of-text token precedes it (as in windows of
              text).
end of text   special tokens are not written, so windows are full; log P is what the model gave.
counts        of tokens routed so far make sigma that of the whole set instead of the window's own.
threshold     a window whose NLL is not finite or above the limit is thrown away: mean plus SPREAD
              standard deviations of all windows, or `limit`.

The model is in memory as a whole, which nothing else in calibration asks for. Same seed and same
machine give the same windows. Left out: block-streamed generation, temperature.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bitnest.calibrate.branching import beam_step, imbalance, level, pick, resample
from bitnest.calibrate.coverage import window_counts
from bitnest.errors import RecipeError, UnsupportedModel
from bitnest.progress import Progress, Silent
from bitnest.sites import is_experts

__all__ = ["RULES", "Generated", "ebss"]

log = logging.getLogger(__name__)

RULES = ("sample", "beam")
SPREAD = 2.0  # standard deviations above the mean NLL that a window may lie
TOGETHER = 8  # windows written at once

Counts = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Generated:
    """Windows a model wrote.

    tokens: (n, length) int64. nll: mean -log P per predicted token, nats (n,) float64. imbalance:
    sigma of the whole window as it was scored, (n,) float64. counts: experts module name -> tokens
    of each window routed to each expert, (n, E) int64. discarded: windows thrown away.
    """

    tokens: torch.Tensor
    nll: torch.Tensor
    imbalance: torch.Tensor
    counts: Counts
    discarded: int = 0


@dataclass(frozen=True)
class _Search:
    """The dials of a search. experts: modules by name. allowed: (V,) tokens that may be written."""

    model: Any
    experts: dict[str, Any]
    allowed: torch.Tensor
    length: int
    beams: int
    balance: float
    rule: str
    generator: torch.Generator


def ebss(
    model: Any,
    tokenizer: Any,
    *,
    windows: int,
    length: int,
    beams: int = 4,
    balance: float = 1 / 1.2,
    rule: str = "sample",
    limit: float | None = None,
    seed: int = 0,
    counts: Mapping[str, torch.Tensor] | None = None,
    together: int = TOGETHER,
    progress: Progress | None = None,
) -> Generated:
    """Let `model`, loaded as a whole, write `windows` windows of `length` tokens.

    tokenizer: says which tokens exist and which are special. beams: branches per window. balance:
    1 / tau, nats per token for a sigma of one; 0 leaves experts out. limit: NLL above which windows
    are thrown away, nats per token. counts: tokens routed so far, experts module name -> (E,); each
    batch of `together` windows is written to level these and all windows before it.

    Raises:
        UnsupportedModel: the model has no routed experts or no cache that can be reordered, or
            every window was thrown away.
        RecipeError: windows longer than the context, or a dial out of its range.
    """
    experts = _experts(model)
    allowed = _allowed(model, tokenizer)
    generator = torch.Generator(device=model.device).manual_seed(seed)
    search = _Search(model, experts, allowed, length, beams, balance, rule, generator)
    _check(search, windows, together)
    progress = progress or Silent()
    progress.phase("self-sampling", windows * length)
    total = None if counts is None else {n: counts[n].double().cpu() for n in experts}
    parts: list[Generated] = []
    for starts in _starts(allowed, windows, seed).split(together):
        # a batch is levelled as if it were one window: its windows do not see each other
        target = total and {name: level(n, float(length)) for name, n in total.items()}
        parts.append(_write(search, starts, target, partial(progress.step, len(starts))))
        total = total and {n: c + parts[-1].counts[n].sum(0) for n, c in total.items()}
    return _sieve(_join(parts), limit)


def _write(
    s: _Search, starts: torch.Tensor, target: Counts | None, step: Callable[[], None]
) -> Generated:
    """One window from each of `starts` (K,). Row K * w + b is branch b of a window."""
    shape = (len(starts), s.beams)
    device = s.model.device
    base = torch.arange(len(starts), device=device)[:, None] * s.beams
    tokens = starts.to(device).repeat_interleave(s.beams)[:, None]
    reward = torch.zeros(shape, dtype=torch.float64, device=device)
    if s.rule == "beam":
        reward[:, 1:] = -torch.inf  # all are equal yet: the first one speaks for them
    paid, cache = torch.zeros_like(reward), None
    with _counting(s.experts, len(tokens)) as routed, torch.inference_mode():
        for t in range(1, s.length):
            logits, cache = _next(s.model, tokens[:, -1:], cache)
            logp = logits.log_softmax(1).nan_to_num(nan=-torch.inf)  # NaN ends with NLL inf
            offered = logp.masked_fill(~s.allowed, -torch.inf)
            sigma = imbalance(routed, target).to(device).view(shape)
            if s.rule == "beam":
                branch, chosen = beam_step(offered.view(*shape, -1), reward, sigma, t, s.balance)
                parent, chosen = (base + branch).flatten(), chosen.flatten()
            else:
                branch, paid = resample(s.balance * t * sigma, paid, s.generator)
                parent = (base + branch).flatten()
                chosen = pick(offered[parent], s.generator)
            reward = (reward.flatten()[parent] + logp[parent, chosen]).view(shape)
            tokens = torch.cat([tokens[parent], chosen[:, None]], dim=1)
            for name in routed:
                routed[name] = routed[name][parent.cpu()]
            cache.reorder_cache(parent)
            step()
        _next(s.model, tokens[:, -1:], cache)  # the last token is routed too
        step()
    nll, sigma = -reward / (s.length - 1), imbalance(routed, target).to(device).view(shape)
    if s.rule == "beam":
        winner = (nll + s.balance * sigma).argmin(1)
    else:
        winner = pick(paid - s.balance * s.length * sigma, s.generator)
    row, at = (base[:, 0] + winner).cpu(), (torch.arange(len(starts)), winner.cpu())
    own = {name: n[row].clone() for name, n in routed.items()}
    return Generated(tokens.cpu()[row].clone(), nll.cpu()[at].clone(), sigma.cpu()[at].clone(), own)


def _next(model: Any, tokens: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
    """Logits (rows, V) float64 after `tokens` (rows, 1), and the grown cache."""
    output = model(input_ids=tokens, past_key_values=cache, use_cache=True)
    cache = output.past_key_values
    if not hasattr(cache, "reorder_cache"):
        raise UnsupportedModel(
            "the model's cache cannot be reordered, which a search in branches needs",
            where=type(model).__name__,
            hint="draw more windows of text instead",
        )
    return output.logits[:, -1].double(), cache


@contextmanager
def _counting(experts: Mapping[str, Any], rows: int) -> Iterator[Counts]:
    """Count routed tokens per row, (rows, E), while the model runs one token of each row."""
    counts = {
        n: torch.zeros(rows, int(m.num_experts), dtype=torch.int64) for n, m in experts.items()
    }

    def counted(name: str, module: Any, inner: Any, hidden: Any, index: Any, gates: Any) -> Any:
        counts[name] = counts[name] + window_counts(index, int(module.num_experts), 1)
        return inner(hidden, index, gates)

    for name, module in experts.items():
        module.forward = partial(counted, name, module, module.forward)
    try:
        yield counts
    finally:
        for module in experts.values():
            del module.forward


def _join(parts: list[Generated]) -> Generated:
    counts = {name: torch.cat([p.counts[name] for p in parts]) for name in parts[0].counts}
    tokens, nll = torch.cat([p.tokens for p in parts]), torch.cat([p.nll for p in parts])
    return Generated(tokens, nll, torch.cat([p.imbalance for p in parts]), counts)


def _sieve(found: Generated, limit: float | None) -> Generated:
    """Without the windows whose NLL is not finite or above the limit."""
    finite = found.nll[found.nll.isfinite()]
    if limit is None and len(finite):
        limit = float(finite.mean() + SPREAD * finite.std(correction=0)) + 1e-9
    good = found.nll.isfinite() & (found.nll <= (torch.inf if limit is None else limit))
    if not good.any():
        least = (
            f"the lowest NLL is {float(finite.min()):.2f}" if len(finite) else "no NLL is finite"
        )
        raise UnsupportedModel(
            f"every window the model wrote was thrown away: {least}",
            hint="check that the model gives sensible text, or raise the limit (nats per token)",
        )
    discarded = int((~good).sum())
    if discarded:
        log.info("self-sampling: %d of %d windows thrown away for their NLL", discarded, len(good))
    counts = {name: n[good] for name, n in found.counts.items()}
    return Generated(found.tokens[good], found.nll[good], found.imbalance[good], counts, discarded)


def _experts(model: Any) -> dict[str, Any]:
    experts = {name: module for name, module in model.named_modules() if is_experts(module)}
    if not experts:
        raise UnsupportedModel(
            "the model has no routed experts, so there is nothing to balance",
            where=type(model).__name__,
            hint="calibrate a dense model on text",
        )
    return experts


def _allowed(model: Any, tokenizer: Any) -> torch.Tensor:
    """Which tokens may be written, (V,) bool: those the tokenizer has, special ones left out."""
    size = model.get_output_embeddings().weight.shape[0]
    allowed = torch.arange(size) < len(tokenizer)
    allowed[[t for t in tokenizer.all_special_ids if t < size]] = False
    return allowed.to(model.device)


def _starts(allowed: torch.Tensor, windows: int, seed: int) -> torch.Tensor:
    """First tokens (windows,), each once while they last."""
    tokens = allowed.cpu().nonzero()[:, 0]
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-windows // len(tokens))
    orders = [torch.randperm(len(tokens), generator=generator) for _ in range(rounds)]
    return tokens[torch.cat(orders)[:windows]]


def _check(s: _Search, windows: int, together: int) -> None:
    context = getattr(s.model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and s.length > context:
        raise RecipeError(
            f"windows of {s.length} tokens are longer than the model's context of {context}",
            hint=f"--length {context} or less",
        )
    if windows < 1 or s.length < 2 or together < 1:
        raise RecipeError(f"{windows} windows of {s.length} tokens", hint="1 or more, of 2 or more")
    if not 1 <= s.beams <= int(s.allowed.sum()):
        raise RecipeError(f"{s.beams} branches per window, with {int(s.allowed.sum())} tokens")
    if not 0 <= s.balance < torch.inf:
        raise RecipeError(f"a balance of {s.balance}", hint="0 or more; 0.83 in MoEQuant")
    if s.rule not in RULES:
        raise RecipeError(f"unknown rule '{s.rule}'", hint="one of: " + ", ".join(RULES))
