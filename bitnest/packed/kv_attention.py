"""Attention that reads a quantised cache as it is stored, in models of transformers.

A model asks its cache for keys and values and hands them to an attention function. For a few new
tokens `KVLayer.update` gives `Deferred` tensors: shapes without numbers, and a snapshot of the
layer. The attention function `sdpa`, wrapped once in transformers' table, knows them and runs the
kernel (`kernels/cpu/attention.py`); every other call goes on to what was there. Anything else that
touches a deferred tensor, other attention functions too, has it decoded, as if it had never been
deferred: the same numbers, later.

Refused by the kernel, said once in the log: see `_refused` and `kernels/cpu/attention.why_not`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

from bitnest.kernels.cpu import attention

log = logging.getLogger(__name__)

QUERIES = 8  # new tokens up to which reading is deferred
_said: set[str] = set()


class Reading:
    """What a pass reads of a layer. decode: gives its keys and values."""

    def __init__(
        self,
        held: attention.Held,
        decode: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        self.held, self.decode = held, decode
        self._decoded: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def decoded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, made at the first use."""
        if self._decoded is None:
            self._decoded = self.decode()
        return self._decoded


class Deferred(torch.Tensor):
    """Keys (number 0) or values (1) of a reading, of their shape and type, not decoded yet."""

    reading: Reading
    number: int
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, reading: Reading, number: int, shape: torch.Size) -> Deferred:
        like = reading.held.keys
        found: Deferred = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=like.dtype, device=like.device
        )
        found.reading, found.number = reading, number
        return found

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Deferred({'values' if self.number else 'keys'}, shape={tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Decode, then do what was asked."""

        def plain(x: Any) -> Any:
            return x.reading.decoded[x.number] if isinstance(x, Deferred) else x

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


def defer(
    held: attention.Held,
    visible: int,
    decode: Callable[[], tuple[torch.Tensor, torch.Tensor]],
) -> tuple[Deferred, Deferred]:
    """Keys and values of `visible` tokens, to be read later."""
    reading, (keys, values) = Reading(held, decode), (held.keys, held.values)
    shapes = [torch.Size((*t.shape[:2], visible, t.shape[3])) for t in (keys, values)]
    return Deferred(reading, 0, shapes[0]), Deferred(reading, 1, shapes[1])


def install() -> None:
    """Wrap `sdpa` in transformers' table of attention functions, once."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if getattr(usual, "reads_deferred", False):
        return

    def sdpa(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        attention_mask: torch.Tensor | None, **options: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        if not isinstance(key, Deferred) or not isinstance(value, Deferred):
            found: tuple[torch.Tensor, None] = usual(
                module, query, key, value, attention_mask, **options
            )
            return found
        reason = _refused(module, query, key, value, attention_mask, options)
        if reason is None:
            return _attend(module, query, key, attention_mask, options), None
        if reason not in _said:
            _said.add(reason)
            log.info("attention over the quantised cache decodes all of it: %s", reason)
        keys, values = key.reading.decoded
        return usual(module, query, keys, values, attention_mask, **options)  # type: ignore[no-any-return]

    sdpa.reads_deferred = True  # type: ignore[attr-defined]
    ALL_ATTENTION_FUNCTIONS.register("sdpa", sdpa)


def _refused(
    module: Any, query: torch.Tensor, key: Deferred, value: Deferred,
    mask: torch.Tensor | None, options: dict[str, Any],
) -> str | None:  # fmt: skip
    """Why keys and values have to be decoded; None: the kernel runs."""
    if key.reading is not value.reading or key.number or not value.number:
        return "keys and values of two readings"
    causal = options.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        return "attention that is not causal"
    if options.get("dropout") or (torch.is_grad_enabled() and query.requires_grad):
        return "training"
    for name in ("softcap", "s_aux", "position_bias", "cache"):
        if options.get(name) is not None:
            return f"attention with {name}"
    if mask is not None and (mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[3] != key.shape[2]):
        return f"a mask of shape {tuple(mask.shape)}"
    return attention.why_not(key.reading.held, query.shape[2], query.shape[1])


def _attend(
    module: Any, query: torch.Tensor, key: Deferred, mask: torch.Tensor | None,
    options: dict[str, Any],
) -> torch.Tensor:  # fmt: skip
    scaling = options.get("scaling")
    return attention.attend(
        query, key.reading.held, query.shape[-1] ** -0.5 if scaling is None else scaling,
        mask=None if mask is None else mask[:, 0],
    )  # fmt: skip
