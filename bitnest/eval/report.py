"""What an evaluation found, as frozen values that turn into JSON.

Every figure stands beside the protocol it was measured by: windows, their length and selection, the
compute type, the number of predictions, and a hash of the tokens.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bitnest.eval.divergence import Tokens
from bitnest.formats.kv import parse_kv


@dataclass(frozen=True)
class Text:
    """One text as it was measured.

    label, source: as named by the user. windows, window: number of windows and tokens in each.
    selection: `spread`, evenly over the text without overlap. predictions: windows * (window - 1),
    every token but a window's first. sha256: of the tokens, int64 in order.
    """

    label: str
    source: str
    windows: int
    window: int
    selection: str
    predictions: int
    sha256: str


@dataclass(frozen=True)
class Divergence:
    """KL(base || model) over predictions in nats, and the share with the same largest logit.

    error: standard error of `mean`, from the spread of the windows' means; None for one window. It
    is large where a few tokens hold most of the KL, as changed routes of an MoE do."""

    mean: float
    error: float | None
    median: float
    p90: float
    p99: float
    max: float
    same_top: float


@dataclass(frozen=True)
class Score:
    """One model on one text.

    perplexity: exp(nll). nll: mean over predictions, nats. nll_error: its standard error, from the
    spread of the windows' means (tokens of one window are not independent); None for one window.
    kl: None without a base, and for the base's own row.
    """

    text: str
    perplexity: float
    nll: float
    nll_error: float | None
    kl: Divergence | None


@dataclass(frozen=True)
class Row:
    """One model, whole or with experts switched off.

    model: its name. nbytes: bytes of its safetensors files. parameters: weights of the checkpoint
    everything is compared with (its own without a base), None if unknown. bits_per_weight:
    8 nbytes / parameters. streamed: whether logits were streamed through the head, or came from the
    model's own forward. without: `LAYER:EXPERT` of each expert switched off (`eval.without`); the
    sizes are still those of the files. kv: format of the KV cache that the text went through, empty
    for none.
    """

    model: str
    base: bool
    nbytes: int
    parameters: int | None
    bits_per_weight: float | None
    streamed: bool
    scores: tuple[Score, ...]
    without: tuple[str, ...] = ()
    kv: str = ""


@dataclass(frozen=True)
class EvalReport:
    """Models side by side, the base first. base: its name, or None. dtype: compute type."""

    base: str | None
    dtype: str
    texts: tuple[Text, ...]
    rows: tuple[Row, ...]

    @property
    def unread_caches(self) -> dict[str, int]:
        """KV formats whose rows say nothing, as no prediction reads a token that they quantised;
        for each a window half of which does. A window's last token is only predicted."""
        formats = [parse_kv(name) for name in dict.fromkeys(row.kv for row in self.rows) if name]
        unread = [kv for kv in formats if kv.folded(self.texts[0].window - 1) == 0]
        return {kv.name: 2 * (kv.window + kv.group) for kv in unread}

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "unread_caches": self.unread_caches}


def score(text: Text, tokens: Tokens) -> Score:
    """Summarise the per-token results of one text; rows are windows in order.

    Percentiles interpolate linearly between predictions.
    """
    nll = float(tokens.nll.mean())
    error = _error(tokens.nll, text.windows)
    kl = None
    if tokens.kl is not None and tokens.same is not None:
        kl = Divergence(
            mean=float(tokens.kl.mean()),
            error=_error(tokens.kl, text.windows),
            median=_percentile(tokens.kl, 0.5),
            p90=_percentile(tokens.kl, 0.9),
            p99=_percentile(tokens.kl, 0.99),
            max=float(tokens.kl.max()),
            same_top=float(tokens.same.double().mean()),
        )
    perplexity = math.exp(nll) if nll < math.log(torch.finfo(torch.float64).max) else math.inf
    return Score(text.label, perplexity, nll, error, kl)


def _error(values: torch.Tensor, windows: int) -> float | None:
    """Standard error of the mean: tokens of one window are not independent, windows are."""
    if windows < 2:
        return None
    return float(values.view(windows, -1).mean(1).std()) / math.sqrt(windows)


def _percentile(values: torch.Tensor, share: float) -> float:
    ordered = values.sort().values  # torch.quantile is limited to 16 million values
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (place - low) * (ordered[high] - ordered[low]))
