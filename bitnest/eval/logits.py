"""Logits without ever holding all of them: the final hidden states, the head, a slice at a time.

    l[t, v] = post(h[t] . W[v] + b[v])

`record` runs a model with its head's forward replaced by a recorder, so that the head computes
nothing and `h` is what it would have read. `Streamed` multiplies `h` with slices of `W` on demand.
Families differ in `post`, elementwise steps after the head; `POST` lists them by config field.

Nothing rests on that table being right: `open_head` compares streamed logits with the model's own
on a few tokens and gives the streamed path up where they differ. Then `own_logits` serves, the
model's untouched forward. Products are float32 whatever type the model computes in.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from bitnest.errors import BitnestError
from bitnest.eval.kv import passes
from bitnest.formats.kv import KVFormat

log = logging.getLogger(__name__)

PROBE = 16  # tokens the streamed logits are checked on
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Largest difference from the model's own logits, relative to the largest of them."""

POST = (
    ("lm_head_multiplier", "multiply"),  # Falcon-H1
    ("output_multiplier", "multiply"),
    ("logit_scale", "multiply"),  # Cohere
    ("logits_scaling", "divide"),  # Granite
    ("final_logit_softcapping", "cap"),  # Gemma 2 and later, nanochat
    ("logits_soft_cap", "cap"),  # RecurrentGemma
    ("output_logit_soft_cap", "cap"),  # xLSTM
)
"""Config field -> step after the head, in order. cap c: c tanh(l / c)."""
MULTIPLYING = ("hyperclovax",)  # families that multiply by the field others divide by

Post = tuple[tuple[str, float], ...]


class Logits(Protocol):
    """Logits of `rows` tokens over `vocab` entries, computed slice by slice."""

    @property
    def rows(self) -> int:
        """Tokens."""

    @property
    def vocab(self) -> int:
        """Vocabulary entries."""

    def slice(self, rows: slice, start: int, stop: int) -> torch.Tensor:
        """(rows, stop - start) float32."""


@dataclass(frozen=True)
class Head:
    """What turns final hidden states into logits.

    weight: (vocab, hidden) in any float type. bias: (vocab,) or None. post: steps of `POST`.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    post: Post = ()


@dataclass(frozen=True)
class Streamed:
    """Logits of hidden (rows, width) through a head."""

    hidden: torch.Tensor
    head: Head

    @property
    def rows(self) -> int:
        """Tokens."""
        return self.hidden.shape[0]

    @property
    def vocab(self) -> int:
        """Vocabulary entries."""
        return self.head.weight.shape[0]

    def slice(self, rows: slice, start: int, stop: int) -> torch.Tensor:
        """(rows, stop - start) float32."""
        weight = self.head.weight[start:stop].float()
        hidden = self.hidden[rows].to(weight.device, torch.float32)
        bias = self.head.bias
        part = nn.functional.linear(
            hidden, weight, None if bias is None else bias[start:stop].float()
        )
        return _apply(self.head.post, part)


@dataclass(frozen=True)
class Full:
    """Logits that exist already: values (rows, vocab), in memory or on disk; slices on `device`."""

    values: torch.Tensor
    device: torch.device

    @property
    def rows(self) -> int:
        """Tokens."""
        return self.values.shape[0]

    @property
    def vocab(self) -> int:
        """Vocabulary entries."""
        return self.values.shape[1]

    def slice(self, rows: slice, start: int, stop: int) -> torch.Tensor:
        """(rows, stop - start) float32."""
        return self.values[rows, start:stop].to(self.device, torch.float32)


def _apply(post: Post, logits: torch.Tensor) -> torch.Tensor:
    for step, value in post:
        if step == "cap":
            logits = logits.div_(value).tanh_().mul_(value)
        else:
            logits = logits.mul_(value if step == "multiply" else 1 / value)
    return logits


def post_steps(config: Any) -> Post:
    """The steps a model's config declares; config: a transformers configuration."""
    text = config.get_text_config()
    family = str(getattr(text, "model_type", ""))
    steps: list[tuple[str, float]] = []
    for field, step in POST:
        value = getattr(text, field, None)
        if isinstance(value, int | float) and not isinstance(value, bool):
            if field == "logits_scaling" and family.startswith(MULTIPLYING):
                step = "multiply"
            steps.append((step, float(value)))
    return tuple(steps)


@contextmanager
def _recording(head: nn.Module) -> Iterator[list[torch.Tensor]]:
    seen: list[torch.Tensor] = []

    def recorder(hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        seen.append(hidden)
        return hidden.new_zeros(*hidden.shape[:-1], 1)

    before = head.__dict__.get("forward")
    head.forward = recorder  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        del head.forward
        if before is not None:
            head.forward = before  # type: ignore[method-assign]


@torch.no_grad()
def record(model: Any, tokens: torch.Tensor, kv: KVFormat | None = None) -> torch.Tensor:
    """Hidden states the head of `model` would read for tokens (N, T): (N, T, width). kv: of the
    cache that the text goes through, see `eval.kv`.

    Raises:
        ValueError: the model does not call its head exactly once on all tokens.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError("it names no output embedding")
    run = passes(model, tokens, kv)
    with _recording(head) as seen:
        count = sum(1 for _ in run)
    hidden = seen[0] if len(seen) == 1 else torch.cat(seen, dim=1)
    if len(seen) != count or hidden.shape[:-1] != tokens.shape:
        raise ValueError("its head is not called once on all tokens")
    return hidden


@torch.no_grad()
def own_logits(model: Any, tokens: torch.Tensor, kv: KVFormat | None = None) -> torch.Tensor:
    """The model's own logits (N, T, vocab) for tokens (N, T). kv: as for `record`."""
    return torch.cat([found.logits for found in passes(model, tokens, kv)], dim=1)


def open_head(model: Any, tokens: torch.Tensor, name: str) -> Head | None:
    """The head of `model` if streaming through it gives the model's own logits, else None.

    tokens: (N, T) int64, of which the first few of one window are tried. name: for messages.

    Raises:
        BitnestError: the model's logits hold NaN.
    """
    probe = tokens[:1, :PROBE]
    own = own_logits(model, probe)[0].float()
    if own.isnan().any():
        raise not_a_number(name)
    reason = "its streamed logits differ from its own"
    try:
        hidden = record(model, probe)[0]
        weight, bias = _weight_of(model.get_output_embeddings(), hidden.shape[-1])
        limit = TOLERANCE.get(hidden.dtype, 2e-5) * max(1.0, float(own.abs().max()))
        # a family may use a field of this name elsewhere: the steps declared first, then none
        for post in dict.fromkeys((post_steps(model.config), ())):
            head = Head(weight, bias, post)
            streamed = Streamed(hidden, head).slice(slice(None), 0, weight.shape[0])
            if streamed.shape == own.shape and bool((streamed - own).abs().max() <= limit):
                return head
    except (ValueError, RuntimeError, IndexError) as error:
        reason = str(error).strip().split("\n")[0]
    log.info("%s: full logits, one window at a time (%s)", name, reason)
    return None


def _weight_of(head: Any, width: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or weight.shape[1] != width:
        raise ValueError("its head is no linear layer")
    return weight.detach(), bias.detach() if isinstance(bias, torch.Tensor) else None


def not_a_number(name: str) -> BitnestError:
    """The error for a model that computes NaN."""
    return BitnestError(
        f"the model '{name}' computes NaN or infinite values",
        where=name,
        hint="its weights are damaged, or the compute type is too narrow: try --dtype float32",
    )
