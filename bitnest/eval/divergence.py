"""Per-token loss, KL divergence and agreement, from slices of the vocabulary.

    nll = lse_q - q[label]
    KL(P || Q) = sum_v P_v (p_v - q_v) - lse_p + lse_q,    P = softmax(p)

p: logits of the base, q: of the model, lse: log-sum-exp. Both log-sum-exps and the expectation are
accumulated online: each slice rescales what came before by exp(old maximum - new maximum), as in
online softmax (Milakov and Gimelshein, arXiv 1805.02867). Logits are float32; what is carried from
slice to slice and from token to token is float64. Agreement: the largest logit of both is the same
entry, the first of equals.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bitnest.eval.logits import Logits

ROWS, SLICE = 512, 1024  # one block of logits: 2 MiB, so that a CPU works on it in its cache
ROWS_GPU, SLICE_GPU = 4096, 8192


@dataclass(frozen=True)
class Tokens:
    """Per-token results, all (rows,) on the CPU.

    nll: nats, float64. kl: nats, float64, and same: bool, whether the largest logit is the same
    entry; both None without a base.
    """

    nll: torch.Tensor
    kl: torch.Tensor | None = None
    same: torch.Tensor | None = None


class _Softmax:
    """Online log-sum-exp, largest entry and expectation of one block of rows."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.top = torch.full((rows,), -torch.inf, device=device)
        self.index = torch.zeros(rows, dtype=torch.int64, device=device)
        self.sum = torch.zeros(rows, dtype=torch.float64, device=device)
        self.expected = torch.zeros(rows, dtype=torch.float64, device=device)

    def add(self, logits: torch.Tensor, start: int, values: torch.Tensor | None) -> None:
        """Take in a slice (rows, n) that begins at entry `start`; values: what to average."""
        top, index = logits.max(dim=1)
        higher = top > self.top
        self.index = torch.where(higher, index + start, self.index)
        top = torch.maximum(top, self.top)
        decay = (self.top - top).double().exp()
        weights = (logits - top[:, None]).exp_()
        self.sum = self.sum * decay + weights.sum(1).double()
        if values is not None:
            self.expected = self.expected * decay + weights.mul_(values).sum(1).double()
        self.top = top

    @property
    def lse(self) -> torch.Tensor:
        return self.top.double() + self.sum.log()


def compare(
    model: Logits, labels: torch.Tensor, base: Logits | None = None, *, block: int | None = None
) -> Tokens:
    """Loss of `model` on labels (rows,), and its divergence from `base` where one is given.

    block: vocabulary entries per slice; chosen by device if None.

    Raises:
        ValueError: rows or vocabularies of different sizes.
    """
    if len(labels) != model.rows or (
        base is not None and (base.rows, base.vocab) != (model.rows, model.vocab)
    ):
        raise ValueError("rows or vocabularies of different sizes are compared")
    device = model.slice(slice(0, 1), 0, 1).device
    step = ROWS if device.type == "cpu" else ROWS_GPU
    block = block or (SLICE if device.type == "cpu" else SLICE_GPU)
    parts = [
        _block(model, base, labels, slice(start, min(start + step, model.rows)), block, device)
        for start in range(0, model.rows, step)
    ]
    nll = torch.cat([part.nll for part in parts])
    if base is None:
        return Tokens(nll)
    return Tokens(
        nll,
        torch.cat([part.kl for part in parts if part.kl is not None]),
        torch.cat([part.same for part in parts if part.same is not None]),
    )


def _block(
    model: Logits,
    base: Logits | None,
    labels: torch.Tensor,
    rows: slice,
    block: int,
    device: torch.device,
) -> Tokens:
    count = rows.stop - rows.start
    label = labels[rows].to(device)
    chosen = torch.zeros(count, device=device)
    soft_q, soft_p = _Softmax(count, device), _Softmax(count, device)
    for start in range(0, model.vocab, block):
        stop = min(start + block, model.vocab)
        q = model.slice(rows, start, stop)
        inside = (label >= start) & (label < stop)
        at = (label - start).clamp(0, stop - start - 1)
        chosen = torch.where(inside, q.gather(1, at[:, None])[:, 0], chosen)
        if base is not None:
            p = base.slice(rows, start, stop).to(device)
            soft_p.add(p, start, p - q)
        soft_q.add(q, start, None)
    lse = soft_q.lse
    nll = (lse - chosen.double()).cpu()
    if base is None:
        return Tokens(nll)
    kl = soft_p.expected / soft_p.sum - soft_p.lse + lse
    return Tokens(nll, kl.cpu(), (soft_p.index == soft_q.index).cpu())
