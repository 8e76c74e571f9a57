"""Choosing the next token: temperature, top-k, top-p and a seed, the same for every backend.

    p = softmax(logits / temperature), sorted from the likeliest token down
    top-k keeps the first k of them; top-p then keeps the shortest prefix whose mass reaches top_p
    token = the first kept one whose cumulative mass exceeds u * (mass kept),  u uniform in [0, 1)

u depends only on the request's seed and the token's position. So a seed gives the same text alone
or in a batch, on either backend, as long as the logits agree; no global random state plays a part.
Temperature 0 is arg max and takes none of this path.

Left out on purpose: repetition, presence and frequency penalties, min-p, logit bias, beam search.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """How one request chooses tokens. `temperature` 0 is greedy; `top_k` 0 keeps every token."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 2.0:
            raise ValueError(f"temperature must be between 0 and 2, not {self.temperature}")
        if not 0.0 <= self.top_p <= 1.0:
            raise ValueError(f"top_p must be between 0 and 1, not {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or more, not {self.top_k}")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that decides the token after `position` tokens, prompt included."""
    return random.Random(f"{seed}:{position}").random()


def pick_tokens(
    logits: torch.Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float]
) -> torch.Tensor:
    """One token id per row: logits (R, V) -> int64 (R,). No row may be greedy."""

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device).unsqueeze(-1)

    temperature = column([s.temperature for s in samplings])
    top_p = column([s.top_p for s in samplings])
    vocabulary = logits.shape[-1]
    top_k = torch.tensor([[s.top_k or vocabulary] for s in samplings], device=logits.device)
    u = column(list(uniforms))

    logits = logits.float()
    logits = logits - logits.amax(-1, keepdim=True)  # a tiny temperature then cannot overflow
    p, order = torch.softmax(logits / temperature, -1).sort(dim=-1, descending=True, stable=True)
    p = p.masked_fill(torch.arange(vocabulary, device=p.device) >= top_k, 0.0)
    p = p / p.sum(-1, keepdim=True)
    before = p.cumsum(-1) - p  # mass of the likelier tokens; 0 for the first, which always stays
    keep = before < top_p
    keep[:, 0] = True
    p = p.masked_fill(~keep, 0.0)
    mass = p.cumsum(-1)
    rank = torch.searchsorted(mass, u * mass[:, -1:], right=True)
    last = (p > 0).sum(-1, keepdim=True) - 1  # rounding may put u on the very end
    return order.gather(-1, torch.minimum(rank, last)).squeeze(-1)


def force_sampled(
    logits: torch.Tensor, samplings: Sequence[Sampling], positions: Sequence[int]
) -> torch.Tensor:
    """Logits (R, V) whose arg max is the chosen token of every row; greedy rows are left alone.

    Both backends take the arg max of what this returns, in place of drawing tokens themselves.
    """
    rows = [row for row, sampling in enumerate(samplings) if not sampling.greedy]
    if not rows:
        return logits
    index = torch.tensor(rows, device=logits.device)
    chosen = pick_tokens(
        logits[index],
        [samplings[row] for row in rows],
        [uniform(samplings[row].seed, positions[row]) for row in rows],
    )
    forced = logits.clone()
    forced[index] = float("-inf")
    forced[index, chosen] = 0.0
    return forced
