"""Which branches of a self-sampled text go on: the two rules of `ebss`, and what they balance.

sigma of a branch is how far the shares of its routed slots are from what they should be:

    sigma = mean over layers of sqrt( 1/(E-1) sum_e (u_e - q_e)^2 )

With even shares q_e = 1/E this is MoEQuant's standard deviation (arXiv 2505.03804, eq. 3 and 4).
With tokens counted before, q is what would level them (`level`) [ours].

`beam`, the paper's (eq. 13 and 14): of all branches S and tokens v the w lowest go on by

    score(S v) = -(R_S + log P(v|S)) / (l + 1) + sigma(S) / tau,   R_S = log P(S)

`sample` [ours]: the paper looks for the mode of a distribution that this rule draws from,

    p(D)  ~  P(D) exp(-n sigma(D) / tau)

by particles: each of w branches draws its next token from P; they are weighted by their factor
exp(-l sigma / tau), and once their effective number is below w / 2, w are drawn by weight and start
again with equal ones. (Sequential Monte Carlo: Doucet, de Freitas and Gordon, 2001.)

In both, sigma is that of the branch before its next token, whose routing is not known yet.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

__all__ = ["beam_step", "imbalance", "level", "pick", "resample"]


def imbalance(
    counts: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """sigma of each row; (n,) float64.

    counts: experts module name -> (n, E). target: q, (E,) each; even if None. A layer that routed
    none of a row's tokens counts as 0.
    """
    layers = []
    for name, own in counts.items():
        n = own.double()
        total, experts = n.sum(1, keepdim=True), n.shape[1]
        q = torch.full_like(n[0], 1 / experts) if target is None else target[name].to(n.device)
        off = n / total.clamp_min(1) - q
        sigma = (off.square().sum(1) / max(experts - 1, 1)).sqrt()
        layers.append(sigma.where(total[:, 0] > 0, 0.0))
    return torch.stack(layers).mean(0)


def level(counts: torch.Tensor, slots: float) -> torch.Tensor:
    """Shares in which `slots` more tokens make the experts as even as they can be, (E,) float64.

    counts: (E,). Water filling: the height h with sum_e max(0, h - n_e) = slots is found, the
    shares are max(0, h - n_e) / slots.
    """
    n = counts.double().sort().values
    filled = torch.arange(1, len(n) + 1, dtype=torch.float64)
    heights = (n.cumsum(0) + slots) / filled  # h, were just so many of the least used filled
    h = heights[(heights > n).nonzero()[-1]]
    return (h - counts.double()).clamp_min(0) / slots


def beam_step(
    logp: torch.Tensor, reward: torch.Tensor, sigma: torch.Tensor, length: int, balance: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The w lowest scores of each window: their branches (K, w) and tokens (K, w).

    logp: (K, w, V), -inf for what may not be written. reward: R_S (K, w); -inf for a branch that is
    not to go on. sigma: (K, w). length: l + 1 less the first token, which has no log P.
    """
    score = balance * sigma[:, :, None] - (reward[:, :, None] + logp) / length
    best = score.flatten(1).topk(logp.shape[1], largest=False).indices
    return best // logp.shape[2], best % logp.shape[2]


def resample(
    energy: torch.Tensor, paid: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which branches go on (K, w), and the energies they have answered for (K, w).

    energy: l sigma / tau of each. paid: that at the last resampling of its window. Windows whose
    effective number of branches, (sum p)^2 / sum p^2, is w / 2 or more stay as they are.
    """
    p = (paid - energy).softmax(1)
    drawn = p.multinomial(p.shape[1], replacement=True, generator=generator)
    few = p.square().sum(1, keepdim=True) * p.shape[1] > 2
    stay = torch.arange(p.shape[1], device=p.device).expand_as(drawn)
    return drawn.where(few, stay), energy.gather(1, drawn).where(few, paid)


def pick(logp: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One token of each row of logp (n, V), drawn in proportion to exp(logp); (n,)."""
    p = logp.softmax(1)
    p = p.where(p.isfinite(), 1 / p.shape[1])  # a row without any: its window has NLL inf
    return p.multinomial(1, generator=generator)[:, 0]
